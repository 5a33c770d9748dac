"""A store's disk tier in memory: which keys stand there is what a test says, and no byte moves by itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.store_messages import CachedBlock, TierFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from contracts.ids import BlockId
    from kvstore.tiers.disk import KeptBlock

#: What a block weighs here, for figures alone.
BLOCK_BYTES = 64


class ModelDisk:
    """`DiskTier` whose reads and writes are the test's to perform. It outlives a store's life: `forget_life` is what
    the end of one does to it."""

    def __init__(self, keys: Iterable[bytes] = ()) -> None:
        #: Why it takes no blocks.
        self.problem = ""
        #: By key: whether what lies there can be read.
        self.stands: dict[bytes, bool] = dict.fromkeys(keys, True)
        self.pinned: set[bytes] = set()
        self.touched: list[bytes] = []
        #: As the store's shell: hears of what is given up.
        self.on_lost: Callable[[list[bytes]], None] = lambda _: None
        #: Keys whose last copy here was damaged, or was cleared although it was pinned.
        self.excused: set[bytes] = set()

    def put(self, key: bytes) -> None:
        self.stands[key] = True

    def damage(self, key: bytes) -> None:
        """It is believed to stand until somebody reads it."""
        self.stands[key] = False

    def drop(self, key: bytes) -> None:
        if not self.stands.pop(key):
            self.excused.add(key)
        self.pinned.discard(key)
        self.on_lost([key])

    def forget_life(self) -> None:
        self.pinned.clear()
        self.on_lost = lambda _: None

    # --- `DiskTier` ---------------------------------------------------------------------------------------

    def has(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return [key in self.stands for key in keys]

    def all_keys(self) -> Iterable[bytes]:
        return list(self.stands)

    async def read(
        self, keys: Sequence[bytes], blocks: Sequence[BlockId], on_ready: Callable[[int, bool], None]
    ) -> None:
        raise AssertionError("the machine performs no I/O")

    async def write(self, blocks: Sequence[KeptBlock]) -> Sequence[bool]:
        raise AssertionError("the machine performs no I/O")

    def describe(self, key: bytes, now_s: float) -> CachedBlock | None:
        if key not in self.stands:
            return None
        pinned = key in self.pinned
        return CachedBlock(key=key, tiers=("ssd",), position=0, hits=0, age_s=now_s, idle_s=now_s, pinned=pinned)

    def touch(self, keys: Sequence[bytes]) -> None:
        self.touched += keys

    def pin(self, keys: Sequence[bytes]) -> None:
        self.pinned.update(key for key in keys if key in self.stands)

    def unpin(self, keys: Sequence[bytes]) -> None:
        self.pinned.difference_update(keys)

    def clear(self, *, with_pinned: bool) -> int:
        if with_pinned:
            self.excused |= self.pinned
            self.pinned.clear()
        gone = [key for key in self.stands if key not in self.pinned]
        for key in gone:
            self.drop(key)
        return len(gone)

    def figures(self) -> TierFigures | None:
        used = len(self.stands) * BLOCK_BYTES
        return TierFigures(tier="ssd", capacity_bytes=2 * used, used_bytes=used, num_blocks=len(self.stands))
