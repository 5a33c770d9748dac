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
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cluster.agent_service import agent_service
from cluster.launch import StandbyLaunch, WeightTierOptions
from cluster.node_agent import NodeAgent, WorkerPlan
from cluster.parent_log import structured
from cluster.plan import Site, node_name, plan_launches, plan_store, worker_environ, worker_slots
from cluster.process_log import ProcessLog
from cluster.progress import ProgressLines, settled, starting_line, why_hopeless
from cluster.services import base_url, check_servable, coordinator_service, gateway_service, gateway_settings
from cluster.standby import StandbyPool
from cluster.state_file import STATE_FILE, ClusterState, WorkerState, write_state
from cluster.supervision import State, SupervisionLimits
from cluster.weights_service import WeightsService
from contracts.errors import ConfigError
from contracts.ids import Incarnation
from gateway.server import bind
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from cluster.model_source import ModelSource
    from contracts.clock import Clock
    from contracts.config import ClusterConfig, SupervisorConfig

#: Where rpc servers of one machine listen.
LOOPBACK = "127.0.0.1:0"

WORKER_COMMAND = (sys.executable, "-m", "cluster.worker_main")

#: In the runtime folder, unless the configuration names another.
LOG_FOLDER = "logs"


class LocalCluster:
    """Follows the workers: prints progress, keeps the state files current, knows when all is ready."""

    def __init__(
        self,
        agent: NodeAgent,
        state: ClusterState,
        state_files: list[Path],
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._agent = agent
        self._state = state
        self._state_files = state_files
        self._clock = clock
        self._say = say
        self._progress = ProgressLines()
        #: Set once every worker is ready or given up and the ready ones can serve.
        self.ready = asyncio.Event()
        #: Set once the workers that are not given up could not serve; `problem` says why.
        self.hopeless = asyncio.Event()
        self.problem: str | None = None

    def __repr__(self) -> str:
        return f"<LocalCluster at {self.base_url}, {self._agent!r}>"

    @property
    def base_url(self) -> str:
        return self._state.base_url

    @property
    def model_name(self) -> str:
        return self._state.model_name

    @property
    def has_trouble(self) -> bool:
        """Whether somebody will want to read the logs."""
        return any(worker.problem is not None for worker in self._agent.workers())

    def kill(self) -> None:
        self._agent.kill_all()

    async def watch(self) -> None:
        try:
            while True:
                self._follow()
                await self._agent.changed.wait()
                self._agent.changed.clear()
        except Exception as error:
            self.problem = f"a bug in following the workers: {error!r}"
            self.hopeless.set()
            raise

    def _follow(self) -> None:
        workers = self._agent.workers()
        for line in self._progress.update(workers, self._clock.now_s()):
            self._say(line)
        self.problem = why_hopeless(workers)
        if self.problem is not None:
            self.hopeless.set()
        elif settled(workers):
            self.ready.set()
        self._write_state()

    def _write_state(self) -> None:
        workers = tuple(
            WorkerState(
                worker_id=worker.worker_id,
                role=worker.role,
                state=worker.state.value,
                incarnation=worker.incarnation,
                pid=worker.pid,
                address=worker.address,
                problem=worker.problem,
            )
            for worker in self._agent.workers()
            if worker.is_wanted or worker.pid is not None
        )
        # A store that was given up is missed by nobody: what it would have kept is computed.
        ready = all(
            worker.state == State.READY.value or (worker.role == "store" and worker.state == State.GIVEN_UP.value)
            for worker in workers
        )
        self._state = msgspec.structs.replace(self._state, workers=workers, ready=ready)
        for path in self._state_files:
            try:
                write_state(path, self._state)
            except OSError as error:
                self._say(f"cannot write the state file {path}: {error.strerror}")


@asynccontextmanager
async def local_cluster(
    config: ClusterConfig, source: ModelSource, *, state_file: Path | None, say: Callable[[str], None]
) -> AsyncGenerator[LocalCluster]:
    """Starts everything; returns before the workers are ready. Leaving stops everything within a bound.

    Raises ConfigError for what cannot work (port in use, log folder that cannot be made).
    """
    check_servable(config)
    model_name = config.served_model_name or source.name
    settings = gateway_settings(config, source.folder, model_name)
    async with AsyncExitStack() as stack:
        sock = stack.enter_context(contextlib.closing(bind(settings)))
        folder = _RuntimeFolder(say)
        stack.callback(folder.remove)
        runtime_dir = folder.path
        log_dir = log_folder(config, runtime_dir)
        log = ProcessLog(log_dir / "tandem.log", say)
        clock = LiveClock()
        token = secrets.token_urlsafe(32)
        network = GrpcNetwork(token=token, log=_line_writer(log))
        stack.push_async_callback(network.close)
        address = await stack.enter_async_context(
            coordinator_service(config, network, clock, LOOPBACK, _line_writer(log))
        )
        state = ClusterState(
            pid=os.getpid(),
            base_url=base_url(sock),
            model_name=model_name,
            coordinator_address=address,
            cluster_token=token,
            runtime_dir=str(runtime_dir),
            log_dir=str(log_dir),
            ready=False,
            workers=(),
        )
        site = Site(
            model_dir=str(source.folder),
            model_name=model_name,
            coordinator_address=address,
            cluster_token=token,
            runtime_dir=str(runtime_dir),
            bind=LOOPBACK,
            parent_pid=os.getpid(),
            allowed_cores=allowed_cores(),
            node=node_name(config),
        )
        agent, site = make_agent(config, site, log_dir=log_dir, clock=clock, say=say)
        say(starting_line(model_name, [worker.role for worker in agent.workers() if worker.is_wanted]))
        await stack.enter_async_context(agent)
        await stack.enter_async_context(
            agent_service(agent, site, network, LOOPBACK, first_incarnation(clock), _line_writer(log))
        )
        logger = structured(log, say)
        await stack.enter_async_context(gateway_service(settings, source.folder, network, clock, address, sock, logger))
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
    config: ClusterConfig, site: Site, *, log_dir: Path, clock: Clock, say: Callable[[str], None]
) -> tuple[NodeAgent, Site]:
    """The node agent of this machine, and the site that its workers know. Raises ConfigError."""
    weights = make_weights(config, log_dir, clock, say)
    if weights is not None:
        site = replace(site, weights=weights.door)
    agent = NodeAgent(
        worker_plans(config, site),
        limits=supervision_limits(config.supervisor),
        first_incarnation=first_incarnation(clock),
        log_dir=log_dir,
        clock=clock,
        say=say,
        standby=make_standby(config, log_dir, clock, say),
        weights=weights,
    )
    return agent, site


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
    )


