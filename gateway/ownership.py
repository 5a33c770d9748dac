"""The life of one request at the gateway: events in, instructions out.

The gateway owns each client's stream. This machine decides which deltas the client sees (each output token
once, in order, from the workers that were chosen, of the current attempt and owner epoch), when the request
fails, and which workers must forget it. It does no I/O and reads no clock; `gateway.core` carries out what
it returns and feeds back what happens.

    DISPATCHING --placed--> OPENING --streams open--> SENDING --accepted--> STREAMING --finish--> ENDED
                                                         |
                              ended while Prefill is on its way: ABANDONED --its outcome--> ENDED

An ABANDONED request has ended for the client, but the worker may still be about to accept it: Cancel is sent
only once Prefill was answered, or it could overtake the request it is meant for.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import (
    ERROR_BY_CODE,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    NoCapacity,
    StaleIncarnation,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.messages import RequestKey
from gateway.timeline import Marks, Timeline, split

if TYPE_CHECKING:
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import Peer, Placement
    from contracts.requests import GenerateRequest, TokenDelta


class Phase(Enum):
    DISPATCHING = "dispatching"
    OPENING = "opening"
    SENDING = "sending"
    STREAMING = "streaming"
    ABANDONED = "abandoned"
    ENDED = "ended"


# --- events -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Placed:
    placement: Placement


@dataclass(frozen=True, slots=True)
class Refused:
    """No placement: the coordinator's rejection, or no answer from it."""

    error: TandemError


@dataclass(frozen=True, slots=True)
class StreamsOpened:
    """Both workers' frames can reach us."""


@dataclass(frozen=True, slots=True)
class PrefillAccepted:
    pass


@dataclass(frozen=True, slots=True)
class PrefillFailed:
    """The streams could not be opened, or the Prefill call failed; the worker may hold the request anyway."""

    error: TandemError


@dataclass(frozen=True, slots=True)
class Received:
    worker_id: WorkerId
    incarnation: Incarnation
    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """This life of this worker is over, or its stream is: tokens may be missing."""

    worker_id: WorkerId
    incarnation: Incarnation
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
    | StreamsOpened
    | PrefillAccepted
    | PrefillFailed
    | Received
    | WorkerLost
    | GapExpired
    | DeadlinePassed
    | Overflowed
    | CancelAsked
    | Failed
)


# --- instructions -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class OpenStreams:
    """Answer with StreamsOpened or PrefillFailed."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class SendPrefill:
    """Answer with PrefillAccepted or PrefillFailed, always: also when the request has ended meanwhile."""

    placement: Placement


@dataclass(frozen=True, slots=True)
class Accept:
    """The request is in a worker's hands: later failures come after the first byte of an answer."""


@dataclass(frozen=True, slots=True)
class Deliver:
    delta: TokenDelta


@dataclass(frozen=True, slots=True)
class StartGapTimer:
    pass


@dataclass(frozen=True, slots=True)
class StopGapTimer:
    pass


@dataclass(frozen=True, slots=True)
class SendCancel:
    peers: tuple[Peer, ...]
    key: RequestKey
    reason: str


@dataclass(frozen=True, slots=True)
class End:
    """The last thing the client hears. `error` is None after a finish or an asked-for cancel."""

    error: TandemError | None
    timeline: Timeline


Instruction = OpenStreams | SendPrefill | Accept | Deliver | StartGapTimer | StopGapTimer | SendCancel | End


