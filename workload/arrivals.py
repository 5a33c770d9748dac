"""Arrival processes: when requests come, whatever the server does (open loop).

Every process is a frozen value; `times(rng)` draws one path from it. Rates are requests per second. Processes
whose rate changes with time are non-homogeneous Poisson processes: `Ramp` and `Step` by exact inversion of the
expected number of arrivals up to t, `Diurnal` by thinning (Lewis and Shedler, 1979). Both are exact in law.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from workload.checks import require_not_negative, require_positive

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator


class Arrivals(Protocol):
    """When requests come."""

    def times(self, rng: random.Random) -> Iterator[float]:
        """Arrival times in seconds from 0 on: ascending, without end. Equal states of `rng` give equal times."""
        ...

    def scaled(self, factor: float) -> Arrivals:
        """Rates `factor` times as high at every time: what lasts, lasts as long."""
        ...


@dataclass(frozen=True, slots=True)
class Poisson:
    """Independent arrivals at a constant rate."""

    rate_rps: float

    def __post_init__(self) -> None:
        require_positive(rate_rps=self.rate_rps)

    def scaled(self, factor: float) -> Poisson:
        return replace(self, rate_rps=self.rate_rps * factor)

    def times(self, rng: random.Random) -> Iterator[float]:
        now_s = 0.0
        while True:
            now_s += rng.expovariate(self.rate_rps)
            yield now_s


@dataclass(frozen=True, slots=True)
class Gamma:
    """Gamma-distributed gaps with coefficient of variation `cv`: 1 is Poisson, above it bursts, below it order."""

    rate_rps: float
    cv: float

    def __post_init__(self) -> None:
        require_positive(rate_rps=self.rate_rps, cv=self.cv)

    def scaled(self, factor: float) -> Gamma:
        return replace(self, rate_rps=self.rate_rps * factor)

    def times(self, rng: random.Random) -> Iterator[float]:
        shape = 1.0 / self.cv**2
        scale_s = 1.0 / (self.rate_rps * shape)
        now_s = 0.0
        while True:
            now_s += rng.gammavariate(shape, scale_s)
            yield now_s


@dataclass(frozen=True, slots=True)
class Constant:
    """Equal gaps, the first arrival at 0."""

    rate_rps: float

    def __post_init__(self) -> None:
        require_positive(rate_rps=self.rate_rps)

    def scaled(self, factor: float) -> Constant:
        return replace(self, rate_rps=self.rate_rps * factor)

    def times(self, rng: random.Random) -> Iterator[float]:
        number = 0
        while True:
            yield number / self.rate_rps
            number += 1


@dataclass(frozen=True, slots=True)
class Ramp:
    """Poisson arrivals whose rate goes in a line from one value to another, and stays there."""

    from_rps: float
    to_rps: float
    over_s: float

    def __post_init__(self) -> None:
        require_not_negative(from_rps=self.from_rps)
        require_positive(to_rps=self.to_rps, over_s=self.over_s)

    def scaled(self, factor: float) -> Ramp:
        return replace(self, from_rps=self.from_rps * factor, to_rps=self.to_rps * factor)

    def times(self, rng: random.Random) -> Iterator[float]:
        in_ramp = (self.from_rps + self.to_rps) / 2 * self.over_s
        expected = 0.0
        while True:
            expected += rng.expovariate(1.0)
            if expected < in_ramp:
                yield min(self._within_ramp_s(expected), self.over_s)
            else:
                yield self.over_s + (expected - in_ramp) / self.to_rps

    def _within_ramp_s(self, expected: float) -> float:
        """When `expected` arrivals are due: the root of `from·t + slope·t²/2 = expected`, in its stable form."""
        slope = (self.to_rps - self.from_rps) / self.over_s
        return 2 * expected / (self.from_rps + math.sqrt(max(0.0, self.from_rps**2 + 2 * slope * expected)))


@dataclass(frozen=True, slots=True)
class Step:
    """Poisson arrivals whose rate jumps: `levels` are (from second, rate), the first from 0, the last for ever."""

    levels: tuple[tuple[float, float], ...]

    def __post_init__(self) -> None:
        if not self.levels or self.levels[0][0] != 0:
            raise ValueError(f"the first level must begin at 0 s, got {self.levels}")
        if any(later[0] <= earlier[0] for earlier, later in zip(self.levels, self.levels[1:], strict=False)):
            raise ValueError(f"levels must begin one after another, got {self.levels}")
        for from_s, rate_rps in self.levels:
            require_not_negative(from_s=from_s, rate_rps=rate_rps)
        require_positive(last_rate_rps=self.levels[-1][1])

    def scaled(self, factor: float) -> Step:
        return Step(tuple((from_s, rate_rps * factor) for from_s, rate_rps in self.levels))

    def times(self, rng: random.Random) -> Iterator[float]:
        expected = 0.0
        due = rng.expovariate(1.0)
        for (from_s, rate_rps), (until_s, _) in zip(self.levels, (*self.levels[1:], (math.inf, 0.0)), strict=True):
            in_level = math.inf if until_s == math.inf else rate_rps * (until_s - from_s)
            while due - expected < in_level:
                yield from_s + (due - expected) / rate_rps
                due += rng.expovariate(1.0)
            expected += in_level


@dataclass(frozen=True, slots=True)
class Diurnal:
    """Poisson arrivals at `mean_rps * (1 - amplitude * cos(2·pi·t / period_s))`: quietest at 0, busiest half-way."""

    mean_rps: float
    #: 0: constant; 1: nobody comes in the quietest moment.
    amplitude: float
    period_s: float = 86_400.0

    def __post_init__(self) -> None:
        require_positive(mean_rps=self.mean_rps, period_s=self.period_s)
        if not 0 <= self.amplitude <= 1:
            raise ValueError(f"amplitude must be between 0 and 1, got {self.amplitude}")

    def scaled(self, factor: float) -> Diurnal:
        return replace(self, mean_rps=self.mean_rps * factor)

    def times(self, rng: random.Random) -> Iterator[float]:
        highest = 1.0 + self.amplitude
        now_s = 0.0
        while True:
            now_s += rng.expovariate(self.mean_rps * highest)
            relative = 1.0 - self.amplitude * math.cos(2 * math.pi * now_s / self.period_s)
            if rng.random() * highest < relative:
                yield now_s
