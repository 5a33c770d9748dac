"""Operations on workers under load: drain, flip, restart, and whatever goes down meanwhile. No request fails, every
token is checked, and nobody is left draining."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from contracts.control_messages import (
    DrainOperation,
    FlipOperation,
    MoveOperation,
    Operation,
    OperationStatus,
    RemoveOperation,
    RestartOperation,
    StartOperation,
    UndrainOperation,
)
from contracts.errors import BadRequest, NotFound
from contracts.ids import WorkerId
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import Ask, ask_for, check, check_books, workload

if TYPE_CHECKING:
    from contracts.messages import Member, Role

TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
#: Everything ends within this much virtual time.
PATIENCE_S = 120.0


def spec(roles: dict[str, Role] | None = None, **more: object) -> ClusterSpec:
    return ClusterSpec(roles=roles or TWO_OF_EACH, agent=True, **more)  # type: ignore[arg-type]


class Load:
    """Requests in the background, none of which may fail."""

    def __init__(self, program: Program, cluster: SimulatedCluster, *, over_s: float = 20.0, count: int = 60) -> None:
        self.asks: list[Ask] = workload(program.rng("load"), count=count, over_s=over_s, output=60)
        self._tasks = [asyncio.create_task(ask_for(cluster, ask)) for ask in self.asks]

    async def end(self) -> None:
        for answer in await asyncio.gather(*self._tasks):
            check(answer)
            assert answer.error is None, answer


async def ended(cluster: SimulatedCluster, operation_id: int) -> OperationStatus:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            status = await status_of(cluster, operation_id)
            if status.state != "running":
                return status
            await asyncio.sleep(0.1)


async def status_of(cluster: SimulatedCluster, operation_id: int) -> OperationStatus:
    (found,) = [each for each in (await cluster.operations()).operations if each.operation_id == operation_id]
    return found


async def done(cluster: SimulatedCluster, operation: Operation) -> OperationStatus:
    status = await ended(cluster, await cluster.operate(operation))
    assert status.state == "done", status
    return status


async def member(cluster: SimulatedCluster, worker_id: str) -> Member:
    (found,) = [each for each in await cluster.members() if each.info.worker_id == worker_id]
    return found


async def at_rest(cluster: SimulatedCluster) -> None:
    """Nobody drains any more, and the books are clean."""
    await asyncio.sleep(30.0)
    assert [each.info.worker_id for each in await cluster.members() if each.load.draining] == []
    await check_books(cluster)


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_drained_worker_has_nothing_and_gets_nothing_until_it_is_undrained(victim: str) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster)
            await asyncio.sleep(5.0)
            await done(cluster, DrainOperation(worker_id=WorkerId(victim)))
            for _ in range(40):
                await asyncio.sleep(0.1)
                found = cluster.worker(victim).load()
                assert (found.draining, found.open_requests, found.open_leases) == (True, 0, 0)
            await done(cluster, UndrainOperation(worker_id=WorkerId(victim)))
            await load.end()
            again = Load(program, cluster, over_s=5.0)
            await asyncio.sleep(3.0)
            assert not cluster.worker(victim).load().draining
            await again.end()
            await at_rest(cluster)

    run(main, seed=0)


@pytest.mark.parametrize(("victim", "role"), [("d1", "prefill"), ("p1", "decode"), ("d0", "mixed")])
@pytest.mark.parametrize("seed", range(2))
def test_a_flipped_worker_serves_in_its_new_role_in_the_same_life_and_back(victim: str, role: Role, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster, over_s=30.0, count=100)
            await asyncio.sleep(4.0)
            before = (await member(cluster, victim)).info
            await done(cluster, FlipOperation(worker_id=WorkerId(victim), role=role))
            after = (await member(cluster, victim)).info
            assert (after.role, after.incarnation, after.address) == (role, before.incarnation, before.address)
            steps_before = cluster.worker(victim).loop.steps_total
            await asyncio.sleep(5.0)
            assert cluster.worker(victim).loop.steps_total > steps_before, "it gets work in its new role"
            await done(cluster, FlipOperation(worker_id=WorkerId(victim), role=before.role))  # type: ignore[arg-type]
            await load.end()
            await at_rest(cluster)
            assert cluster.ended == []

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_everybody_is_restarted_in_turn_and_no_request_fails(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(stores=("s0",))) as cluster:
            load = Load(program, cluster)
            await asyncio.sleep(2.0)
            lives = {each.info.worker_id: each.info.incarnation for each in await cluster.members()}
            status = await done(cluster, RestartOperation())
            assert status.text == "5 restarted"
            for each in await cluster.members():
                assert each.info.incarnation == lives[each.info.worker_id] + 1
            await load.end()
            await at_rest(cluster)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_a_restart_into_a_build_whose_kv_means_something_else_fails_no_request(seed: int) -> None:
    """Old workers go on with each other, and new ones with each other, as soon as there is a pair of them."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster)
            await asyncio.sleep(2.0)
            cluster.protocol_version += 1
            restarting = asyncio.create_task(done(cluster, RestartOperation()))
            seen: set[int] = set()
            while not restarting.done():
                seen.add(len({each.info.identity for each in await cluster.members()}))
                await asyncio.sleep(0.1)
            await restarting
            assert seen == {1, 2}, "there was a time with both"
            await load.end()
            await at_rest(cluster)

    run(main, seed=seed)


