"""Goodput: the highest rate at which enough requests meet their SLO.

A bisection over the rate with a simulation at each, as DistServe's placement search does (OSDI'24, section 4.1).
Attainment falls as the rate grows, up to the noise of one workload; the search ends at the crossing it meets.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    rate_rps: float
    #: Joint attainment of a study at this rate.
    attainment: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GoodputSearch:
    """What a search found."""

    target: float
    #: The highest rate that was tried and met the target; 0 when none did.
    goodput_rps: float
    #: The lowest rate that was tried and missed it; infinite when none did.
    missed_rps: float
    #: In the order tried.
    points: tuple[RatePoint, ...]
    #: Whether the two rates are within the tolerance; False at a bound, or where the runs ran out.
    converged: bool


def search(
    run_at_rate: Callable[[float], float],
    *,
    start_rps: float,
    low_rps: float,
    high_rps: float,
    target: float = 0.9,
    tolerance: float = 0.02,
    max_runs: int = 20,
) -> GoodputSearch:
    """Asks `run_at_rate(rate_rps) -> joint attainment` at the start, at doubled or halved rates within the bounds
    until the target lies between two of them, and then at geometric means.

    Ends when the met and the missed rate are within `tolerance`, relative; at a bound; or after `max_runs` runs.
    Raises ValueError for rates, target, tolerance or limit that make no search.
    """
    if not 0 < low_rps <= start_rps <= high_rps < math.inf:
        raise ValueError(f"rates must be 0 < low <= start <= high: {low_rps:g}, {start_rps:g}, {high_rps:g}")
    if not 0 < target <= 1 or not 0 < tolerance < 1 or max_runs < 1:
        raise ValueError(
            f"needs 0 < target <= 1, 0 < tolerance < 1 and max_runs >= 1: {target:g}, {tolerance:g}, {max_runs}"
        )
    met_rps, missed_rps = 0.0, math.inf
    points: list[RatePoint] = []
    rate_rps = start_rps
    while True:
        points.append(RatePoint(rate_rps=rate_rps, attainment=run_at_rate(rate_rps)))
        if points[-1].attainment >= target:
            met_rps = rate_rps
        else:
            missed_rps = rate_rps
        converged = met_rps > 0 and missed_rps <= met_rps * (1 + tolerance)
        at_bound = met_rps == high_rps or missed_rps == low_rps
        if converged or at_bound or len(points) == max_runs:
            break
        rate_rps = _next_rate(met_rps, missed_rps, low_rps, high_rps)
    return GoodputSearch(
        target=target, goodput_rps=met_rps, missed_rps=missed_rps, points=tuple(points), converged=converged
    )


def _next_rate(met_rps: float, missed_rps: float, low_rps: float, high_rps: float) -> float:
    if missed_rps == math.inf:
        return min(2.0 * met_rps, high_rps)
    if met_rps == 0.0:
        return max(0.5 * missed_rps, low_rps)
    return math.sqrt(met_rps * missed_rps)
