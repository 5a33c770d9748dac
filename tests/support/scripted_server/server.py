"""The server itself: connections, requests in service, and who waits."""

from __future__ import annotations

import asyncio
import socket
import struct
import time
from collections import deque
from typing import TYPE_CHECKING, cast

import httptools

from tests.support.scripted_server.answers import error_object, json_response, response
from tests.support.scripted_server.asks import BadRequest, message_texts, read_ask, read_object, token_ids
from tests.support.scripted_server.log import Log, LogEntry
from tests.support.scripted_server.plans import After, Move, plan
from tests.support.scripted_server.script import Fault, FaultChooser
from tests.support.scripted_server.ticker import Ticker

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.scripted_server.script import Behaviour

MAX_BODY_BYTES = 64 << 20
GENERATION_PATHS = {b"/v1/completions": False, b"/v1/chat/completions": True}


class ScriptedServer:
    """Serves until `close`. Everything runs in the event loop that `start` is awaited in."""

    def __init__(self, behaviour: Behaviour) -> None:
        self.behaviour = behaviour
        self.log = Log(behaviour.max_log_entries)
        self.base_url = ""
        self.num_running = 0
        self._waiting: deque[_Service] = deque()
        at_accept = tuple(rule for rule in behaviour.faults if rule.fault is Fault.CLOSE_AT_ACCEPT)
        others = tuple(rule for rule in behaviour.faults if rule.fault is not Fault.CLOSE_AT_ACCEPT)
        self._connection_faults = FaultChooser(at_accept, behaviour.seed)
        self._request_faults = FaultChooser(others, behaviour.seed)
        self._connections: set[_Connection] = set()

    async def start(self, *, port: int = 0) -> None:
        """Listens on 127.0.0.1; port 0: any free one. Raises OSError."""
        loop = asyncio.get_running_loop()
        self.ticker = Ticker()
        self._listener = await loop.create_server(lambda: _Connection(self), "127.0.0.1", port, backlog=4096)
        self.base_url = f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._listener.close()
        for connection in list(self._connections):
            connection.abort()
        self.ticker.close()
        await self._listener.wait_closed()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_open_connections(self) -> int:
        return len(self._connections)

    # --- for connections ---

    def connected(self, connection: _Connection) -> bool:
        """False: it is to be broken at once."""
        number = self.log.num_connections
        self.log.num_connections += 1
        connection.number = number
        self._connections.add(connection)
        return self._connection_faults.choose(number) is None

    def disconnected(self, connection: _Connection) -> None:
        self._connections.discard(connection)

    def draw_fault(self, number: int) -> Fault | None:
        return self._request_faults.choose(number)

    def admit(self, service: _Service) -> None:
        """Starts it, or lets it wait for its turn."""
        limit = self.behaviour.max_running
        if limit is not None and self.num_running >= limit:
            self._waiting.append(service)
            return
        self.num_running += 1
        service.start(service.entry.arrival_s)

    def leave(self, service: _Service, now_s: float) -> None:
        """`service` has ended, or its client went away."""
        if not service.has_started:
            self._waiting.remove(service)
            return
        self.num_running -= 1
        if self._waiting:
            self.num_running += 1
            self._waiting.popleft().start(now_s)


class _Service:
    """A request in service: makes its moves when they are due."""

    __slots__ = ("_connection", "_move", "_moves", "_server", "_start_s", "entry", "has_started", "is_over")

    def __init__(self, server: ScriptedServer, connection: _Connection, entry: LogEntry, moves: Iterator[Move]) -> None:
        self._server = server
        self._connection = connection
        self._moves = moves
        self._move = next(moves)
        self._start_s = 0.0
        self.entry = entry
        self.has_started = False
        self.is_over = False

    def start(self, start_s: float) -> None:
        """The schedule counts from `start_s`, the moment that it could start, not from when this is called."""
        self.has_started = True
        self._start_s = self.entry.start_s = start_s
        self._server.ticker.at(start_s + self._move.at_s, self._step)

    def abandon(self, now_s: float) -> None:
        """The client went away."""
        if not self.is_over:
            self.entry.left_s = now_s
            self._finish(now_s)

    def _step(self) -> None:
        if self.is_over:
            return
        _, data, num_tokens, after = self._move
        entry = self.entry
        now_s = time.perf_counter()
        self._connection.write(data)
        if data and not entry.headers_s > 0:
            entry.headers_s = now_s
        if num_tokens:
            entry.chunk_s.append(now_s)
            entry.chunk_tokens.append(num_tokens)
        if after is After.MORE:
            self._move = next(self._moves)
            self._server.ticker.at(self._start_s + self._move.at_s, self._step)
        elif after is not After.HANG:
            entry.end_s = now_s
            connection = self._connection
            # The schedule's time, so that a queue's figures are those of the model.
            self._finish(self._start_s + self._move.at_s)
            connection.exchange_ended(after)

    def _finish(self, now_s: float) -> None:
        self.is_over = True
        self._server.leave(self, now_s)


