"""A made-up cluster on virtual time whose pools follow the load: the real autoscaler over the real conductor; workers,
node agent and operations are a few lines each. A prompt token takes 1 ms to read, an answer has its blocks for
`ANSWER_S`; starts, flips and drains take their time."""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from contracts.control_messages import (
    FlipOperation,
    MoveOperation,
    OperationStatus,
    RemoveOperation,
    RestartOperation,
    StartOperation,
    WorkerSlot,
)
from contracts.errors import BadRequest
from contracts.ids import Incarnation, WorkerId
from contracts.messages import PriorityUse, Rejection, WorkerLoad
from coordinator.autoscaler import Autoscaler
from coordinator.decision import Refused
from coordinator.membership import ALL_UP
from coordinator.usage_rows import usage_of
from simulator import VirtualClock
from tests.support.conductors import conductor_of, info_of, item_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.control_messages import Operation, SlotState
    from contracts.messages import Role
    from coordinator.holding import Room
    from coordinator.policy.virtual_usage import UsageView
    from coordinator.scaling_settings import AutoscaleSettings
    from coordinator.start_knowledge import StartKnowledge

STEP_S = 0.25
PROMPT_TOKENS = 500
ANSWER_S = 8.0
ANSWER_BLOCKS = 40
WORKER_BLOCKS = 200
START_S = 6.0
FLIP_S = 2.0
SLOTS = 5


@dataclass(slots=True)
class Worker:
    role: Role
    #: Seconds of reading that it has.
    prompts_s: deque[float] = field(default_factory=deque[float])
    #: When its answers end, and answers that wait for blocks.
    answers: list[float] = field(default_factory=list[float])
    waiting: int = 0
    leaving: bool = False

    @property
    def is_idle(self) -> bool:
        return not (self.prompts_s or self.answers or self.waiting)


@dataclass(slots=True)
class _Run:
    operation: Operation
    begun_s: float
    done_s: float | None = None


