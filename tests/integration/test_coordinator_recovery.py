"""A real coordinator process is killed: the next one knows 64 workers and everything that they hold, and soon."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
import time
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from benchmarks.dispatch_rpc import coordinator_process, members, until_known
from benchmarks.dispatch_traffic import BLOCK_TOKENS, worker_infos
from contracts.ids import GatewayId, RequestId
from contracts.messages import DISPATCH, DispatchItem, DispatchRequest, Placement
from kvstore.block_keys import HINT_BYTES
from rpc import GrpcNetwork, LiveClock
from tests.support.light_worker import LightWorker

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from benchmarks.dispatch_rpc import CoordinatorProcess

NUM_WORKERS = 64
NUM_BLOCKS = 2000
#: Two are wanted; a loaded machine may need more.
RECOVERY_LIMIT_S = 10.0


def prompt_of(number: int) -> list[bytes]:
    """What worker `number` holds: one long prompt. Its hints look like keys, which are hashes: of numbers in a row the
    directory loses some, with a few of the hash functions that it may draw."""
    places = range(number * NUM_BLOCKS, (number + 1) * NUM_BLOCKS)
    return [hashlib.sha256(place.to_bytes(8, "little")).digest()[:HINT_BYTES] for place in places]


@asynccontextmanager
async def light_workers(address: str, token: str) -> AsyncGenerator[list[LightWorker]]:
    """Each with a connection of its own, as in processes of their own."""
    async with AsyncExitStack() as stack:
        workers: list[LightWorker] = []
        for number, info in enumerate(worker_infos(NUM_WORKERS)):
            network = GrpcNetwork(token=token)
            stack.push_async_callback(network.close)
            worker = LightWorker(info, network, address, LiveClock(), log=lambda line: None)
            worker.hold(prompt_of(number))
            workers.append(worker)
        lives = [asyncio.create_task(worker.run()) for worker in workers]
        try:
            yield workers
        finally:
            for life in lives:
                life.cancel()
            ended = await asyncio.gather(*lives, return_exceptions=True)
        assert all(isinstance(end, asyncio.CancelledError) for end in ended), ended


@asynccontextmanager
async def gateway_network(token: str) -> AsyncGenerator[GrpcNetwork]:
    network = GrpcNetwork(token=token)
    try:
        yield network
    finally:
        await network.close()


async def local_blocks(network: GrpcNetwork, address: str, number: int) -> tuple[str, int]:
    """Where the coordinator sends the prompt of worker `number`, and how much of it is said to be there."""
    item = DispatchItem(
        request_id=RequestId(f"r{number}"),
        prompt_tokens=NUM_BLOCKS * BLOCK_TOKENS + 1,
        max_tokens=8,
        block_keys=b"".join(prompt_of(number)),
    )
    ask = DispatchRequest(gateway_id=GatewayId("g"), items=(item,))
    (verdict,) = (await network.channel(address).call(DISPATCH, ask, timeout_s=10.0)).verdicts
    assert isinstance(verdict, Placement)
    assert verdict.prefix is not None
    return verdict.prefill.worker_id, verdict.prefix.local_blocks


async def kill_and_recover(coordinator: CoordinatorProcess, network: GrpcNetwork) -> float:
    """Seconds from when the next one listens."""
    await coordinator.kill()
    assert await members(network, coordinator.address) is None
    await coordinator.start()
    started_s = time.monotonic()
    figures = await until_known(network, coordinator.address, NUM_WORKERS, NUM_WORKERS * NUM_BLOCKS)
    took_s = time.monotonic() - started_s
    assert figures.block_snapshots_total == NUM_WORKERS
    return took_s


@pytest.mark.timeout(180)
def test_a_killed_coordinator_s_successor_knows_64_workers_and_their_blocks() -> None:
    async def main() -> None:
        token = secrets.token_hex(16)
        async with (
            gateway_network(token) as network,
            coordinator_process(token) as coordinator,
            light_workers(coordinator.address, token) as workers,
        ):
            await until_known(network, coordinator.address, NUM_WORKERS, NUM_WORKERS * NUM_BLOCKS)
            for _ in range(2):
                took_s = await kill_and_recover(coordinator, network)
                print(f"{NUM_WORKERS} workers with {NUM_BLOCKS} blocks each are known again after {took_s:.2f} s")
                assert took_s < RECOVERY_LIMIT_S
                for number in (0, 30, 62):
                    found = await local_blocks(network, coordinator.address, number)
                    assert found == (workers[number].info.worker_id, NUM_BLOCKS)
            assert all(worker.gone == [] for worker in workers), "nobody was given up"

    asyncio.run(main())
