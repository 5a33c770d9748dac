"""Workers that freeze, get stuck, are cut off or lose their gateway: who notices, when, and what is left.

Nothing here depends on what becomes of the requests (an answer or an error, see test_replay): the subject is lives,
leases and blocks. Lease terms are far longer than what the tests wait: nothing ends by itself.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from kvtransfer.memory import PullFate, PullInfo
from rpc.memory import Message, loopback_latency
from simulator import Program, run
from simulator.cluster import COORDINATOR_HOST, ClusterSpec, SimulatedCluster
from simulator.faults.rules import ANY, Between, Partition
from tests.support.workload import Answer, ask_for, check, check_books, workload

if TYPE_CHECKING:
    import random

    from contracts.messages import AuditReply, Role

ONE_OF_EACH: dict[str, Role] = {"p0": "prefill", "d0": "decode"}
TWO_OF_EACH: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}
TTL_S = 60.0
#: Coordinator's patience, its look, and the heartbeat that tells the others.
KNOWN_GONE_S = 3.0 + 0.5 + 0.5


def spec(roles: dict[str, Role], **more: object) -> ClusterSpec:
    return ClusterSpec(roles=roles, lease_ttl_s=TTL_S, **more)  # type: ignore[arg-type]


class Load:
    """A steady stream of requests in the background; every token that comes is checked at the end."""

    def __init__(self, program: Program, cluster: SimulatedCluster, *, over_s: float, count: int = 40) -> None:
        asks = workload(program.rng("load"), count=count, over_s=over_s, output=60)
        self._tasks = [asyncio.create_task(ask_for(cluster, ask)) for ask in asks]

    async def end(self) -> list[Answer]:
        """Within the requests' own deadline."""
        answers = list(await asyncio.gather(*self._tasks))
        for answer in answers:
            check(answer)
        return answers


def is_clean(audit: AuditReply) -> bool:
    return audit.problems == () and audit.load.available_blocks == audit.total_blocks and audit.open_requests == 0


async def until_clean(cluster: SimulatedCluster, worker_ids: set[str], within_s: float) -> None:
    async with asyncio.timeout(within_s):
        while True:
            audits = await cluster.audits()
            if all(is_clean(audits[worker_id]) for worker_id in worker_ids):
                return
            await asyncio.sleep(0.1)


def now_s() -> float:
    return asyncio.get_running_loop().time()


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("seed", range(2))
def test_a_stuck_engine_ends_its_worker_and_every_request_hears_of_it(victim: str, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(TWO_OF_EACH)) as cluster:
            load = Load(program, cluster, over_s=12.0)
            await asyncio.sleep(4.0)
            cluster.stick(victim)
            stuck_s = now_s()
            while not cluster.ended:
                await asyncio.sleep(0.05)
                assert now_s() - stuck_s < 6.0, "3 s from its last step, its last words"
                # Its frames go on while its loop does: nobody else may take it for hung meanwhile.
                assert cluster.core.stats.lost_streams == 0 or cluster.ended
            ((ended, reason),) = cluster.ended
            assert ended == victim
            assert reason.startswith("its engine is stuck: a step of "), reason
            await load.end()
            await until_clean(cluster, set(TWO_OF_EACH), within_s=5.0)
            await check_books(cluster)
            assert len(cluster.ended) == 1

    run(main, seed=seed)


@pytest.mark.parametrize("seed", range(2))
def test_a_short_freeze_is_nobody_s_end(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(ONE_OF_EACH)) as cluster:
            load = Load(program, cluster, over_s=6.0)
            for victim in ("d0", "p0"):
                await asyncio.sleep(2.0)
                cluster.freeze(victim)
                await asyncio.sleep(1.5)
                cluster.thaw(victim)
            for answer in await load.end():
                assert answer.error is None, answer.error
            await until_clean(cluster, set(ONE_OF_EACH), within_s=5.0)
            assert cluster.ended == []

    run(main, seed=seed)


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("seed", range(2))
def test_a_frozen_worker_s_leases_end_everywhere_long_before_their_term(victim: str, seed: int) -> None:
    """The agent kills it, but its peers may be on machines that do not see that: the coordinator tells them."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(TWO_OF_EACH)) as cluster:
            load = Load(program, cluster, over_s=4.0)
            await asyncio.sleep(2.0)
            cluster.freeze(victim)
            frozen_s = now_s()
            await asyncio.sleep(3.5)
            assert cluster.core.stats.lost_streams == 1, "its frames stopped with its loop"
            await load.end()
            ended_s = now_s()
            cluster.crash(victim)
            bound_s = max(KNOWN_GONE_S, ended_s - frozen_s) + 1.0
            others = set(TWO_OF_EACH) - {victim}
            await until_clean(cluster, others, within_s=frozen_s + bound_s - now_s())
            await cluster.start(victim)
            await asyncio.sleep(1.0)
            await check_books(cluster)

    run(main, seed=seed)


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("seed", range(2))
def test_who_wakes_after_having_been_given_up_is_fenced_and_begins_anew(victim: str, seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(TWO_OF_EACH)) as cluster:
            load = Load(program, cluster, over_s=10.0)
            await asyncio.sleep(2.0)
            cluster.freeze(victim)
            await asyncio.sleep(5.0)
            cluster.thaw(victim)
            await asyncio.sleep(3.0)
            ((ended, reason),) = cluster.ended
            assert ended == victim
            assert "was given up and is not taken up again" in reason
            await load.end()
            await until_clean(cluster, set(TWO_OF_EACH), within_s=5.0)

    run(main, seed=seed)


def test_a_worker_cut_off_from_the_coordinator_alone_begins_anew() -> None:
    """The others were told that it is gone: what it holds of them is void, so it must not go on."""
    cut = [False]

    def weather(message: Message, rng: random.Random) -> float | None:
        if cut[0] and {message.source, message.target} == {"d0", "coordinator"}:
            return None
        return loopback_latency(message, rng)

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(TWO_OF_EACH, latency_s=weather)) as cluster:
            load = Load(program, cluster, over_s=14.0)
            await asyncio.sleep(2.0)
            cut[0] = True
            await asyncio.sleep(6.0)
            assert cluster.ended == [], "nobody has told it yet"
            cut[0] = False
            await load.end()
            assert [worker_id for worker_id, _ in cluster.ended] == ["d0"]
            await until_clean(cluster, set(TWO_OF_EACH), within_s=5.0)

    run(main, seed=5)


@pytest.mark.parametrize("cut_for_s", [2.0, 4.0, 8.0, 15.0])
@pytest.mark.parametrize("seed", range(2))
def test_a_coordinator_cut_off_from_everybody_gives_nobody_up_when_it_is_back(cut_for_s: float, seed: int) -> None:
    """The heartbeats come back one after the other: the first is no reason to end those that come after it."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(TWO_OF_EACH, clock_drift=200e-6)) as cluster:
            rng = program.rng("starts")
            for worker_id in TWO_OF_EACH:
                # Heartbeats at different times, as they are on different machines.
                cluster.crash(worker_id)
                await asyncio.sleep(rng.uniform(0.05, 0.45))
                await cluster.start(worker_id)
            cut = Partition(Between(COORDINATOR_HOST, ANY))
            cluster.network.add(cut)
            await asyncio.sleep(cut_for_s)
            cluster.network.remove(cut)
            await asyncio.sleep(6.0)
            assert cluster.ended == []
            assert {str(member.info.worker_id) for member in await cluster.core.members()} == set(TWO_OF_EACH)

    run(main, seed=seed)


