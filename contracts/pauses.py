"""Telling that one slept oneself from the silence of others.

A suspended laptop, a paused virtual machine or a stopped container wakes with every deadline past at once. Who
judges the silence of others therefore looks at its clock at regular short intervals: a look that comes much too
late says that the judge did not run, and that it knows nothing about the time between.
"""

from __future__ import annotations


class PauseWatch:
    """Feed it every look at the clock; `longest_gap_s` is the longest time between two that passes for running."""

    def __init__(self, longest_gap_s: float) -> None:
        self._longest_gap_s = longest_gap_s
        self._last_s: float | None = None

    def look(self, now_s: float) -> float:
        """Seconds since the last look in which this process did not run: 0 when it did. To be added to every
        deadline that counts somebody else's silence."""
        last_s, self._last_s = self._last_s, now_s
        gap_s = 0.0 if last_s is None else now_s - last_s
        return gap_s if gap_s > self._longest_gap_s else 0.0
