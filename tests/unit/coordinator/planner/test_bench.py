"""What the bench concludes without asking."""

from __future__ import annotations

import pytest

from coordinator.planner.bench import Bench, SearchSettings
from coordinator.planner.plans import Plan, PlanDoesNotFit, Pool
from tests.unit.coordinator.planner.formula import Formula, kind

SETTINGS = SearchSettings(start_rps=1.0, low_rps=0.1, high_rps=10.0)


def reading(count: int) -> Pool:
    return Pool("prefill", kind(), count)


def test_more_workers_meet_what_fewer_do_and_fewer_miss_what_more_do() -> None:
    # One worker of 0.1 s a prompt meets 90 % up to about 7.2 requests/s.
    formula = Formula(read_s=0.1)
    bench = Bench(formula, SETTINGS)
    assert bench.pool_meets(reading(2), 10.0)
    assert not bench.pool_meets(reading(2), 20.0)
    assert (bench.num_phase_runs, len(formula.asked)) == (2, 2)
    assert bench.pool_meets(reading(3), 10.0)
    assert bench.pool_meets(reading(2), 9.0)
    assert not bench.pool_meets(reading(1), 20.0)
    assert not bench.pool_meets(reading(2), 30.0)
    assert len(formula.asked) == 2, "all of that follows"
    bench.pool_meets(reading(2), 15.0)
    bench.pool_meets(Pool("decode", kind(), 2), 10.0)
    assert len(formula.asked) == 4, "and this does not"


def test_copies_share_the_rate_and_are_asked_about_once() -> None:
    formula = Formula()
    bench = Bench(formula, SETTINGS)
    pools = (reading(1), Pool("decode", kind(), 1))
    four = bench.goodput(Plan(pools, 4), 4.0)
    assert four is not None
    num_asked = len(formula.asked)
    one = bench.goodput(Plan(pools), 1.0)
    assert one is not None
    assert four.goodput_rps == pytest.approx(4 * one.goodput_rps, rel=0.03)
    assert len(formula.asked) == num_asked, "the rates of a single copy are the same"
    assert all(plan.copies == 1 for plan, _ in formula.asked)


def test_what_does_not_fit_meets_nothing() -> None:
    bench = Bench(Formula(unfit=frozenset({kind()})), SETTINGS)
    plan = Plan((reading(1), Pool("decode", kind(), 1)))
    assert not bench.meets(plan, 0.1)
    with pytest.raises(PlanDoesNotFit, match="TP 1 is too large"):
        bench.goodput(plan, 1.0)


def test_progress_tells_what_is_asked() -> None:
    told: list[str] = []
    bench = Bench(Formula(), SETTINGS, progress=told.append)
    bench.pool_meets(reading(2), 3.0)
    bench.attained(Plan((reading(1), Pool("decode", kind(), 1))), 1.0)
    assert told == ["2 prefill (TP 1) alone at 3/s", "1 prefill (TP 1) + 1 decode (TP 1) at 1/s"]


def test_goodput_names_the_lowest_rate_that_missed() -> None:
    found = Bench(Formula(), SETTINGS).goodput(Plan((reading(1), Pool("decode", kind(), 1))), 1.0)
    assert found is not None
    assert found.missed is not None
    missed_rps, attained = found.missed
    assert found.goodput_rps < missed_rps <= found.goodput_rps * 1.02
    assert attained.joint < 0.9 <= found.attained.joint
    endless = Bench(Formula(read_s=1e-6, write_s=1e-6), SETTINGS).goodput(found.plan, 1.0)
    assert endless is not None
    assert (endless.goodput_rps, endless.missed) == (20.0, None)
