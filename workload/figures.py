"""The figures that everybody who serves a workload is judged by, measured or simulated: latencies and attainment."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencySummary:
    """Milliseconds over `count` values; NaN where there are none."""

    count: int
    mean_ms: float
    p50_ms: float
    p90_ms: float
    p95_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Attainment:
    """Shares of `num_requests` that met their targets; NaN of none."""

    name: str
    #: None over several classes with targets of their own.
    ttft_target_ms: float | None
    tpot_target_ms: float | None
    num_requests: int
    #: Met both; the other two say which of them was missed.
    joint: float
    ttft_only: float
    tpot_only: float


def summarise(values_s: NDArray[np.float64]) -> LatencySummary:
    """Of values in seconds; NaN are left out. Quantiles are interpolated linearly between order statistics."""
    known_ms = values_s[~np.isnan(values_s)] * 1e3
    if not len(known_ms):
        return LatencySummary(count=0, **dict.fromkeys(_FIGURES, math.nan))
    p50, p90, p95, p99 = (float(each) for each in np.quantile(known_ms, (0.5, 0.9, 0.95, 0.99)))
    return LatencySummary(
        count=len(known_ms),
        mean_ms=float(known_ms.mean()),
        p50_ms=p50,
        p90_ms=p90,
        p95_ms=p95,
        p99_ms=p99,
        max_ms=float(known_ms.max()),
    )


_FIGURES = ("mean_ms", "p50_ms", "p90_ms", "p95_ms", "p99_ms", "max_ms")
