"""Every failpoint is legal: a healthy cluster in which it fires answers every request, token by token.

Each alone with a chance of three in ten, and all together with one in ten. What may be refused is what the
failpoint's meaning allows; nothing else may be noticed by a client, and the books are clean afterwards.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.errors import TandemError
from contracts.failpoints import FAILPOINTS, Failpoints, armed
from simulator import Program, run
from simulator.cluster import ClusterSpec, SimulatedCluster
from tests.support.workload import Answer, Ask, serve, workload

if TYPE_CHECKING:
    from contracts.messages import Role

ROLES: dict[str, dict[str, Role]] = {
    "1P1D": {"p0": "prefill", "d0": "decode"},
    "2P2D": {"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"},
    "mixed": {"m0": "mixed", "p0": "prefill", "d0": "decode"},
}
#: What happens only where there is another worker to fetch a prefix from.
OF_FETCHES = {"kvstore.fetch_refused", "kvstore.fetch_put_off", "prefill.split_anyway"}
#: What happens only to requests that move.
OF_MOVES = {"worker.yield_twice", "worker.grant_lost", "worker.take_over_lost"}
#: The one whose meaning is that a client is told to come later.
REFUSES = "prefill.says_full"


def begin_alike(rng: random.Random, asks: list[Ask]) -> list[Ask]:
    """Each gets one of a few beginnings, as far as it is long."""
    beginnings = [tuple(rng.choices(range(1000), k=80)) for _ in range(12)]
    drawn: list[Ask] = []
    for ask in asks:
        alike = rng.choice(beginnings)[: len(ask.token_ids)]
        drawn.append(replace(ask, token_ids=(*alike, *ask.token_ids[len(alike) :])))
    return drawn


async def move_to_and_fro(program: Program, cluster: SimulatedCluster) -> None:
    """Answers, between those that write; until cancelled."""
    rng = program.rng("moves")
    writers = [name for name in cluster.up() if not name.startswith("p")]
    while True:
        await asyncio.sleep(rng.uniform(0.01, 0.05))
        with suppress(TandemError):
            source, destination = rng.sample(writers, 2)
            await cluster.migrate(source, destination, mode=rng.choice(["kv", "tokens"]), max_requests=2)


async def served(program: Program, spec: ClusterSpec) -> list[Answer]:
    """All answers, checked. A tenth of the clients go away before the end. Where workers are named to fetch from,
    prompts begin alike; where there are several that write, answers move between them."""
    async with SimulatedCluster(program, spec) as cluster:
        moving: asyncio.Task[None] | None = None
        if sum(role != "prefill" for role in spec.roles.values()) > 1:
            moving = asyncio.create_task(move_to_and_fro(program, cluster))
            asyncio.get_running_loop().call_later(20.0, moving.cancel)
        asks = workload(program.rng("asks"), count=40, over_s=2.0, output=60, cancels=0.1)
        if spec.hint_chance:
            asks = begin_alike(program.rng("beginnings"), asks)
        answers = await serve(program, cluster, asks, deadline_s=120.0)
        assert cluster.ended == []
        return answers


def serve_armed(chances: dict[str, float], cluster: str, seed: int) -> Counter[str]:
    """What was counted; checks all that holds whatever fires."""

    async def main(program: Program) -> None:
        # Little memory, small steps and short terms: offers wait, answers are preempted, leases are renewed.
        spec = ClusterSpec(
            roles=ROLES[cluster], num_blocks=40, max_batch_tokens=32, max_waiting_offers=4, lease_ttl_s=2.0
        )
        if chances.keys() <= OF_FETCHES:
            # Enough memory for prefixes to stay.
            spec = replace(spec, num_blocks=200, hint_chance=1.0)
        answers = await served(program, spec)
        refused = [answer for answer in answers if answer.error is not None]
        allowed = {"no_capacity"} if chances.get(REFUSES) else set[str]()
        assert {answer.error.code for answer in refused if answer.error is not None} <= allowed, refused
        assert not any(answer.token_ids for answer in refused), "a refusal is the first that a client hears"
        assert len(refused) < len(answers) / 2

    with armed(Failpoints(random.Random(seed), chances)) as firing:
        run(main, seed=seed)
    return firing.counts


@pytest.mark.parametrize(
    ("name", "cluster"),
    [
        (name, cluster)
        for name in sorted(FAILPOINTS)
        for cluster in ("2P2D" if name in OF_FETCHES | OF_MOVES else "1P1D", "mixed")
    ],
)
def test_a_failpoint_that_fires_is_noticed_by_nobody(name: str, cluster: str) -> None:
    assert serve_armed({name: 0.3}, cluster, seed=1)[name] > 0


@pytest.mark.parametrize("cluster", ROLES)
def test_all_failpoints_together_are_noticed_by_nobody(cluster: str) -> None:
    chances = dict.fromkeys(FAILPOINTS, 0.1)
    counts = Counter[str]()
    for seed in range(3):
        counts += serve_armed(chances, cluster, seed)
    everyday = FAILPOINTS.keys() - OF_FETCHES
    assert sum(name in counts for name in everyday) > 0.8 * len(everyday), counts
