"""What the production autoscaler acts through in a study: operations on workers, as the study's lifecycle runs them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.control_messages import (
    FlipOperation,
    OperationStatus,
    RemoveOperation,
    StartOperation,
    WorkerSlot,
)
from contracts.errors import BadRequest, InvariantBroken
from contracts.ids import Incarnation, WorkerId
from simulator.heap.lifecycle import Phase

if TYPE_CHECKING:
    from contracts.control_messages import Operation, SlotState
    from coordinator.scaling_settings import AutoscaleSettings
    from simulator.heap.events import EventHeap
    from simulator.heap.lifecycle import Lifecycle, Member

_STATES: dict[Phase, SlotState] = {Phase.ABSENT: "absent", Phase.STARTING: "starting"}


class HeapClock:
    """`contracts.clock.Clock` as far as it is read: nobody waits in a study, the heap calls."""

    def __init__(self, heap: EventHeap) -> None:
        self._heap = heap

    def now_s(self) -> float:
        return self._heap.now_s

    def wall_s(self) -> float:
        return self._heap.now_s

    async def sleep(self, delay_s: float) -> None:
        raise InvariantBroken(f"somebody sleeps {delay_s} s in a study of the event heap")


class StudyOperator:
    """Implements `coordinator.scaling_settings.Operator`. Starts and changes of role take just as long as the settings
    expect them to."""

    def __init__(self, heap: EventHeap, lifecycle: Lifecycle, settings: AutoscaleSettings) -> None:
        self._heap = heap
        self._lifecycle = lifecycle
        self._settings = settings
        self._num_begun = 0
        #: When which operation was begun.
        self.begun: list[tuple[float, Operation]] = []

    def begin(self, operation: Operation, *, by: str = "operator") -> int:
        lifecycle = self._lifecycle
        match operation:
            case StartOperation():
                lifecycle.start(operation.worker_id, self._settings.start_s)
            case RemoveOperation():
                lifecycle.stop(operation.worker_id)
            case FlipOperation():
                lifecycle.flip(operation.worker_id, operation.role, self._settings.flip_s)
            case _:
                raise BadRequest(f"{by} wants an operation that studies do not have: {operation}")
        self._num_begun += 1
        self.begun.append((self._heap.now_s, operation))
        return self._num_begun

    def statuses(self) -> tuple[OperationStatus, ...]:
        found: list[OperationStatus] = []
        for number, (name, member) in enumerate(self._lifecycle.members.items()):
            operation = _operation_on(WorkerId(name), member)
            if operation is not None:
                age_s = self._heap.now_s - member.asked_s
                found.append(
                    OperationStatus(
                        operation_id=-1 - number, operation=operation, state="running", text="", age_s=age_s
                    )
                )
        return tuple(found)

    def slots(self) -> tuple[WorkerSlot, ...]:
        return tuple(
            WorkerSlot(
                worker_id=WorkerId(name),
                pool=name.rpartition("-")[0],
                role=member.first_role,
                state=_STATES.get(member.phase, "ready"),
                incarnation=Incarnation(1),
                age_s=None if member.phase is Phase.ABSENT else self._heap.now_s - member.costs_since_s,
            )
            for name, member in self._lifecycle.members.items()
        )


def _operation_on(worker_id: WorkerId, member: Member) -> Operation | None:
    match member.phase:
        case Phase.STARTING:
            return StartOperation(worker_id=worker_id)
        case Phase.DRAINING | Phase.CHANGING if member.next_role is not None:
            return FlipOperation(worker_id=worker_id, role=member.next_role)
        case Phase.DRAINING:
            return RemoveOperation(worker_id=worker_id)
        case _:
            return None
