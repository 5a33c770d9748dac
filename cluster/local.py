"""A whole cluster on this machine: coordinator, gateway and node agent here, the workers as children."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import sys
import tempfile
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.agent_service import Overseer, agent_service
from cluster.following import LocalCluster
from cluster.kept import kept
from cluster.launch import StandbyLaunch, TemplateLaunch, WeightTierOptions
from cluster.model_source import resolve_model
from cluster.node_agent import NodeAgent, WorkerPlan
from cluster.parent_log import structured
from cluster.plan import Site, node_name, plan_cells, plan_store, worker_environ, worker_slots
from cluster.process_log import ProcessLog
from cluster.progress import starting_line
from cluster.services import (
    FrontedModel,
    base_url,
    check_servable,
    coordinator_service,
    gateway_service,
    gateway_settings,
)
from cluster.standby import StandbyPool
from cluster.state_file import STATE_FILE, CellState, ClusterState
from cluster.supervision import SupervisionLimits
from cluster.template import TemplatePlan, forks_work_here
from cluster.weights_service import WeightsService
from coldstart.compressing import CompressRules
from contracts.errors import ConfigError
from contracts.ids import Incarnation
from coordinator.holding import Room
from gateway.server import bind
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence
    from contextlib import AbstractAsyncContextManager

    from coldstart.tier_handles import Entry
    from contracts.cells import Cell
    from contracts.clock import Clock
    from contracts.config import ClusterConfig, SupervisorConfig
    from rpc import Network

#: Where rpc servers of one machine listen.
LOOPBACK = "127.0.0.1:0"

WORKER_COMMAND = (sys.executable, "-m", "cluster.worker_main")

#: In the runtime folder, unless the configuration names another.
LOG_FOLDER = "logs"


@dataclass(frozen=True, slots=True)
class LocalCell:
    """One of the models that are served here: "" is the only one's name."""

    name: str
    model_name: str
    config: ClusterConfig
    folder: Path
    #: As `ModelSource.pin`.
    pin: Entry | None = None

    @classmethod
    def resolved(cls, cell: Cell, say: Callable[[str], None]) -> LocalCell:
        """Blocks while the model is fetched. Raises ConfigError."""
        weights = cell.config.weights
        stream = weights.dram is not None
        source = resolve_model(cell.config.model, say, dtype=cell.config.dtype, tier=weights.ssd, stream=stream)
        return cls(cell.name, cell.config.served_model_name or source.name, cell.config, source.folder, source.pin)

    @property
    def weight_bytes(self) -> int:
        """On disk, in either layout."""
        files = [*self.folder.glob("*.safetensors"), *self.folder.glob("*.tandem")]
        return sum(file.stat().st_size for file in files)


