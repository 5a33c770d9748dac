"""Workers that begin to read and write both, and go back to one of them, with their work in them: a whole cluster under
load on virtual time, every token checked."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.control_messages import FlipOperation
from contracts.ids import WorkerId
from coordinator.policy.move_terms import MoveRules
from coordinator.rebalancer import RebalanceSettings
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import ask_for, check, check_books, workload

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.control_messages import OperationStatus
    from contracts.messages import Role

ROLES: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
#: Everything ends within this much virtual time.
PATIENCE_S = 120.0
#: Answers leave a worker that drains; nothing else moves any.
DRAINS_ONLY = RebalanceSettings(rules=MoveRules(purposes=frozenset({"draining"})))


def spec(**more: object) -> ClusterSpec:
    return ClusterSpec(roles=ROLES, agent=True, rebalancing=DRAINS_ONLY, **more)  # type: ignore[arg-type]


class Load:
    """Requests in the background, none of which may fail."""

    def __init__(
        self, program: Program, cluster: SimulatedCluster, *, over_s: float, count: int, output: int = 150
    ) -> None:
        asks = workload(program.rng("load"), count=count, over_s=over_s, prompt=200, output=output)
        self._tasks = [asyncio.create_task(ask_for(cluster, ask)) for ask in asks]

    async def end(self) -> None:
        for answer in await asyncio.gather(*self._tasks):
            check(answer)
            assert answer.error is None, answer


async def flipped(cluster: SimulatedCluster, worker_id: str, role: Role) -> OperationStatus:
    number = await cluster.operate(FlipOperation(worker_id=WorkerId(worker_id), role=role))
    async with asyncio.timeout(PATIENCE_S):
        while True:
            (found,) = [each for each in (await cluster.operations()).operations if each.operation_id == number]
            if found.state != "running":
                return found
            await asyncio.sleep(0.02)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.004)


async def at_rest(cluster: SimulatedCluster) -> None:
    await asyncio.sleep(30.0)
    assert [each.info.worker_id for each in await cluster.members() if each.load.draining] == []
    await check_books(cluster)
    assert cluster.ended == []


@pytest.mark.parametrize("victim", ["d0", "p0"])
@pytest.mark.parametrize("seed", range(4))
def test_a_worker_becomes_mixed_with_its_work_and_nothing_of_it_moves(victim: str, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster, over_s=8.0, count=60)
            await asyncio.sleep(program.rng("moment").uniform(1.0, 3.0))
            worker = cluster.worker(victim)
            await until(lambda: worker.load().open_requests >= 2)
            open_before = worker.load().open_requests
            flipping = asyncio.create_task(flipped(cluster, victim, "mixed"))
            drained = 0
            while not flipping.done():
                drained += worker.standing.draining
                await asyncio.sleep(0.004)
            status = flipping.result()
            assert (status.state, status.text) == ("done", "it is a mixed worker now; nothing had to leave")
            assert status.age_s < 1.0
            assert (drained, open_before > 0) == (0, True)
            assert not worker.moves.begun
            other = worker.prefill if victim == "d0" else worker.decode
            await until(lambda: other.open_count > 0)
            assert (await flipped(cluster, victim, ROLES[victim])).state == "done"
            await load.end()
            await at_rest(cluster)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_worker_that_only_writes_again_keeps_its_answers(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(num_blocks=512)) as cluster:
            assert (await flipped(cluster, "d0", "mixed")).state == "done"
            load = Load(program, cluster, over_s=6.0, count=40, output=600)
            await asyncio.sleep(program.rng("moment").uniform(1.0, 3.0))
            worker = cluster.worker("d0")
            await until(lambda: len(worker.decode.answers()) >= 2 and worker.prefill.open_count > 0)
            status = await flipped(cluster, "d0", "decode")
            assert (status.state, status.text) == ("done", "it is a decode worker now; its answers stayed")
            assert worker.decode.answers(), "it wrote all the time"
            assert set(worker.moves.begun) <= {"prompt"}
            await load.end()
            await at_rest(cluster)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_mixed_worker_that_only_reads_again_gives_its_answers_away(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            assert (await flipped(cluster, "p0", "mixed")).state == "done"
            load = Load(program, cluster, over_s=6.0, count=60)
            await asyncio.sleep(program.rng("moment").uniform(1.0, 3.0))
            worker = cluster.worker("p0")
            await until(lambda: len(worker.decode.answers()) >= 2)
            status = await flipped(cluster, "p0", "prefill")
            assert (status.state, status.text) == ("done", "it is a prefill worker now; its prompts stayed")
            assert (worker.decode.open_count, worker.prefill.own_count) == (0, 0)
            await load.end()
            await at_rest(cluster)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_roles_change_again_and_again_under_load_and_no_token_is_another(seed: int) -> None:
    """Whatever else happens: the coordinator is lost and comes back in the middle of it."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster, over_s=12.0, count=60)
            rng = program.rng("roles")
            await asyncio.sleep(1.0)
            ends: list[str] = []
            for number in range(6):
                victim = rng.choice(["p0", "d0"])
                now: Role = cluster.worker(victim).standing.info.role  # type: ignore[assignment]
                flipping = asyncio.create_task(flipped(cluster, victim, ROLES[victim] if now == "mixed" else "mixed"))
                if number == 4:
                    await asyncio.sleep(rng.uniform(0.0, 1.5))
                    await cluster.crash_coordinator()
                    await asyncio.sleep(1.0)
                    await cluster.start_coordinator()
                    flipping.cancel()
                    await asyncio.wait([flipping])
                    await asyncio.sleep(10.0)
                    continue
                ends.append((await flipping).state)
                await asyncio.sleep(rng.uniform(0.0, 2.0))
            assert set(ends) == {"done"}
            await load.end()
            await at_rest(cluster)

    run(main, seed=seed)
