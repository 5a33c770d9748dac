"""A weighted histogram of durations in logarithmic buckets: constant memory, whatever the study's length."""

from __future__ import annotations

import math
from bisect import bisect_left

#: Each bucket is this much wider than the one before: a value is off by at most the root of it, that is 1 %.
_RATIO = 1.02
_PER_LOG = 1.0 / math.log(_RATIO)
#: Everything from 0 to here is one bucket.
_LOWEST_S = 1e-6
_HIGHEST_S = 1e6
_NUM_BUCKETS = math.ceil(math.log(_HIGHEST_S / _LOWEST_S) * _PER_LOG) + 2
#: `_EDGES_S[i]` is where bucket i ends: bucket i holds the values in (`_EDGES_S[i - 1]`, `_EDGES_S[i]`].
_EDGES_S = [_LOWEST_S * _RATIO**each for each in range(_NUM_BUCKETS)]


class Histogram:
    """Counts seconds. Quantiles of values between a microsecond and a million seconds are within 1 %."""

    def __init__(self) -> None:
        self._weights = [0.0] * _NUM_BUCKETS
        self._sum_s = 0.0
        self._min_s = math.inf
        self._max_s = 0.0
        #: Sum of all weights.
        self.weight = 0.0

    def __repr__(self) -> str:
        return f"<Histogram of {self.weight:g} values, mean {self.mean:g} s, max {self.max:g} s>"

    def add(self, value_s: float, weight: float = 1.0) -> None:
        """`value_s` >= 0, `weight` > 0."""
        self._weights[_bucket(value_s)] += weight
        self._note(value_s, value_s, value_s * weight, weight)

    def add_ramp(self, first_s: float, last_s: float, count: int, weight: float = 1.0) -> None:
        """As `add` of `count` > 0 values, each with `weight`, equally spaced from `first_s` up to `last_s`."""
        low, high = _bucket(first_s), _bucket(last_s)
        if low == high or count == 1:
            self._weights[low] += count * weight
        else:
            step_s = (last_s - first_s) / (count - 1)
            done = 0
            for bucket in range(low, high):
                below = min(count, int((_EDGES_S[bucket] - first_s) / step_s) + 1)
                self._weights[bucket] += (below - done) * weight
                done = below
            self._weights[high] += (count - done) * weight
        total = count * weight
        self._note(first_s, last_s, 0.5 * (first_s + last_s) * total, total)

    @property
    def mean(self) -> float:
        """Seconds, exact; NaN when empty."""
        return self._sum_s / self.weight if self.weight else math.nan

    @property
    def max(self) -> float:
        """Seconds, exact; NaN when empty."""
        return self._max_s if self.weight else math.nan

    def quantile(self, share: float) -> float:
        """The smallest value that at least `share` of the weight does not pass, within 1 %; NaN when empty.

        Raises ValueError for a share outside [0, 1].
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"a quantile's share must be in [0, 1]: {share}")
        if not self.weight:
            return math.nan
        wanted = share * self.weight
        seen = 0.0
        for bucket, weight in enumerate(self._weights):
            seen += weight
            if weight and seen >= wanted:
                middle_s = _EDGES_S[bucket] / math.sqrt(_RATIO)
                return min(max(middle_s, self._min_s), self._max_s)
        return self._max_s

    def _note(self, low_s: float, high_s: float, sum_s: float, weight: float) -> None:
        self.weight += weight
        self._sum_s += sum_s
        self._min_s = min(self._min_s, low_s)
        self._max_s = max(self._max_s, high_s)


def _bucket(value_s: float) -> int:
    if value_s <= _LOWEST_S:
        return 0
    # The logarithm may be one off at an edge; the edges themselves decide.
    guess = min(int(math.log(value_s / _LOWEST_S) * _PER_LOG), _NUM_BUCKETS - 2)
    return min(bisect_left(_EDGES_S, value_s, guess, min(guess + 3, _NUM_BUCKETS)), _NUM_BUCKETS - 1)
