"""Asks the evaluator, remembers what it said, and concludes from that what need not be asked.

Two things are taken to hold, up to the noise of one workload: attainment does not rise with the rate, and not fall
with more workers of the same kind. From them follows most of what a search wants to know of half plans.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.planner.plans import Attained, Found, Plan, PlanDoesNotFit, Pool
from workload.goodput import search

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.messages import Role
    from coordinator.planner.plans import Evaluator, WorkerKind

#: Rough searches only order plans: a fifth is near enough, and few runs.
_ROUGH_TOLERANCE = 0.2
_MAX_RUNS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """Raises ValueError for a target, rates or a tolerance that make no search."""

    target: float = 0.9
    #: Rates of one device below and above which nothing is looked for.
    low_rps: float
    high_rps: float
    #: Where searches begin, of one device.
    start_rps: float
    #: Relative; rates within it are equal.
    tolerance: float = 0.02

    def __post_init__(self) -> None:
        if not (0 < self.target <= 1 and 0 < self.tolerance < 1):
            raise ValueError(f"needs 0 < target <= 1 and 0 < tolerance < 1: {self.target:g}, {self.tolerance:g}")
        if not 0 < self.low_rps <= self.start_rps <= self.high_rps:
            raise ValueError(f"needs 0 < low <= start <= high: {self}")


@dataclass(slots=True)
class _Known:
    """Of half plans of one kind: rates that so many workers met, and missed."""

    met_rps: dict[int, float] = field(default_factory=dict[int, float])
    missed_rps: dict[int, float] = field(default_factory=dict[int, float])


class Bench:
    """Not pure only in that it remembers and counts; equal calls in equal order have equal answers."""

    def __init__(
        self,
        evaluator: Evaluator,
        settings: SearchSettings,
        *,
        rough: Evaluator | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        """`rough` orders the plans, and decides nothing; None: the evaluator itself. `progress` hears, before each
        question, what it is about."""
        self.settings = settings
        self._evaluator = evaluator
        self._rough = rough or evaluator
        self._progress = progress or _silent
        self._known: dict[tuple[Role, WorkerKind], _Known] = {}
        self._joint: dict[tuple[Plan, float], Attained] = {}
        self.num_rough_runs = 0
        self.num_phase_runs = 0
        self.num_joint_runs = 0

    def rough_goodput_rps(self, role: Role, kind: WorkerKind) -> float:
        """Of one worker, prefill or decode alone, or mixed; 0: not even the lowest rate. Raises PlanDoesNotFit."""
        plan = Plan((Pool(role, kind, 1),))

        def attainment_at(rate_rps: float) -> float:
            self.num_rough_runs += 1
            self._progress(f"{plan} at {rate_rps:,.3g}/s")
            return self._rough.attained(plan, rate_rps).joint

        scale = kind.parallel.num_devices
        if attainment_at(self.settings.low_rps * scale) < self.settings.target:
            return 0.0
        found = search(
            attainment_at,
            start_rps=self.settings.start_rps * scale,
            low_rps=self.settings.low_rps * scale,
            high_rps=self.settings.high_rps * scale,
            target=self.settings.target,
            tolerance=_ROUGH_TOLERANCE,
            max_runs=_MAX_RUNS,
        )
        return found.goodput_rps

    def pool_meets(self, pool: Pool, rate_rps: float) -> bool:
        """Whether these workers alone meet their phase's target at this rate: else no plan with them does."""
        known = self._known.setdefault((pool.role, pool.kind), _Known())
        count = pool.num_workers
        if any(fewer <= count and met >= rate_rps for fewer, met in known.met_rps.items()):
            return True
        if any(more >= count and missed <= rate_rps for more, missed in known.missed_rps.items()):
            return False
        self.num_phase_runs += 1
        self._progress(f"{pool} alone at {rate_rps:,.3g}/s")
        met = self._evaluator.attained(Plan((pool,)), rate_rps).joint >= self.settings.target
        if met:
            known.met_rps[count] = max(rate_rps, known.met_rps.get(count, 0.0))
        else:
            known.missed_rps[count] = min(rate_rps, known.missed_rps.get(count, rate_rps))
        return met

    def pools_meet(self, plan: Plan, rate_rps: float) -> bool:
        """As `pool_meets`, of every phase of its own; True where a plan has none."""
        return all(pool.role == "mixed" or self.pool_meets(pool, rate_rps / plan.copies) for pool in plan.pools)

    def attained(self, plan: Plan, rate_rps: float) -> Attained:
        """Of the whole plan."""
        single, single_rps = Plan(plan.pools), rate_rps / plan.copies
        key = (single, single_rps)
        if key not in self._joint:
            self.num_joint_runs += 1
            self._progress(f"{single} at {single_rps:,.3g}/s")
            self._joint[key] = self._evaluator.attained(single, single_rps)
        return self._joint[key]

    def meets(self, plan: Plan, rate_rps: float) -> bool:
        """False also where it cannot serve at all."""
        try:
            return self.pools_meet(plan, rate_rps) and self.attained(plan, rate_rps).joint >= self.settings.target
        except PlanDoesNotFit:
            return False

    def goodput(self, plan: Plan, start_rps: float) -> Found | None:
        """None: not even the lowest rate. Raises PlanDoesNotFit."""
        settings, scale = self.settings, plan.num_devices
        low_rps, high_rps = settings.low_rps * scale, settings.high_rps * scale
        found = search(
            lambda rate_rps: self.attained(plan, rate_rps).joint,
            start_rps=min(max(start_rps, low_rps), high_rps),
            low_rps=low_rps,
            high_rps=high_rps,
            target=settings.target,
            tolerance=settings.tolerance,
            max_runs=_MAX_RUNS,
        )
        if found.goodput_rps == 0:
            return None
        missed_rps = found.missed_rps if found.missed_rps < math.inf else None
        return Found(
            plan=plan,
            goodput_rps=found.goodput_rps,
            attained=self.attained(plan, found.goodput_rps),
            missed=None if missed_rps is None else (missed_rps, self.attained(plan, missed_rps)),
        )


def _silent(_: str) -> None:
    """Nobody wants to hear."""
