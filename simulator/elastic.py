"""Pools of a simulated cluster that follow the load, and the node agent that starts, keeps and ends their workers.

The agent does what `cluster.supervision` does, with drawn times: a start takes a while, may fail and is tried again, a
slot whose starts fail again and again is given up, a worker that dies is started anew. What it has begun with a process
goes on when it is killed or frozen; what it was only about to do does not.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from contracts.control_messages import WorkerSlot
from contracts.errors import NotFound, StaleIncarnation
from contracts.ids import WorkerId
from contracts.messages import Empty
from simulator.agent import Machine, SimulatedAgent

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

    from contracts.control_messages import RestartWorkerRequest, SlotState, StartWorkerRequest, StopWorkerRequest
    from contracts.ids import Incarnation
    from coordinator.scaling_settings import AutoscaleSettings
    from rpc import CallContext, Network, Server

#: How often a keeper looks whether its worker lives.
LOOK_S = 0.1
#: From a death to the next start; doubles with each failed start.
RESTART_DELAY_S = 0.25
#: Starts that fail in a row until a slot is given up.
START_ATTEMPTS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class ElasticSpec:
    """Slots are the cluster's workers, named after their pools: `reading-0`."""

    settings: AutoscaleSettings
    #: Workers that run from the start.
    initial: frozenset[str]
    #: Bounds of what a start takes.
    start_s: tuple[float, float] = (1.0, 1.0)
    #: Starts of the cluster that fail, counted from 1.
    failing_starts: frozenset[int] = field(default_factory=frozenset[int])
    #: Slots whose starts all fail.
    doomed: frozenset[str] = field(default_factory=frozenset[str])


def pool_name(worker_id: str) -> str:
    """The pool of a slot."""
    return worker_id.rpartition("-")[0]


class ElasticMachine(Machine, Protocol):
    def is_up(self, worker_id: str) -> bool: ...

    def note_lost_life(self, worker_id: str) -> None:
        """One that ended before it served: the next one is later all the same."""
        ...

    def begin_life(self, worker_id: str) -> asyncio.Task[None]:
        """Of a worker that is down; it goes on without whoever asked."""
        ...

    def end_life(self, worker_id: str) -> asyncio.Task[None]:
        """SIGTERM; as `begin_life`."""
        ...


class Starts:
    """What becomes of starts, over all lives of the agent."""

    def __init__(self, spec: ElasticSpec, rng: random.Random) -> None:
        self._spec = spec
        self._rng = rng
        self._num_begun = 0

    def draw(self, worker_id: str) -> tuple[float, bool]:
        """How long the next one takes, and whether it fails then."""
        self._num_begun += 1
        fails = worker_id in self._spec.doomed or self._num_begun in self._spec.failing_starts
        return self._rng.uniform(*self._spec.start_s), fails


class ElasticAgent(SimulatedAgent):
    """Use: `await run()` until cancelled, under a host of its own."""

    def __init__(
        self,
        machine: ElasticMachine,
        server: Server,
        network: Network,
        coordinator: str,
        incarnation: Incarnation,
        *,
        spec: ElasticSpec,
        worker_ids: Sequence[str],
        starts: Starts,
    ) -> None:
        super().__init__(machine, server, network, coordinator, incarnation)
        self._keepers = {
            worker_id: _Keeper(worker_id, machine, starts, self._wake.set, starts_now=worker_id in spec.initial)
            for worker_id in worker_ids
        }

    @property
    def is_busy(self) -> bool:
        """A worker starts or ends."""
        return any(keeper.state in ("starting", "ending", "restarting") for keeper in self._keepers.values())

    @property
    def states(self) -> dict[str, SlotState]:
        return {worker_id: keeper.state for worker_id, keeper in self._keepers.items()}

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for worker_id, keeper in self._keepers.items():
                group.create_task(keeper.run(), name=f"keeper of {worker_id}")
            await super().run()

    def _slots(self) -> tuple[WorkerSlot, ...]:
        now_s = asyncio.get_running_loop().time()
        return tuple(
            WorkerSlot(
                worker_id=WorkerId(worker_id),
                pool=pool_name(worker_id),
                role=role,
                state=self._keepers[worker_id].state,
                incarnation=incarnation,
                start_s=self._keepers[worker_id].start_s,
                age_s=self._keepers[worker_id].age_s(now_s),
                problem=self._keepers[worker_id].problem,
            )
            for worker_id, role, incarnation, _ in self._machine.slots()
            if worker_id in self._keepers
        )

    async def _on_start(self, ask: StartWorkerRequest, context: CallContext) -> Empty:
        keeper = self._keeper(ask.target, ask.worker_id)
        if ask.role is not None and not keeper.is_wanted:
            self._machine.take_role(ask.worker_id, ask.role)
        keeper.start()
        return Empty()

    async def _on_stop(self, ask: StopWorkerRequest, context: CallContext) -> Empty:
        self._keeper(ask.target, ask.worker_id).stop()
        return Empty()

    async def _on_restart(self, ask: RestartWorkerRequest, context: CallContext) -> Empty:
        keeper = self._keeper(ask.target, ask.worker_id)
        lives = {worker_id: incarnation for worker_id, _, incarnation, _ in self._machine.slots()}
        if lives[ask.worker_id] == ask.life:
            keeper.restart()
        return Empty()

    def _keeper(self, target: Incarnation, worker_id: WorkerId) -> _Keeper:
        if target != self._incarnation:
            raise StaleIncarnation(f"this agent is incarnation {self._incarnation}, not {target}")
        if worker_id not in self._keepers:
            raise NotFound(f"there is no worker {worker_id}")
        return self._keepers[worker_id]


