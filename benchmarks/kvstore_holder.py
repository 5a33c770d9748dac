"""The store's process of `benchmarks.kvstore`: `python -m benchmarks.kvstore_holder`, orders on its standard input.

A `StoreShell` as the node agent starts it, over shared memory and real gRPC, without a disk or with one. Each order is
a line of JSON and is answered with a line that begins with `MARK`. It ends when the input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import cProfile
import io
import json
import os
import pstats
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.kvstore_blocks import BLOCK_BYTES, IDENTITY
from benchmarks.kvtransfer_holder import MARK
from cluster.child_main import SWITCH_INTERVAL_S
from contracts.ids import Incarnation, WorkerId
from contracts.messages import (
    BLOCK_EVENTS,
    DEREGISTER,
    HEARTBEAT,
    MEMBERS,
    REGISTER,
    BlockEventsReply,
    Empty,
    HeartbeatReply,
    MembersReply,
    RegisterReply,
    WorkerInfo,
)
from kvstore.tiers.eviction import dram_eviction
from kvstore.tiers.ssd_disk import open_disk
from kvtransfer import HostPool, ShmTransport, TransportSet
from rpc import GrpcNetwork, LiveClock
from worker.store_shell import StoreShell, StoreShellLimits

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from contracts.messages import BlockEvents
    from rpc import CallContext, Server

#: Lines of a profile that are printed.
PROFILE_LINES = 32


def register_coordinator(server: Server) -> None:
    """One that takes up whoever comes, and knows nobody."""

    async def register(ask: WorkerInfo, context: CallContext) -> RegisterReply:
        return RegisterReply(heartbeat_interval_s=1.0)

    async def beat(ask: object, context: CallContext) -> HeartbeatReply:
        return HeartbeatReply(known=True)

    async def events(ask: BlockEvents, context: CallContext) -> BlockEventsReply:
        return BlockEventsReply(expected=ask.start + len(ask.stored))

    async def leave(ask: object, context: CallContext) -> Empty:
        return Empty()

    async def members(ask: Empty, context: CallContext) -> MembersReply:
        return MembersReply(members=())

    server.register(REGISTER, register)
    server.register(HEARTBEAT, beat)
    server.register(BLOCK_EVENTS, events)
    server.register(DEREGISTER, leave)
    server.register(MEMBERS, members)


class Store:
    """One store, and the orders that it takes beside its calls."""

    def __init__(self, shell: StoreShell, info: WorkerInfo, pool: HostPool) -> None:
        self._shell = shell
        self._info = info
        self._pool = pool
        self._profile: cProfile.Profile | None = None

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        match order["do"]:
            case "describe":
                info = self._info
                peer = {"worker_id": info.worker_id, "incarnation": info.incarnation, "address": info.address}
                return peer | {"pid": os.getpid(), "descriptor": self._pool.read_only}
            case "blocks":
                return {"blocks": [self._shell.ledger.lookup(bytes.fromhex(key)) for key in order["keys"]]}
            case "forget":
                return {"num_blocks": self._shell.dram.clear(with_pinned=True)}
            case "look":
                return {"is_idle": self._shell.machine.idle}
            case "profile":
                self._profile = cProfile.Profile()
                self._profile.enable()
                return {}
            case "profiled":
                return {"text": self._end_of_profile()}
            case other:
                raise ValueError(f"unknown order {other!r}")

    def _end_of_profile(self) -> str:
        profile, self._profile = self._profile, None
        if profile is None:
            raise ValueError("nothing is being profiled")
        profile.disable()
        text = io.StringIO()
        pstats.Stats(profile, stream=text).strip_dirs().sort_stats("tottime").print_stats(PROFILE_LINES)
        return text.getvalue()


@contextlib.asynccontextmanager
async def opened(num_blocks: int, folder: Path | None) -> AsyncGenerator[Store]:
    clock = LiveClock()
    async with contextlib.AsyncExitStack() as stack:
        network = GrpcNetwork(token="benchmark")
        stack.push_async_callback(network.close)
        pool = HostPool(num_blocks, BLOCK_BYTES)
        stack.callback(pool.close)
        # As that of a store which was full before.
        np.frombuffer(pool.view(), np.uint8)[:] = 1
        server = network.server("127.0.0.1:0")
        stack.push_async_callback(server.stop, 0.0)
        register_coordinator(server)
        address = await server.start()
        info = WorkerInfo(
            worker_id=WorkerId("store-0"),
            incarnation=Incarnation(os.getpid()),
            role="store",
            address=address,
            model="benchmark",
            identity=IDENTITY,
            total_blocks=num_blocks,
            max_context_tokens=0,
        )
        transports = TransportSet((ShmTransport(clock=clock, incarnation=info.incarnation),))
        stack.push_async_callback(transports.close)
        transports.register(pool)
        disk = None
        if folder is not None:
            disk = await open_disk(
                folder, IDENTITY, pool, size_bytes=4 * num_blocks * BLOCK_BYTES, codec="raw", direct=True,
                clock=clock, thread_time_s=time.thread_time, log=_complain,
            )  # fmt: skip
            stack.push_async_callback(disk.close)
        shell = StoreShell(
            info=info,
            transports=transports,
            network=network,
            clock=clock,
            coordinator_address=address,
            eviction=dram_eviction("cost_aware", num_blocks),
            disk=disk,
            limits=StoreShellLimits(probe=False),
            pool=pool,
            log=_complain,
        )
        shell.register_on(server)
        running = asyncio.create_task(shell.run())
        stack.push_async_callback(_stopped, running)
        await shell.registered.wait()
        yield Store(shell, info, pool)


async def _stopped(task: asyncio.Task[None]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def _complain(line: str) -> None:
    print(f"store: {line}", file=sys.stderr, flush=True)


async def serve(num_blocks: int, folder: Path | None) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader(limit=1 << 26)
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with opened(num_blocks, folder) as store:
        while line := await reader.readline():
            answer = await store.obey(json.loads(line))
            sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    uvloop.run(serve(int(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
