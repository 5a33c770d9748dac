"""The in-memory network: the same promises as gRPC, on any event loop, with seeded delays and crashes.

Every body is really encoded, measured and decoded. A call is two one-way connections; each delivers in order,
every packet after the delay that `Fabric.fate` gave it. Timers and time are the running loop's, so on a
virtual-time loop a whole cluster's traffic is deterministic. Nothing here reads a clock or global randomness.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from contracts.errors import (
    ConfigError,
    DeadlineExceeded,
    Internal,
    TandemError,
    WorkerUnavailable,
)
from rpc.api import MAX_OPEN_CALLS, CallContext
from rpc.codec import MAX_BODY_BYTES, Codec, decode_error, encode_error
from rpc.routes import Log, RouteTable, UnaryRoute, log_to_stdlib

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable

    from contracts.messages import Method, ReplyT, RequestT, StreamMethod

#: Bodies of a stream that may be under way or unread before its handler has to wait.
STREAM_WINDOW = 64

#: After a loss both ends learn that the connection is broken, as gRPC's keep-alive would tell them.
BROKEN_AFTER_S = 3.0

#: What `stop` allows cancelled handlers for their cleaning up.
_CANCEL_GRACE_S = 1.0

_FIRST_PORT = 40_000

PacketKind = Literal["request", "hang_up", "body", "reply", "end", "error"]

#: Nothing follows one of these from server to caller. "reply" is a unary call's only body.
_LAST_KINDS: frozenset[PacketKind] = frozenset({"reply", "end", "error"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """What a delay may depend on: one packet of one call."""

    #: Hosts of the sender and the receiver.
    source: str
    target: str
    method: str
    kind: PacketKind
    num_bytes: int


#: Seconds from sending to delivery; None: lost, and with it everything later in that direction of the call.
Latency = Callable[[Message, "random.Random"], float | None]


def loopback_latency(message: Message, rng: random.Random) -> float:
    """0.1 to 0.4 ms, as gRPC takes on one machine."""
    return rng.uniform(0.0001, 0.0004)


@dataclass(frozen=True, slots=True)
class _Packet:
    kind: PacketKind
    #: An encoded body, or for "error" an encoded error.
    raw: bytes = b""


@dataclass(eq=False, slots=True)
class _Life:
    """One life of a program that sends."""

    host: str
    #: Nothing leaves it any more.
    dead: bool = False
    #: Its calls whose caller still listens, in the order made.
    calls: dict[_Call, None] = field(default_factory=lambda: dict[_Call, None]())
    #: Its servers that listen, in the order started.
    servers: dict[MemoryServer, None] = field(default_factory=lambda: dict[MemoryServer, None]())


@dataclass(eq=False, slots=True, kw_only=True)
class _Fabric:
    """What all programs on one in-memory network share."""

    rng: random.Random
    latency_s: Latency
    codec: Codec
    max_open_calls: int
    log: Log
    #: Listening servers by address.
    servers: dict[str, MemoryServer] = field(default_factory=lambda: dict[str, MemoryServer]())
    ports: itertools.count[int] = field(default_factory=lambda: itertools.count(_FIRST_PORT))

    def fate(self, sender: _Life, message: Message) -> float | None:
        """The one place that decides what becomes of a message."""
        if sender.dead:
            return None
        return self.latency_s(message, self.rng)

    def bind(self, address: str, server: MemoryServer) -> str:
        host, _, port = address.rpartition(":")
        bound = f"{host}:{next(self.ports)}" if port == "0" else address
        if bound in self.servers:
            raise ConfigError(f"cannot listen on {bound}: the address is in use")
        self.servers[bound] = server
        return bound


class _Pipe:
    """One direction of a call: delivers in the order sent, each packet after its own delay."""

    def __init__(
        self,
        fate: Callable[[_Packet], float | None],
        deliver: Callable[[_Packet], None],
        on_loss: Callable[[], None],
    ) -> None:
        self._fate = fate
        self._deliver = deliver
        self._on_loss = on_loss
        #: Sent and not delivered, oldest first; as many timers are running.
        self._under_way: deque[_Packet] = deque()
        self._last_delivery_s = -math.inf
        #: Nothing is sent any more: the last packet was sent, or one was lost.
        self._shut = False

    def send(self, packet: _Packet, *, last: bool) -> None:
        if self._shut:
            return
        delay_s = self._fate(packet)
        if delay_s is None:
            self._shut = True
            self._on_loss()
            return
        self._shut = last
        loop = asyncio.get_running_loop()
        self._last_delivery_s = max(self._last_delivery_s, loop.time() + delay_s)
        self._under_way.append(packet)
        loop.call_at(self._last_delivery_s, self._deliver_oldest)

    def _deliver_oldest(self) -> None:
        # Loops do not order timers of the same instant, so no timer is tied to a packet of its own.
        self._deliver(self._under_way.popleft())


class _Call:
    """Both ends of one call. Neither end touches the other but through a pipe (the read window excepted)."""

    def __init__(self, fabric: _Fabric, caller: _Life, address: str, method: str, timeout_s: float) -> None:
        self._fabric = fabric
        self.caller = caller
        self.address = address
        self.method = method
        #: Infinite for streams.
        self.timeout_s = timeout_s
        self._to_server = _Pipe(self._fate_to_server, self._at_server, self._on_loss)
        self._to_caller = _Pipe(self._fate_to_caller, self._at_caller, self._on_loss)
        #: Caller's end: delivered and unread, oldest first.
        self._unread: deque[_Packet] = deque()
        self._arrived = asyncio.Event()
        self._failure: TandemError | None = None
        #: The last packet has been delivered: the handler has ended.
        self._ended = False
        #: Server's end: set once the request was accepted.
        self._server: MemoryServer | None = None
        self._task: asyncio.Task[None] | None = None
        #: Free places in the caller's buffer.
        self.window = asyncio.Semaphore(STREAM_WINDOW)

    @property
    def what(self) -> str:
        return f"{self.method} at {self.address}"

    # --- the caller's end

    def open(self, raw: bytes) -> None:
        self.caller.calls[self] = None
        self._to_server.send(_Packet("request", raw), last=False)

    async def receive(self) -> bytes | None:
        """The next body; None at the end. Raises what the handler raised, or WorkerUnavailable."""
        while not self._unread and self._failure is None:
            self._arrived.clear()
            await self._arrived.wait()
        if not self._unread:
            assert self._failure is not None
            raise self._failure
        packet = self._unread.popleft()
        if packet.kind == "error":
            raise decode_error(packet.raw, self.what)
        if packet.kind == "end":
            return None
        self.window.release()
        return packet.raw

    def fail(self, reason: str) -> None:
        """Ends the caller's end; what was delivered before is still read first."""
        self._failure = WorkerUnavailable(f"{self.what}: {reason}")
        self._arrived.set()

    def hang_up(self) -> None:
        """The caller listens no more. A handler that still runs is cancelled when it hears of it."""
        self.caller.calls.pop(self, None)
        if not self._ended:
            self._to_server.send(_Packet("hang_up"), last=True)

    def _at_caller(self, packet: _Packet) -> None:
        self._ended = packet.kind in _LAST_KINDS
        self._unread.append(packet)
        self._arrived.set()

    def _fate_to_server(self, packet: _Packet) -> float | None:
        return self._fabric.fate(self.caller, self._message(self.caller.host, host_of(self.address), packet))

    # --- the server's end

    def accepted(self, server: MemoryServer, task: asyncio.Task[None]) -> None:
        self._server = server
        self._task = task

    def reply(self, kind: PacketKind, raw: bytes = b"") -> None:
        self._to_caller.send(_Packet(kind, raw), last=kind in _LAST_KINDS)

    def reply_error(self, error: TandemError) -> None:
        self.reply("error", encode_error(error))

    def _at_server(self, packet: _Packet) -> None:
        if packet.kind == "hang_up":
            self._cancel_handler()
            return
        server = self._fabric.servers.get(self.address)
        if server is None:
            self.reply_error(WorkerUnavailable(f"{self.what}: connection refused"))
        else:
            server.accept(self, packet.raw)

    def _cancel_handler(self) -> None:
        if self._task is not None:
            self._task.cancel()

    def _fate_to_caller(self, packet: _Packet) -> float | None:
        message = self._message(host_of(self.address), self.caller.host, packet)
        if self._server is None:
            # Refused by the machine itself: no program there sends this.
            return self._fabric.fate(_Life(message.source), message)
        return self._fabric.fate(self._server.life, message)

    # --- both

    def _on_loss(self) -> None:
        asyncio.get_running_loop().call_later(BROKEN_AFTER_S, self._break)

    def _break(self) -> None:
        self.fail(f"no sign of life for {BROKEN_AFTER_S:g} s")
        self._cancel_handler()

    def _message(self, source: str, target: str, packet: _Packet) -> Message:
        return Message(source=source, target=target, method=self.method, kind=packet.kind, num_bytes=len(packet.raw))


