"""What one chaos trial is: topology, workload and faults, all drawn from one number.

A scenario is plain data: drawing one runs nothing, and two draws of a seed are equal.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from msgspec import structs

from contracts.failpoints import FAILPOINTS
from contracts.requests import SamplingParams
from decode import DecodeLimits
from gateway.limits import GatewayLimits
from prefill import PrefillLimits
from simulator.chaos.drawing import Victims, draw_faults, draw_loss, draw_power_cut
from simulator.chaos.operations import draw_moves, draw_operations, draw_rebalancing
from simulator.chaos.scaling import (
    draw_bursts,
    draw_pools,
    draw_rhythm,
    draw_scaling_faults,
    is_elastic,
    is_learning,
)
from simulator.chaos.stores import draw_chats, draw_rush, draw_stores
from simulator.clients import Ask
from simulator.cluster import AGENT_HOST, COORDINATOR_HOST, GATEWAY_HOST, ClusterSpec
from simulator.engine import StepTiming

if TYPE_CHECKING:
    from collections.abc import Mapping

    from contracts.messages import Role
    from simulator.chaos.faults import Fault

#: Topologies and how often each is drawn.
TOPOLOGIES: tuple[tuple[Mapping[str, Role], int], ...] = (
    ({"p0": "prefill", "d0": "decode"}, 4),
    ({"p0": "prefill", "p1": "prefill", "d0": "decode", "d1": "decode"}, 6),
    ({"p0": "prefill", "d0": "decode", "d1": "decode"}, 2),
    ({"p0": "prefill", "p1": "prefill", "d0": "decode"}, 2),
    ({"p0": "prefill", "p1": "prefill", "p2": "prefill", "d0": "decode", "d1": "decode", "d2": "decode"}, 1),
    ({"m0": "mixed", "m1": "mixed"}, 1),
    ({"m0": "mixed", "p0": "prefill", "d0": "decode"}, 2),
)

#: Those with two of each role.
REDUNDANT_TOPOLOGIES = tuple(roles for roles, _ in TOPOLOGIES if len(roles) > 3 or "m1" in roles)

#: One trial in so many has no fault at all, and one in so many only what replay is for: then nothing may fail.
CALM_IN = 8
SURVIVABLE_IN = 8
MAX_FAULTS = 8
#: The workload begins when the cluster is up, and is asked within at most so long.
LONGEST_WORKLOAD_S = 12.0
#: Deadlines of requests that are not drawn short.
PATIENT_DEADLINE_S = 60.0
#: So many tokens take a worker longer than a Cancel may; chance that a client of a calm trial, where the pool has room
#: for it, asks for so many or more, and how soon it leaves.
LONG_ANSWER_TOKENS = 300
LONG_ANSWER_CHANCE = 0.2
LONG_ANSWER_LEFT_WITHIN_TOKENS = 8
#: Chance that a failpoint is armed at all in a trial with faults, and how often an armed one fires at most.
ARMED_CHANCE = 0.3
MOST_FIRING = 0.25


class Weather(Enum):
    """What a trial does to its cluster, and so what its clients may be told."""

    #: Nothing: requests may be refused for lack of room, before they began.
    CALM = "calm"
    #: One worker is lost, in a cluster with room and another one of its role, or its store: every request finishes.
    SURVIVABLE = "survivable"
    #: Anything, at once.
    ROUGH = "rough"


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    seed: int
    weather: Weather
    cluster: ClusterSpec
    #: In order of `at_s`, which counts from when the cluster is up.
    asks: tuple[Ask, ...]
    #: In order of `at_s`, on the same clock.
    faults: tuple[Fault, ...]
    #: Chance of firing by failpoint; those that are missing are not armed.
    failpoints: Mapping[str, float]

    @property
    def healed_s(self) -> float:
        """When the last fault is over and the last request asked."""
        return max([fault.at_s + fault.for_s for fault in self.faults] + [ask.at_s for ask in self.asks])

    def describe(self) -> str:
        """One line for people."""
        roles = " ".join(f"{worker_id}:{role}" for worker_id, role in self.cluster.roles.items())
        return (
            f"{self.weather.value}; {roles}; {self.cluster.num_blocks} blocks of {self.cluster.block_tokens}, "
            f"leases of {self.cluster.lease_ttl_s:g} s{self._describe_store()}{self._describe_pools()}; "
            f"{len(self.asks)} requests, "
            f"{len(self.faults)} faults, {len(self.failpoints)} failpoints"
        )

    def _describe_pools(self) -> str:
        elastic = self.cluster.elastic
        if elastic is None:
            return ""
        limits = [f"{one.name} {one.rules.min_workers} to {one.rules.max_workers}" for one in elastic.settings.pools]
        return f"; pools: {', '.join(limits)}{', lending' if elastic.settings.lend_mode == 'apply' else ''}"

    def _describe_store(self) -> str:
        cluster = self.cluster
        if not cluster.stores:
            return ""
        disk = cluster.store_disk
        beneath = "no disk" if disk is None else f"a disk of {disk.num_blocks}"
        is_bad = disk is not None and disk.damaged_chance > 0
        return f"; a store of {cluster.store_blocks} blocks, {beneath}{' that fails' if is_bad else ''}"


def draw(seed: int) -> Scenario:
    """The scenario of a seed. Each part has a stream of random numbers of its own."""
    rng = random.Random(f"{seed}/cluster")
    cluster = _draw_cluster(rng)
    snapshot_ttl_s = random.Random(f"{seed}/snapshot").choice([0.5, 60.0, 60.0])
    cluster = replace(cluster, gateway=replace(cluster.gateway, snapshot_ttl_s=snapshot_ttl_s))
    cluster = draw_stores(random.Random(f"{seed}/stores"), cluster)
    cluster = replace(cluster, rebalancing=draw_rebalancing(random.Random(f"{seed}/rebalancing")))
    is_calm, is_survivable = seed % CALM_IN == 0, seed % SURVIVABLE_IN == SURVIVABLE_IN // 2
    pools_rng = random.Random(f"{seed}/pools")
    has_pools = not is_survivable and is_elastic(pools_rng, calm=is_calm)
    if has_pools:
        cluster = draw_pools(pools_rng, cluster, calm=is_calm)
        bursts_rng = random.Random(f"{seed}/bursts")
        drawn = draw_rhythm(bursts_rng) if is_learning(cluster) else draw_bursts(bursts_rng)
    else:
        drawn = _draw_asks(random.Random(f"{seed}/asks"), cluster)
    asks = _begin_alike(random.Random(f"{seed}/beginnings"), drawn)
    asks = draw_chats(random.Random(f"{seed}/chats"), asks, cluster)
    # Where nothing may fail, it may not by a short deadline either.
    patient = tuple(replace(ask, deadline_s=PATIENT_DEADLINE_S) for ask in asks)
    moves_rng = random.Random(f"{seed}/moves")
    if is_calm and has_pools:
        return Scenario(seed=seed, weather=Weather.CALM, cluster=cluster, asks=patient, faults=(), failpoints={})
    if is_calm:
        calm = _leave_long_answers(random.Random(f"{seed}/long answers"), patient, cluster)
        # That its request moves is noticed by no client.
        moves = draw_moves(moves_rng, cluster.roles, over_s=max(ask.at_s for ask in asks) + 2.0)
        return Scenario(seed=seed, weather=Weather.CALM, cluster=cluster, asks=calm, faults=moves, failpoints={})
    if is_survivable:
        return _draw_survivable(seed, cluster, patient)
    over_s = max(ask.at_s for ask in asks) + 2.0
    readers = tuple(worker_id for worker_id, role in cluster.roles.items() if role != "prefill")
    victims = Victims(
        worker_ids=tuple(cluster.roles),
        stores=cluster.stores,
        readers=(*readers, *cluster.stores),
        hosts=(
            *(*cluster.roles, *cluster.stores, COORDINATOR_HOST, GATEWAY_HOST),
            *((AGENT_HOST,) if has_pools else ()),
        ),
    )
    faults = draw_faults(random.Random(f"{seed}/faults"), victims, over_s=over_s, most=MAX_FAULTS)
    power_cut = draw_power_cut(random.Random(f"{seed}/power cut"), victims, over_s=over_s)
    if has_pools:
        operations = draw_scaling_faults(random.Random(f"{seed}/scaling faults"), cluster, over_s=over_s)
    else:
        operations = draw_operations(random.Random(f"{seed}/operations"), cluster.roles, over_s=over_s)
        cluster = replace(cluster, agent=bool(operations))
    moves = draw_moves(moves_rng, cluster.roles, over_s=over_s)
    faults = tuple(sorted((*faults, *power_cut, *operations, *moves), key=lambda fault: fault.at_s))
    if power_cut and not has_pools:
        rush_rng = random.Random(f"{seed}/rush")
        asks = draw_rush(rush_rng, asks, cluster, cut_s=power_cut[0].at_s, until_s=LONGEST_WORKLOAD_S)
    return Scenario(
        seed=seed,
        weather=Weather.ROUGH,
        cluster=cluster,
        asks=asks,
        faults=faults,
        failpoints=_draw_failpoints(random.Random(f"{seed}/failpoints")),
    )


def _draw_survivable(seed: int, cluster: ClusterSpec, asks: tuple[Ask, ...]) -> Scenario:
    rng = random.Random(f"{seed}/survivable")
    roomy = replace(
        cluster,
        roles=rng.choice([dict(roles) for roles in REDUNDANT_TOPOLOGIES]),
        num_blocks=2048 // cluster.block_tokens,
        max_waiting_offers=256,
        prefill=PrefillLimits(),
        gateway=GatewayLimits(),
    )
    over_s = max(ask.at_s for ask in asks)
    fault = draw_loss(rng, rng.uniform(0.0, over_s), tuple(roomy.roles), roomy.stores)
    return Scenario(seed=seed, weather=Weather.SURVIVABLE, cluster=roomy, asks=asks, faults=(fault,), failpoints={})


def _draw_cluster(rng: random.Random) -> ClusterSpec:
    roles = rng.choices([dict(roles) for roles, _ in TOPOLOGIES], [weight for _, weight in TOPOLOGIES])[0]
    block_tokens = rng.choice([4, 8, 16])
    return ClusterSpec(
        roles=roles,
        block_tokens=block_tokens,
        # A pool of some hundred to some thousand tokens: from always short of blocks to never.
        num_blocks=rng.choice([192, 256, 384, 1024, 2048]) // block_tokens,
        max_batch_tokens=rng.choice([16, 32, 64, 128]),
        max_sequences=rng.choice([2, 4, 16]),
        max_waiting_offers=rng.choice([1, 4, 64, 256]),
        lease_ttl_s=rng.choice([2.0, 4.0, 10.0, 10.0]),
        timing=StepTiming(floor_s=rng.choice([0.004, 0.008, 0.02])),
        prefill=PrefillLimits(max_waiting=rng.choice([4, 512, 512])),
        decode=DecodeLimits(growth_tokens=rng.choice([1, 8, 64])),
        gateway=GatewayLimits(max_replays=rng.choice([0, 1, 3, 3]), replay_patience_s=rng.choice([5.0, 30.0])),
        log_messages=True,
        clock_drift=rng.choice([0.0, 0.0, 200e-6]),
        hint_chance=rng.choice([0.0, 1.0, 1.0]),
    )


def _draw_asks(rng: random.Random, cluster: ClusterSpec) -> tuple[Ask, ...]:
    # One in three all at once.
    over_s = rng.uniform(*rng.choice([(0.5, 2.0), (2.0, LONGEST_WORKLOAD_S), (2.0, LONGEST_WORKLOAD_S)]))
    count = rng.choice([8, 24, 48, 80])
    longest_prompt = rng.choice([16, 60, 120])
    longest_answer = rng.choice([4, 16, 40])
    cancels = rng.choice([0.0, 0.1, 0.5])
    deadline_s = rng.choice([1.5, 4.0, PATIENT_DEADLINE_S, PATIENT_DEADLINE_S, PATIENT_DEADLINE_S])
    asks = [
        _draw_ask(rng, rng.uniform(0.0, over_s), longest_prompt, longest_answer, cancels, deadline_s)
        for _ in range(count)
    ]
    return tuple(sorted(asks, key=lambda ask: ask.at_s))


def _begin_alike(rng: random.Random, asks: tuple[Ask, ...]) -> tuple[Ask, ...]:
    """Gives some prompts one of a few beginnings, as far as they are long; in some trials none."""
    share = rng.choice([0.0, 0.5, 1.0, 1.0])
    longest = max(len(ask.token_ids) for ask in asks)
    lengths = [rng.randint(longest // 2, longest) for _ in range(rng.choice([1, 1, 3]))]
    beginnings = [tuple(rng.choices(range(1000), k=length)) for length in lengths]
    drawn: list[Ask] = []
    for ask in asks:
        alike = rng.choice(beginnings)[: len(ask.token_ids)] if rng.random() < share else ()
        drawn.append(replace(ask, token_ids=(*alike, *ask.token_ids[len(alike) :])))
    return tuple(drawn)


def _draw_ask(
    rng: random.Random, at_s: float, longest_prompt: int, longest_answer: int, cancels: float, deadline_s: float
) -> Ask:
    max_tokens = rng.randint(1, longest_answer)
    # Half of those who leave do it when their KV is on its way.
    leaves_after = rng.choice([1, rng.randrange(max_tokens + 1)])
    return Ask(
        at_s=at_s,
        token_ids=tuple(rng.choices(range(1000), k=rng.randint(1, longest_prompt))),
        sampling=SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(2**32), max_tokens=max_tokens),
        cancel_after=leaves_after if rng.random() < cancels else None,
        deadline_s=deadline_s,
    )


def _leave_long_answers(rng: random.Random, asks: tuple[Ask, ...], cluster: ClusterSpec) -> tuple[Ask, ...]:
    """Some ask for what their worker would compute for seconds, and leave early: it has to be told."""
    drawn: list[Ask] = []
    most_tokens = min(cluster.max_context_tokens, cluster.num_blocks * cluster.block_tokens)
    for ask in asks:
        longest = most_tokens - len(ask.token_ids)
        if longest >= LONG_ANSWER_TOKENS and rng.random() < LONG_ANSWER_CHANCE:
            sampling = structs.replace(ask.sampling, max_tokens=rng.randint(LONG_ANSWER_TOKENS, longest))
            leaves_after = rng.randint(1, LONG_ANSWER_LEFT_WITHIN_TOKENS)
            drawn.append(replace(ask, sampling=sampling, cancel_after=leaves_after))
        else:
            drawn.append(ask)
    return tuple(drawn)


def _draw_failpoints(rng: random.Random) -> dict[str, float]:
    names = sorted(FAILPOINTS)
    return {name: rng.uniform(0.01, MOST_FIRING) for name in names if rng.random() < ARMED_CHANCE}
