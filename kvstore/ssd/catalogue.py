"""Which block stands where on disk, and what is known of it: flat columns by the entry number of its key."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import InvariantBroken
from kvstore.index import KeyIndex
from kvstore.ssd.format import BLOCK_ALIGN, segment_path, split_keys
from kvstore.ssd.reclaim import BlockColumns, SegmentColumns

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

#: Slot of what stands nowhere.
_NOWHERE = 0
_MOST_HITS = 2**16 - 1
#: Sums of worths are kept in a unit that is made larger before they overflow.
_MOST_EXPONENT = 512.0


@dataclass(slots=True, eq=False, kw_only=True)
class Segment:
    """One file. `slot` names it in the columns."""

    slot: int
    sequence: int
    path: str
    num_bytes: int
    #: Where the next record begins.
    tail: int = 0
    #: Records that are being written to it.
    num_writing: int = 0
    #: Of blocks: all that were stored in it, those that still stand there, and those of them that are pinned.
    stored_bytes: int = 0
    live_bytes: int = 0
    pinned_bytes: int = 0
    num_live: int = 0
    #: Of blocks that are not pinned.
    worth: float = 0.0
    #: Entries of its records; some may stand elsewhere or nowhere by now.
    entries: list[NDArray[np.uint32]] = field(default_factory=list["NDArray[np.uint32]"])

    @property
    def may_go(self) -> bool:
        """It has been begun, and nothing is on its way there."""
        return self.tail > 0 and self.num_writing == 0

    @property
    def pinned_file_bytes(self) -> int:
        """What pinned blocks would take elsewhere, with headers and all."""
        return self.pinned_bytes * self.tail // self.stored_bytes if self.stored_bytes else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Location:
    """A copy: still true of the bytes when the block has been moved or given up meanwhile."""

    key: bytes
    entry: int
    segment: Segment
    offset: int
    length: int
    codec: int
    position: int
    checksum: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is known of one block."""

    #: In its sequence.
    position: int
    hits: int
    age_s: float
    idle_s: float
    is_pinned: bool
    codec: int
    #: As it lies on disk.
    num_bytes: int


