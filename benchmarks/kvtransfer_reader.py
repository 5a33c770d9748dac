"""The reader's process of `benchmarks.kvtransfer`: runs one duel of lanes against a holder's process of its own.

`python -m benchmarks.kvtransfer_reader` reads the duel as JSON from its standard input, and prints what it measured
as its last line.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.kvtransfer_handoff import Adopter
from benchmarks.kvtransfer_holder import MARK, stamp
from benchmarks.kvtransfer_lanes import READER_LANES
from contracts.ids import BlockId
from kvtransfer import HostPool
from kvtransfer.checksums import block_checksums

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Sequence

    from benchmarks.kvtransfer_lanes import ReaderLane
    from kvtransfer import BlockPair

#: An answer may have to wait for a library that loads, and for a pool that is filled.
ANSWER_TIMEOUT_S = 120.0

#: Sets of pairs that a cell goes round: no lane copies what another one has just read.
NUM_PAIR_SETS = 8

MIN_REPEATS, MAX_REPEATS = 3, 400

#: How often the event loop is asked whether it still comes on time.
TICK_S = 0.001


@dataclass(frozen=True, kw_only=True)
class Duel:
    """What one reader measures. Times are of all lanes together."""

    #: Tandem's first, then what it is compared with.
    lanes: tuple[str, ...]
    #: Blocks and totals in bytes; each pair of them is a cell.
    cells: tuple[tuple[int, int], ...]
    cell_s: float
    #: Blocks of this size, so many of them, for the cost per block; empty: not asked.
    counts: tuple[int, ...] = ()
    count_block_bytes: int = 16 << 10
    #: Block size and bytes of the pulls beside which the loop is watched, and how many of them.
    stall_cells: tuple[tuple[int, int], ...] = ()
    stall_pulls: int = 5
    checksums: bool = False
    #: Handoffs of one block; 0: none.
    handoffs: int = 0


@dataclass(kw_only=True)
class Cell:
    """One lane's pulls of one size."""

    lane: str
    block_bytes: int
    num_blocks: int
    seconds: list[float] = field(default_factory=list[float])
    reader_cpu_s: float = 0.0
    holder_cpu_s: float = 0.0

    @property
    def total_bytes(self) -> int:
        return self.block_bytes * self.num_blocks


class HolderProcess:
    """The other process, and how to order it about."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def ask(self, **order: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write((json.dumps(order) + "\n").encode())
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            while line := (await self._process.stdout.readline()).decode():
                if line.startswith(MARK):
                    return json.loads(line.removeprefix(MARK))
                sys.stderr.write(line)
        raise RuntimeError("the holder's process ended")

    def cpu_s(self) -> float:
        """Processor time of all its threads."""
        # The kernel's name of another process's CPU clock: see clock_getcpuclockid(3).
        return time.clock_gettime((~self._process.pid << 3) | 2)


@contextlib.asynccontextmanager
async def holder_process(scratch: str) -> AsyncGenerator[HolderProcess]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.kvtransfer_holder", scratch,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
    )  # fmt: skip
    try:
        yield HolderProcess(process)
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(10):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


class Arena:
    """A pool on either side, and the lanes between them, for one block size."""

    def __init__(self, holder: HolderProcess, lanes: Sequence[str], block_bytes: int, max_bytes: int) -> None:
        self._holder = holder
        self._names = lanes
        self.block_bytes = block_bytes
        # Room to scatter.
        self.num_blocks = max(2, max_bytes // block_bytes * 5 // 4)
        self.lanes: dict[str, ReaderLane] = {}
        self.failures: dict[str, str] = {}

    async def __aenter__(self) -> Arena:
        self.pool = HostPool(self.num_blocks, self.block_bytes)
        self._bytes = np.frombuffer(self.pool.view(), np.uint8).reshape(self.num_blocks, self.block_bytes)
        # Nothing that is measured touches a page for the first time.
        self._bytes[:] = 0
        hellos = await self._holder.ask(
            do="open", lanes=self._names, num_blocks=self.num_blocks, block_bytes=self.block_bytes
        )
        for name in self._names:
            lane = self.lanes[name] = READER_LANES[name]()
            await lane.open(self.pool, hellos[name], partial(self._order, name))
        await self._touch_all()
        return self

    async def _order(self, name: str, order: dict[str, Any]) -> None:
        await self._holder.ask(do="lane", lane=name, order=order)

    async def _touch_all(self) -> None:
        """Every lane copies every block once, to where it belongs."""
        everything = [(BlockId(block), BlockId(block)) for block in range(self.num_blocks)]
        for name in self.lanes:
            await self.run(name, everything)
            self.verify(name, everything)

    async def run(self, name: str, pairs: Sequence[BlockPair]) -> None:
        await (await self.lanes[name].prepare(pairs))()

    def verify(self, name: str, pairs: Sequence[BlockPair]) -> None:
        """The first and last byte of each block are the holder's; wipes them, so that the next lane must copy."""
        if not self.lanes[name].scattered:
            pairs = [(BlockId(index), BlockId(index)) for index in range(len(pairs))]
        for edge in (0, -1):
            found = [int(self._bytes[target, edge]) for _, target in pairs]
            if found != [stamp(source) for source, _ in pairs]:
                raise RuntimeError(f"{name}: {len(pairs)} blocks of {self.block_bytes} bytes did not all arrive")
            self._bytes[[target for _, target in pairs], edge] = 0

    async def __aexit__(self, *_: object) -> None:
        for lane in self.lanes.values():
            await lane.close()
        await self._holder.ask(do="close")
        del self._bytes
        self.pool.close()

    def scattered(self, num_blocks: int, rng: random.Random) -> list[BlockPair]:
        """As many pairs, of which none continues the one before."""
        sources = rng.sample(range(self.num_blocks), num_blocks)
        targets = rng.sample(range(self.num_blocks), num_blocks)
        return [(BlockId(source), BlockId(target)) for source, target in zip(sources, targets, strict=True)]


