"""Pure decisions: no clock, no I/O, no logging."""

from coordinator.policy.fleet_view import FleetView
from coordinator.policy.settings import AdmissionRule, ConductorSettings, DispatchLimits

__all__ = ["AdmissionRule", "ConductorSettings", "DispatchLimits", "FleetView"]
