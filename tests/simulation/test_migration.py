"""Requests that move between workers while they are written: right tokens, one owner, clean books, whatever is lost.

A failing case prints its seed; `pytest 'tests/simulation/test_migration.py::test_…[SEED]'` repeats it exactly.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from contracts.errors import TandemError
from contracts.ids import OwnerEpoch
from contracts.messages import RequestKey
from contracts.requests import SamplingParams
from kvtransfer.memory import PullFate, PullInfo
from simulator import Program, run
from simulator.clients import Answer, ask_into
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import Ask, serve, workload

if TYPE_CHECKING:
    import random

    from contracts.messages import MoveMode, Role
    from contracts.requests import TokenDelta

ONE_READS_TWO_WRITE: dict[str, Role] = {"p0": "prefill", "d0": "decode", "d1": "decode"}
TWO_READ_TWO_WRITE: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
TWO_MIXED: dict[str, Role] = {"m0": "mixed", "m1": "mixed"}


async def move_at_random(cluster: SimulatedCluster, rng: random.Random, names: tuple[str, ...], mode: MoveMode) -> int:
    """Until cancelled; how many moves were begun stands in the workers' tallies."""
    while True:
        await asyncio.sleep(rng.uniform(0.005, 0.05))
        source, destination = rng.sample(names, 2)
        if source in cluster.up() and destination in cluster.up():
            with suppress(TandemError):
                await cluster.migrate(source, destination, mode=mode, max_requests=rng.choice([1, 1, 2, 4]))


async def serve_while_moving(
    program: Program,
    cluster: SimulatedCluster,
    asks: list[Ask],
    mode: MoveMode,
    names: tuple[str, ...] = ("d0", "d1"),
) -> None:
    moving = asyncio.create_task(move_at_random(cluster, program.rng("moves"), names, mode))

    async def stop() -> None:
        await asyncio.sleep(max(ask.at_s for ask in asks) + 6.0)
        moving.cancel()

    stopping = asyncio.create_task(stop())
    for answer in await serve(program, cluster, asks):
        assert answer.error is None, answer.error
    await stopping


def owned(cluster: SimulatedCluster) -> int:
    """Moves that ended with another owner."""
    return sum(cluster.worker(name).moves.outcomes["owned"] for name in cluster.up() if not name.startswith("store"))


@pytest.mark.parametrize("mode", ["kv", "tokens"])
@pytest.mark.parametrize("seed", range(2))
def test_answers_that_move_all_the_time_are_the_same(mode: MoveMode, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ONE_READS_TWO_WRITE)) as cluster:
            asks = workload(program.rng("workload"), count=30, over_s=3.0, output=120)
            await serve_while_moving(program, cluster, asks, mode)
            assert owned(cluster) >= 30
            assert not cluster.core.stats.replays

    run(main, seed=seed)


@pytest.mark.parametrize("roles", [TWO_MIXED, TWO_READ_TWO_WRITE], ids=["mixed", "2P2D"])
@pytest.mark.parametrize("seed", range(2))
def test_what_waits_moves_too(roles: dict[str, Role], seed: int) -> None:
    """Prompts that nobody has begun to read, and preempted answers."""

    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=roles, num_blocks=32)
        async with SimulatedCluster(program, spec) as cluster:
            asks = workload(program.rng("workload"), count=60, over_s=1.0, output=60)
            readers = tuple(name for name, role in roles.items() if role != "decode")
            await serve_while_moving(program, cluster, asks, "auto", names=readers)
            begun = [cluster.worker(name).moves.begun for name in readers]
            assert sum(each["prompt"] for each in begun) >= 3
            assert owned(cluster) >= 3

    run(main, seed=seed)


@pytest.mark.parametrize("mode", ["kv", "tokens"])
@pytest.mark.parametrize("seed", range(2))
def test_cancels_at_any_moment_of_a_move_leave_nothing(mode: MoveMode, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ONE_READS_TWO_WRITE, num_blocks=48)) as cluster:
            asks = workload(program.rng("workload"), count=60, over_s=3.0, output=80, cancels=0.6)
            await serve_while_moving(program, cluster, asks, mode)

    run(main, seed=seed)


