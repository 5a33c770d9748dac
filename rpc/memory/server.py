"""The serving side of the in-memory network."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, TandemError, WorkerUnavailable
from rpc.api import CallContext
from rpc.routes import RouteTable, UnaryRoute

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from contracts.messages import Method, ReplyT, RequestT, StreamMethod
    from rpc.memory.call import Call
    from rpc.memory.fabric import Fabric, Life

#: What `stop` allows cancelled handlers for their cleaning up.
_CANCEL_GRACE_S = 1.0


class MemoryServer:
    """`rpc.Server` in memory."""

    def __init__(self, fabric: Fabric, life: Life, bind: str) -> None:
        self._fabric = fabric
        self.life = life
        self._bind = bind
        self._routes = RouteTable(fabric.codec, fabric.log, fabric.max_open_calls)
        #: Bound address; None before `start`.
        self._address: str | None = None
        self._stopping = False
        #: Calls whose handler runs, in the order accepted.
        self._open: dict[Call, asyncio.Task[None]] = {}

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

    def accept(self, call: Call, raw: bytes) -> None:
        if self._stopping:
            call.reply_error(WorkerUnavailable(f"{call.what}: the server is stopping"))
            return
        task = call.loop.create_task(self._serve(call, raw), name=call.what, context=self.life.context.copy())
        call.accepted(self, task)
        self._open[call] = task
        task.add_done_callback(lambda _: self._open.pop(call))

    async def _serve(self, call: Call, raw: bytes) -> None:
        timeout_s = call.timeout_s if math.isfinite(call.timeout_s) else None
        try:
            async with asyncio.timeout(timeout_s):
                await self._answer(call, raw)
        except TandemError as error:
            call.reply_error(error)
        except TimeoutError:
            call.reply_error(DeadlineExceeded(f"{call.what}: the deadline passed in the handler"))

    async def _answer(self, call: Call, raw: bytes) -> None:
        expires_at_s = call.loop.time() + call.timeout_s
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
