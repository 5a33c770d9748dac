"""The store process of a machine: `python -m cluster.store_main`, started by the node agent with its launch on stdin.

Which KV it keeps follows from the workers: it waits for the first one that serves its model, and takes over what that
says its blocks are. Nothing here needs torch.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.build import build_name
from cluster.child_main import log, run_child, tell, tell_alive, tell_if_room
from cluster.launch import Loading, Ready, StoreLaunch, decode_store_launch
from cluster.transports import TransportSite, build_transports
from contracts.errors import ConfigError, TandemError, WorkerUnavailable
from contracts.messages import MEMBERS, Empty, WorkerInfo
from kvstore.tiers.eviction import dram_eviction
from kvstore.tiers.ssd_disk import open_disk
from kvtransfer import HostPool
from rpc import GrpcNetwork, LiveClock
from worker.store_shell import StoreShell, StoreShellLimits

if TYPE_CHECKING:
    from cluster.child_main import Departure
    from contracts.clock import Clock
    from contracts.layout import KvIdentity
    from rpc import Network

STOP_GRACE_S = 1.0
#: Between two looks for a worker to learn from.
LOOK_INTERVAL_S = 0.25
ASK_TIMEOUT_S = 1.0


def main() -> int:
    return run_child("store", decode_store_launch, _serve)


async def _serve(launch: StoreLaunch, departure: Departure) -> None:
    """`departure`: a store that goes is missed by nobody, there is nothing to prepare."""
    clock = LiveClock()
    async with contextlib.AsyncExitStack() as stack:
        network = GrpcNetwork(token=launch.cluster_token, log=log)
        stack.push_async_callback(network.close)
        identity = await _learn_identity(launch, network, clock)
        block_bytes = identity.layout.block_bytes
        num_blocks = launch.dram_bytes // block_bytes
        if num_blocks < 1:
            raise ConfigError(f"store.dram = {launch.dram_bytes} bytes holds no block of {block_bytes} bytes")
        pool = HostPool(num_blocks, block_bytes)
        stack.callback(pool.close)
        server = network.server(launch.bind)
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        info = WorkerInfo(
            worker_id=launch.worker_id,
            incarnation=launch.incarnation,
            role="store",
            address=await server.start(),
            model=launch.model_name,
            identity=identity,
            total_blocks=num_blocks,
            max_context_tokens=0,
            pid=os.getpid(),
            device="host memory" if launch.ssd is None else f"host memory, disk at {launch.ssd.path}",
            node=launch.node,
            build=build_name(),
        )
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
        for failure in transports.register(pool, needed=launch.transport != "auto"):
            log(f"{info.worker_id}: a transport is left out: {failure.message}")
        disk = None
        if launch.ssd is not None:
            tell(Loading(what="disk tier"))
            disk = await open_disk(
                Path(launch.ssd.path),
                identity,
                pool,
                size_bytes=launch.ssd.size_bytes,
                codec=launch.ssd.codec,
                direct=launch.ssd.direct,
                clock=clock,
                thread_time_s=time.thread_time,
                log=lambda line: log(f"{info.worker_id}: {line}"),
            )
            stack.push_async_callback(disk.close)
        shell = StoreShell(
            info=info,
            transports=transports,
            network=network,
            clock=clock,
            coordinator_address=launch.coordinator_address,
            eviction=dram_eviction(launch.policy, num_blocks),
            disk=disk,
            limits=StoreShellLimits(lease_ttl_s=launch.transfer.lease_ttl_s, probe=launch.transfer.probe),
            pool=pool,
            checksum=launch.transfer.checksum,
            log=log,
        )
        if disk is not None:
            disk.on_lost, disk.on_found = shell.disk_lost, shell.disk_found
        shell.register_on(server)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_run(shell), name="shell")
            await shell.registered.wait()
            tell(Ready(address=info.address))
            if launch.parent_pid is not None:
                tasks.create_task(tell_alive(clock), name="signs-of-life")
            held = "" if disk is None else f", {disk.num_blocks} blocks on disk"
            log(f"{info.worker_id}: ready at {info.address}, room for {num_blocks} blocks in memory{held}")


async def _run(shell: StoreShell) -> None:
    """Ends the process when this life is over: the node agent starts the next one."""
    raise WorkerUnavailable(f"this life is over: {await shell.live()}")


async def _learn_identity(launch: StoreLaunch, network: Network, clock: Clock) -> KvIdentity:
    """What a worker of the same model says its KV is; waits for one."""
    channel = network.channel(launch.coordinator_address)
    while True:
        with contextlib.suppress(TandemError):
            members = (await channel.call(MEMBERS, Empty(), timeout_s=ASK_TIMEOUT_S)).members
            infos = [member.info for member in members]
            found = next((each for each in infos if each.role != "store" and each.model == launch.model_name), None)
            if found is not None:
                return found.identity
        tell_if_room(Loading(what="a worker, to have its KV layout", is_waiting=True))
        await clock.sleep(LOOK_INTERVAL_S)


if __name__ == "__main__":
    sys.exit(main())
