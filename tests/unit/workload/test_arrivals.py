"""Arrival processes ascend, keep their rates, and are what their names say."""

from __future__ import annotations

import math
import random
from itertools import islice, pairwise, takewhile
from statistics import mean, stdev
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload import Constant, Diurnal, Gamma, Poisson, Ramp, Step

if TYPE_CHECKING:
    from workload import Arrivals

RATES = st.floats(min_value=0.01, max_value=1000)


def _steps(first_rps: float, last_rps: float) -> Step:
    return Step(((0.0, first_rps), (7.0, 0.0), (11.0, last_rps)))


PROCESSES: st.SearchStrategy[Arrivals] = st.one_of(
    st.builds(Poisson, RATES),
    st.builds(Gamma, RATES, st.floats(min_value=0.1, max_value=8)),
    st.builds(Constant, RATES),
    st.builds(Ramp, st.one_of(st.just(0.0), RATES), RATES, st.floats(min_value=0.1, max_value=1000)),
    st.builds(_steps, RATES, RATES),
    st.builds(Diurnal, RATES, st.floats(min_value=0, max_value=1), st.floats(min_value=1, max_value=1e5)),
)


@given(PROCESSES, st.integers())
def test_times_ascend_and_repeat_with_the_seed(arrivals: Arrivals, seed: int) -> None:
    times = list(islice(arrivals.times(random.Random(seed)), 60))
    assert all(0 <= earlier <= later < math.inf for earlier, later in pairwise(times))
    assert times == list(islice(arrivals.times(random.Random(seed)), 60))


@given(PROCESSES, st.integers(), st.floats(min_value=0.1, max_value=10))
def test_scaled_rates_last_as_long_and_bring_so_many_times_as_many(
    arrivals: Arrivals, seed: int, factor: float
) -> None:
    """Undone by its inverse; and of a process without phases only the gaps change."""
    back = arrivals.scaled(factor).scaled(1 / factor)
    times, again = (list(islice(each.times(random.Random(seed)), 20)) for each in (arrivals, back))
    assert again == pytest.approx(times)
    if isinstance(arrivals, Poisson | Gamma | Constant):
        faster = list(islice(arrivals.scaled(factor).times(random.Random(seed)), 20))
        assert faster == pytest.approx([time_s / factor for time_s in times])


def test_scaled_phases_keep_their_times() -> None:
    assert Ramp(1, 8, 60).scaled(0.5) == Ramp(0.5, 4, 60)
    assert Step(((0.0, 2.0), (30.0, 8.0))).scaled(0.5) == Step(((0.0, 1.0), (30.0, 4.0)))
    assert Diurnal(2, 0.5, 100).scaled(3) == Diurnal(6, 0.5, 100)


def arrived(arrivals: Arrivals, until_s: float) -> list[float]:
    return list(takewhile(lambda time_s: time_s < until_s, arrivals.times(random.Random(7))))


@pytest.mark.parametrize("arrivals", [Poisson(5), Gamma(5, 0.3), Gamma(5, 1), Gamma(5, 3), Constant(5)])
def test_rates_converge(arrivals: Arrivals) -> None:
    assert len(arrived(arrivals, 4000)) / 4000 == pytest.approx(5, rel=0.06)


@pytest.mark.parametrize(
    ("arrivals", "cv"), [(Poisson(5), 1), (Gamma(5, 0.3), 0.3), (Gamma(5, 1), 1), (Gamma(5, 3), 3), (Constant(5), 0)]
)
def test_gaps_vary_as_the_coefficient_says(arrivals: Arrivals, cv: float) -> None:
    times = islice(arrivals.times(random.Random(3)), 40_000)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    assert stdev(gaps) / mean(gaps) == pytest.approx(cv, rel=0.05, abs=1e-6)


def test_a_gamma_of_coefficient_one_has_the_gaps_of_a_poisson_process() -> None:
    times = [0.0, *islice(Gamma(2, 1).times(random.Random(3)), 20_000)]
    gaps = [later - earlier for earlier, later in pairwise(times)]
    for gap_s in (0.1, 0.5, 1.0, 2.0):
        assert sum(gap > gap_s for gap in gaps) / len(gaps) == pytest.approx(math.exp(-2 * gap_s), abs=0.015)


@pytest.mark.parametrize(("from_rps", "to_rps"), [(0, 40), (2, 40), (40, 2), (20, 20)])
def test_a_ramp_has_the_rate_of_each_moment_and_then_stays(from_rps: float, to_rps: float) -> None:
    times = arrived(Ramp(from_rps, to_rps, 300), 600)
    for start_s in range(0, 300, 50):
        expected = 50 * (from_rps + (to_rps - from_rps) * (start_s + 25) / 300)
        assert sum(start_s <= each < start_s + 50 for each in times) == pytest.approx(expected, rel=0.15, abs=20)
    assert sum(each >= 300 for each in times) == pytest.approx(300 * to_rps, rel=0.1)


def test_steps_have_their_rates_and_an_empty_level_is_empty() -> None:
    times = arrived(Step(((0, 3), (500, 0), (800, 30))), 1000)
    assert sum(each < 500 for each in times) == pytest.approx(1500, rel=0.1)
    assert not [each for each in times if 500 <= each < 800]
    assert sum(each >= 800 for each in times) == pytest.approx(6000, rel=0.1)


def test_a_day_is_quiet_at_its_start_and_busy_in_its_middle() -> None:
    times = arrived(Diurnal(20, 0.8, period_s=1000), 1000)
    assert len(times) == pytest.approx(20_000, rel=0.05)
    for start_s in range(0, 1000, 100):
        expected = 20 * sum(1 - 0.8 * math.cos(2 * math.pi * (start_s + each) / 1000) for each in range(100))
        assert sum(start_s <= each < start_s + 100 for each in times) == pytest.approx(expected, rel=0.15)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Poisson(0), "rate_rps must be finite and > 0, got 0"),
        (lambda: Gamma(1, math.nan), "cv must be finite and > 0, got nan"),
        (lambda: Constant(math.inf), "rate_rps must be finite and > 0, got inf"),
        (lambda: Ramp(-1, 1, 1), "from_rps must be finite and >= 0, got -1"),
        (lambda: Ramp(1, 0, 1), "to_rps must be finite and > 0, got 0"),
        (lambda: Step(()), "the first level must begin at 0 s"),
        (lambda: Step(((1, 1),)), "the first level must begin at 0 s"),
        (lambda: Step(((0, 1), (0, 2))), "levels must begin one after another"),
        (lambda: Step(((0, 1), (5, 0))), "last_rate_rps must be finite and > 0, got 0"),
        (lambda: Diurnal(1, 1.5), "amplitude must be between 0 and 1, got 1.5"),
    ],
)
def test_what_cannot_be_is_refused(make: type[Arrivals], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