@asynccontextmanager
async def local_cluster(
    config: ClusterConfig, cells: Sequence[LocalCell], *, state_file: Path | None, say: Callable[[str], None]
) -> AsyncGenerator[LocalCluster]:
    """Starts everything; returns before the workers are ready. Leaving stops everything within a bound.

    Raises ConfigError for what cannot work (port in use, log folder that cannot be made).
    """
    for cell in cells:
        check_servable(cell.config)
    settings = [gateway_settings(cell.config, cell.folder, cell.model_name) for cell in cells]
    async with AsyncExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(bind(settings[0])))
        folder = _RuntimeFolder(say)
        stack.callback(folder.remove)
        runtime_dir = folder.path
        log_dir = log_folder(config, runtime_dir)
        log = ProcessLog(log_dir / "tandem.log", say)
        clock = LiveClock()
        token = secrets.token_urlsafe(32)
        network = GrpcNetwork(token=token, log=_line_writer(log))
        stack.push_async_callback(network.close)
        room = Room(config.workers_memory, node_name(config))
        sites: list[Site] = []
        for cell in cells:
            address = await stack.enter_async_context(_kept_coordinator(cell, network, clock, log, room, say))
            sites.append(
                Site(
                    model_dir=str(cell.folder),
                    model_name=cell.model_name,
                    coordinator_address=address,
                    cluster_token=token,
                    runtime_dir=str(runtime_dir),
                    prefix=f"{cell.name}-" if cell.name else "",
                    bind=LOOPBACK,
                    parent_pid=os.getpid(),
                    allowed_cores=allowed_cores(),
                    node=node_name(config),
                )
            )
        planned = [(cell.config, site) for cell, site in zip(cells, sites, strict=True)]
        agent, planned = make_agent(config, planned, log_dir=log_dir, clock=clock, say=say)
        plans = cell_plans(planned)
        own = [tuple(plan.launch.worker_id for plan in each) for each in plans]
        state = ClusterState(
            pid=os.getpid(),
            base_url=base_url(sock),
            model_name=cells[0].model_name,
            coordinator_address=sites[0].coordinator_address,
            cluster_token=token,
            runtime_dir=str(runtime_dir),
            log_dir=str(log_dir),
            ready=False,
            workers=(),
            cells=tuple(
                CellState(
                    name=cell.name,
                    model_name=cell.model_name,
                    coordinator_address=site.coordinator_address,
                    worker_ids=worker_ids,
                )
                for cell, site, worker_ids in zip(cells, sites, own, strict=True)
                if cell.name
            ),
        )
        for cell, each in zip(cells, plans, strict=True):
            say(starting_line(cell.model_name, [plan.launch.role for plan in each if plan.starts]))
        await stack.enter_async_context(agent)
        overseers = [
            Overseer(site.coordinator_address, frozenset(worker_ids))
            for site, worker_ids in zip(sites, own, strict=True)
        ]
        beats = agent_service(
            agent,
            sites[0],
            network,
            LOOPBACK,
            first_incarnation(clock),
            _line_writer(log),
            overseers=overseers,
            workers_memory_bytes=config.workers_memory,
        )
        await stack.enter_async_context(beats)
        fronted = [
            FrontedModel(
                settings=each, folder=cell.folder, coordinator_address=site.coordinator_address, name=cell.name
            )
            for cell, site, each in zip(cells, sites, settings, strict=True)
        ]
        await stack.enter_async_context(gateway_service(fronted, network, clock, sock, structured(log, say)))
        files = [runtime_dir / STATE_FILE, *([state_file] if state_file else [])]
        cluster = LocalCluster(agent, state, files, clock, say)
        watch = asyncio.create_task(cluster.watch(), name="watch-workers")
        try:
            yield cluster
        finally:
            folder.keep_logs = cluster.has_trouble
            watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watch


@asynccontextmanager
async def _kept_coordinator(
    cell: LocalCell, network: Network, clock: Clock, log: ProcessLog, room: Room, say: Callable[[str], None]
) -> AsyncGenerator[str]:
    """Yields its address, which all its lives have: workers and gateway find the next one there, and requests are
    placed by the gateway's own knowledge until then."""
    found = [LOOPBACK]
    write = _line_writer(log, cell.name)

    def make() -> AbstractAsyncContextManager[str]:
        return coordinator_service(
            cell.config, network, clock, found[-1], write, weight_bytes=cell.weight_bytes, room=room
        )

    name = f"the coordinator of {cell.name or cell.model_name}"
    async with kept(name, make, clock, write, on_down=say) as address:
        found.append(address)
        yield address


def supervision_limits(config: SupervisorConfig) -> SupervisionLimits:
    return SupervisionLimits(
        start_timeout_s=config.start_timeout_s,
        stop_timeout_s=config.stop_timeout_s,
        hang_timeout_s=config.hang_timeout_s,
        restart_delay_s=config.restart_delay_s,
        restart_delay_max_s=config.restart_delay_max_s,
        start_attempts=config.start_attempts,
    )


def first_incarnation(clock: Clock) -> Incarnation:
    """Larger than every incarnation of an earlier start, as long as no worker restarts every millisecond."""
    return Incarnation(int(clock.wall_s() * 1000))


def make_agent(
    config: ClusterConfig,
    cells: Sequence[tuple[ClusterConfig, Site]],
    *,
    log_dir: Path,
    clock: Clock,
    say: Callable[[str], None],
) -> tuple[NodeAgent, list[tuple[ClusterConfig, Site]]]:
    """The node agent of this machine, and the sites that its workers know. `cells`: the models that it has workers of.
    Raises ConfigError."""
    weights = make_weights(config, log_dir, clock, say)
    if weights is not None:
        cells = [(own, replace(site, weights=weights.door)) for own, site in cells]
    agent = NodeAgent(
        [plan for each in cell_plans(cells) for plan in each],
        limits=supervision_limits(config.supervisor),
        first_incarnation=first_incarnation(clock),
        log_dir=log_dir,
        clock=clock,
        say=say,
        standby=make_standby(config, log_dir, clock, say),
        template=make_template(config, log_dir, say),
        weights=weights,
    )
    return agent, list(cells)


