"""What scaling is set to, and what it acts through."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from coordinator.policy.lending import LendRules

if TYPE_CHECKING:
    from contracts.control_messages import Operation, OperationStatus, WorkerSlot
    from coordinator.pool_views import ScaledPool

Mode = Literal["off", "propose", "apply"]


class Operator(Protocol):
    """Carries operations out: `coordinator.operations_shell.OperationsShell`."""

    def begin(self, operation: Operation, *, by: str = "operator") -> int:
        """Its number. Raises NotFound, BadRequest and NoCapacity."""
        ...

    def statuses(self) -> tuple[OperationStatus, ...]:
        """Those that run, and the last that ended."""
        ...

    def slots(self) -> tuple[WorkerSlot, ...]:
        """What the node agents run, or could."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AutoscaleSettings:
    mode: Mode = "apply"
    interval_s: float = 2.0
    #: All of the cluster, also those of a fixed size.
    pools: tuple[ScaledPool, ...] = ()
    #: Until one was seen.
    start_s: float = 20.0
    flip_s: float = 5.0
    #: Of the classes, the shortest; None: no targets.
    tpot_s: float | None = None
    lend_mode: Mode = "off"
    lend_rules: LendRules = field(default_factory=LendRules)

    @property
    def is_on(self) -> bool:
        return self.lend_mode != "off" or (self.mode != "off" and any(pool.is_scaled for pool in self.pools))
