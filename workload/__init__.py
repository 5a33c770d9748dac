"""What clients ask of a cluster, without clients: arrivals, lengths, traces, shared prefixes, SLO classes.

Load test, simulator and planner read the same streams of `WorkloadRequest`s. Randomness is an argument.
"""

from __future__ import annotations

from workload.request import WorkloadRequest

__all__ = ["WorkloadRequest"]
