"""The best plan, the runner-up and the best colocated plan.

DistServe (OSDI'24) searches each phase's best kind of worker alone and replicates it (algorithm 1), or pairs of
workers within a node together (algorithm 2); Splitwise (ISCA'24, section 4.4) searches the two counts. Here phases
alone give the order and an upper bound, and whole plans decide: a plan is simulated jointly only where neither of its
phases alone misses the target at the rate that is to be beaten. So the answer is that of trying every plan, as far as
attainment does not rise with the rate nor fall with more workers.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import TYPE_CHECKING

from coordinator.planner.bench import Bench
from coordinator.planner.plans import Dropped, Found, Plan, PlanDoesNotFit, Planned, Pool
from coordinator.planner.space import Machines, colocated_plans, split_plans

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from contracts.messages import Role
    from coordinator.planner.bench import SearchSettings
    from coordinator.planner.plans import Evaluator, Parallelism, WorkerKind

ROLES: tuple[Role, ...] = ("prefill", "decode", "mixed")

#: Leaders that are kept: the best and the runner-up.
_NUM_LEADERS = 2


def plan_goodput(
    machines: Machines,
    kinds: Mapping[Role, Sequence[WorkerKind]],
    evaluator: Evaluator,
    settings: SearchSettings,
    *,
    rate_rps: float | None = None,
    rough: Evaluator | None = None,
    progress: Callable[[str], None] | None = None,
) -> Planned:
    """With a rate: the fewest devices that serve it, of those the plan with the highest goodput. Without one, or where
    the devices do not suffice for it: the highest goodput of all devices, and of equal ones the fewest devices.

    `kinds` has the workers to choose from for each role; of those that differ in their token budget alone, the one
    whose single worker does best in a rough search stands for all. `rough` and `progress` as of `Bench`.
    """
    search = _Search(machines, Bench(evaluator, settings, rough=rough, progress=progress))
    search.look_at(kinds)
    split: list[Found] = []
    colocated: list[Found] = []
    if rate_rps is not None:
        split, colocated = search.fewest(search.splits, rate_rps), search.fewest(search.colocated, rate_rps)
    enough = bool(split or colocated)
    leaders = sorted([*split, *colocated], key=lambda found: (found.plan.num_devices, -found.goodput_rps))
    if not enough:
        split, colocated = search.most(search.splits), search.most(search.colocated)
        leaders = []
        for found in (*colocated, *split):
            leaders = search.ranked(leaders, found)
    else:
        # What does not serve the rate with all devices is told by what it does serve.
        split, colocated = split or search.most(search.splits), colocated or search.most(search.colocated)
    return search.planned(leaders, split, colocated, rate_rps)


class _Search:
    def __init__(self, machines: Machines, bench: Bench) -> None:
        self._machines = machines
        self._bench = bench
        self._tolerance = bench.settings.tolerance
        #: Of one worker.
        self._rough_rps: dict[tuple[Role, WorkerKind], float] = {}
        self._kinds: dict[Role, list[WorkerKind]] = {role: [] for role in ROLES}
        self._dropped: list[Dropped] = []
        self._plans_seen: set[Plan] = set()

    # --- what there is ----------------------------------------------------------------------------

    def look_at(self, kinds: Mapping[Role, Sequence[WorkerKind]]) -> None:
        """Finds the kinds of workers that can serve at all, and about how much one of each serves."""
        for role in ROLES:
            by_parallel: dict[Parallelism, list[WorkerKind]] = {}
            for kind in kinds.get(role, ()):
                by_parallel.setdefault(kind.parallel, []).append(kind)
            for alike in by_parallel.values():
                self._look_at_alike(role, alike)

    def _look_at_alike(self, role: Role, alike: Sequence[WorkerKind]) -> None:
        best: WorkerKind | None = None
        best_rps = 0.0
        why = ""
        for kind in alike:
            try:
                rough_rps = self._bench.rough_goodput_rps(role, kind)
                if rough_rps == 0.0:
                    rough_rps = self._lowest_if_met(role, kind)
            except PlanDoesNotFit as error:
                why = str(error)
                continue
            if rough_rps > best_rps:
                best, best_rps = kind, rough_rps
        if best is not None:
            self._kinds[role].append(best)
            self._rough_rps[role, best] = best_rps
        else:
            why = why or "misses the target of its phase even while it is nearly idle"
            if role == "mixed":
                why = why.replace("the target of its phase", "the targets")
            self._dropped.append(Dropped(f"{role} {alike[0].parallel}", why))

    def _lowest_if_met(self, role: Role, kind: WorkerKind) -> float:
        """A rough study found that it meets the target at no rate; so does the real one, or this is the lowest rate."""
        lowest_rps = self._bench.settings.low_rps * kind.parallel.num_devices
        attained = self._bench.attained(Plan((Pool(role, kind, 1),)), lowest_rps)
        return lowest_rps if attained.joint >= self._bench.settings.target else 0.0

    def splits(self, *, all_counts: bool) -> Iterator[Plan]:
        return split_plans(self._machines, self._kinds, all_counts=all_counts)

    def colocated(self, *, all_counts: bool) -> Iterator[Plan]:
        return colocated_plans(self._machines, self._kinds["mixed"], all_counts=all_counts)

    def _estimate_rps(self, plan: Plan) -> float:
        return plan.copies * min(pool.num_workers * self._rough_rps[pool.role, pool.kind] for pool in plan.pools)

    # --- searches ---------------------------------------------------------------------------------

    def most(self, plans: Callable[..., Iterator[Plan]]) -> list[Found]:
        """The two with the highest goodput, the first with no worker that it could do without."""
        leaders = self._leaders(plans(all_counts=False), [], 0.0)
        return [self._trimmed(leaders[0]), *leaders[1:]] if leaders else []

    def fewest(self, plans: Callable[..., Iterator[Plan]], rate_rps: float) -> list[Found]:
        """The two with the fewest devices that serve the rate, and of equal numbers with the highest goodput."""
        leaders: list[Found] = []
        in_order = sorted(plans(all_counts=True), key=lambda plan: plan.num_devices)
        for _, alike in groupby(in_order, key=lambda plan: plan.num_devices):
            leaders += self._leaders(alike, [], rate_rps)
            if len(leaders) >= _NUM_LEADERS:
                break
        return leaders[:_NUM_LEADERS]

    def _leaders(self, plans: Iterable[Plan], leaders: list[Found], floor_rps: float) -> list[Found]:
        """Those with the highest goodput, at least the floor."""
        in_order = sorted(plans, key=lambda plan: (-self._estimate_rps(plan), plan.num_devices, str(plan)))
        for plan in in_order:
            self._plans_seen.add(plan)
            to_beat_rps = max(floor_rps, self._to_beat_rps(plan, leaders))
            if to_beat_rps and not self._bench.meets(plan, to_beat_rps):
                continue
            try:
                found = self._bench.goodput(plan, to_beat_rps or self._estimate_rps(plan))
            except PlanDoesNotFit as error:
                self._dropped.append(Dropped(str(plan), str(error)))
                continue
            if found is not None:
                leaders = self.ranked(leaders, found)
        return leaders

    def _to_beat_rps(self, plan: Plan, leaders: Sequence[Found]) -> float:
        if len(leaders) < _NUM_LEADERS:
            return 0.0
        last = leaders[-1]
        return last.goodput_rps * (1.0 if plan.num_devices < last.plan.num_devices else 1.0 + self._tolerance)

    def ranked(self, leaders: Sequence[Found], found: Found) -> list[Found]:
        """The leaders with this one among them, as far as there is a place."""
        place = next((i for i, other in enumerate(leaders) if self._is_better(found, other)), len(leaders))
        return [*leaders[:place], found, *leaders[place:]][:_NUM_LEADERS]

    def _is_better(self, found: Found, other: Found) -> bool:
        width = 1.0 + self._tolerance
        if found.goodput_rps > other.goodput_rps * width:
            return True
        if other.goodput_rps > found.goodput_rps * width:
            return False
        if found.plan.num_devices != other.plan.num_devices:
            return found.plan.num_devices < other.plan.num_devices
        return found.goodput_rps > other.goodput_rps

    def _trimmed(self, found: Found) -> Found:
        """Without workers that it does not need for its goodput, nor for what is equal to it."""
        plan = found.plan
        while fewer := next((each for each in _one_less(plan) if self._bench.meets(each, found.goodput_rps)), None):
            plan = fewer
        if plan is found.plan:
            return found
        return self._bench.goodput(plan, found.goodput_rps) or found

    def planned(
        self, leaders: Sequence[Found], split: Sequence[Found], colocated: Sequence[Found], rate_rps: float | None
    ) -> Planned:
        bench = self._bench
        return Planned(
            best=leaders[0] if leaders else None,
            runner_up=leaders[1] if len(leaders) > 1 else None,
            colocated=colocated[0] if colocated else None,
            split=split[0] if split else None,
            target=bench.settings.target,
            rate_rps=rate_rps,
            tolerance=self._tolerance,
            num_plans=len(self._plans_seen),
            num_rough_runs=bench.num_rough_runs,
            num_phase_runs=bench.num_phase_runs,
            num_joint_runs=bench.num_joint_runs,
            dropped=tuple(self._dropped),
        )


def _one_less(plan: Plan) -> Iterator[Plan]:
    """With one worker or one copy less, those first that free the most devices."""
    fewer = [
        replace(plan, pools=tuple(replace(p, num_workers=p.num_workers - (p is pool)) for p in plan.pools))
        for pool in plan.pools
        if pool.num_workers > 1
    ]
    if plan.copies > 1:
        fewer.append(replace(plan, copies=plan.copies - 1))
    return iter(sorted(fewer, key=lambda each: each.num_devices))
