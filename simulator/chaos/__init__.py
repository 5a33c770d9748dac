"""Seeded chaos: one number draws a cluster, a workload and faults; an auditor says whether everything held."""

from __future__ import annotations

from simulator.chaos.scenario import Scenario, draw
from simulator.chaos.trial import Verdict, play, try_seed

__all__ = ["Scenario", "Verdict", "draw", "play", "try_seed"]
