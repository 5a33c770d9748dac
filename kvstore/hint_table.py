"""A hash table from 64-bit hints to small numbers, in flat arrays, that never stops the world.

Two-choice hashing (d-left: Broder and Mitzenmacher, 2001): a hint has one bucket of eight slots in each of two halves
and goes into the emptier one. Looking a hint up reads exactly two cache lines, erasing it leaves no tombstone, and
no chain can form: where both buckets are full the hint is not stored.

Linear hashing (Litwin, 1980): the table grows by one bucket after the other, each handing about half of what it holds
to a new one. So growth costs every hint the same little, at the time when it is stored, and there is only ever
one place to look. The arrays are reserved at their final size; what no bucket has touched costs no memory.
"""

from __future__ import annotations

from random import Random
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hints = NDArray[np.uint64]
    Slots = NDArray[np.int64]
    Values = NDArray[np.int32]

#: Eight keys are one cache line.
BUCKET_SLOTS = 8
PAIR_SLOTS = 2 * BUCKET_SLOTS

#: Share of slots in use beyond which the table grows. Buckets that are not split yet are fuller than the others; still,
#: at this load less than one hint in ten millions finds both its buckets full (measured).
LARGEST_LOAD = 0.45

#: Buckets of each half of an empty table.
_FIRST_PAIRS = 4

#: Split at once, at most: bounds what a split copies.
_SPLIT_PAIRS = 4096
#: Split at least, as long as that is no more than this part of all: a split of a few takes as long as one of many.
_FEWEST_PAIRS = 64
_PART_OF_ALL = 16

#: Of a product the upper bits are good: more bits of the hint have reached them.
_HASH_BITS = 24
# Numbers are arrays here: what turns a number into one takes as long as an operation on some dozens of hints.
_DOUBLE_SHIFT_BITS = 64 - _HASH_BITS - 1
_DOUBLE_SHIFT = np.array(_DOUBLE_SHIFT_BITS, np.uint64)
_ALL_BITS = 2**64 - 1

_BYTE_SUM = np.array(0x0101010101010101, np.uint64)
_TOP_BYTE = np.array(56, np.uint64)
#: What tells the buckets of both halves apart.
_HALVES = np.array([[0], [1]])
_SLOTS = np.array(BUCKET_SLOTS)
_SLOT_BITS, _SLOT_MASK = np.array(BUCKET_SLOTS.bit_length() - 1), np.array(BUCKET_SLOTS - 1)


