"""One call on the in-memory network: its two ends and the two pipes between them."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING

from contracts.errors import WorkerUnavailable
from rpc.codec import decode_error, encode_error
from rpc.memory.fabric import Life, host_of
from rpc.memory.fate import BROKEN_AFTER_S, LAST_KINDS, Message
from rpc.memory.pipe import Packet, Pipe

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from rpc.memory.fabric import Fabric
    from rpc.memory.fate import Fate, PacketKind
    from rpc.memory.server import MemoryServer

#: Bodies of a stream that may be under way or unread before its handler has to wait.
STREAM_WINDOW = 64


class Call:
    """Both ends of one call. Neither end touches the other but through a pipe (the read window excepted)."""

    def __init__(self, fabric: Fabric, caller: Life, address: str, method: str, timeout_s: float) -> None:
        self.loop = asyncio.get_running_loop()
        self.fabric = fabric
        self.caller = caller
        self.address = address
        self.server_host = host_of(address)
        self.method = method
        #: Infinite for streams.
        self.timeout_s = timeout_s
        self._to_server = _ToServer(self)
        self._to_caller = _ToCaller(self)
        #: Caller's end: delivered and unread, oldest first.
        self._unread: deque[Packet] = deque()
        self._failure: TandemError | None = None
        #: Who waits in `receive`; done when nobody does.
        self._waiter: asyncio.Future[None] | None = None
        #: When it has waited long enough, and the timer that looks whether that is now; one timer serves all waits
        #: of a call.
        self._patient_until_s = math.inf
        self._alarm: asyncio.TimerHandle | None = None
        #: The last packet has been delivered: the handler has ended.
        self._ended = False
        #: Server's end: set once the request was accepted.
        self.server: MemoryServer | None = None
        self._task: asyncio.Task[None] | None = None
        #: Free places in the caller's buffer.
        self.window = asyncio.Semaphore(STREAM_WINDOW)

    @property
    def what(self) -> str:
        return f"{self.method} at {self.address}"

    # --- the caller's end

    def open(self, raw: bytes) -> None:
        self.caller.calls[self] = None
        self._to_server.send(Packet("request", raw), last=False)

    async def receive(self, timeout_s: float) -> bytes | None:
        """The next body; None at the end. Raises what the handler raised, or WorkerUnavailable; TimeoutError when
        nothing comes within `timeout_s`, which may not be less than in the call before."""
        if not self._unread and self._failure is None:
            self._patient_until_s = self.loop.time() + timeout_s
            if self._alarm is None:
                self._alarm = self.loop.call_at(self._patient_until_s, self._look_at_clock)
            self._waiter = self.loop.create_future()
            await self._waiter
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
        self._wake()

    def hang_up(self) -> None:
        """The caller listens no more. A handler that still runs is cancelled when it hears of it."""
        self.caller.calls.pop(self, None)
        if self._alarm is not None:
            self._alarm.cancel()
        if not self._ended:
            self._to_server.send(Packet("hang_up"), last=True)

    def at_caller(self, packet: Packet) -> None:
        if self._ended:
            # The other reply of a call whose request arrived twice.
            return
        self._ended = packet.kind in LAST_KINDS
        self._unread.append(packet)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _look_at_clock(self) -> None:
        self._alarm = None
        if self._waiter is None or self._waiter.done():
            return
        if self.loop.time() < self._patient_until_s:
            self._alarm = self.loop.call_at(self._patient_until_s, self._look_at_clock)
        else:
            self._waiter.set_exception(TimeoutError())

    # --- the server's end

    def accepted(self, server: MemoryServer, task: asyncio.Task[None]) -> None:
        self.server = server
        self._task = task

    def reply(self, kind: PacketKind, raw: bytes = b"") -> None:
        self._to_caller.send(Packet(kind, raw), last=kind in LAST_KINDS)

    def reply_error(self, error: TandemError) -> None:
        self.reply("error", encode_error(error))

    def at_server(self, packet: Packet) -> None:
        if packet.kind == "hang_up":
            self._cancel_handler()
            return
        server = self.fabric.servers.get(self.address)
        if server is None:
            self.reply_error(WorkerUnavailable(f"{self.what}: connection refused"))
        else:
            server.accept(self, packet.raw)

    def _cancel_handler(self) -> None:
        if self._task is not None:
            self._task.cancel()

    # --- both

    def lost(self) -> None:
        """A packet of either direction was lost."""
        self.loop.call_later(BROKEN_AFTER_S, self._fall_silent, context=self.fabric.context)

    def reset(self) -> None:
        """Ends this call, and with it all that share its connection."""
        others = (call for call in self.caller.calls if call.address == self.address and call is not self)
        for call in (self, *others):
            call.cut()

    def cut(self) -> None:
        """The connection is no more, and both ends know."""
        self._to_server.cut()
        self._to_caller.cut()
        self.fail("the connection was reset")
        self._cancel_handler()

    def _fall_silent(self) -> None:
        self.fail(f"no sign of life for {BROKEN_AFTER_S:g} s")
        self._cancel_handler()

    def message(self, source: str, target: str, packet: Packet) -> Message:
        return Message(source=source, target=target, method=self.method, kind=packet.kind, num_bytes=len(packet.raw))


class _Repeated(Call):
    """A unary call whose request came once more: served as a call of its own, answering the first."""

    def __init__(self, original: Call) -> None:
        super().__init__(original.fabric, original.caller, original.address, original.method, original.timeout_s)
        self._original = original

    def at_caller(self, packet: Packet) -> None:
        self._original.at_caller(packet)


class _OfCall(Pipe):
    """A pipe of a call, whichever way it leads."""

    def __init__(self, call: Call) -> None:
        super().__init__(call.loop, call.fabric.context)
        self._call = call

    def lost(self) -> None:
        self._call.lost()

    def reset(self) -> None:
        self._call.reset()


class _ToServer(_OfCall):
    def fate(self, packet: Packet) -> Fate | float | None:
        call = self._call
        return call.fabric.fate(call.caller, call.message(call.caller.host, call.server_host, packet))

    def deliver(self, packet: Packet) -> None:
        self._call.at_server(packet)

    def repeat(self, packet: Packet, at_s: float) -> None:
        call = self._call
        if packet.kind == "request" and math.isfinite(call.timeout_s):
            repeated = _Repeated(call)
            self._loop.call_at(at_s, repeated.at_server, packet, context=call.fabric.context)


class _ToCaller(_OfCall):
    def fate(self, packet: Packet) -> Fate | float | None:
        call = self._call
        message = call.message(call.server_host, call.caller.host, packet)
        if call.server is None:
            # Refused by the machine itself: no program there sends this.
            return call.fabric.fate(Life(message.source), message)
        return call.fabric.fate(call.server.life, message)

    def deliver(self, packet: Packet) -> None:
        self._call.at_caller(packet)

    def repeat(self, packet: Packet, at_s: float) -> None:
        """Only requests are sent again."""
