"""Requests on their way to this worker: asks for the rest of each, claims it, and writes it on or lets it go.

What comes with its KV comes through `decode.handoffs`; what comes by its tokens is read here, as far as they go, and as
far as those go that were written meanwhile, until the source has few more.
Neither is written before the gateway has granted the claim.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import BadRequest, Cancelled, NoCapacity, NotReady, TandemError
from contracts.failpoints import RarePath
from contracts.messages import DeclineRequest, YieldRequest
from contracts.requests import TokenDelta
from decode.answers import Answer
from decode.moves import destination as mv
from decode.moves.destination import DestinationMove
from decode.moves.out import claim_of
from engine.room import Demand, fit
from engine.sequence import Sequence, failure, request_key

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable, Iterator

    from contracts.clock import Clock
    from contracts.messages import ClaimVerdict, Move, Peer, RequestKey, TakeOverRequest, YieldReply
    from contracts.requests import GenerateRequest
    from decode.answers import Answers
    from decode.moves.calls import MoveCalls
    from decode.prefixes import AnswerPrefixes
    from engine.plan import Engine
    from engine.recent import RecentTries
    from engine.room import Room
    from engine.sequence import Emit


_REPEATS_TOKENS = RarePath("decode.repeats_tokens", "a new owner sends tokens that the old one wrote")


@dataclass(slots=True, kw_only=True, eq=False)
class _Coming:
    request: GenerateRequest
    move: Move
    machine: DestinationMove
    #: None: its KV has not come yet.
    answer: Answer | None = None
    #: It is read here; else its KV comes.
    by_tokens: bool = False

    @property
    def key(self) -> RequestKey:
        """This worker's, once it owns it."""
        return request_key(self.request)