def host_of(address: str) -> str:
    return address.rpartition(":")[0]


class MemoryServer:
    """`rpc.Server` in memory."""

    def __init__(self, fabric: _Fabric, life: _Life, bind: str) -> None:
        self._fabric = fabric
        self.life = life
        self._bind = bind
        self._routes = RouteTable(fabric.codec, fabric.log, fabric.max_open_calls)
        #: Bound address; None before `start`.
        self._address: str | None = None
        self._stopping = False
        #: Calls whose handler runs, in the order accepted.
        self._open: dict[_Call, asyncio.Task[None]] = {}

    def register(
        self,
        method: Method[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], Awaitable[ReplyT]],
    ) -> None:
        self._routes.add(method, handler)

    def register_stream(
        self,
        method: StreamMethod[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], AsyncIterator[ReplyT]],
    ) -> None:
        self._routes.add_stream(method, handler)

    async def start(self) -> str:
        self._address = self._fabric.bind(self._bind, self)
        self.life.servers[self] = None
        return self._address

    async def stop(self, grace_s: float) -> None:
        self._stopping = True
        if self._open:
            await asyncio.wait(list(self._open.values()), timeout=grace_s)
        cancelled = list(self._open.values())
        self.abort("stopped")
        if cancelled:
            await asyncio.wait(cancelled, timeout=_CANCEL_GRACE_S)

    def abort(self, how: str) -> None:
        """Listens no more; every open call ends with WorkerUnavailable, after what was sent before."""
        self._stopping = True
        self.life.servers.pop(self, None)
        if self._address is not None and self._fabric.servers.get(self._address) is self:
            del self._fabric.servers[self._address]
        for call, task in list(self._open.items()):
            call.reply_error(WorkerUnavailable(f"{call.what}: the server {how}"))
            task.cancel()

    def accept(self, call: _Call, raw: bytes) -> None:
        if self._stopping:
            call.reply_error(WorkerUnavailable(f"{call.what}: the server is stopping"))
            return
        # An empty context: nothing but the body crosses from the caller, as between real processes.
        task = asyncio.get_running_loop().create_task(
            self._serve(call, raw), name=call.what, context=contextvars.Context()
        )
        call.accepted(self, task)
        self._open[call] = task
        task.add_done_callback(lambda _: self._open.pop(call))

    async def _serve(self, call: _Call, raw: bytes) -> None:
        timeout_s = call.timeout_s if math.isfinite(call.timeout_s) else None
        try:
            async with asyncio.timeout(timeout_s):
                await self._answer(call, raw)
        except TandemError as error:
            call.reply_error(error)
        except TimeoutError:
            call.reply_error(DeadlineExceeded(f"{call.what}: the deadline passed in the handler"))

    async def _answer(self, call: _Call, raw: bytes) -> None:
        expires_at_s = asyncio.get_running_loop().time() + call.timeout_s
        context = CallContext(peer=call.caller.host, method=call.method, expires_at_s=expires_at_s)
        route = self._routes.find(call.method, call.address)
        if isinstance(route, UnaryRoute):
            call.reply("reply", await route.serve(raw, context))
            return
        bodies = route.serve(raw, context)
        try:
            async for body in bodies:
                await call.window.acquire()
                call.reply("body", body)
        finally:
            # A cancelled wait leaves the generator suspended: its handler's `finally` must run now.
            await bodies.aclose()
        call.reply("end")


