"""How far one operation on workers has come, the orders that its steps give, and how it is told. Pure."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.control_messages import (
    DrainOperation,
    DrainRequest,
    FlipOperation,
    MoveOperation,
    OperationStatus,
    RemoveOperation,
    RestartOperation,
    RestartWorkerRequest,
    SetRoleRequest,
    StartOperation,
    StartWorkerRequest,
    StopWorkerRequest,
    UndrainOperation,
)
from coordinator.operation_terms import Step, title

if TYPE_CHECKING:
    from contracts.control_messages import Operation, OperationState
    from contracts.ids import Incarnation, WorkerId
    from coordinator.operation_terms import CallBody, Kind, OperationLimits, Sight, SlotSeen, WorkerSeen


@dataclass(slots=True)
class Run:
    """One operation."""

    operation_id: int
    operation: Operation
    by: str
    begun_s: float
    #: Those whose turn has not come.
    waiting: deque[WorkerId]
    num_workers: int
    state: OperationState = "running"
    text: str = ""
    # Of the worker whose turn it is.
    worker_id: WorkerId | None = None
    steps: deque[Step] = field(default_factory=deque[Step])
    #: The life that is drained, given a role or ended; None: there was none.
    life: Incarnation | None = None
    #: What of it stays there while it drains.
    keeps: Kind | None = None
    step_begun_s: float = 0.0
    #: Counts the steps.
    step_number: int = 0
    #: The call in flight and the step that it was made for; when the last one was made, and whether one of this step
    #: was answered well.
    call_id: int | None = None
    call_step: int = 0
    called_s: float = -math.inf
    is_done: bool = False
    problem: str = ""
    #: A drain was asked for, and not taken back.
    is_asked: bool = False
    empty_since_s: float | None = None
    #: How it will have ended, once what it did is taken back.
    ends_as: tuple[OperationState, str] | None = None

    @property
    def step(self) -> Step | None:
        return self.steps[0] if self.steps else None

    def next_step(self, now_s: float) -> None:
        self.steps.popleft()
        self.begin_step(now_s)

    def begin_step(self, now_s: float) -> None:
        self.step_number += 1
        self.step_begun_s, self.called_s, self.is_done, self.problem = now_s, -math.inf, False, ""
        self.empty_since_s = None

    def answered(self, problem: str | None) -> None:
        """The call in flight was."""
        self.call_id = None
        if self.call_step == self.step_number:
            self.problem = problem or ""
            self.is_done = self.is_done or problem is None

    @property
    def so_far(self) -> str:
        """How many workers of several are done."""
        if self.num_workers == 1:
            return ""
        return f" ({self.num_workers - len(self.waiting) - 1} of {self.num_workers} done)"

    def status(self, now_s: float) -> OperationStatus:
        return OperationStatus(
            operation_id=self.operation_id,
            operation=self.operation,
            state=self.state,
            text=self.text,
            age_s=now_s - self.begun_s,
            by=self.by,
        )


def order(
    run: Run, worker: WorkerSeen | None, slot: SlotSeen | None, limits: OperationLimits, now_s: float
) -> tuple[str, CallBody] | None:
    """Address and body of the step's order where it is due: until it is answered, and a drain's again and again."""
    if run.call_id is not None or now_s - run.called_s < limits.retry_s:
        return None
    if run.step in (Step.RENEW, Step.START, Step.STOP):
        # Answered well, and still not so: something came between. All of these may be repeated.
        is_fresh = run.is_done and now_s - run.called_s < limits.renew_s
        return None if slot is None or is_fresh else (slot.address, _agent_order(run, slot))
    if worker is None or worker.incarnation != run.life:
        return None
    body = _worker_order(run, worker, limits, now_s)
    return None if body is None else (worker.address, body)


def _worker_order(run: Run, worker: WorkerSeen, limits: OperationLimits, now_s: float) -> CallBody | None:
    lasts = isinstance(run.operation, DrainOperation)
    why = f"operation {run.operation_id}: {title(run.operation)}"
    is_fresh = run.is_done and now_s - run.called_s < limits.renew_s
    match run.step, run.operation:
        case Step.OPEN, _:
            # Answered well and still draining: another word came between.
            return None if is_fresh else DrainRequest(target=worker.incarnation, draining=False, reason=why)
        case Step.MIX | Step.SET_ROLE, FlipOperation(role=role):
            return SetRoleRequest(target=worker.incarnation, role=role)
        case Step.DRAIN, _:
            if is_fresh or (run.is_done and worker.draining and lasts):
                return None
            for_s = None if lasts else limits.drain_lasts_s
            return DrainRequest(target=worker.incarnation, draining=True, reason=why, for_s=for_s)
        case _:
            return None


def _agent_order(run: Run, slot: SlotSeen) -> CallBody:
    operation = run.operation
    if run.step is Step.RENEW:
        python = operation.python if isinstance(operation, RestartOperation) else ""
        life = slot.incarnation if run.life is None else run.life
        return RestartWorkerRequest(target=slot.agent, worker_id=slot.worker_id, life=life, python=python)
    if run.step is Step.START:
        role = operation.role if isinstance(operation, StartOperation | MoveOperation) else None
        return StartWorkerRequest(target=slot.agent, worker_id=slot.worker_id, role=role)
    return StopWorkerRequest(target=slot.agent, worker_id=slot.worker_id, reason=f"operation {run.operation_id}")


def why_not_up(run: Run, slot: SlotSeen | None) -> str:
    if slot is None:
        return "its node agent is not heard"
    return run.problem or f"it is not up: {slot.state.replace('_', ' ')} {slot.problem}".rstrip()


def wording(run: Run, step: Step, worker: WorkerSeen | None, sight: Sight, missed: str | None) -> str:
    """What it waits for; `missed`: why its worker cannot be spared now."""
    waits_for = ""
    if step is Step.DRAIN and worker is not None:
        waits_for = f": {worker.left(run.keeps)}" if worker.draining else ": it does not know yet"
    elif step is Step.WAIT:
        waits_for = f": {missed}"
    elif step in (Step.RENEW, Step.START, Step.STOP) and run.worker_id not in sight.slots:
        waits_for = ": its node agent is not heard"
    problem = f" ({run.problem})" if run.problem else ""
    early = f", for {run.ends_as[1]}" if run.ends_as is not None else ""
    return f"{run.worker_id} {step.value}{early}{waits_for}{problem}{run.so_far}"


def outcome(run: Run) -> str:
    """Of one that is done."""
    match run.operation:
        case DrainOperation():
            return "nothing is left there"
        case UndrainOperation():
            return "it takes requests again"
        case FlipOperation(role="mixed"):
            return "it is a mixed worker now; nothing had to leave"
        case FlipOperation(role=role):
            stayed = "" if run.keeps is None else f"; its {run.keeps} stayed"
            return f"it is a {role} worker now{stayed}"
        case RestartOperation():
            return f"{run.num_workers} restarted"
        case StartOperation():
            return "it is up"
        case RemoveOperation():
            return "it has stopped"
        case MoveOperation(to=to):
            return f"it has stopped, and {to} is up in its place"
