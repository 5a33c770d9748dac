"""Gateways without their coordinator: no request is lost, and new ones wait no longer than the first failure takes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

from contracts.requests import SamplingParams
from gateway.core import Submission
from gateway.limits import GatewayLimits
from simulator import Program, run
from simulator.cluster import COORDINATOR_HOST, ClusterSpec, SimulatedCluster
from simulator.faults.rules import Link, Partition
from tests.support.workload import Answer, Ask, check, check_books, workload

if TYPE_CHECKING:
    from contracts.messages import Role
    from gateway.core import GatewayCore

ROLES: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
LIMITS = GatewayLimits()
#: When the coordinator goes, and for how long.
GOES_S, AWAY_S = 3.0, 6.0
#: What a request takes to its first token at this load, with everybody there; far below what noticing an outage takes.
USUAL_TTFT_S = 0.3


@dataclass(frozen=True, slots=True)
class Served:
    answer: Answer
    #: On the virtual clock, from when the cluster was asked.
    at_s: float
    ttft_s: float


async def ask(core: GatewayCore, one: Ask, begin_s: float) -> Served:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(begin_s + one.at_s - loop.time())
    answer = Answer(ask=one, asked_s=loop.time())
    first_s: float | None = None
    stream = core.submit(Submission(token_ids=one.token_ids, sampling=one.sampling, deadline_s=60.0))
    async for delta in stream:
        first_s = loop.time() if first_s is None else first_s
        answer.take(delta)
    answer.ended_s = loop.time()
    assert first_s is not None
    return Served(answer, one.at_s, first_s - answer.asked_s)


async def load(program: Program, cores: list[GatewayCore], begin_s: float) -> list[list[Served]]:
    """About twelve requests a second at each gateway, until well after the outage."""
    async with asyncio.TaskGroup() as tasks:
        running = [
            [
                tasks.create_task(ask(core, one, begin_s))
                for one in workload(program.rng(f"load {index}"), count=150, over_s=12.0, prompt=60, output=30)
            ]
            for index, core in enumerate(cores)
        ]
    return [[task.result() for task in own] for own in running]


def check_served(served: list[Served]) -> None:
    for one in served:
        check(one.answer)
        assert one.answer.finish == "length"


def slowest(served: list[Served], from_s: float, until_s: float) -> float:
    return max(one.ttft_s for one in served if from_s <= one.at_s < until_s)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("way", ["crash", "freeze"])
def test_no_request_is_lost_and_none_waits_for_the_coordinator(way: str, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            async with cluster.another_gateway("gateway-b") as other:
                cores = [cluster.core, other]
                await asyncio.sleep(2 * LIMITS.members_interval_s)
                begin_s = asyncio.get_running_loop().time()

                async def go_away() -> None:
                    await asyncio.sleep(GOES_S)
                    host = cluster.freeze_coordinator() if way == "freeze" else None
                    if host is None:
                        await cluster.crash_coordinator()
                    await asyncio.sleep(AWAY_S)
                    if host is None:
                        await cluster.start_coordinator()
                    else:
                        cluster.thaw_host(host)

                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(go_away())
                    loading = tasks.create_task(load(program, cores, begin_s))
                noticed_s = LIMITS.dispatch_timeout_with_snapshot_s if way == "freeze" else 0.0
                for core, served in zip(cores, loading.result(), strict=True):
                    check_served(served)
                    assert core.stats.replays == {}
                    assert core.stats.coordinator_outages == 1
                    assert core.stats.placements["snapshot"] >= 60
                    assert core.stats.placements["coordinator"] >= 60
                    assert slowest(served, 0.0, GOES_S) < USUAL_TTFT_S
                    assert slowest(served, GOES_S, 12.0) < noticed_s + USUAL_TTFT_S
                    # What came after the first failure waited for nothing.
                    assert slowest(served, GOES_S + noticed_s + 0.2, 12.0) < USUAL_TTFT_S
            await asyncio.sleep(10.0)
            await check_books(cluster)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_worker_that_dies_meanwhile_is_done_without(victim: str, seed: int) -> None:
    """Nobody else than the gateways notices it."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            await asyncio.sleep(2 * LIMITS.members_interval_s)
            begin_s = asyncio.get_running_loop().time()

            async def go_away() -> None:
                await asyncio.sleep(GOES_S)
                await cluster.crash_coordinator()
                await asyncio.sleep(1.0)
                cluster.crash(victim)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(go_away())
                loading = tasks.create_task(load(program, [cluster.core], begin_s))
            (served,) = loading.result()
            check_served(served)
            # Those that were there, and at most one more that was on its way.
            lost = sum(cluster.core.stats.replays.values())
            open_then = sum(
                one.at_s <= GOES_S + 1.0 < one.answer.ended_s - begin_s for one in served if one.answer.ended_s
            )
            assert lost <= open_then + 2

    run(main, seed=seed)


