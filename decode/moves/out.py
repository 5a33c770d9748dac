"""Requests on their way from this worker: offers them, gives the rest, and lets go or goes on.

KV moves under a lease that grows with the answer: its blocks so far, and some that it grows into while it is copied.
Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import NoCapacity, NotFound, NotReady, TandemError, TransferAborted
from contracts.ids import OwnerEpoch
from contracts.messages import HandoffRequest, Move, RequestKey, Seal, TakeOverRequest, YieldReply
from contracts.requests import Claim, TokenDelta
from decode.moves import source as mv
from decode.moves.source import SourceMove
from engine.sequence import request_key
from kvtransfer import LeaseOutcome

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.ids import LeaseId
    from contracts.layout import BlockLayout
    from contracts.messages import ClaimVerdict, HandoffReply, LeaseTerms, Peer
    from contracts.requests import GenerateRequest
    from decode.answers import Answer, Answers
    from decode.moves.calls import MoveCalls
    from kvtransfer import HolderService

    OnRest = Callable[[YieldReply | TandemError], None]


@dataclass(slots=True, kw_only=True, eq=False)
class _Leaving:
    """One answer on its way from here."""

    answer: Answer
    machine: SourceMove
    destination: Peer
    #: As it was offered: with the epoch that the destination is to claim, and the tokens until then.
    request: GenerateRequest
    #: None: it moves by its tokens.
    lease_id: LeaseId | None = None
    #: Blocks that the lease covers.
    num_lent: int = 0
    #: It grows no more: the rest was given.
    sealed: bool = False
    #: Who waits for the rest.
    waiting: list[OnRest] = field(default_factory=list["OnRest"])

    @property
    def key(self) -> RequestKey:
        """This worker's."""
        return self.answer.sequence.key

    def rest(self) -> TokenDelta:
        """What was written since it was offered."""
        request = self.request
        return TokenDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            owner_epoch=request.owner_epoch,
            index=len(request.token_ids) - request.num_prompt_tokens,
            token_ids=tuple(self.answer.sequence.token_ids[len(request.token_ids) :]),
        )


