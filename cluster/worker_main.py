"""The worker process: `python -m cluster.worker_main`, started by the node agent with its launch on stdin.

Order matters here: the cores are taken before torch is imported (its threads inherit them), the engine is
loaded before the worker registers (who is registered can be sent requests), and the life-line is watched from
the first moment (a parent killed while weights load must leave nothing behind).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, cast

import uvloop

from cluster.launch import (
    MAX_LAUNCH_BYTES,
    SIGN_OF_LIFE_S,
    Alive,
    Failed,
    Loading,
    Ready,
    Status,
    WorkerLaunch,
    decode_launch,
    encode_line,
)
from cluster.lifeline import settle, wait_for_end_of_file
from contracts.errors import ConfigError, TandemError, WorkerUnavailable
from contracts.messages import WorkerInfo

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from engine.executor import LiveEngine
    from worker import WorkerShell

#: How long a busy thread may keep the interpreter from one that wants it. Every kernel call lets it go, and the
#: engine's thread would wait the default of 5 ms for it to come back whenever the loop is busy.
SWITCH_INTERVAL_S = 0.0005
#: Calls in flight when a worker is told to stop get this long to end.
STOP_GRACE_S = 1.0
#: When a worker's life is over, the kernel gets this long to take its last words.
EXIT_DELAY_S = 0.2
#: Exit status of such a worker.
EXIT_LIFE_OVER = 3


def log(line: str) -> None:
    """One line to stderr, which the node agent collects. A full disk or a gone reader ends no worker."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def tell(status: Status) -> None:
    """One status line to the node agent. When it does not read any more, the life-line says so too."""
    with contextlib.suppress(OSError):
        sys.stdout.buffer.write(encode_line(status))
        sys.stdout.buffer.flush()


def tell_if_room(status: Status) -> None:
    """As `tell`, but never waits: a status that nobody takes is dropped. For a running event loop."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    if any(events & select.POLLOUT for _, events in poll.poll(0)):
        tell(status)


def main() -> int:
    launch: WorkerLaunch | None = None
    try:
        launch = decode_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        settle(launch)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        uvloop.run(_live(launch))
    except TandemError as error:
        tell(Failed(error=error.code, message=error.message))
        log(f"{launch.worker_id if launch else 'worker'}: {error.message}")
        return 1
    return 0


async def _live(launch: WorkerLaunch) -> None:
    """Serves until the parent goes away or asks it to stop."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signal_number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signal_number, stop.set)
    serving = asyncio.create_task(_serve(launch), name="serve")
    enders = [
        asyncio.create_task(stop.wait(), name="stop-signal"),
        asyncio.create_task(wait_for_end_of_file(sys.stdin.fileno()), name="life-line"),
    ]
    await asyncio.wait([serving, *enders], return_when=asyncio.FIRST_COMPLETED)
    for task in (serving, *enders):
        task.cancel()
    await asyncio.wait([serving, *enders])
    if not serving.cancelled() and (error := serving.exception()) is not None:
        raise _single(error)


def _single(error: BaseException) -> BaseException:
    """The first error of a group: a worker ends with one reason."""
    if isinstance(error, BaseExceptionGroup):
        group = cast("BaseExceptionGroup[BaseException]", error)
        return _single(group.exceptions[0])
    return error


async def _serve(launch: WorkerLaunch) -> None:
    # torch comes in with these: imported here, after the cores are taken.
    from cluster.transports import TransportSite, build_transports
    from engine.compose import StepBudget
    from kvtransfer import HostPool
    from prefill import PrefillLimits
    from prefill.ordering import QueueRules
    from rpc import GrpcNetwork, LiveClock
    from worker import WorkerLimits, WorkerShell

    clock = LiveClock()
    tell(Loading(what="torch"))
    async with contextlib.AsyncExitStack() as stack:
        pools: list[HostPool] = []

        def make_pool(num_blocks: int, block_bytes: int) -> memoryview:
            pools.append(HostPool(num_blocks, block_bytes))
            return pools[0].view()

        engine = await _load(launch, make_pool, clock)
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
            log=log,
        )
        shell.register_on(server)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_run(shell, clock), name="shell")
            await shell.registered.wait()
            tell(Ready(address=info.address))
            if launch.parent_pid is not None:
                tasks.create_task(_tell_alive(clock), name="signs-of-life")
            log(f"{info.worker_id}: ready at {info.address}, {info.total_blocks} blocks, {info.device}")


async def _tell_alive(clock: Clock) -> None:
    """From the event loop: a loop that is stuck tells nothing, and the node agent ends it."""
    while True:
        await clock.sleep(SIGN_OF_LIFE_S)
        tell_if_room(Alive())


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
    )


async def _load(launch: WorkerLaunch, make_pool: Callable[[int, int], memoryview], clock: Clock) -> LiveEngine:
    """The model in memory, its KV pool in memory that `make_pool` provides."""
    from engine.executor import load_engine
    from engine.runner import EngineOptions

    device = _device(launch)
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
    )


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