class _Connection(asyncio.Protocol):
    """One request at a time; a client that sends the next before the answer's end is cut off."""

    def __init__(self, server: ScriptedServer) -> None:
        self._server = server
        self._parser = httptools.HttpRequestParser(self)
        self._service: _Service | None = None
        self._url = b""
        self._request_id = ""
        self._body: list[bytes] = []
        self._num_body_bytes = 0
        self._arrival_s = 0.0
        #: Requests so far, so that an idle timer knows whether another came meanwhile.
        self._num_requests = 0
        self._is_keep_alive = True
        self.number = -1

    # --- asyncio ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are no subclass.
        self._transport = cast("asyncio.Transport", transport)
        if not self._server.connected(self):
            self.reset()
        self._watch_idleness()

    def data_received(self, data: bytes) -> None:
        self._arrival_s = time.perf_counter()
        if self._service is not None:
            self.abort()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._answer(json_response(400, error_object(str(error), "invalid_request_error")))
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.disconnected(self)
        if self._service is not None:
            self._service.abandon(time.perf_counter())
            self._service = None

    # --- httptools ---

    def on_message_begin(self) -> None:
        self._url, self._request_id, self._num_body_bytes = b"", "", 0
        self._body.clear()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 12 and name.lower() == b"x-request-id":
            self._request_id = value.decode("latin-1")

    def on_body(self, body: bytes) -> None:
        self._num_body_bytes += len(body)
        if self._num_body_bytes > MAX_BODY_BYTES:
            raise httptools.HttpParserError(f"the body is over {MAX_BODY_BYTES:,} bytes")
        self._body.append(body)

    def on_message_complete(self) -> None:
        self._num_requests += 1
        self._is_keep_alive = self._parser.should_keep_alive()
        method, path, body = self._parser.get_method(), self._url.partition(b"?")[0], b"".join(self._body)
        self._body.clear()
        try:
            if path in GENERATION_PATHS and method == b"POST":
                self._generate(path, body)
            else:
                self._answer(self._other(method, path, body))
        except BadRequest as error:
            self._answer(json_response(error.status, error_object(str(error), "invalid_request_error")))

    # --- for the service ---

    def write(self, data: bytes) -> None:
        # Between a peer's reset and `connection_lost` there may be a write due.
        if data and not self._transport.is_closing():
            self._transport.write(data)

    def exchange_ended(self, after: After) -> None:
        self._service = None
        if after is After.RESET:
            self.reset()
        elif after is After.CLOSE or not self._is_keep_alive:
            self._transport.close()
        else:
            self._watch_idleness()

    def reset(self) -> None:
        """The peer gets a TCP reset."""
        self._transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        self._transport.abort()

    def abort(self) -> None:
        self._transport.abort()

    # --- requests ---

    def _generate(self, path: bytes, body: bytes) -> None:
        server, number = self._server, self._server.log.num_requests
        entry = LogEntry(
            number=number,
            connection=self.number,
            request_id=self._request_id,
            path=path.decode(),
            arrival_s=self._arrival_s,
        )
        server.log.add(entry)
        ask = read_ask(
            body,
            server.behaviour,
            is_chat=GENERATION_PATHS[path],
            number=number,
            fault=server.draw_fault(number),
        )
        entry.fault, entry.prompt_tokens, entry.output_tokens = ask.fault, ask.prompt_tokens, ask.output_tokens
        self._service = _Service(server, self, entry, plan(ask, server.behaviour, wall_s=time.time()))
        server.admit(self._service)

    def _other(self, method: bytes, path: bytes, body: bytes) -> bytes:
        server, model = self._server, self._server.behaviour.model
        match method, path:
            case b"GET", b"/health":
                return response(200, b"", content_type="text/plain")
            case b"GET", b"/v1/models":
                card = {"id": model, "object": "model", "created": 0, "owned_by": "scripted"}
                card["max_model_len"] = server.behaviour.max_model_len
                return json_response(200, {"object": "list", "data": [card]})
            case b"GET", b"/metrics":
                return response(200, self._metrics(), content_type="text/plain; version=0.0.4; charset=utf-8")
            case b"GET", b"/script/log":
                return json_response(200, server.log.as_json())
            case b"POST", b"/tokenize":
                return json_response(200, _tokenized(read_object(body), server.behaviour))
            case _:
                raise BadRequest(404, f"no such page: {method.decode()} {path.decode('latin-1')}")

    def _metrics(self) -> bytes:
        label = f'{{model_name="{self._server.behaviour.model}"}}'
        figures = {"running": self._server.num_running, "waiting": self._server.num_waiting}
        return "".join(
            f"# TYPE vllm:num_requests_{name} gauge\nvllm:num_requests_{name}{label} {float(value)}\n"
            for name, value in figures.items()
        ).encode()

    def _answer(self, data: bytes) -> None:
        self.write(data)
        self.exchange_ended(After.END)

    def _watch_idleness(self) -> None:
        idle_ms = self._server.behaviour.idle_close_ms
        if idle_ms is None:
            return
        seen = self._num_requests

        def close_if_idle() -> None:
            if self._num_requests == seen and self._service is None:
                self._transport.close()

        self._server.ticker.at(time.perf_counter() + idle_ms / 1e3, close_if_idle)


def _tokenized(document: dict[str, object], behaviour: Behaviour) -> dict[str, object]:
    prompt = document.get("prompt")
    text = prompt if isinstance(prompt, str) else " ".join(message_texts(document.get("messages")))
    tokens = token_ids(text)
    return {"count": len(tokens), "max_model_len": behaviour.max_model_len, "tokens": tokens}
