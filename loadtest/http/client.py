"""An HTTP/1.1 client for one server: requests out at once, answers to their readers as they come."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TYPE_CHECKING

from loadtest.http.connection import Connection
from loadtest.http.dialer import Dialer
from loadtest.http.failures import RequestFailed
from loadtest.http.sending import Sending
from loadtest.record import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from loadtest.http.sending import Reader
    from loadtest.settings import Limits

#: Of `get` and `post`.
MAX_BODY_BYTES = 16 * 1024 * 1024
WHOLE_TIMEOUT_S = 30.0
#: For closed connections to be gone.
CLOSE_TIMEOUT_S = 1.0


class HttpClient:
    """Keeps connections that the server leaves open, and uses the youngest first. Belongs to one event loop.

    `headers` go with every request; names and values must be such as HTTP allows.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Sequence[tuple[str, str]] = (),
        limits: Limits,
        now_s: Callable[[], float],
        verify: bool = True,
    ) -> None:
        self.limits = limits
        self.now_s = now_s
        #: Called after each read of an answer; must not raise.
        self.after_read: Callable[[], None] = _do_nothing
        self._dialer = Dialer(base_url, verify=verify)
        self._header_lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
        self._post_heads: dict[str, bytes] = {}
        #: Youngest last.
        self._kept: dict[Connection, None] = {}
        self._open: set[Connection] = set()
        self._sendings: set[Sending] = set()
        self._num_opening = 0
        #: Nothing is open or being opened.
        self._quiet = asyncio.Event()
        #: Opened in all.
        self.num_connections = 0

    @property
    def num_open(self) -> int:
        return len(self._open)

    def send(self, path: str, body: bytes, reader: Reader, on_end: Callable[[], None]) -> Sending:
        """POSTs JSON. On a kept connection it is written before this returns.

        `on_end` is called exactly once, from the event loop or from `Sending.cancel`, with the reader done. Neither it
        nor the reader may raise.
        """
        return self._start(_with_body(self._post_head(path), body), reader, on_end)

    async def get(self, path: str) -> tuple[int, Mapping[str, str], bytes]:
        """Status, headers (names in lower case) and body. Raises RequestFailed, an OSError."""
        return await self._ask(self._head("GET", path) + b"\r\n")

    async def post(self, path: str, body: bytes) -> tuple[int, Mapping[str, str], bytes]:
        """Like `get`, with a JSON body."""
        return await self._ask(_with_body(self._post_head(path), body))

    async def close(self) -> None:
        """Ends what is on its way as interrupted, and closes all connections."""
        for sending in list(self._sendings):
            sending.cancel(Outcome.INTERRUPTED)
        for connection in list(self._open):
            connection.abort()
        self._check_quiet()
        # A server may leave a TLS connection's end unanswered.
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._quiet.wait()

    def _post_head(self, path: str) -> bytes:
        """Everything before the length of the body."""
        head = self._post_heads.get(path)
        if head is None:
            head = self._head("POST", path) + b"content-type: application/json\r\ncontent-length: "
            self._post_heads[path] = head
        return head

    def _head(self, method: str, path: str) -> bytes:
        return (
            f"{method} {self._dialer.path}{path} HTTP/1.1\r\nhost: {self._dialer.netloc}\r\n"
            f"user-agent: tandem-loadtest\r\naccept: text/event-stream, */*\r\n{self._header_lines}"
        ).encode("latin-1")

    def _start(self, request: bytes, reader: Reader, on_end: Callable[[], None]) -> Sending:
        sending = Sending(self, reader, request, on_end)
        self._sendings.add(sending)
        sending.start()
        return sending

    async def _ask(self, request: bytes) -> tuple[int, Mapping[str, str], bytes]:
        ended = asyncio.Event()
        whole = _WholeReader()
        sending = self._start(request, whole, ended.set)
        try:
            async with asyncio.timeout(min(WHOLE_TIMEOUT_S, self.limits.total_s)):
                await ended.wait()
        except TimeoutError:
            sending.cancel(Outcome.TIMEOUT)
        finally:
            sending.cancel(Outcome.INTERRUPTED)
        if whole.failure is not None:
            try:
                raise whole.failure
            finally:
                # Its traceback refers to this frame, and nobody collects circles during a run.
                del whole
        return whole.status, whole.headers, bytes(whole.body)

    # --- connections -------------------------------------------------------------------------------

    def take_kept(self) -> Connection | None:
        while self._kept:
            connection, _ = self._kept.popitem()
            if connection.is_usable:
                return connection
        return None

    async def open(self) -> Connection:
        self._num_opening += 1
        try:
            return await self._dialer.open(lambda: Connection(self))
        finally:
            self._num_opening -= 1
            self._check_quiet()

    def forget(self, sending: Sending) -> None:
        self._sendings.discard(sending)

    def on_opened(self, connection: Connection) -> None:
        self._open.add(connection)
        self._quiet.clear()
        self.num_connections += 1

    def on_idle(self, connection: Connection) -> None:
        self._kept[connection] = None

    def on_closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._kept.pop(connection, None)
        self._check_quiet()

    def _check_quiet(self) -> None:
        if self._open or self._num_opening:
            self._quiet.clear()
        else:
            self._quiet.set()


def _with_body(head: bytes, body: bytes) -> bytes:
    return b"%b%d\r\n\r\n%b" % (head, len(body), body)


class _WholeReader:
    """Collects a bounded response."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.body = bytearray()
        self.failure: RequestFailed | None = None
        self.is_done = False
        self.is_whole = False
        #: Only the limit of the whole response counts.
        self.has_token = True

    def on_connected(self, connect_s: float) -> None: ...

    def on_sent(self) -> None: ...

    def on_stale(self) -> None: ...

    def on_status(self, status: int, headers: Mapping[str, str]) -> None:
        self.status, self.headers = status, headers

    def on_body(self, data: bytes) -> None:
        self.body += data
        if len(self.body) > MAX_BODY_BYTES:
            self.on_lost(Outcome.MALFORMED_HTTP, f"a body of more than {MAX_BODY_BYTES} bytes")

    def on_complete(self) -> None:
        self.is_done = self.is_whole = True

    def on_lost(self, outcome: Outcome, detail: str = "") -> None:
        if not self.is_done:
            self.is_done = True
            self.failure = RequestFailed(outcome, detail)


def _do_nothing() -> None:
    pass
