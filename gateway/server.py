"""Serves the app over HTTP inside a running event loop, on a socket that the caller has bound."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import TYPE_CHECKING

import uvicorn

from contracts.errors import ConfigError
from gateway.app import create_app
from gateway.settings import GatewaySettings

if TYPE_CHECKING:
    from collections.abc import Generator

    from fastapi import FastAPI

__all__ = ["GatewaySettings", "bind", "create_app", "serve"]

_BACKLOG = 2048

#: Of one request's head; longer ones are refused by the HTTP parser.
_MAX_HEAD_BYTES = 64 * 1024


def bind(settings: GatewaySettings) -> socket.socket:
    """A socket that listens already, so that a client which knows the port is never refused.

    Raises ConfigError naming the address (in use, not of this machine, no permission).
    """
    where = f"{settings.host}:{settings.port}"
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        sock = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
        sock.listen(_BACKLOG)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise ConfigError(f"cannot listen on {where}: {error.strerror or error}") from error
    return sock


async def serve(app: FastAPI, settings: GatewaySettings, sock: socket.socket) -> None:
    """Serves until cancelled; then open requests get `graceful_stop_s` to end. Closes the socket."""
    config = uvicorn.Config(
        app,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        ws="none",
        proxy_headers=False,
        h11_max_incomplete_event_size=_MAX_HEAD_BYTES,
        timeout_graceful_shutdown=max(1, round(settings.graceful_stop_s)),
    )
    server = _Server(config)
    serving = asyncio.create_task(server.serve(sockets=[sock]))
    try:
        await asyncio.shield(serving)
    finally:
        server.should_exit = True
        # Above what uvicorn allows itself, so that it can end in good order.
        _, late = await asyncio.wait((serving,), timeout=settings.graceful_stop_s + 2.0)
        for task in late:
            task.cancel()
        sock.close()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Signals belong to the process's own composition root."""
        yield
