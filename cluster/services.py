"""The services that run inside a `tandem` process: coordinator, gateway. Each an async context manager.

This is where the rooms meet: it makes the live network, clock and sockets, and hands them down.
"""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING

from contracts.ids import GatewayId
from coordinator import CoordinatorShell
from coordinator.membership import MembershipLimits
from engine.model_config import load_model_config
from gateway.core import GatewayCore
from gateway.limits import GatewayLimits
from gateway.server import create_app, serve
from gateway.settings import GatewaySettings
from gateway.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import socket
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from structlog.typing import FilteringBoundLogger

    from contracts.clock import Clock
    from contracts.config import ClusterConfig
    from rpc import Network

#: Open calls of a stopping coordinator get this long.
COORDINATOR_GRACE_S = 0.5


@asynccontextmanager
async def coordinator_service(
    config: ClusterConfig, network: Network, clock: Clock, bind: str, log: Callable[[str], None]
) -> AsyncGenerator[str]:
    """Yields the address that it listens on."""
    limits = MembershipLimits(
        heartbeat_interval_s=config.coordinator.heartbeat_interval_s,
        heartbeat_timeout_s=config.coordinator.dead_after_s,
    )
    shell = CoordinatorShell(clock, membership=limits, log=log)
    server = network.server(bind)
    shell.register_on(server)
    async with shell:
        try:
            yield await server.start()
        finally:
            await server.stop(COORDINATOR_GRACE_S)


def gateway_settings(config: ClusterConfig, folder: Path, model_name: str) -> GatewaySettings:
    """Raises ConfigError for settings that cannot work and for a model that cannot be served."""
    gateway = config.gateway
    longest = load_model_config(folder).max_position_embeddings
    return GatewaySettings(
        served_model_names=(model_name,),
        max_model_len=min(config.max_model_len or longest, longest),
        host=gateway.host,
        port=gateway.port,
        api_keys=tuple(key.get_secret_value() for key in gateway.api_keys),
        allow_unauthenticated=gateway.allow_unauthenticated,
        strict_fields=gateway.strict_fields,
        max_body_bytes=gateway.max_body,
        request_timeout_s=gateway.request_timeout_s,
        max_replays=gateway.max_replays,
        graceful_stop_s=gateway.graceful_stop_s,
        max_heartbeat_age_s=config.coordinator.dead_after_s,
        version=version("tandem-serve"),
    )


@asynccontextmanager
async def gateway_service(
    settings: GatewaySettings,
    folder: Path,
    network: Network,
    clock: Clock,
    coordinator_address: str,
    sock: socket.socket,
    log: FilteringBoundLogger,
) -> AsyncGenerator[None]:
    """Answers on `sock`. Leaving lets open requests end for `graceful_stop_s`."""
    tokenizer = TextTokenizer.load(folder, wall_s=clock.wall_s)
    gateway_id = GatewayId(f"gateway-{os.getpid()}-{int(clock.wall_s() * 1000)}")
    limits = GatewayLimits(max_replays=settings.max_replays)
    async with GatewayCore(network, clock, gateway_id, coordinator_address, limits, log) as core:
        app = create_app(core, tokenizer, settings, clock)
        async with asyncio.TaskGroup() as tasks:
            serving = tasks.create_task(serve(app, settings, sock), name="gateway-http")
            try:
                yield
            finally:
                serving.cancel()


def base_url(sock: socket.socket) -> str:
    """How a client on this machine reaches the gateway."""
    name: tuple[str, int] = sock.getsockname()[:2]
    host, port = name
    reachable = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{reachable}]:{port}" if ":" in reachable else f"http://{reachable}:{port}"