class ElasticCluster:
    """Use within `simulator.run`: `async with cluster.scaler: await cluster.serve(...)`."""

    def __init__(
        self,
        settings: AutoscaleSettings,
        initial: dict[str, int],
        room: Room | None = None,
        slots: int = SLOTS,
        starts: StartKnowledge | None = None,
        /,
        *,
        start_s: float = START_S,
        answer_s: float = ANSWER_S,
    ) -> None:
        """`slots`: of each pool; `starts`: as `Autoscaler`."""
        self.clock = VirtualClock()
        self.settings = settings
        self.start_s = start_s
        self.answer_s = answer_s
        self._num_slots = slots
        self.conductor = conductor_of([])
        self.workers: dict[WorkerId, Worker] = {}
        self.told: list[str] = []
        #: What was begun, with the time.
        self.begun: list[tuple[float, Operation]] = []
        self.runs: list[_Run] = []
        #: Requests that found nobody, and when they came.
        self.unplaced: deque[float] = deque()
        #: By request: from its coming to its first token.
        self.waits_s: list[float] = []
        self.reworded: list[str] = []
        #: Worker-seconds so far.
        self.worker_s = 0.0
        self._queues: dict[WorkerId, deque[float]] = {}
        self.scaler = Autoscaler(
            self.clock,
            settings,
            self.conductor,
            self,
            usage=self._usage,
            log=self.told.append,
            room=room,
            starts=starts,
        )
        for pool in settings.pools:
            for number in range(initial.get(pool.name, 0)):
                self._add(WorkerId(f"{pool.name}-{number}"), pool.role)
        self._num_items = 0

    # --- what the autoscaler acts through ---------------------------------------------------------

    def begin(self, operation: Operation, *, by: str = "operator") -> int:
        if any(run.done_s is None and _worker_of(run.operation) == _worker_of(operation) for run in self.runs):
            raise BadRequest(f"another operation has {_worker_of(operation)}")
        self.begun.append((self.clock.now_s(), operation))
        self.runs.append(_Run(operation, self.clock.now_s()))
        worker = self.workers.get(_worker_of(operation))
        if isinstance(operation, FlipOperation | RemoveOperation):
            assert worker is not None, operation
            worker.leaving = True
        return len(self.runs) - 1

    def statuses(self) -> tuple[OperationStatus, ...]:
        now_s = self.clock.now_s()
        return tuple(
            OperationStatus(
                operation_id=number,
                operation=run.operation,
                state="running" if run.done_s is None else "done",
                text="",
                age_s=(now_s if run.done_s is None else run.done_s) - run.begun_s,
            )
            for number, run in enumerate(self.runs)
        )

    def slots(self) -> tuple[WorkerSlot, ...]:
        return tuple(
            self._slot(pool.name, pool.role, n) for pool in self.settings.pools for n in range(self._num_slots)
        )

    def _slot(self, pool: str, role: Role, number: int) -> WorkerSlot:
        worker_id = WorkerId(f"{pool}-{number}")
        starting = next((run for run in self.runs if run.done_s is None and _starts(run.operation, worker_id)), None)
        state: SlotState = "ready" if worker_id in self.workers else "starting" if starting else "absent"
        return WorkerSlot(
            worker_id=worker_id,
            pool=pool,
            role=role,
            state=state,
            incarnation=Incarnation(1),
            start_s=self.start_s if worker_id in self.workers else None,
            age_s=None if starting is None else self.clock.now_s() - starting.begun_s,
        )

    # --- time ---------------------------------------------------------------------------------------

    async def serve(self, seconds: float, rate_rps: Callable[[float], float]) -> None:
        """Requests come evenly at `rate_rps` of the time since the begin of this call."""
        begin_s, due = self.clock.now_s(), 0.0
        while (now_s := self.clock.now_s()) < begin_s + seconds:
            due += rate_rps(now_s - begin_s) * STEP_S
            self._work(now_s)
            for _ in range(int(due)):
                due -= 1.0
                self._come(now_s, now_s)
            for _ in range(len(self.unplaced)):
                self._come(now_s, self.unplaced.popleft())
            await asyncio.sleep(STEP_S)

    def count(self, role: Role) -> int:
        return sum(worker.role == role and not worker.leaving for worker in self.workers.values())

    def _come(self, now_s: float, since_s: float) -> None:
        self._num_items += 1
        item = item_of(PROMPT_TOKENS, name=f"r{self._num_items}")
        view = self.conductor.fleet.view()
        usable = np.array([not self.workers[info.worker_id].leaving for info in view.infos], np.bool_)
        decision = self.conductor.decide(item, now_s, usable)
        self.scaler.decided(item, decision, now_s)
        if isinstance(decision, Refused):
            verdict = self.conductor.in_words(item, decision, now_s)
            assert isinstance(verdict, Rejection)
            self.reworded.append(self.scaler.reworded(decision, verdict).reason)
            self.unplaced.append(since_s)
            return
        reader = view.infos[decision.prefill_row].worker_id
        self.workers[reader].prompts_s.append(PROMPT_TOKENS / 1000)
        self._queues.setdefault(reader, deque()).append(since_s)

    def _work(self, now_s: float) -> None:
        for run in self.runs:
            if run.done_s is None:
                self._advance(run, now_s)
        for worker_id, worker in list(self.workers.items()):
            self.worker_s += STEP_S
            left_s = STEP_S
            while worker.prompts_s and left_s > 0:
                taken_s = min(left_s, worker.prompts_s[0])
                worker.prompts_s[0] -= taken_s
                left_s -= taken_s
                if worker.prompts_s[0] <= 1e-9:
                    worker.prompts_s.popleft()
                    self._write(now_s)
                    self.waits_s.append(now_s - self._queues[worker_id].popleft())
            worker.answers = [end_s for end_s in worker.answers if end_s > now_s]
            while worker.waiting and (len(worker.answers) + 1) * ANSWER_BLOCKS <= WORKER_BLOCKS:
                worker.waiting -= 1
                worker.answers.append(now_s + self.answer_s)
            self._report(worker_id, worker, now_s)

    def _write(self, now_s: float) -> None:
        """The answer goes to the emptiest writer."""
        writers = [worker for worker in self.workers.values() if worker.role != "prefill" and not worker.leaving]
        if writers:
            min(writers, key=lambda worker: len(worker.answers) + worker.waiting).waiting += 1

    def _report(self, worker_id: WorkerId, worker: Worker, now_s: float) -> None:
        held = len(worker.answers) * ANSWER_BLOCKS
        load = WorkerLoad(
            pending_prompt_tokens=round(sum(worker.prompts_s) * 1000),
            waiting_requests=max(0, len(worker.prompts_s) - 1),
            free_blocks=WORKER_BLOCKS - held,
            owned_blocks=held,
            running_decodes=len(worker.answers),
            queued_demand_blocks=worker.waiting * ANSWER_BLOCKS,
            head_demand_blocks=ANSWER_BLOCKS if worker.waiting else 0,
            priorities=(PriorityUse(0, len(worker.answers), held),) if worker.answers else (),
            open_requests=len(worker.prompts_s) + len(worker.answers) + worker.waiting,
            draining=worker.leaving,
        )
        self.conductor.report(worker_id, load, now_s)

    def _advance(self, run: _Run, now_s: float) -> None:
        operation = run.operation
        worker_id = _worker_of(operation)
        worker = self.workers.get(worker_id)
        age_s = now_s - run.begun_s
        if isinstance(operation, StartOperation) and age_s >= self.start_s:
            pool = next(pool for pool in self.settings.pools if worker_id.startswith(pool.name))
            self._add(worker_id, operation.role or pool.role)
            run.done_s = now_s
        elif isinstance(operation, MoveOperation) and worker is not None and age_s >= self.start_s:
            if operation.to not in self.workers:
                self._add(operation.to, worker.role)
            worker.leaving = True
            if worker.is_idle:
                self.conductor.remove(worker_id)
                del self.workers[worker_id]
                run.done_s = now_s
        elif isinstance(operation, RemoveOperation) and worker is not None and worker.is_idle:
            self.conductor.remove(worker_id)
            del self.workers[worker_id]
            run.done_s = now_s
        elif isinstance(operation, FlipOperation) and worker is not None and worker.is_idle and age_s >= FLIP_S:
            self.conductor.remove(worker_id)
            self._add(worker_id, operation.role)
            run.done_s = now_s

    def _add(self, worker_id: WorkerId, role: Role) -> None:
        self.workers[worker_id] = Worker(role)
        info = info_of(worker_id, role=role, blocks=WORKER_BLOCKS)
        self.conductor.add(info, self.clock.now_s())
        self._report(worker_id, self.workers[worker_id], self.clock.now_s())

    def _usage(self) -> UsageView:
        leaving = frozenset(worker_id for worker_id, worker in self.workers.items() if worker.leaving)
        return usage_of(self.conductor, ALL_UP, leaving, {}, self.clock.now_s())


def _worker_of(operation: Operation) -> WorkerId:
    assert not isinstance(operation, RestartOperation), "nobody restarts here"
    return operation.worker_id


def _starts(operation: Operation, worker_id: WorkerId) -> bool:
    if isinstance(operation, MoveOperation):
        return operation.to == worker_id
    return isinstance(operation, StartOperation) and operation.worker_id == worker_id
