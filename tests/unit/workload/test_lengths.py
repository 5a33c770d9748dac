"""Length distributions have the laws they say, inside their bounds."""

from __future__ import annotations

import math
import random
from collections import Counter
from statistics import mean, median, quantiles
from typing import TYPE_CHECKING

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from workload import PUBLISHED_LENGTHS, Fixed, Histogram, LogNormal, PowerLaw
from workload.lengths import MAX_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

    from workload import Lengths


def draw(lengths: Lengths, count: int = 20_000) -> list[int]:
    rng = random.Random(11)
    return [lengths.sample(rng) for _ in range(count)]


def test_a_fixed_length_is_fixed() -> None:
    assert set(draw(Fixed(512), 10)) == {512}


def test_a_lognormal_has_its_mean_and_percentile() -> None:
    drawn = draw(LogNormal.from_mean_p95(755, 2000))
    assert mean(drawn) == pytest.approx(755, rel=0.03)
    assert quantiles(drawn, n=20)[-1] == pytest.approx(2000, rel=0.05)


def test_a_lognormal_has_its_median() -> None:
    assert median(draw(LogNormal(300, 1.5))) == pytest.approx(300, rel=0.05)


def test_bounding_keeps_the_asked_for_mean_and_leaves_nothing_beyond() -> None:
    for lengths in (LogNormal.from_mean_p95(755, 2000, 2048), LogNormal.from_mean(755, 1.2, 1024)):
        drawn = draw(lengths)
        assert mean(drawn) == pytest.approx(755, rel=0.03)
        assert max(drawn) == lengths.max_tokens


@given(
    st.floats(min_value=1, max_value=1e5),
    st.floats(min_value=0, max_value=10),
    st.integers(min_value=1, max_value=MAX_TOKENS),
    st.integers(),
)
def test_lognormal_lengths_stay_in_bounds(median_tokens: float, sigma: float, max_tokens: int, seed: int) -> None:
    rng = random.Random(seed)
    lengths = LogNormal(median_tokens, sigma, max_tokens)
    assert all(1 <= lengths.sample(rng) <= max_tokens for _ in range(20))


@given(st.floats(min_value=2, max_value=1e4), st.floats(min_value=0.05, max_value=1.6))
def test_fitting_gives_back_the_lognormal_that_was_fitted(median_tokens: float, sigma: float) -> None:
    mean_tokens = median_tokens * math.exp(sigma**2 / 2)
    p95_tokens = median_tokens * math.exp(1.6448536269514722 * sigma)
    assume(p95_tokens / mean_tokens < 3.86)
    for fitted in (
        LogNormal.from_mean(mean_tokens, sigma, 10**9),
        LogNormal.from_mean_p95(mean_tokens, p95_tokens, 10**9),
    ):
        assert fitted.median_tokens == pytest.approx(median_tokens, rel=1e-3)
        assert fitted.sigma == pytest.approx(sigma, rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    ("mean_tokens", "median_tokens", "p80", "p95", "p99"),
    [(128, 38, 113, 413, 1464), (256, 32, 173, 1288, 4208), (512, 55, 582, 3113, 5166)],
)
def test_a_power_law_is_that_of_llumnix(mean_tokens: int, median_tokens: int, p80: int, p95: int, p99: int) -> None:
    """Fitted to mean and median, it has the other published quantiles nearly (OSDI'24, table 1)."""
    lengths = PowerLaw.from_mean_median(mean_tokens, median_tokens, 6144)
    assert lengths.mean_tokens == pytest.approx(mean_tokens)
    assert lengths.quantile(0.5) == pytest.approx(median_tokens)
    assert lengths.quantile(0.8) == pytest.approx(p80, rel=0.1)
    assert lengths.quantile(0.95) == pytest.approx(p95, rel=0.1)
    assert lengths.quantile(0.99) == pytest.approx(p99, rel=0.3)
    drawn = draw(lengths, 50_000)
    assert mean(drawn) == pytest.approx(mean_tokens, rel=0.05)
    assert median(drawn) == pytest.approx(median_tokens, rel=0.05)


@given(
    shape=st.floats(0.01, 3.0), min_tokens=st.integers(1, 500), times=st.floats(2.0, 1000.0), seed=st.integers(0, 99)
)
def test_power_law_lengths_stay_in_bounds(shape: float, min_tokens: int, times: float, seed: int) -> None:
    lengths = PowerLaw(shape, min_tokens, math.ceil(min_tokens * times))
    rng = random.Random(seed)
    assert all(min_tokens <= lengths.sample(rng) <= lengths.max_tokens for _ in range(50))
    assert lengths.quantile(0.0) == pytest.approx(min_tokens)
    assert lengths.quantile(1.0) == pytest.approx(lengths.max_tokens, rel=1e-3)
    assert min_tokens < lengths.mean_tokens < lengths.max_tokens


def test_a_histogram_draws_each_length_by_its_weight() -> None:
    drawn = Counter(draw(Histogram(((16, 1), (64, 2.5), (4096, 0.5)))))
    assert drawn.keys() == {16, 64, 4096}
    for tokens, share in ((16, 0.25), (64, 0.625), (4096, 0.125)):
        assert drawn[tokens] / 20_000 == pytest.approx(share, abs=0.015)


@given(st.lists(st.integers(min_value=1, max_value=50), min_size=1), st.integers())
def test_a_histogram_of_observed_lengths_gives_only_those(observed: list[int], seed: int) -> None:
    lengths = Histogram.from_observed(observed)
    assert dict(lengths.bins) == Counter(observed)
    rng = random.Random(seed)
    assert {lengths.sample(rng) for _ in range(20)} <= set(observed)


@pytest.mark.parametrize(
    ("name", "prompt_tokens", "output_tokens"),
    [("sharegpt", 755.5, 200.3), ("humaneval", 171.3, 98.2), ("longbench", 1738.3, 90.7)],
)
def test_published_lengths_have_their_published_means(name: str, prompt_tokens: float, output_tokens: float) -> None:
    lengths = PUBLISHED_LENGTHS[name]
    assert mean(draw(lengths.prompts)) == pytest.approx(prompt_tokens, rel=0.03)
    assert mean(draw(lengths.outputs)) == pytest.approx(output_tokens, rel=0.03)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Fixed(0), "tokens must be finite and > 0, got 0"),
        (lambda: LogNormal(0, 1), "median_tokens must be finite and > 0, got 0"),
        (lambda: LogNormal(100, 11), "sigma must be between 0 and 10.0, got 11"),
        (lambda: LogNormal.from_mean(2048, 1, 2048), "mean_tokens 2048 must be below max_tokens 2048"),
        (lambda: LogNormal.from_mean_p95(100, 90), "the percentile must be above the mean"),
        (lambda: LogNormal.from_mean_p95(100, 400), "at most about 3.86 times"),
        (lambda: LogNormal.from_mean_p95(100, 200, 150), "p95_tokens 200 must not be above max_tokens 150"),
        (lambda: Histogram(()), "at least one length"),
        (lambda: PowerLaw(0.0, 10, 100), "shape must be finite and > 0, got 0"),
        (lambda: PowerLaw(1.0, 100, 100), "min_tokens 100 must be below max_tokens 100"),
        (lambda: PowerLaw.from_mean_median(50, 60, 100), "mean 50 and median 60"),
        (lambda: PowerLaw.from_mean_median(90, 10, 100), "mean 90 and median 10"),
        (lambda: Histogram(((5, 0),)), "weight must be finite and > 0, got 0"),
    ],
)
def test_what_cannot_be_is_refused(make: Callable[[], Lengths], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
