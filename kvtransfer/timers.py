"""Deadlines and retry delays of the lease machines."""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

K = TypeVar("K")

FIRST_RETRY_S = 0.05
LONGEST_RETRY_S = 1.0


def retry_delay_s(failures: int) -> float:
    """How long to wait after the n-th failure in a row (n >= 1): doubling, bounded."""
    return min(LONGEST_RETRY_S, FIRST_RETRY_S * 2.0 ** min(failures - 1, 16))


class Deadlines(Generic[K]):
    """When each key is due next: one time per key, O(log n) each."""

    def __init__(self) -> None:
        #: key -> (due_s, ticket) of its one valid entry in the heap; other entries are leftovers.
        self._valid: dict[K, tuple[float, int]] = {}
        self._heap: list[tuple[float, int, K]] = []
        self._next_ticket = 0

    def __len__(self) -> int:
        return len(self._valid)

    def set(self, key: K, due_s: float) -> None:
        """Replaces the key's time. Among equal times the one set first is due first."""
        if key in self._valid and self._valid[key][0] == due_s:
            return
        self._valid[key] = (due_s, self._next_ticket)
        heapq.heappush(self._heap, (due_s, self._next_ticket, key))
        self._next_ticket += 1
        if len(self._heap) > 64 + 4 * len(self._valid):
            self._heap = [(due, ticket, kept) for kept, (due, ticket) in self._valid.items()]
            heapq.heapify(self._heap)

    def discard(self, key: K) -> None:
        self._valid.pop(key, None)

    def next_s(self) -> float | None:
        """The earliest time; None when nothing is due ever."""
        while self._heap and self._valid.get(self._heap[0][2]) != self._heap[0][:2]:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop_due(self, now_s: float) -> list[K]:
        """Removes and returns the keys due by `now_s`, earliest first."""
        due: list[K] = []
        while (next_s := self.next_s()) is not None and next_s <= now_s:
            key = heapq.heappop(self._heap)[2]
            del self._valid[key]
            due.append(key)
        return due
