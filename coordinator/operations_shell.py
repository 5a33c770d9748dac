"""Operations on workers, carried out: rpc from operators and node agents in, orders to workers and agents out."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from contracts.control_messages import (
    AGENT_BEAT,
    DRAIN,
    OPERATE,
    OPERATIONS,
    RESTART_WORKER,
    SET_ROLE,
    START_WORKER,
    STOP_WORKER,
    AgentBeatReply,
    DrainRequest,
    OperateReply,
    OperationsReply,
    RestartWorkerRequest,
    SetRoleRequest,
    StartWorkerRequest,
    StopWorkerRequest,
)
from contracts.errors import TandemError
from coordinator.agents import BEAT_INTERVAL_S, Agents
from coordinator.operation_terms import Answered, Call, Looked, Report, Sight, WorkerSeen, title
from coordinator.operations import Operations
from coordinator.start_knowledge import StartKnowledge

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.control_messages import (
        AgentBeat,
        OperateRequest,
        Operation,
        OperationsRequest,
        OperationStatus,
        WorkerSlot,
    )
    from contracts.ids import WorkerId
    from contracts.messages import Empty, Member, Method
    from coordinator.membership import Membership
    from coordinator.operation_terms import CallBody, Event, OperationLimits
    from rpc import CallContext, Network, Server

#: Between looks at workers and agents while operations run.
LOOK_INTERVAL_S = 0.2
#: Of each order.
CALL_TIMEOUT_S = 2.0

_METHODS: dict[type[CallBody], Method[Any, Empty]] = {
    DrainRequest: DRAIN,
    SetRoleRequest: SET_ROLE,
    StartWorkerRequest: START_WORKER,
    StopWorkerRequest: STOP_WORKER,
    RestartWorkerRequest: RESTART_WORKER,
}


class OperationsShell:
    """Use: `register_on(server)`, and `await run()` beside the rest of the coordinator until cancelled."""

    def __init__(
        self,
        *,
        network: Network,
        clock: Clock,
        membership: Membership,
        limits: OperationLimits | None = None,
        log: Callable[[str], None],
    ) -> None:
        self._network = network
        self._clock = clock
        self._membership = membership
        self._log = log
        self.agents = Agents()
        self.starts = StartKnowledge(self.agents)
        self.machine = Operations(limits)
        self._wake = asyncio.Event()
        #: Present while `run` runs.
        self._group: asyncio.TaskGroup | None = None

    def register_on(self, server: Server) -> None:
        server.register(AGENT_BEAT, self._on_agent_beat)
        server.register(OPERATE, self._on_operate)
        server.register(OPERATIONS, self._on_operations)

    @property
    def leaving(self) -> frozenset[WorkerId]:
        """The workers that are to get no new request, whether they know it yet or not."""
        return self.machine.leaving

    @property
    def keep_answers(self) -> frozenset[WorkerId]:
        """Of these, the ones whose answers stay there: only prompts have to leave."""
        return self.machine.keep_answers

    def begin(self, operation: Operation, *, by: str = "operator") -> int:
        """Its number. Raises NotFound, BadRequest and NoCapacity: see `OperateRequest`."""
        now_s = self._clock.now_s()
        operation_id = self.machine.begin(operation, self.sight(), now_s, by=by)
        self._log(f"operation {operation_id} begins: {title(operation)}, by {by}")
        if self._group is not None:
            # From now on its worker gets no request.
            self._handle(Looked(self.sight()))
        self._wake.set()
        return operation_id

    def statuses(self) -> tuple[OperationStatus, ...]:
        """Those that run, and the last that ended, oldest first."""
        return self.machine.statuses(self._clock.now_s())

    def slots(self) -> tuple[WorkerSlot, ...]:
        """What the node agents that are heard of run, or could, by worker id."""
        return self.agents.told(self._clock.now_s())

    def sight(self) -> Sight:
        """Everybody, as of now."""
        now_s = self._clock.now_s()
        return sight_of(self._membership.members(now_s, with_unheard=True), self.agents, now_s)

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                await self._look()
            finally:
                self._group = None

    async def _look(self) -> None:
        while True:
            self._wake.clear()
            self._handle(Looked(self.sight()))
            if not self.machine.num_running:
                await self._wake.wait()
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(LOOK_INTERVAL_S):
                    await self._wake.wait()

    # --- rpc handlers -----------------------------------------------------------------------------

    async def _on_agent_beat(self, beat: AgentBeat, context: CallContext) -> AgentBeatReply:
        if self.agents.beat(beat, self._clock.now_s()):
            self._log(f"node agent up: {beat.node} at {beat.address}, {len(beat.slots)} workers")
        if self.machine.num_running:
            self._wake.set()
        return AgentBeatReply(interval_s=BEAT_INTERVAL_S, measured=self.starts.heard(beat))

    async def _on_operate(self, ask: OperateRequest, context: CallContext) -> OperateReply:
        return OperateReply(operation_id=self.begin(ask.operation, by=ask.by))

    async def _on_operations(self, ask: OperationsRequest, context: CallContext) -> OperationsReply:
        if ask.cancel is not None:
            self.machine.cancel(ask.cancel, self._clock.now_s())
            self._wake.set()
        return OperationsReply(operations=self.statuses(), slots=self.slots())

    # --- inside -----------------------------------------------------------------------------------

    def _handle(self, event: Event) -> None:
        for instruction in self.machine.handle(event, self._clock.now_s()):
            match instruction:
                case Call():
                    # Not started yet, or stopping: nobody waits for the answer.
                    if self._group is not None:
                        self._group.create_task(self._call(instruction), name=f"order-{instruction.call_id}")
                case Report(text):
                    self._log(text)

    async def _call(self, call: Call) -> None:
        problem = None
        try:
            channel = self._network.channel(call.address)
            await channel.call(_METHODS[type(call.body)], call.body, timeout_s=CALL_TIMEOUT_S)
        except TandemError as error:
            problem = error.message
        self._handle(Answered(call.call_id, problem))
        self._wake.set()


def sight_of(members: tuple[Member, ...], agents: Agents, now_s: float) -> Sight:
    """What operations look at. Pure but for agents that are forgotten."""
    awaited: Counter[WorkerId] = Counter()
    for member in members:
        for worker_id, num_prompts in member.load.unread_for:
            awaited[worker_id] += num_prompts
    workers = {
        member.info.worker_id: WorkerSeen(
            worker_id=member.info.worker_id,
            incarnation=member.info.incarnation,
            role=member.info.role,
            identity=member.info.identity,
            address=member.info.address,
            is_up=member.state == "up",
            draining=member.load.draining,
            open_requests=member.load.open_requests,
            open_leases=member.load.open_leases,
            open_prompts=member.load.open_prompts,
            open_answers=member.load.open_answers,
            awaited=awaited[member.info.worker_id],
        )
        for member in members
    }
    return Sight(workers=workers, slots=agents.slots(now_s))
