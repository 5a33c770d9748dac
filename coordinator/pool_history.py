"""What was seen of a pool lately: requests, how many met their targets, how long starts took. No clock, no I/O."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

#: Of a window; the oldest is dropped as a whole.
_NUM_PARTS = 20
#: The last of them: what comes lately.
_RECENT_PARTS = 5
#: Weight of the newest duration.
_NEWEST = 0.3


class Seen(NamedTuple):
    """Over the window, or since the begin where that is less."""

    arrivals: int = 0
    recent_arrivals: int = 0
    #: Of the time that was seen, the part in which the recent ones came.
    recent_share: float = 1.0
    #: Worker-seconds of reading that came each second.
    work_rate: float = 0.0
    #: Of those that were judged; None: nobody was.
    attainment: float | None = None
    num_judged: int = 0


@dataclass(slots=True)
class _Part:
    number: int
    arrivals: int = 0
    work_s: float = 0.0
    judged: int = 0
    late: int = 0


class PoolHistory:
    """Times of calls must not go backwards."""

    def __init__(self, window_s: float, now_s: float) -> None:
        self._part_s = window_s / _NUM_PARTS
        self._begin_s = now_s
        self._parts: deque[_Part] = deque(maxlen=_NUM_PARTS + 1)
        #: Until then what is judged says nothing: workers warm up, or requests waited for one.
        self._warming_until_s = -math.inf
        self._busy_s = now_s

    def arrived(self, now_s: float, work_s: float) -> None:
        """A request came that takes so long to read, whether it was accepted or not."""
        part = self._part_at(now_s)
        part.arrivals += 1
        part.work_s += work_s
        self._busy_s = now_s

    def busy(self, now_s: float) -> None:
        """Something waits or runs."""
        self._busy_s = now_s

    def warms_up(self, until_s: float) -> None:
        self._warming_until_s = max(self._warming_until_s, until_s)

    def judged(self, now_s: float, count: int, late: int) -> None:
        """So many were judged, of which so many were late. Nothing counts while workers warm up."""
        if now_s >= self._warming_until_s and count > 0:
            part = self._part_at(now_s)
            part.judged += count
            part.late += min(max(late, 0), count)

    def idle_s(self, now_s: float) -> float:
        return now_s - self._busy_s

    def seen(self, now_s: float) -> Seen:
        number = self._number(now_s)
        parts = [part for part in self._parts if part.number > number - _NUM_PARTS]
        first = max(number - _NUM_PARTS + 1, 0)
        since_s = max(first * self._part_s, 0.0)
        span_s = max(now_s - self._begin_s - since_s, self._part_s)
        recent_s = now_s - self._begin_s - max(number - _RECENT_PARTS + 1, 0) * self._part_s
        arrivals, judged = sum(part.arrivals for part in parts), sum(part.judged for part in parts)
        return Seen(
            arrivals=arrivals,
            recent_arrivals=sum(part.arrivals for part in parts if part.number > number - _RECENT_PARTS),
            recent_share=min(1.0, max(recent_s, 0.0) / span_s),
            work_rate=sum(part.work_s for part in parts) / span_s,
            attainment=1.0 - sum(part.late for part in parts) / judged if judged else None,
            num_judged=judged,
        )

    def _number(self, now_s: float) -> int:
        return max(0, int((now_s - self._begin_s) / self._part_s))

    def _part_at(self, now_s: float) -> _Part:
        number = self._number(now_s)
        if not self._parts or self._parts[-1].number < number:
            self._parts.append(_Part(number))
        return self._parts[-1]


class Durations:
    """Of things that take about the same time: mean and spread, where later ones count more."""

    def __init__(self, guess_s: float) -> None:
        """`guess_s`: until one was seen."""
        self._mean_s, self._spread_s = guess_s, 0.0
        self._count = 0

    @property
    def mean_s(self) -> float:
        return self._mean_s

    @property
    def spread_s(self) -> float:
        """Mean distance from the mean."""
        return self._spread_s

    @property
    def count(self) -> int:
        return self._count

    def note(self, took_s: float) -> None:
        if not 0 <= took_s < math.inf:
            return
        self._count += 1
        if self._count == 1:
            self._mean_s = took_s
            return
        self._spread_s += _NEWEST * (abs(took_s - self._mean_s) - self._spread_s)
        self._mean_s += _NEWEST * (took_s - self._mean_s)
