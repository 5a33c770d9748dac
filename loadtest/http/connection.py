"""One connection to a server: a request out, its response in, one at a time, for as long as the server keeps it."""

from __future__ import annotations

import asyncio
import math
import socket
from typing import TYPE_CHECKING, Protocol, cast

import httptools

from loadtest.http.refusals import printable
from loadtest.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Of a response's head, and of anything else that is no body between two pieces of body.
MAX_HEAD_BYTES = 64 * 1024
#: After the end of an answer, for the bytes that end the response. Then the connection is closed, not kept.
DRAIN_S = 1.0


class Exchange(Protocol):
    """One request on a connection; called from the event loop."""

    def on_status(self, status: int, headers: Mapping[str, str]) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_complete(self) -> None: ...

    def on_lost(self, outcome: Outcome, detail: str, *, untouched: bool) -> None:
        """`untouched`: no byte of a response had come."""
        ...


class Owner(Protocol):
    """Keeps connections."""

    now_s: Callable[[], float]
    #: Called after each read.
    after_read: Callable[[], None]

    def on_opened(self, connection: Connection) -> None: ...

    def on_idle(self, connection: Connection) -> None:
        """It can carry another request."""
        ...

    def on_closed(self, connection: Connection) -> None: ...


class Connection(asyncio.Protocol):
    """Of plain TCP or TLS. The server may close a kept one at any time."""

    def __init__(self, owner: Owner) -> None:
        self._owner = owner
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpResponseParser | None = None
        self._exchange: Exchange | None = None
        self._drain: asyncio.TimerHandle | None = None
        self._failure: tuple[Outcome, str] | None = None
        #: When its last exchange ended, on the owner's clock; inf: there was none.
        self.idle_since_s = math.inf
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[str, str] = {}
        #: Of the final response; 0: its head is not complete.
        self._status = 0
        #: Pieces of body of the current read.
        self._body = b""
        self._num_head_bytes = 0
        self._is_untouched = True
        self._is_complete = False
        #: The server lets the connection live on, and sent nothing beyond the response.
        self._can_keep = False

    @property
    def is_usable(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def begin(self, exchange: Exchange, request: bytes) -> None:
        """Writes the request at once, as far as the system takes it."""
        assert self._transport is not None
        self._exchange = exchange
        self._transport.write(request)

    def detach(self) -> None:
        """Nobody waits for the rest of the response any more; the connection is kept if that comes soon."""
        self._exchange = None
        if self._is_complete:
            self._recycle()
        else:
            self._drain = asyncio.get_running_loop().call_later(DRAIN_S, self.abort)

    def abort(self) -> None:
        """Closes it at once; the exchange is not told."""
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    # --- asyncio -----------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        # Not before: it refers back to this object, and a connection that is never made is never lost.
        self._parser = httptools.HttpResponseParser(self)
        # Some versions of uvloop keep what is written until all other callbacks have had their turn, and the time of
        # sending would be wrong.
        self._transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._owner.on_opened(self)

    def data_received(self, data: bytes) -> None:
        if self._exchange is None and self._drain is None:
            # Nothing was asked.
            self.abort()
            return
        self._is_untouched = False
        assert self._parser is not None
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            self._failure = Outcome.MALFORMED_HTTP, f"{error}: {printable(data[:200].decode(errors='replace'))}"
        if self._body:
            body, self._body = self._body, b""
            self._num_head_bytes = 0
            if self._exchange is not None:
                self._exchange.on_body(body)
        elif not self._is_complete:
            self._num_head_bytes += len(data)
            if self._num_head_bytes > MAX_HEAD_BYTES:
                self._failure = Outcome.MALFORMED_HTTP, f"more than {MAX_HEAD_BYTES} bytes of headers"
        if self._is_complete:
            self._end_response()
        elif self._failure is not None:
            self._lose(*self._failure)
        self._owner.after_read()

    def connection_lost(self, exc: Exception | None) -> None:
        # Parser and transport refer back to this object.
        self._transport = self._parser = None
        if self._drain is not None:
            self._drain.cancel()
        if self._ends_with_connection() and exc is None:
            self._is_complete = True
            if self._exchange is not None:
                self._exchange.on_complete()
        else:
            outcome = Outcome.RESET_MID_STREAM if self._status else Outcome.RESET_BEFORE_ANSWER
            self._lose(outcome, str(exc) if exc else "the server closed the connection")
        self._exchange = None
        self._owner.on_closed(self)

    # --- httptools ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        if self._is_complete:
            self._can_keep = False

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._status:
            self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        if self._is_complete:
            return
        assert self._parser is not None
        status = self._parser.get_status_code()
        if status // 100 == 1:
            self._headers = {}
            return
        self._status = status
        if self._exchange is not None:
            self._exchange.on_status(status, self._headers)

    def on_body(self, body: bytes) -> None:
        if not self._is_complete:
            self._body = self._body + body if self._body else body

    def on_message_complete(self) -> None:
        assert self._parser is not None
        # After 100 Continue and its like the response is still to come.
        if self._status and not self._is_complete:
            self._is_complete = True
            self._can_keep = self._parser.should_keep_alive()

    # --- ends --------------------------------------------------------------------------------------

    def _end_response(self) -> None:
        exchange = self._exchange
        if exchange is not None:
            self._exchange = None
            exchange.on_complete()
        self._recycle()

    def _recycle(self) -> None:
        """The response is complete: keeps the connection for another one if both sides can."""
        if self._drain is not None:
            self._drain.cancel()
            self._drain = None
        if self._failure is not None or not self._can_keep:
            self.abort()
            return
        self._reset()
        self.idle_since_s = self._owner.now_s()
        self._owner.on_idle(self)

    def _lose(self, outcome: Outcome, detail: str) -> None:
        exchange, self._exchange = self._exchange, None
        if self._transport is not None:
            self._transport.abort()
        if exchange is not None:
            exchange.on_lost(outcome, detail, untouched=self._is_untouched)

    def _ends_with_connection(self) -> bool:
        """Whether the response has neither a length nor chunks: the end of the connection is its proper end."""
        headers = self._headers
        return self._status != 0 and "content-length" not in headers and "transfer-encoding" not in headers