class RequestMachine:
    """One request. `dropped` counts, by reason, the deltas that were not for the client."""

    def __init__(self, request: GenerateRequest, *, received_s: float, max_early_tokens: int) -> None:
        self.request = request
        self.phase = Phase.DISPATCHING
        self.dropped: dict[str, int] = {}
        #: Set from OPENING on.
        self.placement: Placement | None = None
        #: Output tokens delivered, which is the output index the client waits for.
        self.next_index = 0
        #: Deltas that start beyond `next_index`, by index; at most `max_early_tokens` tokens.
        self._early: dict[int, TokenDelta] = {}
        self._max_early_tokens = max_early_tokens
        #: Whether the decode worker has sent tokens: from then on the prefill worker may go.
        self._decoding = False
        #: Why the request ended, for the Cancel of an ABANDONED one.
        self._end_reason = ""
        self._marks = Marks(received_s=received_s)

    def __repr__(self) -> str:
        return (
            f"<Request {self.request.request_id} {self.phase.value} "
            f"[{self.next_index} delivered, {len(self._early)} early]>"
        )

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.request.request_id, self.request.attempt)

    @property
    def over(self) -> bool:
        """Nothing more is sent or expected: the shell may forget the request."""
        return self.phase is Phase.ENDED

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        """The only thing that changes state."""
        if self.phase is Phase.ENDED:
            return []
        if self.phase is Phase.ABANDONED:
            return self._settle(event)
        match event:
            case Placed(placement):
                return self._open(placement)
            case StreamsOpened():
                return self._send(now_s)
            case PrefillAccepted():
                return self._accepted()
            case Received(worker_id, incarnation, delta):
                return self._receive(worker_id, incarnation, delta, now_s)
            case PrefillFailed(error):
                return self._prefill_failed(error, now_s)
            case WorkerLost():
                return self._worker_lost(event, now_s)
            case CancelAsked(reason, outcome):
                return self._end(now_s, reason=reason, outcome=outcome)
            case _:
                return self._fail(self._error_of(event), now_s)

    # --- towards the workers --------------------------------------------------------------------

    def _open(self, placement: Placement) -> list[Instruction]:
        assert self.phase is Phase.DISPATCHING, f"{self!r} was placed twice"
        self.placement = placement
        self.phase = Phase.OPENING
        return [OpenStreams(placement)]

    def _send(self, now_s: float) -> list[Instruction]:
        assert self.phase is Phase.OPENING, f"{self!r}: its streams opened twice"
        assert self.placement is not None
        self.phase = Phase.SENDING
        self._marks.sent_s = now_s
        return [SendPrefill(self.placement)]

    def _accepted(self) -> list[Instruction]:
        self.phase = Phase.STREAMING
        return [Accept()]

    def _prefill_failed(self, error: TandemError, now_s: float) -> list[Instruction]:
        if self.phase is Phase.SENDING:
            # The answer that ABANDONED would wait for is this one.
            self.phase = Phase.STREAMING if _may_hold_it(error) else Phase.OPENING
        return self._fail(error, now_s)

    def _settle(self, event: Event) -> list[Instruction]:
        if not isinstance(event, PrefillAccepted | PrefillFailed):
            return []
        self.phase = Phase.ENDED
        if isinstance(event, PrefillFailed) and not _may_hold_it(event.error):
            return []
        return self._cancel_instructions(self._end_reason)

    def _cancel_instructions(self, reason: str) -> list[Instruction]:
        assert self.placement is not None
        prefill, decode = self.placement.prefill, self.placement.decode
        peers = (prefill,) if prefill == decode else (prefill, decode)
        return [SendCancel(peers, self.key, reason)]

    # --- tokens ---------------------------------------------------------------------------------

    def _receive(
        self, worker_id: WorkerId, incarnation: Incarnation, delta: TokenDelta, now_s: float
    ) -> list[Instruction]:
        reason = self._why_dropped(worker_id, incarnation, delta)
        if reason is not None:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            return []
        assert self.placement is not None
        if worker_id == self.placement.decode.worker_id and delta.index + len(delta.token_ids) > 1:
            self._decoding = True
        if delta.finish == "error":
            return self._fail(_worker_error(delta, worker_id), now_s)
        if delta.index > self.next_index:
            return self._keep_early(delta, now_s)
        return self._deliver(delta, now_s)

    def _why_dropped(self, worker_id: WorkerId, incarnation: Incarnation, delta: TokenDelta) -> str | None:
        if self.placement is None or self.phase is Phase.OPENING:
            return "early"
        if delta.attempt != self.request.attempt:
            return "attempt"
        if delta.owner_epoch != self.request.owner_epoch:
            return "owner_epoch"
        owners = (self.placement.prefill, self.placement.decode)
        if all((worker_id, incarnation) != (peer.worker_id, peer.incarnation) for peer in owners):
            return "worker"
        if delta.index + len(delta.token_ids) <= self.next_index and delta.finish is None:
            return "duplicate"
        return None

    def _keep_early(self, delta: TokenDelta, now_s: float) -> list[Instruction]:
        """Two workers' streams are not ordered with each other: the second token may overtake the first."""
        known = self._early.get(delta.index)
        if known is None or len(delta.token_ids) > len(known.token_ids) or delta.finish is not None:
            self._early[delta.index] = delta
        num_early = sum(len(early.token_ids) for early in self._early.values())
        if num_early > self._max_early_tokens:
            return self._fail(self._gap_error(f"{num_early} later ones did"), now_s)
        return [StartGapTimer()]

    def _deliver(self, delta: TokenDelta, now_s: float) -> list[Instruction]:
        had_gap = bool(self._early)
        out: list[Instruction] = []
        following: TokenDelta | None = delta
        while following is not None:
            fresh = _from_index(following, self.next_index)
            self.next_index += len(fresh.token_ids)
            self._marks.note(fresh, now_s)
            out.append(Deliver(fresh))
            if fresh.finish is not None:
                return [*out, *self._finish(fresh, now_s)]
            following = self._next_early()
        if had_gap:
            out.append(StartGapTimer() if self._early else StopGapTimer())
        return out

    def _next_early(self) -> TokenDelta | None:
        """Takes the early delta that continues at `next_index`, and forgets those that fell behind it."""
        for index in sorted(self._early):
            if index > self.next_index:
                return None
            delta = self._early.pop(index)
            if index + len(delta.token_ids) > self.next_index or delta.finish is not None:
                return delta
        return None

    # --- the end --------------------------------------------------------------------------------

    def _finish(self, delta: TokenDelta, now_s: float) -> list[Instruction]:
        assert delta.finish is not None
        if delta.finish == "cancelled":
            return self._fail(WorkerUnavailable("its worker gave the request up"), now_s)
        self.phase = Phase.ENDED
        return [StopGapTimer(), End(None, self._timeline(now_s, delta.finish))]

    def _worker_lost(self, lost: WorkerLost, now_s: float) -> list[Instruction]:
        if self.placement is None:
            return []
        roles = {
            "prefill": None if self._decoding else self.placement.prefill,
            "decode": self.placement.decode,
        }
        for role, peer in roles.items():
            if peer is not None and (peer.worker_id, peer.incarnation) == (lost.worker_id, lost.incarnation):
                where = f"after {self.next_index} output tokens" if self.next_index else "before the answer"
                return self._fail(
                    WorkerUnavailable(f"{role} worker {lost.worker_id} was lost {where}: {lost.reason}"),
                    now_s,
                )
        return []

    def _error_of(self, event: Event) -> TandemError:
        match event:
            case Refused(error) | Failed(error):
                return error
            case GapExpired():
                return self._gap_error("later ones did")
            case DeadlinePassed(after_s):
                return DeadlineExceeded(f"the request was not finished within {after_s:g} s")
            case Overflowed(num_tokens):
                return NoCapacity(f"the client is too slow: {num_tokens} tokens wait for it")
            case _:
                raise AssertionError(f"{self!r}: {event!r} is no failure")

    def _gap_error(self, evidence: str) -> TandemError:
        return TransferAborted(f"output token {self.next_index} never arrived, {evidence}")

    def _fail(self, error: TandemError, now_s: float) -> list[Instruction]:
        """Where every failure passes: the place from which a request can be replayed instead."""
        return self._end(now_s, reason=error.message, outcome=error.code, error=error)

    def _end(self, now_s: float, *, reason: str, outcome: str, error: TandemError | None = None) -> list[Instruction]:
        end: list[Instruction] = [StopGapTimer(), End(error, self._timeline(now_s, outcome))]
        before, self.phase = self.phase, Phase.ENDED
        if before is Phase.SENDING:
            self.phase, self._end_reason = Phase.ABANDONED, reason
            return end
        if before is Phase.STREAMING:
            return [*end, *self._cancel_instructions(reason)]
        return end

    def _timeline(self, now_s: float, outcome: str) -> Timeline:
        marks, placement = self._marks, self.placement
        phases = split(marks, now_s)
        ttft_s = None if marks.first_token_s is None else marks.first_token_s - marks.received_s
        return Timeline(
            request_id=self.request.request_id,
            total_us=sum(getattr(phases, name) for name in phases.__slots__),
            gateway_us=phases.gateway_us,
            queue_us=phases.queue_us,
            prefill_us=phases.prefill_us,
            handoff_us=phases.handoff_us,
            decode_us=phases.decode_us,
            ttft_us=None if ttft_s is None else round(ttft_s * 1_000_000),
            num_prompt_tokens=self.request.num_prompt_tokens,
            num_output_tokens=self.next_index,
            outcome=outcome,
            prefill_worker=None if placement is None else placement.prefill.worker_id,
            decode_worker=None if placement is None else placement.decode.worker_id,
        )


def _from_index(delta: TokenDelta, index: int) -> TokenDelta:
    """`delta` without its tokens before output index `index`."""
    skip = index - delta.index
    if skip <= 0:
        return delta
    logprobs = None if delta.logprobs is None else delta.logprobs[skip:]
    return msgspec.structs.replace(delta, index=index, token_ids=delta.token_ids[skip:], logprobs=logprobs)


def _may_hold_it(error: TandemError) -> bool:
    """Whether a worker that answered Prefill so (or not at all) may have started the request."""
    return not isinstance(error, NoCapacity | BadRequest | StaleIncarnation)


def _worker_error(delta: TokenDelta, worker_id: WorkerId) -> TandemError:
    info = delta.error
    if info is None:
        return Internal(f"worker {worker_id} failed without saying why")
    kind = ERROR_BY_CODE.get(info.code, Internal)
    # Here Cancelled says that the client is gone; a worker that gave up is another matter.
    return WorkerUnavailable(info.message) if kind is Cancelled else kind(info.message)
