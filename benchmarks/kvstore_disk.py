"""Part `ssd` of `benchmarks.kvstore`: the disk tier, taking turns with raw reads and writes of the same disk.

Tier: prefixes of 112 blocks are written through `SsdTier.write` until they are safe from a crash, and come back through
`SsdTier.read` into host memory, verified. Raw: a loop as fio's, threads that read or write large pieces past the page
cache, of which the best of a few sizes and numbers of threads counts; its file has its room before the clock starts.
Written data is synced (fdatasync) within the time on both sides. Raw reads are of the tier's own files, in pieces at
places of their own choice.

Besides, what the tier takes of the processor: it checks and copies every byte, the raw loop does not look at them.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import random
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import uvloop

from benchmarks.kvstore_blocks import BLOCK_BYTES, IDENTITY, PREFIX_BLOCKS, kv_like, prefix_keys
from benchmarks.report import print_table, spread
from cluster.child_main import SWITCH_INTERVAL_S
from kvstore.ssd.live_files import LiveFiles
from kvstore.ssd.records import StoredBlock
from kvstore.ssd.settings import SsdSettings
from kvstore.ssd.tier import SsdTier
from rpc import LiveClock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from numpy.typing import NDArray

MIB = 2**20
PREFIX_BYTES = PREFIX_BLOCKS * BLOCK_BYTES
#: Piece and number of threads of a raw loop.
RAW_WAYS = tuple((piece * MIB, threads) for piece in (1, 4) for threads in (1, 2, 4, 8))
#: Those that take turns with the tier: the best of all in a first look at each.
NUM_FINALISTS = 2
#: Prefixes that are read at a time: a store serves several fetches at once.
AT_ONCE = (1, 2, 4)
#: Bytes of a first look.
LOOK_BYTES = 64 * MIB


@dataclass(slots=True)
class Timed:
    """GB/s of each round, and processor seconds for each GB."""

    rates: list[float] = field(default_factory=list[float])
    cpu_s_per_gb: list[float] = field(default_factory=list[float])

    def add(self, num_bytes: int, took_s: float, cpu_s: float) -> None:
        self.rates.append(num_bytes / took_s / 1e9)
        self.cpu_s_per_gb.append(cpu_s / num_bytes * 1e9)


# --- raw ----------------------------------------------------------------------------------------------------


def in_threads(jobs: Sequence[Callable[[memoryview], None]], way: tuple[int, int]) -> tuple[float, float]:
    """Wall and processor seconds. Each thread takes the next job, with a page-aligned buffer of its own."""
    piece, num_threads = way
    waiting, guard, begin = iter(jobs), threading.Lock(), threading.Event()
    are_ready = threading.Barrier(num_threads + 1)

    def work() -> None:
        buffer = memoryview(mmap.mmap(-1, piece))
        buffer[:] = np.random.default_rng(threading.get_ident()).bytes(piece)
        are_ready.wait()
        begin.wait()
        while True:
            with guard:
                job = next(waiting, None)
            if job is None:
                return
            job(buffer)

    with ThreadPoolExecutor(num_threads) as threads:
        running = [threads.submit(work) for _ in range(num_threads)]
        are_ready.wait()
        cpu_s, start_s = time.process_time(), time.perf_counter()
        begin.set()
        for each in running:
            each.result()
        return time.perf_counter() - start_s, time.process_time() - cpu_s


class RawFile:
    """One that has its room before it is written."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path = path
        self._num_bytes = num_bytes

    def write(self, way: tuple[int, int]) -> tuple[float, float]:
        """All of it, until it is safe."""
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
        try:
            os.posix_fallocate(descriptor, 0, self._num_bytes)
            os.fsync(descriptor)

            def job(offset: int) -> Callable[[memoryview], None]:
                return lambda buffer: _all_of(os.pwrite(descriptor, buffer, offset), len(buffer))

            jobs = [job(offset) for offset in range(0, self._num_bytes - way[0] + 1, way[0])]
            took_s, cpu_s = in_threads(jobs, way)
            start_s = time.perf_counter()
            os.fdatasync(descriptor)
            return took_s + time.perf_counter() - start_s, cpu_s
        finally:
            os.close(descriptor)
            self._path.unlink()


