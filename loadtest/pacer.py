"""Does things at their times, on the event loop, and knows how late it was: the open loop's clock."""

from __future__ import annotations

import asyncio
import heapq
from array import array
from itertools import count
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
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
    """Calls back at times of `now_s`, never early.

    It also measures itself: every `DELAY_INTERVAL_S` it notes how late the event loop came to it. What arrives from a
    server is timed when the loop comes to it, too, so this delay bounds the error of every latency that is reported.
    """

    def __init__(self, timer: Timer, now_s: Callable[[], float]) -> None:
        self._timer = timer
        self._now_s = now_s
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()
        self._armed_s = float("inf")
        #: Seconds, one for each look.
        self.delays_s: array[float] = array("d")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(timer.fd, self._fired)
        self._watching = False
        self._firing = False

    def at(self, due_s: float, action: Callable[[], None]) -> None:
        """`action` is called from the event loop at `due_s`, or at once when that has passed. It must not raise."""
        heapq.heappush(self._due, (due_s, next(self._numbers), action))
        if due_s < self._armed_s and not self._firing:
            self._arm()

    def watch_delay(self) -> None:
        """Begins to measure the event loop's delay."""
        self._watching = True
        self._look_at(self._now_s() + DELAY_INTERVAL_S)

    def stop_watching(self) -> None:
        self._watching = False

    def close(self) -> None:
        """Forgets everything that is due."""
        self._due.clear()
        self._loop.remove_reader(self._timer.fd)

    def _look_at(self, due_s: float) -> None:
        def look() -> None:
            now_s = self._now_s()
            self.delays_s.append(now_s - due_s)
            if self._watching:
                # Looks that were missed altogether count once, with their whole delay.
                self._look_at(max(due_s, now_s) + DELAY_INTERVAL_S)

        self.at(due_s, look)

    def _fired(self) -> None:
        self._timer.clear()
        self._armed_s = float("inf")
        due = self._due
        self._firing = True
        for _ in range(MAX_ACTIONS_AT_ONCE):
            if not due or due[0][0] > self._now_s():
                break
            heapq.heappop(due)[2]()
        self._firing = False
        if due:
            self._arm()

    def _arm(self) -> None:
        self._armed_s = self._due[0][0]
        self._timer.arm(self._armed_s)