class HintTable:
    """Hints are not 0, which marks a free slot; values are not 0 by the same token. Slots are good until the next
    `reserve`. Not thread-safe."""

    def __init__(self, max_hints: int, seed: int) -> None:
        """Of `seed` come the hash functions: unknown to clients, who might make prompts that collide."""
        self._max_pairs = max(_FIRST_PAIRS, _pairs_for(max_hints))
        if self._max_pairs > 2**_HASH_BITS:
            raise ValueError(f"max_hints is {max_hints}; a table addresses {2**_HASH_BITS} pairs of buckets")
        #: By pair of buckets, half, slot.
        self._keys = np.zeros((self._max_pairs, 2, BUCKET_SLOTS), np.uint64)
        self._values = np.zeros((self._max_pairs, 2, BUCKET_SLOTS), np.int32)
        # The same memory, by bucket and by slot.
        self._key_buckets = self._keys.reshape(-1, BUCKET_SLOTS)
        self._flat_keys = self._keys.reshape(-1)
        self._flat_values = self._values.reshape(-1)

        rng = Random(seed)
        #: For one hint, and for many: with Python's numbers one takes a seventh of the time of an array's operations.
        self._multiplier_pair = (rng.getrandbits(64) | 1, rng.getrandbits(64) | 1)
        self._multipliers = np.array([[each] for each in self._multiplier_pair], np.uint64)
        self.num_hints = 0
        #: Pairs when the current doubling began; those from `num_pairs - base` to `base` are still to be split.
        self._base_pairs = _FIRST_PAIRS
        self._has_grown(_FIRST_PAIRS)

    @property
    def num_slots(self) -> int:
        return self.num_pairs * PAIR_SLOTS

    @property
    def num_bytes(self) -> int:
        """Memory in use."""
        return self.num_slots * (self._flat_keys.itemsize + self._flat_values.itemsize)

    def find(self, hints: Hints) -> Slots:
        """The slot of each hint; -1 where it is not here."""
        buckets = self._buckets(hints)
        cells = self._key_buckets.take(buckets, axis=0)
        # A bucket holds a hint at most once.
        is_equal: NDArray[np.bool_] = cells == hints[:, None]
        places = is_equal.ravel().nonzero()[0]
        rows = places >> _SLOT_BITS
        places &= _SLOT_MASK
        found = buckets.take(rows)
        found *= _SLOTS
        found += places
        slots = np.empty(2 * len(hints), np.int64)
        slots.fill(-1)
        slots[rows] = found
        either: Slots = np.maximum(slots[: len(hints)], slots[len(hints) :])
        return either

    def find_one(self, hint: int) -> int:
        """As `find`."""
        for half, multiplier in enumerate(self._multiplier_pair):
            double = (hint * multiplier & _ALL_BITS) >> _DOUBLE_SHIFT_BITS & 2 * (2 * self._base_pairs - 1)
            if double >= 2 * self.num_pairs:
                double -= 2 * self._base_pairs
            bucket = double + half
            hints: list[int] = self._key_buckets[bucket].tolist()
            if hint in hints:
                return bucket * BUCKET_SLOTS + hints.index(hint)
        return -1

    def value(self, slot: int) -> int:
        return int(self._flat_values[slot])

    def values(self, slots: Slots) -> Values:
        return self._flat_values.take(slots)

    def set_values(self, slots: Slots, values: Values | int) -> None:
        self._flat_values[slots] = values

    def scan(self, start: int, num_slots: int) -> Values:
        """The values of the slots from there on: a window; 0 where a slot is free."""
        return self._flat_values[start : min(start + num_slots, self.num_slots)]

    def reserve(self, num_hints: int) -> None:
        """Grows, where that is needed and possible, for so many more hints. Slots found before mean nothing now."""
        wanted = min(_pairs_for(self.num_hints + num_hints), self._max_pairs)
        if self.num_pairs < wanted:
            fewest = min(_FEWEST_PAIRS, self.num_pairs // _PART_OF_ALL)
            wanted = min(max(wanted, self.num_pairs + fewest), self._max_pairs)
        while self.num_pairs < wanted:
            self._split(min(wanted - self.num_pairs, 2 * self._base_pairs - self.num_pairs, _SPLIT_PAIRS))

    def insert(self, hints: Hints, values: Values | int) -> int:
        """Stores distinct hints that are not here, all with one value or each with its own; how many found room."""
        each_own = None if isinstance(values, int) else values
        buckets = self._buckets(hints)
        num_before = self.num_hints
        while len(hints):
            free: NDArray[np.bool_] = self._key_buckets.take(buckets, axis=0) == 0
            room = (free.view(np.uint64).reshape(2, -1) * _BYTE_SUM) >> _TOP_BYTE
            columns = np.arange(len(hints))
            picked = np.where(room[1] > room[0], columns + len(hints), columns)
            first_free = free.reshape(-1, BUCKET_SLOTS).take(picked, axis=0).argmax(axis=1)
            slots = buckets.take(picked) * BUCKET_SLOTS + first_free
            has_room: NDArray[np.bool_] = np.bitwise_or(room[0], room[1]).astype(np.bool_)
            # Asked like this it takes a tenth of the time of `all`.
            if 0 in has_room.tobytes():
                slots, hints, buckets = slots[has_room], hints[has_room], buckets[:, has_room]
                each_own = None if each_own is None else each_own[has_room]
            # Of several that picked the same slot the last one written has it; the others try again.
            self._flat_keys[slots] = hints
            lost: NDArray[np.bool_] = np.not_equal(self._flat_keys.take(slots), hints)
            self._flat_values[slots] = values if each_own is None else each_own
            num_lost = int(np.count_nonzero(lost))
            self.num_hints += len(hints) - num_lost
            if not num_lost:
                break
            hints, buckets = hints[lost], buckets[:, lost]
            each_own = None if each_own is None else each_own[lost]
        return self.num_hints - num_before

    def erase(self, slots: Slots) -> None:
        """Frees distinct slots in use."""
        self._flat_keys[slots] = 0
        self._flat_values[slots] = 0
        self.num_hints -= len(slots)

    def _buckets(self, hints: Hints) -> NDArray[np.int64]:
        """Of each hint, for each half, its bucket: twice the number of its pair, and one more for the second half."""
        doubles = hints * self._multipliers
        doubles >>= _DOUBLE_SHIFT
        doubles &= self._double_mask
        # What will belong to a new bucket lives in the old one until that is split.
        doubles -= (doubles >= self._double_pairs) * self._double_base
        buckets = doubles.view(np.int64)
        buckets += _HALVES
        return buckets

    def _has_grown(self, num_pairs: int) -> None:
        self.num_pairs = num_pairs
        if num_pairs == 2 * self._base_pairs:
            self._base_pairs = num_pairs
        self._double_mask = np.array(2 * (2 * self._base_pairs - 1), np.uint64)
        self._double_pairs = np.array(2 * num_pairs, np.uint64)
        self._double_base = np.array(2 * self._base_pairs, np.uint64)

    def _split(self, num_pairs: int) -> None:
        """Moves what belongs there from the next pairs to be split to new pairs at the end, into the same slots."""
        first = self.num_pairs - self._base_pairs
        old = slice(first, first + num_pairs)
        new = slice(self.num_pairs, self.num_pairs + num_pairs)
        hashes = self._keys[old] * self._multipliers
        hashes >>= _DOUBLE_SHIFT
        moves = (hashes & self._double_base) != 0
        for column in (self._keys, self._values):
            np.copyto(column[new], column[old], where=moves)
            column[old][moves] = 0
        self._has_grown(self.num_pairs + num_pairs)


def _pairs_for(num_hints: int) -> int:
    return int(num_hints / (PAIR_SLOTS * LARGEST_LOAD)) + 1
