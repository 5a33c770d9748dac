"""Which faults a trial draws: kinds with their weights, victims, and how long each lasts.

Durations are drawn around what the cluster's own bounds are: 3 s of silence, 3 s until a connection is broken, terms
of leases of 2 to 10 s; just below and just above is where things go wrong.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from simulator.chaos.faults import (
    CrashCoordinator,
    CrashGateway,
    CrashWorker,
    CutLinks,
    DeafPulls,
    Fault,
    FreezeCoordinator,
    FreezeWorker,
    HangWorker,
    JumpClock,
    SlowDown,
    StickEngine,
    Strand,
    SwizzleClog,
    Unreliable,
)
from simulator.faults.patterns import draw_swizzle
from simulator.faults.rules import ANY, Between, Link

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

    from simulator.faults.rules import Scope


#: Chance of a power cut in a trial with stores.
POWER_CUT_CHANCE = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Victims:
    """Who can be struck."""

    worker_ids: tuple[str, ...]
    #: Like workers, but for engines.
    stores: tuple[str, ...] = ()
    #: Those that read KV of others.
    readers: tuple[str, ...]
    #: Workers, stores, gateway and coordinator.
    hosts: tuple[str, ...]

    @property
    def members(self) -> tuple[str, ...]:
        return (*self.worker_ids, *self.stores)


Make = Callable[["random.Random", float, Victims], Fault]


def draw_faults(rng: random.Random, victims: Victims, *, over_s: float, most: int) -> tuple[Fault, ...]:
    """One to `most` faults that begin within `over_s`, in the order they begin."""
    weights = [weight for _, weight in _KINDS]
    drawn: list[Fault] = []
    for _ in range(rng.randint(1, most)):
        make = rng.choices(_KINDS, weights)[0][0]
        drawn.append(make(rng, rng.uniform(0.0, over_s), victims))
    return tuple(sorted(drawn, key=lambda fault: fault.at_s))


def draw_power_cut(rng: random.Random, victims: Victims, *, over_s: float) -> tuple[Fault, ...]:
    """Stores and workers lose what is in memory, in the middle of the work: only disks have it then. None where there
    are no stores, and in some trials."""
    if not victims.stores or rng.random() >= POWER_CUT_CHANCE:
        return ()
    at_s = rng.uniform(0.3, 0.7) * over_s
    return tuple(
        CrashWorker(at_s=at_s, for_s=rng.choice([0.05, 0.05, 0.5]), worker_id=worker_id)
        for worker_id in victims.members
    )


def draw_loss(rng: random.Random, at_s: float, worker_ids: tuple[str, ...], stores: tuple[str, ...] = ()) -> Fault:
    """One worker or store is lost in one of four ways, or silent for a while."""
    make = rng.choice([_crash, _freeze, _hang, _stick])
    return make(rng, at_s, Victims(worker_ids=worker_ids, stores=stores, readers=(), hosts=(*worker_ids, *stores)))


def _crash(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return CrashWorker(at_s=at_s, for_s=rng.choice([0.05, 1.0, 4.0]), worker_id=rng.choice(victims.members))


def _freeze(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return FreezeWorker(at_s=at_s, for_s=rng.uniform(0.1, 8.0), worker_id=rng.choice(victims.members))


def _hang(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return HangWorker(at_s=at_s, for_s=rng.uniform(0.3, 1.0), worker_id=rng.choice(victims.members))


def _stick(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return StickEngine(at_s=at_s, for_s=8.0, worker_id=rng.choice(victims.worker_ids))


def _crash_coordinator(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return CrashCoordinator(at_s=at_s, for_s=rng.choice([0.1, 2.0, 6.0]))


def _freeze_coordinator(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return FreezeCoordinator(at_s=at_s, for_s=rng.uniform(0.1, 8.0))


def _crash_gateway(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return CrashGateway(at_s=at_s, for_s=rng.choice([0.1, 2.0]))


def _cut(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    one, other = _two_groups(rng, victims.hosts)
    return CutLinks(at_s=at_s, for_s=rng.uniform(0.5, 8.0), one=one, other=other, one_way=rng.random() < 0.5)


def _strand(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    worker_id = rng.choice(victims.readers)
    patience_s = 2.0
    return Strand(
        # Early: others have to take what it lost, while it is away.
        at_s=at_s / 3,
        for_s=patience_s + rng.uniform(3.0, 5.0),
        worker_id=worker_id,
        others=tuple(host for host in victims.hosts if host != worker_id),
        patience_s=patience_s,
        late_within_s=6.0,
    )


def _slow_down(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return SlowDown(
        at_s=at_s,
        for_s=rng.uniform(1.0, 6.0),
        scope=_scope(rng, victims.hosts),
        bytes_per_s=10 ** rng.uniform(3.0, 6.0),
        added_s=rng.choice([0.0, 0.01, 0.2]),
    )


def _unreliable(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return Unreliable(
        at_s=at_s,
        for_s=rng.uniform(1.0, 8.0),
        scope=_scope(rng, victims.hosts),
        loss=rng.choice([0.0, 0.01, 0.05]),
        resets=rng.choice([0.0, 0.01, 0.05]),
        repeats=rng.choice([0.0, 0.1, 0.3]),
        disorder=rng.choice([0.0, 0.1, 0.5]),
    )


def _deafen(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return DeafPulls(
        at_s=at_s,
        for_s=rng.uniform(2.0, 8.0),
        scope=rng.choice([Link(ANY, rng.choice(victims.readers)), _scope(rng, victims.members)]),
        chance=rng.choice([0.1, 0.5, 1.0, 1.0]),
        # The longest end just before a cluster must be clean again.
        within_s=rng.choice([0.2, 2.0, 25.0, 25.0, 25.0]),
    )


def _swizzle(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    times = draw_swizzle(rng, victims.hosts, over_s=rng.uniform(0.3, 4.0))
    return SwizzleClog(at_s=at_s, for_s=max(time.until_s for time in times), times=times)


def _jump(rng: random.Random, at_s: float, victims: Victims) -> Fault:
    return JumpClock(
        at_s=at_s, for_s=rng.uniform(0.5, 4.0), host=rng.choice(victims.hosts), by_s=rng.choice([-3600.0, -5.0, 3600.0])
    )


#: How each kind of fault is drawn, and how often.
_KINDS: tuple[tuple[Make, int], ...] = (
    (_crash, 5),
    (_freeze, 4),
    (_hang, 2),
    (_stick, 2),
    (_crash_coordinator, 2),
    (_freeze_coordinator, 2),
    (_crash_gateway, 1),
    (_cut, 4),
    (_strand, 8),
    (_slow_down, 3),
    (_unreliable, 5),
    (_deafen, 6),
    (_swizzle, 4),
    (_jump, 1),
)


def _scope(rng: random.Random, hosts: Sequence[str]) -> Scope:
    """One link, one host, or everything."""
    if rng.random() < 0.3:
        return Between(ANY, ANY)
    if len(hosts) == 1 or rng.random() < 0.5:
        return Between(rng.choice(hosts), ANY)
    return Link(*rng.sample(hosts, 2))


def _two_groups(rng: random.Random, hosts: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Both have somebody, together they have everybody or only two."""
    shuffled = rng.sample(hosts, len(hosts))
    if rng.random() < 0.5:
        return (shuffled[0],), (shuffled[1],)
    place = rng.randint(1, len(shuffled) - 1)
    return tuple(shuffled[:place]), tuple(shuffled[place:])
