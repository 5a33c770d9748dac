"""What left not long ago, so that its coming back is noticed: a ring of flat arrays, and a dict to find it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from kvstore.eviction.reuse import classes, watched_s

if TYPE_CHECKING:
    from kvstore.eviction.reuse import Floats, Ints, ReuseModel

#: Remembered for each entry of the tier: what comes back later than after so many turnovers is like new.
PER_ENTRY = 8
#: Remembered at most, about 150 bytes each; of a larger tier a sample is, chosen by key hint.
MOST = 2**18

#: Odd, of no pattern: spreads hints that are not hashes, too.
_SPREAD = 0x9E3779B97F4A7C15
_ALL = 2**64


class Ghosts:
    """Remembers what was evicted, and tells a `ReuseModel` what became of it."""

    def __init__(self, capacity_entries: int, model: ReuseModel, most: int = MOST) -> None:
        self._model = model
        wanted = PER_ENTRY * capacity_entries
        size = min(wanted, most)
        #: Each stands for so many.
        self.weight = wanted / size
        self._sampled_below = int(_ALL / self.weight)
        self._hints = np.zeros(size, np.uint64)
        self._used_s = np.zeros(size)
        self._hits = np.zeros(size, np.int32)
        self._is_inner = np.zeros(size, np.bool_)
        self._waits = np.zeros(size, np.bool_)
        self._slots: dict[int, int] = {}
        self._next = 0
        #: Told to the model together: hits, whether inner, and age of those that came back, and of those that did not.
        self._back: list[tuple[int, bool, float]] = []
        self._over: list[tuple[int, bool, float]] = []

    def __len__(self) -> int:
        return len(self._slots)

    def left(self, key_hint: int, last_used_s: float, hits: int, is_inner: bool, now_s: float) -> None:
        """An entry was evicted; a key hint of 0 is nobody's."""
        if not key_hint or (key_hint * _SPREAD) % _ALL >= self._sampled_below:
            return
        slot = self._next
        self._next = (slot + 1) % len(self._hints)
        if self._waits[slot]:
            # It has been watched for long enough.
            del self._slots[int(self._hints[slot])]
            self._over.append(self._one(slot, now_s))
        former = self._slots.get(key_hint)
        if former is not None:
            # Another block with this hint, for a block that comes back is asked for first.
            self._waits[former] = False
        self._slots[key_hint] = slot
        self._hints[slot], self._used_s[slot], self._waits[slot] = key_hint, last_used_s, True
        self._hits[slot], self._is_inner[slot] = hits, is_inner

    def come_back(self, key_hint: int, now_s: float) -> int | None:
        """Forgets it: an entry with this hint is stored. Its hits before it left; None if it is not remembered."""
        slot = self._slots.pop(key_hint, None)
        if slot is None:
            return None
        self._waits[slot] = False
        self._back.append(self._one(slot, now_s))
        return int(self._hits[slot])

    def hits(self, key_hint: int) -> int | None:
        """Before it left; None if it is not remembered."""
        slot = self._slots.get(key_hint)
        return None if slot is None else int(self._hits[slot])

    def tell(self, now_s: float) -> Floats:
        """Tells the model what became of ghosts since the last time; `reuse.watched_s` of those that wait."""
        if self._back:
            self._model.reused(*_columns(self._back), self.weight)
        if self._over:
            self._model.watched(*_columns(self._over), self.weight)
        self._back, self._over = [], []
        slots = np.flatnonzero(self._waits)
        waiting = watched_s(classes(self._hits[slots], self._is_inner[slots]), now_s - self._used_s[slots])
        return self.weight * waiting

    def _one(self, slot: int, now_s: float) -> tuple[int, bool, float]:
        return int(self._hits[slot]), bool(self._is_inner[slot]), now_s - float(self._used_s[slot])


def _columns(rows: list[tuple[int, bool, float]]) -> tuple[Ints, Floats]:
    """Classes and ages."""
    hits, is_inner, ages_s = zip(*rows, strict=True)
    return classes(np.array(hits), np.array(is_inner)), np.array(ages_s)
