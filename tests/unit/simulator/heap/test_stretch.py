"""Steps in closed form against steps added up one by one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.heap.stretch import Stretch

GROWTHS_S = st.sampled_from([0.0, 1e-9, 1e-6, 1e-3])


@st.composite
def stretches(draw: st.DrawFn) -> Stretch:
    growth_s = draw(GROWTHS_S)
    # The first step reads at least as much context as each step adds.
    first_s = growth_s + draw(st.floats(1e-4, 2.0))
    return Stretch(draw(st.floats(0.0, 1e5)), first_s, growth_s, draw(st.sampled_from([0.0, 1e-4, 0.5])))


def ends_one_by_one(stretch: Stretch, count: int) -> list[float]:
    ends: list[float] = []
    now_s = stretch.start_s
    for index in range(count):
        now_s += stretch.first_s + index * stretch.growth_s
        ends.append(now_s)
        now_s += stretch.gap_s
    return ends


@given(stretch=stretches(), count=st.integers(1, 300))
def test_the_ends_are_the_sums_of_the_steps(stretch: Stretch, count: int) -> None:
    ends = ends_one_by_one(stretch, count)
    assert [stretch.end_s(index + 1) for index in range(count)] == pytest.approx(ends, abs=1e-7)


@given(stretch=stretches(), count=st.integers(0, 300), part=st.floats(0.0, 0.999))
def test_how_many_have_ended_is_found_at_any_time(stretch: Stretch, count: int, part: float) -> None:
    start_s = stretch.end_s(count) if count else stretch.start_s
    time_s = start_s + part * (stretch.end_s(count + 1) - start_s)
    found = stretch.ended_by(time_s)
    assert found == 0 or stretch.end_s(found) <= time_s
    assert stretch.end_s(found + 1) > time_s


@given(stretch=stretches(), count=st.integers(1, 50), part=st.floats(0.0, 1.0))
def test_gaps_are_not_busy(stretch: Stretch, count: int, part: float) -> None:
    durations = sum(stretch.first_s + index * stretch.growth_s for index in range(count))
    in_gap_s = stretch.end_s(count) + part * stretch.gap_s
    assert stretch.busy_s(in_gap_s, count) == pytest.approx(durations, abs=1e-7)
    assert stretch.busy_s(stretch.start_s, 0) == 0.0
