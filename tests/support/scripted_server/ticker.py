"""Calls things on time, to some tenths of a millisecond: event loops round their timers to whole ones."""

from __future__ import annotations

import asyncio
import ctypes
import heapq
import os
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_CLOCK_MONOTONIC = 1
_TFD_TIMER_ABSTIME = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class _Spec(ctypes.Structure):
    """`struct itimerspec`."""

    _fields_ = (
        ("interval_s", ctypes.c_long),
        ("interval_ns", ctypes.c_long),
        ("value_s", ctypes.c_long),
        ("value_ns", ctypes.c_long),
    )


class Ticker:
    """A heap of what is due, and one timer of the kernel (timerfd) that the event loop watches. Linux only.

    Times are `time.perf_counter()`, which is the kernel's monotonic clock.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._due: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        #: When the timer fires; zero: it is off.
        self._armed_s = 0.0
        self._is_closed = False
        self._spec = _Spec()
        # TFD_NONBLOCK and TFD_CLOEXEC have the values of their O_ twins.
        self._descriptor: int = _LIBC.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._descriptor < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop.add_reader(self._descriptor, self._run)

    def at(self, due_s: float, call: Callable[[], None]) -> None:
        """Never calls at once, also of what is due already; never at all once closed."""
        if self._is_closed:
            return
        self._count += 1
        heapq.heappush(self._due, (due_s, self._count, call))
        if not self._armed_s or due_s < self._armed_s:
            self._arm(due_s)

    def close(self) -> None:
        self._is_closed = True
        self._loop.remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._due.clear()

    def _run(self) -> None:
        try:
            os.read(self._descriptor, 8)
        except BlockingIOError:
            # Set to another time since it fired.
            return
        # Nothing that is called need arm it: that is done once, below.
        self._armed_s = -1.0
        # What falls due meanwhile waits for the next turn of the loop, so that sockets are read under overload too.
        due, now_s = self._due, time.perf_counter()
        while due and due[0][0] <= now_s:
            heapq.heappop(due)[2]()
        self._armed_s = 0.0
        if due:
            self._arm(due[0][0])

    def _arm(self, due_s: float) -> None:
        self._armed_s = due_s
        # A time of zero would switch it off.
        due_ns = max(1, int(due_s * 1e9))
        self._spec.value_s, self._spec.value_ns = divmod(due_ns, 1_000_000_000)
        _LIBC.timerfd_settime(self._descriptor, _TFD_TIMER_ABSTIME, ctypes.byref(self._spec), None)
