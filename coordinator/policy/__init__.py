"""Pure decisions: no clock, no I/O, no logging."""

from coordinator.policy.dispatch import DispatchLimits, WorkerView, dispatch

__all__ = ["DispatchLimits", "WorkerView", "dispatch"]
