"""What every transport promises, asked of two of them; and the faults of the in-memory one."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.errors import Cancelled, WorkerUnavailable
from contracts.ids import BlockId, Incarnation
from kvtransfer import HostPool, MemoryFabric, ShmTransport, Transport
from kvtransfer.memory import PoolStore, PullFate, PullInfo
from kvtransfer.timers import Deadlines, retry_delay_s
from kvtransfer.transport import runs
from rpc import LiveClock
from simulator import Program, run
from tests.support.pools import register_pool
from tests.support.transport_contract import BLOCK_BYTES, MakeTransport, TransportContract, closing, pair

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable


class TestEveryTransport(TransportContract):
    """Those that need nothing installed; the others' stand with their own tests."""

    @pytest.fixture(params=["memory", "shm"])
    async def make(self, request: pytest.FixtureRequest) -> AsyncGenerator[MakeTransport]:
        fabric = MemoryFabric()

        def transport(name: str) -> Transport:
            if request.param == "memory":
                return fabric.transport(name)
            return ShmTransport(clock=LiveClock(), incarnation=Incarnation(1))

        async with closing(transport) as make:
            yield make


def in_memory(fate: Callable[[PullInfo], PullFate], seconds: list[float]) -> list[object]:
    """Stops a pull of one block after `seconds[0]`; what landed by then, how it ended and when."""

    async def main(program: Program) -> list[object]:
        fabric = MemoryFabric(fate)
        holder, reader = fabric.transport("p"), fabric.transport("d")
        source, target = register_pool(holder, 1, BLOCK_BYTES), register_pool(reader, 1, BLOCK_BYTES)
        source[0] = 9
        pull = reader.pull(holder.endpoint(), [pair(0, 0)])
        await asyncio.sleep(seconds[0])
        pull.request_stop()
        landed = target[0]
        result = await pull.wait()
        return [landed, target[0], type(result.error), asyncio.get_running_loop().time()]

    return run(main, seed=1)


def test_memory_pull_stops_or_lands_late_as_told() -> None:
    assert in_memory(lambda info: PullFate(duration_s=5.0), [1.0]) == [0, 0, Cancelled, 1.0]
    deaf = PullFate(duration_s=5.0, heeds_stop=False)
    assert in_memory(lambda info: deaf, [1.0]) == [0, 9, type(None), 5.0]
    lost = PullFate(duration_s=5.0, error=WorkerUnavailable("cut"), heeds_stop=False)
    assert in_memory(lambda info: lost, [1.0]) == [0, 0, WorkerUnavailable, 5.0]


def test_memory_pull_of_a_crashed_holder_fails_and_a_crashed_reader_gets_nothing() -> None:
    async def main(program: Program) -> None:
        fabric = MemoryFabric(lambda info: PullFate(duration_s=1.0))
        holder, reader = fabric.transport("p"), fabric.transport("d")
        register_pool(holder, 1, BLOCK_BYTES)[0] = 9
        target = register_pool(reader, 1, BLOCK_BYTES)
        pull = reader.pull(holder.endpoint(), [pair(0, 0)])
        holder.crash()
        assert isinstance((await pull.wait()).error, WorkerUnavailable)
        survivor = fabric.transport("p")
        register_pool(survivor, 1, BLOCK_BYTES)[0] = 9
        reader.pull(survivor.endpoint(), [pair(0, 0)])
        reader.crash()
        await asyncio.sleep(2.0)
        assert target[0] == 0
        await reader.close()

    run(main, seed=1)


def test_memory_transport_over_blocks_that_exist() -> None:
    async def main(program: Program) -> None:
        fabric = MemoryFabric()
        source, target = PoolStore(HostPool(2, 8)), PoolStore(HostPool(2, 8))
        source.write_block(BlockId(1), b"contents")
        holder = fabric.over("p", source, num_blocks=2, block_bytes=1 << 20)
        reader = fabric.over("d", target, num_blocks=2, block_bytes=1 << 20)
        result = await reader.pull(holder.endpoint(), [pair(1, 0)]).wait()
        assert (result.num_bytes, target.read_block(BlockId(0))) == (1 << 20, b"contents")

    run(main, seed=1)


def test_neighbours_are_copied_together() -> None:
    pairs = [pair(*each) for each in ((0, 5), (1, 6), (2, 7), (4, 8), (5, 9), (6, 3))]
    assert list(runs(pairs)) == [(0, 5, 3), (4, 8, 2), (6, 3, 1)]
    assert list(runs([])) == []


def test_retry_delays_double_up_to_a_bound() -> None:
    assert [retry_delay_s(n) for n in (1, 2, 3, 5, 6, 1000)] == [0.05, 0.1, 0.2, 0.8, 1.0, 1.0]


def test_deadlines_keep_one_time_per_key() -> None:
    deadlines: Deadlines[str] = Deadlines()
    assert deadlines.next_s() is None
    for time_s, key in ((3.0, "a"), (1.0, "b"), (2.0, "c"), (5.0, "b"), (2.0, "d")):
        deadlines.set(key, time_s)
    deadlines.discard("missing")
    assert len(deadlines) == 4
    assert deadlines.pop_due(2.0) == ["c", "d"]
    deadlines.discard("a")
    assert (deadlines.next_s(), deadlines.pop_due(4.0)) == (5.0, [])
    for time_s in range(1000):
        deadlines.set("b", float(time_s))
    assert deadlines.pop_due(1e9) == ["b"]
    assert deadlines.next_s() is None
