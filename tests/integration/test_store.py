"""Chats over a real cluster with a store: later turns compute and move what is new, and the disk outlasts everything.

Every answer is held against the reference, token by token: what was kept, moved or read from disk is right.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from benchmarks.models import VOCAB, random_88m
from contracts.messages import MEMBERS, Empty
from contracts.store_messages import CACHE_STAT, CacheStatRequest
from rpc import GrpcNetwork
from tests.support.cluster import running_cluster
from tests.support.oracle import Oracle
from tests.support.tiny_models import load_reference

if TYPE_CHECKING:
    from pathlib import Path

    from contracts.messages import TransferReport
    from contracts.store_messages import CacheStatReply
    from tests.support.cluster import ClusterProcess

BLOCK_TOKENS = 16
NUM_TURNS = 5
#: New words of a turn, and of its answer; no multiples of a block. Long enough that copying what is known of them is
#: clearly faster than computing it, for a model of this size.
NUM_NEW_TOKENS = 117
NUM_ANSWER_TOKENS = 43
#: News of what is kept reach the coordinator within this.
SETTLE_LIMIT_S = 20.0


@pytest.fixture(scope="module")
def oracle(tmp_path_factory: pytest.TempPathFactory) -> Oracle:
    """Of a model for which copying KV is faster than computing it, as it is for real ones."""
    folder = random_88m(tmp_path_factory.mktemp("models") / "88m")
    return Oracle(folder, load_reference(folder), [], [])


def overrides(folder: Path, **more: str) -> dict[str, str]:
    return {
        "served_model_name": "tiny",
        "dtype": "float32",
        "block_tokens": str(BLOCK_TOKENS),
        "pools.*.kv_memory": "512MiB",
        "store.dram": "256MiB",
        "store.ssd.path": str(folder / "kv"),
        "store.ssd.size": "1GiB",
        **more,
    }


def words(turn: int, salt: int = 0) -> list[int]:
    return [(turn * 131 + salt * 17 + index * 7) % VOCAB for index in range(NUM_NEW_TOKENS)]


async def ask(client: httpx.AsyncClient, prompt: list[int]) -> tuple[list[int], int]:
    """The answer's tokens, and how many of the prompt's were not computed."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": NUM_ANSWER_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    document: dict[str, Any] = response.json()
    cached: int = document["usage"]["prompt_tokens_details"]["cached_tokens"]
    return document["choices"][0]["token_ids"], cached


def right(oracle: Oracle, prompt: list[int], answer: list[int]) -> None:
    """Each token is the reference's choice after our own ones, ties excepted."""
    assert len(answer) == NUM_ANSWER_TOKENS
    logits = oracle.logits(prompt + answer)[len(prompt) - 1 : -1]
    best = [int(row.argmax()) for row in logits]
    Oracle(oracle.model_dir, oracle.model, [prompt], [best], oracle.count).check([answer])


async def stats(cluster: ClusterProcess) -> dict[str, CacheStatReply]:
    """By worker id."""
    network = GrpcNetwork(token=cluster.state.cluster_token)
    try:
        members = await network.channel(cluster.state.coordinator_address).call(MEMBERS, Empty(), timeout_s=5.0)
        return {
            member.info.worker_id: await network.channel(member.info.address).call(
                CACHE_STAT, CacheStatRequest(target=member.info.incarnation), timeout_s=5.0
            )
            for member in members.members
        }
    finally:
        await network.close()


async def transfers(cluster: ClusterProcess) -> dict[str, TransferReport]:
    network = GrpcNetwork(token=cluster.state.cluster_token)
    try:
        members = await network.channel(cluster.state.coordinator_address).call(MEMBERS, Empty(), timeout_s=5.0)
        return {each.info.worker_id: each.transfers for each in members.members if each.transfers is not None}
    finally:
        await network.close()


