"""A server's table of handlers, as functions from bytes to bytes. Shared by both networks.

Here the seam's promises about handlers are kept: typed bodies in and out, no exception but a `TandemError`
leaves, and a limit on open calls.
"""

from __future__ import annotations

import asyncio
import logging
import traceback
from collections.abc import Callable
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from contracts.errors import Internal, InvariantBroken, NoCapacity, NotFound, TandemError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Generator

    from contracts.messages import Method, ReplyT, RequestT, StreamMethod
    from rpc.api import CallContext
    from rpc.codec import Codec

#: Receives what an operator should see: a text of one or more lines.
Log = Callable[[str], None]


def log_to_stdlib(text: str) -> None:
    logging.getLogger("rpc").error(text)


@dataclass(frozen=True, slots=True)
class UnaryRoute:
    #: Raises only TandemError, or CancelledError when the call itself is cancelled.
    serve: Callable[[bytes, CallContext], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class StreamRoute:
    #: Raises as `UnaryRoute.serve` does. Closing the generator closes the handler's.
    serve: Callable[[bytes, CallContext], AsyncGenerator[bytes, None]]


class RouteTable:
    """Handlers by method name."""

    def __init__(self, codec: Codec, log: Log, max_open_calls: int) -> None:
        self._codec = codec
        self._log = log
        self._max_open_calls = max_open_calls
        self._routes: dict[str, UnaryRoute | StreamRoute] = {}
        #: Calls whose handler has started and not ended.
        self.open_calls = 0

    def add(
        self,
        method: Method[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], Awaitable[ReplyT]],
    ) -> None:
        what_request, what_reply = f"request of {method.name}", f"reply of {method.name}"

        async def serve(raw: bytes, context: CallContext) -> bytes:
            with self._supervised(method.name):
                request = self._codec.decode_request(raw, method.request, what_request)
                reply = await handler(request, context)
                return self._codec.encode(reply, what_reply)

        self._insert(method.name, UnaryRoute(serve))

    def add_stream(
        self,
        method: StreamMethod[RequestT, ReplyT],
        handler: Callable[[RequestT, CallContext], AsyncIterator[ReplyT]],
    ) -> None:
        what_request, what_body = f"request of {method.name}", f"body of {method.name}"

        async def serve(raw: bytes, context: CallContext) -> AsyncGenerator[bytes, None]:
            with self._supervised(method.name):
                request = self._codec.decode_request(raw, method.request, what_request)
                bodies = cast("AsyncGenerator[ReplyT, None]", handler(request, context))
                async with aclosing(bodies):
                    async for body in bodies:
                        yield self._codec.encode(body, what_body)

        self._insert(method.name, StreamRoute(serve))

    def find(self, name: str, address: str) -> UnaryRoute | StreamRoute:
        """Raises NotFound, and NoCapacity at the limit of open calls."""
        route = self._routes.get(name)
        if route is None:
            raise NotFound(f"no method {name} at {address}")
        if self.open_calls >= self._max_open_calls:
            raise NoCapacity(f"{name} at {address}: {self.open_calls} calls are open, the limit")
        return route

    def _insert(self, name: str, route: UnaryRoute | StreamRoute) -> None:
        if name in self._routes:
            raise InvariantBroken(f"method {name} is registered twice")
        self._routes[name] = route

    @contextmanager
    def _supervised(self, name: str) -> Generator[None, None, None]:
        self.open_calls += 1
        try:
            yield
        except TandemError:
            raise
        except Exception as error:
            raise self._internal(name, error) from error
        except asyncio.CancelledError as error:
            if _is_being_cancelled():
                raise
            # Something the handler awaited was cancelled, not the call: its caller must hear of it.
            raise self._internal(name, error) from error
        finally:
            self.open_calls -= 1

    def _internal(self, name: str, error: BaseException) -> Internal:
        self._log(f"{name}: the handler failed\n" + "".join(traceback.format_exception(error)))
        return Internal(f"{name}: the handler raised {type(error).__name__}")


def _is_being_cancelled() -> bool:
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
