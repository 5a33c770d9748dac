"""Chaos trials whose pools follow the load: what is drawn of them, and the faults that only they have."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from coldstart.keep_alive import KeepRules
from contracts.control_messages import FlipOperation, MoveOperation, RemoveOperation, RestartOperation
from contracts.errors import TandemError
from contracts.ids import WorkerId
from contracts.requests import SamplingParams
from coordinator.policy.lending import LendRules
from coordinator.policy.scaling_terms import ScaleRules
from coordinator.pool_views import ScaledPool
from coordinator.scaling_settings import AutoscaleSettings
from simulator.chaos.faults import CrashCoordinator, CutLinks, Fault
from simulator.clients import Ask
from simulator.cluster import AGENT_HOST, COORDINATOR_HOST
from simulator.elastic import ElasticSpec

if TYPE_CHECKING:
    import random

    from contracts.control_messages import Operation
    from contracts.messages import Role
    from simulator.cluster import ClusterSpec, SimulatedCluster

#: Chance that pools follow the load in a trial without faults, and in one with any.
CALM_CHANCE = 0.4
ROUGH_CHANCE = 0.15
#: Pools by name, and how often each layout is drawn.
_LAYOUTS: tuple[tuple[dict[str, Role], int], ...] = (
    ({"reading": "prefill", "writing": "decode"}, 4),
    ({"all": "mixed"}, 1),
)
#: KV tokens of a worker: a burst of a few requests fills it.
_POOL_TOKENS = (192, 256, 384)
#: Of learned idle times. What is known of none is kept for 240 of these.
_KEEP_BIN_S = 0.05
LONGEST_PROMPT, LONGEST_ANSWER = 90, 90
#: Within which requests are asked, and how many there are at most.
_ASKED_WITHIN_S = (14.0, 24.0)
MOST_ASKS = 70
#: The last one comes before that: a stretch of even load may begin at the end.
LATEST_ASK_S = 28.0
#: Most faults of the agent and of operators.
_MOST_AGENT_FAULTS = 3
_MOST_WISHES = 2
_WISH_CHANCE = 0.5
_MOVE_AWAY_CHANCE = 0.7
_MOVE_TRIES = 10
_MOVE_AGAIN_S = 0.5
#: Of a node agent's slots without a worker, and with none to come.
_IDLE_STATES = ("absent", "stopped")
#: Whoever strikes in the middle of something waits for that so long.
_MIDWAY_PATIENCE_S = 6.0
_MIDWAY_LOOK_S = 0.05


def is_elastic(rng: random.Random, *, calm: bool) -> bool:
    return rng.random() < (CALM_CHANCE if calm else ROUGH_CHANCE)


def draw_pools(rng: random.Random, cluster: ClusterSpec, *, calm: bool) -> ClusterSpec:
    """The same cluster with pools. Without faults every start succeeds."""
    layout = rng.choices([pools for pools, _ in _LAYOUTS], [weight for _, weight in _LAYOUTS])[0]
    goes_to_zero = rng.random() < 0.35
    pools = tuple(ScaledPool(name=name, role=role, rules=_rules(rng, goes_to_zero)) for name, role in layout.items())
    roles: dict[str, Role] = {}
    initial: set[str] = set()
    doomed: set[str] = set()
    for pool in pools:
        least, most = pool.rules.min_workers, pool.rules.max_workers
        names = [f"{pool.name}-{number}" for number in range(most + rng.choice([0, 1, 1]))]
        roles |= dict.fromkeys(names, pool.role)
        running = rng.randint(least, most)
        initial.update(names[:running])
        # Enough are left for the least that the pool may have, and one.
        spare = names[max(running, least, 1) :]
        if spare and not calm and rng.random() < 0.3:
            doomed.add(rng.choice(spare))
    shortest_s = rng.choice([0.3, 1.0, 2.0])
    failing = rng.sample(range(1, 7), rng.randint(0, 2))
    settings = AutoscaleSettings(
        interval_s=rng.choice([0.2, 0.5]),
        pools=pools,
        # A guess that is right, or far off.
        start_s=rng.choice([shortest_s, 5.0]),
        flip_s=rng.choice([0.5, 2.0]),
        lend_mode="apply" if len(pools) > 1 and rng.random() < 0.5 else "off",
        lend_rules=LendRules(
            queue_delay_high_s=0.1,
            queue_delay_low_s=0.05,
            memory_high=0.6,
            memory_low=0.3,
            min_stay_s=rng.choice([1.0, 3.0]),
            cooldown_s=1.0,
            settle_s=0.2,
            leave_work_after_s=2.0,
            lend_as=rng.choice(["mixed", "mixed", "other"]),
        ),
    )
    spec = ElasticSpec(
        settings=settings,
        initial=frozenset(initial),
        start_s=(shortest_s, shortest_s * rng.choice([1.0, 2.0])),
        failing_starts=frozenset[int]() if calm else frozenset(failing),
        doomed=frozenset(doomed),
    )
    return replace(
        cluster,
        roles=roles,
        elastic=spec,
        num_blocks=rng.choice(_POOL_TOKENS) // cluster.block_tokens,
        max_waiting_offers=256,
    )


def _rules(rng: random.Random, goes_to_zero: bool) -> ScaleRules:
    least = 0 if goes_to_zero else rng.choice([1, 1, 2])
    # So long after the last request, or as the idle times of before say: these are few, and looked at finely.
    to_zero_after_s = rng.choice([None, 4.0]) if goes_to_zero else None
    return ScaleRules(
        min_workers=least,
        max_workers=max(least, 1) + rng.randint(1, 2),
        queue_delay_s=rng.choice([0.05, 0.3]),
        cooldown_up_s=rng.choice([0.5, 2.0]),
        # Shorter than the window that is looked at, or longer.
        cooldown_down_s=rng.choice([1.0, 6.0]) if to_zero_after_s or not goes_to_zero else 1.0,
        # A pool may shrink while answers are written, or has to wait until few are.
        freeness_low=2.0,
        freeness_high=rng.choice([5.0, 60.0]),
        max_step_up=rng.choice([1, 4]),
        max_step_down=rng.choice([1, 2]),
        to_zero_after_s=to_zero_after_s,
        keep=KeepRules(way="histogram", min_times=1) if goes_to_zero and to_zero_after_s is None else None,
        keep_bin_s=_KEEP_BIN_S,
        flip=rng.random() < 0.7,
        window_s=rng.choice([2.0, 5.0]),
        settle_s=rng.choice([0.0, 0.3, 1.0]),
        recover_s=2.0,
    )


def is_learning(cluster: ClusterSpec) -> bool:
    """Whether a pool is kept, and warmed, by the idle times that were seen."""
    return cluster.elastic is not None and any(pool.rules.keep for pool in cluster.elastic.settings.pools)


def draw_rhythm(rng: random.Random) -> tuple[Ask, ...]:
    """Small bursts with equal pauses, for pools that learn from them when they will be asked next."""
    pause_s = rng.uniform(4.5, 7.0)
    times_s = [
        beat * pause_s + rng.uniform(0.5, 0.8)
        for beat in range(int((LATEST_ASK_S - 1.0) // pause_s) + 1)
        for _ in range(rng.randint(2, 5))
    ]
    return tuple(_ask(rng, at_s) for at_s in sorted(times_s))


def draw_bursts(rng: random.Random) -> tuple[Ask, ...]:
    """Bursts, silences in which pools shrink, and stretches of even load."""
    over_s = rng.uniform(*_ASKED_WITHIN_S)
    times_s: list[float] = []
    at_s = rng.choice([0.0, rng.uniform(0.0, 6.0)])
    while at_s < over_s and len(times_s) < MOST_ASKS:
        kind = rng.choice(["burst", "silence", "even"])
        if kind == "burst":
            times_s += [at_s + rng.uniform(0.0, 0.5) for _ in range(rng.randint(6, 24))]
            at_s += 0.5
        elif kind == "silence":
            at_s += rng.uniform(1.0, 7.0)
        else:
            rate_rps, for_s = rng.uniform(2.0, 8.0), rng.uniform(1.0, 4.0)
            times_s += [at_s + rng.uniform(0.0, for_s) for _ in range(round(rate_rps * for_s))]
            at_s += for_s
    if not times_s:
        times_s.append(over_s)
    return tuple(_ask(rng, at_s) for at_s in sorted(times_s)[:MOST_ASKS])


def _ask(rng: random.Random, at_s: float) -> Ask:
    max_tokens = rng.randint(1, LONGEST_ANSWER)
    sampling = SamplingParams(temperature=rng.choice([0.0, 1.0]), seed=rng.randrange(2**32), max_tokens=max_tokens)
    return Ask(
        at_s=at_s,
        token_ids=tuple(rng.choices(range(1000), k=rng.randint(1, LONGEST_PROMPT))),
        sampling=sampling,
        cancel_after=rng.randrange(max_tokens + 1) if rng.random() < 0.1 else None,
    )


# --- faults ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Midway(Fault):
    """Waits for the agent, or an operation, to be in the middle of something; strikes all the same if that does not
    come."""

    async def _until_midway(self, cluster: SimulatedCluster) -> None:
        for _ in range(int(_MIDWAY_PATIENCE_S / _MIDWAY_LOOK_S)):
            agent = cluster.elastic_agent
            is_operated = any(status.state == "running" for status in cluster.operation_statuses())
            if is_operated or (agent is not None and agent.is_busy):
                return
            await asyncio.sleep(_MIDWAY_LOOK_S)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashAgent(_Midway):
    """SIGKILL of the node agent; with its workers, as where they are its children, or without them."""

    what: ClassVar[str] = "crash of the node agent"

    with_workers: bool

    def describe(self) -> str:
        return f"{self.what}{' and its workers' if self.with_workers else ''} for {self.for_s:.3f} s"

    async def strike(self, cluster: SimulatedCluster) -> None:
        await self._until_midway(cluster)
        if not cluster.agent_is_up:
            return
        cluster.crash_agent()
        if self.with_workers:
            for worker_id in cluster.elastic_workers_up():
                cluster.crash(worker_id)
        await asyncio.sleep(self.for_s - _MIDWAY_PATIENCE_S)
        if not cluster.agent_is_up:
            cluster.start_agent()


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeAgent(_Midway):
    """SIGSTOP and SIGCONT: what it was asked meanwhile it does afterwards."""

    what: ClassVar[str] = "freeze of the node agent"

    async def strike(self, cluster: SimulatedCluster) -> None:
        await self._until_midway(cluster)
        if cluster.agent_is_up:
            host = cluster.freeze_agent()
            await asyncio.sleep(self.for_s - _MIDWAY_PATIENCE_S)
            cluster.thaw_host(host)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashCoordinatorMidway(_Midway):
    """In the middle of an operation, which nobody goes on with."""

    what: ClassVar[str] = "crash of the coordinator in an operation"

    async def strike(self, cluster: SimulatedCluster) -> None:
        await self._until_midway(cluster)
        for_s = self.for_s - _MIDWAY_PATIENCE_S
        await CrashCoordinator(at_s=self.at_s, for_s=for_s).strike(cluster)


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish(Fault):
    """An operator's, beside the scaling; nobody undoes it."""

    what: ClassVar[str] = "wish"

    operation: Operation

    def describe(self) -> str:
        return f"{self.what}: {self.operation}"

    async def strike(self, cluster: SimulatedCluster) -> None:
        with suppress(TandemError):
            await cluster.operate(self.operation)


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveAway(Fault):
    """An operator's wish that one worker takes the place of another one that runs, where there is such a pair."""

    what: ClassVar[str] = "move of a worker"

    #: Which of the pairs that there are then: within 0 and 1.
    choice: float

    async def strike(self, cluster: SimulatedCluster) -> None:
        for _ in range(_MOVE_TRIES):
            if await self._begin(cluster):
                return
            await asyncio.sleep(_MOVE_AGAIN_S)

    async def _begin(self, cluster: SimulatedCluster) -> bool:
        """False: there is no such pair, or the coordinator is away, or busy with one of them."""
        agent = cluster.elastic_agent
        states = {} if agent is None else agent.states
        pairs = [
            (worker_id, WorkerId(other))
            for worker_id in sorted(cluster.elastic_workers_up())
            for other, state in sorted(states.items())
            if state in _IDLE_STATES and other.rpartition("-")[0] == worker_id.rpartition("-")[0]
        ]
        if pairs:
            worker_id, to = pairs[int(self.choice * len(pairs))]
            with suppress(TandemError):
                await cluster.operate(MoveOperation(worker_id=WorkerId(worker_id), to=to))
                return True
        return False


