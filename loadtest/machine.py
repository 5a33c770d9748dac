"""What is read off the machine: clocks, CPU time, limits. The only place of this package that does."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

#: One clock for everything, monotonic and the same in all processes of a machine.
now_s: Callable[[], float] = time.perf_counter
#: CPU time of all threads of this process.
cpu_s: Callable[[], float] = time.process_time
#: Seconds since 1970, for headers with dates.
wall_s: Callable[[], float] = time.time

_CLOCK_MONOTONIC = 1
_TIMER_ABSOLUTE = 1


def started_at() -> str:
    """Now, in UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def local_stamp() -> str:
    """Now, for names of folders."""
    return f"{datetime.now():%Y%m%d-%H%M%S}"


def raise_file_limit() -> int:
    """Lets this process open as many files as it may, one for each connection; returns the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def describe() -> dict[str, object]:
    """For reports: hardware, without names that tell whose machine it is."""
    return {
        "cpu": _cpu_name(),
        "num_cores": len(os.sched_getaffinity(0)),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("tandem-serve", "uvloop", "httptools", "orjson", "numpy")}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    except OSError:
        return platform.processor() or "unknown"


class TimerFd:
    """A file descriptor that becomes readable at a time of `now_s`: exact to some 50 µs, where the event loop's own
    timers are cut to milliseconds. Linux only. Raises OSError when there is none to be had.
    """

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self.fd: int = self._libc.timerfd_create(_CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self.fd < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._setting = _TimerSetting()

    def arm(self, at_s: float) -> None:
        """Replaces the time before; one that has passed fires at once."""
        # Zero would disarm it.
        at_ns = max(1, int(at_s * 1e9))
        self._setting.value.seconds, self._setting.value.nanoseconds = divmod(at_ns, 1_000_000_000)
        if self._libc.timerfd_settime(self.fd, _TIMER_ABSOLUTE, ctypes.byref(self._setting), None) != 0:
            raise OSError(ctypes.get_errno(), "timerfd_settime")

    def clear(self) -> None:
        """Takes note that it fired."""
        try:
            os.read(self.fd, 8)
        except BlockingIOError:
            # It was armed anew between becoming readable and here.
            return

    def close(self) -> None:
        os.close(self.fd)


class _TimeSpec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class _TimerSetting(ctypes.Structure):
    """`struct itimerspec`; the interval stays zero: it fires once."""

    _fields_ = (("interval", _TimeSpec), ("value", _TimeSpec))
