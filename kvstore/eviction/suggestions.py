"""Hands out the entries that are worth least, a batch of them sorted at a time.

Only entries behind which nothing stands can go: what is behind an evicted block no prompt can reach. When the last
child of a block has been suggested, the block itself can be. So a score says what an end is worth, and a beginning
never goes before its end, whatever their scores.

A batch is chosen from all entries, or from a part of them in a large tier: then each batch is the lowest of every n-th
entry, with another beginning each time. What was used or left since a batch was sorted is skipped. With at least
a sixteenth of a part in a batch, an eviction costs the same whatever the size of the tier.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

import numpy as np

from kvstore.eviction.columns import NO_PARENT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from kvstore.eviction.columns import Columns, Rows
    from kvstore.eviction.policies import Scores

    #: (score, when it was used last, minus its position, entry, serial)
    Candidate = tuple[float, float, int, int, int]

#: Entries that are looked at for one batch, at most.
PART_ENTRIES = 32_768
#: Of those, how many a batch has.
_BATCH_SHARE = 1 / 16
#: Fewest and most in a batch, unless more are asked for.
_FEWEST, _MOST = 32, 1024
#: Blocks before those of a batch whose turn may come with them, for each of its entries.
_BEFORE = 8


class Suggestions:
    """Of the entries that `columns` say are stored."""

    def __init__(
        self, columns: Columns, score: Callable[[Rows, float], Scores], part_entries: int = PART_ENTRIES
    ) -> None:
        """`score(entries, now_s)`: the lowest goes first."""
        self._columns = columns
        self._score = score
        self._part_entries = part_entries
        self._part = 0
        self._heap: list[Candidate] = []
        #: Blocks before candidates, by entry.
        self._before: dict[int, Candidate] = {}
        #: Beyond this score others, that are not in the batch, may come first.
        self._bound = -np.inf

    def forget(self) -> None:
        """Scores are different now: the next suggestion sorts anew."""
        self._heap, self._before = [], {}

    def suggest(self, count: int, now_s: float, may: Callable[[int], bool]) -> list[tuple[int, float]]:
        """Up to `count` entries and their scores, in the order in which they can go.

        Fewer only if no more can go. An entry that was suggested and did not leave is suggested again some time.
        """
        found: list[tuple[int, float]] = []
        #: Of entries behind which others stand, how many of these are in `found`.
        taken: dict[int, int] = {}
        refused: set[int] = set()
        #: Batches in a row that were all of their part, and gave nothing; how often the last one was to be larger.
        barren, doubled = 0, 0
        while len(found) < count:
            if self._take(count, found, taken, refused, may):
                barren = doubled = 0
                continue
            if barren > self._num_parts:
                break
            least = (count - len(found)) << doubled
            is_all = self._sort(now_s, least, [entry for entry, _ in found], refused)
            barren = barren + 1 if is_all else 0
            doubled += 1
        return found

    @property
    def _num_parts(self) -> int:
        return max(1, -(-self._columns.num_touched // self._part_entries))

    def _take(
        self,
        count: int,
        found: list[tuple[int, float]],
        taken: dict[int, int],
        refused: set[int],
        may: Callable[[int], bool],
    ) -> bool:
        """From the batch; whether there was any."""
        columns, heap = self._columns, self._heap
        before = len(found)
        while heap and len(found) < count:
            score, last_used_s, _, entry, serial = heapq.heappop(heap)
            if not columns.is_stored[entry] or columns.serial[entry] != serial:
                continue
            if columns.last_used_s[entry] != last_used_s or columns.num_children[entry] > taken.get(entry, 0):
                continue
            if not may(entry):
                refused.add(entry)
                continue
            found.append((entry, score))
            parent = columns.parent_of(entry)
            if parent != NO_PARENT:
                taken[parent] = taken.get(parent, 0) + 1
                candidate = self._before.get(parent)
                if (
                    candidate is not None
                    and columns.num_children[parent] == taken[parent]
                    and candidate[0] <= self._bound
                ):
                    heapq.heappush(heap, candidate)
        return len(found) > before

    def _sort(self, now_s: float, least: int, found: Sequence[int], refused: set[int]) -> bool:
        """Makes the next batch, at least that large if it can be; whether it has all of its part that can go."""
        columns = self._columns
        num_parts = self._num_parts
        self._part = (self._part + 1) % num_parts
        rows = np.arange(self._part, columns.num_touched, num_parts)
        # Those suggested just now count as gone.
        children = columns.num_children.copy() if found else columns.num_children
        if found:
            gone = np.array(found, np.int64)
            parents = columns.parent[gone[columns.has_parent(gone)]]
            np.subtract.at(children, parents, 1)
        is_end = columns.is_stored[rows] & (children[rows] == 0)
        rows = rows[is_end]
        if found or refused:
            rows = rows[~np.isin(rows, np.array([*found, *refused], np.int64))]
        scores = self._scores(rows, now_s)
        size = max(least, min(_MOST, max(_FEWEST, int(_BATCH_SHARE * len(rows)))))
        is_all = size >= len(rows)
        if not is_all:
            chosen = lowest((scores, columns.last_used_s[rows], -columns.position[rows]), size)
            rows, scores = rows[chosen], scores[chosen]
        self._heap = self._candidates(rows, scores)
        heapq.heapify(self._heap)
        self._bound = np.inf if is_all else float(scores.max())
        self._before = {candidate[3]: candidate for candidate in self._all_before(rows, now_s)}
        return is_all

    def _all_before(self, rows: Rows, now_s: float) -> list[Candidate]:
        """Of these entries the blocks before them, as far as that is not too many."""
        columns = self._columns
        most = _BEFORE * max(len(rows), _FEWEST)
        found: list[Rows] = []
        while len(rows) and sum(map(len, found)) < most:
            rows = np.unique(columns.parent[rows[columns.has_parent(rows)]]).astype(np.int64)
            found.append(rows)
        every = np.unique(np.concatenate(found)) if found else rows
        return self._candidates(every, self._scores(every, now_s))

    def _scores(self, rows: Rows, now_s: float) -> Scores:
        scores = self._score(rows, now_s).astype(np.float64)
        scores[self._columns.is_orphan(rows)] = -np.inf
        return scores

    def _candidates(self, rows: Rows, scores: Scores) -> list[Candidate]:
        columns = self._columns
        return list(
            zip(
                scores.tolist(),
                columns.last_used_s[rows].tolist(),
                (-columns.position[rows]).tolist(),
                rows.tolist(),
                columns.serial[rows].tolist(),
                strict=True,
            )
        )


def lowest(keys: Sequence[NDArray[np.generic]], count: int) -> Rows:
    """Rows of the `count` lowest by the first key, among equals by the second, and so on; in no order. In linear
    time, however many are equal."""
    key = keys[0]
    if count >= len(key):
        return np.arange(len(key))
    bound = np.partition(key, count - 1)[count - 1]
    below = np.flatnonzero(key < bound)
    equal = np.flatnonzero(key == bound)
    missing = count - len(below)
    if len(keys) > 1 and missing < len(equal):
        equal = equal[lowest([each[equal] for each in keys[1:]], missing)]
    return np.concatenate((below, equal[:missing]))
