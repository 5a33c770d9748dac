"""The answers that a worker in a study writes: the order of things as in `decode.batch`, the decisions its policies'.

Answers that write in every step are members of a `Lockstep` group; those that do not (yet) are looked at one by one:
adopted since the last step, left out by the budget, or being read again after a preemption.
"""

from __future__ import annotations

import math
from collections import deque
from itertools import chain
from typing import TYPE_CHECKING

from decode.admission import may_resume
from engine.compose import Candidate, GrantReason
from engine.room import Demand
from simulator.heap.growth import GrowthBook
from simulator.heap.incoming import demand_of
from simulator.heap.lockstep import Lockstep
from simulator.heap.request import AnswerStage
from simulator.heap.results import Outcome
from simulator.heap.usage import uses_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from contracts.messages import PriorityUse
    from engine.compose import Grant
    from simulator.heap.context import Context
    from simulator.heap.request import Request
    from simulator.heap.spec import WorkerGroup
    from simulator.heap.stretch import Stretch
    from simulator.heap.worker import Worker


class Answers:
    def __init__(self, context: Context, worker: Worker, group: WorkerGroup) -> None:
        self._context = context
        self._heap = context.heap
        self._itl_s = context.recorder.itl_s
        self._message_s = context.spec.message_s
        self._block_tokens = context.layout.block_tokens
        self._worker = worker
        self.lockstep = Lockstep(context.layout.block_tokens)
        #: Blocks of its members, as of the last step that began.
        self._lockstep_blocks = 0
        self._growth = GrowthBook(self.lockstep, worker.room, group.decode, context)
        #: Members whose first step in the group has not ended, and when the group's last step ended.
        self._joined: list[Request] = []
        self._last_step_s = math.nan
        #: Answers with blocks outside the group, by sequence id: to write a token, to be read again.
        self._loose: dict[int, Request] = {}
        self._reread: dict[int, Request] = {}
        self._preempted: dict[int, Request] = {}
        #: What could write a token in the next step, by sequence id; whether that changed since the last one.
        self._writers: dict[int, Candidate] = {}
        self._writers_changed = False
        self._doomed: list[Request] = []
        #: To be left out from the next step on, for another worker goes on with them.
        self._yielding: list[Request] = []
        self.preemptions_total = 0

    @property
    def num_running(self) -> int:
        return len(self._writers) + len(self._reread)

    @property
    def num_preempted(self) -> int:
        return len(self._preempted)

    def context_tokens(self, ahead: int) -> int:
        """Tokens of running and preempted sequences; the group is `ahead` steps on."""
        tokens = self.lockstep.context_tokens(ahead)
        for some in (self._loose, self._reread, self._preempted):
            if some:
                tokens += sum(request.num_tokens for request in some.values())
        return tokens

    # --- sequences --------------------------------------------------------------------------------

    def adopt(self, request: Request) -> None:
        """Its KV has come from another worker, into blocks that are its own now."""
        request.sequence_id = self._worker.next_sequence_id()
        request.held_blocks = request.num_blocks
        self._start(request)

    def take_over(self, request: Request) -> None:
        """A prompt read by this same worker: its blocks stay where they are."""
        self._start(request)

    def take_in(self, request: Request) -> None:
        """An answer of another worker, with its KV in blocks that are its own now."""
        request.sequence_id = self._worker.next_sequence_id()
        self._start(request)
        self._worker.wake()

    def _start(self, request: Request) -> None:
        """It has blocks, and one token to compute."""
        request.answer_stage = AnswerStage.RUNNING
        if request.answer_demand is None:
            request.answer_demand = Demand(arrival_s=self._heap.now_s, num_blocks=request.num_blocks)
        self._promise(request)
        self._loose[request.sequence_id] = request
        self._writes(request)

    def _writes(self, request: Request) -> None:
        sequence_id = request.sequence_id
        self._writers[sequence_id] = Candidate(
            sequence_id=sequence_id,
            num_tokens=1,
            arrival=sequence_id,
            started=True,
            tpot_target_s=request.tpot_target_s,
        )
        self._writers_changed = True

    def _promise(self, request: Request) -> None:
        worker = self._worker
        worker.room.promise(request.row, worker.growth_blocks_of(request, request.held_blocks))

    def give_up(self, request: Request) -> None:
        """The request is over: forgets it, after the step or the pull that writes its blocks."""
        worker = self._worker
        match request.answer_stage:
            case AnswerStage.ABSENT:
                return
            case AnswerStage.OFFERED | AnswerStage.PULLING:
                worker.incoming.give_up(request)
            case AnswerStage.RUNNING if request.in_step or request.sequence_id in self.lockstep.members:
                self._doomed.append(request)
                worker.wake()
            case AnswerStage.RUNNING | AnswerStage.PREEMPTED:
                self._drop(request)
                worker.wake()
            case AnswerStage.MOVING:
                self._context.moves.gone(request)

    # --- requests that move -----------------------------------------------------------------------

    def priorities(self) -> tuple[PriorityUse, ...]:
        """Who runs here, and with how many blocks, by priority; the worker's blocks must be up to date."""
        return uses_of(self.running(), self._worker.steps_ahead(), self.lockstep)

    def running(self) -> Iterator[Request]:
        """All that have blocks here and are not preempted."""
        return chain(self.lockstep.members.values(), self._loose.values(), self._reread.values())

    def preempted(self) -> list[Request]:
        """In the order in which they get blocks again."""
        return [self._preempted[sequence_id] for sequence_id in sorted(self._preempted)]

    def preempted_blocks(self) -> int:
        """What they would take."""
        return sum(self._blocks_again(request) for request in self._preempted.values())

    def blocks_of_next(self) -> int:
        """What the first of them would; there must be one."""
        return self._blocks_again(self._preempted[min(self._preempted)])

    def _blocks_again(self, request: Request) -> int:
        return -(-request.num_tokens // self._block_tokens)

    def tokens_of(self, request: Request) -> int:
        """Prompt and answer so far, of an answer that is here."""
        if request.sequence_id in self.lockstep.members:
            return request.offset + self.lockstep.step + self._worker.steps_ahead()
        return request.num_tokens

    def may_move(self, request: Request) -> bool:
        """It runs, and all of its KV is computed but that of its last token."""
        return request.answer_stage is AnswerStage.RUNNING and request.sequence_id not in self._reread

    def stop(self, request: Request) -> None:
        """Leaves it out from the next step on, with all its blocks; then its move goes on. It may have ended, or lost
        its blocks, meanwhile."""
        move = request.move
        if move is None or request.answer_stage is not AnswerStage.RUNNING:
            return
        if request.sequence_id in self.lockstep.members and self._worker.is_stepping:
            self._yielding.append(request)
            self._worker.wake()
            return
        self._take_out(request)
        request.answer_stage = AnswerStage.MOVING
        self._context.moves.stopped(move)

    def resume(self, request: Request) -> None:
        """It was stopped for a move, and stays."""
        self._start(request)
        self._worker.wake()

    def take_preempted(self, request: Request) -> None:
        """Out of the line, for a move."""
        del self._preempted[request.sequence_id]
        request.answer_stage = AnswerStage.MOVING
        self._worker.room.starving = bool(self._preempted)
        self._worker.incoming.serve()
        self._worker.wake()

    def put_preempted(self, request: Request, *, is_back: bool = False) -> None:
        """Into the line, at its end or where it was; it has no blocks here."""
        if not is_back:
            request.sequence_id = self._worker.next_sequence_id()
        request.answer_stage = AnswerStage.PREEMPTED
        request.num_computed = 0
        self._preempted[request.sequence_id] = request
        self._worker.room.starving = True
        self._worker.wake()

    # --- between steps ----------------------------------------------------------------------------

    def prepare(self) -> None:
        """What comes before the composition of a step: blocks to grow, preemption, readmission, offers."""
        self._make_room()
        if self._preempted:
            self._resume()
        self._worker.incoming.serve()

    def _make_room(self) -> None:
        """Gives every running sequence the blocks for its remaining tokens, oldest first, preempting the newest."""
        grown_blocks = self.lockstep.num_blocks(0)
        wanted = grown_blocks - self._lockstep_blocks
        for request in self._loose.values():
            wanted += self._missing_blocks(request)
        if wanted > self._worker.available_blocks:
            self._make_room_one_by_one()
            return
        self._worker.take_blocks(wanted)
        self._lockstep_blocks = grown_blocks
        self._growth.note(0)
        for request in self._loose.values():
            if missing := self._missing_blocks(request):
                request.held_blocks += missing
                self._promise(request)

    def _missing_blocks(self, request: Request) -> int:
        """Outside the group."""
        return -(-request.num_tokens // self._block_tokens) - request.held_blocks

    def _make_room_one_by_one(self) -> None:
        members = self.lockstep.members
        running = {**members, **self._loose, **self._reread}
        order = deque(running[sequence_id] for sequence_id in sorted(running))
        while order:
            request = order[0]
            is_member = request.sequence_id in members
            if is_member:
                missing = self.lockstep.blocks_of(request, 0) - self.lockstep.blocks_of(request, -1)
            else:
                missing = self._missing_blocks(request)
            if missing > self._worker.available_blocks:
                self._preempt(order.pop())
                continue
            order.popleft()
            self._worker.take_blocks(missing)
            if is_member:
                self._lockstep_blocks += missing
            elif missing:
                request.held_blocks += missing
                self._promise(request)
        self._growth.note(0)

    def _preempt(self, request: Request) -> None:
        self._leave(request)
        needed = -(-request.num_tokens // self._block_tokens)
        if needed > self._worker.num_blocks:
            request.answer_stage = AnswerStage.ABSENT
            self._context.on_end(request, Outcome.FAILED)
            return
        self.preemptions_total += 1
        request.preemptions += 1
        request.num_computed = 0
        request.answer_stage = AnswerStage.PREEMPTED
        self._preempted[request.sequence_id] = request
        self._worker.room.starving = True

    def _leave(self, request: Request) -> None:
        """Takes a running sequence out of all lists, and its blocks from it; it has no step under way."""
        if request.move is not None:
            self._context.moves.gone(request)
        self._take_out(request)
        self._worker.free_blocks(request.held_blocks)
        request.held_blocks = 0

    def _take_out(self, request: Request) -> None:
        """Of all lists. A member of the group holds the blocks of its last step."""
        sequence_id = request.sequence_id
        if sequence_id in self.lockstep.members:
            request.held_blocks = self.lockstep.blocks_of(request, -1)
            self._lockstep_blocks -= request.held_blocks
            self.lockstep.leave(request)
            request.last_token_s = self._last_step_s
        else:
            self._loose.pop(sequence_id, None)
            self._reread.pop(sequence_id, None)
        if self._writers.pop(sequence_id, None) is not None:
            self._writers_changed = True
        self._worker.room.forget(request.row)

    def _drop(self, request: Request) -> None:
        """Ends it on this side."""
        if request.answer_stage is AnswerStage.PREEMPTED:
            del self._preempted[request.sequence_id]
        else:
            self._leave(request)
        request.answer_stage = AnswerStage.ABSENT
        self._worker.room.starving = bool(self._preempted)
        self._worker.incoming.serve()

    def _resume(self) -> None:
        """Gives preempted sequences their blocks back, in order of arrival."""
        worker = self._worker
        while self._preempted:
            sequence_id = min(self._preempted)
            request = self._preempted[sequence_id]
            needed = -(-request.num_tokens // self._block_tokens)
            growth_blocks = worker.growth_blocks_of(request, needed)
            demand = Demand(arrival_s=demand_of(request).arrival_s, num_blocks=needed, growth_blocks=growth_blocks)
            if not may_resume(demand, worker.room.view()):
                return
            worker.take_blocks(needed)
            request.held_blocks = needed
            request.answer_stage = AnswerStage.RUNNING
            del self._preempted[sequence_id]
            worker.room.starving = bool(self._preempted)
            worker.room.promise(request.row, growth_blocks)
            self._reread[sequence_id] = request

    # --- steps ------------------------------------------------------------------------------------

    def writers(self) -> list[Candidate]:
        """Sequences that could write a token."""
        return list(self._writers.values())

    @property
    def writing_tokens(self) -> int:
        """Context of all of these in the next step."""
        return self.lockstep.context_tokens(0) + sum(request.num_tokens for request in self._loose.values())

    @property
    def must_compose(self) -> bool:
        """Whether the next step may have other writers than the last."""
        return self._writers_changed or bool(self._loose)

    def rereads(self) -> list[Candidate]:
        """Preempted sequences to be read again."""
        return [
            Candidate(
                sequence_id=sequence_id,
                num_tokens=request.num_tokens - request.num_computed,
                arrival=sequence_id,
                started=True,
                num_computed=request.num_computed,
            )
            for sequence_id, request in self._reread.items()
        ]

    def build(self, sequence_id: int) -> Request | None:
        """A chunk of this sequence goes into a step; None where it is a prompt's."""
        request = self._reread.get(sequence_id)
        if request is not None:
            request.in_step = True
        return request

    def regroup(self, grants: Iterable[Grant], num_writers: int) -> None:
        """The group becomes those that write in the next step, `num_writers` of `grants`."""
        self._writers_changed = False
        lockstep = self.lockstep
        if num_writers < len(self._writers):
            granted = {grant.sequence_id for grant in grants if grant.reason is GrantReason.DECODE}
            for request in [each for each in lockstep.members.values() if each.sequence_id not in granted]:
                self._set_aside(request)
            joining = [request for request in self._loose.values() if request.sequence_id in granted]
        else:
            joining = list(self._loose.values())
        for request in joining:
            del self._loose[request.sequence_id]
            lockstep.join(request)
            self._lockstep_blocks += request.held_blocks
            self._growth.follow(request)
        self._joined += joining

    def _set_aside(self, request: Request) -> None:
        """Out of the group, with all its blocks: there is no place for it in the step."""
        request.held_blocks = self.lockstep.blocks_of(request, 0)
        self._lockstep_blocks -= request.held_blocks
        self.lockstep.leave(request)
        request.last_token_s = self._last_step_s
        self._loose[request.sequence_id] = request

    def grow(self, ahead: int) -> int:
        """The group is in that step: takes note of its blocks; how many they have become more."""
        blocks = self.lockstep.num_blocks(ahead)
        more = blocks - self._lockstep_blocks
        if more:
            self._lockstep_blocks = blocks
            self._growth.note(ahead)
        return more

    def steps_within_blocks(self, most: int) -> int:
        """How many steps of a stretch, from its first on and at most `most`, all members have blocks for; they have
        those of the step under way."""
        num_blocks = self._lockstep_blocks + self._worker.available_blocks
        return self.lockstep.steps_within(num_blocks, most - 1) + 1

    def wrote(self, stretch: Stretch, num_steps: int) -> None:
        """The group has written a token in each of these steps; the worker's blocks are those of the last."""
        lockstep = self.lockstep
        first_end_s = stretch.end_s(1)
        joined = self._joined
        if stayed := lockstep.size - len(joined):
            self._itl_s.add(first_end_s - self._last_step_s, stayed)
        if joined:
            for request in joined:
                self._note_gap(request, first_end_s)
            joined.clear()
        if num_steps > 1:
            first_gap_s = stretch.first_s + stretch.growth_s + stretch.gap_s
            last_gap_s = first_gap_s + (num_steps - 2) * stretch.growth_s
            self._itl_s.add_ramp(first_gap_s, last_gap_s, num_steps - 1, lockstep.size)
        self._last_step_s = stretch.end_s(num_steps)
        lockstep.step += num_steps

    def _note_gap(self, request: Request, token_s: float) -> None:
        self._itl_s.add(token_s - request.last_token_s)
        self.note_second_token(request, token_s)

    def note_second_token(self, request: Request, token_s: float) -> None:
        """It writes a token then, and may have written earlier."""
        if math.isnan(request.second_token_s):
            request.second_token_s = token_s + self._message_s

    def end_finished(self) -> None:
        """Ends what has written its last token, and what was given up during the step."""
        for request in self.lockstep.finished():
            if not request.over:
                self._finish(request)
        if self._doomed:
            doomed, self._doomed = self._doomed, []
            for request in doomed:
                self._drop(request)
        if self._yielding:
            yielding, self._yielding = self._yielding, []
            for request in yielding:
                self.stop(request)

    def _finish(self, request: Request) -> None:
        request.finished_s = self._heap.now_s + self._message_s
        self._worker.tallies.add(request)
        self._drop(request)
        self._context.on_end(request, Outcome.FINISHED)

    def reread(self, request: Request, num_tokens: int) -> None:
        """A step with a chunk of a preempted sequence has ended; with the last one its next token is there."""
        request.in_step = False
        request.num_computed += num_tokens
        if request.over or request.num_computed < request.num_tokens:
            return
        now_s = self._heap.now_s
        self._note_gap(request, now_s)
        request.last_token_s = now_s
        request.num_written += 1
        self._worker.decode_tokens += 1
        if request.num_written == request.output_tokens:
            self._finish(request)
            return
        del self._reread[request.sequence_id]
        self._loose[request.sequence_id] = request
        self._writes(request)