def draw_scaling_faults(rng: random.Random, cluster: ClusterSpec, *, over_s: float) -> tuple[Fault, ...]:
    """Of the agent, of the coordinator in the middle of operations, and by operators."""
    drawn: list[Fault] = []
    for _ in range(rng.randint(0, _MOST_AGENT_FAULTS)):
        at_s = rng.uniform(0.0, over_s)
        away_s = _MIDWAY_PATIENCE_S + rng.choice([0.1, 1.0, 3.0, 9.0])
        drawn.append(
            rng.choice(
                [
                    CrashAgent(at_s=at_s, for_s=away_s, with_workers=rng.random() < 0.5),
                    FreezeAgent(at_s=at_s, for_s=away_s),
                    CrashCoordinatorMidway(at_s=at_s, for_s=away_s),
                    CutLinks(
                        at_s=at_s,
                        for_s=rng.uniform(0.5, 9.0),
                        one=(AGENT_HOST,),
                        other=(COORDINATOR_HOST,),
                        one_way=rng.random() < 0.5,
                    ),
                ]
            )
        )
    if rng.random() < _WISH_CHANCE:
        for _ in range(rng.randint(1, _MOST_WISHES)):
            worker_id = WorkerId(rng.choice(list(cluster.roles)))
            drawn.append(Wish(at_s=rng.uniform(0.0, over_s), for_s=0.0, operation=_wish(rng, worker_id)))
    if rng.random() < _MOVE_AWAY_CHANCE:
        drawn.append(MoveAway(at_s=rng.uniform(0.0, over_s), for_s=0.0, choice=rng.random()))
    return tuple(drawn)


def _wish(rng: random.Random, worker_id: WorkerId) -> Operation:
    role: Role = rng.choice(["prefill", "decode"])
    wishes: tuple[Operation, ...] = (
        RemoveOperation(worker_id=worker_id, within_s=rng.choice([None, 2.0]), force=rng.random() < 0.5),
        RestartOperation(worker_ids=(worker_id,), force=rng.random() < 0.5),
        FlipOperation(worker_id=worker_id, role=role),
    )
    return rng.choice(wishes)
