"""The in-memory network as programs see it: channels, processes, and what they all hang on."""

from __future__ import annotations

import math
from contextvars import Context
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, Internal, WorkerUnavailable
from rpc.api import MAX_OPEN_CALLS
from rpc.codec import MAX_BODY_BYTES, Codec
from rpc.memory.call import Call
from rpc.memory.fabric import Fabric, Life
from rpc.memory.fate import loopback_latency
from rpc.memory.server import MemoryServer
from rpc.routes import log_to_stdlib

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator

    from contracts.messages import Method, ReplyT, RequestT, StreamMethod
    from rpc.memory.fate import Latency
    from rpc.routes import Log


class MemoryChannel:
    """`rpc.Channel` in memory."""

    def __init__(self, fabric: Fabric, life: Life, address: str) -> None:
        self._fabric = fabric
        self._codec = fabric.codec
        self._life = life
        self._address = address
        #: Calls of this channel whose caller still listens.
        self._open: dict[Call, None] = {}
        self._closed = False

    async def call(self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float) -> ReplyT:
        assert math.isfinite(timeout_s), f"{method.name}: every call has a deadline, not {timeout_s}"
        what = f"{method.name} at {self._address}"
        raw = self._codec.encode(request, f"request of {what}")
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{what}: no time left for the call ({timeout_s:g} s)")
        call = self._start(method.name, raw, timeout_s)
        try:
            reply = await call.receive(timeout_s)
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: no reply within {timeout_s:g} s") from None
        finally:
            self._end(call)
        if reply is None:
            raise Internal(f"{what}: ended without a reply")
        return self._codec.decode_reply(reply, method.reply, f"reply of {what}")

    async def stream(
        self, method: StreamMethod[RequestT, ReplyT], request: RequestT, *, idle_timeout_s: float
    ) -> AsyncGenerator[ReplyT, None]:
        what = f"{method.name} at {self._address}"
        call = self._start(method.name, self._codec.encode(request, f"request of {what}"), math.inf)
        what_body = f"body of {what}"
        try:
            while (body := await call.receive(idle_timeout_s)) is not None:
                yield self._codec.decode_reply(body, method.reply, what_body)
        except TimeoutError:
            raise DeadlineExceeded(f"{what}: no body within {idle_timeout_s:g} s") from None
        finally:
            self._end(call)

    def close(self) -> None:
        self._closed = True
        for call in self._open:
            call.fail("the channel was closed during the call")

    def _start(self, method: str, raw: bytes, timeout_s: float) -> Call:
        call = Call(self._fabric, self._life, self._address, method, timeout_s)
        if self._closed or self._life.dead:
            raise WorkerUnavailable(f"{call.what}: the channel is closed")
        self._open[call] = None
        call.open(raw)
        return call

    def _end(self, call: Call) -> None:
        del self._open[call]
        call.hang_up()


class MemoryProcess:
    """`rpc.Network` as one life of one program sees it."""

    def __init__(self, fabric: Fabric, host: str, context: Context | None = None) -> None:
        self._fabric = fabric
        self._life = Life(host, Context() if context is None else context)
        #: One open channel per address; empty once closed.
        self._channels: dict[str, MemoryChannel] = {}
        self._closed = False

    def server(self, bind: str) -> MemoryServer:
        return MemoryServer(self._fabric, self._life, bind)

    def channel(self, address: str) -> MemoryChannel:
        if self._closed:
            raise WorkerUnavailable(f"no call to {address}: this network is closed")
        channel = self._channels.get(address)
        if channel is None:
            channel = self._channels[address] = MemoryChannel(self._fabric, self._life, address)
        return channel

    async def drop(self, address: str) -> None:
        channel = self._channels.pop(address, None)
        if channel is not None:
            channel.close()

    async def close(self) -> None:
        self._closed = True
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            channel.close()

    def kill(self) -> None:
        """Ends this life at once, as SIGKILL does: its servers crash, its calls end, and whatever its program
        still sends while it is torn down goes nowhere. The next life is another `MemoryProcess`."""
        for server in list(self._life.servers):
            server.abort("was killed")
        for call in list(self._life.calls):
            call.fail("the calling program was killed")
            call.hang_up()
        self._life.dead = True


class MemoryNetwork(MemoryProcess):
    """An in-memory network, and at once the first program on it.

    `rng` feeds `latency_s` and nothing else. A server's host is what stands before the colon of its address.
    Tests that tell machines apart, or kill whole programs, give each its own `process`.
    """

    def __init__(
        self,
        *,
        rng: random.Random,
        latency_s: Latency = loopback_latency,
        host: str = "127.0.0.1",
        max_body_bytes: int = MAX_BODY_BYTES,
        max_open_calls: int = MAX_OPEN_CALLS,
        log: Log = log_to_stdlib,
    ) -> None:
        fabric = Fabric(
            rng=rng,
            latency_s=latency_s,
            codec=Codec(max_body_bytes),
            max_open_calls=max_open_calls,
            log=log,
        )
        super().__init__(fabric, host)

    def process(self, host: str, context: Context | None = None) -> MemoryProcess:
        """A new life of a program on `host`. Its servers run each handler in a copy of `context`, by default of an
        empty one."""
        return MemoryProcess(self._fabric, host, context)

    def crash(self, address: str) -> None:
        """Kills the server at `address` alone: its handlers are cancelled and heard no more, their callers
        get WorkerUnavailable, and calls are refused until another server listens there."""
        server = self._fabric.servers.get(address)
        if server is not None:
            server.abort("was killed")
