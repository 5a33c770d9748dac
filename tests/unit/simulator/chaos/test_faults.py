"""A frozen coordinator: it neither answers nor looks, and what was sent to it is handled once it thaws."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.errors import DeadlineExceeded
from simulator import Program, run
from simulator.chaos.faults import CrashCoordinator, FreezeCoordinator
from simulator.cluster import ClusterSpec, SimulatedCluster

if TYPE_CHECKING:
    from contracts.messages import Role

ROLES: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
#: What workers and gateway take to notice, and a cluster to be as before.
NOTICED_S = 0.01
SETTLED_S = 5.0


async def known(cluster: SimulatedCluster) -> set[str]:
    return {str(member.info.worker_id) for member in await cluster.core.members()}


@pytest.mark.parametrize("for_s", [2.0, 8.0])
def test_a_frozen_coordinator_answers_nobody_and_gives_nobody_up_when_it_thaws(for_s: float) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            assert await known(cluster) == set(ROLES)
            strike = asyncio.create_task(FreezeCoordinator(at_s=0.0, for_s=for_s).strike(cluster))
            await asyncio.sleep(NOTICED_S)
            with pytest.raises(DeadlineExceeded, match="Members"):
                await cluster.core.members()
            assert not strike.done()
            await strike
            await asyncio.sleep(SETTLED_S)
            assert await known(cluster) == set(ROLES)
            assert cluster.ended == []

    run(main, seed=1)


def test_a_coordinator_frozen_while_a_worker_is_lost_finds_out_only_when_it_thaws() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            host = cluster.freeze_coordinator()
            cluster.crash("d0")
            await asyncio.sleep(10.0)
            assert not any("worker lost" in line for line in program.trace.tail().splitlines())
            cluster.thaw_host(host)
            await asyncio.sleep(SETTLED_S)
            assert any("worker lost: d0" in line for line in program.trace.tail().splitlines())
            assert await known(cluster) == {"p0"}

    run(main, seed=1)


def test_a_coordinator_that_is_killed_while_frozen_leaves_nothing_of_the_freeze_to_its_next_life() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            freeze = asyncio.create_task(FreezeCoordinator(at_s=0.0, for_s=30.0).strike(cluster))
            await asyncio.sleep(NOTICED_S)
            await CrashCoordinator(at_s=0.0, for_s=1.0).strike(cluster)
            await asyncio.sleep(SETTLED_S)
            assert await known(cluster) == set(ROLES)
            await freeze
            assert await known(cluster) == set(ROLES)

    run(main, seed=1)


def test_a_coordinator_that_is_down_cannot_be_frozen() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ROLES)) as cluster:
            await cluster.crash_coordinator()
            await FreezeCoordinator(at_s=0.0, for_s=1.0).strike(cluster)
            await cluster.start_coordinator()
            await asyncio.sleep(SETTLED_S)
            assert await known(cluster) == set(ROLES)

    run(main, seed=1)
