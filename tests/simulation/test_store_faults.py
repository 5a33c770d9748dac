"""Chats over a cluster with a store that is killed, frozen, cut off, full, or whose disk lies: every answer is right.

Whatever becomes of a store, requests that would have used it compute instead. Books are clean afterwards on both sides,
and what outlasts a store's life on its disk is found by the next one.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from contracts.requests import SamplingParams
from simulator import Program, run
from simulator.clients import Answer, Ask, ask_for
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.faults.rules import Between, Partition
from simulator.store import StoreDiskSpec
from tests.support.long_tests import only_long
from tests.support.prefix_bench import PrefixBench
from tests.support.workload import SETTLE_S, check, check_books

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Coroutine

    from contracts.messages import Role

    Trouble = Callable[[Program, SimulatedCluster], Coroutine[Any, Any, None]]

ROLES: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
STORE = "s0"


async def chat(cluster: SimulatedCluster, rng: random.Random, turns: int = 4) -> list[Answer]:
    """One after the other; the next turn begins with all that was said."""
    tokens = [rng.randrange(3) + 500] * 40 + [rng.randrange(1000) for _ in range(rng.randint(1, 60))]
    answers: list[Answer] = []
    for _ in range(turns):
        sampling = SamplingParams(temperature=0.0, max_tokens=rng.randint(1, 30))
        answer = await ask_for(cluster.core, Ask(at_s=0.0, token_ids=tuple(tokens), sampling=sampling))
        answers.append(answer)
        tokens += [*answer.token_ids, *(rng.randrange(1000) for _ in range(rng.randint(1, 30)))]
        await asyncio.sleep(rng.uniform(0.0, 1.5))
    return answers


async def kill(program: Program, cluster: SimulatedCluster) -> None:
    rng = program.rng("kills")
    for _ in range(3):
        await asyncio.sleep(rng.uniform(0.3, 2.0))
        cluster.crash(STORE)
        await asyncio.sleep(rng.uniform(0.0, 2.0))
        await cluster.start(STORE)


async def freeze(program: Program, cluster: SimulatedCluster) -> None:
    rng = program.rng("freezes")
    await asyncio.sleep(rng.uniform(0.3, 2.0))
    host = cluster.freeze(STORE)
    await asyncio.sleep(rng.uniform(0.5, 6.0))
    cluster.thaw_host(host)


async def cut_off(program: Program, cluster: SimulatedCluster) -> None:
    rng = program.rng("cuts")
    await asyncio.sleep(rng.uniform(0.3, 2.0))
    rules = [Partition(Between(STORE, other)) for other in (*ROLES, "coordinator")]
    for rule in rules:
        cluster.network.add(rule)
    await asyncio.sleep(rng.uniform(0.5, 5.0))
    for rule in rules:
        cluster.network.remove(rule)


async def kill_workers(program: Program, cluster: SimulatedCluster) -> None:
    rng = program.rng("kills")
    for _ in range(3):
        await asyncio.sleep(rng.uniform(0.3, 2.0))
        victim = rng.choice(list(ROLES))
        cluster.crash(victim)
        await asyncio.sleep(rng.uniform(0.0, 1.0))
        await cluster.start(victim)


async def nothing(program: Program, cluster: SimulatedCluster) -> None:
    return


DISKS = {
    "memory": None,
    "disk": StoreDiskSpec(),
    "small": StoreDiskSpec(num_blocks=20),
    "bad": StoreDiskSpec(damaged_chance=0.3, full_chance=0.3, block_s=0.005),
}


TROUBLES: list[Trouble] = [nothing, kill, freeze, cut_off, kill_workers]


def names(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(
    ("trouble", "disk"),
    [(nothing, "small"), (nothing, "bad"), (kill, "memory"), (kill, "bad"), (freeze, "disk"), (cut_off, "small")],
    ids=names,
)
def test_chats_are_answered_right_whatever_becomes_of_the_store(trouble: Trouble, disk: str) -> None:
    chats_with(trouble, disk, seed=1)


@pytest.mark.slow
@only_long
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("disk", DISKS)
@pytest.mark.parametrize("trouble", TROUBLES, ids=names)
def test_the_same_with_more_seeds(trouble: Trouble, disk: str, seed: int) -> None:
    chats_with(trouble, disk, seed)


def chats_with(trouble: Trouble, disk: str, seed: int) -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=ROLES, stores=(STORE,), store_blocks=48, store_disk=DISKS[disk], num_blocks=48)
        async with SimulatedCluster(program, spec) as cluster:
            chats = [asyncio.create_task(chat(cluster, program.rng(f"chat {number}"))) for number in range(10)]
            await trouble(program, cluster)
            answers = [answer for each in chats for answer in await each]
            for answer in answers:
                check(answer)
                assert answer.error is None, answer.error
            await asyncio.sleep(SETTLE_S)
            await check_books(cluster)

    run(main, seed=seed)


def test_the_next_life_of_a_store_serves_what_its_disk_kept() -> None:
    async def main(program: Program) -> None:
        roles: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
        async with PrefixBench(program, roles, stores=(STORE,), store_disk=StoreDiskSpec()) as bench, bench.client:
            await bench.begin()
            tokens = tuple(program.rng("tokens").randrange(1000) for _ in range(200))
            answer = await bench.ask("p0", "d0", tokens)
            await asyncio.sleep(3.0)
            num_kept = (len(tokens) + len(answer.token_ids) - 1) // 8
            assert len(bench.disks[STORE].blocks) == num_kept
            for worker_id in (*roles, STORE):
                bench.crash(worker_id)
                await bench.start(worker_id)
            await bench.begin()
            again = await bench.ask("p0", "d0", (*tokens, *answer.token_ids, 7), prefix=bench.plan(num_kept, STORE))
            assert again.phases.cached_by_tier == {"ssd": num_kept * 8}
            # It stands in memory by now, and in the prefill worker's own pool.
            bench.crash("p0")
            await bench.start("p0")
            await bench.begin()
            again = await bench.ask("p0", "d0", (*tokens, *answer.token_ids, 7), prefix=bench.plan(num_kept, STORE))
            assert again.phases.cached_by_tier == {"dram": num_kept * 8}
            await bench.check_clean()

    run(main, seed=1)
