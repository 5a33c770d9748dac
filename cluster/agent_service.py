"""The node agent's side of operations: it tells the coordinator what it runs, and does what the coordinator asks."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.progress import doing
from cluster.supervision import State
from contracts.control_messages import (
    AGENT_BEAT,
    RESTART_WORKER,
    START_WORKER,
    STOP_WORKER,
    AgentBeat,
    WorkerSlot,
)
from contracts.errors import StaleIncarnation, TandemError
from contracts.messages import Empty

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Container, Coroutine, Sequence

    from cluster.node_agent import NodeAgent
    from cluster.plan import Site
    from contracts.control_messages import (
        RestartWorkerRequest,
        SlotState,
        StartWorkerRequest,
        StopWorkerRequest,
    )
    from contracts.ids import Incarnation, WorkerId
    from rpc import CallContext, Network

BEAT_TIMEOUT_S = 1.0
#: Before the coordinator has said how often it wants to hear, and while it does not answer.
FIRST_INTERVAL_S = 0.5
#: Open calls of a stopping agent get this long.
STOP_GRACE_S = 0.2

_SLOT_STATES: dict[State, SlotState] = {
    State.NEW: "absent",
    State.STARTING: "starting",
    State.READY: "ready",
    State.ENDING: "ending",
    State.RESTARTING: "restarting",
    State.STOPPED: "stopped",
    State.GIVEN_UP: "given_up",
}


@dataclass(frozen=True, slots=True)
class Overseer:
    """A coordinator that hears of workers of this agent."""

    address: str
    #: Those that are its own; None: all.
    worker_ids: Container[WorkerId] | None = None


@asynccontextmanager
async def agent_service(
    agent: NodeAgent,
    site: Site,
    network: Network,
    bind: str,
    incarnation: Incarnation,
    log: Callable[[str], None],
    *,
    overseers: Sequence[Overseer] = (),
    workers_memory_bytes: int | None = None,
) -> AsyncGenerator[None]:
    """Serves and beats while the body runs, and the agent with it. `overseers`: where several models are served, each
    one's coordinator; else it is the site's. `workers_memory_bytes`: what workers may take
    here together. Raises ConfigError when it cannot listen."""
    service = AgentService(
        agent,
        site.node,
        incarnation,
        network,
        overseers or [Overseer(site.coordinator_address)],
        log,
        workers_memory_bytes,
    )
    server = network.server(bind)
    server.register(START_WORKER, service.on_start)
    server.register(STOP_WORKER, service.on_stop)
    server.register(RESTART_WORKER, service.on_restart)
    address = await server.start()
    beating = [asyncio.create_task(work, name="agent-beats") for work in service.beats(address)]
    try:
        yield
    finally:
        for task in beating:
            task.cancel()
        for task in beating:
            with suppress(asyncio.CancelledError):
                await task
        await server.stop(STOP_GRACE_S)


class AgentService:
    def __init__(
        self,
        agent: NodeAgent,
        node: str,
        incarnation: Incarnation,
        network: Network,
        overseers: Sequence[Overseer],
        log: Callable[[str], None],
        workers_memory_bytes: int | None,
    ) -> None:
        self._workers_memory_bytes = workers_memory_bytes
        self._agent = agent
        self._node = node
        self._incarnation = incarnation
        self._network = network
        #: Each with what is set when there is something to tell.
        self._overseers = [(overseer, asyncio.Event()) for overseer in overseers]
        self._log = log

    def beats(self, address: str) -> list[Coroutine[Any, Any, None]]:
        """What has to run: one for each coordinator, and what passes on that something changed."""
        return [self._pass_on(), *(self._beat(address, overseer, news) for overseer, news in self._overseers)]

    async def _pass_on(self) -> None:
        while True:
            await self._agent.to_tell.wait()
            self._agent.to_tell.clear()
            for _, news in self._overseers:
                news.set()

    async def _beat(self, address: str, overseer: Overseer, news: asyncio.Event) -> None:
        """Tells what there is, now and then and when it changes, until cancelled."""
        interval_s, is_heard, measured = FIRST_INTERVAL_S, True, 0
        while True:
            news.clear()
            slots = self.slots(overseer.worker_ids)
            ask = AgentBeat(
                node=self._node,
                incarnation=self._incarnation,
                address=address,
                slots=slots,
                weights=self._agent.weights({slot.model for slot in slots}, measured),
                workers_memory_bytes=self._workers_memory_bytes,
            )
            try:
                channel = self._network.channel(overseer.address)
                reply = await channel.call(AGENT_BEAT, ask, timeout_s=BEAT_TIMEOUT_S)
                # A coordinator that was restarted knows of none, and says so.
                interval_s, is_heard, measured = reply.interval_s, True, reply.measured
            except TandemError as error:
                if is_heard:
                    self._log(f"the coordinator does not hear this node agent: {error.message}")
                interval_s, is_heard = FIRST_INTERVAL_S, False
                await asyncio.sleep(interval_s)
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(interval_s):
                    await news.wait()

    def slots(self, worker_ids: Container[WorkerId] | None = None) -> tuple[WorkerSlot, ...]:
        ages_s = self._agent.ages_s()
        return tuple(
            WorkerSlot(
                worker_id=worker.worker_id,
                pool=worker.pool,
                role=worker.role,
                state=_SLOT_STATES[worker.state],
                incarnation=worker.incarnation,
                start_s=worker.start_s,
                weights_wait_s=worker.weights_wait_s,
                weights_due_s=worker.weights_due_s,
                age_s=ages_s.get(worker.worker_id),
                problem=worker.problem or "",
                doing="" if worker.loading is None or worker.state is not State.STARTING else doing(worker.loading),
                model=worker.model,
            )
            for worker in self._agent.workers()
            if worker_ids is None or worker.worker_id in worker_ids
        )

    # --- rpc handlers -----------------------------------------------------------------------------

    async def on_start(self, ask: StartWorkerRequest, context: CallContext) -> Empty:
        self._require(ask.target)
        self._agent.start(ask.worker_id, ask.role)
        return Empty()

    async def on_stop(self, ask: StopWorkerRequest, context: CallContext) -> Empty:
        self._require(ask.target)
        self._log(f"{ask.worker_id} is stopped: {ask.reason}")
        self._agent.stop(ask.worker_id)
        return Empty()

    async def on_restart(self, ask: RestartWorkerRequest, context: CallContext) -> Empty:
        self._require(ask.target)
        self._agent.restart(ask.worker_id, ask.life, ask.python)
        return Empty()

    def _require(self, target: Incarnation) -> None:
        if target != self._incarnation:
            raise StaleIncarnation(f"this is life {self._incarnation} of the node agent, not {target}")