@pytest.mark.parametrize("phase_s", [0.0, 0.3, 0.6, 0.9])
def test_a_worker_that_came_just_before_is_known(phase_s: float) -> None:
    """Whenever that is between two of the gateway's own questions, dispatch goes on about it."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            await asyncio.sleep(2 * LIMITS.members_interval_s)
            cluster.crash("d1")
            await asyncio.sleep(5.0 + phase_s)
            assert {member.info.worker_id for member in cluster.core.snapshot.members} == {"p0", "p1", "d0"}
            begin_s = asyncio.get_running_loop().time()
            asks = workload(program.rng("load"), count=120, over_s=3.0, prompt=60, output=30)
            # d0 goes as well: without d1 nobody could write.
            async with asyncio.TaskGroup() as tasks:
                running = [tasks.create_task(ask(cluster.core, one, begin_s)) for one in asks]
                await asyncio.sleep(1.0)
                await cluster.start("d1")
                await asyncio.sleep(0.3)
                await cluster.crash_coordinator()
                cluster.crash("d0")
            check_served([task.result() for task in running])
            assert cluster.core.stats.placements["snapshot"] >= 40

    run(main, seed=7)


def heartbeats_lost() -> list[Partition]:
    return [Partition(Link(worker_id, COORDINATOR_HOST)) for worker_id in ROLES]


@pytest.mark.parametrize("seed", range(2))
def test_a_coordinator_that_hears_no_worker_any_more_refuses_nobody(seed: int) -> None:
    """It answers its gateways all the while, and they hear every worker."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            await asyncio.sleep(2 * LIMITS.members_interval_s)
            begin_s = asyncio.get_running_loop().time()
            members = {one.info.worker_id: one.info for one in await cluster.core.members()}
            losses = heartbeats_lost()

            async def go_away() -> None:
                await asyncio.sleep(GOES_S)
                for loss in losses:
                    cluster.network.add(loss)
                await asyncio.sleep(AWAY_S)
                for loss in losses:
                    cluster.network.remove(loss)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(go_away())
                loading = tasks.create_task(load(program, [cluster.core], begin_s))
            (served,) = loading.result()
            check_served(served)
            stats = cluster.core.stats
            assert (stats.replays, stats.coordinator_outages) == ({}, 0)
            # It is silence that it notices, and late.
            assert stats.placements["snapshot"] >= 20
            assert slowest(served, 0.0, 12.0) < USUAL_TTFT_S
            assert {one.info.worker_id: one.info for one in await cluster.core.members()} == members
            await asyncio.sleep(10.0)
            await check_books(cluster)

    run(main, seed=seed)


def test_a_gateway_without_streams_looks_for_the_workers_itself() -> None:
    """It was idle until long after the coordinator had heard the last of them."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            await asyncio.sleep(2 * LIMITS.members_interval_s)
            for loss in heartbeats_lost():
                cluster.network.add(loss)
            await asyncio.sleep(12.0)
            assert await cluster.core.members() == ()
            # Dead by now, which only this gateway can tell.
            cluster.crash("p0")
            await asyncio.sleep(0.5)
            begin_s = asyncio.get_running_loop().time()
            asks = workload(program.rng("late"), count=20, over_s=2.0)
            served = await asyncio.gather(*(ask(cluster.core, one, begin_s) for one in asks))
            check_served(served)
            assert cluster.core.stats.replays == {}
            assert cluster.core.stats.placements == {"snapshot": 20}

    run(main, seed=5)


def test_a_coordinator_that_was_just_started_refuses_nobody() -> None:
    """It is there again before a request notices, and knows no worker until they have registered."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            await asyncio.sleep(2 * LIMITS.members_interval_s)
            sampling = SamplingParams(max_tokens=5)
            asks = [Ask(at_s=number * 0.02, token_ids=(number, 1, 2), sampling=sampling) for number in range(150)]
            begin_s = asyncio.get_running_loop().time()

            async def restart() -> None:
                await asyncio.sleep(1.0)
                await cluster.crash_coordinator()
                await cluster.start_coordinator()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(restart())
                running = [tasks.create_task(ask(cluster.core, one, begin_s)) for one in asks]
            served = [task.result() for task in running]
            check_served(served)
            assert slowest(served, 0.0, 3.0) < USUAL_TTFT_S
            assert cluster.core.stats.placements["snapshot"] > 5

    run(main, seed=3)
