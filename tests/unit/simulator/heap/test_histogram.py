"""The histogram against the sorted values themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.heap.histogram import Histogram

SECONDS = st.floats(1e-6, 1e5)
WEIGHTS = st.integers(1, 50)


def exact_quantile(weighted: list[tuple[float, int]], share: float) -> float:
    wanted, seen = share * sum(weight for _, weight in weighted), 0
    for value_s, weight in sorted(weighted):
        seen += weight
        if seen >= wanted:
            return value_s
    raise AssertionError("no values")


@given(weighted=st.lists(st.tuples(SECONDS, WEIGHTS), min_size=1), share=st.floats(0.0, 1.0))
def test_quantiles_are_within_one_percent(weighted: list[tuple[float, int]], share: float) -> None:
    histogram = Histogram()
    for value_s, weight in weighted:
        histogram.add(value_s, weight)
    assert histogram.quantile(share) == pytest.approx(exact_quantile(weighted, share), rel=0.01)
    total = sum(weight for _, weight in weighted)
    assert histogram.weight == total
    assert histogram.mean == pytest.approx(sum(value_s * weight for value_s, weight in weighted) / total)
    assert histogram.max == max(value_s for value_s, _ in weighted)


@given(
    first_s=SECONDS, times=st.floats(1.0, 50.0), count=st.integers(1, 300), weight=WEIGHTS, share=st.floats(0.0, 1.0)
)
def test_a_ramp_is_its_values_one_by_one(first_s: float, times: float, count: int, weight: int, share: float) -> None:
    last_s = first_s * times if count > 1 else first_s
    step_s = (last_s - first_s) / max(1, count - 1)
    ramp, one_by_one = Histogram(), Histogram()
    ramp.add_ramp(first_s, last_s, count, weight)
    for index in range(count):
        one_by_one.add(first_s + index * step_s, weight)
    assert ramp.weight == one_by_one.weight
    assert ramp.mean == pytest.approx(one_by_one.mean)
    # A value on an edge may round to either side.
    assert ramp.quantile(share) == pytest.approx(one_by_one.quantile(share), rel=0.0201)
    assert math.isclose(ramp.max, one_by_one.max)


def test_an_empty_histogram_has_no_values() -> None:
    histogram = Histogram()
    assert all(math.isnan(value) for value in (histogram.quantile(0.5), histogram.mean, histogram.max))


def test_values_beyond_its_buckets_keep_their_weight() -> None:
    histogram = Histogram()
    histogram.add(0.0)
    histogram.add(1e9)
    assert histogram.quantile(0.5) <= 1e-6
    assert histogram.weight == 2
    assert histogram.max == 1e9


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_quantile_needs_a_share(share: float) -> None:
    with pytest.raises(ValueError, match=r"share must be in \[0, 1\]"):
        Histogram().quantile(share)
