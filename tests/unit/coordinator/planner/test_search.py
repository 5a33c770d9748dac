"""The planner finds what trying every plan finds, with fewer questions, and says why."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from coordinator.planner.bench import SearchSettings
from coordinator.planner.plans import Found, Parallelism, Planned, WorkerKind
from coordinator.planner.reasons import binding, why_chosen, why_limited, why_lost
from coordinator.planner.search import ROLES, plan_goodput
from coordinator.planner.space import Machines, colocated_plans, split_plans
from tests.unit.coordinator.planner.formula import Formula, brute_force, kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.messages import Role

SETTINGS = SearchSettings(start_rps=1.0, low_rps=1.0 / 64, high_rps=64.0, tolerance=0.01)
KINDS = (kind(1), kind(2), kind(1, 2))


def for_all(kinds: Sequence[WorkerKind]) -> dict[Role, Sequence[WorkerKind]]:
    return dict.fromkeys(ROLES, kinds)


def every_plan(machines: Machines, kinds: Sequence[WorkerKind], formula: Formula) -> list[Found]:
    chosen = for_all(kinds)
    plans = (
        *split_plans(machines, chosen, all_counts=True),
        *colocated_plans(machines, chosen["mixed"], all_counts=True),
    )
    return brute_force(plans, formula, SETTINGS)


def planned_on(
    num_devices: int, formula: Formula, *, rate_rps: float | None = None, kinds: Sequence[WorkerKind] = KINDS
) -> Planned:
    return plan_goodput(Machines(num_devices=num_devices), for_all(kinds), formula, SETTINGS, rate_rps=rate_rps)


formulas = st.builds(
    Formula,
    read_s=st.floats(0.02, 0.5),
    write_s=st.floats(0.02, 0.5),
    speedup=st.floats(0.5, 1.0),
    interference=st.floats(0.0, 5.0),
    ttft_strictness=st.floats(0.8, 2.0),
    tpot_strictness=st.floats(0.8, 2.0),
)
spaces = st.builds(
    Machines,
    num_devices=st.sampled_from((2, 4, 6, 8, 12)),
    num_nodes=st.sampled_from((1, 2)),
    fast_fabric=st.booleans(),
)


@hypothesis_settings(max_examples=50, deadline=None)
@given(formula=formulas, machines=spaces)
def test_the_best_is_that_of_trying_every_plan(formula: Formula, machines: Machines) -> None:
    kinds = [each for each in KINDS if each.parallel.tensor <= machines.node_devices]
    everything = every_plan(machines, kinds, formula)
    planned = plan_goodput(machines, for_all(kinds), formula, SETTINGS)
    best_rps = max((found.goodput_rps for found in everything), default=0.0)
    if planned.best is None:
        assert best_rps == 0.0
        return
    # Twice the width: of the search itself, and of what counts as equal.
    assert planned.best.goodput_rps >= best_rps / (1 + 2 * SETTINGS.tolerance)
    assert planned.best.goodput_rps <= best_rps * (1 + SETTINGS.tolerance)
    clearly = [
        found
        for found in everything
        if found.goodput_rps >= planned.best.goodput_rps * (1 + SETTINGS.tolerance)
        and found.plan.num_devices < planned.best.plan.num_devices
    ]
    assert not clearly, "nothing does as well with fewer devices"
    for is_colocated, told in ((True, planned.colocated), (False, planned.split)):
        of_kind = [found.goodput_rps for found in everything if found.plan.is_colocated is is_colocated]
        if told is None:
            assert not of_kind
        else:
            assert told.goodput_rps >= max(of_kind) / (1 + 2 * SETTINGS.tolerance)
    if planned.runner_up is not None:
        assert planned.runner_up.plan != planned.best.plan
        assert planned.runner_up.goodput_rps <= planned.best.goodput_rps * (1 + SETTINGS.tolerance)


@hypothesis_settings(max_examples=50, deadline=None)
@given(formula=formulas, machines=spaces, rate_rps=st.floats(0.5, 40.0))
def test_the_fewest_devices_for_a_rate_are_those_of_trying_every_plan(
    formula: Formula, machines: Machines, rate_rps: float
) -> None:
    kinds = [each for each in KINDS if each.parallel.tensor <= machines.node_devices]
    everything = every_plan(machines, kinds, formula)
    planned = plan_goodput(machines, for_all(kinds), formula, SETTINGS, rate_rps=rate_rps)
    surely = [found.plan.num_devices for found in everything if found.goodput_rps >= rate_rps]
    if surely:
        assert planned.best is not None
        assert planned.best.goodput_rps >= rate_rps
        assert planned.best.plan.num_devices == min(surely)
    elif planned.best is not None:
        assert planned.best.goodput_rps < rate_rps * (1 + SETTINGS.tolerance)
        assert planned.best.goodput_rps >= max(found.goodput_rps for found in everything) / (1 + 2 * SETTINGS.tolerance)


def test_most_plans_are_judged_without_being_simulated() -> None:
    formula = Formula()
    machines = Machines(num_devices=16)
    planned = plan_goodput(machines, for_all(KINDS), formula, SETTINGS)
    num_splits = len(list(split_plans(machines, for_all(KINDS), all_counts=True)))
    searched_jointly = {plan for plan, _ in formula.asked if len(plan.pools) == 2}
    assert num_splits > 400
    assert len(searched_jointly) < 40
    assert planned.num_joint_runs + planned.num_phase_runs + planned.num_rough_runs == len(formula.asked)


def test_interference_makes_the_split_win_and_its_absence_the_colocated() -> None:
    apart = planned_on(8, Formula(interference=6.0, tpot_strictness=1.5))
    assert apart.best is not None
    assert apart.colocated is not None
    assert not apart.best.plan.is_colocated
    assert "times the goodput per device of the best colocated plan, whose limit is TPOT" in why_chosen(apart)
    together = planned_on(2, Formula(interference=0.0), kinds=(kind(1),))
    assert together.best is not None
    assert together.split is not None
    assert together.best.plan.is_colocated
    assert "times the goodput per device of the best split" in why_chosen(together)


def test_one_device_leaves_nothing_to_split() -> None:
    planned = planned_on(1, Formula(), kinds=(kind(1),))
    assert planned.best is not None
    assert planned.best.plan.is_colocated
    assert planned.split is None
    assert (
        why_chosen(planned) == "no split of the devices into prefill and decode workers meets the targets at any rate"
    )


def test_a_phase_that_is_cheap_gets_the_fewer_devices() -> None:
    planned = planned_on(8, Formula(read_s=0.05, write_s=0.35, interference=9.0), kinds=(kind(1),))
    assert planned.split is not None
    reader, writer = planned.split.plan.pools
    assert (reader.role, reader.num_workers, writer.role, writer.num_workers) == ("prefill", 1, "decode", 7)


def test_workers_that_serve_nothing_more_are_left_out() -> None:
    # One reader is enough for far more than seven writers.
    formula = Formula(read_s=0.001, write_s=0.3, interference=9.0)
    planned = plan_goodput(Machines(num_devices=5), {"prefill": (kind(1),), "decode": (kind(2),)}, formula, SETTINGS)
    assert planned.best is not None
    assert [(pool.role, pool.num_workers) for pool in planned.best.plan.pools] == [("prefill", 1), ("decode", 2)]
    fewer = plan_goodput(Machines(num_devices=6), {"prefill": (kind(1),), "decode": (kind(2),)}, formula, SETTINGS)
    assert fewer.best is not None
    assert fewer.best.plan == planned.best.plan, "the sixth device could only read"
    assert fewer.best.plan.num_devices == 5


def test_what_cannot_serve_is_dropped_with_its_reason() -> None:
    formula = Formula(unfit=frozenset({kind(1)}))
    planned = planned_on(4, formula)
    assert planned.best is not None
    assert all(pool.kind != kind(1) for pool in planned.best.plan.pools)
    assert {(each.what, each.why) for each in planned.dropped} == {
        (f"{role} TP 1", "TP 1 is too large") for role in ROLES
    }


def test_nothing_is_planned_where_an_idle_worker_misses_already() -> None:
    planned = planned_on(4, Formula(read_s=100.0, write_s=100.0))
    assert (planned.best, planned.runner_up, planned.colocated, planned.split) == (None, None, None, None)
    assert ("prefill TP 1", "misses the target of its phase even while it is nearly idle") in {
        (each.what, each.why) for each in planned.dropped
    }


def test_a_rate_beyond_all_devices_is_answered_by_the_most_they_can_do() -> None:
    most = planned_on(4, Formula())
    asked = planned_on(4, Formula(), rate_rps=1000.0)
    assert most.best is not None
    assert asked.best is not None
    assert asked.best.plan == most.best.plan
    assert asked.best.goodput_rps < 1000.0


def test_of_kinds_that_differ_in_their_budget_the_better_one_is_taken() -> None:
    class Budgeted(Formula):
        def _power(self, pool: object) -> float:
            power = super()._power(pool)  # type: ignore[arg-type]
            return power * (2.0 if pool.kind.max_batch_tokens == 1024 else 1.0)  # type: ignore[attr-defined]

    kinds = [kind(1, max_batch_tokens=tokens) for tokens in (512, 1024, 2048)]
    planned = planned_on(2, Budgeted(), kinds=kinds)
    assert planned.best is not None
    assert {pool.kind.max_batch_tokens for pool in planned.best.plan.pools} == {1024}


def test_limits_are_told_in_words() -> None:
    reading = planned_on(4, Formula(read_s=0.4, write_s=0.01, interference=0.0)).split
    assert reading is not None
    assert binding(reading) == "TTFT"
    assert "reading prompts is the bottleneck" in why_limited(reading)
    planned = planned_on(4, Formula())
    assert planned.best is not None
    assert planned.runner_up is not None
    assert "less in all" in why_lost(planned, planned.runner_up) or "serves as much" in why_lost(
        planned, planned.runner_up
    )
    unlimited = planned_on(2, Formula(read_s=1e-6, write_s=1e-6)).best
    assert unlimited is not None
    assert binding(unlimited) == "nothing"
    assert why_limited(unlimited).startswith("meets the targets at every rate that was tried")


def test_equal_questions_have_equal_answers() -> None:
    assert planned_on(8, Formula()) == planned_on(8, Formula())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, "0 < target <= 1"),
        ({"target": 1.5}, "0 < target <= 1"),
        ({"tolerance": 1.0}, "0 < tolerance < 1"),
        ({"low_rps": 2.0}, "0 < low <= start <= high"),
    ],
)
def test_settings_that_make_no_search_are_refused(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSettings(**{"start_rps": 1.0, "low_rps": 0.1, "high_rps": 10.0, **arguments})


def test_parallelism_in_words() -> None:
    assert str(Parallelism(2)) == "TP 2"
    assert str(Parallelism(2, 4)) == "TP 2 PP 4"
    assert Parallelism(2, 4).num_devices == 8
