"""What the store asks of its disk tier: blocks by key, in and out of the blocks of its own memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from contracts.ids import BlockId
    from contracts.store_messages import CachedBlock, TierFigures


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptBlock:
    """A block of the store's memory that is to be written."""

    key: bytes
    block: BlockId
    #: In its sequence, counted from 0.
    position: int
    #: Its key is of the lossy class: it may go through a lossy codec.
    lossy: bool


class DiskTier(Protocol):
    """Nothing here raises for what a disk may do: a block that cannot be read is a miss, one that cannot be written is
    not stored. Blocks are whole and verified, or not there."""

    @property
    def problem(self) -> str:
        """Why it does not take blocks at the moment; empty: it does."""
        ...

    def has(self, keys: Sequence[bytes]) -> Sequence[bool]:
        """Whether each is believed to stand here; no I/O."""
        ...

    def all_keys(self) -> Iterable[bytes]: ...

    async def read(
        self, keys: Sequence[bytes], blocks: Sequence[BlockId], on_ready: Callable[[int, bool], None]
    ) -> None:
        """Copies each key's bytes to its block of the store's memory. `on_ready(index, is_there)` is called once for
        each, in any order: from then on nothing is written to that block any more."""
        ...

    async def write(self, blocks: Sequence[KeptBlock]) -> Sequence[bool]:
        """Stores blocks of one sequence; whether each stands here now. Their memory is not read any more then."""
        ...

    def describe(self, key: bytes, now_s: float) -> CachedBlock | None:
        """What operators are told of a block here; None: there is none."""
        ...

    def touch(self, keys: Sequence[bytes]) -> None:
        """Somebody asked for these."""
        ...

    def pin(self, keys: Sequence[bytes]) -> None:
        """What of it stands here is not given up until `unpin`."""
        ...

    def unpin(self, keys: Sequence[bytes]) -> None: ...

    def clear(self, *, with_pinned: bool) -> int:
        """Drops everything; how many blocks."""
        ...

    def figures(self) -> TierFigures | None:
        """None: there is no such tier."""
        ...


class NoDisk:
    """`DiskTier` of a store without one."""

    problem = "there is none"

    def has(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [False] * len(keys)

    def all_keys(self) -> Iterable[bytes]:
        return ()

    async def read(
        self, keys: Sequence[bytes], blocks: Sequence[BlockId], on_ready: Callable[[int, bool], None]
    ) -> None:
        for index in range(len(keys)):
            on_ready(index, False)

    async def write(self, blocks: Sequence[KeptBlock]) -> Sequence[bool]:
        return [False] * len(blocks)

    def describe(self, key: bytes, now_s: float) -> CachedBlock | None:
        return None

    def touch(self, keys: Sequence[bytes]) -> None:
        return

    def pin(self, keys: Sequence[bytes]) -> None:
        return

    def unpin(self, keys: Sequence[bytes]) -> None:
        return

    def clear(self, *, with_pinned: bool) -> int:
        return 0

    def figures(self) -> TierFigures | None:
        return None
