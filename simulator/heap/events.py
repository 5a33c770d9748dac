"""The heap itself: actions at times, and the present time."""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable


class EventHeap:
    """Actions in order of time; those of one instant in the order in which they were asked for."""

    __slots__ = ("_heap", "_num_pushed", "now_s", "num_events")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._num_pushed = 0
        #: Virtual seconds since the start.
        self.now_s = 0.0
        #: Actions that did something: what was overtaken by events takes itself out (`overtaken`).
        self.num_events = 0

    def at(self, time_s: float, action: Callable[[Any], None], argument: Any) -> None:
        """Calls `action(argument)` at `time_s`, not before now."""
        self._num_pushed += 1
        heappush(self._heap, (time_s, self._num_pushed, action, argument))

    def after(self, delay_s: float, action: Callable[[Any], None], argument: Any) -> None:
        """Calls `action(argument)` in `delay_s` >= 0 seconds."""
        self._num_pushed += 1
        heappush(self._heap, (self.now_s + delay_s, self._num_pushed, action, argument))

    def overtaken(self) -> None:
        """Called by an action that finds nothing to do any more: it is no event."""
        self.num_events -= 1

    def run(self) -> None:
        """Until nothing is left to do."""
        heap = self._heap
        while heap:
            self.now_s, _, action, argument = heappop(heap)
            self.num_events += 1
            action(argument)
