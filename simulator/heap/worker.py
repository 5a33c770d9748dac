"""A worker in a study: its blocks, both its sides, and its steps.

The loop is that of `worker.step_loop`: gather candidates, compose, step, apply, at the worker's own pace. What
happens during a step is seen by the next one. Steps that only decode are taken together: until somebody finishes
or blocks run out their ends are known in closed form, and what comes meanwhile cuts the stretch at the end of the
step that is under way. The next step is composed when the last one ends, and begins after `between_steps_s`.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

from contracts.errors import InvariantBroken
from contracts.latency import StepWork
from engine.chunk_budget import mixed_budget
from engine.compose import GrantReason, compose
from engine.room import Room
from simulator.heap.answers import Answers
from simulator.heap.incoming import Incoming
from simulator.heap.load import Tallies
from simulator.heap.prefix_cache import PrefixCache
from simulator.heap.prompts import Prompts
from simulator.heap.results import WorkerUsage
from simulator.heap.stretch import Stretch
from simulator.heap.wires import Interface

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.messages import Role
    from engine.compose import Candidate, Grant, StepBudget
    from simulator.heap.context import Context
    from simulator.heap.request import Request
    from simulator.heap.spec import StudySpec, WorkerGroup

#: The sequences of a step with chunks, and how many tokens of each.
Chunks = list[tuple["Request", int]]


class State(IntEnum):
    IDLE = 0
    #: Composing, or handing out results: what changes is seen at once.
    BETWEEN = 1
    #: Steps that only decode, taken together.
    STRETCH = 2
    #: A step with chunks; with pipeline stages, as long as the first of them is taken.
    STEP = 3


#: Looking up a member of an enumeration takes longer than comparing with it.
_STRETCH, _STEP = State.STRETCH, State.STEP


class Worker:
    def __init__(self, context: Context, group: WorkerGroup, worker_id: str, row: int, *, is_up: bool = True) -> None:
        self._heap = context.heap
        self.gap_s = context.spec.between_steps_s
        self.latency = group.latency
        self._budget = group.budget
        self._num_stages = group.pipeline_stages
        self._prompts_first = group.prompts_first
        self._tpot_chunks = group.tpot_chunks
        self.worker_id = worker_id
        self.row = row
        self.num_blocks = group.num_blocks
        self.max_batch_tokens = group.budget.max_tokens
        self.max_sequences = group.budget.max_sequences
        self.interface = Interface()
        self.role: Role = group.role
        self._handoff_blocks = group.prefill.handoff_blocks(group.num_blocks)
        self.prefix_cache = self._make_cache(context, group)
        #: A report of what changed in its prefix cache is on its way.
        self.tells_blocks = False
        self.available_blocks = group.num_blocks
        #: Requests on their way from here and to here, and the blocks set aside for the latter.
        self.moving_out = 0
        self.moving_in = 0
        self.arriving_blocks = 0
        #: It runs, and has a role.
        self.is_up = is_up
        #: It gets nothing new, and gives away what it has.
        self.is_draining = False
        #: While it drains: but for its answers, which stay.
        self.keeps_answers = False
        #: Its reports have what moves are decided by.
        self.tells_moves = tells_moves(context.spec)
        self.room = Room(
            layout=context.layout,
            num_blocks=group.num_blocks,
            growth_tokens=group.decode.growth_tokens,
            available_blocks=lambda: self.available_blocks,
        )
        self.prompts = Prompts(context, self, group)
        self.incoming = Incoming(context, self)
        self.answers = Answers(context, self, group)
        self._num_sequences = 0
        self._state = State.IDLE
        #: No step begins before.
        self._ready_s = 0.0
        #: The steps under way and, of a stretch, how many it is to have; of a step with chunks, 1.
        self._stretch = Stretch(0.0, 0.0, 0.0, 0.0)
        self._planned_steps = 0
        #: Of a stretch: how many steps had ended when that was last asked, and when that was.
        self._ended_steps = 0
        self._ended_at_s = -1.0
        #: When each pipeline stage is free.
        self._stage_free_s = [0.0] * group.pipeline_stages
        #: Seconds in steps, before the steps under way.
        self._busy_s = 0.0
        self.num_steps = 0
        self.tallies = Tallies()
        self._prefill_tokens = 0
        self.decode_tokens = 0
        self._peak_blocks = 0
        #: Integral of blocks that are not free, up to `_counted_s`.
        self._block_seconds = 0.0
        self._counted_s = 0.0

    @property
    def reads(self) -> bool:
        return self.role != "decode"

    @property
    def writes(self) -> bool:
        return self.role != "prefill"

    @property
    def handoff_blocks(self) -> int:
        """Blocks that may hold KV for other workers."""
        return self._handoff_blocks if self.reads else 0

    def set_role(self, role: Role) -> None:
        """It must be empty. Who wrote only has no prefix cache in any role."""
        if not self.is_empty:
            raise InvariantBroken(f"{self} changes its role before it is empty")
        self.role = role

    def mix(self) -> None:
        """It reads and writes from now on, and goes on with what it has."""
        self.sync()
        self.role = "mixed"
        self.prompts.role_changed()

    def unmix(self, role: Role) -> None:
        """It gives up reading, or writing, and goes on with what it has of the other. Nothing of that may be here."""
        if self.role != "mixed" or not self.has_left_to(role):
            raise InvariantBroken(f"{self} becomes a {role} worker before it can be one")
        self.sync()
        self.role = role
        self.prompts.role_changed()

    def has_left_to(self, role: Role) -> bool:
        """Whether nothing is here that a worker of this single role does not have."""
        if self.moving_out or self.moving_in:
            return False
        if role == "decode":
            return not (self.prompts.num_open or self.prompts.untaken_blocks)
        answers = self.answers
        return not (answers.num_running or answers.num_preempted or self.incoming.num_open or self.prompts.num_own)

    def begin_anew(self, role: Role) -> None:
        self.set_role(role)
        if self.prefix_cache is not None:
            self.prefix_cache.forget()

    def _make_cache(self, context: Context, group: WorkerGroup) -> PrefixCache | None:
        """Of the host's memory; None where there is none, or nothing to find in it."""
        if group.role == "decode" or not context.hash_block_tokens:
            return None
        capacity_blocks = group.prefix_cache_tokens // context.hash_block_tokens
        return PrefixCache(capacity_blocks, lambda: context.on_cache_changed(self)) if capacity_blocks else None

    def __repr__(self) -> str:
        return (
            f"<worker {self.worker_id} {self._state.name} [{self.available_blocks}/{self.num_blocks} blocks free, "
            f"{self.prompts.num_open} prompts, {self.answers.num_running} answers]>"
        )

    # --- blocks -----------------------------------------------------------------------------------

    @property
    def used_blocks(self) -> int:
        return self.num_blocks - self.available_blocks

    def take_blocks(self, num_blocks: int) -> None:
        self.available_blocks -= num_blocks
        assert self.available_blocks >= 0, self
        used_blocks = self.num_blocks - self.available_blocks
        if used_blocks > self._peak_blocks:
            self._peak_blocks = used_blocks

    def free_blocks(self, num_blocks: int) -> None:
        self.available_blocks += num_blocks
        assert self.available_blocks <= self.num_blocks, self

    def freed(self, num_blocks: int) -> None:
        """Frees blocks, for whoever waits for some; they must be up to date."""
        self.free_blocks(num_blocks)
        self.prompts.note_head()
        self.incoming.serve()
        self.wake()

    def sync(self) -> None:
        """Brings the blocks up to date, before anything looks at them: those of a group grow during a stretch. Their
        integral takes the growth between two looks as even."""
        now_s, counted_s = self._heap.now_s, self._counted_s
        if now_s == counted_s:
            return
        used_before = self.num_blocks - self.available_blocks
        if self._state is _STRETCH and (more := self.answers.grow(self._steps_ended())):
            self.take_blocks(more)
        used_blocks = used_before + self.num_blocks - self.available_blocks
        self._block_seconds += 0.5 * (now_s - counted_s) * used_blocks
        self._counted_s = now_s

    def _steps_ended(self) -> int:
        """Of the stretch; its last step ends with an event of its own."""
        now_s = self._heap.now_s
        if now_s != self._ended_at_s:
            self._ended_at_s = now_s
            self._ended_steps = min(self._stretch.ended_by(now_s), self._planned_steps - 1)
        return self._ended_steps

    def growth_blocks_of(self, request: Request, num_held: int) -> int:
        return self.room.growth_until(request.prompt_tokens + request.output_tokens - 1, num_held)

    def note_second_token(self, request: Request) -> None:
        """Brings it up to date in the midst of a stretch."""
        is_member = self.answers.lockstep.members.get(request.sequence_id) is request
        if is_member and self._state is State.STRETCH and self._steps_ended():
            self.answers.note_second_token(request, self._stretch.end_s(1))

    def head_demand_blocks(self) -> int:
        """What the first of those that wait for blocks would take; 0 where nobody waits."""
        if self.answers.num_preempted:
            return self.answers.blocks_of_next()
        room = self.room
        waiting = [one for one in (room.offer, self.prompts.next_demand()) if one is not None]
        return min(waiting, key=lambda one: one.arrival_s).num_blocks if waiting else 0

    @property
    def is_stepping(self) -> bool:
        """A step is under way."""
        return self._state in (State.STRETCH, State.STEP)

    def steps_ahead(self) -> int:
        """How many steps the group of its answers is ahead of what is written down of it."""
        return self._steps_ended() if self._state is _STRETCH else 0

    def next_sequence_id(self) -> int:
        self._num_sequences += 1
        return self._num_sequences

    # --- the loop ---------------------------------------------------------------------------------

    def wake(self) -> None:
        """Something changed that may make work possible, or less of it: the next step is to see it."""
        if self._state is State.IDLE:
            self._gather()
        elif self._state is State.STRETCH:
            self._cut(self._steps_ended() + 1)

    def refit(self) -> None:
        """Blocks were taken during a stretch: it may have to end earlier."""
        if self._state is State.STRETCH:
            self._cut(self.answers.steps_within_blocks(self._planned_steps))

    def _cut(self, num_steps: int) -> None:
        if num_steps < self._planned_steps:
            self._planned_steps = num_steps
            self._heap.at(self._stretch.end_s(num_steps), self._stretch_ends, (self._stretch, num_steps))

    def _gather(self) -> None:
        self._state = State.BETWEEN
        self.sync()
        answers = self.answers
        answers.prepare()
        self.prompts.admit()
        chunks = self.prompts.candidates()
        chunks += answers.rereads()
        if chunks and self._prompts_first:
            grants = compose((), _whole(chunks, self._budget), self._budget)
            answers.regroup(grants, 0)
            self._begin_step(grants)
            return
        if chunks:
            writers = answers.writers()
            grants = compose(writers, chunks, self._budget_beside(writers, chunks))
            num_writers = sum(grant.reason is GrantReason.DECODE for grant in grants)
            answers.regroup(grants, num_writers)
            self._begin_step(grants)
            return
        if answers.must_compose:
            grants = compose(answers.writers(), (), self._budget)
            answers.regroup(grants, len(grants))
        if answers.lockstep.size:
            self._begin_stretch()
        else:
            self._state = State.IDLE

    def _budget_beside(self, writers: Sequence[Candidate], chunks: Sequence[Candidate]) -> StepBudget:
        """Of a step with chunks, in which the answers keep their targets."""
        if not self._tpot_chunks or not writers:
            return self._budget
        return mixed_budget(
            writers,
            chunks,
            self._budget,
            self.latency,
            context_tokens=self.answers.writing_tokens,
            between_steps_s=self.gap_s,
        )

    def _start_s(self) -> float:
        return max(self._heap.now_s, self._ready_s)

    # --- steps that only decode -------------------------------------------------------------------

    def _begin_stretch(self) -> None:
        group = self.answers.lockstep
        base_s, per_token_s = self.latency.decode_terms(group.size)
        self._stretch = Stretch(
            self._start_s(),
            base_s + per_token_s * group.context_tokens(0),
            per_token_s * group.size,
            self.gap_s,
        )
        _check_duration(self._stretch.first_s, self)
        self._ended_at_s = -1.0
        self._planned_steps = self.answers.steps_within_blocks(group.steps_to_finish())
        self._state = State.STRETCH
        self._heap.at(
            self._stretch.end_s(self._planned_steps), self._stretch_ends, (self._stretch, self._planned_steps)
        )

    def _stretch_ends(self, planned: tuple[Stretch, int]) -> None:
        stretch, num_steps = planned
        if self._state is not State.STRETCH or stretch is not self._stretch or num_steps != self._planned_steps:
            self._heap.overtaken()
            return
        self.sync()
        self._state = State.BETWEEN
        answers = self.answers
        self._busy_s += stretch.busy_s(self._heap.now_s, num_steps - 1)
        self.num_steps += num_steps
        self.decode_tokens += num_steps * answers.lockstep.size
        self._ready_s = self._heap.now_s + self.gap_s
        answers.wrote(stretch, num_steps)
        answers.end_finished()
        self._gather()

    # --- steps with chunks ------------------------------------------------------------------------

    def _begin_step(self, grants: Sequence[Grant]) -> None:
        answers = self.answers
        start_s = self._start_s()
        chunks: Chunks = []
        num_tokens, num_pairs = 0, 0.0
        for grant in grants:
            if grant.reason is GrantReason.DECODE:
                continue
            sequence_id, granted = grant.sequence_id, grant.num_tokens
            request = answers.build(sequence_id)
            if request is None:
                request, before = self.prompts.build(sequence_id, granted, start_s)
            else:
                before = request.num_computed
            chunks.append((request, granted))
            num_tokens += granted
            num_pairs += granted * before + 0.5 * granted * (granted + 1)
        group = answers.lockstep
        context_tokens = group.context_tokens(0) if group.size else 0
        duration_s = self.latency.step_s(StepWork(num_tokens, num_pairs, len(chunks), group.size, context_tokens))
        _check_duration(duration_s, self)
        self._prefill_tokens += num_tokens
        self._state = State.STEP
        self._stretch = Stretch(start_s, duration_s / self._num_stages, 0.0, self.gap_s)
        self._planned_steps = 1
        if self._num_stages == 1:
            self._heap.at(start_s + duration_s, self._step_ends, chunks)
        else:
            self._enter_pipeline(start_s, duration_s / self._num_stages, chunks)

    def _step_ends(self, chunks: Chunks) -> None:
        self.sync()
        self._state = State.BETWEEN
        self._stage_done()
        self._hand_out(chunks)
        self._gather()

    def _stage_done(self) -> None:
        self._busy_s += self._stretch.first_s
        self.num_steps += 1
        self._ready_s = self._heap.now_s + self.gap_s

    def _hand_out(self, chunks: Chunks) -> None:
        answers = self.answers
        if size := answers.lockstep.size:
            self.decode_tokens += size
            answers.wrote(self._stretch, 1)
        for request, num_tokens in chunks:
            if request.in_step:
                answers.reread(request, num_tokens)
            else:
                self.prompts.apply(request, num_tokens)
        answers.end_finished()

    def _enter_pipeline(self, start_s: float, stage_s: float, chunks: Chunks) -> None:
        """Each stage takes the step when it is done with the one before, and the stage before is done with this."""
        free_s = self._stage_free_s
        end_s = start_s
        for stage in range(self._num_stages):
            end_s = free_s[stage] = max(end_s, free_s[stage]) + stage_s
        self._heap.at(free_s[0], self._stage_ends, None)
        self._heap.at(end_s, self._pipeline_ends, chunks)

    def _stage_ends(self, _: None) -> None:
        self.sync()
        self._stage_done()
        self._gather()

    def _pipeline_ends(self, chunks: Chunks) -> None:
        self.sync()
        state, self._state = self._state, State.BETWEEN
        for request, num_tokens in chunks:
            self.prompts.apply(request, num_tokens)
        self._state = state
        self.wake()

    # --- figures ----------------------------------------------------------------------------------

    def step_age_s(self) -> float:
        """How long the step that reads prompts has been running; 0 where none is."""
        return max(0.0, self._heap.now_s - self._stretch.start_s) if self._state is _STEP else 0.0

    def busy_until_now_s(self) -> float:
        """Seconds spent in steps so far, of pipelines in their first stage."""
        if self._state is State.STRETCH:
            return self._busy_s + self._stretch.busy_s(self._heap.now_s, self._steps_ended())
        if self._state is State.STEP:
            return self._busy_s + self._stretch.busy_s(self._heap.now_s, 0)
        return self._busy_s

    @property
    def is_empty(self) -> bool:
        """Nothing is held, promised or waited for."""
        view = self.room.view()
        books = (view.num_admitted, view.promised_blocks, view.lent_blocks, view.offer, view.prompt, view.starving)
        is_open = (
            self.prompts.num_open
            or self.prompts.unread_for()
            or self.incoming.num_open
            or self.answers.num_running
            or self.answers.num_preempted
            or self.moving_in
            or self.moving_out
            or self.arriving_blocks
        )
        is_used = self.used_blocks or is_open or any(books) or self.interface.flows
        return not is_used and self._state is State.IDLE

    def check_empty(self) -> None:
        """Raises InvariantBroken where it is not."""
        if not self.is_empty:
            raise InvariantBroken(f"a study ended, but not all of its work: {self}, room {self.room.view()}")

    def usage(self, end_s: float) -> WorkerUsage:
        """At the end of the study; what was given up may hold blocks a little longer."""
        counted_s = max(end_s, self._counted_s)
        return WorkerUsage(
            worker_id=self.worker_id,
            role=self.role,
            busy_s=self._busy_s,
            steps=self.num_steps,
            prefill_tokens=self._prefill_tokens,
            cached_tokens=self.prompts.cached_tokens,
            fetched_blocks=self.prompts.fetched_blocks,
            decode_tokens=self.decode_tokens,
            peak_blocks=self._peak_blocks,
            mean_blocks=self._block_seconds / counted_s if counted_s else 0.0,
            preemptions=self.answers.preemptions_total,
        )


def tells_moves(spec: StudySpec) -> bool:
    """Somebody looks at it."""
    return bool(spec.moves or spec.autoscale) or spec.conductor.policy == "freeness"


def _check_duration(duration_s: float, worker: Worker) -> None:
    if not duration_s > 0.0:
        raise ValueError(f"the latency model of {worker.worker_id} gives a step of {duration_s} s; it must be > 0")


def _whole(chunks: Sequence[Candidate], budget: StepBudget) -> list[Candidate]:
    """Those that the budget holds whole, begun ones first, by arrival, nobody passed; the first in any case."""
    chosen: list[Candidate] = []
    tokens_left = budget.max_tokens
    for chunk in sorted(chunks, key=lambda each: (not each.started, each.arrival, each.sequence_id)):
        tokens_left -= chunk.num_tokens
        if chosen and tokens_left < 0:
            break
        chosen.append(chunk)
    return chosen
