"""Length distributions of prompts and answers, in tokens."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate
from statistics import NormalDist
from typing import TYPE_CHECKING, Protocol

from workload.checks import require_positive
from workload.roots import growing_root

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable

#: Longest that a distribution gives unless it is told otherwise.
MAX_TOKENS = 131_072

#: Widest log-normal; observed lengths have a sigma of 0.5 to 2.
MAX_SIGMA = 10.0

_NORMAL = NormalDist()
_P95 = _NORMAL.inv_cdf(0.95)


class Lengths(Protocol):
    """How long something is."""

    def sample(self, rng: random.Random) -> int:
        """One length in tokens, > 0."""
        ...


@dataclass(frozen=True, slots=True)
class Fixed:
    """Always the same length."""

    tokens: int

    def __post_init__(self) -> None:
        require_positive(tokens=self.tokens)

    def sample(self, rng: random.Random) -> int:
        return self.tokens


@dataclass(frozen=True, slots=True)
class LogNormal:
    """Log-normal lengths, rounded, and clamped to 1 … `max_tokens`.

    Clamping leaves the median and every quantile below the bound where they are, and puts what lay beyond on
    the bound itself, as a context limit does. It lowers the mean; `from_mean` and `from_mean_p95` allow for that.
    """

    median_tokens: float
    #: Standard deviation of the logarithm of the length.
    sigma: float
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        require_positive(median_tokens=self.median_tokens, max_tokens=self.max_tokens)
        _require_sigma(self.sigma)

    @classmethod
    def from_mean(cls, mean_tokens: float, sigma: float, max_tokens: int = MAX_TOKENS) -> LogNormal:
        """With this mean after clamping. Raises ValueError for a mean that the bound does not allow."""
        require_positive(mean_tokens=mean_tokens, max_tokens=max_tokens)
        _require_sigma(sigma)
        if mean_tokens >= max_tokens:
            raise ValueError(f"mean_tokens {mean_tokens} must be below max_tokens {max_tokens}")

        def excess(log_median: float) -> float:
            return _clamped_mean(log_median, sigma, max_tokens) - mean_tokens

        lowest = math.log(mean_tokens) - sigma**2 / 2
        highest = lowest + 1.0
        while excess(highest) < 0:
            highest += 1.0
        return cls(math.exp(growing_root(excess, lowest, highest)), sigma, max_tokens)

    @classmethod
    def from_mean_p95(cls, mean_tokens: float, p95_tokens: float, max_tokens: int = MAX_TOKENS) -> LogNormal:
        """With this mean after clamping, and this 95th percentile.

        Of the two log-normals that fit, the one with the smaller sigma. Raises ValueError where none fits: the
        percentile of a log-normal lies between once and 3.86 times its mean.
        """
        require_positive(mean_tokens=mean_tokens, p95_tokens=p95_tokens, max_tokens=max_tokens)
        if p95_tokens > max_tokens:
            raise ValueError(f"p95_tokens {p95_tokens} must not be above max_tokens {max_tokens}")

        def excess(sigma: float) -> float:
            return mean_tokens - _clamped_mean(math.log(p95_tokens) - _P95 * sigma, sigma, max_tokens)

        if p95_tokens <= mean_tokens or excess(_P95) < 0:
            raise ValueError(
                f"no log-normal has mean {mean_tokens} and 95th percentile {p95_tokens}: "
                f"the percentile must be above the mean, and at most about 3.86 times of it"
            )
        sigma = growing_root(excess, 0.0, _P95)
        return cls(p95_tokens * math.exp(-_P95 * sigma), sigma, max_tokens)

    def sample(self, rng: random.Random) -> int:
        tokens = self.median_tokens * math.exp(self.sigma * rng.gauss(0.0, 1.0))
        return max(1, round(min(tokens, self.max_tokens)))


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """Many short lengths and a few long ones: the density falls as `tokens ** -(shape + 1)` between two bounds (a
    bounded Pareto distribution); rounded."""

    #: > 0; the smaller, the more of all tokens are in the few long ones.
    shape: float
    min_tokens: float
    max_tokens: int = MAX_TOKENS

    def __post_init__(self) -> None:
        require_positive(shape=self.shape, min_tokens=self.min_tokens)
        if self.min_tokens >= self.max_tokens:
            raise ValueError(f"min_tokens {self.min_tokens} must be below max_tokens {self.max_tokens}")

    @classmethod
    def from_mean_median(cls, mean_tokens: float, median_tokens: float, max_tokens: int = MAX_TOKENS) -> PowerLaw:
        """With this mean and this median. Raises ValueError where none fits: the median lies below the mean, and not
        so far below that even `shape` 0 (half of all below the geometric mean of the bounds) has a smaller mean."""
        require_positive(mean_tokens=mean_tokens, median_tokens=median_tokens, max_tokens=max_tokens)

        def excess(shape: float) -> float:
            return mean_tokens - _with_median(cls, shape, median_tokens, max_tokens).mean_tokens

        if not median_tokens < mean_tokens < max_tokens or excess(_LEAST_SHAPE) > 0 or excess(_MOST_SHAPE) < 0:
            raise ValueError(f"no power law up to {max_tokens} has mean {mean_tokens} and median {median_tokens}")
        return _with_median(cls, growing_root(excess, _LEAST_SHAPE, _MOST_SHAPE), median_tokens, max_tokens)

    @property
    def mean_tokens(self) -> float:
        """Before rounding."""
        shape, low, high = self.shape, self.min_tokens, float(self.max_tokens)
        kept = -math.expm1(shape * math.log(low / high))
        if abs(shape - 1.0) < 1e-9:
            return low * math.log(high / low) / kept
        return low * shape / (1.0 - shape) * math.expm1((1.0 - shape) * math.log(high / low)) / kept

    def quantile(self, share: float) -> float:
        """Before rounding; `share` in [0, 1]."""
        kept = -math.expm1(self.shape * math.log(self.min_tokens / self.max_tokens))
        return self.min_tokens * math.exp(-math.log1p(-share * kept) / self.shape)

    def sample(self, rng: random.Random) -> int:
        return max(1, min(self.max_tokens, round(self.quantile(rng.random()))))


#: Between these `PowerLaw.from_mean_median` looks.
_LEAST_SHAPE, _MOST_SHAPE = 1e-3, 20.0


def _with_median(kind: type[PowerLaw], shape: float, median_tokens: float, max_tokens: int) -> PowerLaw:
    """The lower bound that gives this median."""
    beyond = 0.5 * math.exp(shape * math.log(median_tokens / max_tokens))
    return kind(shape, median_tokens * math.exp(math.log(0.5 / (1.0 - beyond)) / shape), max_tokens)


@dataclass(frozen=True, slots=True)
class Histogram:
    """The given lengths, each as often as its weight says; nothing between them."""

    #: (tokens, weight), by length.
    bins: tuple[tuple[int, float], ...]
    _cumulative: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.bins:
            raise ValueError("a histogram needs at least one length")
        for tokens, weight in self.bins:
            require_positive(tokens=tokens, weight=weight)
        object.__setattr__(self, "_cumulative", tuple(accumulate(weight for _, weight in self.bins)))

    @classmethod
    def from_observed(cls, lengths: Iterable[int]) -> Histogram:
        """The empirical distribution of `lengths`."""
        return cls(tuple(sorted(Counter(lengths).items())))

    def sample(self, rng: random.Random) -> int:
        drawn = bisect_right(self._cumulative, rng.random() * self._cumulative[-1])
        return self.bins[min(drawn, len(self.bins) - 1)][0]


def _require_sigma(sigma: float) -> None:
    if not 0 <= sigma <= MAX_SIGMA:
        raise ValueError(f"sigma must be between 0 and {MAX_SIGMA}, got {sigma}")


def _clamped_mean(log_median: float, sigma: float, max_tokens: float) -> float:
    """Mean of min(X, max_tokens) of a log-normal X."""
    if sigma == 0:
        return min(math.exp(log_median), max_tokens)
    distance = (math.log(max_tokens) - log_median) / sigma
    below = math.exp(log_median + sigma**2 / 2) * _NORMAL.cdf(distance - sigma)
    return below + max_tokens * _NORMAL.cdf(-distance)


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedLengths:
    """Prompt and answer lengths of a data set that others evaluate with."""

    prompts: LogNormal
    outputs: LogNormal


def _distserve(mean_prompt_tokens: float, mean_output_tokens: float) -> PublishedLengths:
    return PublishedLengths(
        prompts=LogNormal.from_mean(mean_prompt_tokens, 1.0, 2048),
        outputs=LogNormal.from_mean(mean_output_tokens, 1.0, 2048),
    )


#: Means as in DistServe (OSDI'24, figure 7: lengths tokenised for OPT, whose context is 2,048 tokens). The paper
#: shows the shapes as pictures only: log-normal with sigma 1 is an assumption made here.
PUBLISHED_LENGTHS: dict[str, PublishedLengths] = {
    "sharegpt": _distserve(755.5, 200.3),
    "humaneval": _distserve(171.3, 98.2),
    "longbench": _distserve(1738.3, 90.7),
}
