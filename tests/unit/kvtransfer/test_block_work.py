"""Checksums and staging: what they compute, that they leave the event loop alone, and whole leases that use them."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import numpy as np
import pytest
import xxhash

from contracts.errors import ConfigError, CorruptKv, Internal, TandemError
from contracts.ids import BlockId
from kvtransfer import HostPool, LeaseOutcome
from kvtransfer.block_work import BlockWork, Landing, Preparation
from kvtransfer.checksums import block_checksums, corrupt_blocks
from kvtransfer.reader_events import AbortReason
from kvtransfer.staging import PinnedMirror
from rpc import LiveClock
from tests.unit.kvtransfer.lease_bench import BLOCK_BYTES, LeaseBench, Spoiler

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

NUM_BLOCKS = 8


@pytest.fixture
def pool() -> Iterator[HostPool]:
    pool = HostPool(NUM_BLOCKS, BLOCK_BYTES)
    with pool.view() as view:
        view[:] = random.Random(5).randbytes(len(view))
    yield pool
    pool.close()


def blocks(*numbers: int) -> list[BlockId]:
    return [BlockId(number) for number in numbers]


# --- checksums ------------------------------------------------------------------------------------------


def test_checksum_of_a_block_is_the_hash_of_its_bytes(pool: HostPool) -> None:
    expected = [xxhash.xxh3_64_intdigest(pool.view()[n * BLOCK_BYTES : (n + 1) * BLOCK_BYTES]) for n in (6, 1)]
    assert block_checksums(pool, blocks(6, 1)) == tuple(expected)
    assert len(set(block_checksums(pool, blocks(*range(NUM_BLOCKS))))) == NUM_BLOCKS


def test_one_flipped_bit_is_found_and_no_other_block_is_blamed(pool: HostPool) -> None:
    sums = block_checksums(pool, blocks(2, 3, 4))
    assert corrupt_blocks(pool, blocks(2, 3, 4), sums) == ()
    pool.view()[4 * BLOCK_BYTES + 17] ^= 0x10
    assert corrupt_blocks(pool, blocks(2, 3, 4), sums) == (2,)


def test_checksums_need_a_pool() -> None:
    with pytest.raises(ConfigError, match="need the pool"):
        BlockWork(pool=None, checksum=True, staging=None, clock=LiveClock())


async def test_work_counts_what_it_hashed_and_leaves_the_loop_alone() -> None:
    big = HostPool(4, 16 << 20)
    work = BlockWork(pool=big, checksum=True, staging=None, clock=LiveClock())
    turns = 0

    async def spin() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    spinning = asyncio.create_task(spin())
    prepared = await work.prepare(blocks(0, 1, 2, 3))
    spinning.cancel()
    work.close()
    big.close()
    assert prepared.num_bytes == 64 << 20
    assert prepared.checksum_s > 0
    assert len(prepared.checksums) == 4
    # The thread hashes without the interpreter's lock: the loop turned while it did.
    assert turns > 10


class Recorder:
    """A staging that says what it was asked, and fails when told to."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[BlockId]]] = []
        self.error: TandemError | None = None

    async def stage_out(self, blocks: Sequence[BlockId]) -> None:
        self._note("out", blocks)

    async def stage_in(self, blocks: Sequence[BlockId]) -> None:
        self._note("in", blocks)

    def _note(self, way: str, blocks: Sequence[BlockId]) -> None:
        self.asked.append((way, list(blocks)))
        if self.error is not None:
            raise self.error


async def test_corrupt_blocks_are_not_moved_on(pool: HostPool) -> None:
    staging = Recorder()
    work = BlockWork(pool=pool, checksum=True, staging=staging, clock=LiveClock())
    sums = (await work.prepare(blocks(1, 2, 3))).checksums
    pool.view()[2 * BLOCK_BYTES] ^= 1
    landed = await work.land(blocks(1, 2, 3), sums)
    assert (landed.corrupt, landed.error) == ((1,), None)
    assert (await work.land(blocks(2), sums[1:2])).corrupt == (0,)
    work.close()
    assert staging.asked == [("out", [1, 2, 3]), ("in", [1, 3])]


async def test_without_checksums_nothing_is_hashed(pool: HostPool) -> None:
    work = BlockWork(pool=pool, checksum=False, staging=Recorder(), clock=LiveClock())
    assert work.wanted
    assert not work.checksum
    assert await work.prepare(blocks(1)) == Preparation()
    assert await work.land(blocks(1), ()) == Landing()
    assert not BlockWork(pool=pool, checksum=False, staging=None, clock=LiveClock()).wanted


async def test_failed_staging_is_a_result(pool: HostPool) -> None:
    staging = Recorder()
    staging.error = Internal("device lost")
    work = BlockWork(pool=pool, checksum=True, staging=staging, clock=LiveClock())
    assert (await work.prepare(blocks(1))).error is staging.error
    assert (await work.land(blocks(1), block_checksums(pool, blocks(1)))).error is staging.error
    work.close()


# --- whole leases, with real threads --------------------------------------------------------------------


async def test_lease_with_checksums() -> None:
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=True)
        lease_id = await bench.hand_off(5, seed=1)
        assert bench.adopted_bytes(lease_id) == bench.sent_bytes(lease_id)
        holder, reader = bench.holder.counters, bench.reader.counters
        assert holder.checksum_bytes == reader.checksum_bytes == 5 * BLOCK_BYTES
        assert holder.checksum_s > 0
        assert reader.checksum_s > 0
        assert (reader.corrupt_blocks, reader.refetched_blocks) == (0, 0)
        await bench.check_rest()


