"""Prefixes that a worker in a study keeps in host memory, beside the KV pool on its device.

Blocks are those of the workload's hash ids: two prompts share as many as their ids have equal leading ones. KV comes
from host memory to the device while the step before computes, so a hit costs no time. Least recently used blocks
go first; of one prompt the last before the first, so that what stays is a prefix.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray


# As arrays: what turns a number into one takes as long as an operation on some dozens of hints.
_OFFSET = np.array(0x9E3779B97F4A7C15, np.uint64)
_ROUNDS = tuple(
    (np.array(shift, np.uint64), np.array(factor, np.uint64))
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
)
_LAST_SHIFT = np.array(31, np.uint64)
_NO_HINTS = np.zeros(0, np.uint64)


class PrefixCache:
    """Blocks by hash id, and what of it the coordinator was not told yet."""

    def __init__(self, capacity_blocks: int, on_change: Callable[[], None]) -> None:
        """`on_change` is called when the first change since the last `take_changes` happens."""
        self.capacity_blocks = capacity_blocks
        self._on_change = on_change
        #: The least recently used first.
        self._blocks: OrderedDict[int, None] = OrderedDict()
        #: Hash ids that came (True) or went since the last `take_changes`.
        self._changes: dict[int, bool] = {}

    def __len__(self) -> int:
        return len(self._blocks)

    def leading(self, hash_ids: Sequence[int], most: int | None = None) -> int:
        """How many of the leading ones are here, `most` at the most."""
        blocks = self._blocks
        count = 0
        for hash_id in hash_ids[:most]:
            if hash_id not in blocks:
                break
            count += 1
        return count

    def use(self, hash_ids: Sequence[int]) -> None:
        """Those of them that are here were used just now."""
        blocks = self._blocks
        for hash_id in reversed(hash_ids):
            if hash_id in blocks:
                blocks.move_to_end(hash_id)

    def put(self, hash_ids: Sequence[int]) -> None:
        """Stores a part of a prefix, and lets others go for it. Those that are here count as used."""
        blocks, changes, capacity = self._blocks, self._changes, self.capacity_blocks
        for hash_id in reversed(hash_ids[:capacity]):
            if hash_id in blocks:
                blocks.move_to_end(hash_id)
                continue
            if not changes:
                self._on_change()
            if len(blocks) >= capacity:
                gone = blocks.popitem(last=False)[0]
                # Of what came and was not told it is as before.
                if changes.pop(gone, False) is False:
                    changes[gone] = False
            blocks[hash_id] = None
            if changes.pop(hash_id, True) is True:
                changes[hash_id] = True

    def forget(self) -> None:
        """All of it, and nobody is told: its holder's life is over."""
        self._blocks.clear()
        self._changes.clear()

    def take_changes(self) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
        """Hints of the blocks that came and of those that went since the last call."""
        changes, self._changes = self._changes, {}
        stored = [hash_id for hash_id, present in changes.items() if present]
        if len(stored) == len(changes):
            return hints_of(stored), _NO_HINTS
        dropped = [hash_id for hash_id, present in changes.items() if not present]
        return hints_of(stored) if stored else _NO_HINTS, hints_of(dropped)


def hints_of(hash_ids: Sequence[int]) -> NDArray[np.uint64]:
    """A number of 64 bits for each, which looks as random as a block key does (the finaliser of splitmix64)."""
    mixed = np.array(hash_ids, np.uint64)
    mixed += _OFFSET
    for shift, factor in _ROUNDS:
        mixed ^= mixed >> shift
        mixed *= factor
    mixed ^= mixed >> _LAST_SHIFT
    return mixed
