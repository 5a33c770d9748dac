"""Does things at their times, on the event loop, and knows how late it was: the open loop's clock."""

from __future__ import annotations

import asyncio
import heapq
from itertools import count
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable

#: Reads come to their turn after so many actions, also when the client has fallen behind.
MAX_ACTIONS_AT_ONCE = 32
#: How often the delay of the event loop is looked at.
DELAY_INTERVAL_S = 0.01


class Timer(Protocol):
    """Becomes readable at a time; see `machine.TimerFd`."""

    fd: int

    def arm(self, at_s: float) -> None: ...

    def clear(self) -> None: ...


class Pacer:
    """Calls back at times of `now_s`, never early."""

    def __init__(self, timer: Timer, now_s: Callable[[], float]) -> None:
        self._timer = timer
        self._now_s = now_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._armed_s = float("inf")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(timer.fd, self._fired)
        self._firing = False

    def at(self, due_s: float, action: Callable[[], None]) -> None:
        """`action` is called from the event loop at `due_s`, or at once when that has passed. It must not raise."""
        heapq.heappush(self._due, (due_s, next(self._numbers), action))
        if due_s < self._armed_s and not self._firing:
            self._arm()

    def close(self) -> None:
        """Forgets everything that is due."""
        self._due.clear()
        self._loop.remove_reader(self._timer.fd)

    def poll(self) -> None:
        """Does what is due already. Whoever handles one of many things that the event loop has at hand calls this after
        each: what is to be sent then waits for one of them, not for all."""
        if self._due and not self._firing and self._due[0][0] <= self._now_s():
            self._do_due()

    def _fired(self) -> None:
        self._timer.clear()
        self._armed_s = float("inf")
        self._do_due()

    def _do_due(self) -> None:
        due = self._due
        self._firing = True
        try:
            for _ in range(MAX_ACTIONS_AT_ONCE):
                if not due or due[0][0] > self._now_s():
                    break
                heapq.heappop(due)[2]()
        finally:
            # Also when an action raises: the others are still due.
            self._firing = False
            if due:
                self._arm()

    def _arm(self) -> None:
        self._armed_s = self._due[0][0]
        self._timer.arm(self._armed_s)


class DelayWatch:
    """Notes how late the event loop comes to what is due, every `DELAY_INTERVAL_S`, from when it is made until `stop`.

    What arrives from a server is timed when the loop comes to it, too, so this delay bounds the error of every latency.
    A loop that was away for long missed looks, each of which would have been late: they are noted as well, as by
    HdrHistogram's correction, so that the share of late looks is the share of time in which arrivals were timed late.
    Its pacer is one that nobody polls: what is looked at is when the loop comes round.
    """

    def __init__(self, pacer: Pacer, now_s: Callable[[], float], delays_s: array[float]) -> None:
        """Appends to `delays_s`, in seconds."""
        self._pacer = pacer
        self._now_s = now_s
        self._delays_s = delays_s
        self._is_stopped = False
        self._look_at(now_s() + DELAY_INTERVAL_S)

    def stop(self) -> None:
        self._is_stopped = True

    def _look_at(self, due_s: float) -> None:
        def look() -> None:
            if self._is_stopped:
                return
            now_s = self._now_s()
            delay_s = now_s - due_s
            self._delays_s.append(delay_s)
            while (delay_s := delay_s - DELAY_INTERVAL_S) > 0:
                self._delays_s.append(delay_s)
            self._look_at(now_s + DELAY_INTERVAL_S)

        self._pacer.at(due_s, look)
