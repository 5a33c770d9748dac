"""A whole cluster in one event loop: the production shells over an in-memory network and modelled engines.

Gateway core, coordinator and workers are those of a live cluster; only network, transport, engine and clock are
others. Each worker is a program of its own on its own host, with a clock that starts elsewhere, so that code
which compares clocks of two processes fails here. One that ends its own life is started anew, as a node agent
does; one that is crashed or frozen is left to the test.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Self

from msgspec.structs import replace

from contracts.control_messages import OPERATE, OPERATIONS, OperateRequest, OperationsRequest
from contracts.ids import GatewayId, Incarnation, WorkerId
from contracts.layout import PROTOCOL_VERSION
from contracts.messages import AUDIT, MEMBERS, MIGRATE, Empty, MigrateRequest, Peer, WorkerInfo
from coordinator import CoordinatorShell
from coordinator.live_costs import LiveCosts
from coordinator.policy.settings import ConductorSettings
from coordinator.scaling_wiring import autoscaler_of
from coordinator.shell import default_conductor
from decode import DecodeLimits
from engine.compose import StepBudget
from gateway.core import GatewayCore
from gateway.limits import GatewayLimits
from kvstore.tiers.eviction import dram_eviction
from kvtransfer import MemoryFabric, TransportSet
from kvtransfer.memory import FateModel, steady_link
from prefill import PrefillLimits
from rpc import MemoryNetwork
from rpc.memory import loopback_latency
from simulator.agent import SimulatedAgent
from simulator.elastic import ElasticAgent, ElasticSpec, Starts
from simulator.engine import ModelledEngine, StepCosts, StepTiming, modelled_identity
from simulator.faults.clocks import MachineClock, ProcessClock
from simulator.faults.network import FaultyNetwork
from simulator.hints import HintingServer
from simulator.loop import HOST, VirtualLoop
from simulator.message_log import logged_messages, logged_pulls
from simulator.store import StoreDisk, StoreDiskSpec, StoreMemory
from simulator.trace_log import trace_logger
from simulator.witness import WatchedEngine, WatchedGateway, WatchedMemory, WatchedPool
from worker import WorkerLimits, WorkerShell
from worker.store_shell import StoreShell, StoreShellLimits

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator, Sequence
    from types import TracebackType

    from contracts.config import EvictionPolicyName
    from contracts.control_messages import Operation, OperationsReply, OperationStatus
    from contracts.messages import AuditReply, Member, MemberRole, MigrateReply, MoveMode, Role
    from coordinator.autoscaler import Autoscaler
    from coordinator.conductor import Conductor
    from coordinator.policy import FleetView
    from coordinator.rebalancer import RebalanceSettings
    from kvtransfer import Ledger, MemoryTransport
    from rpc import Server
    from rpc.memory import Latency, MemoryProcess
    from simulator.engine import BlockContent
    from simulator.program import Program
    from simulator.witness import Witness

COORDINATOR_HOST = "coordinator"
COORDINATOR = f"{COORDINATOR_HOST}:1"
GATEWAY_HOST = "gateway"
AGENT_HOST = "agent"
#: As in a live worker.
STOP_GRACE_S = 1.0
#: How long a cluster may take until all its workers are registered.
START_LIMIT_S = 10.0
#: What the remains of killed programs may take to end.
CLEARING_LIMIT_S = 10.0
#: From the end of a life that ended itself to the start of the next.
RESTART_S = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What is simulated."""

    #: Roles by worker id.
    roles: dict[str, Role]
    #: Stores beside the workers, by worker id; their workers' machine is "node", as theirs.
    stores: tuple[str, ...] = ()
    store_blocks: int = 256
    #: None: their memory only.
    store_disk: StoreDiskSpec | None = None
    eviction: EvictionPolicyName = "lru"
    num_blocks: int = 64
    block_tokens: int = 8
    max_context_tokens: int = 1024
    max_batch_tokens: int = 64
    max_sequences: int = 16
    #: Offers that one worker lets wait without blocks.
    max_waiting_offers: int = 256
    lease_ttl_s: float = 10.0
    timing: StepCosts = field(default_factory=StepTiming)
    #: What becomes of pulls and messages while `SimulatedCluster.network` has no rules. Hosts are the worker ids,
    #: "gateway" and "coordinator", and "observer" for what the test itself asks.
    fate: FateModel = steady_link
    latency_s: Latency = loopback_latency
    #: Each machine's clocks gain or lose up to so many seconds in a second; how many is drawn.
    clock_drift: float = 0.0
    gateway: GatewayLimits = field(default_factory=GatewayLimits)
    prefill: PrefillLimits = field(default_factory=PrefillLimits)
    decode: DecodeLimits = field(default_factory=DecodeLimits)
    prefix_cache: bool = True
    #: Of placements that name no worker to fetch a prefix from, so many name one all the same, whatever it holds.
    hint_chance: float = 0.0
    #: Makes what decides in each life of the coordinator; None: the shell's own, which learns costs from the workers.
    conductor: Callable[[], Conductor] | None = None
    #: Whether there is a node agent, which operations can have start and end workers; it is down where the test crashes
    #: it.
    agent: bool = False
    #: Pools that follow the load, with an agent of their own; None: all of `roles` run from the start.
    elastic: ElasticSpec | None = None
    #: When requests move between workers by themselves; None: they do not.
    rebalancing: RebalanceSettings | None = None
    #: A line of the trace for every message and pull.
    log_messages: bool = False


