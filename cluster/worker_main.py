"""The worker process: `python -m cluster.worker_main`, started by the node agent with its launch on stdin.

Order matters here: the cores are taken before torch is imported (its threads inherit them), the engine is
loaded before the worker registers (who is registered can be sent requests), and the life-line is watched from
the first moment (a parent killed while weights load must leave nothing behind).
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.build import build_name
from cluster.child_main import log, run_child, stand_by, tell, tell_alive, tell_if_room
from cluster.launch import Failed, Loading, Ready, Serves, WorkerLaunch, decode_launch
from cluster.standby import STANDBY_FLAG
from cluster.telling import ComingTeller, Teller
from cluster.template_process import TEMPLATE_FLAG, be_template
from cluster.weights_service import key_of
from coldstart.format import decode_index, is_converted
from coldstart.handing import ask
from coldstart.residence import LONGEST_WAIT_S, PATIENCE_S
from contracts.errors import ConfigError, LoadError, WorkerUnavailable
from contracts.messages import WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.child_main import Departure
    from coldstart.handing import HandedWeights
    from contracts.clock import Clock
    from engine.canary import Canary
    from engine.executor import LiveEngine
    from engine.weights import FusedWeights
    from worker import WorkerShell
    from worker.snapshots import WorkerSnapshots

#: Calls in flight when a worker is told to stop get this long to end.
STOP_GRACE_S = 1.0
#: Told to end by somebody else than its node agent, a worker drains for so long: it is gone within 10 s.
DRAIN_S = 7.0
#: The node agent gives up earlier.
WEIGHTS_TIMEOUT_S = PATIENCE_S + 20.0
LONGEST_WEIGHTS_WAIT_S = LONGEST_WAIT_S + 20.0
#: When a worker's life is over, the kernel gets this long to take its last words.
EXIT_DELAY_S = 0.2
#: Exit status of such a worker.
EXIT_LIFE_OVER = 3


#: What a start imports late, after its cores are taken.
WARM_MODULES = (
    "cluster.transports",
    "coldstart.loaded",
    "engine.compose",
    "engine.executor",
    "kvtransfer",
    "kvtransfer.collective",
    "prefill.ordering",
    "rpc.grpc_network",
    "worker.retiring",
)


def main() -> int:
    if TEMPLATE_FLAG in sys.argv[1:] and not be_template(_warm_up):
        return 0
    if STANDBY_FLAG in sys.argv[1:] and not stand_by(_warm_up):
        return 0
    return run_child("worker", decode_launch, _serve)


def _warm_up(device: str) -> None:
    """All that the start of any worker costs, whatever its model."""
    from cluster import transports
    from engine.ops import select_ops

    for module in WARM_MODULES:
        importlib.import_module(module)
    transports.warm_up()
    select_ops("cuda" if device == "cuda" else "cpu", log=log)


async def _serve(launch: WorkerLaunch, departure: Departure) -> None:
    # Asked for first: they come while this process imports what it needs.
    asking = None if launch.weights is None else asyncio.get_running_loop().run_in_executor(None, _ask, launch)
    # torch comes in with these: imported here, after the cores are taken.
    from cluster.transports import TransportSite, build_transports
    from engine.compose import StepBudget
    from kvtransfer import HostPool
    from prefill import PrefillLimits
    from prefill.ordering import QueueRules
    from rpc import GrpcNetwork, LiveClock
    from worker import WorkerLimits, WorkerShell
    from worker.retiring import retire

    clock = LiveClock()
    tell(Loading(what="torch"))
    async with contextlib.AsyncExitStack() as stack:
        # Read while the weights come.
        snapshots = _snapshots(launch, clock)
        if snapshots is not None:
            stack.callback(snapshots.close)
        pools: list[HostPool] = []

        def make_pool(num_blocks: int, block_bytes: int) -> memoryview:
            pools.append(HostPool(num_blocks, block_bytes))
            return pools[0].view()

        waits_since_s = clock.now_s()
        handed = None if asking is None else await asking
        weights_s = clock.now_s()
        if handed is not None:
            stack.callback(handed.close)
        engine = await _load(launch, make_pool, clock, handed)
        stack.callback(pools[0].close)
        pools[0].populate()
        stack.push_async_callback(engine.close)
        network = GrpcNetwork(token=launch.cluster_token, log=log)
        stack.push_async_callback(network.close)
        server = network.server(launch.bind)
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        info = _info(launch, engine, await server.start())
        transports = build_transports(
            launch.transport,
            TransportSite(
                worker_id=info.worker_id,
                incarnation=info.incarnation,
                clock=clock,
                network=network,
                server=server,
                address=info.address,
                options=launch.transfer,
            ),
        )
        stack.push_async_callback(transports.close)
        for failure in transports.register(pools[0], needed=launch.transport != "auto"):
            log(f"{info.worker_id}: a transport is left out: {failure.message}")
        queue = launch.queue
        shell = WorkerShell(
            info=info,
            engine=engine,
            transports=transports,
            network=network,
            clock=clock,
            coordinator_address=launch.coordinator_address,
            limits=WorkerLimits(
                budget=StepBudget(
                    max_tokens=launch.max_batch_tokens,
                    max_sequences=launch.max_sequences,
                    saturation_tokens=queue.saturation_tokens,
                ),
                prefill=PrefillLimits(
                    queue=QueueRules(
                        order=queue.order,
                        ageing_s=queue.ageing_s,
                        fair=queue.fair,
                        tenant_weights=queue.tenant_weights,
                    )
                ),
                tpot_chunks=queue.tpot_chunks,
                lease_ttl_s=launch.transfer.lease_ttl_s,
                probe=launch.transfer.probe,
                prefix_cache=launch.prefix_cache,
            ),
            pool=pools[0],
            checksum=launch.transfer.checksum,
            on_role=lambda role: tell_if_room(Serves(role=role)),
            log=log,
        )
        shell.register_on(server)
        if snapshots is not None:
            await stack.enter_async_context(
                snapshots.serve(
                    shell,
                    shell.loop.latency,
                    pools[0].view(),
                    identity=info.identity,
                    machine=f"{launch.node}: {engine.description}",
                    max_batch_tokens=launch.max_batch_tokens,
                )
            )
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_run(shell, clock), name="shell")
            await shell.registered.wait()
            departure.prepare = partial(
                retire,
                shell.standing,
                reason="it was told to end",
                within_s=DRAIN_S,
                network=network,
                coordinator_address=launch.coordinator_address,
                clock=clock,
                log=log,
            )
            tell(
                Ready(
                    address=info.address,
                    weights_wait_s=None if handed is None else weights_s - waits_since_s,
                    after_weights_s=clock.now_s() - weights_s,
                )
            )
            if launch.parent_pid is not None:
                tasks.create_task(tell_alive(clock), name="signs-of-life")
            log(f"{info.worker_id}: ready at {info.address}, {info.total_blocks} blocks, {info.device}")


async def _run(shell: WorkerShell, clock: Clock) -> None:
    """As `shell.run`; ends the process when the shell finds that this life is over."""
    reason = await shell.live()
    tell(Failed(error=WorkerUnavailable.code, message=reason))
    log(f"this life is over: {reason}")
    await clock.sleep(EXIT_DELAY_S)
    # A stuck engine can be neither closed nor joined, a stuck transfer not awaited: nothing is tidied up. What this
    # process holds ends with it, and the node agent starts the next life.
    os._exit(EXIT_LIFE_OVER)


def _info(launch: WorkerLaunch, engine: LiveEngine, address: str) -> WorkerInfo:
    from prefill import PrefillLimits

    return WorkerInfo(
        worker_id=launch.worker_id,
        incarnation=launch.incarnation,
        role=launch.role,
        address=address,
        model=launch.model_name,
        identity=engine.identity,
        total_blocks=engine.num_blocks,
        max_context_tokens=engine.max_context_tokens,
        max_batch_tokens=launch.max_batch_tokens,
        max_sequences=launch.max_sequences,
        handoff_blocks=PrefillLimits().handoff_blocks(engine.num_blocks),
        pid=os.getpid(),
        device=engine.description,
        node=launch.node,
        build=build_name(),
    )


def _snapshots(launch: WorkerLaunch, clock: Clock) -> WorkerSnapshots | None:
    """What earlier lives warmed up; begins to read it."""
    if launch.snapshot is None:
        return None
    from coldstart.snapshot.folder import SnapshotFolder
    from worker.snapshots import WorkerSnapshots

    return WorkerSnapshots(
        SnapshotFolder(Path(launch.snapshot.folder), launch.snapshot.size_bytes),
        model=(launch.model_dir, launch.dtype, str(launch.block_tokens)),
        worker_id=launch.worker_id,
        build=build_name(),
        clock=clock,
        log=log,
    )


def _ask(launch: WorkerLaunch) -> HandedWeights | None:
    """Blocks until the node agent hands out the weights; None where it cannot: they are then read as if it were not
    there. The connection is kept by the weights, and these by the engine."""
    key, door = key_of(launch), launch.weights
    assert key is not None
    assert door is not None
    try:
        return ask(door, key, timeout_s=WEIGHTS_TIMEOUT_S, progress=ComingTeller(LONGEST_WEIGHTS_WAIT_S))
    except LoadError as error:
        log(f"{launch.worker_id}: reads the weights itself: {error.message}")
        return None


def _weights(launch: WorkerLaunch, handed: HandedWeights | None) -> FusedWeights | None:
    """None: a model folder is read as it is. Raises ConfigError, LoadError."""
    from cluster.remote_model import fetch_far
    from coldstart.far import read_far
    from coldstart.loaded import LoadedWeights, check_fits, load_checkpoint

    folder = Path(launch.model_dir)
    if handed is not None:
        index = decode_index(handed.index, where=f"the weights of {folder} in memory")
        check_fits(folder, index)
        return LoadedWeights(handed.weights, index)
    far = read_far(folder)
    if far is not None:
        with fetch_far(far, log) as entry:
            return load_checkpoint(entry.path)
    return load_checkpoint(folder) if is_converted(folder) else None


async def _load(
    launch: WorkerLaunch, make_pool: Callable[[int, int], memoryview], clock: Clock, handed: HandedWeights | None
) -> LiveEngine:
    """The model in memory, its KV pool in memory that `make_pool` provides. `handed`: its weights, where they are there
    already."""
    from engine.executor import load_engine
    from engine.runner import EngineOptions

    device = _device(launch)
    weights = await asyncio.to_thread(_weights, launch, handed)
    options = EngineOptions(
        dtype=launch.dtype,
        device=device,
        block_tokens=launch.block_tokens,
        kv_memory_bytes=launch.kv_memory_bytes if launch.num_blocks is None else None,
        num_blocks=launch.num_blocks,
        max_model_len=launch.max_model_len,
    )
    return await load_engine(
        Path(launch.model_dir),
        options,
        clock=clock,
        num_threads=launch.threads,
        pool_buffer_factory=make_pool,
        progress=lambda done, total: tell(Loading(what="weights", fraction=done / max(1, total))),
        log=log,
        weights=weights,
        # Of weights that come from elsewhere it lies with them.
        canary=await asyncio.to_thread(_canary, launch) if weights is None else None,
    )


def _canary(launch: WorkerLaunch) -> Canary | None:
    """Of an original that this process reads itself: it is read twice, by two ways."""
    from coldstart.canary_run import canary_of

    return canary_of(Path(launch.model_dir), progress=partial(Teller(), "canary"))


def _device(launch: WorkerLaunch) -> str:
    """ "auto" is the CPU as long as the only transport moves KV between pools in host memory."""
    if launch.device == "cuda":
        raise ConfigError(
            f"{launch.worker_id}: transport {launch.transport} moves KV between pools in host memory; "
            "device cuda needs a transport for device memory"
        )
    return "cpu"


if __name__ == "__main__":
    sys.exit(main())