async def measure_cell(
    arena: Arena, holder: HolderProcess, num_blocks: int, cell_s: float, rng: random.Random
) -> list[Cell]:
    """The lanes take turns, each time with other blocks, until the time is over."""
    names = list(arena.lanes)
    cells = {name: Cell(lane=name, block_bytes=arena.block_bytes, num_blocks=num_blocks) for name in names}
    sets = [arena.scattered(num_blocks, rng) for _ in range(NUM_PAIR_SETS)]
    for name in names:
        await arena.run(name, sets[0])
        arena.verify(name, sets[0])
    stop_s = time.perf_counter() + cell_s
    gc.collect()
    gc.disable()
    try:
        for repeat in range(MAX_REPEATS):
            order = names if repeat % 2 == 0 else names[::-1]
            for place, name in enumerate(order):
                run = await arena.lanes[name].prepare(sets[(repeat * len(names) + place) % NUM_PAIR_SETS])
                cell = cells[name]
                holder_cpu_s, reader_cpu_s = holder.cpu_s(), time.process_time()
                start_s = time.perf_counter()
                await run()
                cell.seconds.append(time.perf_counter() - start_s)
                cell.reader_cpu_s += time.process_time() - reader_cpu_s
                cell.holder_cpu_s += holder.cpu_s() - holder_cpu_s
            if repeat + 1 >= MIN_REPEATS and time.perf_counter() > stop_s:
                break
    finally:
        gc.enable()
    return list(cells.values())


