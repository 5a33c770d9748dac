"""Pure decisions: no clock, no I/O, no logging."""

from coordinator.policy.dispatch import Chosen, DispatchLimits, Refused, choose, dispatch
from coordinator.policy.fleet_view import FleetView

__all__ = ["Chosen", "DispatchLimits", "FleetView", "Refused", "choose", "dispatch"]
