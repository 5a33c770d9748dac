"""A TCP proxy that damages what passes: flipped bits, cut connections, pieces sent twice or in the wrong order, delay.

    async with proxy(host, port, random.Random(7)) as between:
        connect to between.address ...
        between.damage = Damage(flips_per_mib=2.0)

Damage can change at any time and meets what passes from then on, on every connection, in both directions.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator

_READ_BYTES = 1 << 16
_MIB = 1 << 20
_STOP_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """How often, on the average, each thing happens."""

    flips_per_mib: float = 0.0
    #: Connections broken off, in the middle of a piece.
    cuts_per_mib: float = 0.0
    #: Pieces sent a second time.
    repeats_per_mib: float = 0.0
    #: Pieces whose halves change places.
    swaps_per_mib: float = 0.0
    #: Pieces smaller than this pass unharmed: where only bulk is to be hit.
    spares_below: int = 0
    #: Before each piece.
    delay_s: float = 0.0


UNHARMED = Damage()


class Proxy:
    def __init__(self, host: str, port: int, rng: random.Random) -> None:
        self._target = (host, port)
        self._rng = rng
        self.damage = UNHARMED
        #: What was done so far, by the name of the field.
        self.done: Counter[str] = Counter()
        self.num_bytes = 0
        self._port = 0
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def address(self) -> str:
        """Where it listens, "host:port"."""
        return f"127.0.0.1:{self._port}"

    @property
    def port(self) -> int:
        return self._port

    def retarget(self, host: str, port: int) -> None:
        """Connections from now on go there."""
        self._target = (host, port)

    def cut_all(self) -> None:
        """Breaks every connection that is open now."""
        for task in self._connections:
            task.cancel()

    async def start(self) -> asyncio.Server:
        """For `proxy`, as is `close`."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._port = server.sockets[0].getsockname()[1]
        return server

    async def close(self, server: asyncio.Server) -> None:
        server.close()
        self.cut_all()
        if self._connections:
            await asyncio.wait(self._connections, timeout=_STOP_TIMEOUT_S)

    async def _serve(self, near_reader: asyncio.StreamReader, near: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        far: asyncio.StreamWriter | None = None
        try:
            far_reader, far = await asyncio.open_connection(*self._target)
            ways = [
                asyncio.create_task(self._pass(near_reader, far)),
                asyncio.create_task(self._pass(far_reader, near)),
            ]
            try:
                # Either side's end is the other's: half open connections are not what is tested here.
                await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.wait(ways)
        except (OSError, asyncio.CancelledError):
            return
        finally:
            self._connections.discard(task)
            for side in (near, far):
                if side is not None:
                    side.transport.abort()

    async def _pass(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(_READ_BYTES):
                self.num_bytes += len(piece)
                damage = self.damage
                if damage.delay_s:
                    await asyncio.sleep(damage.delay_s)
                if len(piece) < max(1, damage.spares_below):
                    sink.write(piece)
                    await sink.drain()
                    continue
                pieces, goes_on = self._damaged(piece, damage)
                for each in pieces:
                    sink.write(each)
                await sink.drain()
                if not goes_on:
                    return

    def _damaged(self, piece: bytes, damage: Damage) -> tuple[list[bytes], bool]:
        """What is passed on in its place, and whether the connection goes on."""
        for _ in range(self._events("flips_per_mib", damage.flips_per_mib, piece)):
            changed = bytearray(piece)
            changed[self._rng.randrange(len(piece))] ^= 1 << self._rng.randrange(8)
            piece = bytes(changed)
        if self._events("cuts_per_mib", damage.cuts_per_mib, piece):
            return [piece[: self._rng.randrange(len(piece))]], False
        if self._events("swaps_per_mib", damage.swaps_per_mib, piece):
            middle = len(piece) // 2
            piece = piece[middle:] + piece[:middle]
        if self._events("repeats_per_mib", damage.repeats_per_mib, piece):
            return [piece, piece], True
        return [piece], True

    def _events(self, name: str, per_mib: float, piece: bytes) -> int:
        """How often something that happens `per_mib` meets this piece: what is rare is drawn, the rest rounded."""
        if per_mib == 0.0:
            return 0
        expected = per_mib * len(piece) / _MIB
        count = int(expected) + (self._rng.random() < expected - int(expected))
        self.done[name] += count
        return count


@asynccontextmanager
async def proxy(host: str, port: int, rng: random.Random) -> AsyncGenerator[Proxy]:
    """Listens on a free port of the loopback, and passes every connection on to `host:port`."""
    between = Proxy(host, port, rng)
    server = await between.start()
    try:
        yield between
    finally:
        await between.close(server)