def make_standby(config: ClusterConfig, log_dir: Path, clock: Clock, say: Callable[[str], None]) -> StandbyPool | None:
    """None where nobody is to stand by."""
    if config.weights.standby == 0:
        return None
    return StandbyPool(
        config.weights.standby,
        WORKER_COMMAND,
        worker_environ(os.environ, threads=1),
        StandbyLaunch(parent_pid=os.getpid(), device="cpu"),
        ProcessLog(log_dir / "standby.log", say),
        clock,
    )


def host_memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def worker_plans(config: ClusterConfig, site: Site) -> list[WorkerPlan]:
    """What a node agent starts. Raises ConfigError."""
    plans = [
        WorkerPlan(
            launch=launch,
            command=WORKER_COMMAND,
            environ=worker_environ(os.environ, launch.threads),
            pool=pool.name,
            starts=index < pool.initial_workers,
        )
        for launch, (pool, index) in zip(plan_launches(config, site), worker_slots(config), strict=True)
    ]
    store = plan_store(config, site)
    if store is not None:
        command = (sys.executable, "-m", "cluster.store_main")
        plans.append(WorkerPlan(launch=store, command=command, environ=worker_environ(os.environ, threads=1)))
    return plans


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


def _line_writer(log: ProcessLog) -> Callable[[str], None]:
    return lambda line: log.write(line.encode())
