"""What happens to one request at the gateway, and what the gateway does about it: the words of
`gateway.ownership`. Answers to an instruction carry the attempt it was given for, so that what comes too late is
known as such. What is made for every token is a msgspec struct: it costs a fifth of a frozen dataclass.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from contracts.messages import Peer
from contracts.requests import Claim, TokenDelta

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from contracts.ids import Attempt, WorkerId
    from contracts.messages import ClaimVerdict, DispatchItem, Placement, RequestKey
    from contracts.requests import GenerateRequest
    from gateway.timeline import Timeline

# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    placement: Placement


@dataclass(frozen=True, slots=True)
class Refused:
    """The coordinator's rejection."""

    error: TandemError


@dataclass(frozen=True, slots=True)
class Unanswered:
    """The coordinator could not be asked, or gave no answer."""

    error: TandemError


@dataclass(frozen=True, slots=True)
class RetryDue:
    """`RetryLater` ran out."""


@dataclass(frozen=True, slots=True)
class StreamsOpened:
    """Both workers' frames can reach us."""

    attempt: Attempt


@dataclass(frozen=True, slots=True)
class StreamsFailed:
    """The frames of one worker cannot reach us; nothing was sent."""

    attempt: Attempt
    worker_id: WorkerId
    error: TandemError


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    attempt: Attempt


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    """The Prefill call failed; the worker may hold the request anyway."""

    attempt: Attempt
    error: TandemError


class Received(msgspec.Struct, frozen=True):
    peer: Peer
    delta: TokenDelta


class Claimed(msgspec.Struct, frozen=True):
    """After all deltas that came before it in the same stream."""

    peer: Peer
    claim: Claim


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """This life of this worker is over, or its stream is: tokens may be missing."""

    peer: Peer
    reason: str


@dataclass(frozen=True, slots=True)
class GapExpired:
    """`StartGapTimer` ran out."""


@dataclass(frozen=True, slots=True)
class DeadlinePassed:
    after_s: float


@dataclass(frozen=True, slots=True)
class Overflowed:
    """The client did not take its tokens."""

    num_tokens: int


@dataclass(frozen=True, slots=True)
class CancelAsked:
    """By the client or on its behalf. `outcome` names it in the timeline: "cancelled", or "stop"."""

    reason: str
    outcome: str = "cancelled"


@dataclass(frozen=True, slots=True)
class Failed:
    """The gateway itself cannot go on with this request."""

    error: TandemError


Event = (
    Placed
    | Refused
    | Unanswered
    | RetryDue
    | StreamsOpened
    | StreamsFailed
    | PrefillAccepted
    | PrefillFailed
    | Received
    | Claimed
    | WorkerLost
    | GapExpired
    | DeadlinePassed
    | Overflowed
    | CancelAsked
    | Failed
)


# --- instructions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskPlacement:
    """Answer with Placed, Refused or Unanswered."""

    item: DispatchItem


@dataclass(frozen=True, slots=True)
class RetryLater:
    """Answer with RetryDue after `delay_s`."""

    delay_s: float


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Answer with StreamsOpened or StreamsFailed."""

    attempt: Attempt
    placement: Placement


@dataclass(frozen=True, slots=True)
class SendPrefill:
    """Answer with PrefillAccepted or PrefillFailed, always: also when the try was given up meanwhile."""

    placement: Placement
    request: GenerateRequest


@dataclass(frozen=True, slots=True)
class Accept:
    """The request is in a worker's hands: later failures come after the first byte of an answer. Once."""


class Deliver(msgspec.Struct, frozen=True):
    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class StartGapTimer:
    """Unless it runs."""


@dataclass(frozen=True, slots=True)
class StopGapTimer:
    pass


@dataclass(frozen=True, slots=True)
class SendCancel:
    peers: tuple[Peer, ...]
    key: RequestKey
    reason: str


@dataclass(frozen=True, slots=True)
class SendVerdict:
    """The answer to a claim. Not to be repeated: the claim is, and is then answered again."""

    peer: Peer
    verdict: ClaimVerdict
    #: What became of it, for metrics: a label of `gateway.claims.Outcome`.
    outcome: str


@dataclass(frozen=True, slots=True)
class AnswerStray:
    """`peer` still works on what it has not any more: tell it (again) to stop."""

    peer: Peer
    key: RequestKey


@dataclass(frozen=True, slots=True)
class NoteReplay:
    """The request is taken up again because of `error`. For logs and metrics."""

    reason: str
    error: TandemError
    #: Workers that are suspected, and avoided from now on.
    suspects: tuple[WorkerId, ...]
    num_delivered: int


@dataclass(frozen=True, slots=True)
class NoteResumed:
    """The first token since the request was lost, `after_s` later."""

    after_s: float


@dataclass(frozen=True, slots=True)
class NoteMoved:
    """Another worker has the request from now on. For logs."""

    source: WorkerId
    destination: WorkerId
    #: The new owner's.
    key: RequestKey
    num_delivered: int
    #: Output tokens that the source had written and that have to be written again.
    num_missing: int


@dataclass(frozen=True, slots=True)
class NoteMoveGap:
    """From the last token before a grant to the first after it."""

    gap_s: float


@dataclass(frozen=True, slots=True)
class End:
    """The last thing the client hears. `error` is None after a finish or an asked-for cancel."""

    error: TandemError | None
    timeline: Timeline


Instruction = (
    AskPlacement
    | RetryLater
    | OpenStreams
    | SendPrefill
    | Accept
    | Deliver
    | StartGapTimer
    | StopGapTimer
    | SendCancel
    | SendVerdict
    | AnswerStray
    | NoteReplay
    | NoteResumed
    | NoteMoved
    | NoteMoveGap
    | End
)
