"""Which workers are believed to hold which blocks: from the hints of a prompt to the part of it that each worker has.

Blocks are known by 64-bit hints. They stand in a flat table whose values are numbers of holder sets, each kept once.
Within the sets a worker is a mark, which it loses with all its blocks at once when it goes or begins anew; what still
carries a lost mark is swept bit by bit, and nobody sees it meanwhile. Nothing here takes time in proportion to all
blocks: growing and sweeping ride along with each change.
"""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from coordinator.directory.holder_sets import HolderSets
from kvstore.hint_table import HintTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from coordinator.directory.hints import Hints
    from kvstore.hint_table import Slots

    Counts = NDArray[np.int32]
    #: Of blocks that follow each other and have the same holders: where each begins, and its set's number; 0 where
    #: the blocks are not known.
    Runs = list[tuple[int, int]]

#: Looked up at once: the rest of a long prompt only where all of this is known.
_WINDOW_HINTS = 512

#: How many prompts' beginnings are looked up at once.
_WINDOWS_AT_ONCE = 16

#: Changed at once, at most: a larger batch would crowd into few buckets.
_BATCH_HINTS = 16384

#: Swept with each change, and for each hint of it; so that lost marks cannot pile up without end.
_SWEPT_PER_CHANGE = 4096
_SWEPT_PER_HINT = 4

#: What looking at a set costs, compared with looking at a slot.
_SLOTS_PER_SET = 16

#: Members up to which a set is taken apart bit by bit.
_FEW_MEMBERS = 8

#: As an array: what turns a number into one takes as long as comparing some dozens of hints with it.
_LEAST_HINT = np.array(1, np.uint64)


class Match(NamedTuple):
    """How much of a prompt's beginning is believed to be where."""

    #: By worker number: leading blocks held. Length: `Directory.num_numbers`.
    counts: Counts
    #: The different counts above 0, rising. There are few: workers have parts of a prompt in common.
    lengths: tuple[int, ...]

    @property
    def best(self) -> int:
        """The largest count."""
        return self.lengths[-1] if self.lengths else 0


