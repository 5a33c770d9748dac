"""What joins scaling to a coordinator's shell: the same live and on virtual time."""

from __future__ import annotations

from typing import TYPE_CHECKING

from coordinator.autoscaler import Autoscaler
from coordinator.usage_rows import usage_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.control_messages import Operation, OperationStatus, WorkerSlot
    from coordinator.holding import Room
    from coordinator.operations_shell import OperationsShell
    from coordinator.policy.virtual_usage import UsageView
    from coordinator.scaling_settings import AutoscaleSettings
    from coordinator.shell import CoordinatorShell


def autoscaler_of(
    shell: CoordinatorShell,
    settings: AutoscaleSettings,
    clock: Clock,
    log: Callable[[str], None],
    *,
    room: Room | None = None,
) -> Autoscaler | None:
    """Of this coordinator, which hears of decisions from it where scaling is on. None where the coordinator gives no
    orders."""
    operations = shell.operations
    if operations is None:
        return None

    def usage() -> UsageView:
        now_s = clock.now_s()
        return usage_of(shell.conductor, shell.membership.standing(now_s), shell.closed(), {}, now_s)

    operator = ShellOperator(operations, clock)
    scaler = Autoscaler(
        clock, settings, shell.conductor, operator, usage=usage, log=log, room=room, starts=operations.starts
    )
    if settings.is_on:
        shell.scaler = shell.figures.scaler = scaler
    return scaler


class ShellOperator:
    """A `coordinator.scaling_settings.Operator`."""

    def __init__(self, shell: OperationsShell, clock: Clock) -> None:
        self._shell = shell
        self._clock = clock

    def begin(self, operation: Operation, *, by: str = "operator") -> int:
        return self._shell.begin(operation, by=by)

    def statuses(self) -> tuple[OperationStatus, ...]:
        return self._shell.machine.statuses(self._clock.now_s())

    def slots(self) -> tuple[WorkerSlot, ...]:
        return self._shell.agents.told(self._clock.now_s())
