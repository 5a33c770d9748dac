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

Within a try the request may move: a worker that is ready to go on with it *claims* the next owner epoch. The first
such claim is granted, once the client has every token that was written before it; that is the commit. The former owner
is told to forget the request, and its deltas, now of an older epoch, are dropped. Where the former owner fails while a
claim waits for tokens of its, the claim is granted all the same and the new owner writes these tokens again; except
with log-probabilities, whose last bits may differ: then the request is taken up again.
"""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from contracts.errors import (
    DeadlineExceeded,
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
from gateway.claims import Claims, Outcome, Standing, is_life, moved, owner_of, verdict, why_refused
from gateway.delivery import Delivery
from gateway.failures import may_hold_it, owner_ids, worker_error
from gateway.replay import WAKING, Failure, GiveUp, History, Stage, decide
from gateway.terms import NO_TERMS, Terms
from gateway.timeline import Marks, Timeline, timeline_of

if TYPE_CHECKING:
    from contracts.ids import WorkerId
    from contracts.messages import Peer, Placement
    from contracts.requests import Claim, GenerateRequest, TokenDelta
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
_CLAIM_WAITS = RarePath("gateway.claim_waits", "a claim came before the tokens that were written before it")
_CLAIMED_BACK = RarePath("gateway.claimed_back", "a worker claimed a request that it had already")
_GRANTED_SHORT = RarePath("gateway.granted_short", "a claim was granted, tokens of the former owner are missing")
_OLD_OWNER = RarePath("gateway.old_owner", "tokens of a former owner were dropped")


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
        self._unsettled: dict[Attempt, ev.SendCancel] = {}
        #: On the current try.
        self._claims = Claims()
        #: Under which the prefill worker has the current try: an older one, once the answer has moved.
        self._prefill_epoch = request.owner_epoch
        self._num_moves = 0
        #: When the last token before a grant was delivered; None: one came since.
        self._last_before_grant_s: float | None = None
        #: The full prefill worker, until a worker takes the request.
        self._refusal: tuple[Peer, NoCapacity] | None = None
        #: Since when the client waits for its next token because of a failure.
        self._lost_s: float | None = None
        self._marks = Marks(received_s=received_s)

    def __repr__(self) -> str:
        return f"<Request {self.key.request_id}#{self.key.attempt} {self.phase.value} {self._delivery!r}>"

    @property
    def key(self) -> RequestKey:
        """Of the current owner."""
        return RequestKey(self.request.request_id, self.request.attempt, self.request.owner_epoch)

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
            case ev.Claimed(peer, claim):
                return self._claimed(peer, claim)
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
                if error.reason == WAKING and self._marks.waking_s is None:
                    self._marks.waking_s = now_s
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
        if self._marks.waking_s is not None and self._marks.woken_s is None:
            self._marks.woken_s = now_s
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
            case _ if self._claims.any_granted:
                # That it was taken, its claimer has shown.
                return []
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
        if not may_hold_it(error):
            if isinstance(error, NoCapacity):
                self._refusal = (self.placement.prefill, error)
            return self._fail(Failure(Stage.REFUSED, error, suspects), now_s)
        # The call is over: a Cancel overtakes nothing any more.
        self.phase = Phase.STREAMING
        if self._heard or self._claims.any_wait:
            # The answer was lost, the request was not.
            return self._taken_up()
        return self._fail(Failure(Stage.STARTED, error, suspects), now_s)

    def _settle(self, event: ev.PrefillAccepted | ev.PrefillFailed) -> list[ev.Instruction]:
        cancel = self._unsettled.pop(event.attempt)
        if isinstance(event, ev.PrefillFailed) and not may_hold_it(event.error):
            return []
        return [cancel]

    def _give_up_try(self, reason: str) -> list[ev.Instruction]:
        """Whoever may have the current try must forget it."""
        if self.placement is None or self.phase not in (Phase.SENDING, Phase.STREAMING):
            return []
        prefill, decode, key = self.placement.prefill, self.placement.decode, self.key
        if self._prefill_epoch != key.owner_epoch:
            # Each is told by the name under which it knows the request.
            earlier = RequestKey(key.request_id, key.attempt, self._prefill_epoch)
            return [ev.SendCancel((prefill,), earlier, reason), ev.SendCancel((decode,), key, reason)]
        cancel = ev.SendCancel((prefill,) if prefill == decode else (prefill, decode), key, reason)
        if self.phase is Phase.SENDING:
            _CANCEL_HELD_BACK.reached()
            self._unsettled[self.request.attempt] = cancel
            return []
        return [cancel]

    # --- tokens ---------------------------------------------------------------------------------

    def _receive(self, peer: Peer, delta: TokenDelta, now_s: float) -> list[ev.Instruction]:
        placement = self.placement
        from_decode = placement is not None and is_life(peer, placement.decode)
        reason = self._why_dropped(peer, delta, from_decode=from_decode)
        if reason is not None:
            return self._drop(peer, delta, reason)
        if delta.finish == "error":
            return self._worker_failed(peer, delta, now_s)
        if delta.finish == "cancelled":
            error = WorkerUnavailable(f"worker {peer.worker_id} gave the request up")
            return self._lost(Failure(Stage.STARTED, error, (peer.worker_id,)), now_s, peer)
        self._heard = True
        self._decoding = self._decoding or from_decode
        return self._deliver(delta, now_s)

    def _why_dropped(self, peer: Peer, delta: TokenDelta, *, from_decode: bool) -> str | None:
        if delta.attempt != self.request.attempt:
            _OLD_ATTEMPT.reached()
            return "attempt"
        if delta.owner_epoch != self.request.owner_epoch:
            _OLD_OWNER.reached()
            return "owner_epoch"
        if self.phase is Phase.ENDED:
            return "over"
        if self.placement is None or self.phase not in (Phase.SENDING, Phase.STREAMING):
            return "early"
        if not (from_decode or is_life(peer, self.placement.prefill)):
            return "worker"
        if delta.finish == "error" and self._is_done_with(peer):
            return "handed_off"
        return None if self._delivery.is_news(delta) else "duplicate"

    def _drop(self, peer: Peer, delta: TokenDelta, reason: str) -> list[ev.Instruction]:
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        mine, its = (self.request.attempt, self.request.owner_epoch), (delta.attempt, delta.owner_epoch)
        if delta.finish is None:
            key = RequestKey(delta.request_id, delta.attempt, delta.owner_epoch)
            return [ev.AnswerStray(peer, key)] if its < mine else []
        if its > mine:
            # It gives up what it claims.
            return self._withdrawn(peer)
        return []

    def _is_done_with(self, peer: Peer) -> bool:
        """Whether it is the prefill worker's, which has nothing left to give: the answer is the other's."""
        assert self.placement is not None
        is_decode = is_life(peer, self.placement.decode)
        return not is_decode and self._decoding and not self._delivery.has_gap

    def _deliver(self, delta: TokenDelta, now_s: float) -> list[ev.Instruction]:
        awaited = self._awaits_tokens
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
            return out + self._claims.refuse_all(Outcome.OVER)
        if awaited:
            out += self._grant_covered()
            out += self._stop_awaiting(awaited)
        if self._delivery.has_gap:
            _TOKEN_EARLY.reached()
            out.append(ev.StartGapTimer())
        return out

    def _resumed(self, now_s: float) -> list[ev.Instruction]:
        out = self._taken_up()
        if self._lost_s is not None:
            out.append(ev.NoteResumed(now_s - self._lost_s))
            self._lost_s = None
        if self._last_before_grant_s is not None:
            out.append(ev.NoteMoveGap(now_s - self._last_before_grant_s))
            self._last_before_grant_s = None
        return out

    @property
    def _awaits_tokens(self) -> bool:
        """Tokens that were written, and are not here: for so long as the gap timer allows."""
        return self._delivery.has_gap or self._claims.any_wait

    def _stop_awaiting(self, awaited: bool) -> list[ev.Instruction]:
        """After anything that may have ended a wait; `awaited`: before it there was one."""
        return [ev.StopGapTimer()] if awaited and not self._awaits_tokens else []

    # --- claims ---------------------------------------------------------------------------------

    def _claimed(self, peer: Peer, claim: Claim) -> list[ev.Instruction]:
        if self.phase is not Phase.ENDED and (again := self._claims.repeated(peer, claim)) is not None:
            return [again]
        refusal = why_refused(peer, claim, self._standing())
        if refusal is not None:
            return [verdict(peer, claim, refusal)]
        awaited = self._awaits_tokens
        self._claims.wait(peer, claim)
        out = self._grant_covered()
        if self._claims.any_wait:
            _CLAIM_WAITS.reached()
            out.append(ev.StartGapTimer())
        return out + self._stop_awaiting(awaited)

    def _standing(self) -> Standing:
        is_held = self.phase in (Phase.SENDING, Phase.STREAMING)
        return Standing(
            is_over=self.phase is Phase.ENDED,
            placement=self.placement if is_held else None,
            attempt=self.request.attempt,
            owner_epoch=self.request.owner_epoch,
            is_read=self._heard,
            num_delivered=self._delivery.next_index,
        )

    def _grant_covered(self) -> list[ev.Instruction]:
        """Grants the first claim that waits for no token (any more)."""
        standing = self._standing()
        out: list[ev.Instruction] = []
        for peer, claim in self._claims.covered(standing.num_delivered):
            # The owner may have written on meanwhile.
            refusal = why_refused(peer, claim, standing)
            if refusal is None:
                return out + self._grant(peer, claim)
            self._claims.withdraw(peer)
            out.append(verdict(peer, claim, refusal))
        return out

    def _grant(self, peer: Peer, claim: Claim) -> list[ev.Instruction]:
        assert self.placement is not None
        former, former_key, num_delivered = owner_of(self.placement, claim), self.key, self._delivery.next_index
        is_back = is_life(peer, former)
        out = self._taken_up()
        # Whatever becomes of Prefill's answer.
        self.phase = Phase.STREAMING
        self.request = msgspec.structs.replace(self.request, owner_epoch=claim.owner_epoch)
        self.placement = moved(self.placement, peer, claim)
        if claim.reads:
            self._prefill_epoch = claim.owner_epoch
        else:
            self._heard = self._decoding = True
        # There is nothing between what was delivered and what the new owner writes.
        self._delivery.forget_early()
        self._last_before_grant_s = None if claim.reads else self._marks.last_token_s
        outcome = Outcome.CLAIMED_BACK if is_back else Outcome.GRANTED
        out += self._claims.grant(peer, outcome, num_delivered)
        num_missing = max(0, claim.num_outputs - num_delivered)
        if num_missing:
            _GRANTED_SHORT.reached()
        if is_back:
            _CLAIMED_BACK.reached()
            return out
        self._num_moves += 1
        out.append(ev.SendCancel((former,), former_key, f"it has moved to {peer.worker_id}"))
        out.append(ev.NoteMoved(former.worker_id, peer.worker_id, self.key, num_delivered, num_missing))
        return out

    def _withdrawn(self, claimer: Peer) -> list[ev.Instruction]:
        awaited = self._awaits_tokens
        self._claims.withdraw(claimer)
        return self._stop_awaiting(awaited)

    def _lost(self, failure: Failure, now_s: float, culprit: Peer | None = None) -> list[ev.Instruction]:
        """The owner cannot go on: whoever else is ready to does."""
        withdrawn = [] if culprit is None else self._withdrawn(culprit)
        if (first := self._claims.first) is None or self.request.sampling.logprobs is not None:
            return withdrawn + self._fail(failure, now_s)
        return [*self._grant(*first), ev.StopGapTimer()]

    # --- failures and the end -------------------------------------------------------------------

    def _worker_failed(self, peer: Peer, delta: TokenDelta, now_s: float) -> list[ev.Instruction]:
        assert self.placement is not None
        error = worker_error(delta, peer.worker_id)
        # Whose fault a failed transfer was, neither side can tell.
        is_transfer = isinstance(error, TransferAborted)
        suspects = owner_ids(self.placement) if is_transfer else (peer.worker_id,)
        return self._lost(Failure(Stage.STARTED, error, suspects), now_s, peer)

    def _worker_lost(self, lost: ev.WorkerLost, now_s: float) -> list[ev.Instruction]:
        if self.placement is None or self.phase in (Phase.DISPATCHING, Phase.WAITING):
            return []
        roles = {"prefill": self.placement.prefill, "decode": self.placement.decode}
        role = next((role for role, peer in roles.items() if is_life(lost.peer, peer)), None)
        if role is None:
            return self._withdrawn(lost.peer)
        if self._is_done_with(lost.peer):
            _DONE_WORKER_LOST.reached()
            return self._withdrawn(lost.peer)
        num_delivered = self._delivery.next_index
        where = f"after {num_delivered} output tokens" if num_delivered else "before the answer"
        error = WorkerUnavailable(f"{role} worker {lost.peer.worker_id} was lost {where}: {lost.reason}")
        stage = Stage.UNSENT if self.phase is Phase.OPENING else Stage.STARTED
        return self._lost(Failure(stage, error, (lost.peer.worker_id,)), now_s, lost.peer)

    def _gap_failed(self, evidence: str, now_s: float) -> list[ev.Instruction]:
        if self.placement is None or not self._awaits_tokens:
            return []
        error = TransferAborted(f"output token {self._delivery.next_index} never arrived, {evidence}")
        return self._lost(Failure(Stage.STARTED, error, owner_ids(self.placement)), now_s)

    def _fail(self, failure: Failure, now_s: float) -> list[ev.Instruction]:
        """Where every failure passes that another worker might not have."""
        decision = decide(self.history, failure, now_s, self._limits)
        is_refused = failure.stage is Stage.REFUSED
        if isinstance(decision, GiveUp):
            if self.history.num_replays:
                _GAVE_UP.reached()
            return self._end_with(decision.error, now_s, is_held=not is_refused)
        self.history = decision.history
        out = [] if is_refused else self._give_up_try(failure.error.message)
        if self._awaits_tokens:
            out.append(ev.StopGapTimer())
        out += self._claims.refuse_all(Outcome.ATTEMPT)
        if decision.replay_reason is not None:
            num_delivered = self._delivery.next_index
            (_REPLAYED_MIDWAY if num_delivered else _REPLAYED).reached()
            out.append(ev.NoteReplay(decision.replay_reason, failure.error, failure.suspects, num_delivered))
            self._lost_s = now_s if self._lost_s is None else self._lost_s
        self._start_over()
        if not decision.delay_s:
            return [*out, *self._ask(now_s)]
        _WAITS_FOR_PLACE.reached()
        return [*out, ev.RetryLater(decision.delay_s)]

    def _start_over(self) -> None:
        """From here on the last try's messages are another attempt's, and WAITING for the next."""
        self._delivery.forget_early()
        self._heard = self._decoding = False
        self._claims = Claims()
        self._last_before_grant_s = None
        self.phase = Phase.WAITING
        self.request = msgspec.structs.replace(
            self.request,
            attempt=Attempt(self.request.attempt + 1),
            owner_epoch=OwnerEpoch(self.request.owner_epoch + 1),
        )
        self._prefill_epoch = self.request.owner_epoch

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
        end = ev.End(error, self._timeline(now_s, outcome, refused_why))
        return [end, *cancels, *self._claims.refuse_all(Outcome.OVER)]

    def _timeline(self, now_s: float, outcome: str, refused_why: str | None = None) -> Timeline:
        return timeline_of(
            self._marks,
            now_s,
            request=self.request,
            terms=self._terms,
            placement=self.placement,
            num_output_tokens=self._delivery.next_index,
            num_replays=self.history.num_replays,
            num_moves=self._num_moves,
            outcome=outcome,
            refused_why=refused_why,
        )
