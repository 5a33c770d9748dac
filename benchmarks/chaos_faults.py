"""Which faults meet a cluster, and when: a seeded schedule, drawn purely, and the hand that carries it out.

Faults are placed along the run's progress (the share of requests that were asked), not on a clock, so that a slow
machine sees as many of them with as much in flight. Those of one worker wait until there is another of its role.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from cluster.supervision import State
from contracts.errors import TandemError

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from cluster.state_file import WorkerState
    from tests.support.cluster import ClusterProcess

#: A worker that was stopped and left so must be gone by then: 3 s of silence, and a loaded machine.
HANG_KILL_BOUND_S = 15.0
#: How long a fault waits for its victim to be up, and then to have something in hand.
VICTIM_PATIENCE_S = 30.0
BUSY_PATIENCE_S = 8.0
LOOK_INTERVAL_S = 0.05
#: Tokens that a victim had already sent may still arrive after the fault.
REACTION_S = 0.2
AUDIT_TIMEOUT_S = 2.0


class Kind(Enum):
    KILL = "killed"
    #: Every worker of the role at once.
    KILL_ALL = "all of a role killed"
    #: Stopped, and woken before anybody must have noticed, or about then.
    FREEZE = "frozen and woken"
    #: Stopped for good: the node agent must end it.
    HANG = "frozen for good"
    #: The loopback interface goes down for all of it.
    LINK = "links down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    #: Share of the run's requests that were asked before it.
    at: float
    kind: Kind
    #: "" where it meets all.
    role: str
    #: For kinds that end again.
    seconds: float


def schedule(rng: random.Random, roles: Sequence[str], num_faults: int, *, links: bool) -> list[Fault]:
    """At least one of every kind for every role (as far as `num_faults` reaches), in random order, then more."""
    single = [(kind, role) for kind in (Kind.KILL, Kind.FREEZE, Kind.HANG) for role in roles]
    if links:
        single += [(Kind.LINK, ""), (Kind.LINK, "")]
    rare = [(Kind.KILL_ALL, role) for role in roles]
    # Killed workers are the most ordinary fault; all of a role is rare.
    more = [*single, *single, *((Kind.KILL, role) for role in roles), *rare]
    chosen = rng.sample(single, len(single)) + rng.sample(rare, 1)
    chosen += [rng.choice(more) for _ in range(max(0, num_faults - len(chosen)))]
    chosen = chosen[:num_faults]
    return [
        Fault(
            at=(index + 1 + rng.uniform(-0.3, 0.3)) / (len(chosen) + 1),
            kind=kind,
            role=role,
            seconds=rng.uniform(0.2, 2.0) if kind is Kind.LINK else rng.uniform(0.5, 2.0),
        )
        for index, (kind, role) in enumerate(chosen)
    ]


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault as it was carried out, on the monotonic clock."""

    kind: Kind
    began_s: float
    over_s: float
    what: str


@dataclass(slots=True)
class Tally:
    """What was done, and what it met."""

    injected: Counter[Kind] = field(default_factory=Counter[Kind])
    #: Of these, how many met a worker with requests in hand (LINK: streams in mid-answer).
    in_flight: Counter[Kind] = field(default_factory=Counter[Kind])
    #: From SIGSTOP to the process being gone.
    hang_kill_s: list[float] = field(default_factory=list[float])
    problems: list[str] = field(default_factory=list[str])
    #: In the order in which they began.
    strikes: list[Strike] = field(default_factory=list[Strike])

    def cause(self, began_s: float, ended_s: float) -> Strike | None:
        """The fault behind a time without tokens: the first that went on, or had just been over, in it."""
        reaching = (one for one in self.strikes if one.began_s < ended_s and one.over_s > began_s - REACTION_S)
        return next(reaching, None)


def can_drop_links() -> bool:
    """Whether this process is alone in its network namespace and may change it."""
    return os.environ.get(ALONE) == "1" and shutil.which("ip") is not None


#: Set in the environment of a run inside its own network namespace.
ALONE = "CHAOS_RUNS_ALONE"


