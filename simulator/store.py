"""A store's memory and disk for simulated clusters: blocks are what modelled engines keep, I/O takes virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from contracts.store_messages import CachedBlock, TierFigures

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

    from contracts.ids import BlockId
    from kvstore.tiers.disk import KeptBlock
    from simulator.engine import BlockContent


class BlockMemory(Protocol):
    def read_block(self, block_id: BlockId) -> BlockContent: ...

    def write_block(self, block_id: BlockId, content: BlockContent) -> None: ...


class StoreMemory:
    """`kvtransfer.memory.BlockStore` without an engine."""

    def __init__(self, num_blocks: int, block_tokens: int) -> None:
        empty: BlockContent = (None,) * block_tokens
        self._blocks: list[BlockContent] = [empty] * num_blocks

    def read_block(self, block_id: BlockId) -> BlockContent:
        return self._blocks[block_id]

    def write_block(self, block_id: BlockId, content: BlockContent) -> None:
        self._blocks[block_id] = content


@dataclass(slots=True, kw_only=True)
class StoreDiskSpec:
    """Of the order of an SSD."""

    num_blocks: int = 1_000
    latency_s: float = 0.0002
    block_s: float = 0.0001
    #: Of blocks that are read, so many turn out to be damaged; of writes, so many find no room.
    damaged_chance: float = 0.0
    full_chance: float = 0.0


class StoreDisk:
    """What outlasts a store's lives: blocks by key, oldest first. A block is there whole or not at all."""

    def __init__(self, spec: StoreDiskSpec, rng: random.Random) -> None:
        self.spec = spec
        self.rng = rng
        self.blocks: dict[bytes, tuple[BlockContent, int]] = {}
        self.pinned: set[bytes] = set()

    def mount(self, memory: BlockMemory) -> ModelledDisk:
        """For one life."""
        return ModelledDisk(self, memory)


class ModelledDisk:
    """`kvstore.tiers.disk.DiskTier` of one life of a store."""

    problem = ""

    def __init__(self, disk: StoreDisk, memory: BlockMemory) -> None:
        self._disk = disk
        self._memory = memory
        #: Hears of blocks that were given up.
        self.on_lost: Callable[[Iterable[bytes]], None] = lambda keys: None

    def has(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [key in self._disk.blocks for key in keys]

    def all_keys(self) -> Iterable[bytes]:
        return tuple(self._disk.blocks)

    async def read(
        self, keys: Sequence[bytes], blocks: Sequence[BlockId], on_ready: Callable[[int, bool], None]
    ) -> None:
        spec = self._disk.spec
        await asyncio.sleep(spec.latency_s)
        for index, (key, block) in enumerate(zip(keys, blocks, strict=True)):
            await asyncio.sleep(spec.block_s)
            found = self._disk.blocks.get(key)
            if found is not None and self._disk.rng.random() < spec.damaged_chance:
                self._drop([key])
                found = None
            if found is not None:
                self._memory.write_block(block, found[0])
            on_ready(index, found is not None)

    async def write(self, blocks: Sequence[KeptBlock]) -> Sequence[bool]:
        spec = self._disk.spec
        await asyncio.sleep(spec.latency_s + len(blocks) * spec.block_s)
        stored: list[bool] = []
        for each in blocks:
            has_room = self._make_room() and self._disk.rng.random() >= spec.full_chance
            if has_room:
                self._disk.blocks[each.key] = (self._memory.read_block(each.block), each.position)
            stored.append(has_room)
        return stored

    def describe(self, key: bytes, now_s: float) -> CachedBlock | None:
        found = self._disk.blocks.get(key)
        if found is None:
            return None
        return CachedBlock(key=key, tiers=("ssd",), position=found[1], hits=0, age_s=0.0, idle_s=0.0)

    def touch(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            if key in self._disk.blocks:
                self._disk.blocks[key] = self._disk.blocks.pop(key)

    def pin(self, keys: Sequence[bytes]) -> None:
        self._disk.pinned |= {key for key in keys if key in self._disk.blocks}

    def unpin(self, keys: Sequence[bytes]) -> None:
        self._disk.pinned.difference_update(keys)

    def clear(self, *, with_pinned: bool) -> int:
        keys = [key for key in self._disk.blocks if with_pinned or key not in self._disk.pinned]
        self._drop(keys)
        return len(keys)

    def figures(self) -> TierFigures | None:
        return TierFigures(
            tier="ssd",
            capacity_bytes=self._disk.spec.num_blocks,
            used_bytes=len(self._disk.blocks),
            num_blocks=len(self._disk.blocks),
        )

    def _make_room(self) -> bool:
        while len(self._disk.blocks) >= self._disk.spec.num_blocks:
            oldest = next((key for key in self._disk.blocks if key not in self._disk.pinned), None)
            if oldest is None:
                return False
            self._drop([oldest])
        return True

    def _drop(self, keys: Sequence[bytes]) -> None:
        for key in keys:
            del self._disk.blocks[key]
            self._disk.pinned.discard(key)
        self.on_lost(keys)