class _Keeper:
    """Of one slot."""

    def __init__(
        self,
        worker_id: str,
        machine: ElasticMachine,
        starts: Starts,
        on_change: Callable[[], None],
        *,
        starts_now: bool,
    ) -> None:
        self._worker_id = worker_id
        self._machine = machine
        self._starts = starts
        self._on_change = on_change
        self._news = asyncio.Event()
        self._renews = False
        self._failed_starts = 0
        self._was_ready = False
        self._spawned_s: float | None = None
        #: It is to run. What lives already is kept.
        self.is_wanted = starts_now or machine.is_up(worker_id)
        self.state: SlotState = "ready" if machine.is_up(worker_id) else "absent"
        self.start_s: float | None = None
        self.problem = ""

    def age_s(self, now_s: float) -> float | None:
        has_process = self.state in ("starting", "ready", "ending") and self._spawned_s is not None
        return now_s - self._spawned_s if has_process and self._spawned_s is not None else None

    def start(self) -> None:
        if not self.is_wanted:
            self.is_wanted, self._failed_starts, self.problem = True, 0, ""
            self._news.set()

    def stop(self) -> None:
        if self.is_wanted:
            self.is_wanted = False
            self._news.set()

    def restart(self) -> None:
        self.start()
        self._renews = self._machine.is_up(self._worker_id)
        self._news.set()

    async def run(self) -> None:
        while True:
            self._news.clear()
            if self._machine.is_up(self._worker_id):
                if self.is_wanted and not self._renews:
                    self._was_ready = True
                    self._be("ready")
                    await self._pause(LOOK_S)
                    continue
                self._be("ending")
                self._renews = False
                await asyncio.shield(self._machine.end_life(self._worker_id))
            elif self.is_wanted:
                if self.state == "ready":
                    self._be("restarting")
                    await self._pause(RESTART_DELAY_S)
                else:
                    await self._start()
            else:
                if self.state not in ("absent", "given_up"):
                    self._be("stopped")
                await self._news.wait()

    async def _start(self) -> None:
        self._be("starting")
        now_s = asyncio.get_running_loop().time()
        self._spawned_s = now_s
        takes_s, fails = self._starts.draw(self._worker_id)
        while self.is_wanted and (left_s := now_s + takes_s - asyncio.get_running_loop().time()) > 0:
            self._news.clear()
            await self._pause(left_s)
        if not self.is_wanted:
            # It is told to leave before it has begun to serve.
            self._be("stopped")
        elif not fails:
            await asyncio.shield(self._machine.begin_life(self._worker_id))
            self.start_s = asyncio.get_running_loop().time() - now_s
            self._failed_starts = 0
        else:
            self._failed_starts += 1
            self._machine.note_lost_life(self._worker_id)
            self.problem = "its process ended"
            if self._failed_starts >= START_ATTEMPTS and not self._was_ready:
                self.is_wanted = False
                self._be("given_up")
                return
            self._be("restarting")
            await self._pause(RESTART_DELAY_S * 2 ** (self._failed_starts - 1))

    async def _pause(self, longest_s: float) -> None:
        """Until something is wanted, or so long."""
        with suppress(TimeoutError):
            async with asyncio.timeout(longest_s):
                await self._news.wait()

    def _be(self, state: SlotState) -> None:
        if state != self.state:
            self.state = state
            self._on_change()
