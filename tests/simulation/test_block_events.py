"""The coordinator's directory follows what the workers' prefix caches hold, through evictions, losses and restarts."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.ids import WorkerId
from contracts.requests import SamplingParams
from gateway.core import Submission
from kvstore.block_keys import HINT_BYTES
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from simulator.faults.rules import ANY, Duplication, Link, Loss, Reordering
from tests.support.workload import ask_for, check, serve, workload

if TYPE_CHECKING:
    import random

    from contracts.messages import Role
    from tests.support.workload import Ask

ROLES: dict[str, Role] = {"p0": "prefill", "p1": "prefill", "m0": "mixed", "d0": "decode"}
EVERYWHERE = Link(ANY, ANY)
#: A new coordinator knows everything within this much virtual time.
REBUILT_S = 2.0


class Cluster(SimulatedCluster):
    """With a look into the directory."""

    def caches(self) -> dict[str, set[bytes]]:
        """Hints of what each worker holds."""
        lives = self._lives.items()
        return {name: {key[:HINT_BYTES] for key in life.shell.ledger.all_keys()} for name, life in lives}

    def num_events(self, worker_id: str) -> int:
        """What was stored and removed there."""
        return self._lives[worker_id].shell.publisher.num_events

    def differences(self) -> list[str]:
        """What the directory has wrong: of every worker each hint that anybody holds; and hints that nobody does."""
        assert self._coordinator is not None, "the coordinator is down"
        conductor = self._coordinator.shell.conductor
        caches = self.caches()
        hints = sorted(set[bytes]().union(*caches.values()))
        wrong: list[str] = []
        for hint in hints:
            counts = conductor.directory.match(np.frombuffer(hint, np.uint64)).counts
            for worker_id, cache in caches.items():
                number = conductor.number_of(WorkerId(worker_id))
                if bool(number < len(counts) and counts[number]) != (hint in cache):
                    wrong.append(f"{worker_id} {'holds' if hint in cache else 'does not hold'} {hint.hex()}")
        if conductor.directory.num_blocks != len(hints):
            wrong.append(f"{conductor.directory.num_blocks} blocks are listed, {len(hints)} held")
        return wrong


def alike(rng: random.Random, asks: list[Ask]) -> list[Ask]:
    """Prompts with one of three beginnings."""
    beginnings = [tuple(rng.randrange(1000) for _ in range(40)) for _ in range(3)]
    return [replace(ask, token_ids=(*rng.choice(beginnings), *ask.token_ids)) for ask in asks]


@pytest.mark.parametrize("seed", range(3))
def test_the_directory_is_right_through_evictions_and_a_new_coordinator(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("workload")
        async with Cluster(program, ClusterSpec(roles=ROLES, num_blocks=40)) as cluster:
            await serve(program, cluster, alike(rng, workload(rng, count=60, over_s=8.0)))
            caches = cluster.caches()
            assert all(caches[worker_id] for worker_id in ROLES), "who writes answers keeps them, too"
            assert any(cluster.num_events(each) > len(cache) for each, cache in caches.items()), "nothing was evicted"
            assert cluster.differences() == []
            await cluster.crash_coordinator()
            await cluster.start_coordinator()
            await asyncio.sleep(REBUILT_S)
            assert cluster.differences() == []

    run(main, seed=seed)


def test_a_worker_that_restarts_is_a_worker_without_blocks() -> None:
    async def main(program: Program) -> None:
        rng = program.rng("workload")
        async with Cluster(program, ClusterSpec(roles=ROLES, num_blocks=40)) as cluster:
            await serve(program, cluster, alike(rng, workload(rng, count=40, over_s=4.0)))
            cluster.crash("p0")
            await cluster.start("p0")
            await asyncio.sleep(1.0)
            assert cluster.caches()["p0"] == set()
            assert cluster.differences() == []

    run(main, seed=0)


@pytest.mark.parametrize("phase_s", [0.0, 0.1, 0.2, 0.3, 0.4])
def test_each_turn_of_a_conversation_finds_the_turns_before_it(phase_s: float) -> None:
    """Also in the first moments of a cluster, when nothing is known of what anything costs, and wherever between two
    heartbeats that is."""

    async def main(program: Program) -> None:
        async with SimulatedCluster(
            program, ClusterSpec(roles={"p0": "prefill", "p1": "prefill", "d0": "decode"})
        ) as it:
            await asyncio.sleep(2.0 + phase_s)
            told = tuple(range(100))
            for turn in range(4):
                sampling = SamplingParams(max_tokens=4)
                stream = it.core.submit(Submission(token_ids=told, sampling=sampling, deadline_s=30.0))
                answer = [token_id async for delta in stream for token_id in delta.token_ids]
                assert stream.timeline is not None
                # All full blocks of the last prompt.
                assert stream.timeline.num_cached_tokens == (0, 96, 120, 144)[turn]
                told = (*told, *answer, *range(1000 * turn, 1000 * turn + 20))
                # Until what is cached has been told.
                await asyncio.sleep(0.15)

    run(main, seed=1)


@pytest.mark.parametrize("seed", range(3))
def test_messages_that_are_lost_repeated_and_late_are_made_up_for(seed: int) -> None:
    async def main(program: Program) -> None:
        rng = program.rng("workload")
        async with Cluster(program, ClusterSpec(roles=ROLES, num_blocks=40)) as cluster:
            asks = alike(rng, workload(rng, count=60, over_s=8.0))
            asking = [asyncio.create_task(ask_for(cluster, ask)) for ask in asks]
            await asyncio.sleep(1.0)
            for rule in (
                Loss(EVERYWHERE, 0.02),
                Duplication(EVERYWHERE, 0.2, within_s=1.0),
                Reordering(EVERYWHERE, 0.2, within_s=0.3),
            ):
                cluster.network.add(rule)
            await asyncio.sleep(6.0)
            cluster.network.heal()
            for answer in await asyncio.gather(*asking):
                check(answer)
            # Broken connections are noticed after some seconds.
            await asyncio.sleep(10.0)
            assert cluster.differences() == []

    run(main, seed=seed)