class Striker:
    """Carries out faults on a cluster. `num_writing` tells how many clients are in mid-answer."""

    def __init__(self, cluster: ClusterProcess, num_writing: Callable[[], int]) -> None:
        self._cluster = cluster
        self._num_writing = num_writing
        self.tally = Tally()
        #: Stopped by us and not known to be gone or awake.
        self._stopped: set[int] = set()

    async def strike(self, fault: Fault) -> None:
        """Returns when the fault is over: woken, gone, or the links up again; the cluster may still recover."""
        if fault.kind is Kind.LINK:
            began_s, what = await self._drop_links(fault.seconds)
        else:
            began_s, what = await self._strike_workers(fault)
        self.tally.strikes.append(Strike(fault.kind, began_s, time.monotonic(), what))

    def wake_all(self) -> None:
        """Leaves nobody stopped, whatever happened."""
        for pid in self._stopped:
            _signal(pid, signal.SIGCONT)
        self._stopped.clear()

    # --- workers ------------------------------------------------------------------------------------

    async def _strike_workers(self, fault: Fault) -> tuple[float, str]:
        """When, and what was done."""
        victims = await self._victims(fault)
        if not victims:
            self.tally.problems.append(f"no worker of role {fault.role} to be {fault.kind.value}")
            return time.monotonic(), f"{fault.kind.value}: nobody"
        names = ", ".join(victim.worker_id for victim, _ in victims)
        self.tally.injected[fault.kind] += 1
        self.tally.in_flight[fault.kind] += any(busy for _, busy in victims)
        began_s = time.monotonic()
        pids = [victim.pid for victim, _ in victims if victim.pid is not None]
        for pid in pids:
            await self._strike(pid, fault)
        return began_s, f"{names} {fault.kind.value}"

    async def _strike(self, pid: int, fault: Fault) -> None:
        if fault.kind in (Kind.KILL, Kind.KILL_ALL):
            _signal(pid, signal.SIGKILL)
            return
        self._stopped.add(pid)
        _signal(pid, signal.SIGSTOP)
        if fault.kind is Kind.FREEZE:
            await asyncio.sleep(fault.seconds)
            _signal(pid, signal.SIGCONT)
        else:
            await self._await_end(pid)
        self._stopped.discard(pid)

    async def _await_end(self, pid: int) -> None:
        started_s = time.monotonic()
        while _exists(pid):
            if time.monotonic() - started_s > HANG_KILL_BOUND_S:
                self.tally.problems.append(f"process {pid} hung for {HANG_KILL_BOUND_S:g} s and nobody ended it")
                _signal(pid, signal.SIGKILL)
                return
            await asyncio.sleep(LOOK_INTERVAL_S)
        self.tally.hang_kill_s.append(time.monotonic() - started_s)

    async def _victims(self, fault: Fault) -> list[tuple[WorkerState, int]]:
        """Whom it meets, with the requests each has in hand: the busiest of the role, unless it meets all."""
        needed = 1 if fault.kind is Kind.KILL_ALL else 2
        until_s = time.monotonic() + VICTIM_PATIENCE_S
        busy_until_s: float | None = None
        while True:
            ready = self._ready(fault.role)
            if len(ready) >= min(needed, self._num_of_role(fault.role)):
                busy_until_s = busy_until_s or time.monotonic() + BUSY_PATIENCE_S
                loads = await self._open_requests(ready)
                found = sorted(((one, loads.get(one.worker_id, 0)) for one in ready), key=lambda pair: -pair[1])
                if found[0][1] or time.monotonic() > busy_until_s:
                    return found if fault.kind is Kind.KILL_ALL else found[:1]
            if time.monotonic() > until_s:
                return []
            await asyncio.sleep(LOOK_INTERVAL_S)

    def _ready(self, role: str) -> list[WorkerState]:
        return [
            worker
            for worker in self._cluster.state.workers
            if worker.role == role and worker.state == State.READY.value and worker.pid is not None
        ]

    def _num_of_role(self, role: str) -> int:
        return sum(worker.role == role for worker in self._cluster.state.workers)

    async def _open_requests(self, workers: Sequence[WorkerState]) -> dict[str, int]:
        try:
            audits = await self._cluster.audit(AUDIT_TIMEOUT_S, [worker.worker_id for worker in workers])
        except TandemError:
            return {}
        return {worker_id: audit.open_requests for worker_id, audit in audits.items()}

    # --- links --------------------------------------------------------------------------------------

    async def _drop_links(self, seconds: float) -> tuple[float, str]:
        until_s = time.monotonic() + BUSY_PATIENCE_S
        while not self._num_writing() and time.monotonic() < until_s:  # noqa: ASYNC110 - a look is enough
            await asyncio.sleep(LOOK_INTERVAL_S)
        self.tally.injected[Kind.LINK] += 1
        self.tally.in_flight[Kind.LINK] += bool(self._num_writing())
        began_s = time.monotonic()
        await _set_loopback("down")
        try:
            await asyncio.sleep(seconds)
        finally:
            await _set_loopback("up")
        return began_s, f"{Kind.LINK.value} for {seconds:.1f} s"


async def _set_loopback(state: str) -> None:
    process = await asyncio.create_subprocess_exec("ip", "link", "set", "lo", state)
    if await process.wait():
        raise RuntimeError(f"ip link set lo {state}: status {process.returncode}")


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
