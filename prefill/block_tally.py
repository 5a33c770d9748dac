"""How many different blocks a set of prompts holds, where prompts with one beginning share blocks."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from contracts.errors import InvariantBroken

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.ids import BlockId


class BlockTally:
    def __init__(self) -> None:
        #: Prompts by block; no count is 0.
        self._counts: Counter[BlockId] = Counter()

    def __len__(self) -> int:
        """Different blocks."""
        return len(self._counts)

    def __contains__(self, block: BlockId) -> bool:
        return block in self._counts

    def add(self, blocks: Iterable[BlockId]) -> int:
        """One prompt more holds these; how many of them nobody held."""
        before = len(self._counts)
        self._counts.update(blocks)
        return len(self._counts) - before

    def remove(self, blocks: Iterable[BlockId]) -> int:
        """One prompt fewer; how many nobody holds now. Raises InvariantBroken for blocks that were not held."""
        before = len(self._counts)
        for block in blocks:
            left = self._counts[block] - 1
            if left < 0:
                raise InvariantBroken(f"block {block} is not in the tally")
            if left:
                self._counts[block] = left
            else:
                del self._counts[block]
        return before - len(self._counts)
