"""Whether the disk is asked at all: failures close it for a while, and then one try decides.

reading:  open ──so many failures in a row──▶ closed ──backoff──▶ one try ──good──▶ open, else closed for longer
writing:  open ──any failure──▶ closed ──backoff──▶ one try ──good──▶ open, else closed for longer
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from contracts.disk import is_full

#: Failures in a row after which nothing is read for a while.
MAX_READ_FAILURES = 4
FIRST_BACKOFF_S = 1.0
LONGEST_BACKOFF_S = 60.0


@dataclass(slots=True, eq=False)
class Breaker:
    """One direction. Times are the caller's `now_s`."""

    max_failures: int
    problem: str = ""
    _num_failures: int = 0
    _backoff_s: float = 0.0
    _next_try_s: float = 0.0
    #: A try was granted whose end is not known.
    _is_trying: bool = False

    def may_try(self, now_s: float) -> bool:
        """Where it is closed, one yes after each backoff; the next one only after another, unless that one told."""
        if not self.problem:
            return True
        if now_s < self._next_try_s:
            return False
        self._next_try_s = now_s + self._backoff_s
        self._is_trying = True
        return True

    def worked(self) -> None:
        self.problem = ""
        self._num_failures = 0
        self._backoff_s = 0.0
        self._is_trying = False

    def failed(self, problem: str, now_s: float) -> None:
        self._num_failures += 1
        if self._num_failures < self.max_failures:
            return
        if self.problem and not self._is_trying:
            # One of those that were under way when it closed.
            return
        self._is_trying = False
        self._backoff_s = min(max(2 * self._backoff_s, FIRST_BACKOFF_S), LONGEST_BACKOFF_S)
        self._next_try_s = now_s + self._backoff_s
        self.problem = problem


class Health:
    """Both directions of one tier."""

    def __init__(self) -> None:
        self._reading = Breaker(MAX_READ_FAILURES)
        self._writing = Breaker(1)

    @property
    def problem(self) -> str:
        """Why nothing is taken, or given, at the moment; empty: both are."""
        return self._writing.problem or self._reading.problem

    def may_read(self, now_s: float) -> bool:
        return self._reading.may_try(now_s)

    def may_write(self, now_s: float) -> bool:
        return self._writing.may_try(now_s)

    def read_worked(self) -> None:
        self._reading.worked()

    def read_failed(self, error: OSError, now_s: float) -> None:
        self._reading.failed(f"cannot read: {describe(error)}", now_s)

    def write_worked(self) -> None:
        self._writing.worked()

    def write_failed(self, error: OSError, now_s: float) -> None:
        self._writing.failed(describe(error), now_s)

    def no_room(self, problem: str, now_s: float) -> None:
        self._writing.failed(problem, now_s)


def describe(error: OSError) -> str:
    """For people: what kind of failure, and where."""
    if is_full(error):
        kind = "disk full"
    elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        kind = "not allowed"
    elif isinstance(error, TimeoutError):
        kind = "disk does not answer"
    else:
        kind = "disk failure"
    return f"{kind}: {error}" if str(error) else kind
