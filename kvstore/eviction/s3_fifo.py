"""S3-FIFO (Yang et al., SOSP'23): a small queue weeds out what is used once, a main queue keeps the rest.

An entry begins in the small queue, or in the main one if it left the small one not long ago. At the head of the small
queue it moves on to the main one if it was hit more than once since, and goes otherwise; at the head of the main queue
it goes round again, once for each hit (of at most three).

Two things are different for blocks of sequences: those that came at one time leave from the end to the beginning, and
one behind which others stand goes round too.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from kvstore.eviction.columns import NO_PARENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from kvstore.eviction.columns import Columns, Rows

    #: (when it came to the queue, minus its position, entry, serial)
    Place = tuple[float, int, int, int]

#: Of the capacity, for the small queue: the paper's.
SMALL_SHARE = 0.1
MOST_HITS = 3
#: Hits in the small queue after which an entry is kept.
KEPT_AFTER = 2


class S3Fifo:
    """The queues beside a tier's columns."""

    def __init__(self, columns: Columns, capacity_entries: int) -> None:
        self._columns = columns
        self._most_small = max(1, int(SMALL_SHARE * capacity_entries))
        self._most_ghosts = capacity_entries - self._most_small
        #: First in, first out. Entries that have left since, or were moved, are skipped when they come up.
        self._small: list[Place] = []
        self._main: list[Place] = []
        self._hits = np.zeros(capacity_entries, np.int8)
        self._in_main = np.zeros(capacity_entries, np.bool_)
        self._num_small = 0
        #: Key hints of what left the small queue, oldest first.
        self._ghosts: dict[int, None] = {}

    def stored(self, entry: int, now_s: float) -> None:
        self._hits[entry] = 0
        hint = int(self._columns.key_hint[entry])
        in_main = hint in self._ghosts
        self._ghosts.pop(hint, None)
        self._in_main[entry] = in_main
        self._num_small += not in_main
        self._enter(self._main if in_main else self._small, entry, now_s)

    def hit(self, entries: Rows) -> None:
        self._hits[entries] = np.minimum(self._hits[entries] + 1, MOST_HITS)

    def removed(self, entry: int, evicted: bool) -> None:
        if self._in_main[entry]:
            return
        self._num_small -= 1
        hint = int(self._columns.key_hint[entry])
        if evicted and hint:
            self._ghosts[hint] = None
            if len(self._ghosts) > self._most_ghosts:
                del self._ghosts[next(iter(self._ghosts))]

    def suggest(self, count: int, now_s: float, may: Callable[[int], bool]) -> list[tuple[int, str]]:
        """Up to `count` entries and why, in the order in which they can go."""
        found: list[tuple[int, str]] = []
        #: Of entries behind which others stand, how many of these are in `found`.
        taken: dict[int, int] = {}
        #: Of those that were suggested or refused: they come up again with the next call.
        aside: tuple[list[Place], list[Place]] = ([], [])
        #: Those behind which others stand, by entry.
        blocked: dict[int, tuple[bool, Place]] = {}
        queues = (self._small, self._main)
        gone_small = 0
        while len(found) < count and (self._small or self._main):
            in_main = not self._small or (bool(self._main) and self._num_small - gone_small <= self._most_small)
            place = heapq.heappop(queues[in_main])
            entry = place[2]
            if not self._stands(place, in_main):
                continue
            if not in_main and self._hits[entry] >= KEPT_AFTER:
                self._hits[entry] = 0
                self._in_main[entry] = True
                self._num_small -= 1
                self._enter(self._main, entry, now_s)
            elif in_main and self._hits[entry]:
                self._hits[entry] -= 1
                self._enter(self._main, entry, now_s)
            elif self._columns.num_children[entry] > taken.get(entry, 0):
                blocked[entry] = in_main, (now_s, *place[1:])
            elif not may(entry):
                aside[in_main].append((now_s, *place[1:]))
            else:
                found.append((entry, "not_used_again" if in_main else "used_once"))
                gone_small += not in_main
                aside[in_main].append(place)
                parent = self._columns.parent_of(entry)
                if parent != NO_PARENT:
                    taken[parent] = taken.get(parent, 0) + 1
                    if parent in blocked and taken[parent] == self._columns.num_children[parent]:
                        waits_in_main, place = blocked.pop(parent)
                        heapq.heappush(queues[waits_in_main], place)
        for in_main, place in blocked.values():
            aside[in_main].append(place)
        _put_back(self._small, aside[0])
        _put_back(self._main, aside[1])
        return found

    def _stands(self, place: Place, in_main: bool) -> bool:
        entry, serial = place[2:]
        columns = self._columns
        return bool(columns.is_stored[entry] and columns.serial[entry] == serial and self._in_main[entry] == in_main)

    def _enter(self, queue: list[Place], entry: int, now_s: float) -> None:
        columns = self._columns
        heapq.heappush(queue, (now_s, -int(columns.position[entry]), entry, int(columns.serial[entry])))


def _put_back(queue: list[Place], places: Sequence[Place]) -> None:
    for place in places:
        heapq.heappush(queue, place)
