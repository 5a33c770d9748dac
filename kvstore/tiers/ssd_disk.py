"""The disk tier over the blocks of a store's memory pool, with the codec that is right for it."""

from __future__ import annotations

import asyncio
import secrets
from contextlib import suppress
from typing import TYPE_CHECKING

from contracts.store_messages import CachedBlock
from kvstore.codecs import CODECS, make_codec
from kvstore.codecs.choice import choose_codec, measure_codec
from kvstore.ssd.codec import RAW
from kvstore.ssd.live_files import LiveFiles
from kvstore.ssd.records import StoredBlock
from kvstore.ssd.settings import SsdSettings
from kvstore.ssd.tier import SsdTier

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from pathlib import Path

    from contracts.clock import Clock
    from contracts.config import CodecName
    from contracts.ids import BlockId
    from contracts.layout import BlockLayout, KvIdentity
    from contracts.store_messages import TierFigures
    from kvstore.codecs.choice import CodecChoice
    from kvstore.ssd.codec import BlockCodec
    from kvstore.ssd.files import BlockFiles
    from kvstore.tiers.disk import KeptBlock
    from kvtransfer import Pool

#: What a disk is taken to do as long as it has not been measured: an ordinary NVMe drive.
USUAL_BYTES_PER_S = 2e9
#: Written and read once where that is to be measured; its name is that of no segment.
PROBE_PATH = "probe.tmp"
PROBE_BYTES = 16 << 20
_LOSSY = tuple(kind.name for kind in CODECS.values() if kind.lossy)


class SsdDisk:
    """`kvstore.tiers.disk.DiskTier`. `on_lost` hears of blocks that were given up, `on_found` of those that were found
    later than at the start."""

    def __init__(self, pool: Pool) -> None:
        self._memory = pool.view()
        self._block_bytes = pool.block_bytes
        self.on_lost: Callable[[Iterable[bytes]], None] = lambda keys: None
        self.on_found: Callable[[Iterable[bytes]], None] = lambda keys: None
        #: Set by `open_disk`, for good.
        self.tier: SsdTier

    @property
    def num_blocks(self) -> int:
        return self.tier.figures().num_blocks

    @property
    def problem(self) -> str:
        return self.tier.problem

    def removed(self, keys: Sequence[bytes], reason: str) -> None:
        self.on_lost(keys)

    def found(self, keys: Sequence[bytes]) -> None:
        self.on_found(keys)

    def has(self, keys: Sequence[bytes]) -> Sequence[bool]:
        return self.tier.has(keys).tolist() if keys else ()

    def all_keys(self) -> Iterable[bytes]:
        return self.tier.all_keys()

    async def read(
        self, keys: Sequence[bytes], blocks: Sequence[BlockId], on_ready: Callable[[int, bool], None]
    ) -> None:
        await self.tier.read(keys, [self._view(block) for block in blocks], on_ready)

    async def write(self, blocks: Sequence[KeptBlock]) -> Sequence[bool]:
        return await self.tier.write(
            [
                StoredBlock(key=each.key, position=each.position, payload=self._view(each.block), lossy=each.lossy)
                for each in blocks
            ]
        )

    def describe(self, key: bytes, now_s: float) -> CachedBlock | None:
        (known,) = self.tier.describe((key,))
        if known is None:
            return None
        kind = CODECS.get(known.codec)
        return CachedBlock(
            key=key,
            tiers=("ssd",),
            position=known.position,
            hits=known.hits,
            age_s=known.age_s,
            idle_s=known.idle_s,
            pinned=known.is_pinned,
            codec="unknown" if kind is None else kind.name,
            num_bytes=known.num_bytes,
        )

    def touch(self, keys: Sequence[bytes]) -> None:
        self.tier.touch(keys)

    def pin(self, keys: Sequence[bytes]) -> None:
        self.tier.pin(keys)

    def unpin(self, keys: Sequence[bytes]) -> None:
        self.tier.unpin(keys)

    def clear(self, *, with_pinned: bool) -> int:
        return self.tier.clear(with_pinned=with_pinned)

    def figures(self) -> TierFigures | None:
        return self.tier.figures()

    async def close(self) -> None:
        await self.tier.close()

    def _view(self, block: BlockId) -> memoryview:
        start = block * self._block_bytes
        return self._memory[start : start + self._block_bytes]


async def open_disk(
    folder: Path,
    identity: KvIdentity,
    pool: Pool,
    *,
    size_bytes: int,
    codec: CodecName,
    direct: bool,
    clock: Clock,
    thread_time_s: Callable[[], float],
    log: Callable[[str], None],
) -> SsdDisk:
    """Finds what stands in the folder. What a disk does wrong is told, and ends nothing: the tier is empty then, and
    tries again. `thread_time_s` tells a thread's processor time, by which codecs are measured. Raises ConfigError for a
    size that holds no blocks."""
    files = LiveFiles(folder, direct=direct)
    name, reason = str(codec), f"{codec}, as configured"
    if codec == "auto":
        bytes_per_s = await measured_bytes_per_s(files, clock)
        choice = await asyncio.to_thread(_choose, identity.layout, bytes_per_s, thread_time_s)
        name, reason = choice.name, choice.reason
    log(f"disk tier at {folder}, blocks of the lossy class as {reason}")
    disk = SsdDisk(pool)
    # In a thread: whoever is the first on a machine has the codecs' inner loop compiled.
    readable: list[BlockCodec] = await asyncio.to_thread(lambda: [make_codec(each, identity.layout) for each in _LOSSY])
    disk.tier = SsdTier(
        files=files,
        clock=clock,
        identity=identity,
        settings=SsdSettings(size_bytes=size_bytes),
        name=str(folder),
        block_bytes=pool.block_bytes,
        seed=secrets.randbits(63),
        codecs=readable,
        exact=RAW,
        lossy=RAW if name == RAW.name else make_codec(name, identity.layout),
        on_removed=disk.removed,
        on_found=disk.found,
        log=log,
    )
    await disk.tier.start()
    if disk.tier.problem:
        log(f"WARNING: nothing is kept on disk: {disk.tier.problem}")
    return disk


def _choose(layout: BlockLayout, bytes_per_s: float, thread_time_s: Callable[[], float]) -> CodecChoice:
    """Which codec blocks of the lossy class get, and why."""
    costs = [measure_codec(each, layout, thread_time_s) for each in (RAW.name, *_LOSSY)]
    return choose_codec(costs, bytes_per_s)


async def measured_bytes_per_s(files: BlockFiles, clock: Clock) -> float:
    """How fast this disk reads; what is usual where it cannot be told."""
    try:
        await files.claim()
        with suppress(FileNotFoundError):
            await files.remove(PROBE_PATH)
        await files.make(PROBE_PATH, PROBE_BYTES)
        try:
            await files.write(PROBE_PATH, 0, files.buffer(PROBE_BYTES))
            await files.sync(PROBE_PATH)
            began_s = clock.now_s()
            await files.read(PROBE_PATH, 0, PROBE_BYTES, len)
            return PROBE_BYTES / max(clock.now_s() - began_s, 1e-6)
        finally:
            await files.remove(PROBE_PATH)
    except OSError:
        return USUAL_BYTES_PER_S
