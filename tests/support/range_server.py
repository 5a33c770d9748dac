"""A web server that answers ranges of a few files, and misbehaves as its script says.

with range_server({"a.bin": data}) as server:
    server.script += [Act.STATUS_503, Act.STALL]     # the next GETs of files, in order; then it behaves
"""

from __future__ import annotations

import re
import threading
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

if TYPE_CHECKING:
    from collections.abc import Generator

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")


class Act(Enum):
    """What it does with one GET."""

    SERVE = "serve"
    #: All of the file, with status 200.
    WHOLE = "whole"
    #: Half of what it announced, then the connection ends.
    TRUNCATE = "truncate"
    #: Half of what it announced, then nothing.
    STALL = "stall"
    #: Announces ten bytes fewer than asked for, and sends those.
    SHORT = "short"
    #: Announces ten bytes more than it has.
    LONG = "long"
    #: Bytes of another place, and says so.
    OTHER_RANGE = "other range"
    #: Under another tag, whatever was asked for.
    OTHER_TAG = "other tag"
    #: The connection ends without a word.
    RESET = "reset"
    STATUS_404 = "404"
    STATUS_403 = "403"
    STATUS_412 = "412"
    STATUS_429 = "429"
    STATUS_500 = "500"
    STATUS_503 = "503"


@dataclass(slots=True)
class Served:
    """One file. Whoever changes `data` changes `tag`."""

    data: bytes
    tag: str | None = '"1"'


@dataclass(slots=True)
class RangeServer:
    files: dict[str, Served]
    port: int = 0
    #: What it does with the next GETs; later ones get `then`.
    script: list[Act] = field(default_factory=list[Act])
    then: Act = Act.SERVE
    #: By file: ranges that were asked for with GET, None for the whole.
    asked: list[tuple[str, tuple[int, int] | None]] = field(default_factory=list[tuple[str, tuple[int, int] | None]])
    #: Tags that GETs insisted on.
    insisted: list[str | None] = field(default_factory=list[str | None])
    #: Bytes of files that were sent.
    sent_bytes: int = 0
    #: Set at the end: stalls end.
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/models/m"

    def act(self) -> Act:
        with self.lock:
            return self.script.pop(0) if self.script else self.then


@contextmanager
def range_server(files: dict[str, bytes]) -> Generator[RangeServer]:
    state = RangeServer({name: Served(data) for name, data in files.items()})

    class Handler(_Handler):
        served = state

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.port = server.server_port
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    served: RangeServer

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Nobody reads it."""

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            # Readers break off; that is what they are here for.
            self.close_connection = True

    def do_HEAD(self) -> None:
        file = self._file()
        if file is None:
            self._status(404)
            return
        self._head(200, file, len(file.data))

    def do_GET(self) -> None:
        file = self._file()
        found = _RANGE.fullmatch(self.headers.get("Range", ""))
        bounds = None if found is None else (int(found[1]), int(found[2]) + 1)
        with self.served.lock:
            self.served.asked.append((self._name(), bounds))
            self.served.insisted.append(self.headers.get("If-Match"))
        act = self.served.act()
        if act.value.isdigit():
            self._status(int(act.value))
        elif act is Act.RESET:
            self._hang_up()
        elif file is None:
            self._status(404)
        elif self.headers.get("If-Match", file.tag) != file.tag:
            self._status(412)
        else:
            self._send(act, file, bounds)

    def _send(self, act: Act, file: Served, bounds: tuple[int, int] | None) -> None:
        size = len(file.data)
        if bounds is None or act is Act.WHOLE:
            self._head(200, file, size)
            self._write(file.data)
            return
        start, stop = bounds[0], min(bounds[1], size)
        if act is Act.SHORT:
            stop -= 10
        if act is Act.OTHER_RANGE:
            start, stop = start + 1, stop + 1
        data = file.data[start:stop]
        told = Served(file.data, '"other"') if act is Act.OTHER_TAG else file
        # A range that says that it is whole while its length says otherwise.
        shown = (start, stop + 10 if act is Act.SHORT else stop)
        self._head(206, told, len(data) + (10 if act is Act.LONG else 0), shown)
        if act in (Act.TRUNCATE, Act.STALL):
            self._write(data[: len(data) // 2])
            if act is Act.STALL:
                self.served.ended.wait()
            self._hang_up()
            return
        self._write(data)
        if act is Act.LONG:
            self._hang_up()

    def _head(self, status: int, file: Served, num_bytes: int, bounds: tuple[int, int] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(num_bytes))
        self.send_header("Last-Modified", "Wed, 21 Oct 2015 07:28:00 GMT")
        if file.tag is not None:
            self.send_header("ETag", file.tag)
        if bounds is not None:
            self.send_header("Content-Range", f"bytes {bounds[0]}-{bounds[1] - 1}/{len(file.data)}")
        self.end_headers()

    def _status(self, status: int) -> None:
        self.send_response(status)
        if status in (429, 503):
            self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _write(self, data: bytes) -> None:
        for start in range(0, len(data), 1 << 16):
            piece = data[start : start + (1 << 16)]
            self.wfile.write(piece)
            with self.served.lock:
                self.served.sent_bytes += len(piece)

    def _hang_up(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        self.connection.shutdown(2)

    def _name(self) -> str:
        return unquote(self.path).removeprefix("/models/m/")

    def _file(self) -> Served | None:
        return self.served.files.get(self._name())
