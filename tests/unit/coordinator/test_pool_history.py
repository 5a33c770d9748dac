"""What is remembered of a pool's requests and starts."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.pool_history import Durations, PoolHistory


def test_rates_are_of_the_window_and_its_last_quarter() -> None:
    history = PoolHistory(60.0, 100.0)
    for i in range(120):
        history.arrived(100.0 + i, 0.5)
    seen = history.seen(219.0)
    # One a second; the oldest part of a window is dropped as a whole.
    assert 57 <= seen.arrivals <= 60
    assert seen.work_rate == pytest.approx(0.5, rel=0.03)
    assert seen.recent_arrivals / seen.arrivals == pytest.approx(seen.recent_share, abs=0.03)


def test_a_burst_shows_in_what_came_lately() -> None:
    history = PoolHistory(60.0, 0.0)
    for i in range(60):
        history.arrived(float(i), 0.0)
    for i in range(100):
        history.arrived(60.0 + i / 20.0, 0.0)
    seen = history.seen(65.0)
    assert seen.recent_arrivals > 3 * seen.arrivals * seen.recent_share / 2


def test_a_window_that_has_just_begun_is_as_long_as_it_is() -> None:
    history = PoolHistory(60.0, 0.0)
    for i in range(10):
        history.arrived(i * 1.0, 1.0)
    assert history.seen(10.0).work_rate == pytest.approx(1.0)


def test_what_is_judged_while_workers_warm_up_does_not_count() -> None:
    history = PoolHistory(60.0, 0.0)
    history.warms_up(10.0)
    history.judged(5.0, 100, 100)
    assert history.seen(6.0).attainment is None
    history.judged(10.0, 8, 2)
    assert (history.seen(11.0).attainment, history.seen(11.0).num_judged) == (0.75, 8)
    assert history.seen(100.0).attainment is None


def test_idle_is_since_the_last_request_or_the_last_that_ran() -> None:
    history = PoolHistory(60.0, 0.0)
    history.arrived(5.0, 0.1)
    history.busy(7.0)
    assert history.idle_s(10.0) == 3.0


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(0, 50), st.integers(-5, 60)), max_size=50))
def test_figures_are_always_shares(steps: list[tuple[float, int, int]]) -> None:
    history, now_s = PoolHistory(30.0, 0.0), 0.0
    for passed_s, judged, late in steps:
        now_s += passed_s
        history.arrived(now_s, 1.0)
        history.judged(now_s, judged, late)
        seen = history.seen(now_s)
        assert 0 <= seen.recent_arrivals <= seen.arrivals
        assert 0 <= seen.recent_share <= 1
        assert seen.attainment is None or 0 <= seen.attainment <= 1


def test_durations_follow_what_is_seen() -> None:
    durations = Durations(20.0)
    assert (durations.mean_s, durations.spread_s, durations.count) == (20.0, 0.0, 0)
    durations.note(math.nan)
    durations.note(4.0)
    assert (durations.mean_s, durations.spread_s) == (4.0, 0.0)
    for _ in range(50):
        durations.note(6.0)
        durations.note(8.0)
    assert durations.mean_s == pytest.approx(7.0, abs=0.5)
    assert durations.spread_s == pytest.approx(1.0, abs=0.3)
