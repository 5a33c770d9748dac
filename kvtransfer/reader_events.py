"""What the reader's lease machine is told (events), and what it wants done (instructions)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.errors import TandemError
    from contracts.ids import BlockId, Incarnation, LeaseId, WorkerId
    from contracts.messages import (
        AckRequest,
        ConfirmReply,
        ConfirmRequest,
        HandoffReply,
        LeaseTerms,
        Peer,
        ProgressReply,
        ProgressRequest,
        RenewReply,
        RenewRequest,
        Seal,
    )
    from kvtransfer.block_work import Landing
    from kvtransfer.transport import BlockPair, PullResult

#: A holder's life: acknowledgements and renewals are batched by it.
HolderKey = tuple["WorkerId", "Incarnation"]


class AbortReason(StrEnum):
    """Why a lease ended without adoption: a metric label."""

    CANCELLED = "cancelled"
    EXPIRED = "expired"
    WITHDRAWN = "withdrawn"
    PULL_FAILED = "pull_failed"
    #: Pulled again and again, some block never had the checksum that its holder announced.
    CORRUPT = "corrupt"
    NOT_CONFIRMED = "not_confirmed"
    HOLDER_GONE = "holder_gone"


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Offered:
    """A holder's offer; answered with Verdict or RefuseOffer. `owner` will hold the adopted blocks.

    `waits`: without room it waits for some; else it is refused, and where there is some it goes before those that
    wait: whoever asks for it has decided that it may.

    `have`: so many leading blocks stand here already. Only the others are set aside, pulled and adopted. It stays what
    it was in the first offer of a lease that was taken.

    `follows`: CaughtUp is wanted, whenever all that was announced before the seal is here.
    """

    terms: LeaseTerms
    owner: str
    waits: bool = True
    have: int = 0
    follows: bool = False


@dataclass(frozen=True, slots=True)
class ProgressArrived:
    """Answered with ReplyProgress or RefuseProgress."""

    body: ProgressRequest


@dataclass(frozen=True, slots=True)
class PullEnded:
    """The transport reported the lease's pull terminal."""

    lease_id: LeaseId
    result: PullResult


@dataclass(frozen=True, slots=True)
class Landed:
    """What LandBlocks asked for has ended: the blocks are not touched any more."""

    lease_id: LeaseId
    result: Landing


@dataclass(frozen=True, slots=True)
class ConfirmAnswered:
    lease_id: LeaseId
    reply: ConfirmReply


@dataclass(frozen=True, slots=True)
class ConfirmFailed:
    lease_id: LeaseId
    error: TandemError


@dataclass(frozen=True, slots=True)
class RenewAnswered:
    holder: HolderKey
    reply: RenewReply


@dataclass(frozen=True, slots=True)
class RenewFailed:
    holder: HolderKey
    error: TandemError


@dataclass(frozen=True, slots=True)
class AckEnded:
    """The call that carried acknowledgements ended; `error` None when it arrived."""

    holder: HolderKey
    error: TandemError | None


@dataclass(frozen=True, slots=True)
class CancelRequested:
    lease_id: LeaseId
    reason: str


@dataclass(frozen=True, slots=True)
class HolderGone:
    """That life of that worker is over, as membership or the transport found."""

    worker_id: WorkerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class BlocksFreed:
    """Blocks may have become available: waiting offers may reserve."""


@dataclass(frozen=True, slots=True)
class ReaderTick:
    """Time passed."""


ReaderEvent = (
    Offered
    | ProgressArrived
    | PullEnded
    | Landed
    | ConfirmAnswered
    | ConfirmFailed
    | RenewAnswered
    | RenewFailed
    | AckEnded
    | CancelRequested
    | HolderGone
    | BlocksFreed
    | ReaderTick
)


# --- instructions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer to an offer."""

    reply: HandoffReply


@dataclass(frozen=True, slots=True)
class RefuseOffer:
    error: TandemError


@dataclass(frozen=True, slots=True)
class ReplyProgress:
    reply: ProgressReply


@dataclass(frozen=True, slots=True)
class RefuseProgress:
    error: TandemError


@dataclass(frozen=True, slots=True, kw_only=True)
class StartPull:
    """Start it at once; answer with PullEnded when it is terminal."""

    lease_id: LeaseId
    holder: Peer
    endpoints: Mapping[str, bytes]
    pairs: tuple[BlockPair, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LandBlocks:
    """Check these pulled blocks, and move them on to the device; answer with Landed."""

    lease_id: LeaseId
    blocks: tuple[BlockId, ...]
    #: Parallel to `blocks`; empty where the holder announced none.
    checksums: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class StopPull:
    """Ask the transport to end the lease's pull early; PullEnded follows as ever."""

    lease_id: LeaseId


@dataclass(frozen=True, slots=True, kw_only=True)
class AskConfirm:
    """Answer with ConfirmAnswered or ConfirmFailed."""

    lease_id: LeaseId
    holder: Peer
    body: ConfirmRequest
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AskRenew:
    """Answer with RenewAnswered or RenewFailed."""

    holder: Peer
    body: RenewRequest
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SendAck:
    """Answer with AckEnded."""

    holder: Peer
    body: AckRequest
    timeout_s: float


@dataclass(frozen=True, slots=True)
class CaughtUp:
    """All blocks that were announced of an unsealed lease are here, `num_blocks` from its beginning; once for each
    such number."""

    lease_id: LeaseId
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAdopted:
    """Exactly once per adopted lease: `owner` holds `blocks`, which were pulled: all from the first that did not stand
    here up to the seal, in the lease's order. None where the seal is not past what stood here."""

    lease_id: LeaseId
    owner: str
    blocks: list[BlockId]
    seal: Seal


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseAborted:
    """Exactly once per lease that was accepted and not adopted. Its blocks are free or in quarantine."""

    lease_id: LeaseId
    reason: AbortReason
    error: TandemError


ReaderInstruction = (
    Verdict
    | RefuseOffer
    | ReplyProgress
    | RefuseProgress
    | StartPull
    | LandBlocks
    | StopPull
    | AskConfirm
    | AskRenew
    | SendAck
    | CaughtUp
    | LeaseAdopted
    | LeaseAborted
)