@pytest.mark.parametrize("mode", ["kv", "tokens"])
@pytest.mark.parametrize("seed", range(3))
def test_workers_killed_at_any_moment_of_a_move_leave_one_owner(mode: MoveMode, seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("faults")
        async with SimulatedCluster(program, ClusterSpec(roles=ONE_READS_TWO_WRITE)) as cluster:

            async def kill_and_restart() -> None:
                for _ in range(6):
                    await asyncio.sleep(rng.uniform(0.1, 1.0))
                    victim = rng.choice(["d0", "d1"])
                    cluster.crash(victim)
                    await asyncio.sleep(rng.uniform(0.0, 1.0))
                    await cluster.start(victim)

            faults = asyncio.create_task(kill_and_restart())
            asks = workload(program.rng("workload"), count=60, over_s=6.0, output=100)
            await serve_while_moving(program, cluster, asks, mode)
            await faults

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_slow_and_failing_pulls_of_a_move_cost_nobody_his_answer(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("pulls")

        def fate(info: PullInfo) -> PullFate:
            if info.holder.startswith("d") and rng.random() < 0.4:
                return PullFate(duration_s=rng.uniform(0, 0.5), error=TandemError("the wire broke"), heeds_stop=False)
            return PullFate(duration_s=rng.expovariate(20.0), heeds_stop=rng.random() < 0.5)

        async with SimulatedCluster(program, ClusterSpec(roles=ONE_READS_TWO_WRITE, fate=fate)) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=4.0, output=100)
            await serve_while_moving(program, cluster, asks, "kv")
            assert not cluster.core.stats.replays

    run(main, seed=seed)


def test_a_request_goes_back_and_forth_and_stays_itself() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ONE_READS_TWO_WRITE)) as cluster:
            sampling = SamplingParams(temperature=1.0, seed=7, max_tokens=400)
            ask = Ask(at_s=0.0, token_ids=tuple(range(50)), sampling=sampling)
            task = asyncio.create_task(serve(program, cluster, [ask]))
            await asyncio.sleep(0.5)
            num_moves = 0
            for _ in range(30):
                holder = "d0" if cluster.worker("d0").decode.running_count else "d1"
                other = "d1" if holder == "d0" else "d0"
                reply = await cluster.migrate(holder, other, mode="kv")
                num_moves += len(reply.started)
                await asyncio.sleep(0.1)
            (answer,) = await task
            assert answer.error is None, answer.error
            assert num_moves >= 20
            assert owned(cluster) >= 20

    run(main, seed=1)


@dataclass(slots=True, kw_only=True)
class TimedAnswer(Answer):
    """Notes when each token came."""

    times_s: list[float] = field(default_factory=list[float])
    #: Set once there are some.
    settled: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, delta: TokenDelta) -> None:
        Answer.take(self, delta)
        self.times_s.append(asyncio.get_running_loop().time())
        if len(self.times_s) >= 50:
            self.settled.set()

    def longest_gap_s(self, since: int) -> float:
        return max(after - before for before, after in pairwise(self.times_s[since:]))


@pytest.mark.parametrize("context", [200, 6000])
def test_a_move_by_tokens_costs_its_client_a_few_steps_however_long_it_is(context: int) -> None:
    """Reading 6,000 tokens takes 250 of this model's decode steps, reading what is written meanwhile 10."""

    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=ONE_READS_TWO_WRITE, num_blocks=1024, max_context_tokens=8192)
        async with SimulatedCluster(program, spec) as cluster:
            sampling = SamplingParams(temperature=0.0, max_tokens=1000)
            answer = TimedAnswer(ask=Ask(at_s=0.0, token_ids=(7,) * context, sampling=sampling))
            reading = asyncio.create_task(ask_into(cluster.core, answer))
            async with asyncio.timeout(30.0):
                await answer.settled.wait()
            usual_s = answer.longest_gap_s(5)
            source = "d0" if cluster.worker("d0").decode.running_count else "d1"
            destination = "d1" if source == "d0" else "d0"
            assert (await cluster.migrate(source, destination, mode="tokens")).started
            await reading
            assert answer.problems() == []
            assert owned(cluster) == 1
            assert answer.longest_gap_s(5) < 4 * usual_s

    run(main, seed=1)


def test_a_destination_that_gives_a_move_by_tokens_up_frees_its_source_at_once() -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=ONE_READS_TWO_WRITE, num_blocks=1024, max_context_tokens=8192)
        async with SimulatedCluster(program, spec) as cluster:
            sampling = SamplingParams(temperature=0.0, max_tokens=500)
            answer = TimedAnswer(ask=Ask(at_s=0.0, token_ids=(7,) * 6000, sampling=sampling))
            reading = asyncio.create_task(ask_into(cluster.core, answer))
            async with asyncio.timeout(30.0):
                await answer.settled.wait()
            source = "d0" if cluster.worker("d0").decode.running_count else "d1"
            destination = "d1" if source == "d0" else "d0"
            (key,) = (await cluster.migrate(source, destination, mode="tokens")).started
            # In the middle of what it has to read.
            await asyncio.sleep(1.0)
            leaving, coming = cluster.worker(source).moves, cluster.worker(destination).moves
            assert (leaving.num_leaving, coming.num_coming) == (1, 1)
            claimed_key = RequestKey(key.request_id, key.attempt, OwnerEpoch(key.owner_epoch + 1))
            cluster.worker(destination).decode.moves_in.lost(claimed_key, "for the test")
            await asyncio.sleep(0.1)
            assert (leaving.num_leaving, leaving.outcomes["stayed"]) == (0, 1)
            await reading
            assert answer.problems() == []
            assert len(answer.token_ids) == 500

    run(main, seed=1)
