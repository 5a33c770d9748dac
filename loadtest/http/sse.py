"""Reads server-sent events as their bytes arrive."""

from __future__ import annotations

import re

#: Of the data of one event, and of one line.
MAX_EVENT_BYTES = 4 * 1024 * 1024

_BOM = b"\xef\xbb\xbf"
_LINE_END = re.compile(rb"[\r\n]")
_CR, _LF = b"\r\n"
_FIELDS = frozenset({b"data", b"event", b"id", b"retry"})


class MalformedStream(Exception):
    """Bytes that are no event stream. `events` were complete in the same read before them."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.events: list[bytes] = []


class EventParser:
    """Incremental: any split of a stream gives the same events.

    Of an event only its data counts. Stricter than the standard in one thing: lines with fields that it does not name
    are refused, not skipped. A measurement must not lose tokens to a misspelt field without a word.
    """

    def __init__(self) -> None:
        #: What came after the last line end, and how much of it holds no line end.
        self._buffer = bytearray()
        self._num_searched = 0
        #: Values of the data lines of the event that is under way.
        self._data: list[bytes] = []
        self._num_data_bytes = 0
        #: A line ended with CR where the read ended: an LF that follows belongs to it.
        self._after_cr = False
        self._at_start = True
        self._is_between_events = True

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events that these bytes complete. Raises MalformedStream; nothing may be fed after that."""
        # What servers send, nearly always: a read of whole events, one line each.
        if self._is_between_events and data.startswith(b"data: ") and data.endswith(b"\n\n"):
            events = data[6:-2].split(b"\n\ndata: ")
            if data.count(b"\n") == 2 * len(events) and b"\r" not in data and _is_plain(data):
                self._at_start = False
                return events
        return self._feed_lines(data) if data else []

    def _feed_lines(self, data: bytes) -> list[bytes]:
        buffer = self._buffer
        buffer += data
        if self._at_start and not self._skip_bom():
            return []
        if self._after_cr:
            self._after_cr = False
            if buffer[0] == _LF:
                del buffer[0]
        events: list[bytes] = []
        try:
            self._take_lines(events)
        except MalformedStream as error:
            error.events = events
            raise
        self._is_between_events = not (buffer or self._data or self._after_cr)
        return events

    def _skip_bom(self) -> bool:
        """False: more bytes are needed to tell."""
        buffer = self._buffer
        if len(buffer) < len(_BOM) and _BOM.startswith(buffer):
            self._is_between_events = False
            return False
        self._at_start = False
        if buffer.startswith(_BOM):
            del buffer[: len(_BOM)]
        return True

    def _take_lines(self, events: list[bytes]) -> None:
        buffer = self._buffer
        begin, searched = 0, self._num_searched
        while found := _LINE_END.search(buffer, max(begin, searched)):
            end = found.start()
            line = bytes(buffer[begin:end])
            begin = end + 1
            if buffer[end] == _CR:
                if begin == len(buffer):
                    self._after_cr = True
                elif buffer[begin] == _LF:
                    begin += 1
            self._take_line(line, events)
        del buffer[:begin]
        self._num_searched = len(buffer)
        if len(buffer) > MAX_EVENT_BYTES:
            raise _too_long()

    def _take_line(self, line: bytes, events: list[bytes]) -> None:
        if not line:
            if self._data:
                events.append(b"\n".join(self._data))
                self._data.clear()
                self._num_data_bytes = 0
            return
        if len(line) > MAX_EVENT_BYTES:
            raise _too_long()
        _check_utf8(line)
        if line.startswith(b":"):
            return
        name, _, value = line.partition(b":")
        if name == b"data":
            self._num_data_bytes += len(value)
            if self._num_data_bytes > MAX_EVENT_BYTES:
                raise _too_long()
            self._data.append(value.removeprefix(b" "))
        elif name not in _FIELDS:
            raise MalformedStream(f"no line of an event stream: {line[:200]!r}")


def _is_plain(data: bytes) -> bool:
    """Whether nothing in it can be wrong: short enough, and UTF-8."""
    if len(data) > MAX_EVENT_BYTES:
        return False
    if data.isascii():
        return True
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _check_utf8(line: bytes) -> None:
    if line.isascii():
        return
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise MalformedStream(f"not UTF-8 at byte {error.start} of the line {line[:200]!r}") from error


def _too_long() -> MalformedStream:
    return MalformedStream(f"a line, or the data of an event, of more than {MAX_EVENT_BYTES} bytes")
