"""A server of hand-written bytes, to see what a client makes of them."""

from __future__ import annotations

import asyncio
import re
import socket
import struct
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Awaitable

_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


class Serve(Protocol):
    """What is done with one connection; it is closed afterwards. `number` counts connections from 0."""

    def __call__(self, peer: Peer, number: int) -> Awaitable[None]: ...


class Peer:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    async def request(self) -> tuple[bytes, bytes]:
        """Head and body. Raises IncompleteReadError when the client has gone."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        found = _LENGTH.search(head)
        return head, await self._reader.readexactly(int(found[1])) if found else b""

    async def write(self, data: bytes) -> None:
        """One segment, as far as the system goes along."""
        self._writer.write(data)
        await self._writer.drain()

    async def gone(self) -> None:
        """Waits until the client closes."""
        while await self._reader.read(1 << 16):
            pass

    def reset(self) -> None:
        own: socket.socket = self._writer.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


@asynccontextmanager
async def raw_server(serve: Serve, *, tls: ssl.SSLContext | None = None) -> AsyncGenerator[str]:
    """Its base URL. What `serve` raises is raised here, unless it says that the client has gone."""
    failures: list[BaseException] = []
    connections: set[asyncio.Task[None]] = set()
    num_connections = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal num_connections
        number, num_connections = num_connections, num_connections + 1
        task = asyncio.current_task()
        assert task is not None
        connections.add(task)
        try:
            await serve(Peer(reader, writer), number)
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            # The client has gone, or the test is over.
            pass
        except Exception as error:
            failures.append(error)
        finally:
            connections.discard(task)
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        server.close()
        for task in list(connections):
            task.cancel()
        await asyncio.gather(*connections, return_exceptions=True)
    if failures:
        raise failures[0]
