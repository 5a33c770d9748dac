"""Which blocks of a worker's prefix cache its next life should begin with, and in which order. Pure.

Prompts are told as the keys of their blocks from the first one on, so that nobody uses a block more often than the one
before it. Uses fade with the number of prompts, as in TinyLFU (Einziger et al., ACM ToS 2017, section 3.3: all counters
are halved after so many additions). What is chosen are the blocks with the most uses; the order is that in which this
life first touched them, because the next one is likely to begin as this one did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldstart.snapshot.format import BlockEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

#: Uses are halved after so many prompts.
HALF_LIFE_PROMPTS = 1024
#: A block is shared, and worth keeping, from so many uses on.
LEAST_USES = 2.0
MAX_TRACKED = 65_536


@dataclass(slots=True)
class _Use:
    parent: bytes | None
    depth: int
    uses: float
    #: Of the first touch in this life; None: it is from an earlier one, and nobody touched it yet.
    first: int | None


class UseRecorder:
    """Not thread-safe. Memory is bounded by `max_tracked` blocks."""

    def __init__(self, *, half_life_prompts: int = HALF_LIFE_PROMPTS, max_tracked: int = MAX_TRACKED) -> None:
        self._half_life_prompts = half_life_prompts
        self._max_tracked = max_tracked
        #: Those from earlier lives first, in their order.
        self._known: dict[bytes, _Use] = {}
        self._touches = 0
        #: Prompts of this life.
        self.num_prompts = 0

    def __repr__(self) -> str:
        return f"<UseRecorder [{len(self._known)} blocks, {self.num_prompts} prompts]>"

    def note(self, keys: Sequence[bytes]) -> None:
        """A prompt uses the blocks with these keys: its first one and those after it. There may be none."""
        parent: bytes | None = None
        for depth, key in enumerate(keys):
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = _Use(parent, depth, 0.0, None)
            if found.first is None:
                found.first = self._touches
                self._touches += 1
            found.uses += 1.0
            parent = key
        self.num_prompts += 1
        if self.num_prompts % self._half_life_prompts == 0:
            self._fade()
        if len(self._known) > self._max_tracked:
            self._prune()

    def carry(self, blocks: Iterable[BlockEntry]) -> None:
        """From an earlier life, in its order and parents first; they count half. What this life knows already is
        only added to."""
        for block in blocks:
            found = self._known.get(block.key)
            if found is not None:
                found.uses += block.uses / 2
                continue
            parent = None if block.parent is None else self._known.get(block.parent)
            if block.parent is not None and parent is None:
                continue
            depth = 0 if parent is None else parent.depth + 1
            self._known[block.key] = _Use(block.parent, depth, block.uses / 2, None)

    def chosen(self, most: int, stands: Callable[[bytes], bool]) -> list[BlockEntry]:
        """At most so many of the blocks that stand, shared ones only, none without those before it, and each behind its
        parent. Changes nothing."""
        ranked = sorted(
            ((key, use) for key, use in self._known.items() if use.uses >= LEAST_USES and stands(key)),
            key=lambda each: (-each[1].uses, each[1].depth),
        )
        taken: dict[bytes, _Use] = {}
        for key, use in ranked:
            if len(taken) >= most:
                break
            if use.parent is None or use.parent in taken:
                taken[key] = use
        number = {key: position for position, key in enumerate(self._known)}

        def order(each: tuple[bytes, _Use]) -> tuple[int, int]:
            key, use = each
            return (0, use.first) if use.first is not None else (1, number[key])

        found: dict[bytes, BlockEntry] = {}
        for key, use in sorted(taken.items(), key=order):
            self._put(found, taken, key, use)
        return list(found.values())

    @staticmethod
    def _put(found: dict[bytes, BlockEntry], taken: dict[bytes, _Use], key: bytes, use: _Use) -> None:
        """Behind its parents, also where one of them was forgotten and touched anew."""
        missing = [(key, use)]
        while (parent := missing[-1][1].parent) is not None and parent not in found:
            missing.append((parent, taken[parent]))
        for each, its_use in reversed(missing):
            found.setdefault(each, BlockEntry(each, its_use.parent, its_use.uses))

    def _fade(self) -> None:
        for use in self._known.values():
            use.uses /= 2
        self._known = {key: use for key, use in self._known.items() if use.uses >= 0.5}

    def _prune(self) -> None:
        """To half, so that it is rare. What was used once is many, and can be used again."""
        self._known = {key: use for key, use in self._known.items() if use.uses >= LEAST_USES}
        most = self._max_tracked // 2
        if len(self._known) > most:
            order = sorted(self._known, key=lambda key: (-self._known[key].uses, self._known[key].depth))
            kept = set(order[:most])
            self._known = {key: use for key, use in self._known.items() if key in kept}
