"""What every transport promises, as tests to inherit: a class of them, and a fixture `make` of one's own.

class TestMine(TransportContract):
    @pytest.fixture
    async def make(self) -> AsyncGenerator[MakeTransport]:
        async with closing(lambda name: MyTransport(name)) as make:
            yield make
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

import pytest

from contracts.errors import BadRequest, IncompatiblePeer, TandemError, WorkerUnavailable
from contracts.ids import BlockId
from tests.support.pools import register_pool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from kvtransfer import BlockPair, Transport

BLOCK_BYTES = 4096
TIMEOUT_S = 60.0


class MakeTransport(Protocol):
    """One process's side; all that one test makes can reach each other."""

    def __call__(self, name: str) -> Transport: ...


@asynccontextmanager
async def closing(make: Callable[[str], Transport]) -> AsyncGenerator[MakeTransport]:
    """Closes what was made, at the end."""
    made: list[Transport] = []

    def transport(name: str) -> Transport:
        made.append(make(name))
        return made[-1]

    yield transport
    for each in made:
        await each.close()


def pair(source: int, target: int) -> BlockPair:
    return (BlockId(source), BlockId(target))


def stamp(pool: memoryview, block: int, value: int) -> None:
    """Fills a block."""
    pool[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([value]) * BLOCK_BYTES


def stamps(pool: memoryview) -> list[int]:
    """What each block is filled with; every byte is looked at."""
    blocks = [bytes(pool[start : start + BLOCK_BYTES]) for start in range(0, len(pool), BLOCK_BYTES)]
    assert all(block == block[:1] * BLOCK_BYTES for block in blocks)
    return [block[0] for block in blocks]


async def error_of(reader: Transport, endpoint: bytes, *pairs: BlockPair) -> TandemError | None:
    """Of a pull that moves nothing."""
    async with asyncio.timeout(TIMEOUT_S):
        result = await reader.pull(endpoint, pairs).wait()
    assert result.num_bytes == 0
    return result.error


class TransportContract:
    async def test_pull_copies_exactly_its_pairs(self, make: MakeTransport) -> None:
        holder, reader = make("p"), make("d")
        source, target = register_pool(holder, 4, BLOCK_BYTES), register_pool(reader, 6, BLOCK_BYTES)
        assert len(source) == 4 * BLOCK_BYTES
        assert not any(source)
        for index in range(4):
            stamp(source, index, index + 1)
        await reader.connect(holder.endpoint(), TIMEOUT_S)
        async with asyncio.timeout(TIMEOUT_S):
            result = await reader.pull(holder.endpoint(), [pair(3, 0), pair(1, 5), pair(2, 4)]).wait()
        assert result.error is None
        assert result.num_bytes == 3 * BLOCK_BYTES
        assert stamps(target) == [4, 0, 0, 0, 3, 2]
        del source, target

    async def test_pulls_in_any_number_and_from_several_holders(self, make: MakeTransport) -> None:
        one, two, reader = make("p"), make("q"), make("d")
        stamp(register_pool(one, 2, BLOCK_BYTES), 1, 1)
        stamp(register_pool(two, 2, BLOCK_BYTES), 1, 2)
        target = register_pool(reader, 40, BLOCK_BYTES)
        holders = [one if block % 3 else two for block in range(40)]
        pulls = [reader.pull(each.endpoint(), [pair(1, block)]) for block, each in enumerate(holders)]
        async with asyncio.timeout(TIMEOUT_S):
            results = await asyncio.gather(*(each.wait() for each in pulls))
        assert [(each.error, each.num_bytes) for each in results] == [(None, BLOCK_BYTES)] * 40
        assert all(each.wire_s >= 0.0 and each.wait_s >= 0.0 for each in results)
        assert stamps(target) == [1 if each is one else 2 for each in holders]
        del target

    async def test_what_a_peer_does_wrong_is_the_results_error(self, make: MakeTransport) -> None:
        holder, reader, other = make("p"), make("d"), make("o")
        register_pool(holder, 4, BLOCK_BYTES)
        register_pool(reader, 6, BLOCK_BYTES)
        register_pool(other, 4, 2 * BLOCK_BYTES)
        assert isinstance(await error_of(reader, other.endpoint(), pair(0, 0)), IncompatiblePeer)
        assert isinstance(await error_of(reader, holder.endpoint(), pair(4, 0)), BadRequest)
        assert isinstance(await error_of(reader, holder.endpoint(), pair(0, 6)), BadRequest)
        gone = holder.endpoint()
        await holder.close()
        assert isinstance(await error_of(reader, gone, pair(0, 0)), WorkerUnavailable)
        with pytest.raises(WorkerUnavailable):
            await reader.connect(gone, TIMEOUT_S)

    async def test_wait_repeats_and_outlives_its_waiters(self, make: MakeTransport) -> None:
        holder, reader = make("p"), make("d")
        register_pool(holder, 4, BLOCK_BYTES)
        register_pool(reader, 4, BLOCK_BYTES)
        pull = reader.pull(holder.endpoint(), [pair(0, 0)])
        waiting = asyncio.ensure_future(pull.wait())
        await asyncio.sleep(0)
        waiting.cancel()
        result = await pull.wait()
        assert result.error is None
        assert await pull.wait() is result
        pull.request_stop()

    async def test_empty_pull_is_a_pull(self, make: MakeTransport) -> None:
        holder, reader = make("p"), make("d")
        register_pool(holder, 1, BLOCK_BYTES)
        register_pool(reader, 1, BLOCK_BYTES)
        assert await error_of(reader, holder.endpoint()) is None

    async def test_forgotten_holder_harms_nobody(self, make: MakeTransport) -> None:
        gone, holder, reader = make("p"), make("p"), make("d")
        register_pool(gone, 1, BLOCK_BYTES)
        stamp(register_pool(holder, 1, BLOCK_BYTES), 0, 7)
        target = register_pool(reader, 2, BLOCK_BYTES)
        reader.forget(gone.endpoint())
        assert (await reader.pull(gone.endpoint(), [pair(0, 0)]).wait()).error is None
        endpoint = gone.endpoint()
        await gone.close()
        reader.forget(endpoint)
        reader.forget(endpoint)
        assert (await reader.pull(holder.endpoint(), [pair(0, 1)]).wait()).error is None
        assert stamps(target) == [0, 7]
        del target
