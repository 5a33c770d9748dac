"""The node agent of a simulated cluster: what it is asked to start, end or begin anew, the cluster does."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from contracts.control_messages import AGENT_BEAT, RESTART_WORKER, START_WORKER, STOP_WORKER, AgentBeat, WorkerSlot
from contracts.errors import NotFound, StaleIncarnation, TandemError
from contracts.ids import WorkerId
from contracts.messages import Empty

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from contracts.control_messages import RestartWorkerRequest, StartWorkerRequest, StopWorkerRequest
    from contracts.ids import Incarnation
    from contracts.messages import MemberRole, Role
    from rpc import CallContext, Network, Server

BEAT_TIMEOUT_S = 1.0
#: Before the coordinator has said how often it wants to hear.
FIRST_INTERVAL_S = 0.5


class Machine(Protocol):
    """Where workers run."""

    def slots(self) -> Sequence[tuple[str, MemberRole, Incarnation, bool]]:
        """Worker id, role, present or last life, and whether it is up."""
        ...

    def take_role(self, worker_id: str, role: Role) -> None:
        """That the worker's next life begins with."""
        ...

    async def stop(self, worker_id: str) -> None: ...

    async def launch(self, worker_id: str) -> object: ...


class SimulatedAgent:
    """Use: `await run()` until cancelled."""

    def __init__(
        self,
        machine: Machine,
        server: Server,
        network: Network,
        coordinator: str,
        incarnation: Incarnation,
    ) -> None:
        self._machine = machine
        self._server = server
        self._network = network
        self._coordinator = coordinator
        self._incarnation = incarnation
        #: Workers that are being ended or started.
        self._busy: set[str] = set()
        self._wake = asyncio.Event()
        self._tasks: dict[asyncio.Task[None], None] = {}
        server.register(START_WORKER, self._on_start)
        server.register(STOP_WORKER, self._on_stop)
        server.register(RESTART_WORKER, self._on_restart)

    async def run(self) -> None:
        address = await self._server.start()
        interval_s = FIRST_INTERVAL_S
        while True:
            self._wake.clear()
            beat = AgentBeat(node="node", incarnation=self._incarnation, address=address, slots=self._slots())
            try:
                channel = self._network.channel(self._coordinator)
                interval_s = (await channel.call(AGENT_BEAT, beat, timeout_s=BEAT_TIMEOUT_S)).interval_s
            except TandemError:
                interval_s = FIRST_INTERVAL_S
            try:
                async with asyncio.timeout(interval_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _slots(self) -> tuple[WorkerSlot, ...]:
        return tuple(
            WorkerSlot(
                worker_id=WorkerId(worker_id),
                pool="",
                role=role,
                state="ready" if is_up else "restarting" if worker_id in self._busy else "stopped",
                incarnation=incarnation,
            )
            for worker_id, role, incarnation, is_up in self._machine.slots()
        )

    async def _on_start(self, ask: StartWorkerRequest, context: CallContext) -> Empty:
        _, is_up = self._slot(ask.target, ask.worker_id)
        if not is_up and ask.worker_id not in self._busy:
            if ask.role is not None:
                self._machine.take_role(ask.worker_id, ask.role)
            self._do(ask.worker_id, self._again(ask.worker_id, was_up=False))
        return Empty()

    async def _on_stop(self, ask: StopWorkerRequest, context: CallContext) -> Empty:
        _, is_up = self._slot(ask.target, ask.worker_id)
        if is_up and ask.worker_id not in self._busy:
            self._do(ask.worker_id, self._machine.stop(ask.worker_id))
        return Empty()

    async def _on_restart(self, ask: RestartWorkerRequest, context: CallContext) -> Empty:
        life, is_up = self._slot(ask.target, ask.worker_id)
        if life == ask.life and ask.worker_id not in self._busy:
            self._do(ask.worker_id, self._again(ask.worker_id, was_up=is_up))
        return Empty()

    def _slot(self, target: Incarnation, worker_id: WorkerId) -> tuple[Incarnation, bool]:
        if target != self._incarnation:
            raise StaleIncarnation(f"this agent is incarnation {self._incarnation}, not {target}")
        for known, _, incarnation, is_up in self._machine.slots():
            if known == worker_id:
                return incarnation, is_up
        raise NotFound(f"there is no worker {worker_id}")

    async def _again(self, worker_id: str, *, was_up: bool) -> None:
        if was_up:
            await self._machine.stop(worker_id)
        await self._machine.launch(worker_id)

    def _do(self, worker_id: str, work: Coroutine[object, object, None]) -> None:
        self._busy.add(worker_id)
        task = asyncio.get_running_loop().create_task(work, name=f"agent-{worker_id}")
        self._tasks[task] = None

        def ended(task: asyncio.Task[None]) -> None:
            self._busy.discard(worker_id)
            del self._tasks[task]
            self._wake.set()

        task.add_done_callback(ended)
