"""Clients do not notice that workers die, hang, are cut off or stopped: every answer is whole and right.

The tokens of a modelled engine are a hash of all that came before, greedy or drawn with noise by output index:
a token lost, repeated, or computed from another context changes all later ones. A failing case prints its seed.
"""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.errors import NotReady, TandemError, WorkerUnavailable
from contracts.requests import SamplingParams
from gateway.limits import GatewayLimits
from gateway.stats import RESUME_BOUNDS_S
from kvtransfer.memory import PullFate, PullInfo
from rpc.memory import Message, loopback_latency
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import Answer, Ask, ask_for, check, check_books, serve, workload

if TYPE_CHECKING:
    import random

    from contracts.messages import Role

ONE_OF_EACH: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
TWO_MIXED: dict[str, Role] = {"m0": "mixed", "m1": "mixed"}
ALL_KINDS: dict[str, Role] = {"p0": "prefill", "d0": "decode", "m0": "mixed"}


class Weather:
    """What becomes of messages: cut links, and delays with a long tail."""

    def __init__(self, *, tail_s: float = 0.0) -> None:
        self._tail_s = tail_s
        #: Pairs of hosts whose messages are lost.
        self._cuts: set[frozenset[str]] = set()

    def __call__(self, message: Message, rng: random.Random) -> float | None:
        if frozenset((message.source, message.target)) in self._cuts:
            return None
        tail_s = rng.expovariate(1 / self._tail_s) if self._tail_s and rng.random() < 0.05 else 0.0
        return loopback_latency(message, rng) + tail_s

    async def cut(self, one: str, other: str, for_s: float) -> None:
        link = frozenset((one, other))
        self._cuts.add(link)
        await asyncio.sleep(for_s)
        self._cuts.discard(link)


def asks_for(program: Program, *, count: int = 30, over_s: float = 5.0, logprobs: float = 0.3) -> list[Ask]:
    """Greedy and sampled, some with log-probabilities, long enough to be met in every stage."""
    rng = program.rng("workload")
    asks = workload(rng, count=count, over_s=over_s, output=120)
    return [replace(ask, sampling=_with_logprobs(ask.sampling)) if rng.random() < logprobs else ask for ask in asks]


def _with_logprobs(sampling: SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=sampling.temperature, seed=sampling.seed, max_tokens=sampling.max_tokens, logprobs=2
    )


def check_whole(answers: list[Answer]) -> None:
    failed = [(answer.ask, answer.error) for answer in answers if answer.error is not None]
    assert failed == []
    assert all(answer.finish == "length" for answer in answers)


async def restart(cluster: SimulatedCluster, victim: str, down_s: float) -> None:
    if victim in cluster.up():
        cluster.crash(victim)
        await asyncio.sleep(down_s)
        await cluster.start(victim)


@pytest.mark.parametrize(
    "roles", [ONE_OF_EACH, TWO_OF_EACH, TWO_MIXED, ALL_KINDS], ids=["1P1D", "2P2D", "2M", "1P1D1M"]
)
@pytest.mark.parametrize("seed", range(3))
def test_killed_workers_are_not_noticed(roles: dict[str, Role], seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("faults")
        async with SimulatedCluster(program, ClusterSpec(roles=roles)) as cluster:

            async def kill() -> None:
                for _ in range(3):
                    await asyncio.sleep(rng.uniform(0.3, 2.5))
                    await restart(cluster, rng.choice(sorted(roles)), rng.uniform(1.0, 5.0))

            # A cluster that has nobody for a role refuses new requests: there they all come before the first kill.
            over_s = 0.3 if roles is ONE_OF_EACH else 5.0
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kill())
                answers = await serve(program, cluster, asks_for(program, over_s=over_s))
            check_whole(answers)
            assert sum(cluster.core.stats.replays.values()) > 0
            assert cluster.core.stats.failed_after_replays == 0

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_everything_killed_at_once_is_waited_for(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("faults")
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def kill_all() -> None:
                await asyncio.sleep(rng.uniform(0.4, 1.5))
                async with asyncio.TaskGroup() as tasks:
                    for victim in sorted(TWO_OF_EACH):
                        tasks.create_task(restart(cluster, victim, rng.uniform(1.0, 8.0)))

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kill_all())
                answers = await serve(program, cluster, asks_for(program, over_s=0.3))
            check_whole(answers)
            resumed = cluster.core.stats.resumed
            assert 0 < resumed.sum_s / sum(resumed.counts) < 10.0

    run(main, seed=seed)


