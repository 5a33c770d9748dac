"""A whole cluster in one event loop: the production shells over an in-memory network and modelled engines.

Gateway core, coordinator and workers are those of a live cluster; only network, transport, engine and clock are
others. Each worker is a program of its own on its own host, with a clock that starts elsewhere, so that code
which compares clocks of two processes fails here.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import structlog

from contracts.ids import GatewayId, Incarnation, WorkerId
from contracts.messages import AUDIT, Empty, WorkerInfo
from coordinator import CoordinatorShell
from engine.compose import StepBudget
from gateway.core import GatewayCore
from gateway.limits import GatewayLimits
from kvtransfer import MemoryFabric, TransportSet
from kvtransfer.memory import FateModel, steady_link
from rpc import MemoryNetwork
from simulator.clock import VirtualClock
from simulator.engine import ModelledEngine, StepTiming, modelled_identity
from worker import WorkerLimits, WorkerShell

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import TracebackType

    from contracts.messages import AuditReply, Role
    from kvtransfer import MemoryTransport
    from rpc import Server
    from rpc.memory import MemoryProcess
    from simulator.program import Program

COORDINATOR = "coordinator:1"
GATEWAY = GatewayId("gateway")
#: As in a live worker.
STOP_GRACE_S = 1.0
#: How long a cluster may take until all its workers are registered.
START_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """What is simulated."""

    #: Roles by worker id.
    roles: dict[str, Role]
    num_blocks: int = 64
    block_tokens: int = 8
    max_context_tokens: int = 1024
    max_batch_tokens: int = 64
    max_sequences: int = 16
    lease_ttl_s: float = 10.0
    timing: StepTiming = field(default_factory=StepTiming)
    fate: FateModel = steady_link


@dataclass(slots=True)
class _Life:
    """One life of one worker."""

    program: MemoryProcess
    engine: ModelledEngine
    transport: MemoryTransport
    shell: WorkerShell
    server: Server
    task: asyncio.Task[None]


class SimulatedCluster:
    """Use as `async with SimulatedCluster(program, spec) as cluster`; leaving it stops everything."""

    def __init__(self, program: Program, spec: ClusterSpec) -> None:
        self._program = program
        self._spec = spec
        self._network = MemoryNetwork(rng=program.rng("network"), host="gateway", log=self._log("network"))
        self._fabric = MemoryFabric(spec.fate)
        self._incarnations: Counter[str] = Counter()
        #: The current life of each worker that is up.
        self._lives: dict[str, _Life] = {}
        self.core: GatewayCore

    async def __aenter__(self) -> Self:
        coordinator_program = self._network.process("coordinator")
        server = coordinator_program.server(COORDINATOR)
        self._coordinator = CoordinatorShell(VirtualClock(offset_s=500.0), log=self._log("coordinator"))
        self._coordinator.register_on(server)
        await self._coordinator.__aenter__()
        await server.start()
        self.core = GatewayCore(
            self._network, VirtualClock(), GATEWAY, COORDINATOR, GatewayLimits(), structlog.get_logger()
        )
        await self.core.__aenter__()
        await asyncio.gather(*(self.start(worker_id) for worker_id in self._spec.roles))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.core.__aexit__(None, None, None)
        for worker_id in list(self._lives):
            await self.stop(worker_id)
        await self._coordinator.__aexit__(kind, error, trace)

    # --- workers ----------------------------------------------------------------------------------

    async def start(self, worker_id: str) -> None:
        """A new life of a worker; returns once the coordinator knows it."""
        assert worker_id not in self._lives, f"{worker_id} is up"
        self._incarnations[worker_id] += 1
        incarnation = Incarnation(self._incarnations[worker_id])
        name = f"{worker_id}@{incarnation}"
        clock = VirtualClock(offset_s=1000.0 * self._incarnations.total() + 17.0)
        spec = self._spec
        engine = ModelledEngine(
            clock,
            identity=modelled_identity(block_tokens=spec.block_tokens),
            num_blocks=spec.num_blocks,
            max_context_tokens=spec.max_context_tokens,
            timing=spec.timing,
        )
        block_bytes = engine.identity.layout.block_bytes
        transport = self._fabric.over(name, engine, num_blocks=spec.num_blocks, block_bytes=block_bytes)
        program = self._network.process(worker_id)
        server = program.server(f"{worker_id}:1")
        info = WorkerInfo(
            worker_id=WorkerId(worker_id),
            incarnation=incarnation,
            role=spec.roles[worker_id],
            address=await server.start(),
            model="modelled",
            identity=engine.identity,
            total_blocks=spec.num_blocks,
            max_context_tokens=spec.max_context_tokens,
        )
        shell = WorkerShell(
            info=info,
            engine=engine,
            transports=TransportSet((transport,)),
            network=program,
            clock=clock,
            coordinator_address=COORDINATOR,
            limits=WorkerLimits(
                budget=StepBudget(max_tokens=spec.max_batch_tokens, max_sequences=spec.max_sequences),
                lease_ttl_s=spec.lease_ttl_s,
            ),
            log=self._log(name),
        )
        shell.register_on(server)
        task = asyncio.create_task(shell.run(), name=name)
        self._lives[worker_id] = _Life(program, engine, transport, shell, server, task)
        async with asyncio.timeout(START_LIMIT_S):
            await shell.registered.wait()

    def crash(self, worker_id: str) -> None:
        """SIGKILL: nothing of this life is heard any more. Its remains are cleared away in the background."""
        life = self._lives.pop(worker_id)
        self._program.trace.add(f"{worker_id} is killed")
        life.program.kill()
        life.transport.crash()
        life.task.cancel()

    async def stop(self, worker_id: str) -> None:
        """SIGTERM: the worker says goodbye and ends."""
        life = self._lives.pop(worker_id)
        life.task.cancel()
        await asyncio.wait([life.task])
        await life.server.stop(STOP_GRACE_S)
        life.program.kill()
        await life.engine.close()
        await life.transport.close()

    def up(self) -> Sequence[str]:
        return tuple(self._lives)

    async def audits(self) -> dict[str, AuditReply]:
        """The books of every worker that is up, asked over the network."""
        return {
            worker_id: await self._network.channel(f"{worker_id}:1").call(AUDIT, Empty(), timeout_s=1.0)
            for worker_id in self._lives
        }

    # --- inside -----------------------------------------------------------------------------------

    def _log(self, name: str) -> Callable[[str], None]:
        return lambda line: self._program.trace.add(f"{name:14s} {line}")
