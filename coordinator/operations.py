"""Operations on workers: drain, take back, flip, restart, start, remove. A machine without I/O.

Each operation takes its workers one after the other through a few steps (`coordinator.operation_terms.Step`), and every
step is judged by what is seen of the worker and repeats its order until that is so: lost orders, lost answers and
workers that end meanwhile need no cases of their own. Every step has a deadline, every worker at most one operation.
An operation that fails, or is cancelled, takes its drain back. A drain that is part of something larger is asked for
again and again, and ends by itself when the coordinator is gone.
"""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

import msgspec

from contracts.control_messages import (
    DrainOperation,
    FlipOperation,
    MoveOperation,
    OperationStatus,
    RemoveOperation,
    RestartOperation,
    UndrainOperation,
)
from contracts.errors import NoCapacity, NotFound
from contracts.failpoints import RarePath
from coordinator.operation_runs import Run, order, outcome, why_not_up, wording
from coordinator.operation_terms import (
    LEAVING,
    Answered,
    Call,
    Looked,
    OperationLimits,
    Report,
    Sight,
    Step,
    check,
    kept_by,
    steps_for,
    title,
    who_would_be_missed,
    workers_of,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.control_messages import Operation, OperationState
    from contracts.ids import WorkerId
    from coordinator.operation_terms import Event, Instruction, SlotSeen, WorkerSeen

__all__ = ["Operations"]

_TAKEN_BACK = RarePath("coordinator.drain_taken_back", "an operation ended early, and its worker takes requests again")
_MOVED = RarePath("coordinator.worker_moved", "another worker is up in the place of one that has stopped")
_LIFE_ENDED = RarePath("coordinator.operated_life_ended", "a worker's life ended while an operation had it")


class Operations:
    """Not thread-safe; no I/O; reads no clock."""

    def __init__(self, limits: OperationLimits | None = None) -> None:
        self._limits = limits or OperationLimits()
        self._runs: dict[int, Run] = {}
        #: Those that ended last, oldest first.
        self._ended: deque[tuple[Run, float]] = deque(maxlen=self._limits.max_remembered)
        self._num_begun = 0
        self._num_calls = 0

    def __repr__(self) -> str:
        running = ", ".join(f"{run.operation_id}: {title(run.operation)}, {run.text}" for run in self._runs.values())
        return f"<Operations [{running}]>"

    @property
    def num_running(self) -> int:
        return len(self._runs)

    @property
    def leaving(self) -> frozenset[WorkerId]:
        """The workers that an operation keeps new requests from."""
        return frozenset(
            run.worker_id for run in self._runs.values() if run.worker_id is not None and run.step in LEAVING
        )

    @property
    def keep_answers(self) -> frozenset[WorkerId]:
        """Of these, the ones whose answers stay there: only prompts have to leave."""
        return frozenset(
            run.worker_id
            for run in self._runs.values()
            if run.worker_id is not None and run.step in LEAVING and run.keeps == "answers"
        )

    @property
    def busy(self) -> Mapping[WorkerId, int]:
        """Which operation has which worker."""
        busy: dict[WorkerId, int] = {}
        for run in self._runs.values():
            for worker_id in (run.worker_id, *run.waiting):
                if worker_id is not None:
                    busy[worker_id] = run.operation_id
        return busy

    def statuses(self, now_s: float) -> tuple[OperationStatus, ...]:
        """Those that ended last and those that run, oldest first. Of an ended one the age is that at its end."""
        ended = [run.status(at_s) for run, at_s in self._ended]
        return (*ended, *(run.status(now_s) for run in self._runs.values()))

    def begin(self, operation: Operation, sight: Sight, now_s: float, *, by: str = "operator") -> int:
        """Its number; what it does begins with the next look. Raises NotFound, BadRequest and NoCapacity, as
        `contracts.control_messages.OperateRequest` says."""
        busy = dict(self.busy)
        drain = self._drain_of(operation, busy)
        if drain is not None:
            del busy[drain]
        check(operation, sight, busy, self.leaving)
        if len(self._runs) >= self._limits.max_running and drain is None:
            raise NoCapacity(f"{len(self._runs)} operations run, no more do at once", retry_after_s=1.0)
        if drain is not None:
            self._end(
                self._runs[self.busy[drain]], "cancelled", f"operation {self._num_begun + 1} takes it back", now_s
            )
        if isinstance(operation, MoveOperation) and operation.role is None:
            role = sight.workers[operation.worker_id].role
            operation = msgspec.structs.replace(operation, role=None if role == "store" else role)
        self._num_begun += 1
        waiting = deque(workers_of(operation, sight))
        run = Run(self._num_begun, operation, by, now_s, waiting, len(waiting))
        self._runs[run.operation_id] = run
        return run.operation_id

    def cancel(self, operation_id: int, now_s: float) -> None:
        """Its worker takes requests again; a process that was told to end, or to start, does so all the same. Nothing
        happens to one that has ended. Raises NotFound."""
        run = self._runs.get(operation_id)
        if run is None:
            if any(ended.operation_id == operation_id for ended, _ in self._ended):
                return
            raise NotFound(f"there is no operation {operation_id}", param="cancel")
        self._stop(run, "cancelled", "it was cancelled", now_s)

    def handle(self, event: Event, now_s: float) -> list[Instruction]:
        match event:
            case Answered(call_id, problem):
                for run in self._runs.values():
                    if run.call_id == call_id:
                        run.answered(problem)
                return []
            case Looked(sight):
                told: list[Instruction] = []
                for run in list(self._runs.values()):
                    told += self._advance(run, sight, now_s)
                return told

    # --- one operation ----------------------------------------------------------------------------

    def _advance(self, run: Run, sight: Sight, now_s: float) -> list[Instruction]:
        told: list[Instruction] = []
        while run.state == "running":
            step = run.step
            if step is None:
                if not self._next_worker(run, sight, now_s):
                    break
                continue
            worker = None if run.worker_id is None else sight.workers.get(run.worker_id)
            if self._is_over(run, step, worker, sight, now_s):
                run.next_step(now_s)
                continue
            if run.state != "running" or run.step is not step:
                # It failed, or is taken back.
                continue
            told += self._orders(run, worker, sight, now_s)
            missed = self._missed(run, sight) if step is Step.WAIT else None
            run.text = wording(run, step, worker, sight, missed)
            break
        if run.state != "running":
            told.append(Report(f"operation {run.operation_id} ({title(run.operation)}) {run.state}: {run.text}"))
        return told

    def _next_worker(self, run: Run, sight: Sight, now_s: float) -> bool:
        """False: there is none."""
        if run.ends_as is not None:
            self._end(run, *run.ends_as, now_s)
            return False
        if not run.waiting:
            if isinstance(run.operation, MoveOperation):
                _MOVED.reached()
            self._end(run, "done", outcome(run), now_s)
            return False
        worker_id = run.worker_id = run.waiting.popleft()
        worker, slot = sight.workers.get(worker_id), sight.slots.get(worker_id)
        life = worker or slot
        run.life = None if life is None else life.incarnation
        role = "mixed" if life is None else life.role
        run.steps = deque(steps_for(run.operation, worker_id, role, draining=worker is not None and worker.draining))
        run.keeps = kept_by(run.operation, role)
        run.is_asked = False
        run.begin_step(now_s)
        return True

    def _is_over(self, run: Run, step: Step, worker: WorkerSeen | None, sight: Sight, now_s: float) -> bool:
        """Whether the next step may begin. Ends the operation, or begins to take it back, where this one has failed."""
        is_same = worker is not None and worker.incarnation == run.life
        slot = None if run.worker_id is None else sight.slots.get(run.worker_id)
        match step:
            case Step.WAIT:
                missed = None if run.worker_id is None else self._missed(run, sight)
                if missed is None:
                    return True
                return self._late(run, self._limits.safe_s, missed, now_s)
            case Step.DRAIN:
                return self._is_drained(run, worker if is_same else None, now_s)
            case Step.MIX | Step.SET_ROLE:
                if worker is None or not is_same:
                    return self._fail(run, "its life ended before it had the role", now_s)
                if isinstance(run.operation, FlipOperation) and worker.role == run.operation.role:
                    return True
                return self._late(run, self._limits.role_s, run.problem or "it did not take the role", now_s)
            case Step.OPEN:
                if worker is None or not is_same:
                    run.is_asked = False
                    return True
                if run.is_done and not worker.draining:
                    run.is_asked = False
                    return True
                return self._late(run, self._limits.open_s, run.problem or "it still drains", now_s)
            case Step.RENEW:
                if worker is not None and (run.life is None or worker.incarnation > run.life):
                    return True
                limit_s = self._limits.end_s + self._limits.start_s
                return self._given_up(run, slot, now_s) or self._late(run, limit_s, why_not_up(run, slot), now_s)
            case Step.START:
                if worker is not None:
                    return True
                limit_s = self._limits.start_s
                return self._given_up(run, slot, now_s) or self._late(run, limit_s, why_not_up(run, slot), now_s)
            case Step.STOP:
                if worker is None and (slot is None or slot.state in ("stopped", "absent", "given_up")):
                    return True
                return self._late(run, self._limits.end_s, run.problem or "its process did not end", now_s)

    def _is_drained(self, run: Run, worker: WorkerSeen | None, now_s: float) -> bool:
        """As `_is_over`; `worker` is the life that drains, None where it is over."""
        operation = run.operation
        if worker is None:
            _LIFE_ENDED.reached()
            if (
                isinstance(operation, RestartOperation | RemoveOperation | MoveOperation)
                or run.empty_since_s is not None
            ):
                return True
            return self._fail(run, f"its life ended before it was drained ({run.text})", now_s)
        if not worker.is_drained(run.keeps):
            run.empty_since_s = None
        elif run.empty_since_s is None:
            run.empty_since_s = now_s
        if run.empty_since_s is not None and now_s - run.empty_since_s >= self._limits.settle_s:
            return True
        within_s = self._drain_limit_s(operation)
        if now_s - run.step_begun_s <= within_s:
            return False
        if isinstance(operation, RemoveOperation) and operation.within_s is not None:
            return True
        if isinstance(operation, DrainOperation):
            # Whoever asked said that the worker dies now: nothing is to come back to it.
            self._end(run, "failed", f"after {within_s:g} s there are {worker.left(run.keeps)}", now_s)
            return False
        return self._fail(run, f"not drained after {within_s:g} s: there are {worker.left(run.keeps)}", now_s)

    def _drain_limit_s(self, operation: Operation) -> float:
        if isinstance(operation, DrainOperation):
            return math.inf if operation.within_s is None else operation.within_s
        if isinstance(operation, RemoveOperation) and operation.within_s is not None:
            return operation.within_s
        return self._limits.drain_s

    def _missed(self, run: Run, sight: Sight) -> str | None:
        if run.worker_id is None or run.worker_id not in sight.workers:
            return None
        return who_would_be_missed(run.worker_id, sight, self.leaving)

    # --- ends -------------------------------------------------------------------------------------

    def _late(self, run: Run, limit_s: float, why: str, now_s: float) -> bool:
        """False; fails the operation where the step has had its time."""
        if now_s - run.step_begun_s > limit_s:
            return self._fail(run, f"{why} (within {limit_s:g} s)", now_s)
        return False

    def _given_up(self, run: Run, slot: SlotSeen | None, now_s: float) -> bool:
        """False; fails the operation where the node agent has given the worker up, after it was asked."""
        if run.is_done and slot is not None and slot.state == "given_up" and slot.incarnation > (run.life or 0):
            return self._fail(run, f"given up: {slot.problem}", now_s)
        return False

    def _fail(self, run: Run, why: str, now_s: float) -> bool:
        """False."""
        if run.state == "running":
            where = "" if run.worker_id is None else f"{run.worker_id}: "
            self._stop(run, "failed", f"{where}{why}{run.so_far}", now_s)
        return False

    def _stop(self, run: Run, state: OperationState, why: str, now_s: float) -> None:
        """Ends it, after its drain has been taken back where there is one."""
        run.waiting.clear()
        if run.step is Step.OPEN:
            if now_s - run.step_begun_s > self._limits.open_s:
                self._end(run, *(run.ends_as or (state, why)), now_s)
            elif run.ends_as is None:
                run.ends_as = (state, why)
            return
        if run.is_asked and run.step in (Step.DRAIN, Step.SET_ROLE):
            _TAKEN_BACK.reached()
            run.ends_as = (state, why)
            run.steps = deque([Step.OPEN])
            run.begin_step(now_s)
            return
        self._end(run, state, why, now_s)

    def _end(self, run: Run, state: OperationState, text: str, now_s: float) -> None:
        run.state, run.text = state, text
        run.steps.clear()
        del self._runs[run.operation_id]
        self._ended.append((run, now_s))

    def _drain_of(self, operation: Operation, busy: Mapping[WorkerId, int]) -> WorkerId | None:
        """The worker whose running drain this operation takes back; None: there is no such."""
        if not isinstance(operation, UndrainOperation) or operation.worker_id not in busy:
            return None
        run = self._runs[busy[operation.worker_id]]
        return operation.worker_id if isinstance(run.operation, DrainOperation) else None

    # --- orders -----------------------------------------------------------------------------------

    def _orders(self, run: Run, worker: WorkerSeen | None, sight: Sight, now_s: float) -> list[Instruction]:
        slot = None if run.worker_id is None else sight.slots.get(run.worker_id)
        due = order(run, worker, slot, self._limits, now_s)
        if due is None:
            return []
        self._num_calls += 1
        run.call_id, run.call_step, run.called_s = self._num_calls, run.step_number, now_s
        run.is_asked = run.is_asked or run.step is Step.DRAIN
        return [Call(self._num_calls, *due)]
