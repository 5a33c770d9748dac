"""One request on its way: connecting, sending, waiting, each with a deadline."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from loadtest.http.failures import outcome_of_connecting
from loadtest.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from loadtest.http.connection import Connection
    from loadtest.settings import Limits

#: A kept connection that had been idle for so long, and breaks so soon after it was written to, had been closed by the
#: server before. Any other that breaks takes a request with it that the server had.
STALE_AFTER_IDLE_S = 0.5
STALE_WITHIN_S = 0.05


class Reader(Protocol):
    """What becomes of the response; see `AnswerReader`."""

    is_done: bool

    @property
    def is_whole(self) -> bool: ...

    @property
    def has_token(self) -> bool: ...

    def on_connected(self, connect_s: float) -> None: ...

    def on_sent(self) -> None: ...

    def on_stale(self) -> None: ...

    def on_status(self, status: int, headers: Mapping[str, str]) -> None: ...

    def on_body(self, data: bytes) -> None: ...

    def on_complete(self) -> None: ...

    def on_lost(self, outcome: Outcome, detail: str = "") -> None: ...


class Connections(Protocol):
    """Where connections come from."""

    limits: Limits
    now_s: Callable[[], float]

    def take_kept(self) -> Connection | None: ...

    async def open(self) -> Connection: ...

    def forget(self, sending: Sending) -> None:
        """It has ended."""
        ...


class Sending:
    """Tells its reader everything, and then, once and never from within `start`, `on_end`."""

    __slots__ = ("_connecting", "_connection", "_connections", "_on_end", "_reader", "_request", "_sent_s", "_timer")

    def __init__(self, connections: Connections, reader: Reader, request: bytes, on_end: Callable[[], None]) -> None:
        self._connections = connections
        self._reader = reader
        self._request = request
        #: None: it has ended. Whoever asked refers to this object, and nobody collects circles during a run.
        self._on_end: Callable[[], None] | None = on_end
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sent_s = 0.0

    def start(self) -> None:
        connection = self._connections.take_kept()
        if connection is None:
            self._connect()
        else:
            self._write(connection)

    def cancel(self, outcome: Outcome) -> None:
        """Ends it with this outcome, unless it has ended; the connection is closed."""
        self._give_up(outcome, "")

    # --- connecting --------------------------------------------------------------------------------

    def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        limit_s = self._connections.limits.connect_s
        self._timer = loop.call_later(
            limit_s, self._give_up, Outcome.CONNECT_TIMEOUT, f"no connection within {limit_s:g} s"
        )
        self._connecting = loop.create_task(self._open())

    async def _open(self) -> None:
        begin_s = self._connections.now_s()
        try:
            connection = await self._connections.open()
        except OSError as error:
            self._connecting = None
            self._give_up(outcome_of_connecting(error), str(error))
            return
        self._connecting = None
        if self._on_end is None:
            # Given up in the moment in which it succeeded.
            connection.abort()
            return
        assert self._timer is not None
        self._timer.cancel()
        self._reader.on_connected(self._connections.now_s() - begin_s)
        if connection.is_usable:
            self._write(connection)
        else:
            self._give_up(Outcome.RESET_BEFORE_ANSWER, "closed by the server as soon as it was open")

    # --- sending and waiting -----------------------------------------------------------------------

    def _write(self, connection: Connection) -> None:
        self._connection = connection
        limits = self._connections.limits
        wait_s = limits.total_s if limits.first_token_s is None else min(limits.first_token_s, limits.total_s)
        self._timer = asyncio.get_running_loop().call_later(wait_s, self._waited, wait_s)
        connection.begin(self, self._request)
        self._sent_s = self._connections.now_s()
        self._reader.on_sent()

    def _waited(self, waited_s: float) -> None:
        total_s = self._connections.limits.total_s
        if waited_s >= total_s:
            self._give_up(Outcome.TIMEOUT, f"not ended within {total_s:g} s")
        elif not self._reader.has_token:
            self._give_up(Outcome.FIRST_TOKEN_TIMEOUT, f"no token within {waited_s:g} s")
        else:
            self._timer = asyncio.get_running_loop().call_later(total_s - waited_s, self._waited, total_s)

    # --- what the connection tells -----------------------------------------------------------------

    def on_status(self, status: int, headers: Mapping[str, str]) -> None:
        self._reader.on_status(status, headers)

    def on_body(self, data: bytes) -> None:
        reader = self._reader
        reader.on_body(data)
        if reader.is_done:
            assert self._connection is not None
            if reader.is_whole:
                self._connection.detach()
            else:
                self._connection.abort()
            self._end()

    def on_complete(self) -> None:
        self._reader.on_complete()
        self._end()

    def on_lost(self, outcome: Outcome, detail: str, *, untouched: bool) -> None:
        connection = self._connection
        assert connection is not None
        was_idle = self._sent_s - connection.idle_since_s >= STALE_AFTER_IDLE_S
        if untouched and was_idle and self._connections.now_s() - self._sent_s <= STALE_WITHIN_S:
            assert self._timer is not None
            self._timer.cancel()
            self._connection = None
            self._reader.on_stale()
            self._connect()
        else:
            self._give_up(outcome, detail)

    # --- ends --------------------------------------------------------------------------------------

    def _give_up(self, outcome: Outcome, detail: str) -> None:
        if self._on_end is None:
            return
        self._reader.on_lost(outcome, detail)
        if self._connection is not None:
            self._connection.abort()
        if self._connecting is not None:
            self._connecting.cancel()
            # Its exception refers to its frames, and they to this object.
            self._connecting = None
        self._end()

    def _end(self) -> None:
        on_end, self._on_end = self._on_end, None
        assert on_end is not None
        if self._timer is not None:
            self._timer.cancel()
        self._connections.forget(self)
        on_end()
