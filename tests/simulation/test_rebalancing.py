"""The coordinator moves requests by itself: full workers are relieved, drained ones emptied, and every token is right.

A failing case prints its seed; `pytest 'tests/simulation/test_rebalancing.py::test_…[SEED]'` repeats it exactly.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.control_messages import DrainOperation
from contracts.ids import WorkerId
from contracts.requests import SamplingParams
from coordinator.policy.move_terms import MoveRules
from coordinator.policy.virtual_usage import UsageRules
from coordinator.rebalancer import RebalanceSettings
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import Answer, Ask, ask_for, check, check_books, workload

if TYPE_CHECKING:
    import random

    from contracts.messages import Role
    from coordinator.policy.move_terms import Purpose

ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode", "d1": "decode"}


def settings(*purposes: Purpose) -> RebalanceSettings:
    """Blocks have 8 tokens, workers 64 blocks."""
    rules = MoveRules(
        usage=UsageRules(headroom_tokens={1: 128}, growth_tokens=16),
        low_tokens=32.0,
        high_tokens=64.0,
        purposes=frozenset(purposes),
    )
    return RebalanceSettings(rules=rules)


def spec(*purposes: Purpose, roles: dict[str, Role] | None = None, num_blocks: int = 64) -> ClusterSpec:
    return ClusterSpec(
        roles=roles or ROLES, num_blocks=num_blocks, rebalancing=settings(*purposes) if purposes else None
    )


def moved(cluster: SimulatedCluster) -> int:
    """Requests that have another owner than before."""
    return sum(cluster.worker(name).moves.outcomes["owned"] for name in cluster.up())


async def answers_of(tasks: list[asyncio.Task[Answer]]) -> None:
    for answer in await asyncio.gather(*tasks):
        check(answer)
        assert answer.error is None, answer


def asking(cluster: SimulatedCluster, asks: list[Ask]) -> list[asyncio.Task[Answer]]:
    return [asyncio.create_task(ask_for(cluster, ask)) for ask in asks]


def long_answers(rng: random.Random, count: int) -> list[Ask]:
    """Of 43 blocks each, when they end."""
    prompts = [tuple(rng.randrange(1000) for _ in range(40)) for _ in range(count)]
    sampling = SamplingParams(temperature=0.0, max_tokens=300)
    return [Ask(at_s=0.01 * number, token_ids=prompt, sampling=sampling) for number, prompt in enumerate(prompts)]


@pytest.mark.parametrize("seed", range(3))
def test_a_worker_that_comes_relieves_one_that_is_full(seed: int) -> None:
    async def preempted(program: Program, *purposes: Purpose) -> tuple[int, int]:
        async with SimulatedCluster(program, spec(*purposes, num_blocks=140)) as cluster:
            cluster.crash("d1")
            await asyncio.sleep(4.0)
            tasks = asking(cluster, long_answers(program.rng("prompts"), 5))
            await asyncio.sleep(0.2)
            await cluster.start("d1")
            await answers_of(tasks)
            await check_books(cluster)
            return moved(cluster), cluster.worker("d0").decode.preemptions_total

    num_moved, num_preempted = run(lambda program: preempted(program, "memory", "balance"), seed=seed)
    _, num_preempted_alone = run(preempted, seed=seed)
    assert num_moved >= 1
    assert num_preempted < num_preempted_alone


@pytest.mark.parametrize("seed", range(3))
def test_a_drain_is_over_long_before_the_answers_are(seed: int) -> None:
    async def drained_after_s(program: Program, *purposes: Purpose) -> float:
        async with SimulatedCluster(program, spec(*purposes, num_blocks=256)) as cluster:
            tasks = asking(cluster, workload(program.rng("workload"), count=6, over_s=0.1, output=400))
            await asyncio.sleep(0.6)
            loop = asyncio.get_running_loop()
            begun_s = loop.time()
            await cluster.operate(DrainOperation(worker_id=WorkerId("d0")))
            for _ in range(1000):
                if cluster.worker("d0").standing.is_drained:
                    break
                await asyncio.sleep(0.05)
            took_s = loop.time() - begun_s
            await answers_of(tasks)
            assert not cluster.core.stats.replays
            await check_books(cluster)
            return took_s

    moving_s = run(lambda program: drained_after_s(program, "draining"), seed=seed)
    waiting_s = run(drained_after_s, seed=seed)
    assert moving_s < 0.5 * waiting_s


@pytest.mark.parametrize("seed", range(2))
def test_prompts_leave_a_reader_that_drains(seed: int) -> None:
    async def main(program: Program) -> int:
        roles: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
        async with SimulatedCluster(program, spec("draining", roles=roles)) as cluster:
            # Until all have told of their load.
            await asyncio.sleep(1.0)
            tasks = asking(cluster, workload(program.rng("workload"), count=40, over_s=0.1, output=20))
            await asyncio.sleep(0.15)
            await cluster.operate(DrainOperation(worker_id=WorkerId("p0")))
            await answers_of(tasks)
            await check_books(cluster)
            return cluster.worker("p0").moves.begun["prompt"]

    assert run(main, seed=seed) >= 1


@pytest.mark.parametrize("roles", [ROLES, {"m0": "mixed", "m1": "mixed"}], ids=["split", "mixed"])
@pytest.mark.parametrize("seed", range(2))
def test_whatever_moves_nothing_oscillates_and_every_token_is_right(roles: dict[str, Role], seed: int) -> None:
    async def main(program: Program) -> int:
        purposes: tuple[Purpose, ...] = ("memory", "priority", "defragment", "balance", "prompts")
        async with SimulatedCluster(program, spec(*purposes, roles=roles, num_blocks=64)) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=4.0, output=150)
            await answers_of(asking(cluster, asks))
            await asyncio.sleep(2.0)
            at_rest = moved(cluster)
            await asyncio.sleep(5.0)
            assert moved(cluster) == at_rest, "nobody has anything, and something moves"
            await check_books(cluster)
            return at_rest

    # Two workers that dispatch has balanced: few of the forty move at all.
    assert run(main, seed=seed) <= 10
