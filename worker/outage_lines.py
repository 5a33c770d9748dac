"""What is said of calls that fail again and again: one line when that begins, one when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.errors import TandemError


class OutageLines:
    """Use: `failed` or `answered` after each call. An outage may last for hours, so nothing is said in between."""

    def __init__(self, begun: str, over: str, clock: Clock, log: Callable[[str], None]) -> None:
        """`begun`, `over`: how the two lines begin, such as "X does not answer" and "X answers again"."""
        self._begun = begun
        self._over = over
        self._clock = clock
        self._log = log
        #: Since when calls fail, and how many have; None: the last one was answered.
        self._since_s: float | None = None
        self._num_failed = 0

    def failed(self, error: TandemError) -> None:
        self._num_failed += 1
        if self._since_s is None:
            self._since_s = self._clock.now_s()
            self._log(f"WARNING: {self._begun}: {error.message}")

    def answered(self) -> None:
        if self._since_s is None:
            return
        after_s = self._clock.now_s() - self._since_s
        calls = "call" if self._num_failed == 1 else "calls"
        self._log(f"{self._over} after {after_s:.1f} s and {self._num_failed} failed {calls}")
        self._since_s, self._num_failed = None, 0