async def kept(cluster: ClusterProcess, tier: str, num_blocks: int) -> None:
    """Waits until the store has at least so many blocks in that tier."""
    async with asyncio.timeout(SETTLE_LIMIT_S):
        while True:
            found = [
                figures.num_blocks
                for worker_id, reply in (await stats(cluster)).items()
                if worker_id.startswith("store")
                for figures in reply.tiers
                if figures.tier == tier
            ]
            if found and max(found) >= num_blocks:
                return
            await asyncio.sleep(0.1)


async def pulled_bytes(cluster: ClusterProcess) -> dict[str, int]:
    """Taken by each worker from others, probes left out."""
    return {
        worker_id: sum(tally.num_bytes for tally in report.pulls)
        for worker_id, report in (await transfers(cluster)).items()
    }


async def settled(cluster: ClusterProcess) -> dict[str, int]:
    """`pulled_bytes` once it has stopped to grow: reports come with heartbeats, twice a second."""
    async with asyncio.timeout(SETTLE_LIMIT_S):
        before, quiet = await pulled_bytes(cluster), 0
        while quiet < 4:
            await asyncio.sleep(0.4)
            now = await pulled_bytes(cluster)
            quiet = quiet + 1 if now == before else 0
            before = now
        return before


@pytest.mark.timeout(300)
async def test_five_turns_compute_and_move_what_is_new(oracle: Oracle, tmp_path: Path) -> None:
    settings = overrides(tmp_path, **{"transfer.probe": "false"})
    async with running_cluster(model=oracle.model_dir, config="configs/local.yaml", overrides=settings) as cluster:
        async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
            prompt = words(0)
            num_standing = 0
            block_bytes = next(iter((await stats(cluster)).values())).block_bytes
            before = await settled(cluster)
            for turn in range(1, NUM_TURNS + 1):
                answer, num_cached = await ask(client, prompt)
                right(oracle, prompt, answer)
                # All that was computed in earlier turns, in whole blocks, by whichever worker.
                assert num_cached == num_standing * BLOCK_TOKENS, (turn, num_cached)
                after = await settled(cluster)
                num_blocks = -(-len(prompt) // BLOCK_TOKENS)
                moved = {each: (after[each] - before[each]) // block_bytes for each in after}
                decode = sum(count for each, count in moved.items() if each.startswith("decode"))
                assert decode == num_blocks - num_standing, (turn, moved)
                before = after
                # The last token of an answer is never computed.
                num_standing = (len(prompt) + len(answer) - 1) // BLOCK_TOKENS
                await kept(cluster, "dram", num_standing)
                prompt = [*prompt, *answer, *words(turn)]
                await asyncio.sleep(0.5)
        for worker_id, audit in (await cluster.audit()).items():
            assert audit.problems == (), worker_id
            assert audit.load.available_blocks == audit.total_blocks, (worker_id, audit)
    assert oracle.count.ties <= 1


async def test_the_disk_outlasts_a_restart_of_everything(oracle: Oracle, tmp_path: Path) -> None:
    first = [*words(3, salt=1), *words(4, salt=2), *words(5, salt=3)]
    num_kept = (len(first) + NUM_ANSWER_TOKENS - 1) // BLOCK_TOKENS
    settings = overrides(tmp_path)
    async with running_cluster(model=oracle.model_dir, config="configs/local.yaml", overrides=settings) as cluster:
        async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
            answer, num_cached = await ask(client, first)
            right(oracle, first, answer)
            assert num_cached == 0
        await kept(cluster, "ssd", num_kept)
    turn = [*first, *answer, *words(4)]
    async with running_cluster(model=oracle.model_dir, config="configs/local.yaml", overrides=settings) as cluster:
        await kept(cluster, "ssd", num_kept)
        async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
            await asyncio.sleep(1.0)
            answer, num_cached = await ask(client, turn)
            right(oracle, turn, answer)
            assert num_cached == num_kept * BLOCK_TOKENS
        ssd = [figures for reply in (await stats(cluster)).values() for figures in reply.tiers if figures.tier == "ssd"]
        assert ssd[0].hit_blocks == num_kept
    assert oracle.count.ties <= 1