def test_a_removed_worker_is_gone_until_it_is_started() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster)
            await asyncio.sleep(3.0)
            await done(cluster, RemoveOperation(worker_id=WorkerId("d0")))
            assert "d0" not in cluster.up()
            await asyncio.sleep(3.0)
            await done(cluster, StartOperation(worker_id=WorkerId("d0"), role="prefill"))
            assert (await member(cluster, "d0")).info.role == "prefill"
            await load.end()
            await at_rest(cluster)

    run(main, seed=1)


@pytest.mark.parametrize(("victim", "other"), [("d0", "d1"), ("p0", "p1"), ("d0", "p1")])
def test_the_last_of_a_role_moves_under_load_and_no_request_fails(victim: str, other: str) -> None:
    """Also into a slot of the other role, which takes this one's."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            for name in sorted({"d1", "p1", other}):
                await done(cluster, RemoveOperation(worker_id=WorkerId(name)))
            role = (await member(cluster, victim)).info.role
            load = Load(program, cluster)
            await asyncio.sleep(5.0)
            status = await done(cluster, MoveOperation(worker_id=WorkerId(victim), to=WorkerId(other)))
            assert status.text == f"it has stopped, and {other} is up in its place"
            assert victim not in cluster.up()
            assert (await member(cluster, other)).info.role == role
            await load.end()
            await at_rest(cluster)

    run(main, seed=1)


@pytest.mark.parametrize("seed", range(4))
def test_a_cancelled_operation_gives_its_worker_back(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster)
            await asyncio.sleep(3.0)
            number = await cluster.operate(RestartOperation())
            await asyncio.sleep(program.rng("moment").uniform(0.0, 3.0))
            await cluster.operations(cancel=number)
            assert (await ended(cluster, number)).state == "cancelled"
            await load.end()
            await at_rest(cluster)
            assert set(cluster.up()) == set(TWO_OF_EACH)

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_a_coordinator_that_is_killed_during_a_restart_leaves_nobody_draining(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            await asyncio.sleep(1.0)
            load = Load(program, cluster)
            await asyncio.sleep(3.0)
            await cluster.operate(RestartOperation())
            await asyncio.sleep(program.rng("moment").uniform(0.0, 6.0))
            await cluster.crash_coordinator()
            await asyncio.sleep(2.0)
            await cluster.start_coordinator()
            await load.end()
            await at_rest(cluster)
            assert set(cluster.up()) == set(TWO_OF_EACH)
            assert (await cluster.operations()).operations == ()

    run(main, seed=seed)


def test_a_drain_that_nobody_knows_of_any_more_can_be_taken_back() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            await done(cluster, DrainOperation(worker_id=WorkerId("d0")))
            await cluster.crash_coordinator()
            await cluster.start_coordinator()
            await asyncio.sleep(5.0)
            assert (await member(cluster, "d0")).load.draining
            load = Load(program, cluster, over_s=5.0)
            await load.end()
            assert (await member(cluster, "d0")).load.draining, "an operator's drain lasts"
            await done(cluster, UndrainOperation(worker_id=WorkerId("d0")))
            await at_rest(cluster)

    run(main, seed=0)


def test_without_a_node_agent_a_restart_is_refused_and_one_that_loses_it_fails_and_gives_the_worker_back() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster)
            await asyncio.sleep(3.0)
            number = await cluster.operate(RestartOperation(worker_ids=(WorkerId("d0"),)))
            await asyncio.sleep(0.5)
            cluster.crash_agent()
            await asyncio.sleep(20.0)
            status = await status_of(cluster, number)
            assert (status.state, "its node agent is not heard" in status.text) == ("running", True), status
            await cluster.operations(cancel=number)
            with pytest.raises(BadRequest, match="no node agent runs d1"):
                await cluster.operate(RestartOperation(worker_ids=(WorkerId("d1"),)))
            await load.end()
            await at_rest(cluster)

    run(main, seed=0)


def test_what_would_leave_nobody_to_serve_is_refused_unless_forced() -> None:
    async def main(program: Program) -> None:
        roles: dict[str, Role] = {"p0": "prefill", "d0": "decode", "d1": "decode"}
        async with SimulatedCluster(program, spec(roles)) as cluster:
            await asyncio.sleep(1.0)
            for operation in (
                DrainOperation(worker_id=WorkerId("p0")),
                FlipOperation(worker_id=WorkerId("p0"), role="decode"),
                RemoveOperation(worker_id=WorkerId("p0")),
                RestartOperation(),
            ):
                with pytest.raises(BadRequest, match="without p0 nobody could serve requests: the others are 2 decode"):
                    await cluster.operate(operation)
            with pytest.raises(NotFound, match="there is no worker d9; there are d0, d1, p0"):
                await cluster.operate(DrainOperation(worker_id=WorkerId("d9")))
            await done(cluster, RestartOperation(force=True))
            await Load(program, cluster, over_s=5.0, count=20).end()
            await at_rest(cluster)

    run(main, seed=0)


def test_a_drain_with_a_deadline_ends_there_and_says_what_is_left() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec()) as cluster:
            load = Load(program, cluster, over_s=3.0)
            await asyncio.sleep(2.5)
            number = await cluster.operate(DrainOperation(worker_id=WorkerId("d0"), within_s=0.3))
            status = await ended(cluster, number)
            assert status.state == "failed"
            assert "after 0.3 s there are " in status.text
            assert cluster.worker("d0").load().draining, "whoever asked said that it dies"
            await load.end()
            await done(cluster, UndrainOperation(worker_id=WorkerId("d0")))
            await at_rest(cluster)

    run(main, seed=0)
