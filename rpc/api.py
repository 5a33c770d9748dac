"""What a shell may rely on, whichever network carries its calls.

Errors of every call, on both networks:

- a `TandemError` raised by the handler reaches the caller as the same class, message, `param` and
  `retry_after_s`; any other exception of a handler becomes `Internal`, naming its type;
- nobody listens, the peer died, stopped or reset the connection, or the channel was dropped or closed here:
  `WorkerUnavailable`;
- no reply in time: `DeadlineExceeded`, and the handler is cancelled;
- a request that does not fit its type: `BadRequest` with the path of the field; a reply that does not:
  `Internal`; a body over the limit: `PayloadTooLarge`; an unknown method: `NotFound`; a server at its limit
  of open calls: `NoCapacity`; no or a wrong token: `Unauthorized`.

Cancelling a call (or closing a stream's generator) cancels its handler. A network belongs to one event loop.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from contracts.messages import Method, ReplyT, RequestT, StreamMethod

#: Calls a server runs at once before it answers NoCapacity.
MAX_OPEN_CALLS = 4096


class CallContext(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler may know about its call besides the body."""

    #: The caller's address, for people.
    peer: str
    method: str
    #: `loop.time()` at which the caller gives up; infinite for streams.
    expires_at_s: float

    def remaining_s(self) -> float:
        """Seconds until the caller gives up (never negative)."""
        return max(0.0, self.expires_at_s - asyncio.get_running_loop().time())


class Server(Protocol):
    """Answers calls on one address. Whoever made it stops it."""

    def register(
        self,
        method: Method[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], Awaitable[ReplyT]],
    ) -> None: ...

    def register_stream(
        self,
        method: StreamMethod[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], AsyncIterator[ReplyT]],
    ) -> None:
        """`handler` is an async generator function. Its next body is asked for when the transport has room:
        a slow reader delays the generator, it does not fill memory."""
        ...

    async def start(self) -> str:
        """Listens, and returns the bound address ("127.0.0.1:41234"). Raises ConfigError if it cannot."""
        ...

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls at once, lets open ones end for `grace_s`, then cancels what is left: those
        callers get WorkerUnavailable. Streams end only if their handlers do. May be repeated."""
        ...


class Channel(Protocol):
    """Calls to one address. Connects when first used and reconnects by itself."""

    async def call(self, method: Method[RequestT, ReplyT], request: RequestT, *, timeout_s: float) -> ReplyT: ...

    def stream(
        self, method: StreamMethod[RequestT, ReplyT], request: RequestT, *, idle_timeout_s: float
    ) -> AsyncGenerator[ReplyT, None]:
        """Bodies in the order sent. No body within `idle_timeout_s` of asking for it: DeadlineExceeded.

        The call starts with the first `anext`. Close the generator (`contextlib.aclosing`) to cancel it.
        """
        ...


class Network(Protocol):
    """Makes servers, and owns one pooled channel per address."""

    def server(self, bind: str) -> Server:
        """`bind` is "host:port"; port 0 lets the system choose."""
        ...

    def channel(self, address: str) -> Channel:
        """The channel to `address`, made once and shared."""
        ...

    async def drop(self, address: str) -> None:
        """Forgets the pooled channel (its peer restarted); calls in flight on it get WorkerUnavailable."""
        ...

    async def close(self) -> None:
        """Drops every channel; later calls get WorkerUnavailable. Servers are stopped by their makers."""
        ...
