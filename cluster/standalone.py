"""Each process of a cluster started alone: for several machines, and for tests that end just one of them."""

from __future__ import annotations

import gc
import os
import sys
from contextlib import AsyncExitStack, closing
from typing import TYPE_CHECKING, NoReturn

import msgspec
import uvloop

from cluster.agent_service import agent_service
from cluster.launch import MAX_LAUNCH_BYTES, encode_line
from cluster.local import allowed_cores, first_incarnation, log_folder, make_agent
from cluster.model_source import resolve_model
from cluster.parent_log import structured
from cluster.plan import Site, node_name, plan_launches, worker_environ
from cluster.process_log import StreamLog
from cluster.progress import ProgressLines
from cluster.serve import EXIT_LOST, EXIT_OK, StopSignals, first_of, say
from cluster.services import (
    FrontedModel,
    base_url,
    check_servable,
    coordinator_service,
    gateway_service,
    gateway_settings,
)
from cluster.supervision import State
from contracts.errors import ConfigError
from gateway.server import bind
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    import asyncio
    from pathlib import Path

    from cluster.node_agent import NodeAgent
    from contracts.clock import Clock
    from contracts.config import ClusterConfig

_OBJECTS_BETWEEN_COLLECTIONS = 50_000


def run_coordinator(config: ClusterConfig, bind: str, token: str) -> int:
    """Serves until a signal. Raises ConfigError when it cannot listen."""

    async def live() -> int:
        with StopSignals() as signals:
            network = GrpcNetwork(token=token, log=say)
            async with coordinator_service(config, network, LiveClock(), bind, say) as address:
                _collect_garbage_rarely()
                say(f"coordinator at {address}")
                await signals.wanted.wait()
            await network.close()
        return EXIT_OK

    return uvloop.run(live())


def _collect_garbage_rarely() -> None:
    """Decisions make many small objects and no cycles: looking for those takes some hundredths of their time. What is
    here by now stays."""
    gc.freeze()
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS, 20, 50)


def run_gateway(config: ClusterConfig, coordinator_address: str, token: str) -> int:
    """Serves until a signal. Raises ConfigError when the port is taken or the model has no tokenizer."""
    # Of what lies in an object store it needs only what is small.
    source = resolve_model(config.model, say, dtype=config.dtype, tier=config.weights.ssd, stream=True)
    settings = gateway_settings(config, source.folder, config.served_model_name or source.name)
    model = FrontedModel(settings=settings, folder=source.folder, coordinator_address=coordinator_address)

    async def live() -> int:
        async with AsyncExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            sock = stack.enter_context(closing(bind(settings)))
            network = GrpcNetwork(token=token, log=say)
            stack.push_async_callback(network.close)
            logger = structured(StreamLog(sys.stderr), say)
            await stack.enter_async_context(gateway_service([model], network, LiveClock(), sock, logger))
            say(f"gateway at {base_url(sock)}")
            await signals.wanted.wait()
        return EXIT_OK

    return uvloop.run(live())


def run_agent(config: ClusterConfig, coordinator_address: str, token: str, runtime_dir: Path, bind: str) -> int:
    """Keeps the workers of this machine running until a signal, or until the last one is given up.

    Its workers end with it, however it ends; coordinator and gateways go on without them, and the workers of the
    agent's next life take their places. Raises ConfigError.
    """
    site = _site(config, coordinator_address, token, runtime_dir, bind, parent_pid=os.getpid())

    async def live() -> int:
        clock = LiveClock()
        log_dir = log_folder(config, runtime_dir)
        agent, _ = make_agent(config, [(config, site)], log_dir=log_dir, clock=clock, say=say)
        network = GrpcNetwork(token=token, log=say)
        async with AsyncExitStack() as stack:
            signals = stack.enter_context(StopSignals())
            stack.push_async_callback(network.close)
            await stack.enter_async_context(agent)
            signals.install(agent.kill_all)
            own_bind = f"{bind.rpartition(':')[0]}:0"
            await stack.enter_async_context(
                agent_service(
                    agent,
                    site,
                    network,
                    own_bind,
                    first_incarnation(clock),
                    say,
                    workers_memory_bytes=config.workers_memory,
                )
            )
            return await _keep(agent, signals.wanted, clock)

    return uvloop.run(live())


async def _keep(agent: NodeAgent, stop_wanted: asyncio.Event, clock: Clock) -> int:
    progress = ProgressLines()
    while not stop_wanted.is_set():
        agent.changed.clear()
        workers = agent.workers()
        for line in progress.update(workers, clock.now_s()):
            say(line)
        if all(worker.state is State.GIVEN_UP for worker in workers if worker.is_wanted) and any(
            worker.is_wanted for worker in workers
        ):
            print("tandem: every worker was given up", file=sys.stderr, flush=True)
            return EXIT_LOST
        await first_of(stop_wanted, agent.changed)
    return EXIT_OK


def _site(
    config: ClusterConfig, coordinator_address: str, token: str, runtime_dir: Path, bind: str, parent_pid: int | None
) -> Site:
    check_servable(config)
    stream = config.weights.dram is not None
    source = resolve_model(config.model, say, dtype=config.dtype, tier=config.weights.ssd, stream=stream)
    runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    return Site(
        model_dir=str(source.folder),
        model_name=config.served_model_name or source.name,
        coordinator_address=coordinator_address,
        cluster_token=token,
        runtime_dir=str(runtime_dir.resolve()),
        bind=bind,
        parent_pid=parent_pid,
        allowed_cores=allowed_cores(),
        node=node_name(config),
    )


def become_worker(
    config: ClusterConfig, coordinator_address: str, token: str, worker_id: str, runtime_dir: Path, bind: str
) -> NoReturn:
    """Replaces this process by the worker. Raises ConfigError for an unknown worker id."""
    site = _site(config, coordinator_address, token, runtime_dir, bind, parent_pid=None)
    launches = {launch.worker_id: launch for launch in plan_launches(config, site)}
    launch = next((launch for name, launch in launches.items() if name == worker_id), None)
    if launch is None:
        raise ConfigError(f"there is no worker {worker_id!r}; the configuration has {', '.join(launches)}")
    launch = msgspec.structs.replace(launch, incarnation=first_incarnation(LiveClock()))
    _put_on_stdin(encode_line(launch))
    environ = worker_environ(os.environ, launch.threads)
    os.execve(sys.executable, [sys.executable, "-m", "cluster.worker_main"], environ)


def _put_on_stdin(line: bytes) -> None:
    """The write end stays open in this very process: without a parent, nobody cuts the life-line."""
    if len(line) > MAX_LAUNCH_BYTES:
        raise ConfigError(f"the launch document is {len(line)} bytes long; {MAX_LAUNCH_BYTES} fit")
    read_end, write_end = os.pipe()
    os.write(write_end, line)
    os.set_inheritable(write_end, True)
    os.dup2(read_end, 0)
    os.close(read_end)
