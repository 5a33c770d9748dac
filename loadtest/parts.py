"""How much was offered, and over what time. Pure.

A run against several servers has parts: each server has its turn with each of them, and a part lasts until its last
request has ended. A slow server ends later, so from the first part to the last more time passes for it although it was
asked just as fast. Times are therefore counted within parts, and added up.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from loadtest.columns import Bools, RequestColumns

#: Over less than this a single request that is late moves the rate.
_MIN_RATE_SPAN_S = 1.0


class Offered(NamedTuple):
    """Sums over the parts, as `LoadMetrics` has them."""

    num_parts: int
    offered_s: float
    duration_s: float
    tail_s: float
    offered_rps: float
    sending_rate_ratio: float


def offered(columns: RequestColumns, rows: Bools) -> Offered:
    """Of the chosen rows, all of which were due."""
    parts = [rows & (columns.part == part) for part in np.unique(columns.part[rows])]
    count = int(rows.sum())
    offered_s = math.fsum(float(np.ptp(columns.due_s[part])) for part in parts)
    duration_s = math.fsum(_duration_s(columns, part) for part in parts)
    # Gaps between requests, which are one less than requests in each part; all at once are those of the whole duration.
    num_gaps, gaps_s = (count - len(parts), offered_s) if offered_s > 0 else (count, duration_s)
    return Offered(
        num_parts=len(parts),
        offered_s=offered_s or duration_s,
        duration_s=duration_s,
        tail_s=duration_s - offered_s,
        offered_rps=num_gaps / gaps_s if gaps_s else math.nan,
        sending_rate_ratio=_sending_rate_ratio(columns, parts),
    )


def _duration_s(columns: RequestColumns, part: Bools) -> float:
    """From the first due time to the last end."""
    ends_s = np.fmax(columns.end_s[part], columns.due_s[part])
    return float(ends_s.max() - columns.due_s[part].min())


def _sending_rate_ratio(columns: RequestColumns, parts: list[Bools]) -> float:
    due_span_s = taken_span_s = 0.0
    for part in parts:
        taken = part & ~np.isnan(columns.taken_s)
        if taken.any():
            due_span_s += float(np.ptp(columns.due_s[taken]))
            taken_span_s += float(np.ptp(columns.taken_s[taken]))
    return due_span_s / taken_span_s if min(due_span_s, taken_span_s) >= _MIN_RATE_SPAN_S else math.nan
