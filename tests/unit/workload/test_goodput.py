"""The search for the highest rate with enough attainment."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workload.goodput import search


@given(edge_rps=st.floats(0.02, 90.0), start_rps=st.floats(0.01, 100.0), tolerance=st.floats(0.001, 0.3))
def test_a_step_is_found_within_the_tolerance(edge_rps: float, start_rps: float, tolerance: float) -> None:
    found = search(
        lambda rate_rps: 1.0 if rate_rps <= edge_rps else 0.5,
        start_rps=start_rps,
        low_rps=0.01,
        high_rps=100.0,
        tolerance=tolerance,
        max_runs=60,
    )
    assert found.converged
    assert found.goodput_rps <= edge_rps < found.missed_rps
    assert found.missed_rps <= found.goodput_rps * (1 + tolerance)


@given(slope=st.floats(0.001, 10.0), target=st.floats(0.05, 1.0), start_rps=st.floats(0.01, 100.0))
def test_every_answer_was_tried_and_stands_on_its_side_of_the_target(
    slope: float, target: float, start_rps: float
) -> None:
    found = search(
        lambda rate_rps: max(0.0, 1.0 - slope * rate_rps),
        start_rps=start_rps,
        low_rps=0.01,
        high_rps=100.0,
        target=target,
    )
    attainments = {point.rate_rps: point.attainment for point in found.points}
    assert found.goodput_rps == 0 or attainments[found.goodput_rps] >= target
    assert found.missed_rps == math.inf or attainments[found.missed_rps] < target
    assert len(found.points) <= 20
    assert all(0.01 <= rate_rps <= 100.0 for rate_rps in attainments)
    assert len(attainments) == len(found.points)


def test_a_rate_that_never_misses_ends_at_the_upper_bound() -> None:
    found = search(lambda rate_rps: 1.0, start_rps=1.0, low_rps=0.5, high_rps=10.0)
    assert [point.rate_rps for point in found.points] == [1.0, 2.0, 4.0, 8.0, 10.0]
    assert (found.goodput_rps, found.missed_rps, found.converged) == (10.0, math.inf, False)


def test_a_rate_that_always_misses_ends_at_the_lower_bound() -> None:
    found = search(lambda rate_rps: 0.0, start_rps=1.0, low_rps=0.3, high_rps=10.0)
    assert [point.rate_rps for point in found.points] == [1.0, 0.5, 0.3]
    assert (found.goodput_rps, found.missed_rps, found.converged) == (0.0, 0.3, False)


def test_runs_are_limited() -> None:
    found = search(lambda rate_rps: float(rate_rps < 7.0), start_rps=1.0, low_rps=0.1, high_rps=64.0, max_runs=5)
    assert [point.rate_rps for point in found.points] == [1.0, 2.0, 4.0, 8.0, pytest.approx(math.sqrt(32))]
    assert not found.converged


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"low_rps": 0.0}, "rates must be 0 < low"),
        ({"start_rps": 20.0}, "rates must be 0 < low <= start <= high: 1, 20, 10"),
        ({"high_rps": math.inf}, "rates must be"),
        ({"target": 1.5}, "0 < target <= 1"),
        ({"tolerance": 0.0}, "0 < tolerance"),
        ({"max_runs": 0}, "max_runs >= 1"),
    ],
)
def test_what_makes_no_search_is_refused(change: dict[str, float], what: str) -> None:
    arguments: dict[str, float] = {"start_rps": 2.0, "low_rps": 1.0, "high_rps": 10.0, **change}
    with pytest.raises(ValueError, match=what):
        search(lambda rate_rps: 1.0, **arguments)  # type: ignore[arg-type]