async def measure_stalls(arena: Arena, name: str, total_bytes: int, num_pulls: int, rng: random.Random) -> list[float]:
    """The longest time by which the event loop came late, during each of some pulls; and, last, during none."""
    sets = [arena.scattered(total_bytes // arena.block_bytes, rng) for _ in range(num_pulls)]
    stalls: list[float] = []
    length_s = 0.0
    for pairs in sets:
        pull = await arena.lanes[name].prepare(pairs)
        start_s = time.perf_counter()
        stalls.append(await _longest_stall(pull()))
        length_s = max(length_s, time.perf_counter() - start_s)
    stalls.append(await _longest_stall(asyncio.sleep(length_s)))
    return stalls


async def _longest_stall(work: Awaitable[None]) -> float:
    running = asyncio.ensure_future(work)
    longest_s = 0.0
    while not running.done():
        due_s = time.perf_counter() + TICK_S
        await asyncio.sleep(TICK_S)
        longest_s = max(longest_s, time.perf_counter() - due_s)
    await running
    return longest_s


def _await_pages(pool: HostPool) -> None:
    while os.fstat(pool.read_only).st_blocks * 512 < pool.num_blocks * pool.block_bytes:
        time.sleep(0.01)


async def _no_orders(order: dict[str, Any]) -> None:
    raise AssertionError(f"an order to nobody: {order}")


async def measure_first_touch(holder: HolderProcess, block_bytes: int, total_bytes: int) -> dict[str, float]:
    """GB/s of the first pull into a pool, as it was made and with its pages made before."""
    rates: dict[str, float] = {}
    num_blocks = total_bytes // block_bytes
    everything = [(BlockId(block), BlockId(block)) for block in range(num_blocks)]
    hellos = await holder.ask(do="open", lanes=["shm"], num_blocks=num_blocks, block_bytes=block_bytes)
    for name in ("untouched", "populated"):
        pool = HostPool(num_blocks, block_bytes)
        if name == "populated":
            pool.populate()
            await asyncio.to_thread(_await_pages, pool)
        lane = READER_LANES["shm"]()
        await lane.open(pool, hellos["shm"], _no_orders)
        pull = await lane.prepare(everything)
        start_s = time.perf_counter()
        await pull()
        rates[name] = total_bytes / (time.perf_counter() - start_s) / 1e9
        await lane.close()
        pool.close()
    await holder.ask(do="close")
    return rates


def measure_checksums(pool: HostPool, num_blocks: int) -> float:
    """GB/s of the checksums that a reader would compare."""
    blocks = [BlockId(block) for block in range(num_blocks)]
    seconds: list[float] = []
    for _ in range(5):
        start_s = time.perf_counter()
        block_checksums(pool, blocks)
        seconds.append(time.perf_counter() - start_s)
    return num_blocks * pool.block_bytes / sorted(seconds)[2] / 1e9


async def measure_handoffs(holder: HolderProcess, count: int, num_blocks: int, block_bytes: int) -> dict[str, Any]:
    """Seconds from the offer to the adoption, to the holder's blocks being free again, and of one plain call."""
    async with Adopter(num_blocks, block_bytes) as adopter:
        warm_up = count // 10 + 5
        times = await holder.ask(
            do="handoff", reader=adopter.describe(), count=count + warm_up, num_blocks=num_blocks,
            block_bytes=block_bytes,
        )  # fmt: skip
        leases = list(times["granted_s"])[warm_up:]
        granted_s, released_s = times["granted_s"], times["released_s"]
        return {
            "adopted_s": [adopter.adopted_s[lease] - granted_s[lease] for lease in leases],
            "released_s": [released_s[lease] - granted_s[lease] for lease in leases],
            "call_s": times["call_s"],
        }


async def run(duel: Duel) -> dict[str, Any]:
    rng = random.Random(1)
    found: dict[str, Any] = {"cells": [], "counts": [], "stalls": []}
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        async with holder_process(scratch) as holder:
            sizes = sorted({block for block, _ in duel.cells} | {block for block, _ in duel.stall_cells})
            for block_bytes in sizes:
                totals = [total for block, total in duel.cells if block == block_bytes]
                stalls = [total for block, total in duel.stall_cells if block == block_bytes]
                async with Arena(holder, duel.lanes, block_bytes, max(*totals, *stalls, block_bytes, 0)) as arena:
                    for total_bytes in totals:
                        num_blocks = total_bytes // block_bytes
                        cells = await measure_cell(arena, holder, num_blocks, duel.cell_s, rng)
                        found["cells"] += [asdict(cell) for cell in cells]
                    for total_bytes in stalls:
                        seconds = await measure_stalls(arena, duel.lanes[0], total_bytes, duel.stall_pulls, rng)
                        found["stalls"].append(
                            {"block_bytes": block_bytes, "total_bytes": total_bytes, "seconds": seconds}
                        )
                    if block_bytes == duel.count_block_bytes:
                        for count in duel.counts:
                            cells = await measure_cell(arena, holder, count, duel.cell_s, rng)
                            found["counts"] += [asdict(cell) for cell in cells]
                    if duel.checksums:
                        rate = measure_checksums(arena.pool, min(arena.num_blocks, (64 << 20) // block_bytes))
                        found.setdefault("checksums", {})[block_bytes] = rate
            if duel.lanes[0] == "shm":
                found["first_touch"] = await measure_first_touch(holder, 1 << 20, 128 << 20)
        if duel.handoffs:
            # Processes of their own, without the other lanes' threads.
            async with holder_process(scratch) as holder:
                found["handoffs"] = await measure_handoffs(holder, duel.handoffs, 1, 192 << 10)
    return found


def main() -> None:
    duel = Duel(**json.load(sys.stdin))
    found = uvloop.run(run(duel))
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