class MovesIn:
    def __init__(
        self,
        *,
        engine: Engine,
        answers: Answers,
        prefixes: AnswerPrefixes,
        room: Room,
        over: RecentTries,
        own: Peer,
        calls: MoveCalls,
        clock: Clock,
        emit: Emit,
        sequence_ids: Iterator[int],
        outcomes: Counter[str],
        forget_kv: Callable[[RequestKey, str], None],
        on_change: Callable[[], None],
    ) -> None:
        """`forget_kv` ends what comes of a request under a lease; `on_change` is called when there is something to
        read or to write."""
        self._engine = engine
        self._layout = engine.identity.layout
        self._answers = answers
        self._prefixes = prefixes
        self._room = room
        self._over = over
        self._own = own
        self._calls = calls
        self._clock = clock
        self._emit = emit
        self._sequence_ids = sequence_ids
        self._outcomes = outcomes
        self._forget_kv = forget_kv
        self._on_change = on_change
        #: All and only those whose claim has not been answered, by this worker's key.
        self._coming: dict[RequestKey, _Coming] = {}

    def __len__(self) -> int:
        return len(self._coming)

    def __contains__(self, key: RequestKey) -> bool:
        return key in self._coming

    # --- with its KV ------------------------------------------------------------------------------

    def expect(self, request: GenerateRequest, move: Move) -> None:
        """Its KV is about to come. Raises NotReady where its gateway would not hear a claim, or while an earlier move
        of it is not over here: that one may still be granted."""
        self._check_new(request)
        self._check_gateway(request)
        coming = _Coming(request=request, move=move, machine=DestinationMove(self._clock.now_s()))
        self._coming[coming.key] = coming

    def caught_up(self, key: RequestKey) -> None:
        """All of its KV that is final is here."""
        self._feed(key, mv.CaughtUp())

    def arrived(self, answer: Answer) -> None:
        """All of it is here, as a guest."""
        key = answer.sequence.key
        self._coming[key].answer = answer
        self._feed(key, mv.Complete())

    def gone(self, key: RequestKey, reason: str) -> None:
        """It was cancelled here, or does not come. Of an unknown one: nothing."""
        self._feed(key, mv.Gone(reason))

    def lost(self, key: RequestKey, reason: str) -> None:
        """It cannot be written here. Of an unknown one: nothing."""
        self._feed(key, mv.Lost(reason))

    # --- by its tokens ----------------------------------------------------------------------------

    def take_over(self, ask: TakeOverRequest, now_s: float) -> None:
        """As `contracts.messages.TAKE_OVER`; raises what that does, and Cancelled for one that is over."""
        request = ask.request
        key = request_key(request)
        if key in self._over:
            raise Cancelled(f"request {key.request_id} is over at {self._own.worker_id}")
        self._check_new(request)
        self._check_gateway(request)
        answer = self._guest(request, now_s)
        machine = DestinationMove(now_s, in_rounds=True)
        coming = _Coming(request=request, move=ask.move, machine=machine, answer=answer, by_tokens=True)
        self._coming[key] = coming
        if ask.final:
            self._feed(key, mv.Complete())
        else:
            self.read(answer)
        self._on_change()

    def _guest(self, request: GenerateRequest, now_s: float) -> Answer:
        """Its blocks, at once or not at all."""
        num_tokens = len(request.token_ids)
        needed = self._layout.blocks_for(num_tokens)
        if self._layout.blocks_for(num_tokens + 1) > self._engine.num_blocks:
            raise BadRequest(f"the request needs {needed} KV blocks, {self._own.worker_id} has fewer in all")
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=request,
            deadline_s=now_s + request.deadline_s,
            token_ids=list(request.token_ids),
        )
        chain = self._prefixes.chain(request, sequence.token_ids)
        found, num_held = self._prefixes.find_lost(chain, sequence)
        growth_blocks = self._answers.growth(request, needed)
        view = self._room.view()
        demand = Demand(arrival_s=now_s, num_blocks=needed - num_held, growth_blocks=growth_blocks)
        if view.starving or view.offer is not None or not fit(demand, view).fits:
            raise NoCapacity(
                f"{self._own.worker_id} has no room for {needed} blocks of a request that moves: "
                f"{view.available_blocks} available, {view.promised_blocks} promised",
                retry_after_s=1.0,
            )
        answer = Answer(sequence=sequence, chain=chain, num_named=0, adopted_s=now_s, handoff_s=None, announced=True)
        self._answers.take_again(answer, found)
        self._answers.keep_as_guest(answer)
        return answer

    def read(self, answer: Answer) -> None:
        """A guest's tokens may all have been read, but for the last, from which the next one is sampled."""
        if answer.sequence.num_remaining == 1:
            self._feed(answer.sequence.key, mv.CaughtUp())

    def _check_new(self, request: GenerateRequest) -> None:
        key = request_key(request)
        if key in self._coming or key in self._answers.all:
            raise NotReady(
                f"request {key.request_id} is on its way to {self._own.worker_id} already", retry_after_s=1.0
            )

    def _check_gateway(self, request: GenerateRequest) -> None:
        if not self._calls.hears(request.gateway_id):
            raise NotReady(f"gateway {request.gateway_id} does not listen to {self._own.worker_id}", retry_after_s=1.0)

    # --- answers and time -------------------------------------------------------------------------

    def claim_answered(self, verdict: ClaimVerdict) -> bool:
        """Whether the claim was one of these."""
        if verdict.key not in self._coming:
            return False
        self._feed(verdict.key, mv.ClaimAnswered(verdict.granted, verdict.next_index, verdict.reason))
        return True

    def look(self, now_s: float) -> None:
        for coming in list(self._coming.values()):
            if coming.machine.due_s is not None and now_s >= coming.machine.due_s:
                self._feed(coming.key, mv.Look())

    def _yield_answered(self, key: RequestKey, reply: YieldReply | TandemError) -> None:
        coming = self._coming.get(key)
        if coming is None:
            return
        if isinstance(reply, TandemError):
            self._feed(key, mv.NotYielded(reply))
        elif reply.goes_on and reply.delta is not None:
            num_told = reply.delta.index + len(reply.delta.token_ids)
            self._feed(key, mv.GoesOn(reply.delta, num_told - self._next_index(coming)))
        else:
            self._feed(key, mv.Yielded(reply.delta))

    # --- instructions -----------------------------------------------------------------------------

    def _feed(self, key: RequestKey, event: mv.DestinationEvent) -> None:
        coming = self._coming.get(key)
        if coming is None:
            return
        for instruction in coming.machine.handle(event, self._clock.now_s()):
            self._carry_out(coming, instruction)

    def _carry_out(self, coming: _Coming, instruction: mv.DestinationInstruction) -> None:
        key, source = coming.key, coming.move.source
        match instruction:
            case mv.AskYield(at_most):
                ask = YieldRequest(
                    target=source.incarnation,
                    key=coming.move.key,
                    num_known=self._next_index(coming),
                    at_most=at_most,
                )
                self._calls.ask_yield(source, ask, lambda reply: self._yield_answered(key, reply))
            case mv.TakeRest(rest):
                self._take_rest(coming, rest)
            case mv.TakeMore(more):
                self._take_more(coming, more)
            case mv.ClaimIt():
                assert coming.answer is not None, "claimed when it is here"
                claim = claim_of(coming.request, coming.answer.sequence.output_count)
                self._calls.claim(coming.request.gateway_id, claim)
            case mv.Own(next_index):
                self._own_it(coming, next_index)
            case mv.Drop(reason):
                self._outcomes["not_come"] += 1
                if instruction.was_claimed:
                    self._over.add(key)
                self._let_go(coming, reason)
                # Of a lease the source hears that it ended.
                if instruction.tell_source and coming.by_tokens:
                    decline = DeclineRequest(
                        target=source.incarnation, key=coming.move.key, destination=self._own, reason=reason
                    )
                    self._calls.decline(source, decline)
            case mv.GiveUp(reason):
                self._outcomes["not_answered"] += 1
                self._over.add(key)
                self._emit(
                    coming.request, failure(coming.request, self._next_index(coming), "worker_unavailable", reason)
                )
                self._let_go(coming, reason)

    def _take_rest(self, coming: _Coming, rest: TokenDelta | None) -> None:
        answer = coming.answer
        if coming.by_tokens and answer is not None and self._has_room_for(coming, answer, rest):
            self._feed(coming.key, mv.Complete())
            self._on_change()

    def _take_more(self, coming: _Coming, more: TokenDelta) -> None:
        answer = coming.answer
        if answer is not None and self._has_room_for(coming, answer, more):
            # It may be that all of it was known.
            self.read(answer)
            self._on_change()

    def _has_room_for(self, coming: _Coming, answer: Answer, told: TokenDelta | None) -> bool:
        """Adds what is new of these tokens; False where it is lost by that."""
        if told is not None:
            known = answer.sequence.output_count - told.index
            if known < 0:
                # They are for somebody who was told more: another move of it has begun since.
                self._feed(coming.key, mv.Lost(f"{-known} tokens lack before the rest of it"))
                return False
            answer.sequence.token_ids.extend(told.token_ids[known:])
        if not self._answers.extend(answer.sequence):
            self._feed(coming.key, mv.Lost("there are no blocks for the rest of it"))
            return False
        return True

    def _own_it(self, coming: _Coming, next_index: int) -> None:
        answer = coming.answer
        assert answer is not None, "granted when it is here"
        del self._coming[coming.key]
        self._outcomes["owned"] += 1
        sequence = answer.sequence
        if next_index < sequence.output_count:
            _REPEATS_TOKENS.reached()
            request = coming.request
            missing = TokenDelta(
                request_id=request.request_id,
                attempt=request.attempt,
                owner_epoch=request.owner_epoch,
                index=next_index,
                token_ids=tuple(sequence.token_ids[request.num_prompt_tokens + next_index :]),
            )
            self._emit(request, missing)
        self._answers.unpark(answer)
        self._on_change()

    def _let_go(self, coming: _Coming, reason: str) -> None:
        """What is not claimed may be moved here again."""
        del self._coming[coming.key]
        if coming.answer is not None:
            self._answers.drop(coming.answer, reason)
        else:
            self._forget_kv(coming.key, reason)

    def _next_index(self, coming: _Coming) -> int:
        if coming.answer is not None:
            return coming.answer.sequence.output_count
        return len(coming.request.token_ids) - coming.request.num_prompt_tokens
