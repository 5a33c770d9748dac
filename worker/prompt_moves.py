"""Prompts that wait here move to other workers, and theirs to here: as token ids, for nobody has begun to read them.

The machines are those of answers (`decode.moves`): a prompt stands still from the moment it is offered, and who reads
it is the gateway's to say. Not thread-safe; nothing here waits or does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import BadRequest, Cancelled, NoCapacity, NotReady, WorkerUnavailable
from contracts.messages import Move, PrefillRequest, TakeOverRequest
from decode.moves import destination as inward
from decode.moves import source as outward
from decode.moves.destination import DestinationMove
from decode.moves.out import claim_of, moved_request
from decode.moves.source import SourceMove
from engine.recent import RecentTries
from engine.sequence import request_key

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.errors import TandemError
    from contracts.messages import ClaimVerdict, Peer, RequestKey
    from contracts.requests import Claim, GenerateRequest
    from decode.moves.calls import MoveCalls
    from prefill import PrefillQueue
    from prefill.prompts import Prompt


#: Prompts that wait for their gateways' word: until then the queue does not know of them.
MAX_COMING = 64


@dataclass(slots=True, eq=False)
class _Leaving:
    prompt: Prompt
    machine: SourceMove
    destination: Peer
    #: As it was offered.
    request: GenerateRequest

    @property
    def key(self) -> RequestKey:
        return self.prompt.sequence.key


@dataclass(slots=True, eq=False)
class _Coming:
    request: GenerateRequest
    #: Who is to write its answer.
    decode: Peer
    machine: DestinationMove


class PromptMoves:
    def __init__(
        self,
        *,
        queue: PrefillQueue,
        own: Peer,
        calls: MoveCalls,
        clock: Clock,
        outcomes: Counter[str],
        on_change: Callable[[], None],
    ) -> None:
        """`outcomes` counts how moves ended; `on_change` is called when there may be something to read."""
        self._queue = queue
        self._own = own
        self._calls = calls
        self._clock = clock
        self._outcomes = outcomes
        self._on_change = on_change
        #: By this worker's keys: those that have not ended.
        self._leaving: dict[RequestKey, _Leaving] = {}
        self._coming: dict[RequestKey, _Coming] = {}
        self._over = RecentTries()

    @property
    def num_leaving(self) -> int:
        return len(self._leaving)

    @property
    def num_coming(self) -> int:
        return len(self._coming)

    # --- from here --------------------------------------------------------------------------------

    def send(self, prompt: Prompt, destination: Peer) -> None:
        """Begins to move a prompt that waits (`PrefillQueue.movable`)."""
        now_s, sequence = self._clock.now_s(), prompt.sequence
        request = moved_request(sequence.request, sequence.token_ids, max(0.0, sequence.deadline_s - now_s))
        if sequence.request.ttft_due_s is not None:
            due_s = sequence.request.ttft_due_s - (now_s - prompt.received_s)
            request = msgspec.structs.replace(request, ttft_due_s=due_s)
        leaving = _Leaving(prompt, SourceMove(now_s, stands_still=True), destination, request)
        self._leaving[leaving.key] = leaving
        self._queue.park(prompt)
        ask = TakeOverRequest(
            target=destination.incarnation,
            request=request,
            move=Move(source=self._own, key=leaving.key),
            final=True,
            # One that was to be written here is written where it is read.
            decode=prompt.reader or destination,
        )
        self._calls.take_over(destination, ask, lambda error: self._told(leaving, error))

    def _told(self, leaving: _Leaving, error: TandemError | None) -> None:
        self._feed_out(leaving, outward.Taken() if error is None else outward.NotTaken(error.message))

    def _feed_out(self, leaving: _Leaving, event: outward.SourceEvent) -> None:
        for instruction in leaving.machine.handle(event, self._clock.now_s()):
            self._carry_out(leaving, instruction)

    def _carry_out(self, leaving: _Leaving, instruction: outward.SourceInstruction) -> None:
        prompt = leaving.prompt
        match instruction:
            case outward.GoOn(claimed):
                old_key = leaving.key
                request = None
                if claimed:
                    request = msgspec.structs.replace(prompt.sequence.request, owner_epoch=leaving.request.owner_epoch)
                self._queue.unpark(prompt, request)
                self._leaving[leaving.key] = self._leaving.pop(old_key)
                self._on_change()
            case outward.TakeBack(reason):
                self._calls.cancel(leaving.destination, request_key(leaving.request), reason)
            case outward.ClaimBack():
                self._calls.claim(leaving.request.gateway_id, _claim(leaving.request))
            case outward.Discard():
                self._queue.cancel(leaving.key, "it is another worker's")
            case outward.GiveUp(reason):
                self._queue.give_up(prompt, reason)
            case outward.MoveOver(outcome):
                self._outcomes[outcome.value] += 1
                del self._leaving[leaving.key]
            case _:
                raise AssertionError(f"{instruction} for a prompt that stands still")

    # --- to here ----------------------------------------------------------------------------------

    def take_over(self, ask: TakeOverRequest) -> None:
        """As `contracts.messages.TAKE_OVER`, of a prompt; raises what that does, and Cancelled for one that is over."""
        request, decode = ask.request, ask.decode
        if decode is None:
            raise BadRequest("a prompt is taken over for the worker that is to write its answer")
        key = request_key(request)
        if key in self._coming or self._queue.knows(request):
            return
        if key in self._over:
            raise Cancelled(f"request {key.request_id} is over at {self._own.worker_id}")
        if not self._calls.hears(request.gateway_id):
            raise NotReady(f"gateway {request.gateway_id} does not listen to {self._own.worker_id}", retry_after_s=1.0)
        if len(self._coming) >= MAX_COMING:
            raise NoCapacity(
                f"{len(self._coming)} prompts are on their way to {self._own.worker_id}", retry_after_s=1.0
            )
        self._queue.check_room(request, self._clock.now_s())
        coming = self._coming[key] = _Coming(request, decode, DestinationMove(self._clock.now_s()))
        self._feed_in(coming, inward.Complete())

    def cancel(self, key: RequestKey, reason: str) -> None:
        """What is on its way in either direction ends. Unknown ones are no error."""
        coming = self._coming.get(key)
        if coming is not None:
            self._feed_in(coming, inward.Gone(reason))

    def _feed_in(self, coming: _Coming, event: inward.DestinationEvent) -> None:
        key = request_key(coming.request)
        for instruction in coming.machine.handle(event, self._clock.now_s()):
            match instruction:
                case inward.ClaimIt():
                    self._calls.claim(coming.request.gateway_id, _claim(coming.request))
                case inward.Own():
                    del self._coming[key]
                    self._outcomes["owned"] += 1
                    ask = PrefillRequest(target=self._own.incarnation, request=coming.request, decode=coming.decode)
                    self._queue.submit_moved(ask, self._clock.now_s())
                    self._on_change()
                case inward.Drop() | inward.GiveUp():
                    del self._coming[key]
                    self._over.add(key)
                    self._outcomes["not_come"] += 1
                    if isinstance(instruction, inward.GiveUp):
                        self._queue.refuse(coming.request, WorkerUnavailable.code, instruction.reason)
                case _:
                    raise AssertionError(f"{instruction} for a prompt that nobody reads")

    # --- answers and time -------------------------------------------------------------------------

    def claim_answered(self, verdict: ClaimVerdict) -> bool:
        """Whether the claim was one of these."""
        coming = self._coming.get(verdict.key)
        if coming is not None:
            self._feed_in(coming, inward.ClaimAnswered(verdict.granted, verdict.next_index, verdict.reason))
            return True
        for leaving in list(self._leaving.values()):
            if request_key(leaving.request) == verdict.key:
                self._feed_out(leaving, outward.ClaimAnswered(verdict.granted, verdict.reason))
                return True
        return False

    def look(self, now_s: float) -> None:
        for leaving in list(self._leaving.values()):
            if not self._queue.is_here(leaving.prompt):
                self._feed_out(leaving, outward.Gone("it ended here"))
            elif leaving.machine.due_s is not None and now_s >= leaving.machine.due_s:
                self._feed_out(leaving, outward.Look())
        for coming in list(self._coming.values()):
            if coming.machine.due_s is not None and now_s >= coming.machine.due_s:
                self._feed_in(coming, inward.Look())


def _claim(request: GenerateRequest) -> Claim:
    num_outputs = len(request.token_ids) - request.num_prompt_tokens
    return claim_of(request, num_outputs, reads=True)
