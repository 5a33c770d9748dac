"""Which block stands under which key: whole keys in flat arrays, asked for in batches.

A Python dict of 32-byte keys costs over 110 bytes an entry; here it is 36 bytes and twice 12 for the table that finds
them, whose slots are half empty. A 64-bit hint (the first bytes of a key) finds the place, the whole key is compared.
Two keys with one hint cannot be made by chance, but someone may search for them; like those few that find no room in
the table they stand in a dict beside it, so every answer is right.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import InvariantBroken, NoCapacity
from kvstore.block_keys import KEY_BYTES
from kvstore.hint_table import HintTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from kvstore.hint_table import Slots

    Entries = NDArray[np.int64]
    Words = NDArray[np.uint64]

_WORDS = KEY_BYTES // 8


class KeyIndex:
    """Keys to entries: numbers from 0 on, dense, those of removed keys given out again, the last removed first. Not
    thread-safe. Growth never stops the world: the arrays are reserved at once and touched as they fill, and the table
    grows by a few buckets at a time (`HintTable`)."""

    def __init__(self, max_keys: int, seed: int = 0) -> None:
        """`seed` is that of the table's hash functions. Raises ValueError for a capacity that cannot be."""
        if not 1 <= max_keys < 2**31 - 1:
            raise ValueError(f"max_keys must be between 1 and 2^31 - 2, got {max_keys}")
        self._max_keys = max_keys
        #: By entry.
        self._keys = np.zeros((max_keys, _WORDS), np.uint64)
        self._is_used = np.zeros(max_keys, np.bool_)
        #: Entries given out before and free now, the next to give out last.
        self._freed: list[int] = []
        #: No entry from here on has been given out.
        self._num_touched = 0
        #: By hint, the entry and one more: 0 marks a free slot.
        self._table = HintTable(max_keys, seed)
        #: Keys that have no slot: see above.
        self._others: dict[bytes, int] = {}

    def __len__(self) -> int:
        return self._num_touched - len(self._freed)

    @property
    def num_bytes(self) -> int:
        """Memory in use; an estimate for the freed entries and the keys that stand beside the table."""
        row_bytes = self._keys.itemsize * _WORDS + self._is_used.itemsize
        return self._table.num_bytes + self._num_touched * row_bytes + 40 * len(self._freed) + 200 * len(self._others)

    def find(self, keys: Sequence[bytes] | bytes) -> Entries:
        """The entry of each key, -1 where there is none; `keys` may also be joined. Raises InvariantBroken where
        their lengths do not add up."""
        if len(keys) == 1 and isinstance(key := keys[0], bytes) and len(key) == KEY_BYTES:
            return np.array([self._find_one(key)], np.int64)
        words = _words(keys)
        return self._entries(words, self._table.find(_hints(words)))

    def num_leading(self, keys: Sequence[bytes] | bytes) -> int:
        """How many of the keys are here, up to the first that is not."""
        return num_leading(self.find(keys))

    def add(self, keys: Sequence[bytes] | bytes) -> Entries:
        """The entry of each key; those that are not here get one. Equal keys get equal entries.

        Raises NoCapacity, and adds nothing, where not all of them find room; InvariantBroken as `find`.
        """
        words = _words(keys)
        hints = _hints(words)
        slots = self._table.find(hints)
        found = self._entries(words, slots)
        missing = np.flatnonzero(found < 0)
        if not len(missing):
            return found
        new, same_as = missing, None
        # Keys with distinct hints are distinct, and without a slot so far each can have its own.
        clear = len(set(hints[missing].tolist())) == len(missing)
        if not clear:
            rows, same_as = _distinct(words[missing])
            new = missing[rows]
        if len(self) + len(new) > self._max_keys:
            raise NoCapacity(f"key index: {len(new)} new keys, {len(self)} of {self._max_keys} entries taken")
        entries = self._take(len(new))
        self._keys[entries] = words[new]
        self._is_used[entries] = True
        self._table.reserve(len(new))
        clear = clear and bool((slots[new] < 0).all())
        self._place(words[new], hints[new], entries, clear)
        found[missing] = entries if same_as is None else entries[same_as]
        return found

    def remove(self, keys: Sequence[bytes] | bytes) -> Entries:
        """Forgets the keys; the entry that each had, -1 for one that is not here (any more). Raises as `find`."""
        words = _words(keys)
        slots = self._table.find(_hints(words))
        found = self._entries(words, slots)
        here = np.flatnonzero(found >= 0)
        if len(here):
            # A key that is named twice is removed once.
            gone, first = np.unique(found[here], return_index=True)
            if len(gone) < len(here):
                found[np.delete(here, first)] = -1
                here = np.flatnonzero(found >= 0)
            self._displace(words[here], slots[here], found[here])
            self._is_used[found[here]] = False
            self._freed += found[here].tolist()
        return found

    def key_of(self, entry: int) -> bytes:
        """Raises InvariantBroken for an entry that no key has."""
        if not (0 <= entry < self._num_touched and self._is_used[entry]):
            raise InvariantBroken(f"key index: no key has entry {entry}; {len(self)} keys are here")
        key: bytes = self._keys[entry].tobytes()
        return key

    def entries(self) -> Entries:
        """All in use, ascending: a copy."""
        return np.flatnonzero(self._is_used[: self._num_touched])

    def _find_one(self, key: bytes) -> int:
        """As `find`, without arrays: many callers have one key."""
        slot = self._table.find_one(int.from_bytes(key[:8], sys.byteorder) or 1)
        if slot >= 0:
            entry = self._table.value(slot) - 1
            if self._keys[entry].tobytes() == key:
                return entry
        return self._others.get(key, -1)

    # --- places -----------------------------------------------------------------------------------------

    def _entries(self, words: Words, slots: Slots) -> Entries:
        """Of keys whose hints have these slots."""
        # Slot -1 reads some entry or other: a key that is here has its slot, or stands beside.
        found: Entries = self._table.values(slots).astype(np.int64)
        found -= 1
        is_wrong = (self._keys.take(found, axis=0, mode="wrap") != words).any(axis=1)
        is_wrong |= slots < 0
        found[is_wrong] = -1
        if self._others:
            for row in np.flatnonzero(is_wrong).tolist():
                found[row] = self._others.get(words[row].tobytes(), -1)
        return found

    def _take(self, num_entries: int) -> Entries:
        num_again = min(num_entries, len(self._freed))
        again = self._freed[len(self._freed) - num_again :]
        del self._freed[len(self._freed) - num_again :]
        fresh = range(self._num_touched, self._num_touched + num_entries - num_again)
        self._num_touched = fresh.stop
        return np.array([*reversed(again), *fresh], np.int64)

    def _place(self, words: Words, hints: Words, entries: Entries, clear: bool) -> None:
        """Gives distinct keys that are not here a slot each, or a place beside. `clear`: their hints are distinct,
        and not in the table."""
        values = (entries + 1).astype(np.int32)
        if clear and self._table.insert(hints, values) == len(hints):
            return
        if not clear:
            ours = np.unique(hints, return_index=True)[1]
            ours = ours[self._table.find(hints[ours]) < 0]
            self._table.insert(hints[ours], values[ours])
        has_slot = self._table.values(self._table.find(hints)) == values
        for row in np.flatnonzero(~has_slot).tolist():
            self._others[words[row].tobytes()] = int(entries[row])

    def _displace(self, words: Words, slots: Slots, entries: Entries) -> None:
        has_slot = (slots >= 0) & (self._table.values(slots) == entries + 1)
        self._table.erase(slots[has_slot])
        for row in np.flatnonzero(~has_slot).tolist():
            del self._others[words[row].tobytes()]