class RawReader:
    """Reads files that somebody else wrote, at places in random order."""

    def __init__(self, folder: Path) -> None:
        paths = sorted(folder.rglob("seg-*.kv"))
        self._sizes = [path.stat().st_size for path in paths]
        self._descriptors = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in paths]

    def read(self, way: tuple[int, int], num_bytes: int, rng: random.Random) -> tuple[float, float]:
        piece = way[0]
        places = [
            (descriptor, offset)
            for descriptor, size in zip(self._descriptors, self._sizes, strict=True)
            for offset in range(0, size - piece + 1, piece)
        ]
        rng.shuffle(places)
        if piece * len(places) < num_bytes - piece:
            raise RuntimeError(f"{num_bytes} bytes cannot be read from {len(self._sizes)} files")

        def job(descriptor: int, offset: int) -> Callable[[memoryview], None]:
            return lambda buffer: _all_of(os.preadv(descriptor, [buffer], offset), len(buffer))

        return in_threads([job(*place) for place in places[: num_bytes // piece]], way)

    def close(self) -> None:
        for descriptor in self._descriptors:
            os.close(descriptor)


def _all_of(num_bytes: int, wanted: int) -> None:
    if num_bytes != wanted:
        raise RuntimeError(f"a disk gave or took {num_bytes} of {wanted} bytes")


# --- the tier -------------------------------------------------------------------------------------------------


def open_tier(folder: Path, num_bytes: int) -> SsdTier:
    """With room for twice as much: nothing is given up."""
    return SsdTier(
        files=LiveFiles(folder, direct=True),
        clock=LiveClock(),
        identity=IDENTITY,
        settings=SsdSettings(size_bytes=2 * num_bytes, scrub_bytes_per_s=0.0),
        name=str(folder),
    )


async def write_tier(tier: SsdTier, prefixes: Sequence[tuple[bytes, ...]], memory: NDArray[np.uint8]) -> None:
    """One prefix after another is handed over, two at a time, as a store does; all are safe at the end."""
    waiting = iter(prefixes)

    async def work() -> None:
        for keys in waiting:
            blocks = [
                StoredBlock(key=key, position=position, payload=memoryview(memory[position]))
                for position, key in enumerate(keys)
            ]
            if not all(await tier.write(blocks)):
                raise RuntimeError(f"the tier did not take a prefix: {tier.problem or tier.figures()}")

    await asyncio.gather(work(), work())
    if not await tier.sync():
        raise RuntimeError(f"the tier could not sync: {tier.problem}")


async def read_tier(tier: SsdTier, prefixes: Sequence[tuple[bytes, ...]], memory: Sequence[NDArray[np.uint8]]) -> None:
    """As many prefixes at a time as there are targets."""
    waiting = iter(prefixes)

    async def work(target: NDArray[np.uint8]) -> None:
        for keys in waiting:
            if not all(await tier.read(keys, [memoryview(row) for row in target])):
                raise RuntimeError(f"the tier did not give a prefix: {tier.problem or tier.figures()}")

    await asyncio.gather(*(work(target) for target in memory))


async def clocked(work: Awaitable[None]) -> tuple[float, float]:
    cpu_s, start_s = time.process_time(), time.perf_counter()
    await work
    return time.perf_counter() - start_s, time.process_time() - cpu_s


# --- the comparison ---------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Comparison:
    """By the name of each side."""

    sides: dict[str, Timed] = field(default_factory=dict[str, Timed])

    def add(self, side: str, num_bytes: int, times: tuple[float, float]) -> None:
        self.sides.setdefault(side, Timed()).add(num_bytes, *times)

    def best(self, kind: str) -> float:
        return max(median(each.rates) for side, each in self.sides.items() if side.startswith(kind))

    def print(self, title: str) -> None:
        rows = [
            [side, spread(each.rates), median(each.cpu_s_per_gb), len(each.rates)] for side, each in self.sides.items()
        ]
        print_table(title, ["side", "GB/s", "CPU s/GB", "rounds"], rows)


def _name(way: tuple[int, int]) -> str:
    return f"raw, {way[0] // MIB} MiB x {way[1]}"


async def measure_writes(folder: Path, tier: SsdTier, prefixes: Sequence[tuple[bytes, ...]], rounds: int) -> Comparison:
    """The prefixes in as many parts as there are rounds, each of the raw ways as much at a time."""
    memory = kv_like(PREFIX_BLOCKS, seed=3)
    raw = folder / "raw"
    looks = {way: LOOK_BYTES / RawFile(raw, LOOK_BYTES).write(way)[0] for way in RAW_WAYS}
    finalists = sorted(looks, key=lambda way: -looks[way])[:NUM_FINALISTS]
    found = Comparison()
    per_round = len(prefixes) // rounds
    for turn in range(rounds):
        part = prefixes[turn * per_round : (turn + 1) * per_round]
        num_bytes = per_round * PREFIX_BYTES
        order: list[tuple[int, int] | None] = [None, *finalists]
        for way in order if turn % 2 == 0 else order[::-1]:
            if way is None:
                found.add("tier", num_bytes, await clocked(write_tier(tier, part, memory)))
            else:
                raw_bytes = num_bytes // way[0] * way[0]
                found.add(_name(way), raw_bytes, RawFile(raw, raw_bytes).write(way))
    return found


async def measure_reads(folder: Path, tier: SsdTier, prefixes: Sequence[tuple[bytes, ...]], rounds: int) -> Comparison:
    rng = random.Random(11)
    memory = [np.ones((PREFIX_BLOCKS, BLOCK_BYTES), np.uint8) for _ in range(max(AT_ONCE))]
    raw = RawReader(folder)
    try:
        looks = {way: LOOK_BYTES / raw.read(way, LOOK_BYTES, rng)[0] for way in RAW_WAYS}
        finalists = sorted(looks, key=lambda way: -looks[way])[:NUM_FINALISTS]
        found = Comparison()
        for turn in range(rounds):
            chosen = rng.sample(prefixes, min(len(prefixes), 12))
            num_bytes = len(chosen) * PREFIX_BYTES
            order: list[tuple[int, int] | int] = [*AT_ONCE, *finalists]
            for way in order if turn % 2 == 0 else order[::-1]:
                if isinstance(way, int):
                    times = await clocked(read_tier(tier, chosen, memory[:way]))
                    found.add(f"tier, {way} prefixes at a time", num_bytes, times)
                else:
                    raw_bytes = num_bytes // way[0] * way[0]
                    found.add(_name(way), raw_bytes, raw.read(way, raw_bytes, rng))
        return found
    finally:
        raw.close()


async def _measure(folder: Path, num_bytes: int, write_rounds: int, read_rounds: int) -> tuple[Comparison, Comparison]:
    num_prefixes = max(write_rounds, num_bytes // PREFIX_BYTES // write_rounds * write_rounds)
    prefixes = [prefix_keys(number) for number in range(num_prefixes)]
    tier_folder = folder / "tier"
    async with open_tier(tier_folder, num_prefixes * PREFIX_BYTES) as tier:
        if tier.problem:
            raise RuntimeError(f"no disk tier at {folder}: {tier.problem}")
        writes = await measure_writes(folder, tier, prefixes, write_rounds)
        return writes, await measure_reads(tier_folder, tier, prefixes, read_rounds)


def measure_ssd(folder: Path, *, quick: bool) -> dict[str, float]:
    """In a fresh folder below `folder`, which is on the disk that is meant."""
    num_bytes, write_rounds, read_rounds = (256 * MIB, 4, 6) if quick else (2048 * MIB, 8, 24)
    # As in the store's process.
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with tempfile.TemporaryDirectory(prefix="kvstore-", dir=folder) as scratch:
        writes, reads = uvloop.run(_measure(Path(scratch), num_bytes, write_rounds, read_rounds))
    writes.print(f"disk writes until they are safe, {num_bytes // MIB // write_rounds} MiB a round, {folder}")
    reads.print("disk reads, prefixes of 112 blocks in random order")
    return {
        "ssd_read_over_raw": reads.best("tier") / reads.best("raw"),
        "ssd_write_over_raw": writes.best("tier") / writes.best("raw"),
        "ssd_read_gb_per_s": reads.best("tier"),
        "ssd_write_gb_per_s": writes.best("tier"),
    }
