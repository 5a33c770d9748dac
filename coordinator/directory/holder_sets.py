"""Sets of holders, each kept once, however many blocks share it: the blocks of one conversation have the same holders.

A set is a bit mask over marks (small numbers that stand for workers) and is known by its number; 0 is the empty set.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    SetNumbers = NDArray[np.int32]

_FIRST_CAPACITY = 64

#: Estimated: a mask of some words, its place in the list, and in the dictionary.
_MASK_BYTES = 160


class HolderSets:
    """Counts the blocks that refer to each set, and forgets a set that no block refers to."""

    def __init__(self, max_sets: int) -> None:
        self._max_sets = max_sets
        #: By number; 0 where a number is free.
        self._masks = [0]
        self._numbers = {0: 0}
        self._free: list[int] = []
        # By number.
        self._references = np.zeros(_FIRST_CAPACITY, np.int64)
        self._marked = np.zeros(_FIRST_CAPACITY, np.bool_)
        # Scratch of `rewrite`.
        self._position = np.zeros(_FIRST_CAPACITY, np.int64)
        self._successor = np.zeros(_FIRST_CAPACITY, np.int32)
        #: Blocks of which all holders but one were forgotten because there were too many different sets.
        self.num_cut = 0

    def __len__(self) -> int:
        """Sets in use, without the empty one."""
        return len(self._numbers) - 1

    @property
    def num_numbers(self) -> int:
        """Numbers in use are smaller."""
        return len(self._masks)

    @property
    def num_bytes(self) -> int:
        """Memory in use, estimated."""
        columns = (self._references, self._marked, self._position, self._successor)
        return len(self) * _MASK_BYTES + sum(column.nbytes for column in columns)

    def mask(self, number: int) -> int:
        return self._masks[number]

    def add(self, mask: int, num_blocks: int) -> int:
        """The number of this set of one holder, to which so many blocks more, at least one, refer now."""
        number = self._number_of(mask)
        self._references[number] += num_blocks
        return number

    def take_back(self, number: int, num_blocks: int) -> None:
        """So many blocks refer to it no more."""
        self._references[number] -= num_blocks
        self._release(number)

    def rewrite(self, numbers: SetNumbers, change: Callable[[int], int], keep: int = 0) -> SetNumbers:
        """Gives each of these references, all counted, the set that `change` makes of its own; what they refer to now.

        Where that would be one set too many, a block keeps only the holder of `keep`, or else any one.
        """
        if not len(numbers):
            return numbers
        index = numbers.astype(np.int64)
        if (index == index[0]).all():
            return np.full(len(numbers), self._move(int(index[0]), len(numbers), change, keep), np.int32)
        places = np.arange(len(index))
        self._position[index] = places
        # The last reference to each set, in place of sorting them.
        distinct = index[self._position[index] == places]
        self._position[distinct] = np.arange(len(distinct))
        counts = np.bincount(self._position[index])
        successors = [
            self._move(number, count, change, keep)
            for number, count in zip(distinct.tolist(), counts.tolist(), strict=True)
        ]
        self._successor[distinct] = successors
        return self._successor[index]

    def mark(self, start: int, stop: int, mask: int) -> bool:
        """Marks which of the sets with these numbers have a member in `mask`; whether any has.

        Marks stay until their set is forgotten: a new set has none.
        """
        is_any = False
        for number in range(start, min(stop, len(self._masks))):
            if self._masks[number] & mask:
                self._marked[number] = is_any = True
        return is_any

    def is_marked(self, numbers: SetNumbers) -> NDArray[np.bool_]:
        return self._marked.take(numbers)

    def check(self, numbers: SetNumbers) -> list[str]:
        """Audits the books against all references there are; what is wrong."""
        counts = np.bincount(numbers, minlength=len(self._masks))
        problems = [
            f"set {number}: {self._references[number]} references counted, {counts[number]} there"
            for number in range(1, len(self._masks))
            if self._references[number] != counts[number]
        ]
        used = {number: mask for number, mask in enumerate(self._masks) if mask}
        if {mask: number for number, mask in used.items()} | {0: 0} != self._numbers:
            problems.append("masks and their numbers disagree")
        if sorted([0, *used, *self._free]) != list(range(len(self._masks))):
            problems.append("numbers are lost or used twice")
        return problems

    def _move(self, number: int, count: int, change: Callable[[int], int], keep: int) -> int:
        """Moves so many references from a set to its successor."""
        mask = change(self._masks[number])
        successor = self._numbers.get(mask)
        if successor is None:
            if len(self) >= self._max_sets and mask & (mask - 1):
                mask = mask & keep or mask & -mask
                self.num_cut += count
            successor = self._number_of(mask)
        if successor != number:
            self._references[successor] += count
            self._references[number] -= count
            self._release(number)
        return successor

    def _number_of(self, mask: int) -> int:
        """The set's number; a new one, without references, where it has none."""
        number = self._numbers.get(mask)
        if number is None:
            if self._free:
                number = self._free.pop()
                self._masks[number] = mask
            else:
                number = len(self._masks)
                self._masks.append(mask)
                if number == len(self._references):
                    self._double()
            self._numbers[mask] = number
        return number

    def _release(self, number: int) -> None:
        """Forgets the set if nothing refers to it."""
        if number and not self._references[number]:
            del self._numbers[self._masks[number]]
            self._masks[number] = 0
            self._marked[number] = False
            self._free.append(number)

    def _double(self) -> None:
        self._references = np.concatenate((self._references, np.zeros_like(self._references)))
        self._marked = np.concatenate((self._marked, np.zeros_like(self._marked)))
        self._position = np.zeros(len(self._references), np.int64)
        self._successor = np.zeros(len(self._references), np.int32)