class MovesOut:
    def __init__(
        self,
        *,
        answers: Answers,
        holder: HolderService,
        layout: BlockLayout,
        own: Peer,
        calls: MoveCalls,
        clock: Clock,
        outcomes: Counter[str],
        on_change: Callable[[], None],
    ) -> None:
        """`outcomes` counts how moves ended; `on_change` is called when an answer may run again."""
        self._answers = answers
        self._holder = holder
        self._layout = layout
        self._own = own
        self._calls = calls
        self._clock = clock
        self._outcomes = outcomes
        self._on_change = on_change
        #: All and only those that have not ended, by this worker's key.
        self._leaving: dict[RequestKey, _Leaving] = {}

    def __len__(self) -> int:
        return len(self._leaving)

    def is_leaving(self, key: RequestKey) -> bool:
        return key in self._leaving

    # --- beginnings -------------------------------------------------------------------------------

    def send_kv(self, answer: Answer, destination: Peer, num_spare: int) -> bool:
        """Begins to move a running answer with its KV, which is all computed; False where there are no blocks to
        grow into meanwhile."""
        if not self._answers.extend(answer.sequence, num_spare):
            return False
        self._lend(answer, destination, stands_still=False)
        return True

    def stop_and_send_kv(self, answer: Answer, destination: Peer) -> None:
        """The same, but it stops before anything is copied."""

        def begin() -> None:
            self._answers.park(answer)
            self._lend(answer, destination, stands_still=True)

        _when_free(answer, begin)

    def _lend(self, answer: Answer, destination: Peer, *, stands_still: bool) -> None:
        sequence = answer.sequence
        leaving = self._begin(answer, destination, SourceMove(self._clock.now_s(), stands_still=stands_still))
        num_final, seal = sequence.num_computed // self._layout.block_tokens, None
        blocks = sequence.block_ids
        if stands_still:
            num_final = self._layout.blocks_for(sequence.num_computed)
            blocks, seal = blocks[:num_final], self._seal(leaving)
        leaving.num_lent = len(blocks)

        async def send(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            move = Move(source=self._own, key=request_key(leaving.answer.sequence.request))
            ask = HandoffRequest(target=destination.incarnation, terms=terms, request=leaving.request, move=move)
            try:
                reply = await self._calls.offer(destination, ask, timeout_s)
            except (NoCapacity, NotReady) as error:
                # It is not waited for: elsewhere there may be room, or here again.
                raise TransferAborted(error.message) from error
            self._feed(leaving, mv.Taken())
            return reply

        leaving.lease_id = self._holder.open(
            blocks,
            destination,
            send_offer=send,
            on_ended=lambda _, outcome, reason: self._lease_over(leaving, outcome, reason),
            num_final_blocks=num_final,
            seal=seal,
        )

    def send_tokens(self, answer: Answer, destination: Peer) -> None:
        """Begins to move an answer that the destination will read again; one that is preempted stands still."""
        stands_still = answer.sequence.sequence_id in self._answers.preempted
        self._tell_tokens(answer, destination, stands_still=stands_still)

    def stop_and_send_tokens(self, answer: Answer, destination: Peer) -> None:
        """The same, but it stops before anything is read."""
        _when_free(answer, lambda: self._tell_tokens(answer, destination, stands_still=True))

    def _tell_tokens(self, answer: Answer, destination: Peer, *, stands_still: bool) -> None:
        leaving = self._begin(answer, destination, SourceMove(self._clock.now_s(), stands_still=stands_still))
        if stands_still:
            self._answers.park(answer)
        ask = TakeOverRequest(
            target=destination.incarnation,
            request=leaving.request,
            move=Move(source=self._own, key=leaving.key),
            final=stands_still,
        )
        self._calls.take_over(destination, ask, lambda error: self._told(leaving, error))

    def _told(self, leaving: _Leaving, error: TandemError | None) -> None:
        self._feed(leaving, mv.Taken() if error is None else mv.NotTaken(error.message))

    def _begin(self, answer: Answer, destination: Peer, machine: SourceMove) -> _Leaving:
        request = moved_request(answer.sequence.request, answer.sequence.token_ids, self._left_s(answer))
        answer.move = machine
        leaving = _Leaving(answer=answer, machine=machine, destination=destination, request=request)
        self._leaving[leaving.key] = leaving
        return leaving

    def _left_s(self, answer: Answer) -> float:
        return max(0.0, answer.sequence.deadline_s - self._clock.now_s())

    # --- what happens to them ---------------------------------------------------------------------

    def yield_asked(self, key: RequestKey, on_rest: OnRest, *, num_known: int = 0, at_most: int | None = None) -> None:
        """As `contracts.messages.YieldRequest`. `on_rest` is called once: when no step computes it any more; at once,
        where it is written on; or with NotFound, where it does not leave."""
        leaving = self._leaving.get(key)
        if leaving is None or leaving.answer.doomed:
            on_rest(NotFound(f"request {key.request_id} is not on its way from {self._own.worker_id}"))
            return
        leaving.waiting.append(on_rest)
        num_lacking = leaving.answer.sequence.output_count - num_known
        self._feed(leaving, mv.YieldAsked(num_lacking, at_most))

    def declined(self, key: RequestKey, destination: Peer, reason: str) -> None:
        """That destination has let it go, and did not claim it. Of a move that is not, or is to another: nothing."""
        leaving = self._leaving.get(key)
        if leaving is not None and leaving.destination == destination:
            self._feed(leaving, mv.Declined(f"{destination.worker_id} gave it up: {reason}"))

    def advanced(self, answer: Answer) -> None:
        """A step has ended that may have filled a block, or was the last before it stops."""
        leaving = self._leaving[answer.sequence.key]
        num_final = answer.sequence.num_computed // self._layout.block_tokens
        if leaving.lease_id is not None:
            if self._layout.blocks_for(answer.sequence.num_computed) > leaving.num_lent:
                self._feed(leaving, mv.Outgrown())
            elif leaving.machine.state is not mv.SourceState.STOPPING:
                self._holder.advance(leaving.lease_id, num_final)
        if leaving.machine.state is mv.SourceState.STOPPING:
            self._answers.park(answer)
            self._feed(leaving, mv.Stopped())

    def gone(self, answer: Answer, reason: str) -> None:
        """It has ended here, or lost its blocks."""
        leaving = self._leaving.get(answer.sequence.key)
        if leaving is not None:
            self._feed(leaving, mv.Gone(reason))

    def claim_answered(self, verdict: ClaimVerdict) -> bool:
        """Whether the claim was one of these."""
        own = verdict.key
        for leaving in list(self._leaving.values()):
            if request_key(leaving.request) == own:
                self._feed(leaving, mv.ClaimAnswered(verdict.granted, verdict.reason))
                return True
        return False

    def look(self, now_s: float) -> None:
        for leaving in list(self._leaving.values()):
            if leaving.machine.due_s is not None and now_s >= leaving.machine.due_s:
                self._feed(leaving, mv.Look())

    def _lease_over(self, leaving: _Leaving, outcome: LeaseOutcome, reason: str) -> None:
        leaving.lease_id = None
        self._feed(leaving, mv.LeaseOver(outcome is LeaseOutcome.RELEASED, reason))

    # --- instructions -----------------------------------------------------------------------------

    def _feed(self, leaving: _Leaving, event: mv.SourceEvent) -> None:
        for instruction in leaving.machine.handle(event, self._clock.now_s()):
            self._carry_out(leaving, instruction)

    def _carry_out(self, leaving: _Leaving, instruction: mv.SourceInstruction) -> None:
        answer = leaving.answer
        match instruction:
            case mv.Stop():
                if not answer.in_step:
                    self._answers.park(answer)
                    self._feed(leaving, mv.Stopped())
            case mv.GiveMore():
                self._answer(leaving, YieldReply(delta=leaving.rest(), goes_on=True))
            case mv.GiveRest():
                self._give_rest(leaving)
            case mv.GoOn(claimed):
                self._go_on(leaving, claimed=claimed)
            case mv.TakeBack(reason):
                self._take_back(leaving, reason)
            case mv.ClaimBack():
                self._calls.claim(
                    answer.sequence.request.gateway_id, claim_of(leaving.request, answer.sequence.output_count)
                )
            case mv.Discard():
                answer.move = None
                self._answers.drop(answer)
            case mv.GiveUp(reason):
                answer.move = None
                self._answers.fail(answer, "worker_unavailable", reason)
            case mv.MoveOver(outcome, reason):
                self._over(leaving, outcome, reason)

    def _give_rest(self, leaving: _Leaving) -> None:
        if leaving.lease_id is not None and not leaving.sealed:
            num_blocks = self._layout.blocks_for(leaving.answer.sequence.num_computed)
            self._holder.seal(leaving.lease_id, num_blocks, self._seal(leaving))
        self._answer(leaving, YieldReply(delta=leaving.rest()))

    def _seal(self, leaving: _Leaving) -> Seal:
        leaving.sealed = True
        return Seal(num_tokens=leaving.answer.sequence.num_computed, first_delta=leaving.rest())

    def _answer(self, leaving: _Leaving, answer: YieldReply | TandemError) -> None:
        waiting, leaving.waiting = leaving.waiting, []
        for on_rest in waiting:
            on_rest(answer)

    def _go_on(self, leaving: _Leaving, *, claimed: bool) -> None:
        answer = leaving.answer
        answer.move = None
        if answer.sequence.sequence_id not in self._answers.parked:
            return
        if claimed:
            old_key = leaving.key
            request = msgspec.structs.replace(answer.sequence.request, owner_epoch=leaving.request.owner_epoch)
            self._answers.rename(answer, request)
            self._leaving[leaving.key] = self._leaving.pop(old_key)
        self._answers.unpark(answer)
        self._on_change()

    def _take_back(self, leaving: _Leaving, reason: str) -> None:
        if leaving.lease_id is not None:
            lease_id, leaving.lease_id = leaving.lease_id, None
            self._holder.withdraw(lease_id, reason)
        else:
            self._calls.cancel(leaving.destination, request_key(leaving.request), reason)

    def _over(self, leaving: _Leaving, outcome: mv.Outcome, reason: str) -> None:
        leaving.answer.move = None
        self._outcomes[outcome.value] += 1
        del self._leaving[leaving.key]
        self._answer(leaving, NotFound(f"request {leaving.request.request_id} does not leave any more: {reason}"))


def _when_free(answer: Answer, begin: Callable[[], None]) -> None:
    if answer.in_step:
        answer.when_free = begin
    else:
        begin()


def moved_request(request: GenerateRequest, token_ids: list[int], left_s: float) -> GenerateRequest:
    """As its next owner gets it."""
    return msgspec.structs.replace(
        request,
        owner_epoch=OwnerEpoch(request.owner_epoch + 1),
        token_ids=tuple(token_ids),
        deadline_s=left_s,
        ttft_due_s=None,
    )


def claim_of(request: GenerateRequest, num_outputs: int, *, reads: bool = False) -> Claim:
    """For the epoch that the request names."""
    return Claim(
        request_id=request.request_id,
        attempt=request.attempt,
        owner_epoch=request.owner_epoch,
        num_outputs=num_outputs,
        reads=reads,
    )
