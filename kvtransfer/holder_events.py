"""What the holder's lease machine is told (events), and what it wants done (instructions)."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from contracts.ids import BlockId, Incarnation, LeaseId, WorkerId
    from contracts.messages import (
        AckRequest,
        ConfirmReply,
        ConfirmRequest,
        Empty,
        LeaseTerms,
        Peer,
        ProgressReply,
        ProgressRequest,
        RenewReply,
        RenewRequest,
        Seal,
    )
    from kvtransfer.block_work import Preparation


class LeaseOutcome(StrEnum):
    """How a lease ended at its holder."""

    #: The reader confirmed, and acknowledged or fell silent: it answers for the request now.
    RELEASED = "released"
    #: The reader was lost before it confirmed, or never answered within the term.
    EXPIRED = "expired"
    #: The holder's own side took the offer back.
    WITHDRAWN = "withdrawn"
    #: The reader will not have it: it refused the offer, or let the lease go before it confirmed.
    REFUSED = "refused"


# --- events ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """A lease with a new id over `blocks`, whose bytes must stand now; `terms.ttl_s` is its term.

    `num_final_blocks`: so many are final already. `seal`: all are, and this seals them. `max_age_s`: no grant
    reaches further than this from now; None: only the holder's own bound counts. `whole`: of a lease with a seal;
    it is offered only once the offer can carry all of it.
    """

    terms: LeaseTerms
    reader: Peer
    blocks: tuple[BlockId, ...]
    num_final_blocks: int = 0
    seal: Seal | None = None
    max_age_s: float | None = None
    whole: bool = False


@dataclass(frozen=True, slots=True)
class OfferAnswered:
    """The reader took the offer; its blocks are set aside, or will be. `expected`: the position up to which it knows
    the blocks, or had them before."""

    lease_id: LeaseId
    expected: int = 0


@dataclass(frozen=True, slots=True)
class OfferFailed:
    lease_id: LeaseId
    error: TandemError


@dataclass(frozen=True, slots=True)
class Advanced:
    """The first `num_final_blocks` of the lease's blocks will never be written again."""

    lease_id: LeaseId
    num_final_blocks: int


@dataclass(frozen=True, slots=True)
class Sealed:
    """The lease grows no more; it is its first `num_final_blocks` blocks."""

    lease_id: LeaseId
    num_final_blocks: int
    seal: Seal


@dataclass(frozen=True, slots=True)
class Prepared:
    """What PrepareBlocks asked for has ended: the blocks are not touched any more."""

    lease_id: LeaseId
    result: Preparation


@dataclass(frozen=True, slots=True)
class ProgressAnswered:
    lease_id: LeaseId
    reply: ProgressReply


@dataclass(frozen=True, slots=True)
class ProgressFailed:
    lease_id: LeaseId
    error: TandemError


@dataclass(frozen=True, slots=True)
class FarewellEnded:
    """The call that told the reader of a withdrawal ended; `error` None when it arrived."""

    lease_id: LeaseId
    error: TandemError | None


@dataclass(frozen=True, slots=True)
class ConfirmAsked:
    body: ConfirmRequest


@dataclass(frozen=True, slots=True)
class RenewAsked:
    body: RenewRequest


@dataclass(frozen=True, slots=True)
class AckArrived:
    body: AckRequest


@dataclass(frozen=True, slots=True)
class Withdrawn:
    lease_id: LeaseId
    reason: str


@dataclass(frozen=True, slots=True)
class ReaderGone:
    """That life of that worker is over, as membership or the transport found."""

    worker_id: WorkerId
    incarnation: Incarnation


@dataclass(frozen=True, slots=True)
class HolderTick:
    """Time passed."""


HolderEvent = (
    Opened
    | OfferAnswered
    | OfferFailed
    | Advanced
    | Sealed
    | Prepared
    | ProgressAnswered
    | ProgressFailed
    | FarewellEnded
    | ConfirmAsked
    | RenewAsked
    | AckArrived
    | Withdrawn
    | ReaderGone
    | HolderTick
)


# --- instructions ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SendOffer:
    """Offer `terms`; answer with OfferAnswered or OfferFailed."""

    terms: LeaseTerms
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrepareBlocks:
    """Make these final blocks ready to be pulled (checksums, staging); answer with Prepared."""

    lease_id: LeaseId
    blocks: tuple[BlockId, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SendProgress:
    """Answer with ProgressAnswered or ProgressFailed."""

    reader: Peer
    body: ProgressRequest
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SendFarewell:
    """A Progress that withdraws; answer with FarewellEnded."""

    reader: Peer
    body: ProgressRequest
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseEnded:
    """Exactly once per lease. Its pins are gone; while blocks of it are being prepared they go right after that,
    because a late copy must not meet another's bytes."""

    lease_id: LeaseId
    outcome: LeaseOutcome
    reason: str


@dataclass(frozen=True, slots=True)
class Answer:
    """The reply to the question this event was."""

    body: ConfirmReply | RenewReply | ProgressReply | Empty


@dataclass(frozen=True, slots=True)
class Refuse:
    """The question this event was is answered with this error."""

    error: TandemError


HolderInstruction = SendOffer | PrepareBlocks | SendProgress | SendFarewell | LeaseEnded | Answer | Refuse
