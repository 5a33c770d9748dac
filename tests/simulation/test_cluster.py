"""Whole clusters on virtual time: right tokens, clean books, and one answer for every request, whatever happens.

A failing case prints its seed; `pytest 'tests/simulation/test_cluster.py::test_…[SEED]'` repeats it exactly.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import TandemError
from contracts.requests import SamplingParams
from kvtransfer.memory import PullFate, PullInfo
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import SETTLE_S, Ask, ask_for, check, serve, workload

if TYPE_CHECKING:
    from contracts.messages import Role

ONE_OF_EACH: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
MIXED: dict[str, Role] = {"m0": "mixed"}


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=max_tokens)


@pytest.mark.parametrize("roles", [ONE_OF_EACH, TWO_OF_EACH, MIXED], ids=["1P1D", "2P2D", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_every_token_is_right(roles: dict[str, Role], seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=roles)) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=4.0)
            for answer in await serve(program, cluster, asks):
                assert answer.error is None, answer.error
                assert answer.finish == "length"

    run(main, seed=seed)


@pytest.mark.parametrize("roles", [ONE_OF_EACH, MIXED], ids=["1P1D", "mixed"])
@pytest.mark.parametrize("seed", range(4))
def test_few_blocks_preempt_and_wait_but_lose_nothing(roles: dict[str, Role], seed: int) -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=roles, num_blocks=24)
        async with SimulatedCluster(program, spec) as cluster:
            asks = workload(program.rng("workload"), count=30, over_s=1.0)
            for answer in await serve(program, cluster, asks):
                assert answer.error is None, answer.error

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_cancels_at_any_moment_leave_nothing(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH, num_blocks=32)) as cluster:
            asks = workload(program.rng("workload"), count=60, over_s=3.0, cancels=0.6)
            for answer in await serve(program, cluster, asks):
                assert answer.error is None, answer.error

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(8))
def test_killed_workers_fail_their_requests_clearly_and_the_rest_go_on(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("faults")
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def kill_and_restart() -> None:
                for _ in range(4):
                    await asyncio.sleep(rng.uniform(0.2, 1.5))
                    victim = rng.choice(list(cluster.up()))
                    cluster.crash(victim)
                    await asyncio.sleep(rng.uniform(0.0, 4.0))
                    await cluster.start(victim)

            faults = asyncio.create_task(kill_and_restart())
            asks = workload(program.rng("workload"), count=80, over_s=12.0, cancels=0.1)
            answers = await serve(program, cluster, asks)
            await faults
            failed = [answer for answer in answers if answer.error is not None]
            assert all(answer.error.retryable for answer in failed if answer.error), failed
            assert len(failed) < len(answers)
            late = workload(program.rng("after"), count=5, over_s=1.0)
            assert all(answer.error is None for answer in await serve(program, cluster, late))

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(4))
def test_slow_and_failing_pulls_end_in_an_answer_or_an_error(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("pulls")

        def fate(info: PullInfo) -> PullFate:
            if rng.random() < 0.15:
                error = TandemError("the wire broke")
                return PullFate(duration_s=rng.uniform(0, 0.5), error=error, heeds_stop=False)
            return PullFate(duration_s=rng.expovariate(20.0), heeds_stop=rng.random() < 0.5)

        async with SimulatedCluster(program, ClusterSpec(roles=ONE_OF_EACH, fate=fate)) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=4.0, cancels=0.3)
            answers = await serve(program, cluster, asks)
            assert any(answer.finish == "length" for answer in answers)

    run(main, seed=seed)


def test_blocks_that_leave_the_quarantine_wake_a_preempted_answer() -> None:
    """Nothing else happens on the worker that could wake its step loop."""

    def fate(info: PullInfo) -> PullFate:
        slow = info.holder.startswith("p1")
        return PullFate(duration_s=5.0 if slow else 0.001, heeds_stop=False)

    async def main(program: Program) -> None:
        roles: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
        async with SimulatedCluster(program, ClusterSpec(roles=roles, num_blocks=16, fate=fate)) as cluster:
            long = Ask(at_s=0.0, token_ids=tuple(range(60)), sampling=greedy(40))
            gone = Ask(at_s=0.01, token_ids=tuple(range(64)), sampling=greedy(10), cancel_after=1)
            answers = await serve(program, cluster, [long, gone])
            assert answers[0].finish == "length"
            assert asyncio.get_running_loop().time() < 10.0 + SETTLE_S

    run(main, seed=1)


@pytest.mark.parametrize("seed", range(3))
def test_a_preempted_answer_does_not_starve_behind_new_ones(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("clients")
        roles: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode"}
        spec = ClusterSpec(roles=roles, num_blocks=32, max_batch_tokens=128)
        async with SimulatedCluster(program, spec) as cluster:
            over = asyncio.Event()

            async def keep_asking() -> None:
                while not over.is_set():
                    prompt = tuple(rng.randrange(1000) for _ in range(30))
                    answer = await ask_for(cluster, Ask(at_s=0, token_ids=prompt, sampling=greedy(rng.randint(20, 34))))
                    check(answer)

            async with asyncio.TaskGroup() as tasks:
                for _ in range(6):
                    tasks.create_task(keep_asking())
                await asyncio.sleep(1)
                for _ in range(4):
                    start_s = asyncio.get_running_loop().time()
                    long = await ask_for(cluster, Ask(at_s=0, token_ids=tuple(range(160)), sampling=greedy(40)))
                    check(long)
                    assert long.finish == "length", long.error
                    assert asyncio.get_running_loop().time() - start_s < 8.0
                over.set()

    run(main, seed=seed)


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_a_stopping_worker_ends_what_it_has_and_takes_nothing_new(victim: str) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:
            asks = workload(program.rng("workload"), count=40, over_s=6.0)

            async def stop_and_start() -> None:
                await asyncio.sleep(1.0)
                start_s = asyncio.get_running_loop().time()
                await cluster.stop(victim)
                assert asyncio.get_running_loop().time() - start_s < 3.0
                await asyncio.sleep(1.0)
                await cluster.start(victim)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stop_and_start())
                answers = await serve(program, cluster, asks)
            failed = [answer for answer in answers if answer.error is not None]
            late = [answer for answer in failed if answer.ask.at_s > 1.2]
            assert late == [], late

    run(main, seed=3)


@settings(max_examples=25)
@given(
    cancels=st.lists(st.none() | st.integers(0, 30), min_size=1, max_size=12),
    kills=st.lists(st.tuples(st.sampled_from(sorted(TWO_OF_EACH)), st.floats(0, 2)), max_size=3),
    num_blocks=st.integers(24, 64),
    seed=st.integers(0, 2**32),
)
def test_whatever_is_cancelled_and_killed_the_books_are_clean(
    cancels: list[int | None], kills: list[tuple[str, float]], num_blocks: int, seed: int
) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH, num_blocks=num_blocks)) as cluster:

            async def kill(worker_id: str, at_s: float) -> None:
                await asyncio.sleep(at_s)
                if worker_id in cluster.up():
                    cluster.crash(worker_id)

            asks = workload(program.rng("workload"), count=len(cancels), over_s=1.5)
            asks = [replace(ask, cancel_after=cancel) for ask, cancel in zip(asks, cancels, strict=True)]
            async with asyncio.TaskGroup() as tasks:
                for worker_id, at_s in kills:
                    tasks.create_task(kill(worker_id, at_s))
                answers = await serve(program, cluster, asks)
            if not kills:
                assert all(answer.error is None for answer in answers), answers

    run(main, seed=seed)


def test_a_seed_repeats_and_another_differs() -> None:
    def digest(seed: int) -> str:
        async def main(program: Program) -> str:
            async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:
                await serve(program, cluster, workload(program.rng("workload"), count=20, over_s=2.0, cancels=0.3))
            return program.trace.digest()

        return run(main, seed=seed)

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)