class Catalogue:
    """Times are given as `now_s`; nothing here does I/O. About 45 bytes a block beside its key in the index; columns
    are reserved at once and take memory as they fill."""

    def __init__(self, max_blocks: int, identity: bytes, *, half_life_bytes: int, now_s: float, seed: int = 0) -> None:
        """A block's worth halves whenever `half_life_bytes` of others were stored. `seed` is that of the index: see
        `KeyIndex`."""
        self.index = KeyIndex(max_blocks, seed)
        self._identity = identity
        self._half_life_bytes = half_life_bytes
        #: Half-lives that have passed.
        self._age = 0.0
        self._origin_s = now_s
        #: Exponent of the unit of `Segment.worth`.
        self._unit = 0.0
        self._segments: dict[int, Segment] = {}
        self._free_slots: list[int] = []
        self.num_blocks = 0
        self.num_pinned = 0
        #: No entry from here on was ever used.
        self._num_touched = 0
        #: The slot, `_NOWHERE` where none has it.
        self._segment = np.zeros(max_blocks, np.uint32)
        #: Bytes from the segment's begin, over BLOCK_ALIGN.
        self._start = np.zeros(max_blocks, np.uint32)
        self._length = np.zeros(max_blocks, np.uint32)
        self._position = np.zeros(max_blocks, np.uint32)
        self._codec = np.zeros(max_blocks, np.uint8)
        self._checksum = np.zeros(max_blocks, np.uint64)
        self._hits = np.zeros(max_blocks, np.uint16)
        self._pinned = np.zeros(max_blocks, np.bool_)
        #: Since the origin; a quarter of a second exact for a month.
        self._stored_s = np.zeros(max_blocks, np.float32)
        self._used_s = np.zeros(max_blocks, np.float32)
        self._log_worth = np.zeros(max_blocks, np.float32)

    # --- questions --------------------------------------------------------------------------------

    @property
    def segments(self) -> Iterable[Segment]:
        return self._segments.values()

    @property
    def file_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self._segments.values())

    def holds(self, segment: Segment) -> bool:
        """It has not been given up."""
        return self._segments.get(segment.slot) is segment

    def has(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        return self.index.find(keys) >= 0

    def keys(self) -> Iterator[bytes]:
        """Of all blocks; a copy of the state as it is now."""
        for entry in np.flatnonzero(self._segment[: self._num_touched] != _NOWHERE):
            yield self.index.key_of(int(entry))

    def locate(self, keys: Sequence[bytes]) -> list[Location | None]:
        entries = self.index.find(keys)
        return [
            None if entry < 0 else self._location(key, entry) for key, entry in zip(keys, entries.tolist(), strict=True)
        ]

    def stands_at(self, location: Location) -> bool:
        """The block has neither been given up nor moved since."""
        entry = int(self.index.find([location.key])[0])
        return (
            entry >= 0
            and self._segments.get(int(self._segment[entry])) is location.segment
            and int(self._start[entry]) * BLOCK_ALIGN == location.offset
        )

    def blocks_of(self, segment: Segment) -> list[Location]:
        """In the order they stand."""
        entries = self._entries_of(segment)
        return [self._location(self.index.key_of(entry), entry) for entry in entries.tolist()]

    def block_columns(self, segment: Segment) -> BlockColumns:
        """Parallel to `blocks_of`."""
        entries = self._entries_of(segment)
        return BlockColumns(
            length=self._length[entries].astype(np.int64),
            pinned=self._pinned[entries],
            hits=self._hits[entries].astype(np.int64),
            log_worth=self._log_worth[entries].astype(np.float64),
        )

    def segment_columns(self, segments: Sequence[Segment]) -> SegmentColumns:
        return SegmentColumns(
            num_bytes=np.array([segment.num_bytes for segment in segments], np.int64),
            live_bytes=np.array([segment.live_bytes for segment in segments], np.int64),
            pinned_bytes=np.array([segment.pinned_file_bytes for segment in segments], np.int64),
            worth=np.array([segment.worth for segment in segments], np.float64),
            sequence=np.array([segment.sequence for segment in segments], np.int64),
        )

    def mean_log_worth(self) -> float:
        """Binary logarithm of the mean worth of a block that is not pinned."""
        num_loose = self.num_blocks - self.num_pinned
        total = sum(segment.worth for segment in self._segments.values())
        return math.log2(total / num_loose) + self._unit if num_loose > 0 and total > 0 else -math.inf

    def idle_s(self, entries: NDArray[np.int64], now_s: float) -> NDArray[np.float64]:
        """Since somebody asked for them, or they were stored."""
        return np.maximum(now_s - self._origin_s - self._used_s[entries].astype(np.float64), 0.0)

    def longest_idle_s(self, now_s: float) -> float | None:
        standing = np.flatnonzero(self._segment[: self._num_touched] != _NOWHERE)
        return float(self.idle_s(standing, now_s).max()) if standing.size else None

    def describe(self, keys: Sequence[bytes], now_s: float) -> list[Description | None]:
        """For people; None for those that are not here."""
        since_s = now_s - self._origin_s
        return [
            None
            if entry < 0
            else Description(
                position=int(self._position[entry]),
                hits=int(self._hits[entry]),
                age_s=max(since_s - float(self._stored_s[entry]), 0.0),
                idle_s=max(since_s - float(self._used_s[entry]), 0.0),
                is_pinned=bool(self._pinned[entry]),
                codec=int(self._codec[entry]),
                num_bytes=int(self._length[entry]),
            )
            for entry in self.index.find(keys).tolist()
        ]

    def is_pinned(self, keys: Sequence[bytes]) -> NDArray[np.bool_]:
        entries = self.index.find(keys)
        known = entries >= 0
        known[known] = self._pinned[entries[known]]
        return known

    # --- changes ----------------------------------------------------------------------------------

    def open_segment(self, sequence: int, num_bytes: int) -> Segment:
        slot = self._free_slots.pop() if self._free_slots else len(self._segments) + 1
        path = segment_path(self._identity, sequence)
        segment = self._segments[slot] = Segment(slot=slot, sequence=sequence, path=path, num_bytes=num_bytes)
        return segment

    def close_segment(self, segment: Segment) -> None:
        """No block stands in it any more."""
        del self._segments[segment.slot]
        self._free_slots.append(segment.slot)

    def record(
        self, segment: Segment, offset: int, rows: NDArray[np.void], now_s: float, *, age_s: float = 0.0
    ) -> None:
        """A record stands at `offset` of the segment. Its blocks stand there from now on, also those that stood
        elsewhere, which keep what is known of them. Raises NoCapacity where there are too many, and changes nothing."""
        keys = split_keys(rows)
        if len(set(keys)) < len(keys):
            raise InvariantBroken(f"a record of {segment.path} has a block twice")
        entries = self.index.add(keys)
        known = self._segment[entries] != _NOWHERE
        self._num_touched = max(self._num_touched, int(entries.max()) + 1)
        if known.any():
            self._account(entries[known], -1)
        new = entries[~known]
        self.num_blocks += len(new)
        self._segment[entries] = segment.slot
        self._start[entries] = (offset + rows["start"].astype(np.int64)) // BLOCK_ALIGN
        self._length[entries] = rows["length"]
        self._position[entries] = rows["position"]
        self._codec[entries] = rows["codec"]
        self._checksum[entries] = rows["checksum"]
        self._stored_s[new] = self._used_s[new] = now_s - self._origin_s - age_s
        num_bytes = int(rows["length"].sum())
        self._age += num_bytes / self._half_life_bytes
        self._log_worth[new] = self._age
        self._hits[new] = 0
        self._pinned[new] = False
        self._account(entries, 1)
        segment.stored_bytes += num_bytes
        segment.entries.append(entries.astype(np.uint32))

    def touch(self, keys: Sequence[bytes], now_s: float) -> None:
        """Somebody asked for these; what of them is not here is passed over."""
        entries = self._known(keys)
        self._account(entries, -1)
        self._used_s[entries] = now_s - self._origin_s
        self._hits[entries] = np.minimum(self._hits[entries].astype(np.int64) + 1, _MOST_HITS)
        self._log_worth[entries] = np.logaddexp2(self._log_worth[entries].astype(np.float64), self._age)
        self._account(entries, 1)

    def pin(self, keys: Sequence[bytes], *, pinned: bool) -> None:
        entries = self._known(keys)
        entries = entries[self._pinned[entries] != pinned]
        self._account(entries, -1)
        self._pinned[entries] = pinned
        self._account(entries, 1)
        self.num_pinned += len(entries) if pinned else -len(entries)

    def remove(self, keys: Sequence[bytes]) -> list[bytes]:
        """Which of them stood here."""
        entries = self._known(keys)
        gone = [self.index.key_of(entry) for entry in entries.tolist()]
        self._account(entries, -1)
        self.num_pinned -= int(self._pinned[entries].sum())
        self._segment[entries] = _NOWHERE
        self._pinned[entries] = False
        self.num_blocks -= len(entries)
        if gone:
            self.index.remove(gone)
        return gone

    # --- inside -----------------------------------------------------------------------------------

    def _known(self, keys: Sequence[bytes]) -> NDArray[np.int64]:
        if not keys:
            return np.zeros(0, np.int64)
        entries = np.unique(self.index.find(keys))
        return entries[entries >= 0]

    def _entries_of(self, segment: Segment) -> NDArray[np.int64]:
        if not segment.entries:
            return np.zeros(0, np.int64)
        entries = np.unique(np.concatenate(segment.entries)).astype(np.int64)
        entries = entries[self._segment[entries] == segment.slot]
        order: NDArray[np.intp] = np.argsort(self._start[entries], kind="stable")
        return np.asarray(entries[order], np.int64)

    def _location(self, key: bytes, entry: int) -> Location:
        return Location(
            key=key,
            entry=entry,
            segment=self._segments[int(self._segment[entry])],
            offset=int(self._start[entry]) * BLOCK_ALIGN,
            length=int(self._length[entry]),
            codec=int(self._codec[entry]),
            position=int(self._position[entry]),
            checksum=int(self._checksum[entry]),
        )

    def _account(self, entries: NDArray[np.int64], sign: int) -> None:
        """Adds blocks to the sums of their segments, or takes them away. Each entry once."""
        if entries.size == 0:
            return
        self._rebase(float(self._log_worth[entries].max()))
        pinned = self._pinned[entries]
        lengths = self._length[entries].astype(np.int64)
        worths = np.where(pinned, 0.0, np.exp2(self._log_worth[entries].astype(np.float64) - self._unit))
        slots = self._segment[entries]
        for slot in set(slots.tolist()):
            segment, here = self._segments[slot], slots == slot
            segment.num_live += sign * int(np.count_nonzero(here))
            segment.live_bytes += sign * int(lengths[here].sum())
            segment.pinned_bytes += sign * int(lengths[here & pinned].sum())
            # Rounding must leave nothing behind, and no debt.
            segment.worth = max(segment.worth + sign * float(worths[here].sum()), 0.0) if segment.num_live else 0.0

    def _rebase(self, log_worth: float) -> None:
        if log_worth - self._unit < _MOST_EXPONENT:
            return
        for segment in self._segments.values():
            segment.worth *= 2.0 ** max(self._unit - log_worth, -1000.0)
        self._unit = log_worth
