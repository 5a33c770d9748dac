"""A whole cluster under faults of its network and clocks: every answer right or an error, and clean books after it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from simulator import Program, run
from simulator.cluster import COORDINATOR_HOST, GATEWAY_HOST, ClusterSpec, SimulatedCluster
from simulator.faults.network import SoundLink
from simulator.faults.patterns import clog_in_turn, draw_swizzle
from simulator.faults.rules import (
    ANY,
    Between,
    Duplication,
    LatePulls,
    Link,
    Loss,
    Partition,
    Reordering,
    Resets,
    SlowLink,
)
from tests.support.workload import Answer, ask_for, check, check_books, serve, workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.messages import Role
    from simulator.faults.rules import Rule

TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
HOSTS = [*TWO_OF_EACH, COORDINATOR_HOST, GATEWAY_HOST]
EVERYWHERE = Link(ANY, ANY)
#: From the end of the faults to a cluster that has forgotten them, beyond the term of a lease.
RECOVERY_S = 30.0


def spec() -> ClusterSpec:
    link = SoundLink()
    return ClusterSpec(
        roles=TWO_OF_EACH, latency_s=link.message_delay_s, fate=link.pull_fate, clock_drift=200e-6, lease_ttl_s=5.0
    )


async def under(program: Program, cluster: SimulatedCluster, rules: list[Rule]) -> list[Answer]:
    """A workload of which the faults meet the middle; then the books."""
    asks = workload(program.rng("workload"), count=30, over_s=5.0, cancels=0.2)
    asking = [asyncio.create_task(ask_for(cluster, ask)) for ask in asks]
    await asyncio.sleep(1.0)
    for rule in rules:
        cluster.network.add(rule)
    await asyncio.sleep(3.0)
    cluster.network.heal()
    answers = list(await asyncio.gather(*asking))
    for answer in answers:
        check(answer)
        program.trace.add(f"{len(answer.token_ids)} tokens, {answer.finish}, {answer.error!r}")
    await asyncio.sleep(RECOVERY_S)
    await check_books(cluster)
    return answers


#: Rules by what they are about. Each test makes its own: some keep state.
HARMLESS: dict[str, Callable[[], list[Rule]]] = {
    "slow link": lambda: [SlowLink(EVERYWHERE, bytes_per_s=1e6, added_s=0.01)],
    "duplicates": lambda: [Duplication(EVERYWHERE, 0.2, within_s=0.5)],
    "reordering": lambda: [Reordering(EVERYWHERE, 0.2, within_s=0.1)],
}
HARMFUL: dict[str, Callable[[], list[Rule]]] = {
    "late pulls": lambda: [LatePulls(EVERYWHERE, 0.5, within_s=8.0)],
    "losses": lambda: [Loss(EVERYWHERE, 0.02)],
    "resets": lambda: [Resets(EVERYWHERE, 0.02)],
    "worker cut off": lambda: [Partition(Between("d0", ANY))],
    "pair cut one way": lambda: [Partition(Link("p0", "d0"))],
    "gateway hears nothing": lambda: [Partition(Link(ANY, GATEWAY_HOST))],
    "everything": lambda: [
        Loss(EVERYWHERE, 0.01),
        Resets(EVERYWHERE, 0.01),
        Duplication(EVERYWHERE, 0.1, within_s=1.0),
        Reordering(EVERYWHERE, 0.2, within_s=0.3),
        LatePulls(EVERYWHERE, 0.2, within_s=8.0),
        SlowLink(Between("p1", "d1"), bytes_per_s=1e5, added_s=0.02),
    ],
}


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("what", HARMLESS)
def test_a_network_that_is_only_slow_or_repeats_itself_fails_nobody(what: str, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            answers = await under(program, cluster, HARMLESS[what]())
            assert [
                answer.error for answer in answers if answer.error is not None and not answer.ask.cancel_after
            ] == []

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("what", HARMFUL)
def test_what_breaks_connections_leaves_right_answers_and_clean_books(what: str, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            answers = await under(program, cluster, HARMFUL[what]())
            assert any(answer.finish == "length" for answer in answers)
            again = await serve(program, cluster, workload(program.rng("again"), count=5, over_s=1.0))
            assert all(answer.error is None for answer in again)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_a_swizzled_cluster_comes_back(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            clogging = asyncio.create_task(
                clog_in_turn(cluster.network, draw_swizzle(program.rng("swizzle"), HOSTS, over_s=2.5))
            )
            await under(program, cluster, [])
            await clogging
            again = await serve(program, cluster, workload(program.rng("again"), count=5, over_s=1.0))
            assert all(answer.error is None for answer in again)

    run(main, seed=seed)


def test_a_jumping_wall_clock_disturbs_nobody() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            serving = asyncio.create_task(
                serve(program, cluster, workload(program.rng("workload"), count=30, over_s=5.0))
            )
            for number, host in enumerate(HOSTS):
                await asyncio.sleep(0.7)
                cluster.jump_wall_clock(host, 86_400.0 if number % 2 else -86_400.0)
            assert all(answer.error is None for answer in await serving)

    run(main, seed=1)


def test_one_seed_is_one_story_under_all_faults_at_once() -> None:
    def story(seed: int) -> tuple[str, int]:
        async def main(program: Program) -> tuple[str, int]:
            async with SimulatedCluster(program, spec()) as cluster:
                await under(program, cluster, HARMFUL["everything"]())
                return program.trace.digest(), program.trace.num_lines

        return run(main, seed=seed)

    assert story(5) == story(5)
    assert story(5) != story(6)
