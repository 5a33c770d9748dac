"""`python -m tests.support.relay LISTENER HOST:PORT`: passes connections of an inherited listening socket on to a
server that only this process can reach. Ends with whoever started it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import sys

from cluster.lifeline import die_with_parent

_READ_BYTES = 1 << 16


async def _pass(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while piece := await source.read(_READ_BYTES):
            sink.write(piece)
            await sink.drain()


async def _relay(listener: int, host: str, port: int) -> None:
    async def serve(near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        sides = [near]
        try:
            far_reader, far = await asyncio.open_connection(host, port)
            sides.append(far)
            ways = [asyncio.create_task(_pass(near_reader, far)), asyncio.create_task(_pass(far_reader, near))]
            # An end of one direction ends both: nobody here half closes.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            for way in ways:
                way.cancel()
        except OSError:
            return
        finally:
            for side in sides:
                side.close()

    with socket.socket(fileno=listener) as sock:
        sock.setblocking(False)
        server = await asyncio.start_server(serve, sock=sock)
        await server.serve_forever()


if __name__ == "__main__":
    die_with_parent(os.getppid())
    host, _, port = sys.argv[2].rpartition(":")
    asyncio.run(_relay(int(sys.argv[1]), host, int(port)))