async def test_corrupt_block_is_pulled_again() -> None:
    spoiler = Spoiler(spoil=[(1,), (1,)])
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=True, spoiler=spoiler)
        lease_id = await bench.hand_off(5, seed=2, chunk=5)
        assert bench.adopted_bytes(lease_id) == bench.sent_bytes(lease_id)
        assert [len(pairs) for pairs in spoiler.pulled] == [5, 1, 1]
        reader = bench.reader.counters
        assert (reader.corrupt_blocks, reader.refetched_blocks) == (2, 2)
        await bench.check_rest()


async def test_block_that_stays_corrupt_ends_the_lease() -> None:
    spoiler = Spoiler(spoil=[(0, 3), (3,), (3,)])
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=True, spoiler=spoiler)
        lease_id = bench.open(5, seed=3)
        bench.seal(lease_id)
        error = await bench.reader_end(lease_id)
        assert isinstance(error, CorruptKv)
        first = bench.own_blocks(lease_id)
        # The second pull mended position 0.
        assert f"lease {lease_id}: block 3 of 5 ({first[3]} of p," in error.message
        assert "in 3 pulls over memory" in error.message
        assert bench.reader.counters.aborted == {AbortReason.CORRUPT: 1}
        assert await bench.holder_end(lease_id) is LeaseOutcome.REFUSED
        assert bench.adopted_blocks(lease_id) is None
        await bench.check_rest()


async def test_without_checksums_the_same_corruption_goes_unseen() -> None:
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=False, spoiler=Spoiler(spoil=[(1,)]))
        lease_id = await bench.hand_off(5, seed=4, chunk=5)
        assert bench.adopted_bytes(lease_id) != bench.sent_bytes(lease_id)
        await bench.check_rest()


async def test_reader_that_wants_checksums_refuses_a_holder_without() -> None:
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=True, holder_checksum=False)
        lease_id = bench.open(2, seed=5)
        assert await bench.holder_end(lease_id) is LeaseOutcome.REFUSED
        assert "checksums of p: True here, False there" in bench.reasons[lease_id]
        await bench.check_rest()


async def test_reader_without_checksums_takes_a_lease_that_has_them() -> None:
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=False, holder_checksum=True)
        lease_id = await bench.hand_off(3, seed=6)
        assert bench.adopted_bytes(lease_id) == bench.sent_bytes(lease_id)
        assert bench.reader.counters.checksum_bytes == 0
        await bench.check_rest()


# --- staging --------------------------------------------------------------------------------------------


async def test_leases_between_mirrored_pools() -> None:
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=True, device="cpu")
        for seed in range(3):
            lease_id = await bench.hand_off(5, seed=seed)
            assert bench.adopted_bytes(lease_id) == bench.sent_bytes(lease_id)
            bench.release(lease_id)
        await bench.check_rest()


@pytest.mark.gpu
async def test_leases_between_pools_in_device_memory() -> None:
    async with AsyncExitStack() as stack:
        bench = await LeaseBench.start(stack, checksum=True, device="cuda")
        for seed in range(3):
            lease_id = await bench.hand_off(5, seed=seed)
            assert bench.adopted_bytes(lease_id) == bench.sent_bytes(lease_id)
            bench.release(lease_id)
        await bench.check_rest()


def device_pool(device: str) -> torch.Tensor:
    import torch

    return torch.zeros(NUM_BLOCKS, BLOCK_BYTES // 4, dtype=torch.float32, device=device)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
async def test_mirror_copies_the_asked_blocks_and_no_others(pool: HostPool, device: str) -> None:
    tensor = device_pool(device)
    tensor[:] = 1.5
    before = bytes(pool.view())
    mirror = PinnedMirror(tensor, pool)
    await mirror.stage_out(blocks(5, 1, 2))
    host = np.frombuffer(pool.view(), np.uint8).reshape(NUM_BLOCKS, BLOCK_BYTES)
    for block in range(NUM_BLOCKS):
        if block in (1, 2, 5):
            assert (host[block].view(np.float32) == 1.5).all()
        else:
            assert host[block].tobytes() == before[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES]
    host[3].view(np.float32)[:] = 2.5
    await mirror.stage_in(blocks(3))
    assert [float(value) for value in tensor.mean(dim=1)] == [1.5, 1.5, 1.5, 2.5, 1.5, 1.5, 1.5, 1.5]
    mirror.close()


@pytest.mark.gpu
async def test_mirror_sees_what_the_default_stream_was_given_before(pool: HostPool) -> None:
    import torch

    tensor = device_pool("cuda")
    mirror = PinnedMirror(tensor, pool)
    busy = torch.randn(4096, 4096, device="cuda")
    for value in range(1, 6):
        for _ in range(20):
            busy = torch.nn.functional.normalize(torch.matmul(busy, busy))
        tensor[2] = float(value)
        await mirror.stage_out(blocks(2))
        host = np.frombuffer(pool.view(), np.float32).reshape(NUM_BLOCKS, -1)
        assert (host[2] == value).all()
    mirror.close()


def test_mirror_of_another_size_is_refused(pool: HostPool) -> None:
    with pytest.raises(ConfigError, match="do not fit"):
        PinnedMirror(device_pool("cpu")[1:], pool)
    with pytest.raises(ConfigError, match="do not fit"):
        PinnedMirror(device_pool("cpu").t(), pool)
