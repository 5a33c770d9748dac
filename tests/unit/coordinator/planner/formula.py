"""An evaluator by formula: queues and batches in closed form, so that every plan of a space can be tried."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coordinator.planner.plans import Attained, Found, Parallelism, Plan, PlanDoesNotFit, Pool, WorkerKind
from workload.goodput import search

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.messages import Role
    from coordinator.planner.bench import SearchSettings


def kind(tensor: int = 1, pipeline: int = 1, max_batch_tokens: int = 512) -> WorkerKind:
    return WorkerKind(Parallelism(tensor, pipeline), max_batch_tokens)


@dataclass(kw_only=True)
class Formula:
    """Follows `coordinator.planner.plans.Evaluator`.

    A worker of d devices is `d ** speedup` times as fast as one of one device. The shares that meet a target fall
    with the load of the workers that matter for it. On mixed workers each phase's load is part of the other's, and
    `interference` of the prompts' load counts against TPOT.
    """

    read_s: float = 0.1
    write_s: float = 0.15
    speedup: float = 0.9
    interference: float = 1.0
    ttft_strictness: float = 1.0
    tpot_strictness: float = 1.0
    #: A pipeline is this much less than its devices.
    pipeline_loss: float = 0.05
    unfit: frozenset[WorkerKind] = frozenset()
    asked: list[tuple[Plan, float]] = field(default_factory=list[tuple[Plan, float]])

    def attained(self, plan: Plan, rate_rps: float) -> Attained:
        assert plan.copies == 1
        self.asked.append((plan, rate_rps))
        for pool in plan.pools:
            if pool.kind in self.unfit:
                raise PlanDoesNotFit(f"{pool.kind.parallel} is too large")
        by_role: dict[Role, Pool] = {pool.role: pool for pool in plan.pools}
        if mixed := by_role.get("mixed"):
            load = rate_rps * (self.read_s + self.write_s) / self._power(mixed)
            slowed = load + self.interference * rate_rps * self.read_s / self._power(mixed)
            ttft, tpot = self._share(load, self.ttft_strictness), self._share(slowed, self.tpot_strictness)
            return Attained(min(ttft, tpot), ttft, tpot)
        ttft = tpot = 1.0
        if reader := by_role.get("prefill"):
            ttft = self._share(rate_rps * self.read_s / self._power(reader), self.ttft_strictness)
        if writer := by_role.get("decode"):
            tpot = self._share(rate_rps * self.write_s / self._power(writer), self.tpot_strictness)
        return Attained(ttft * tpot, ttft, tpot)

    def _power(self, pool: Pool) -> float:
        parallel = pool.kind.parallel
        stages = parallel.pipeline - self.pipeline_loss * (parallel.pipeline - 1)
        return float(pool.num_workers * parallel.tensor**self.speedup * stages)

    def _share(self, load: float, strictness: float) -> float:
        return 1.0 / (1.0 + math.exp(min(700.0, 12.0 * (load * strictness - 0.9))))


def brute_force(plans: Iterable[Plan], evaluator: Formula, settings: SearchSettings) -> list[Found]:
    """Every plan with its goodput, searched finely; those that serve nothing are left out."""
    found: list[Found] = []
    for plan in plans:
        single = Plan(plan.pools)

        def attainment_at(rate_rps: float, single: Plan = single, copies: int = plan.copies) -> float:
            return evaluator.attained(single, rate_rps / copies).joint

        scale = plan.num_devices
        searched = search(
            attainment_at,
            start_rps=settings.start_rps * scale,
            low_rps=settings.low_rps * scale,
            high_rps=settings.high_rps * scale,
            target=settings.target,
            tolerance=settings.tolerance / 20,
            max_runs=60,
        )
        if searched.goodput_rps:
            attained = evaluator.attained(single, searched.goodput_rps / plan.copies)
            found.append(Found(plan=plan, goodput_rps=searched.goodput_rps, attained=attained, missed=None))
    return found