def _distinct(words: Words) -> tuple[list[int], list[int]]:
    """Rows of the distinct ones, in order, and for each row which of these it equals."""
    numbers: dict[bytes, int] = {}
    rows: list[int] = []
    same_as: list[int] = []
    for row, each in enumerate(words):
        number = numbers.setdefault(each.tobytes(), len(rows))
        if number == len(rows):
            rows.append(row)
        same_as.append(number)
    return rows, same_as


def num_leading(entries: Entries) -> int:
    """How many of the entries that `find` gave are there, up to the first that is not."""
    is_missing = entries < 0
    first = int(is_missing.argmax()) if len(entries) else 0
    return first if len(entries) and is_missing[first] else len(entries)


def _words(keys: Sequence[bytes] | bytes) -> Words:
    joined = keys if isinstance(keys, bytes) else b"".join(keys)
    num_keys, rest = divmod(len(joined), KEY_BYTES)
    if rest or (joined is not keys and num_keys != len(keys)):
        raise InvariantBroken(f"key index: {len(joined)} bytes of keys; each key has {KEY_BYTES}")
    return np.frombuffer(joined, np.uint64).reshape(-1, _WORDS)


def _hints(words: Words) -> Words:
    """Never 0, which marks a free slot of the table; the whole key decides anyway."""
    return np.maximum(words[:, 0], 1)
