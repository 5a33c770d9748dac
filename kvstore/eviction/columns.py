"""What a policy may know of the entries of one tier: a row of flat columns each, about 60 bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Rows = NDArray[np.int64]
    Mask = NDArray[np.bool_]

#: In `need`: no waiting request needs it.
NOT_NEEDED = -1
#: In `parent`: the block before it is not in this tier, or it is the first of its sequence.
NO_PARENT = -1


class Columns:
    """By entry. Policies read; `Eviction` alone writes. A row means something while `is_stored`."""

    def __init__(self, capacity_entries: int) -> None:
        self.is_stored = np.zeros(capacity_entries, np.bool_)
        #: When it was stored or last hit.
        self.last_used_s = np.zeros(capacity_entries)
        #: Hits so far, those of an earlier stay included where they are remembered.
        self.hits = np.zeros(capacity_entries, np.int32)
        #: Uses (being stored is one), aged up to the last of them: see `lfu_aged`.
        self.aged_uses = np.zeros(capacity_entries, np.float32)
        #: In its sequence, in blocks.
        self.position = np.zeros(capacity_entries, np.int32)
        self.size_bytes = np.zeros(capacity_entries, np.uint32)
        #: What it would take to compute it again.
        self.recompute_s = np.zeros(capacity_entries, np.float32)
        #: Rank of the first waiting request that needs it, 0 the next one.
        self.need = np.full(capacity_entries, NOT_NEEDED, np.int32)
        #: Another block was stored behind it, maybe gone by now: it is not where sequences end.
        self.is_inner = np.zeros(capacity_entries, np.bool_)
        #: What another store of the same block is known by; 0: unknown.
        self.key_hint = np.zeros(capacity_entries, np.uint64)
        #: Entry of the block before it; it means nothing where `serial` of that is not `parent_serial` any more.
        self.parent = np.full(capacity_entries, NO_PARENT, np.int32)
        self.parent_serial = np.zeros(capacity_entries, np.uint32)
        #: Of entries in the order of being stored; tells an entry from a later one with its number.
        self.serial = np.zeros(capacity_entries, np.uint32)
        #: Entries stored here whose parent it is.
        self.num_children = np.zeros(capacity_entries, np.int32)
        #: No entry from here on was ever stored.
        self.num_touched = 0

    def has_parent(self, rows: Rows) -> Mask:
        """Whose parent is in this tier still."""
        parents = self.parent.take(rows)
        stands: Mask = self.is_stored.take(parents, mode="wrap")
        stands &= self.serial.take(parents, mode="wrap") == self.parent_serial.take(rows)
        stands &= parents != NO_PARENT
        return stands

    def is_orphan(self, rows: Rows) -> Mask:
        """Whose parent was in this tier and is not any more: no prompt can reach them here."""
        orphan: Mask = ~self.has_parent(rows)
        orphan &= self.parent.take(rows) != NO_PARENT
        return orphan

    def parent_of(self, entry: int) -> int:
        """`NO_PARENT` where it has none in this tier."""
        parent = int(self.parent[entry])
        if parent == NO_PARENT or not self.is_stored[parent] or self.serial[parent] != self.parent_serial[entry]:
            return NO_PARENT
        return parent
