"""Pulls in memory that land piece by piece, break in their midst or stand still."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.errors import Cancelled, TandemError, WorkerUnavailable
from contracts.ids import BlockId
from kvtransfer import HostPool, MemoryFabric
from kvtransfer.memory import PoolStore, PullFate
from simulator import Program, run

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from kvtransfer import MemoryTransport, Pull
    from kvtransfer.memory import Obstacle
    from kvtransfer.transport import PullResult

NUM_BLOCKS = 4


def content(value: int) -> bytes:
    return bytes([value]) * 8


class Bench:
    """A pull of four blocks, holding 1 to 4, into four that hold 0."""

    def __init__(self, fate: PullFate) -> None:
        fabric = MemoryFabric(lambda info: fate)
        self.source, self.target = PoolStore(HostPool(NUM_BLOCKS, 8)), PoolStore(HostPool(NUM_BLOCKS, 8))
        for block in range(NUM_BLOCKS):
            self.source.write_block(BlockId(block), content(block + 1))
        self.holder: MemoryTransport = fabric.over("p", self.source, num_blocks=NUM_BLOCKS, block_bytes=100)
        self.reader: MemoryTransport = fabric.over("d", self.target, num_blocks=NUM_BLOCKS, block_bytes=100)
        pairs = [(BlockId(block), BlockId(block)) for block in range(NUM_BLOCKS)]
        self.pull: Pull = self.reader.pull(self.holder.endpoint(), pairs)

    def landed(self) -> list[int]:
        return [self.target.read_block(BlockId(block))[0] for block in range(NUM_BLOCKS)]

    async def end(self) -> tuple[type[TandemError] | None, int, float]:
        """The error, the bytes and the seconds of the pull; the wait must have ended when it says."""
        result: PullResult = await self.pull.wait()
        assert asyncio.get_running_loop().time() == pytest.approx(result.wire_s)
        return (type(result.error) if result.error else None), result.num_bytes, round(result.wire_s, 6)


def on_bench(fate: PullFate, scenario: Callable[[Bench], Coroutine[None, None, None]]) -> None:
    async def main(program: Program) -> None:
        await scenario(Bench(fate))

    run(main, seed=1)


@pytest.mark.parametrize(
    ("num_pieces", "landed"),
    [
        (1, [[0, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 4]]),
        (2, [[0, 0, 0, 0], [1, 2, 0, 0], [1, 2, 3, 4]]),
        (3, [[0, 0, 0, 0], [1, 0, 0, 0], [1, 2, 3, 4]]),
        (99, [[1, 0, 0, 0], [1, 2, 0, 0], [1, 2, 3, 4]]),
    ],
)
def test_blocks_land_one_piece_after_another(num_pieces: int, landed: list[list[int]]) -> None:
    async def scenario(bench: Bench) -> None:
        seen: list[list[int]] = []
        await asyncio.sleep(0.31)
        seen.append(bench.landed())
        await asyncio.sleep(0.3)
        seen.append(bench.landed())
        assert await bench.end() == (None, 400, 1.0)
        seen.append(bench.landed())
        assert seen == landed

    on_bench(PullFate(duration_s=1.0, num_pieces=num_pieces), scenario)


def test_a_block_is_read_when_it_lands() -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(0.6)
        for block in range(NUM_BLOCKS):
            bench.source.write_block(BlockId(block), content(9))
        await bench.end()
        assert bench.landed() == [1, 2, 9, 9]

    on_bench(PullFate(duration_s=1.0, num_pieces=4), scenario)


def test_a_stopped_pull_leaves_what_had_landed() -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(0.6)
        bench.pull.request_stop()
        assert await bench.end() == (Cancelled, 200, 0.6)
        await asyncio.sleep(5.0)
        assert bench.landed() == [1, 2, 0, 0]

    on_bench(PullFate(duration_s=1.0, num_pieces=4), scenario)


@pytest.mark.parametrize(("num_landed", "landed"), [(0, [0, 0, 0, 0]), (3, [1, 2, 3, 0]), (9, [1, 2, 3, 4])])
def test_a_pull_that_breaks_leaves_what_its_fate_says(num_landed: int, landed: list[int]) -> None:
    async def scenario(bench: Bench) -> None:
        bytes_landed = 100 * (NUM_BLOCKS - landed.count(0))
        assert await bench.end() == (WorkerUnavailable, bytes_landed, 1.0)
        assert bench.landed() == landed

    fate = PullFate(duration_s=1.0, num_pieces=4, num_landed=num_landed, error=WorkerUnavailable("cut"))
    on_bench(fate, scenario)


def test_a_holder_s_death_ends_a_pull_at_its_next_piece() -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(0.3)
        bench.holder.crash()
        assert await bench.end() == (WorkerUnavailable, 100, 0.5)
        assert bench.landed() == [1, 0, 0, 0]

    on_bench(PullFate(duration_s=1.0, num_pieces=4), scenario)


def test_nothing_lands_in_a_dead_reader() -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(0.3)
        bench.reader.crash()
        assert await bench.end() == (Cancelled, 100, 0.3)
        await asyncio.sleep(5.0)
        assert bench.landed() == [1, 0, 0, 0]

    on_bench(PullFate(duration_s=1.0, num_pieces=4, heeds_stop=False), scenario)


def between(from_s: float, until_s: float, what: float | TandemError) -> Obstacle:
    return lambda: what if from_s <= asyncio.get_running_loop().time() < until_s else None


def test_a_pull_waits_at_an_obstacle_and_goes_on_behind_it() -> None:
    async def scenario(bench: Bench) -> None:
        await asyncio.sleep(1.95)
        assert bench.landed() == [1, 0, 0, 0]
        # It looked at 0.5, 0.6 ... and last at 2.0; two more pieces after that.
        assert await bench.end() == (None, 400, 2.5)

    on_bench(PullFate(duration_s=1.0, num_pieces=4, obstacle=between(0.4, 1.96, 0.1)), scenario)


def test_a_pull_ends_with_the_obstacle_s_error_and_may_be_stopped_while_it_waits() -> None:
    async def scenario(bench: Bench) -> None:
        assert await bench.end() == (WorkerUnavailable, 100, 0.5)

    on_bench(PullFate(duration_s=1.0, num_pieces=4, obstacle=between(0.4, 9.0, WorkerUnavailable("cut"))), scenario)

    async def stopped(bench: Bench) -> None:
        await asyncio.sleep(0.8)
        bench.pull.request_stop()
        assert await bench.end() == (Cancelled, 100, 0.8)
        await asyncio.sleep(9.0)
        assert bench.landed() == [1, 0, 0, 0]

    on_bench(PullFate(duration_s=1.0, num_pieces=4, obstacle=between(0.4, 2.0, 0.5)), stopped)