class Directory:
    """Hints are only hints: beyond `max_blocks` they are dropped and counted, and equal hints are one block. Hint 0
    is taken for hint 1. Not thread-safe."""

    def __init__(self, max_blocks: int, *, max_sets: int = 1_000_000, seed: int = 0) -> None:
        """`seed`: of the table's hash functions, see `HintTable`. Beyond `max_sets` different sets of holders a block
        keeps only its newest one."""
        if max_blocks < 1:
            raise ValueError(f"max_blocks is {max_blocks}; a directory knows at least one")
        self.max_blocks = max_blocks
        #: Hints that were not stored because there was no room.
        self.num_dropped = 0
        self._table = HintTable(max_blocks, seed)
        self._sets = HolderSets(max_sets)

        #: By worker number: the mark of what it holds, and of what it will hold once a replacement is complete.
        self._marks: dict[int, int] = {}
        self._staged: dict[int, int] = {}
        #: By mark, for those in `_live`.
        self._number_of = np.zeros(0, np.int64)
        self._live = 0
        self._free_marks: list[int] = []
        #: Marks that any block carries or may still carry.
        self._carried = 0
        #: Lost marks: those that the sweep in progress removes, and those that wait for the next one.
        self._sweeping = 0
        self._waiting = 0
        self._swept_sets = self._sets_to_sweep = 0
        self._swept_slots = 0
        self._is_any_marked = False
        #: Length of counts.
        self.num_numbers = 0

    # --- figures ---

    @property
    def num_blocks(self) -> int:
        """Blocks known, with those that lost their last holder and are not swept yet."""
        return self._table.num_hints

    @property
    def num_cut(self) -> int:
        """Blocks that lost all holders but one because there were too many different sets."""
        return self._sets.num_cut

    @property
    def num_sets(self) -> int:
        """Different sets of holders."""
        return len(self._sets)

    @property
    def num_bytes(self) -> int:
        """Memory in use, estimated."""
        return self._table.num_bytes + self._sets.num_bytes

    # --- workers ---

    def free_number(self) -> int:
        """The smallest number that no worker has."""
        return next(number for number in range(len(self._marks) + 1) if number not in self._marks)

    def add_worker(self, number: int) -> None:
        """A worker that holds nothing. Raises ValueError when the number is in use."""
        if number < 0 or number in self._marks:
            raise ValueError(f"worker number {number} is in use" if number >= 0 else f"worker number {number} < 0")
        self.num_numbers = max(self.num_numbers, number + 1)
        self._put(number, self._new_mark())

    def remove_worker(self, number: int) -> None:
        """Its number is free at once. Raises KeyError when there is no such worker."""
        self._take(number)
        self._abandon(number)

    # --- what they hold ---

    def store(self, number: int, hints: Hints) -> None:
        """The worker holds these blocks (too). Raises KeyError when there is no such worker."""
        self._store(self._marks[number], hints)

    def drop(self, number: int, hints: Hints) -> None:
        """The worker holds these blocks no more. Raises KeyError when there is no such worker."""
        bit = 1 << self._marks[number]
        for start in range(0, len(hints), _BATCH_HINTS):
            batch = _distinct(hints[start : start + _BATCH_HINTS])
            slots = self._table.find(batch)
            self._rewrite(slots[slots >= 0], remove=bit)
            self._keep_up(len(batch))

    def replace(self, number: int, hints: Hints) -> None:
        """The worker holds exactly these blocks. Raises KeyError when there is no such worker."""
        self.begin(number)
        self.stage(number, hints)
        self.commit(number)

    def begin(self, number: int) -> None:
        """Begins a replacement in several parts, in place of one that was not completed. What the worker holds stays
        known until `commit`. Raises KeyError when there is no such worker."""
        if number not in self._marks:
            raise KeyError(number)
        self._abandon(number)
        self._staged[number] = self._new_mark()

    def stage(self, number: int, hints: Hints) -> None:
        """A part of what the worker will hold. Raises KeyError when nothing was begun."""
        self._store(self._staged[number], hints)

    def commit(self, number: int) -> None:
        """From now on the worker holds exactly what was staged. Raises KeyError when nothing was begun."""
        mark = self._staged.pop(number)
        self._take(number)
        self._put(number, mark)

    def match(self, hints: Hints) -> Match:
        """How many of these blocks, from the first on, each worker holds."""
        return self.match_each([hints])[0]

    def match_each(self, prompts: Sequence[Hints]) -> list[Match]:
        """Of each of these prompts how much each worker holds; what all begin with is looked up together."""
        if not self._table.num_hints:
            return [Match(np.zeros(self.num_numbers, np.int32), ()) for _ in prompts]
        firsts = [hints[:_WINDOW_HINTS] for hints in prompts]
        found: list[Match] = []
        num_done = 0
        while num_done < len(firsts):
            # More at once would not stay in the processor's cache.
            stops = list(accumulate(len(first) for first in firsts[num_done : num_done + _WINDOWS_AT_ONCE]))
            together = firsts[num_done] if len(stops) == 1 else np.concatenate(firsts[num_done : num_done + len(stops)])
            runs = self._runs(together, [0, *stops[:-1]])
            found += map(self._match, prompts[num_done : num_done + len(stops)], runs)
            num_done += len(stops)
        return found

    def _runs(self, hints: Hints, starts: list[int]) -> list[Runs]:
        """By prompt, of those that stand one behind the other and begin at `starts`."""
        slots = self._table.find(np.maximum(hints, _LEAST_HINT))
        sets = self._table.values(slots)
        sets *= slots >= 0
        is_first = np.ones(len(hints) + 1, np.bool_)
        np.not_equal(sets[1:], sets[:-1], out=is_first[1:-1])
        is_first[starts] = True
        firsts = is_first[:-1].nonzero()[0]
        stops = [len(firsts)] if len(starts) == 1 else [*firsts.searchsorted(starts[1:]).tolist(), len(firsts)]
        places, numbers = firsts.tolist(), sets[firsts].tolist()
        runs: list[Runs] = []
        begun = 0
        for start, stop in zip(starts, stops, strict=True):
            runs.append([(places[index] - start, numbers[index]) for index in range(begun, stop)])
            begun = stop
        return runs

    def _match(self, hints: Hints, runs: Runs) -> Match:
        """`runs` of the first window."""
        counts = np.zeros(self.num_numbers, np.int32)
        lengths: list[int] = []
        holders = self._live
        start = 0
        while holders:
            for place, number in runs:
                still = holders & self._sets.mask(number)
                if still != holders:
                    self._count(holders ^ still, start + place, counts, lengths)
                    holders = still
                    if not holders:
                        break
            start += _WINDOW_HINTS
            if not holders or start >= len(hints):
                break
            runs = self._runs(hints[start : start + _WINDOW_HINTS], [0])[0]
        if holders:
            self._count(holders, len(hints), counts, lengths)
        return Match(counts, tuple(lengths))

    # --- upkeep ---

    def sweep(self, max_slots: int) -> bool:
        """Forgets about so many slots' worth of what workers held that went or began anew. True while there is more."""
        if not self._sweeping:
            if not self._waiting:
                return False
            self._sweeping, self._waiting = self._waiting, 0
            self._swept_sets, self._sets_to_sweep = 0, self._sets.num_numbers
            self._swept_slots = 0
            self._is_any_marked = False
        # Sets made from now on have no lost marks, and what a growing table moves it moves towards its end: one pass
        # over the sets that are here and one over the slots find everything.
        if self._swept_sets < self._sets_to_sweep:
            stop = min(self._swept_sets + max_slots // _SLOTS_PER_SET + 1, self._sets_to_sweep)
            self._is_any_marked |= self._sets.mark(self._swept_sets, stop, self._sweeping)
            self._swept_sets = stop
        elif self._is_any_marked and self._swept_slots < self._table.num_slots:
            is_marked = self._sets.is_marked(self._table.scan(self._swept_slots, max_slots))
            self._rewrite(is_marked.nonzero()[0] + self._swept_slots)
            self._swept_slots += max_slots
        else:
            self._carried &= ~self._sweeping
            for mark in _members(self._sweeping):
                heappush(self._free_marks, mark)
            self._sweeping = 0
        return bool(self._sweeping or self._waiting)

    def check(self) -> list[str]:
        """Audits the books; what is wrong. Takes time in proportion to all blocks."""
        values = self._table.scan(0, self._table.num_slots)
        used = values[values != 0]
        problems = self._sets.check(used)
        if len(used) != self._table.num_hints:
            problems.append(f"{self._table.num_hints} blocks counted, {len(used)} there")
        return problems

    def _store(self, mark: int, hints: Hints) -> None:
        bit = 1 << mark
        self._carried |= bit
        for start in range(0, len(hints), _BATCH_HINTS):
            batch = _distinct(hints[start : start + _BATCH_HINTS])
            slots = self._table.find(batch)
            is_here = slots >= 0
            self._rewrite(slots[is_here], add=bit)
            self._insert(batch[~is_here], bit)
            self._keep_up(len(batch))

    def _insert(self, hints: Hints, bit: int) -> None:
        has_room = hints[: self.max_blocks - self.num_blocks]
        self.num_dropped += len(hints) - len(has_room)
        if len(has_room):
            self._table.reserve(len(has_room))
            number = self._sets.add(bit, len(has_room))
            num_lost = len(has_room) - self._table.insert(has_room, number)
            self._sets.take_back(number, num_lost)
            self.num_dropped += num_lost

    def _rewrite(self, slots: Slots, add: int = 0, remove: int = 0) -> None:
        """Changes the holders of these distinct blocks, and forgets lost marks and blocks without a holder."""
        if not len(slots):
            return
        keep = ~(remove | self._sweeping | self._waiting)
        numbers = self._sets.rewrite(self._table.values(slots), lambda mask: mask & keep | add, add)
        self._table.set_values(slots, numbers)
        if not numbers.all():
            self._table.erase(slots[numbers == 0])

    def _keep_up(self, num_hints: int) -> None:
        if self._sweeping or self._waiting:
            self.sweep(_SWEPT_PER_CHANGE + _SWEPT_PER_HINT * num_hints)

    # --- marks ---

    def _new_mark(self) -> int:
        if self._free_marks:
            return heappop(self._free_marks)
        self._number_of = np.append(self._number_of, 0)
        return len(self._number_of) - 1

    def _lose(self, mark: int) -> None:
        """What carries the mark is nobody's any more."""
        if self._carried >> mark & 1:
            self._waiting |= 1 << mark
        else:
            heappush(self._free_marks, mark)

    def _put(self, number: int, mark: int) -> None:
        self._marks[number] = mark
        self._number_of[mark] = number
        self._live |= 1 << mark

    def _take(self, number: int) -> None:
        mark = self._marks.pop(number)
        self._live &= ~(1 << mark)
        self._lose(mark)

    def _abandon(self, number: int) -> None:
        mark = self._staged.pop(number, None)
        if mark is not None:
            self._lose(mark)

    def _count(self, holders: int, count: int, counts: Counts, lengths: list[int]) -> None:
        """Writes down how much these hold."""
        if not count:
            return
        lengths.append(count)
        if holders.bit_count() <= _FEW_MEMBERS:
            for mark in _members(holders):
                counts[self._number_of[mark]] = count
        else:
            bits = np.frombuffer(holders.to_bytes((holders.bit_length() + 7) // 8, "little"), np.uint8)
            counts[self._number_of[np.unpackbits(bits, bitorder="little").nonzero()[0]]] = count


def _members(mask: int) -> list[int]:
    members: list[int] = []
    while mask:
        lowest = mask & -mask
        members.append(lowest.bit_length() - 1)
        mask ^= lowest
    return members


def _distinct(hints: Hints) -> Hints:
    """Sorted, and 0, which the table cannot hold, as 1."""
    hints = np.sort(np.maximum(hints, _LEAST_HINT))
    repeats = hints[1:] == hints[:-1]
    # Asked like this it takes a tenth of the time of `any`.
    return hints[np.append(True, ~repeats)] if 1 in repeats.tobytes() else hints