@pytest.mark.parametrize("gap_s", [0.02, 0.3])
@pytest.mark.parametrize("victims", [("d0", "d1"), ("p0", "p1"), ("p0", "d0"), ("d0", "p1")])
def test_the_one_that_took_over_is_killed_too(victims: tuple[str, str], gap_s: float) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def kill_both() -> None:
                await asyncio.sleep(0.8)
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(restart(cluster, victims[0], 3.0))
                    await asyncio.sleep(gap_s)
                    tasks.create_task(restart(cluster, victims[1], 3.0))

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kill_both())
                check_whole(await serve(program, cluster, asks_for(program, over_s=0.5)))

    run(main, seed=5)


LINKS = [
    ("gateway", "d0"),
    ("gateway", "p0"),
    ("p0", "d0"),
    ("p1", "d0"),
    ("coordinator", "d0"),
    ("gateway", "coordinator"),
]


@pytest.mark.parametrize("link", LINKS, ids="-".join)
@pytest.mark.parametrize("for_s", [0.5, 5.0])
def test_a_cut_link_is_not_noticed(link: tuple[str, str], for_s: float) -> None:
    """Cut off, not dead: both sides go on, and hear of each other again."""
    weather = Weather()

    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=TWO_OF_EACH, latency_s=weather)
        async with SimulatedCluster(program, spec) as cluster:

            async def cut() -> None:
                await asyncio.sleep(0.7)
                await weather.cut(*link, for_s)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(cut())
                answers = await serve(program, cluster, asks_for(program))
            check_whole(answers)

    run(main, seed=11)


def test_a_worker_that_wakes_is_told_to_stop_and_not_listened_to() -> None:
    """It decoded on while nobody heard it; what it has to say then is of an attempt that was given up."""
    weather = Weather()

    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=TWO_OF_EACH, latency_s=weather, num_blocks=128)
        async with SimulatedCluster(program, spec) as cluster:
            asks = [Ask(at_s=0.0, token_ids=(n, 1, 2), sampling=SamplingParams(max_tokens=900)) for n in range(4)]

            async def cut() -> None:
                await asyncio.sleep(1.0)
                await weather.cut("gateway", "d0", 4.5)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(cut())
                running = [tasks.create_task(ask_for(cluster, ask)) for ask in asks]
                await asyncio.sleep(5.4)
                # Long enough for what is unfinished to be unfinished still; those two have other tries' KV.
                held = (await cluster.audits())["d0"].open_requests
                await asyncio.sleep(2.5)
                freed = (await cluster.audits())["d0"].open_requests
                assert (held, freed) == (2, 0)
            answers = [task.result() for task in running]
            for answer in answers:
                check(answer)
            check_whole(answers)
            stats = cluster.core.stats
            assert stats.replays == {"worker_unavailable": 2}
            assert stats.dropped_deltas["attempt"] > 100
            await asyncio.sleep(30.0)
            await check_books(cluster)

    run(main, seed=1)


