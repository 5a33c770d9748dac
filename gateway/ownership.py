"""The life of one request at the gateway: events in, instructions out.

The gateway owns each client's stream. This machine decides which deltas the client sees (each output token
once, in order, from the workers that were chosen, of the current attempt and owner epoch), when the request
is taken up again on other workers or fails, and which workers must forget it. It does no I/O and reads no clock;
`gateway.core` carries out what it returns and feeds back what happens.

    DISPATCHING --placed--> OPENING --streams open--> SENDING --accepted--> STREAMING --finish--> ENDED
        ^  ^                   |                         |                      |
        |  +------ WAITING <---+------- failed ----------+----------------------+
        +---------- at once <--+

What a failure means is `gateway.replay`'s to say. A replay is a new attempt under a new owner epoch: the prompt
and the tokens already delivered are read again elsewhere, and what the earlier attempt still says is dropped.

A try may be given up, or the request end, while its Prefill is on its way: the worker may still be about to
accept it. Such a try stays *unsettled* until Prefill is answered; only then Cancel is sent, or it could
overtake the request it is meant for.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from contracts.errors import (
    ERROR_BY_CODE,
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    Internal,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.failpoints import RarePath
from contracts.ids import Attempt, OwnerEpoch
from contracts.messages import DispatchItem, RequestKey
from gateway import events as ev
from gateway.delivery import Delivery
from gateway.replay import Failure, GiveUp, History, Stage, decide
from gateway.terms import NO_TERMS, Terms
from gateway.timeline import Marks, Timeline, timeline_of

if TYPE_CHECKING:
    from contracts.ids import WorkerId
    from contracts.messages import Peer, Placement
    from contracts.requests import GenerateRequest, TokenDelta
    from gateway.limits import GatewayLimits

_REPLAYED = RarePath("gateway.replayed", "a request was taken up again before its first token")
_REPLAYED_MIDWAY = RarePath("gateway.replayed_midway", "a request was taken up again after its first token")
_GAVE_UP = RarePath("gateway.gave_up", "a request failed although it had been taken up again")
_WAITS_FOR_PLACE = RarePath("gateway.waits_for_place", "nobody has a request, its place is asked for later")
_FULL_ELSEWHERE = RarePath("gateway.full_elsewhere", "a full prefill worker was placed again, there is no other")
_CANCEL_HELD_BACK = RarePath("gateway.cancel_held_back", "a cancel has to wait for the answer to Prefill")
_TOKEN_EARLY = RarePath("gateway.token_early", "a token came before the one that precedes it")
_DEADLINE_PASSED = RarePath("gateway.deadline_passed", "a request's deadline passed")
_OLD_ATTEMPT = RarePath("gateway.old_attempt", "tokens of an earlier attempt were dropped")
_DONE_WORKER_LOST = RarePath("gateway.done_worker_lost", "the prefill worker of a request being decoded was lost")


class Phase(Enum):
    DISPATCHING = "dispatching"
    #: Nobody has the request; the coordinator is asked again later.
    WAITING = "waiting"
    OPENING = "opening"
    SENDING = "sending"
    STREAMING = "streaming"
    ENDED = "ended"


class Held(NamedTuple):
    """Where a request is."""

    prefill: WorkerId
    decode: WorkerId
    #: Prompt and answer.
    num_tokens: int
    #: Its prompt was read.
    is_read: bool


class RequestMachine:
    """One request; made in phase DISPATCHING, for the caller to ask for its `dispatch_item`.

    `dropped` counts, by reason, the deltas that were not for the client.
    """

    def __init__(
        self,
        request: GenerateRequest,
        *,
        received_s: float,
        limits: GatewayLimits,
        terms: Terms = NO_TERMS,
        block_keys: bytes = b"",
    ) -> None:
        """`request.deadline_s` and the targets of its terms count from `received_s`; `block_keys` are those of
        `DispatchItem`."""
        #: Attempt and owner epoch are the current ones; the tokens stay the prompt's.
        self.request = request
        self.phase = Phase.DISPATCHING
        self.dropped: dict[str, int] = {}
        #: The current try's, or the last one's; set from OPENING on.
        self.placement: Placement | None = None
        self.history = History()
        self._limits = limits
        self._terms = terms
        self._block_keys = block_keys
        self._delivery = Delivery()
        #: Whether tokens of this try came.
        self._heard = False
        #: Whether the decode worker has sent tokens: from then on the prefill worker may go.
        self._decoding = False
        #: Tries whose Prefill is on its way and which nobody wants any more: who may get it, and why not.
        self._unsettled: dict[Attempt, tuple[tuple[Peer, ...], str]] = {}
        #: The full prefill worker, until a worker takes the request.
        self._refusal: tuple[Peer, NoCapacity] | None = None
        #: Since when the client waits for its next token because of a failure.
        self._lost_s: float | None = None
        self._marks = Marks(received_s=received_s)

    def __repr__(self) -> str:
        return f"<Request {self.key.request_id}#{self.key.attempt} {self.phase.value} {self._delivery!r}>"

    @property
    def key(self) -> RequestKey:
        return RequestKey(self.request.request_id, self.request.attempt)

    @property
    def over(self) -> bool:
        """Nothing more is sent or expected: the shell may forget the request."""
        return self.phase is Phase.ENDED and not self._unsettled

    @property
    def held(self) -> Held | None:
        """None: no worker has it."""
        if self.placement is None or self.phase not in (Phase.SENDING, Phase.STREAMING):
            return None
        num_tokens = len(self.request.token_ids) + self._delivery.next_index
        prefill, decode = self.placement.prefill.worker_id, self.placement.decode.worker_id
        return Held(prefill, decode, num_tokens, self._heard)

    def dispatch_item(self, now_s: float) -> DispatchItem:
        """What to ask the coordinator for."""
        num_delivered = self._delivery.next_index
        return DispatchItem(
            request_id=self.request.request_id,
            prompt_tokens=len(self.request.token_ids) + num_delivered,
            max_tokens=self.request.sampling.max_tokens - num_delivered,
            avoid=self.history.avoid,
            slo_class=self._terms.slo_class,
            priority=self._terms.priority,
            tenant=self._terms.tenant,
            block_keys=self._block_keys,
            waited_s=max(0.0, now_s - self._marks.received_s),
            was_accepted=self.history.accepted,
        )

    def handle(self, event: ev.Event, now_s: float) -> list[ev.Instruction]:
        """The only thing that changes state."""
        match event:
            case ev.Received(peer, delta):
                return self._receive(peer, delta, now_s)
            case ev.PrefillAccepted(attempt) | ev.PrefillFailed(attempt) if attempt in self._unsettled:
                return self._settle(event)
            case ev.StreamsOpened() | ev.StreamsFailed() | ev.PrefillAccepted() | ev.PrefillFailed():
                return self._answered(event, now_s)
            case _ if self.phase is Phase.ENDED:
                return []
            case ev.Placed(placement):
                return self._placed(placement, now_s)
            case ev.RetryDue():
                return self._ask(now_s)
            case ev.WorkerLost():
                return self._worker_lost(event, now_s)
            case ev.CancelAsked(reason, outcome):
                return self._end(now_s, reason=reason, outcome=outcome)
            case _:
                return self._trouble(event, now_s)

    def _trouble(self, event: ev.Event, now_s: float) -> list[ev.Instruction]:
        match event:
            case ev.Refused(error):
                return self._fail(Failure(Stage.REJECTED, error), now_s)
            case ev.Unanswered(error):
                return self._fail(Failure(Stage.UNANSWERED, error), now_s)
            case ev.GapExpired():
                return self._gap_failed("later ones did", now_s)
            case ev.DeadlinePassed(after_s):
                _DEADLINE_PASSED.reached()
                return self._end_with(DeadlineExceeded(f"the request was not finished within {after_s:g} s"), now_s)
            case ev.Overflowed(num_tokens):
                return self._end_with(NoCapacity(f"the client is too slow: {num_tokens} tokens wait for it"), now_s)
            case ev.Failed(error):
                return self._end_with(error, now_s)
            case _:
                raise AssertionError(f"{self!r}: {event!r} is no failure")

    # --- towards the workers --------------------------------------------------------------------

    def _ask(self, now_s: float) -> list[ev.Instruction]:
        assert self.phase is Phase.WAITING, f"{self!r} was not waiting"
        self.phase = Phase.DISPATCHING
        return [ev.AskPlacement(self.dispatch_item(now_s))]

    def _placed(self, placement: Placement, now_s: float) -> list[ev.Instruction]:
        assert self.phase is Phase.DISPATCHING, f"{self!r} was placed twice"
        self.history = self.history.placed()
        if self._refusal is not None and not self.history.accepted:
            full, error = self._refusal
            if full == placement.prefill:
                _FULL_ELSEWHERE.reached()
                return self._fail(Failure(Stage.REJECTED, error), now_s)
        self.placement = placement
        self.phase = Phase.OPENING
        return [ev.OpenStreams(self.request.attempt, placement)]

    def _answered(
        self, event: ev.StreamsOpened | ev.StreamsFailed | ev.PrefillAccepted | ev.PrefillFailed, now_s: float
    ) -> list[ev.Instruction]:
        if self.phase is Phase.ENDED or event.attempt != self.request.attempt:
            return []
        match event:
            case ev.StreamsOpened():
                return self._send(now_s)
            case ev.StreamsFailed(_, worker_id, error):
                return self._fail(Failure(Stage.UNSENT, error, (worker_id,)), now_s)
            case ev.PrefillAccepted():
                return self._accepted()
            case ev.PrefillFailed(_, error):
                return self._prefill_failed(error, now_s)

    def _send(self, now_s: float) -> list[ev.Instruction]:
        assert self.phase is Phase.OPENING, f"{self!r}: its streams opened twice"
        assert self.placement is not None
        self.phase = Phase.SENDING
        if self._marks.sent_s is None:
            self._marks.sent_s = now_s
        waited_s = now_s - self._marks.received_s
        ttft_target_s = self._terms.ttft_target_s
        request = msgspec.structs.replace(
            self.request,
            token_ids=(*self.request.token_ids, *self._delivery.token_ids),
            deadline_s=max(0.0, self.request.deadline_s - waited_s),
            ttft_due_s=None if ttft_target_s is None else ttft_target_s - waited_s,
        )
        return [ev.SendPrefill(self.placement, request)]

    def _accepted(self) -> list[ev.Instruction]:
        assert self.phase is Phase.SENDING, f"{self!r}: its Prefill was answered twice"
        self.phase = Phase.STREAMING
        return self._taken_up()

    def _taken_up(self) -> list[ev.Instruction]:
        """A worker shows that it has the request."""
        is_first, self.history = not self.history.accepted, self.history.taken_up()
        self._refusal = None
        return [ev.Accept()] if is_first else []

    def _prefill_failed(self, error: TandemError, now_s: float) -> list[ev.Instruction]:
        assert self.placement is not None
        suspects = (self.placement.prefill.worker_id,)
        if not _may_hold_it(error):
            if isinstance(error, NoCapacity):
                self._refusal = (self.placement.prefill, error)
            return self._fail(Failure(Stage.REFUSED, error, suspects), now_s)
        # The call is over: a Cancel overtakes nothing any more.
        self.phase = Phase.STREAMING
        if self._heard:
            # The answer was lost, the request was not.
            return self._taken_up()
        return self._fail(Failure(Stage.STARTED, error, suspects), now_s)

    def _settle(self, event: ev.PrefillAccepted | ev.PrefillFailed) -> list[ev.Instruction]:
        peers, reason = self._unsettled.pop(event.attempt)
        if isinstance(event, ev.PrefillFailed) and not _may_hold_it(event.error):
            return []
        return [ev.SendCancel(peers, RequestKey(self.request.request_id, event.attempt), reason)]

    def _give_up_try(self, reason: str) -> list[ev.Instruction]:
        """Whoever may have the current try must forget it."""
        if self.placement is None or self.phase not in (Phase.SENDING, Phase.STREAMING):
            return []
        prefill, decode = self.placement.prefill, self.placement.decode
        peers = (prefill,) if prefill == decode else (prefill, decode)
        if self.phase is Phase.SENDING:
            _CANCEL_HELD_BACK.reached()
            self._unsettled[self.request.attempt] = (peers, reason)
            return []
        return [ev.SendCancel(peers, self.key, reason)]

    # --- tokens ---------------------------------------------------------------------------------

    def _receive(self, peer: Peer, delta: TokenDelta, now_s: float) -> list[ev.Instruction]:
        placement = self.placement
        from_decode = placement is not None and _is_life(peer, placement.decode)
        reason = self._why_dropped(peer, delta, from_decode=from_decode)
        if reason is not None:
            self.dropped[reason] = self.dropped.get(reason, 0) + 1
            is_stray = delta.attempt < self.request.attempt and delta.finish is None
            return [ev.AnswerStray(peer, RequestKey(delta.request_id, delta.attempt))] if is_stray else []
        if delta.finish == "error":
            return self._worker_failed(peer, delta, now_s)
        if delta.finish == "cancelled":
            error = WorkerUnavailable(f"worker {peer.worker_id} gave the request up")
            return self._fail(Failure(Stage.STARTED, error, (peer.worker_id,)), now_s)
        self._heard = True
        self._decoding = self._decoding or from_decode
        return self._deliver(delta, now_s)

    def _why_dropped(self, peer: Peer, delta: TokenDelta, *, from_decode: bool) -> str | None:
        if delta.attempt != self.request.attempt:
            _OLD_ATTEMPT.reached()
            return "attempt"
        if delta.owner_epoch != self.request.owner_epoch:
            return "owner_epoch"
        if self.phase is Phase.ENDED:
            return "over"
        if self.placement is None or self.phase not in (Phase.SENDING, Phase.STREAMING):
            return "early"
        if not (from_decode or _is_life(peer, self.placement.prefill)):
            return "worker"
        if delta.finish == "error" and self._is_done_with(peer):
            return "handed_off"
        return None if self._delivery.is_news(delta) else "duplicate"

    def _is_done_with(self, peer: Peer) -> bool:
        """Whether it is the prefill worker's, which has nothing left to give: the answer is the other's."""
        assert self.placement is not None
        is_decode = _is_life(peer, self.placement.decode)
        return not is_decode and self._decoding and not self._delivery.has_gap

    def _deliver(self, delta: TokenDelta, now_s: float) -> list[ev.Instruction]:
        had_gap = self._delivery.has_gap
        fresh = self._delivery.take(delta)
        num_early = self._delivery.num_early_tokens
        if num_early > self._limits.max_early_tokens:
            return self._gap_failed(f"{num_early} later ones did", now_s)
        out = self._resumed(now_s) if fresh else []
        for part in fresh:
            self._marks.note(part, now_s)
            out.append(ev.Deliver(part))
        if fresh and (finish := fresh[-1].finish) is not None:
            self.phase = Phase.ENDED
            out.append(ev.End(None, self._timeline(now_s, finish)))
            return out
        if self._delivery.has_gap:
            _TOKEN_EARLY.reached()
            out.append(ev.StartGapTimer())
        elif had_gap:
            out.append(ev.StopGapTimer())
        return out

    def _resumed(self, now_s: float) -> list[ev.Instruction]:
        out = self._taken_up()
        if self._lost_s is not None:
            out.append(ev.NoteResumed(now_s - self._lost_s))
            self._lost_s = None
        return out

    # --- failures and the end -------------------------------------------------------------------

    def _worker_failed(self, peer: Peer, delta: TokenDelta, now_s: float) -> list[ev.Instruction]:
        assert self.placement is not None
        error = _worker_error(delta, peer.worker_id)
        # Whose fault a failed transfer was, neither side can tell.
        is_transfer = isinstance(error, TransferAborted)
        suspects = _owner_ids(self.placement) if is_transfer else (peer.worker_id,)
        return self._fail(Failure(Stage.STARTED, error, suspects), now_s)

    def _worker_lost(self, lost: ev.WorkerLost, now_s: float) -> list[ev.Instruction]:
        if self.placement is None or self.phase in (Phase.DISPATCHING, Phase.WAITING):
            return []
        roles = {"prefill": self.placement.prefill, "decode": self.placement.decode}
        role = next((role for role, peer in roles.items() if _is_life(lost.peer, peer)), None)
        if role is None:
            return []
        if self._is_done_with(lost.peer):
            _DONE_WORKER_LOST.reached()
            return []
        num_delivered = self._delivery.next_index
        where = f"after {num_delivered} output tokens" if num_delivered else "before the answer"
        error = WorkerUnavailable(f"{role} worker {lost.peer.worker_id} was lost {where}: {lost.reason}")
        stage = Stage.UNSENT if self.phase is Phase.OPENING else Stage.STARTED
        return self._fail(Failure(stage, error, (lost.peer.worker_id,)), now_s)

    def _gap_failed(self, evidence: str, now_s: float) -> list[ev.Instruction]:
        if self.placement is None or not self._delivery.has_gap:
            return []
        error = TransferAborted(f"output token {self._delivery.next_index} never arrived, {evidence}")
        return self._fail(Failure(Stage.STARTED, error, _owner_ids(self.placement)), now_s)

    def _fail(self, failure: Failure, now_s: float) -> list[ev.Instruction]:
        """Where every failure passes that another worker might not have."""
        verdict = decide(self.history, failure, now_s, self._limits)
        is_refused = failure.stage is Stage.REFUSED
        if isinstance(verdict, GiveUp):
            if self.history.num_replays:
                _GAVE_UP.reached()
            return self._end_with(verdict.error, now_s, is_held=not is_refused)
        self.history = verdict.history
        out = [] if is_refused else self._give_up_try(failure.error.message)
        if self._delivery.has_gap:
            out.append(ev.StopGapTimer())
        if verdict.replay_reason is not None:
            num_delivered = self._delivery.next_index
            (_REPLAYED_MIDWAY if num_delivered else _REPLAYED).reached()
            out.append(ev.NoteReplay(verdict.replay_reason, failure.error, failure.suspects, num_delivered))
            self._lost_s = now_s if self._lost_s is None else self._lost_s
        self._start_over()
        if not verdict.delay_s:
            return [*out, *self._ask(now_s)]
        _WAITS_FOR_PLACE.reached()
        return [*out, ev.RetryLater(verdict.delay_s)]

    def _start_over(self) -> None:
        """From here on the last try's messages are another attempt's, and WAITING for the next."""
        self._delivery.forget_early()
        self._heard = self._decoding = False
        self.phase = Phase.WAITING
        self.request = msgspec.structs.replace(
            self.request,
            attempt=Attempt(self.request.attempt + 1),
            owner_epoch=OwnerEpoch(self.request.owner_epoch + 1),
        )

    def _end_with(self, error: TandemError, now_s: float, *, is_held: bool = True) -> list[ev.Instruction]:
        if isinstance(error, StaleIncarnation):
            # That a worker has lives is between our own processes.
            error = WorkerUnavailable(error.message, retry_after_s=error.retry_after_s, reason=error.reason)
        return self._end(now_s, reason=error.message, outcome=error.code, error=error, is_held=is_held)

    def _end(
        self, now_s: float, *, reason: str, outcome: str, error: TandemError | None = None, is_held: bool = True
    ) -> list[ev.Instruction]:
        """`is_held`: a worker may have the current try."""
        cancels = self._give_up_try(reason) if is_held else []
        self.phase = Phase.ENDED
        is_refused = isinstance(error, NoCapacity | NotReady) and not self.history.accepted
        refused_why = (error.reason or error.code) if error is not None and is_refused else None
        return [ev.End(error, self._timeline(now_s, outcome, refused_why)), *cancels]

    def _timeline(self, now_s: float, outcome: str, refused_why: str | None = None) -> Timeline:
        return timeline_of(
            self._marks,
            now_s,
            request=self.request,
            terms=self._terms,
            placement=self.placement,
            num_output_tokens=self._delivery.next_index,
            num_replays=self.history.num_replays,
            outcome=outcome,
            refused_why=refused_why,
        )


def _is_life(peer: Peer, owner: Peer) -> bool:
    return peer.worker_id == owner.worker_id and peer.incarnation == owner.incarnation


def _owner_ids(placement: Placement) -> tuple[WorkerId, ...]:
    return tuple(dict.fromkeys((placement.prefill.worker_id, placement.decode.worker_id)))


def _may_hold_it(error: TandemError) -> bool:
    """Whether a worker that answered Prefill so (or not at all) may have started the request."""
    return not isinstance(error, NoCapacity | BadRequest | StaleIncarnation | NotReady)


def _worker_error(delta: TokenDelta, worker_id: WorkerId) -> TandemError:
    info = delta.error
    if info is None:
        return Internal(f"worker {worker_id} failed without saying why")
    kind = ERROR_BY_CODE.get(info.code, Internal)
    # Here Cancelled says that the client is gone; a worker that gave up is another matter.
    return WorkerUnavailable(info.message) if kind is Cancelled else kind(info.message)
