"""A pool of real processes that is empty until somebody asks, and empty again when nobody does."""

from __future__ import annotations

import asyncio

import httpx
import pytest

from tests.support.cluster import ClusterProcess, running_cluster
from tests.support.commands import tandem
from tests.support.long_tests import only_long

#: What anything may take here; nothing waits for it when all is well.
PATIENCE_S = 120.0

pytestmark = pytest.mark.timeout(400)

POOLS = (
    "[{name: all, role: mixed, workers: {initial: 0, min: 0, max: 2}, kv_blocks: 128,"
    " scale: {to_zero_after_s: 2, cooldown_s: 2, window_s: 2}}]"
)

EMPTY = "all (mixed, 0 to 2): 0 ready, 0 coming; wanted 0;"


def autoscale(cluster: ClusterProcess, *flags: str) -> str:
    with tandem("autoscale", *flags, "--state-file", str(cluster.state_file)) as command:
        status, output = command.wait()
    assert status == 0, output
    return output


async def until_empty(cluster: ClusterProcess) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while EMPTY not in await asyncio.to_thread(autoscale, cluster):
            pass


@only_long
async def test_the_first_request_wakes_an_empty_pool_and_the_last_lets_it_go() -> None:
    overrides = {"pools": POOLS, "coordinator.autoscale.interval_s": "0.5", "coordinator.autoscale.start_s": "5"}
    async with running_cluster(overrides=overrides) as cluster:
        assert f"{EMPTY} a start takes 5.0 s" in await asyncio.to_thread(autoscale, cluster, "--dry-run")
        body = {"model": "demo", "prompt": "Once upon a time", "max_tokens": 8, "temperature": 0}
        async with httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENCE_S) as client:
            first = await client.post("/v1/completions", json=body)
            assert first.status_code == 200, first.text
            await until_empty(cluster)
            # And once more, by what was learnt of starts.
            again = await client.post("/v1/completions", json=body)
            assert again.status_code == 200, again.text
            assert again.json()["choices"] == first.json()["choices"]
        told = await asyncio.to_thread(autoscale, cluster)
        assert told.count("pool all: starts 1") == 2
        assert told.count("pool all: removes all-") >= 1
        assert "(seen " in told