@dataclass(slots=True)
class _Life:
    """One life of one worker."""

    #: What its tasks run under: see `simulator.loop.HOST`.
    host: str
    incarnation: Incarnation
    program: MemoryProcess
    #: None: a store.
    engine: ModelledEngine | None
    memory: ModelledEngine | StoreMemory
    transport: MemoryTransport
    shell: WorkerShell | StoreShell
    server: Server
    task: asyncio.Task[str]


@dataclass(slots=True)
class _CoordinatorLife:
    """One life of the coordinator."""

    #: What its tasks run under: see `simulator.loop.HOST`.
    host: str
    program: MemoryProcess
    clock: ProcessClock
    shell: CoordinatorShell
    scaler: Autoscaler | None
    task: asyncio.Task[None]


class SimulatedCluster:
    """Use as `async with SimulatedCluster(program, spec) as cluster`; leaving it stops everything."""

    def __init__(self, program: Program, spec: ClusterSpec, witness: Witness | None = None) -> None:
        self._program = program
        self._spec = spec
        self._witness = witness
        #: Where faults of the network are switched.
        self.network = FaultyNetwork(program, latency_s=spec.latency_s, fate=spec.fate)
        message_fate: Latency = self.network.message_fate
        pull_fate: FateModel = self.network.pull_fate
        if spec.log_messages:
            message_fate = logged_messages(message_fate, program.trace)
            pull_fate = logged_pulls(pull_fate, program.trace)
        self._network = MemoryNetwork(
            rng=program.rng("network"), latency_s=message_fate, host="observer", log=self._note_broken
        )
        self._fabric = MemoryFabric(pull_fate)
        #: By host.
        self._clocks = {
            host: self._make_clock(host)
            for host in (*spec.roles, *spec.stores, COORDINATOR_HOST, GATEWAY_HOST, AGENT_HOST)
        }
        #: Outlast the lives of their stores.
        self.disks = {
            store: StoreDisk(spec.store_disk, program.rng(f"disk of {store}"))
            for store in spec.stores
            if spec.store_disk
        }
        self._incarnations: Counter[str] = Counter()
        #: The current life of each worker that is up.
        self._lives: dict[str, _Life] = {}
        #: Workers whose lives ended themselves, and why, in order.
        self.ended: list[tuple[str, str]] = []
        #: What handlers of calls raised that may raise no such thing, in order. Callers heal it by asking again.
        self.broken_handlers: list[str] = []
        self._restarts: dict[asyncio.Task[None], None] = {}
        self._restarting = True
        #: None while the coordinator is down.
        self._coordinator: _CoordinatorLife | None = None
        self._coordinator_lives = 0
        #: None while the gateway is down.
        self._core: GatewayCore | None = None
        self._gateway_program: MemoryProcess
        self._gateway_lives = 0
        #: Of the build that the next lives run.
        self.protocol_version = PROTOCOL_VERSION
        #: That the next lives begin with.
        self._roles = dict(spec.roles)
        #: The agent's program and task; None while it is down.
        self._agent: tuple[MemoryProcess, asyncio.Task[None]] | None = None
        self._agent_lives = 0
        #: What the agent's present life is, where pools follow the load.
        self._elastic_agent: ElasticAgent | None = None
        self._starts = None if spec.elastic is None else Starts(spec.elastic, program.rng("starts"))
        #: Lives that begin or end because the agent wanted it.
        self._changing: dict[str, asyncio.Task[None]] = {}
        #: Workers that the agent ended, and the requests that they had then.
        self.stopped: list[tuple[str, int]] = []
        #: Of those that were killed: what still runs until it hears of it.
        self._dying: dict[asyncio.Task[Any], None] = {}

    async def __aenter__(self) -> Self:
        await self.start_coordinator()
        await self.start_gateway()
        elastic = self._spec.elastic
        initial = [each for each in self._spec.roles if elastic is None or each in elastic.initial]
        await asyncio.gather(*(self.start(worker_id) for worker_id in (*initial, *self._spec.stores)))
        if self._spec.agent or elastic is not None:
            self.start_agent()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._core is not None:
            await self._core.__aexit__(None, None, None)
        self.crash_agent()
        for restart in list(self._restarts):
            restart.cancel()
        self._restarting = False
        if self._changing:
            await asyncio.wait(list(self._changing.values()))
        while self._lives:
            await self.stop(next(iter(self._lives)))
        await self.crash_coordinator()
        if self._dying:
            await asyncio.wait(list(self._dying), timeout=CLEARING_LIMIT_S)

    # --- gateway ----------------------------------------------------------------------------------

    @property
    def core(self) -> GatewayCore:
        """The gateway's present life."""
        assert self._core is not None, "the gateway is down"
        return self._core

    @property
    def gateway_is_up(self) -> bool:
        return self._core is not None

    async def start_gateway(self) -> None:
        """A new life, under a name of its own."""
        assert self._core is None, "the gateway is up"
        self._gateway_lives += 1
        self._gateway_program = self._network.process(GATEWAY_HOST)
        make = GatewayCore if self._witness is None else partial(WatchedGateway, self._witness)
        self._core = make(
            self._gateway_program,
            ProcessClock(self._clocks[GATEWAY_HOST], offset_s=2000.0 * self._gateway_lives),
            GatewayId(f"{GATEWAY_HOST}-{self._gateway_lives}"),
            COORDINATOR,
            self._spec.gateway,
            trace_logger(self._log(GATEWAY_HOST)),
        )
        await self._core.__aenter__()

    def crash_gateway(self) -> None:
        """SIGKILL; of one that is down: nothing. Its clients hear of it at once, its remains are cleared away in the
        background."""
        core, self._core = self._core, None
        if core is None:
            return
        self._gateway_program.kill()
        self._clear_away(asyncio.create_task(core.__aexit__(None, None, None), name="dead gateway"))

    def another_gateway(self, host: str) -> GatewayCore:
        """One more, which knows nothing of the first. The caller enters it, and leaves it before the cluster."""
        clock = ProcessClock(self._make_clock(host), offset_s=3000.0)
        process = self._network.process(host)
        return GatewayCore(
            process, clock, GatewayId(host), COORDINATOR, self._spec.gateway, trace_logger(self._log(host))
        )

    # --- coordinator ------------------------------------------------------------------------------

    @property
    def coordinator_is_up(self) -> bool:
        return self._coordinator is not None

    async def start_coordinator(self) -> None:
        """A new life, which knows nothing of the one before."""
        assert self._coordinator is None, "the coordinator is up"
        self._coordinator_lives += 1
        host = f"{COORDINATOR_HOST}@{self._coordinator_lives}"
        context = contextvars.Context()
        context.run(HOST.set, host)
        program = self._network.process(COORDINATOR_HOST, context)
        server = program.server(COORDINATOR)
        clock = ProcessClock(self._clocks[COORDINATOR_HOST], offset_s=500.0)
        costs = LiveCosts()
        shell = CoordinatorShell(
            clock,
            conductor=self._spec.conductor() if self._spec.conductor is not None else self._default_conductor(costs),
            on_transfers=costs.observe_transfers,
            on_gone=costs.forget_links,
            network=program,
            rebalancing=self._spec.rebalancing,
            bandwidth=costs.bandwidth_bytes_s,
            log=self._log(COORDINATOR_HOST),
        )
        hinting = HintingServer(
            server, self._prefix_holders, rng=self._program.rng(f"hints of {host}"), chance=self._spec.hint_chance
        )
        shell.register_on(hinting)
        scaler = None
        if self._spec.elastic is not None:
            scaler = autoscaler_of(shell, self._spec.elastic.settings, clock, self._log(COORDINATOR_HOST))
        task = asyncio.get_running_loop().create_task(_keep_open(shell, scaler), name=host, context=context.copy())
        task.add_done_callback(_raise_failure)
        self._coordinator = _CoordinatorLife(host, program, clock, shell, scaler, task)
        await server.start()

    async def crash_coordinator(self) -> None:
        """SIGKILL; of one that is down: nothing."""
        life, self._coordinator = self._coordinator, None
        if life is not None:
            life.program.kill()
            _loop().thaw(life.host)
            life.task.cancel()
            await asyncio.wait([life.task])

    def freeze_coordinator(self) -> str:
        """SIGSTOP, as `freeze` of a worker. Returns the life's host, for `thaw_host`."""
        assert self._coordinator is not None, "the coordinator is down"
        host = self._coordinator.host
        self._log(host)("freezes")
        _loop().freeze(host)
        return host

    # --- operations -------------------------------------------------------------------------------

    def start_agent(self) -> None:
        """A new life of the node agent."""
        assert self._agent is None, "the agent is up"
        self._agent_lives += 1
        name = f"{AGENT_HOST}@{self._agent_lives}"
        context = contextvars.Context()
        context.run(HOST.set, name)
        program = self._network.process(AGENT_HOST, context)
        server = program.server(f"{AGENT_HOST}:1")
        incarnation = Incarnation(self._agent_lives)
        agent: SimulatedAgent
        if self._spec.elastic is None or self._starts is None:
            agent = SimulatedAgent(self, server, program, COORDINATOR, incarnation)
        else:
            worker_ids = tuple(self._spec.roles)
            agent = self._elastic_agent = ElasticAgent(
                *(self, server, program, COORDINATOR, incarnation),
                spec=self._spec.elastic,
                worker_ids=worker_ids,
                starts=self._starts,
            )
        task = asyncio.get_running_loop().create_task(agent.run(), name=name, context=context.copy())
        task.add_done_callback(_raise_failure)
        self._agent = program, task

    def crash_agent(self) -> None:
        """SIGKILL, which its workers survive here; of one that is down: nothing."""
        if self._agent is not None:
            program, task = self._agent
            self._agent = self._elastic_agent = None
            program.kill()
            _loop().thaw(task.get_name())
            task.cancel()
            self._clear_away(task)

    def slots(self) -> list[tuple[str, MemberRole, Incarnation, bool]]:
        """As `simulator.agent.Machine` says."""
        roles: dict[str, MemberRole] = {**self._roles, **dict.fromkeys(self._spec.stores, "store")}
        return [
            (worker_id, role, Incarnation(self._incarnations[worker_id]), worker_id in self._lives)
            for worker_id, role in roles.items()
        ]

    @property
    def agent_is_up(self) -> bool:
        return self._agent is not None

    @property
    def elastic_agent(self) -> ElasticAgent | None:
        """Where pools follow the load, and it is up; looked at from outside."""
        return self._elastic_agent

    def freeze_agent(self) -> str:
        """SIGSTOP, as `freeze` of a worker. Returns the life's host, for `thaw_host`."""
        assert self._agent is not None, "the agent is down"
        host = self._agent[1].get_name()
        self._log(host)("freezes")
        _loop().freeze(host)
        return host

    def elastic_workers_up(self) -> list[str]:
        """Those that the agent keeps, where pools follow the load."""
        return [worker_id for worker_id in self._lives if worker_id in self._spec.roles]

    def is_up(self, worker_id: str) -> bool:
        return worker_id in self._lives

    def note_lost_life(self, worker_id: str) -> None:
        """As `simulator.elastic.ElasticMachine` says."""
        self._incarnations[worker_id] += 1

    def begin_life(self, worker_id: str) -> asyncio.Task[None]:
        """As `simulator.elastic.ElasticMachine` says."""
        return self._change(worker_id, self._launch_where_down(worker_id))

    def end_life(self, worker_id: str) -> asyncio.Task[None]:
        """As `simulator.elastic.ElasticMachine` says."""
        return self._change(worker_id, self._stop_where_up(worker_id))

    def _change(self, worker_id: str, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """One after the other, in nobody's context: who asked may be frozen or killed."""
        before = self._changing.get(worker_id)

        async def in_turn() -> None:
            if before is not None:
                await asyncio.wait([before])
            await work

        context = contextvars.Context()
        task = asyncio.get_running_loop().create_task(in_turn(), name=f"change of {worker_id}", context=context)
        self._changing[worker_id] = task
        task.add_done_callback(_raise_failure)

        def forget(ended: asyncio.Task[None]) -> None:
            if self._changing.get(worker_id) is ended:
                del self._changing[worker_id]

        task.add_done_callback(forget)
        return task

    async def _launch_where_down(self, worker_id: str) -> None:
        if worker_id not in self._lives:
            await self.launch(worker_id)

    async def _stop_where_up(self, worker_id: str) -> None:
        if worker_id in self._lives:
            self.stopped.append((worker_id, self.worker(worker_id).standing.open_work().requests))
            await self.stop(worker_id)

    def take_role(self, worker_id: str, role: Role) -> None:
        """The worker's next lives begin with it."""
        self._roles[worker_id] = role

    def operation_statuses(self) -> tuple[OperationStatus, ...]:
        """As the coordinator has them; looked at from outside, at once. None while it is down."""
        life = self._coordinator
        if life is None or life.shell.operations is None:
            return ()
        return life.shell.operations.statuses()

    @property
    def coordinator_life(self) -> str:
        """A name of its present life; empty while it is down."""
        return "" if self._coordinator is None else self._coordinator.host

    @property
    def scaler(self) -> Autoscaler | None:
        """What lets pools follow the load; None where none does, and while the coordinator is down."""
        return None if self._coordinator is None else self._coordinator.scaler

    async def operate(self, operation: Operation) -> int:
        """Asks the coordinator for it; its number."""
        ask = OperateRequest(operation=operation)
        return (await self._network.channel(COORDINATOR).call(OPERATE, ask, timeout_s=1.0)).operation_id

    async def members(self) -> tuple[Member, ...]:
        """As the coordinator tells them."""
        return (await self._network.channel(COORDINATOR).call(MEMBERS, Empty(), timeout_s=1.0)).members

    async def operations(self, *, cancel: int | None = None) -> OperationsReply:
        ask = OperationsRequest(cancel=cancel)
        return await self._network.channel(COORDINATOR).call(OPERATIONS, ask, timeout_s=1.0)

    async def migrate(
        self, source: str, destination: str, *, mode: MoveMode = "auto", max_requests: int = 1, waiting: bool = True
    ) -> MigrateReply:
        """Asks one worker to move requests to another, as the coordinator does. Both are up."""
        there = self._lives[destination]
        peer = Peer(worker_id=WorkerId(destination), incarnation=there.incarnation, address=f"{destination}:1")
        ask = MigrateRequest(
            target=self._lives[source].incarnation,
            destination=peer,
            max_requests=max_requests,
            mode=mode,
            waiting=waiting,
            reason="wanted",
        )
        return await self._network.channel(f"{source}:1").call(MIGRATE, ask, timeout_s=1.0)

    # --- workers ----------------------------------------------------------------------------------

    async def revive(self, worker_id: str) -> None:
        """The next life of one that is down, where no agent sees to that."""
        is_kept = self._spec.elastic is not None and worker_id in self._spec.roles
        if not is_kept and worker_id not in self._lives:
            await self.launch(worker_id)

    async def start(self, worker_id: str) -> None:
        """A new life of a worker; returns once the coordinator knows it."""
        shell = await self.launch(worker_id)
        async with asyncio.timeout(START_LIMIT_S):
            await shell.registered.wait()

    async def launch(self, worker_id: str) -> WorkerShell | StoreShell:
        """As `start`, without waiting for the coordinator: it may be down."""
        assert worker_id not in self._lives, f"{worker_id} is up"
        self._incarnations[worker_id] += 1
        incarnation = Incarnation(self._incarnations[worker_id])
        name = f"{worker_id}@{incarnation}"
        context = contextvars.Context()
        context.run(HOST.set, name)
        program = self._network.process(worker_id, context)
        server = program.server(f"{worker_id}:1")
        make = self._make_store if worker_id in self._spec.stores else self._make_worker
        clock = ProcessClock(self._clocks[worker_id], offset_s=1000.0 * self._incarnations.total() + 17.0)
        info = self._info(worker_id, incarnation, await server.start())
        shell, memory, transport = make(info, name, program, clock)
        engine = memory if isinstance(memory, ModelledEngine) else None
        shell.register_on(server)
        task = asyncio.get_running_loop().create_task(shell.live(), name=name, context=context.copy())
        life = self._lives[worker_id] = _Life(
            name, incarnation, program, engine, memory, transport, shell, server, task
        )
        task.add_done_callback(lambda _: self._life_ended(worker_id, life), context=contextvars.copy_context())
        return shell

    def _info(self, worker_id: str, incarnation: Incarnation, address: str) -> WorkerInfo:
        spec = self._spec
        is_store = worker_id in spec.stores
        return WorkerInfo(
            worker_id=WorkerId(worker_id),
            incarnation=incarnation,
            role="store" if is_store else self._roles[worker_id],
            address=address,
            model="modelled",
            identity=replace(modelled_identity(block_tokens=spec.block_tokens), protocol_version=self.protocol_version),
            total_blocks=spec.store_blocks if is_store else spec.num_blocks,
            max_context_tokens=0 if is_store else spec.max_context_tokens,
            max_batch_tokens=0 if is_store else spec.max_batch_tokens,
            max_sequences=0 if is_store else spec.max_sequences,
            handoff_blocks=0 if is_store else spec.prefill.handoff_blocks(spec.num_blocks),
            node="node",
        )

    def _make_worker(
        self, info: WorkerInfo, name: str, program: MemoryProcess, clock: ProcessClock
    ) -> tuple[WorkerShell, ModelledEngine, MemoryTransport]:
        spec = self._spec
        make_engine = ModelledEngine if self._witness is None else partial(WatchedEngine, self._witness, name)
        engine = make_engine(
            identity=info.identity,
            num_blocks=spec.num_blocks,
            max_context_tokens=spec.max_context_tokens,
            timing=spec.timing,
        )
        watched = None if self._witness is None else WatchedPool(self._witness, name, engine)
        block_bytes = info.identity.layout.block_bytes
        transport = self._fabric.over(name, watched or engine, num_blocks=spec.num_blocks, block_bytes=block_bytes)
        shell = WorkerShell(
            info=info,
            engine=engine,
            transports=TransportSet((transport,)),
            network=program,
            clock=clock,
            coordinator_address=COORDINATOR,
            limits=WorkerLimits(
                budget=StepBudget(max_tokens=spec.max_batch_tokens, max_sequences=spec.max_sequences),
                prefill=spec.prefill,
                decode=spec.decode,
                lease_ttl_s=spec.lease_ttl_s,
                max_waiting_offers=spec.max_waiting_offers,
                prefix_cache=spec.prefix_cache,
            ),
            on_role=lambda role: self.take_role(info.worker_id, role),
            log=self._log(name),
        )
        if watched is not None:
            watched.ledger = shell.ledger
        return shell, engine, transport

    def _make_store(
        self, info: WorkerInfo, name: str, program: MemoryProcess, clock: ProcessClock
    ) -> tuple[StoreShell, StoreMemory, MemoryTransport]:
        spec = self._spec
        memory = StoreMemory(spec.store_blocks, spec.block_tokens)
        watched = None if self._witness is None else WatchedPool(self._witness, name, memory)
        disk_memory = None if self._witness is None else WatchedMemory(self._witness, name, memory)
        block_bytes = info.identity.layout.block_bytes
        transport = self._fabric.over(name, watched or memory, num_blocks=spec.store_blocks, block_bytes=block_bytes)
        disk = None
        if info.worker_id in self.disks:
            disk = self.disks[info.worker_id].mount(disk_memory or memory)
        shell = StoreShell(
            info=info,
            transports=TransportSet((transport,)),
            network=program,
            clock=clock,
            coordinator_address=COORDINATOR,
            eviction=dram_eviction(spec.eviction, spec.store_blocks),
            disk=disk,
            limits=StoreShellLimits(lease_ttl_s=spec.lease_ttl_s),
            log=self._log(name),
        )
        if disk is not None:
            disk.on_lost = shell.disk_lost
        for each in (watched, disk_memory):
            if each is not None:
                each.ledger = shell.ledger
        return shell, memory, transport

    def crash(self, worker_id: str) -> None:
        """SIGKILL: nothing of this life is heard any more. Its remains are cleared away in the background."""
        life = self._lives.pop(worker_id)
        self._program.trace.add(f"{life.host:14s} is killed")
        life.program.kill()
        life.transport.crash()
        _loop().thaw(life.host)
        life.task.cancel()
        self._clear_away(life.task)

    def freeze(self, worker_id: str) -> str:
        """SIGSTOP: nothing of this life runs; its connections stay, and what is sent to it waits. Returns the life's
        host, for `thaw_host`."""
        self._log(self._lives[worker_id].host)("freezes")
        host = self._lives[worker_id].host
        _loop().freeze(host)
        return host

    def thaw(self, worker_id: str) -> None:
        """SIGCONT."""
        self.thaw_host(self._lives[worker_id].host)

    def thaw_host(self, host: str) -> None:
        """SIGCONT to one life; of one that is gone: nothing."""
        self._log(host)("thaws")
        _loop().thaw(host)

    def is_draining(self, worker_id: str) -> bool:
        """It is up, and takes nothing new; looked at from outside."""
        life = self._lives.get(worker_id)
        return life is not None and isinstance(life.shell, WorkerShell) and life.shell.standing.draining

    def host_of(self, worker_id: str) -> str | None:
        """Of the present life; None while it is down."""
        life = self._lives.get(worker_id)
        return life.host if life is not None else None

    def stick(self, worker_id: str) -> None:
        """From now on no engine step of this life ends; everything else of it goes on."""
        self._log(self._lives[worker_id].host)("its engine is stuck")
        engine = self._lives[worker_id].engine
        assert engine is not None, f"{worker_id} has no engine"
        engine.get_stuck()

    async def stop(self, worker_id: str) -> None:
        """SIGTERM: the worker says goodbye and ends; SIGKILL for an engine that is stuck."""
        life = self._lives.pop(worker_id)
        _loop().thaw(life.host)
        life.task.cancel()
        await asyncio.wait([life.task])
        await life.server.stop(STOP_GRACE_S)
        life.program.kill()
        if life.engine is not None:
            with suppress(TimeoutError):
                async with asyncio.timeout(STOP_GRACE_S):
                    await life.engine.close()
        await life.transport.close()

    def worker(self, worker_id: str) -> WorkerShell:
        """The present life of a worker that is up; looked at from outside."""
        shell = self._lives[worker_id].shell
        assert isinstance(shell, WorkerShell), f"{worker_id} is a store"
        return shell

    def store(self, worker_id: str) -> StoreShell:
        """The present life of a store that is up; looked at from outside."""
        shell = self._lives[worker_id].shell
        assert isinstance(shell, StoreShell), f"{worker_id} is no store"
        return shell

    def up(self) -> Sequence[str]:
        return tuple(self._lives)

    def problems(self) -> dict[str, Sequence[str]]:
        """What is wrong with the books of the workers that are up, by life; looked at from outside, at once."""
        return {life.host: found for life in self._lives.values() if (found := life.shell.problems())}

    def ledgers(self) -> dict[str, Ledger]:
        """Of the workers and stores that are up, by life; looked at from outside, at once."""
        return {life.host: life.shell.ledger for life in self._lives.values()}

    def named_blocks(self) -> Iterator[tuple[str, bytes, BlockContent]]:
        """Where a block has a key, that key, and what stands there: in pools, in stores' memories, on their disks."""
        for life in self._lives.values():
            ledger = life.shell.ledger
            for key in ledger.all_keys():
                block_id = ledger.lookup(key)
                if block_id is not None:
                    yield f"block {block_id} of {life.host}", key, life.memory.read_block(block_id)
        for store, disk in self.disks.items():
            for key, (content, _) in disk.blocks.items():
                yield f"the disk of {store}", key, content

    async def audits(self) -> dict[str, AuditReply]:
        """The books of every worker that is up, asked over the network."""
        return {
            worker_id: await self._network.channel(f"{worker_id}:1").call(AUDIT, Empty(), timeout_s=1.0)
            for worker_id in self.up()
        }

    def fleet(self) -> FleetView:
        """What the coordinator places requests by; looked at from outside, at once."""
        assert self._coordinator is not None, "the coordinator is down"
        return self._coordinator.shell.fleet()

    def jump_wall_clock(self, host: str, by_s: float) -> None:
        """Sets a machine's wall clock forwards or (negative) backwards."""
        self._log(host)(f"its wall clock jumps by {by_s:g} s")
        self._clocks[host].jump_wall(by_s)

    # --- inside -----------------------------------------------------------------------------------

    def _default_conductor(self, costs: LiveCosts) -> Conductor:
        return default_conductor(costs, ConductorSettings(block_tokens=self._spec.block_tokens))

    def _prefix_holders(self) -> list[Peer]:
        """Everybody who may hold a prefix, in their present lives; a store more often than all workers together, for
        that is what it is there for."""
        return [
            Peer(worker_id=WorkerId(worker_id), incarnation=life.incarnation, address=f"{worker_id}:1")
            for worker_id, life in self._lives.items()
            for _ in range(3 * len(self._spec.roles) if worker_id in self._spec.stores else 1)
        ]

    def _clear_away(self, task: asyncio.Task[Any]) -> None:
        if not task.done():
            self._dying[task] = None
            task.add_done_callback(self._dying.pop)

    def _life_ended(self, worker_id: str, life: _Life) -> None:
        if life.task.cancelled():
            return
        if (error := life.task.exception()) is not None:
            raise error
        if self._lives.get(worker_id) is life:
            self.ended.append((worker_id, life.task.result()))
            self.crash(worker_id)
            if not self._restarting:
                return
            restart = asyncio.create_task(self._restart(worker_id))
            self._restarts[restart] = None
            restart.add_done_callback(self._restarts.pop)

    async def _restart(self, worker_id: str) -> None:
        await asyncio.sleep(RESTART_S)
        await self.revive(worker_id)

    def _make_clock(self, host: str) -> MachineClock:
        largest = self._spec.clock_drift
        return MachineClock(drift=self._program.rng(f"clock of {host}").uniform(-largest, largest))

    def _note_broken(self, text: str) -> None:
        self.broken_handlers.append(text)
        self._log("network")(text)

    def _log(self, name: str) -> Callable[[str], None]:
        return lambda line: self._program.trace.add(f"{name:14s} {line}")


async def _keep_open(shell: CoordinatorShell, scaler: Autoscaler | None) -> None:
    """Until cancelled; a bug of the shell's own is raised."""
    async with shell, scaler or nullcontext():
        await asyncio.Event().wait()


def _raise_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        raise error


def _loop() -> VirtualLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, VirtualLoop), f"a simulated cluster runs on virtual time, not on {loop!r}"
    return loop