@pytest.mark.parametrize("victim", sorted(TWO_OF_EACH))
@pytest.mark.parametrize("for_s", [2.0, 6.0])
def test_a_frozen_worker_is_replaced_in_time(victim: str, for_s: float) -> None:
    """SIGSTOP, then SIGCONT: it wakes with messages of before, and with tokens nobody wants."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def freeze() -> None:
                await asyncio.sleep(0.8)
                cluster.freeze(victim)
                await asyncio.sleep(for_s)
                cluster.thaw(victim)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(freeze())
                check_whole(await serve(program, cluster, asks_for(program)))
            stats = cluster.core.stats
            if for_s > 3.0:
                assert stats.replays
            after_4_s = stats.resumed.counts[RESUME_BOUNDS_S.index(4.0) + 1 :]
            assert not any(after_4_s), stats.resumed

    run(main, seed=6)


@pytest.mark.parametrize("victim", ["p0", "d1"])
def test_a_stuck_engine_is_replaced(victim: str) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def stick() -> None:
                await asyncio.sleep(0.8)
                cluster.stick(victim)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(stick())
                check_whole(await serve(program, cluster, asks_for(program), deadline_s=200.0))
            assert cluster.core.stats.replays
            assert [worker_id for worker_id, _ in cluster.ended] == [victim]

    run(main, seed=6)


@pytest.mark.parametrize("seed", range(3))
def test_late_and_reordered_messages_with_kills(seed: int) -> None:
    weather = Weather(tail_s=0.2)

    async def main(program: Program) -> None:
        rng = program.rng("faults")
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH, latency_s=weather)) as cluster:

            async def kill() -> None:
                for _ in range(3):
                    await asyncio.sleep(rng.uniform(0.5, 3.0))
                    await restart(cluster, rng.choice(sorted(TWO_OF_EACH)), rng.uniform(0.5, 3.0))

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kill())
                check_whole(await serve(program, cluster, asks_for(program)))

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(3))
def test_failed_transfers_are_not_noticed(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("pulls")

        def fate(info: PullInfo) -> PullFate:
            # Not while the workers measure what they may use.
            is_broken = asyncio.get_running_loop().time() > 1.0 and rng.random() < 0.04
            error = TandemError("the wire broke") if is_broken else None
            return PullFate(duration_s=rng.uniform(0, 0.02), error=error)

        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH, fate=fate)) as cluster:
            await asyncio.sleep(1.0)
            check_whole(await serve(program, cluster, asks_for(program)))
            assert cluster.core.stats.replays["transfer_aborted"] > 0

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_workers_stopped_one_after_the_other_are_not_noticed(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def roll() -> None:
                for victim in sorted(TWO_OF_EACH):
                    await asyncio.sleep(1.0)
                    await cluster.stop(victim)
                    await asyncio.sleep(0.5)
                    await cluster.start(victim)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(roll())
                check_whole(await serve(program, cluster, asks_for(program)))
            assert cluster.core.stats.replays

    run(main, seed=seed)


def test_requests_do_not_need_the_coordinator_for_a_while() -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=TWO_OF_EACH, gateway=GatewayLimits(snapshot_ttl_s=60.0))
        async with SimulatedCluster(program, spec) as cluster:

            async def crash() -> None:
                await asyncio.sleep(1.0)
                await cluster.crash_coordinator()

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(crash())
                check_whole(await serve(program, cluster, asks_for(program, over_s=0.8)))
            assert cluster.core.stats.replays == {}
            late = await ask_for(cluster, Ask(at_s=0.0, token_ids=(1,), sampling=SamplingParams(max_tokens=3)))
            check_whole([late])
            await asyncio.sleep(60.0)
            too_late = await ask_for(cluster, Ask(at_s=0.0, token_ids=(1,), sampling=SamplingParams(max_tokens=3)))
            assert isinstance(too_late.error, NotReady)
            assert too_late.error.reason == "no_coordinator"

    run(main, seed=2)


@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_new_and_replayed_requests_wait_for_the_coordinator(victim: str) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

            async def crash() -> None:
                await asyncio.sleep(0.8)
                await cluster.crash_coordinator()
                cluster.crash(victim)
                await asyncio.sleep(3.0)
                await cluster.start_coordinator()
                await asyncio.sleep(1.0)
                await cluster.start(victim)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(crash())
                check_whole(await serve(program, cluster, asks_for(program, over_s=1.6)))
            assert sum(cluster.core.stats.replays.values()) > 0

    run(main, seed=2)


def test_a_worker_that_does_not_come_back_is_waited_for_no_longer_than_said() -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=ONE_OF_EACH, gateway=GatewayLimits(replay_patience_s=6.0))
        async with SimulatedCluster(program, spec) as cluster:
            ask = Ask(at_s=0.0, token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=500))
            task = asyncio.create_task(ask_for(cluster, ask))
            await asyncio.sleep(1.0)
            cluster.crash("d0")
            lost_s = asyncio.get_running_loop().time()
            answer = await task
            check(answer)
            assert isinstance(answer.error, NotReady | WorkerUnavailable)
            assert "nobody took the request up for 6 s" in answer.error.message
            assert 4.5 < asyncio.get_running_loop().time() - lost_s <= 6.1
            assert len(answer.token_ids) > 10
            assert cluster.core.stats.failed_after_replays == 1

    run(main, seed=1)


def test_the_deadline_ends_the_wait() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=ONE_OF_EACH)) as cluster:
            ask = Ask(at_s=0.0, token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=500))
            task = asyncio.create_task(ask_for(cluster, ask, deadline_s=4.0))
            await asyncio.sleep(1.0)
            cluster.crash("p0")
            cluster.crash("d0")
            answer = await task
            check(answer)
            assert answer.error is not None
            assert answer.error.code == "deadline_exceeded"
            assert asyncio.get_running_loop().time() < 5.0

    run(main, seed=1)


def test_replays_can_be_switched_off() -> None:
    async def main(program: Program) -> None:
        spec = ClusterSpec(roles=TWO_OF_EACH, gateway=GatewayLimits(max_replays=0))
        async with SimulatedCluster(program, spec) as cluster:

            async def kill() -> None:
                await asyncio.sleep(1.0)
                await restart(cluster, "d0", 1.0)

            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(kill())
                answers = await serve(program, cluster, asks_for(program, over_s=0.8))
            failed = [answer for answer in answers if answer.error is not None]
            assert failed
            assert all(isinstance(answer.error, WorkerUnavailable) for answer in failed)
            assert cluster.core.stats.replays == {}

    run(main, seed=1)


@settings(max_examples=12)
@given(
    kills=st.lists(
        st.tuples(st.sampled_from(sorted(TWO_OF_EACH)), st.floats(0, 3), st.floats(0.2, 6)), min_size=1, max_size=3
    ),
    cuts=st.lists(st.tuples(st.sampled_from(LINKS), st.floats(0, 3), st.floats(0.05, 6)), max_size=2),
    cancels=st.lists(st.none() | st.integers(0, 60), min_size=1, max_size=12),
    seed=st.integers(0, 2**32),
)
def test_whatever_fails_answers_are_whole_or_say_why_and_the_books_are_clean(
    kills: list[tuple[str, float, float]],
    cuts: list[tuple[tuple[str, str], float, float]],
    cancels: list[int | None],
    seed: int,
) -> None:
    weather = Weather()

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH, latency_s=weather)) as cluster:

            async def kill(victim: str, at_s: float, down_s: float) -> None:
                await asyncio.sleep(at_s)
                await restart(cluster, victim, down_s)

            async def cut(link: tuple[str, str], at_s: float, for_s: float) -> None:
                await asyncio.sleep(at_s)
                await weather.cut(*link, for_s)

            asks = asks_for(program, count=len(cancels), over_s=0.2)
            asks = [replace(ask, cancel_after=cancel) for ask, cancel in zip(asks, cancels, strict=True)]
            async with asyncio.TaskGroup() as tasks:
                for each in kills:
                    tasks.create_task(kill(*each))
                for link, at_s, for_s in cuts:
                    tasks.create_task(cut(link, at_s, for_s))
                answers = await serve(program, cluster, asks)
            for answer in answers:
                assert answer.error is None or answer.error.retryable, answer.error
                assert answer.error is None or cuts, answer.error

    run(main, seed=seed)


def test_a_seed_repeats_also_with_faults() -> None:
    def digest(seed: int) -> str:
        async def main(program: Program) -> str:
            async with SimulatedCluster(program, ClusterSpec(roles=TWO_OF_EACH)) as cluster:

                async def kill() -> None:
                    await asyncio.sleep(0.7)
                    await restart(cluster, "d1", 1.0)
                    await restart(cluster, "p0", 1.0)

                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(kill())
                    await serve(program, cluster, asks_for(program, count=10, over_s=1.5))
            return program.trace.digest()

        return run(main, seed=seed)

    assert digest(1) == digest(1)
    assert digest(1) != digest(2)
