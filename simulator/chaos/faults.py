"""The faults of a chaos trial: what each does to the cluster, when, and for how long.

Each is plain data with a way to strike. Faults overlap freely; one that finds its victim down already does nothing.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from simulator.faults.patterns import ClogTime, clog_in_turn
from simulator.faults.rules import (
    ANY,
    Between,
    Duplication,
    LatePulls,
    Link,
    Loss,
    Partition,
    Reordering,
    Resets,
    Scope,
    SlowLink,
)

if TYPE_CHECKING:
    from simulator.cluster import SimulatedCluster
    from simulator.faults.rules import Rule

#: How many pulls `Strand` waits for, and how often it looks.
_STRANDED_PULLS = 5
_STRAND_LOOK_S = 0.02
#: How long a node agent lets a worker be silent before it kills it.
HANG_TIMEOUT_S = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(ABC):
    """Base of all: from `at_s` after the start, for `for_s`."""

    what: ClassVar[str]

    at_s: float
    for_s: float

    def describe(self) -> str:
        """For event logs."""
        return f"{self.what} for {self.for_s:.3f} s"

    @abstractmethod
    async def strike(self, cluster: SimulatedCluster) -> None:
        """Begins now; returns when it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfWorker(Fault):
    worker_id: str

    def describe(self) -> str:
        return f"{self.what} of {self.worker_id} for {self.for_s:.3f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashWorker(_OfWorker):
    """SIGKILL; the next life begins after `for_s`."""

    what: ClassVar[str] = "crash"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if self.worker_id in cluster.up():
            cluster.crash(self.worker_id)
            await asyncio.sleep(self.for_s)
        await cluster.revive(self.worker_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeWorker(_OfWorker):
    """SIGSTOP and SIGCONT, as when a machine is paused: nobody kills it meanwhile."""

    what: ClassVar[str] = "freeze"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if self.worker_id not in cluster.up():
            return
        host = cluster.freeze(self.worker_id)
        await asyncio.sleep(self.for_s)
        cluster.thaw_host(host)


@dataclass(frozen=True, slots=True, kw_only=True)
class HangWorker(_OfWorker):
    """A process that hangs; its node agent kills it after 3 s and starts it anew `for_s` later."""

    what: ClassVar[str] = "hang"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if self.worker_id not in cluster.up():
            return
        host = cluster.freeze(self.worker_id)
        await asyncio.sleep(HANG_TIMEOUT_S)
        if cluster.host_of(self.worker_id) == host:
            cluster.crash(self.worker_id)
            await asyncio.sleep(self.for_s)
            await cluster.revive(self.worker_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class StickEngine(_OfWorker):
    """Engine steps never end: the worker has to notice itself. One that had nothing to do is replaced afterwards."""

    what: ClassVar[str] = "stuck engine"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if self.worker_id not in cluster.up():
            return
        host = cluster.host_of(self.worker_id)
        cluster.stick(self.worker_id)
        await asyncio.sleep(self.for_s)
        if cluster.host_of(self.worker_id) == host:
            cluster.crash(self.worker_id)
            await cluster.revive(self.worker_id)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashCoordinator(Fault):
    what: ClassVar[str] = "crash of the coordinator"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if cluster.coordinator_is_up:
            await cluster.crash_coordinator()
            await asyncio.sleep(self.for_s)
            if not cluster.coordinator_is_up:
                await cluster.start_coordinator()


@dataclass(frozen=True, slots=True, kw_only=True)
class FreezeCoordinator(Fault):
    """SIGSTOP and SIGCONT: who asks it meanwhile hears nothing, and what was sent is handled late."""

    what: ClassVar[str] = "freeze of the coordinator"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if cluster.coordinator_is_up:
            host = cluster.freeze_coordinator()
            await asyncio.sleep(self.for_s)
            cluster.thaw_host(host)


@dataclass(frozen=True, slots=True, kw_only=True)
class CrashGateway(Fault):
    what: ClassVar[str] = "crash of the gateway"

    async def strike(self, cluster: SimulatedCluster) -> None:
        if cluster.gateway_is_up:
            cluster.crash_gateway()
            await asyncio.sleep(self.for_s)
            if not cluster.gateway_is_up:
                await cluster.start_gateway()


# --- the network ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OfNetwork(Fault):
    """Rules that hold for `for_s`."""

    def describe(self) -> str:
        rules = "; ".join(f"{rule.scope} {rule.describe()}" for rule in self.rules())
        return f"{self.what} for {self.for_s:.3f} s: {rules}"

    @abstractmethod
    def rules(self) -> tuple[Rule, ...]:
        """New ones each time: a rule that was used has a state."""

    async def strike(self, cluster: SimulatedCluster) -> None:
        rules = self.rules()
        for rule in rules:
            cluster.network.add(rule)
        await asyncio.sleep(self.for_s)
        for rule in rules:
            cluster.network.remove(rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class CutLinks(OfNetwork):
    """Nothing passes between two groups of hosts; `one_way`: from the first to the second only."""

    what: ClassVar[str] = "partition"

    one: tuple[str, ...]
    other: tuple[str, ...]
    one_way: bool

    def rules(self) -> tuple[Rule, ...]:
        make = Link if self.one_way else Between
        return tuple(Partition(make(source, target)) for source in self.one for target in self.other)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strand(Fault):
    """A reader's pulls are late, and as soon as some are under way it is cut off from everybody; it is back while some
    have yet to land: the others have long ended what it still believes in."""

    what: ClassVar[str] = "stranding"

    worker_id: str
    others: tuple[str, ...]
    #: How long pulls are waited for; the rest of `for_s` is the cut.
    patience_s: float
    late_within_s: float

    def describe(self) -> str:
        return f"{self.what} of {self.worker_id} for {self.for_s - self.patience_s:.3f} s"

    async def strike(self, cluster: SimulatedCluster) -> None:
        late = LatePulls(Link(ANY, self.worker_id), chance=1.0, within_s=self.late_within_s)
        cluster.network.add(late)
        for _ in range(int(self.patience_s / _STRAND_LOOK_S)):
            if late.num_late >= _STRANDED_PULLS:
                break
            await asyncio.sleep(_STRAND_LOOK_S)
        cuts = [Partition(Between(self.worker_id, other)) for other in self.others]
        for cut in cuts:
            cluster.network.add(cut)
        await asyncio.sleep(self.for_s - self.patience_s)
        for rule in (late, *cuts):
            cluster.network.remove(rule)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlowDown(OfNetwork):
    what: ClassVar[str] = "slow link"

    scope: Scope
    bytes_per_s: float
    added_s: float

    def rules(self) -> tuple[Rule, ...]:
        return (SlowLink(self.scope, bytes_per_s=self.bytes_per_s, added_s=self.added_s),)


@dataclass(frozen=True, slots=True, kw_only=True)
class Unreliable(OfNetwork):
    """Everything at once, each with a small chance: loss, resets, repeats, disorder."""

    what: ClassVar[str] = "unreliable network"

    scope: Scope
    loss: float
    resets: float
    repeats: float
    disorder: float

    def rules(self) -> tuple[Rule, ...]:
        return (
            Reordering(self.scope, chance=self.disorder, within_s=0.3),
            Duplication(self.scope, chance=self.repeats, within_s=0.3),
            Resets(self.scope, chance=self.resets),
            Loss(self.scope, chance=self.loss),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeafPulls(OfNetwork):
    """Pulls that land long after their readers gave up."""

    what: ClassVar[str] = "late pulls"

    scope: Scope
    chance: float
    within_s: float

    def rules(self) -> tuple[Rule, ...]:
        return (LatePulls(self.scope, chance=self.chance, within_s=self.within_s),)


@dataclass(frozen=True, slots=True, kw_only=True)
class SwizzleClog(Fault):
    """Hosts are clogged one by one, and freed one by one in another order: see `simulator.faults.patterns`."""

    what: ClassVar[str] = "swizzle-clog"

    times: tuple[ClogTime, ...]

    def describe(self) -> str:
        hosts = ", ".join(time.host for time in self.times)
        freed = ", ".join(time.host for time in sorted(self.times, key=lambda time: time.until_s))
        return f"{self.what} of {hosts} for {self.for_s:.3f} s, freed {freed}"

    async def strike(self, cluster: SimulatedCluster) -> None:
        await clog_in_turn(cluster.network, self.times)


# --- clocks ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class JumpClock(Fault):
    """Somebody sets a machine's wall clock, and sets it right again after `for_s`."""

    what: ClassVar[str] = "jump of the wall clock"

    host: str
    by_s: float

    def describe(self) -> str:
        return f"{self.what} of {self.host} by {self.by_s:+.1f} s"

    async def strike(self, cluster: SimulatedCluster) -> None:
        cluster.jump_wall_clock(self.host, self.by_s)
        await asyncio.sleep(self.for_s)
        cluster.jump_wall_clock(self.host, -self.by_s)
