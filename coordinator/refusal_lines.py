"""Refusals for the coordinator's ordinary log: a line each, with what it rested on, and never more than a log can take.

Whoever keeps no decision log can still tell from it why a client was turned away. A machine without I/O: it returns
lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from coordinator.decision_log import entry_of
from coordinator.decision_records import line_of

if TYPE_CHECKING:
    from contracts.messages import DispatchItem, Rejection
    from coordinator.conductor import Conductor
    from coordinator.decision import Refused

#: Refusals told one by one within a second; one more line tells how many others there were.
MAX_LINES_PER_S = 200


class RefusalLines:
    def __init__(self, conductor: Conductor, *, max_lines_per_s: int = MAX_LINES_PER_S) -> None:
        self._conductor = conductor
        self._max_lines_per_s = max_lines_per_s
        #: The second that is counted in.
        self._second = 0
        self._num_told = 0
        self._num_left_out = 0

    def refused(self, item: DispatchItem, refused: Refused, words: Rejection, now_s: float) -> list[str]:
        """To be called right after the conductor's decision. Times of calls must not go backwards."""
        lines = self.look(now_s)
        if self._num_told >= self._max_lines_per_s:
            self._num_left_out += 1
            return lines
        self._num_told += 1
        # Hints are for replays.
        entry = entry_of(self._conductor, msgspec.structs.replace(item, block_keys=b""), refused, at_s=now_s)
        lines.append(f"refused: {words.message} {line_of(entry).decode().rstrip()}")
        return lines

    def look(self, now_s: float) -> list[str]:
        """To be called now and then: what is to be told when a second is over, although nobody was refused since."""
        if int(now_s) == self._second:
            return []
        num_left_out = self._num_left_out
        self._second, self._num_told, self._num_left_out = int(now_s), 0, 0
        return [f"refused: {num_left_out:,} more within a second, not told one by one"] if num_left_out else []