def test_a_coordinator_that_was_restarted_takes_up_everybody_and_ends_nobody() -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(ONE_OF_EACH)) as cluster:
            load = Load(program, cluster, over_s=8.0, count=20)
            await asyncio.sleep(2.0)
            await cluster.crash_coordinator()
            await asyncio.sleep(5.0)
            await cluster.start_coordinator()
            await asyncio.sleep(3.0)
            assert {member.info.worker_id for member in await cluster.core.members()} == {"p0", "d0"}
            await load.end()
            await until_clean(cluster, set(ONE_OF_EACH), within_s=5.0)
            assert cluster.ended == []

    run(main, seed=2)


@pytest.mark.parametrize("seed", range(4))
def test_a_killed_gateway_s_requests_are_cancelled_on_both_sides(seed: int) -> None:
    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(TWO_OF_EACH)) as cluster:
            load = Load(program, cluster, over_s=3.0)
            await asyncio.sleep(program.rng("when").uniform(1.0, 2.5))
            audits = await cluster.audits()
            assert any(audit.open_requests for audit in audits.values()), "else this shows nothing"
            cluster.crash_gateway()
            await until_clean(cluster, set(TWO_OF_EACH), within_s=4.0)
            await asyncio.sleep(1.0)
            for audit in (await cluster.audits()).values():
                assert (audit.holder_leases, audit.reader_leases) == (0, 0)
            assert cluster.ended == []
            await load.end()

    run(main, seed=seed)


def test_a_worker_full_of_quarantined_blocks_begins_anew() -> None:
    """Its pulls do not end, and the requests they were for are long cancelled."""
    stuck = [True]

    def fate(info: PullInfo) -> PullFate:
        stays = stuck[0] and info.reader.startswith("d0")
        return PullFate(duration_s=500.0 if stays else 0.001, heeds_stop=False)

    async def main(program: Program) -> None:
        async with SimulatedCluster(program, spec(ONE_OF_EACH, fate=fate, num_blocks=32)) as cluster:
            asks = workload(program.rng("load"), count=8, over_s=1.0, prompt=64, output=10)
            tasks = [asyncio.create_task(ask_for(cluster, ask, deadline_s=3.0)) for ask in asks]
            await asyncio.wait(tasks)
            load = (await cluster.audits())["d0"].load
            assert load.quarantined_blocks > 8, load
            stuck[0] = False
            await asyncio.sleep(8.0)
            ((ended, reason),) = cluster.ended
            assert ended == "d0"
            assert "have been in quarantine for" in reason
            await until_clean(cluster, set(ONE_OF_EACH), within_s=5.0)
            later = workload(program.rng("later"), count=3, over_s=0.5, output=10)
            for answer in await asyncio.gather(*(ask_for(cluster, ask) for ask in later)):
                check(answer)
                assert answer.finish == "length", answer.error

    run(main, seed=1)


def test_frozen_runs_repeat() -> None:
    def digest() -> str:
        async def main(program: Program) -> str:
            async with SimulatedCluster(program, spec(TWO_OF_EACH)) as cluster:
                load = Load(program, cluster, over_s=6.0)
                await asyncio.sleep(2.0)
                cluster.freeze("d0")
                await asyncio.sleep(4.5)
                cluster.thaw("d0")
                for answer in await load.end():
                    program.trace.add(f"{answer.token_ids} {answer.error!r}")
            return program.trace.digest()

        return run(main, seed=9)

    assert digest() == digest()
