"""Measures every transport on this machine, without a cluster: two pools in one process, one pulls from the other."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

from cluster.transports import TransportSite, available_names, build_transports, has_nixl, link_class
from contracts.errors import TandemError
from contracts.ids import Incarnation, WorkerId
from kvtransfer import HostPool, Ledger, Prober
from kvtransfer.links import Measured, shortfall
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cluster.launch import TransferOptions
    from cluster.transports import TransportName
    from kvtransfer import Transport

NUM_BLOCKS = 1024
BLOCK_BYTES = 64 * 1024

#: Stops of the rpc servers get this long.
STOP_GRACE_S = 0.2


async def measure_transports(options: TransferOptions) -> list[tuple[Measured, str | None]]:
    """Each transport, with why its figures are not acceptable (None: they are). Raises nothing of a transport's."""
    return [await _measure(name, options) for name in available_names()]


async def _measure(name: TransportName, options: TransferOptions) -> tuple[Measured, str | None]:
    if name == "ucx" and not has_nixl():
        return Measured(transport=name, problem="not installed: pip install 'tandem-serve[ucx]'"), None
    try:
        async with (
            _side(name, "doctor-holder", options) as (holder, _),
            _side(name, "doctor-reader", options) as (
                reader,
                ledger,
            ),
        ):
            prober = Prober(ledger, LiveClock(), block_bytes=BLOCK_BYTES, on_settled=lambda: None)
            measured = await prober.measure(reader, holder.endpoint(), NUM_BLOCKS)
            await prober.close()
    except TandemError as error:
        measured = Measured(transport=name, problem=error.message)
    return measured, shortfall(measured, link_class(name, options))


@contextlib.asynccontextmanager
async def _side(name: TransportName, who: str, options: TransferOptions) -> AsyncGenerator[tuple[Transport, Ledger]]:
    """One process's side of a transport, over a pool of its own."""
    async with contextlib.AsyncExitStack() as stack:
        network = GrpcNetwork(token="doctor")
        stack.push_async_callback(network.close)
        server = network.server("127.0.0.1:0")
        address = await server.start()
        stack.push_async_callback(server.stop, STOP_GRACE_S)
        pool = HostPool(NUM_BLOCKS, BLOCK_BYTES)
        stack.callback(pool.close)
        # Pages exist once touched; without them the first pull measures the kernel.
        pool.view()[:] = bytes(len(pool.view()))
        transports = build_transports(
            name,
            TransportSite(
                worker_id=WorkerId(who),
                incarnation=Incarnation(1),
                clock=LiveClock(),
                network=network,
                server=server,
                address=address,
                options=options,
            ),
        )
        stack.push_async_callback(transports.close)
        transports.register(pool)
        yield transports.get(name), Ledger(NUM_BLOCKS)
