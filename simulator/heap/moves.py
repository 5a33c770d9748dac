"""Requests that move between workers of a study: the order of things as in `decode.moves`.

An answer's KV is pulled while the answer is written on; when all that is final has come, the destination asks for the
rest. The source leaves the answer out of its next step, the last blocks are pulled, the lease is confirmed, the gateway
grants the claim, and the answer joins the destination's next step. Who waits (for blocks, or for the first of them
after a preemption) moves as tokens. What ends, loses its blocks or outgrows what was set aside for it meanwhile stays.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from decode.admission import OfferVerdict, admit, may_resume
from decode.moves.choice import MoveCosts, spare_blocks
from engine.room import Demand
from simulator.heap.histogram import Histogram
from simulator.heap.incoming import demand_of
from simulator.heap.load import tpot_s
from simulator.heap.move_tallies import MoveTallies
from simulator.heap.request import AnswerStage, PromptStage

if TYPE_CHECKING:
    from simulator.heap.events import EventHeap
    from simulator.heap.request import Request
    from simulator.heap.spec import StudySpec
    from simulator.heap.wires import Flow, Wires
    from simulator.heap.worker import Worker

#: Between the last byte and the first step there: the lease is confirmed, the claim is granted.
_MESSAGES_OF_COMMIT = 4
#: Between a waiting request's being taken out of one line and put into another: asked, claimed, granted.
_MESSAGES_OF_TOKENS = 3


class Move:
    """An answer that is on its way with its KV."""

    __slots__ = ("flow", "held_blocks", "is_gone", "pulled_blocks", "request", "reserved_blocks", "source", "target")

    def __init__(self, request: Request, source: Worker, target: Worker) -> None:
        self.request = request
        self.source = source
        self.target = target
        #: At the source, once it has stopped there; set aside at the target; of these, filled.
        self.held_blocks = 0
        self.reserved_blocks = 0
        self.pulled_blocks = 0
        self.flow: Flow | None = None
        #: It is over, or does not move any more: what is still on its way about it is of no interest.
        self.is_gone = False


class Moves:
    """All of a study."""

    def __init__(self, spec: StudySpec, heap: EventHeap, wires: Wires) -> None:
        self._heap = heap
        self._wires = wires
        self._spec = spec
        self._message_s = spec.message_s
        self._block_tokens = spec.block_tokens
        self.tallies = MoveTallies()
        #: From the last token at one worker to the next at another.
        self.pause_s = Histogram()

    # --- answers with their KV --------------------------------------------------------------------

    def move_answer(self, request: Request, target: Worker) -> bool:
        """Begins to move an answer away from where it is written; False where it cannot be moved now."""
        source = request.decode
        if source is None or source is target or request.over or request.move is not None:
            return False
        if not source.answers.may_move(request):
            return False
        move = request.move = Move(request, source, target)
        source.moving_out += 1
        self._heap.after(self._message_s, self._offered, move)
        return True

    def _offered(self, move: Move) -> None:
        """The destination hears of it, and takes it at once or not at all."""
        if move.is_gone:
            self._heap.overtaken()
            return
        request, target = move.request, move.target
        target.sync()
        num_blocks = self._blocks_to_set_aside(move)
        demand = Demand(
            arrival_s=self._heap.now_s,
            num_blocks=num_blocks,
            growth_blocks=target.growth_blocks_of(request, num_blocks),
        )
        if target.is_draining or admit(demand, target.room.view()) is not OfferVerdict.RESERVE:
            self.tallies.refused += 1
            self._heap.after(self._message_s, self._stays, move)
            return
        target.take_blocks(num_blocks)
        target.room.promise(request.row, demand.growth_blocks)
        target.refit()
        move.reserved_blocks = num_blocks
        target.moving_in += 1
        target.arriving_blocks += num_blocks
        self._drive(move)

    def _blocks_to_set_aside(self, move: Move) -> int:
        """What it holds, and what it will be written on meanwhile."""
        request, spec = move.request, self._spec
        num_tokens = move.source.answers.tokens_of(request)
        copy_s = spec.transfer.transfer_s(num_tokens * spec.kv_token_bytes, 1)
        most_tokens = request.prompt_tokens + (spec.max_output_tokens or request.output_tokens)
        spare = spare_blocks(
            MoveCosts(copy_s=copy_s, read_s=None), tpot_s(move.source), most_tokens - num_tokens, self._block_tokens
        )
        return self._blocks(num_tokens) + spare

    def _stays(self, move: Move) -> None:
        """The source hears that it was refused."""
        if move.is_gone:
            self._heap.overtaken()
            return
        self._forget(move)

    def _drive(self, move: Move) -> None:
        """Pulls what is final; asks for the rest when there is no more of that."""
        answers = move.source.answers
        final_blocks = (answers.tokens_of(move.request) - 1) // self._block_tokens
        if min(final_blocks, move.reserved_blocks) > move.pulled_blocks:
            self._pull(move, min(final_blocks, move.reserved_blocks))
        else:
            self._heap.after(self._message_s, self._yield_asked, move)

    def _pull(self, move: Move, until_blocks: int) -> None:
        num_blocks = until_blocks - move.pulled_blocks
        source, target = move.source.interface, move.target.interface
        move.flow = self._wires.pull(source, target, move.request, num_blocks, partial(self._pulled, move))

    def _pulled(self, move: Move, request: Request, num_blocks: int) -> None:
        move.flow = None
        move.pulled_blocks += num_blocks
        self.tallies.blocks += num_blocks
        if move.is_gone:
            # Until now its blocks were quarantined.
            self._give_back(move)
        elif request.answer_stage is AnswerStage.MOVING:
            self._commit(move)
        else:
            self._drive(move)

    def _yield_asked(self, move: Move) -> None:
        if move.is_gone:
            self._heap.overtaken()
            return
        move.source.sync()
        move.source.answers.stop(move.request)

    def stopped(self, move: Move) -> None:
        """The source computes it no more."""
        move.held_blocks, move.request.held_blocks = move.request.held_blocks, 0
        self._heap.after(self._message_s, self._rest, move)

    def _rest(self, move: Move) -> None:
        """The destination knows all that there is, and pulls what it lacks."""
        if move.is_gone:
            self._heap.overtaken()
            return
        target = move.target
        # The last token's KV is not computed yet.
        last_blocks = self._blocks(move.request.num_tokens - 1)
        more_blocks = last_blocks - move.reserved_blocks
        target.sync()
        if more_blocks > target.available_blocks:
            self.tallies.overtaken += 1
            self._heap.after(self._message_s, self._comes_back, move)
            return
        if more_blocks > 0:
            target.take_blocks(more_blocks)
            target.refit()
            move.reserved_blocks += more_blocks
            target.arriving_blocks += more_blocks
        if last_blocks > move.pulled_blocks:
            self._pull(move, last_blocks)
        else:
            self._commit(move)

    def _comes_back(self, move: Move) -> None:
        """The source goes on with it."""
        if move.is_gone:
            self._heap.overtaken()
            return
        move.source.sync()
        move.request.held_blocks, move.held_blocks = move.held_blocks, 0
        self._forget(move)
        self._end_at_target(move)
        move.source.answers.resume(move.request)

    def _commit(self, move: Move) -> None:
        self._heap.after(_MESSAGES_OF_COMMIT * self._message_s, self._granted, move)

    def _granted(self, move: Move) -> None:
        """The destination is its owner from now on."""
        if move.is_gone:
            self._heap.overtaken()
            return
        request, target = move.request, move.target
        target.sync()
        target.moving_in -= 1
        target.arriving_blocks -= move.reserved_blocks
        needed_blocks = min(move.reserved_blocks, self._blocks(request.num_tokens))
        target.free_blocks(move.reserved_blocks - needed_blocks)
        request.held_blocks = needed_blocks
        request.decode = target
        request.move = None
        request.num_moves += 1
        self.tallies.answers += 1
        self.pause_s.add(self._heap.now_s - request.last_token_s)
        target.answers.take_in(request)
        self._heap.after(self._message_s, self._released, move)

    def _released(self, move: Move) -> None:
        """The source hears that it is another's."""
        move.is_gone = True
        move.source.moving_out -= 1
        self._free_held(move)

    # --- moves that end early ---------------------------------------------------------------------

    def gone(self, request: Request) -> None:
        """Its move is nothing to anybody any more: it ended, or lost its blocks. The source's are dealt with there,
        unless it had stopped."""
        move = request.move
        if move is None:
            return
        self.tallies.overtaken += 1
        self._forget(move)
        if request.answer_stage is AnswerStage.MOVING:
            request.answer_stage = AnswerStage.ABSENT
            self._free_held(move)
        self._heap.after(self._message_s, self._end_at_target, move)

    def _forget(self, move: Move) -> None:
        move.is_gone = True
        move.request.move = None
        move.source.moving_out -= 1

    def _end_at_target(self, move: Move) -> None:
        if move.flow is None:
            self._give_back(move)

    def _give_back(self, move: Move) -> None:
        target, num_blocks = move.target, move.reserved_blocks
        if not num_blocks:
            return
        move.reserved_blocks = 0
        target.sync()
        target.moving_in -= 1
        target.arriving_blocks -= num_blocks
        target.room.forget(move.request.row)
        target.freed(num_blocks)

    def _free_held(self, move: Move) -> None:
        move.source.sync()
        num_blocks, move.held_blocks = move.held_blocks, 0
        if num_blocks:
            move.source.freed(num_blocks)

    # --- those that wait, as tokens ---------------------------------------------------------------

    def move_prompt(self, request: Request, target: Worker) -> bool:
        """Takes a prompt that nobody has begun to read out of its line, and puts it into another; False where it is
        not waiting."""
        source = request.prefill
        if source is None or source is target or request.over or request.prompt_stage is not PromptStage.WAITING:
            return False
        source.sync()
        source.prompts.take_away(request)
        request.prefill = target
        if request.decode is source or target.writes:
            # A mixed worker writes what it reads.
            request.decode = target
        request.num_moves += 1
        self.tallies.prompts += 1
        source.moving_out += 1
        target.moving_in += 1
        self._heap.after(_MESSAGES_OF_TOKENS * self._message_s, self._prompt_comes, (request, source, target))
        return True

    def _prompt_comes(self, news: tuple[Request, Worker, Worker]) -> None:
        request, source, target = news
        source.moving_out -= 1
        target.moving_in -= 1
        target.prompts.submit(request)

    def move_preempted(self, request: Request, target: Worker) -> bool:
        """The same with an answer that lost its blocks: it goes on where it is given new ones at once, else where it
        was."""
        source = request.decode
        if source is None or source is target or request.over or request.answer_stage is not AnswerStage.PREEMPTED:
            return False
        source.sync()
        source.answers.take_preempted(request)
        source.moving_out += 1
        target.moving_in += 1
        self._heap.after(_MESSAGES_OF_TOKENS * self._message_s, self._preempted_comes, (request, source, target))
        return True

    def _preempted_comes(self, news: tuple[Request, Worker, Worker]) -> None:
        request, source, target = news
        source.moving_out -= 1
        target.moving_in -= 1
        if request.over:
            return
        target.sync()
        num_blocks = self._blocks(request.num_tokens)
        demand = Demand(
            arrival_s=demand_of(request).arrival_s,
            num_blocks=num_blocks,
            growth_blocks=target.growth_blocks_of(request, num_blocks),
        )
        view = target.room.view()
        if target.is_draining or view.starving or not may_resume(demand, view):
            self.tallies.refused += 1
            source.sync()
            source.answers.put_preempted(request, is_back=True)
            return
        request.decode = target
        request.num_moves += 1
        self.tallies.preempted += 1
        target.answers.put_preempted(request)

    def _blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_tokens)