def make_weights(
    config: ClusterConfig, log_dir: Path, clock: Clock, say: Callable[[str], None]
) -> WeightsService | None:
    """None where workers read their own weights."""
    dram, ssd = config.weights.dram, config.weights.ssd
    if dram is None:
        return None
    return WeightsService(
        host_memory_bytes() // 2 if dram == "auto" else dram,
        None if ssd.path is None else WeightTierOptions(path=ssd.path, size_bytes=ssd.size),
        worker_environ(os.environ, threads=1),
        os.getpid(),
        clock,
        ProcessLog(log_dir / "weights.log", say),
        compress=(
            CompressRules(cold_after_s=config.weights.cold_after_s) if config.weights.compress == "auto" else None
        ),
    )


def make_standby(config: ClusterConfig, log_dir: Path, clock: Clock, say: Callable[[str], None]) -> StandbyPool | None:
    """None where nobody is to stand by, or a template does it for all."""
    if config.weights.standby == 0 or _has_template(config):
        return None
    return StandbyPool(
        config.weights.standby,
        WORKER_COMMAND,
        worker_environ(os.environ, threads=1),
        StandbyLaunch(parent_pid=os.getpid(), device="cpu"),
        ProcessLog(log_dir / "standby.log", say),
        clock,
    )


def make_template(config: ClusterConfig, log_dir: Path, say: Callable[[str], None]) -> TemplatePlan | None:
    """None where every worker is started by itself."""
    if not _has_template(config):
        return None
    return TemplatePlan(
        launch=TemplateLaunch(parent_pid=os.getpid(), device="cpu"),
        log=ProcessLog(log_dir / "standby.log", say),
        always=config.weights.standby > 0,
    )


def _has_template(config: ClusterConfig) -> bool:
    return config.weights.fork and forks_work_here()


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def worker_plans(config: ClusterConfig, site: Site) -> list[WorkerPlan]:
    """What a node agent starts of one model. Raises ConfigError."""
    return cell_plans([(config, site)])[0]


def cell_plans(cells: Sequence[tuple[ClusterConfig, Site]]) -> list[list[WorkerPlan]]:
    """What a node agent starts of each model. Raises ConfigError."""
    planned: list[list[WorkerPlan]] = []
    for (config, site), launches in zip(cells, plan_cells(cells), strict=True):
        plans = [
            WorkerPlan(
                launch=launch,
                command=WORKER_COMMAND,
                environ=worker_environ(os.environ, launch.threads),
                pool=pool.name,
                starts=index < pool.initial_workers,
            )
            for launch, (pool, index) in zip(launches, worker_slots(config), strict=True)
        ]
        store = plan_store(config, site)
        if store is not None:
            command = (sys.executable, "-m", "cluster.store_main")
            plans.append(WorkerPlan(launch=store, command=command, environ=worker_environ(os.environ, threads=1)))
        planned.append(plans)
    return planned


def allowed_cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


class _RuntimeFolder:
    """Private (mode 0700), and short enough for the names of unix sockets."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self.path = Path(tempfile.mkdtemp(prefix="tandem-"))
        #: Somebody will want to read them.
        self.keep_logs = False

    def remove(self) -> None:
        logs = self.path / LOG_FOLDER
        if self.keep_logs and logs.is_dir():
            (self.path / STATE_FILE).unlink(missing_ok=True)
            self._say(f"the workers' logs are kept in {logs}")
        else:
            shutil.rmtree(self.path, ignore_errors=True)


def log_folder(config: ClusterConfig, runtime_dir: Path) -> Path:
    """Made if need be. Raises ConfigError when it cannot."""
    named = config.log_dir
    folder = runtime_dir / LOG_FOLDER if named is None else Path(named).expanduser().resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"log_dir {folder}: cannot be made: {error.strerror}") from error
    return folder


def _line_writer(log: ProcessLog, name: str = "") -> Callable[[str], None]:
    begin = f"{name}: " if name else ""
    return lambda line: log.write(f"{begin}{line}".encode())
