"""The catalogue with what must be told and counted when blocks come and go."""

from __future__ import annotations

from collections import Counter, deque
from statistics import median
from typing import TYPE_CHECKING

from contracts.store_messages import TierFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.clock import Clock
    from kvstore.ssd.catalogue import Catalogue, Segment

#: Ages at eviction that the median is taken of.
_NUM_AGES = 1024


class Holdings:
    """`on_removed(keys, reason)` is called for all blocks that stood here and do not any more."""

    def __init__(self, catalogue: Catalogue, clock: Clock, on_removed: Callable[[Sequence[bytes], str], None]) -> None:
        self.catalogue = catalogue
        self._clock = clock
        self._on_removed = on_removed
        self._ages_s: deque[float] = deque(maxlen=_NUM_AGES)
        #: Blocks that went, by why; not stored, by why; asked for and not given, by why.
        self.removed: Counter[str] = Counter()
        self.refused: Counter[str] = Counter()
        self.missed: Counter[str] = Counter()
        self.num_hits = 0
        #: As they lie on disk.
        self.bytes_written = 0
        self.bytes_read = 0
        #: Files whose segment is given up but which still take room, and how much.
        self.to_delete: dict[str, int] = {}

    @property
    def taken_bytes(self) -> int:
        """By our segments, and files that are to go."""
        return self.catalogue.file_bytes + sum(self.to_delete.values())

    def drop(self, keys: Sequence[bytes], reason: str) -> int:
        """How many of them stood here."""
        catalogue, now_s = self.catalogue, self._clock.now_s()
        if keys:
            entries = catalogue.index.find(keys)
            self._ages_s.extend(catalogue.idle_s(entries[entries >= 0], now_s).tolist())
        gone = catalogue.remove(keys)
        if gone:
            self.removed[reason] += len(gone)
            self._on_removed(gone, reason)
        return len(gone)

    def drop_segment(self, segment: Segment, reason: str, *, file_is_there: bool = True) -> None:
        """Gives up a segment and all that stands in it; its file is to be deleted. Idempotent."""
        if not self.catalogue.holds(segment):
            return
        self.drop([location.key for location in self.catalogue.blocks_of(segment)], reason)
        self.catalogue.close_segment(segment)
        if file_is_there:
            self.to_delete[segment.path] = segment.num_bytes

    def forget_all(self) -> None:
        """As if nothing had been found; nobody is told, and no file is deleted."""
        for segment in list(self.catalogue.segments):
            self.catalogue.remove([location.key for location in self.catalogue.blocks_of(segment)])
            self.catalogue.close_segment(segment)
        self.to_delete.clear()

    def figures(self, *, size_bytes: int, problem: str) -> TierFigures:
        catalogue = self.catalogue
        return TierFigures(
            tier="ssd",
            capacity_bytes=size_bytes,
            used_bytes=sum(segment.tail for segment in catalogue.segments),
            num_blocks=catalogue.num_blocks,
            pinned_blocks=catalogue.num_pinned,
            hit_blocks=self.num_hits,
            missed_blocks=self.missed.total(),
            bytes_in={"dram": self.bytes_written} if self.bytes_written else {},
            bytes_out={"dram": self.bytes_read} if self.bytes_read else {},
            evicted=dict(self.removed),
            oldest_s=catalogue.longest_idle_s(self._clock.now_s()),
            evicted_age_s=median(self._ages_s) if self._ages_s else None,
            problem=problem,
        )