class MemoryChannel:
    """`rpc.Channel` in memory."""

    def __init__(self, fabric: _Fabric, life: _Life, address: str) -> None:
        self._fabric = fabric
        self._codec = fabric.codec
        self._life = life
        self._address = address
        #: Calls of this channel whose caller still listens.
        self._open: dict[_Call, None] = {}
        self._closed = False

    async def call(self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float) -> ReplyT:
        assert math.isfinite(timeout_s), f"{method.name}: every call has a deadline, not {timeout_s}"
        what = f"{method.name} at {self._address}"
        raw = self._codec.encode(request, f"request of {what}")
        if timeout_s <= 0:
            raise DeadlineExceeded(f"{what}: no time left for the call ({timeout_s:g} s)")
        call = self._start(method.name, raw, timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                reply = await call.receive()
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
        try:
            while True:
                body = await self._next_body(call, idle_timeout_s)
                if body is None:
                    return
                yield self._codec.decode_reply(body, method.reply, f"body of {what}")
        finally:
            self._end(call)

    async def _next_body(self, call: _Call, idle_timeout_s: float) -> bytes | None:
        try:
            async with asyncio.timeout(idle_timeout_s):
                return await call.receive()
        except TimeoutError:
            raise DeadlineExceeded(f"{call.what}: no body within {idle_timeout_s:g} s") from None

    def close(self) -> None:
        self._closed = True
        for call in self._open:
            call.fail("the channel was closed during the call")

    def _start(self, method: str, raw: bytes, timeout_s: float) -> _Call:
        call = _Call(self._fabric, self._life, self._address, method, timeout_s)
        if self._closed or self._life.dead:
            raise WorkerUnavailable(f"{call.what}: the channel is closed")
        self._open[call] = None
        call.open(raw)
        return call

    def _end(self, call: _Call) -> None:
        del self._open[call]
        call.hang_up()


class MemoryProcess:
    """`rpc.Network` as one life of one program sees it."""

    def __init__(self, fabric: _Fabric, host: str) -> None:
        self._fabric = fabric
        self._life = _Life(host)
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
        fabric = _Fabric(
            rng=rng,
            latency_s=latency_s,
            codec=Codec(max_body_bytes),
            max_open_calls=max_open_calls,
            log=log,
        )
        super().__init__(fabric, host)

    def process(self, host: str) -> MemoryProcess:
        """A new life of a program on `host`."""
        return MemoryProcess(self._fabric, host)

    def crash(self, address: str) -> None:
        """Kills the server at `address` alone: its handlers are cancelled and heard no more, their callers
        get WorkerUnavailable, and calls are refused until another server listens there."""
        server = self._fabric.servers.get(address)
        if server is not None:
            server.abort("was killed")
