"""One process's log: a file of bounded size, and its last lines in memory for error messages.

A disk that is full, or a folder that went away, costs lines and never a process: what could not be written is
counted, said once, and the next line is tried again.
"""

from __future__ import annotations

import contextlib
from collections import deque
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

#: The file is renamed to `NAME.log.1` when it is larger; at most two of them exist.
MAX_LOG_BYTES = 16 << 20

#: Longer lines are cut into pieces of this size.
MAX_LINE_BYTES = 16 << 10

TAIL_LINES = 40


class LineSink(Protocol):
    def write(self, line: bytes) -> None:
        """Takes one line without its end. Never raises."""
        ...


class LineSplitter:
    """Cuts a byte stream into lines of at most `MAX_LINE_BYTES`, without their ends."""

    def __init__(self) -> None:
        #: The unfinished last line, at most MAX_LINE_BYTES long.
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        *complete, rest = (self._rest + data).split(b"\n")
        lines = [piece for line in complete for piece in _pieces(line)]
        *full, self._rest = _pieces(rest)
        return lines + full

    def finish(self) -> list[bytes]:
        """The last line, if its end never came."""
        rest, self._rest = self._rest, b""
        return [rest] if rest else []


def _pieces(line: bytes) -> list[bytes]:
    return [line[at : at + MAX_LINE_BYTES] for at in range(0, len(line), MAX_LINE_BYTES)] or [b""]


class ProcessLog:
    def __init__(self, path: Path, say: Callable[[str], None], *, max_bytes: int = MAX_LOG_BYTES) -> None:
        self.path = path
        self._say = say
        self._max_bytes = max_bytes
        #: The last lines of all lives, newest last.
        self._tail: deque[str] = deque(maxlen=TAIL_LINES)
        #: Lines that reached no file since the last one that did.
        self._lost_lines = 0

    def write(self, line: bytes) -> None:
        self._tail.append(line.decode("utf-8", "replace"))
        try:
            self._append(line + b"\n")
        except OSError as error:
            if self._lost_lines == 0:
                self._say(f"cannot write {self.path}: {error.strerror}; logging in memory only")
            self._lost_lines += 1
        else:
            self._lost_lines = 0

    def tail(self, num_lines: int = TAIL_LINES) -> list[str]:
        return list(self._tail)[-num_lines:]

    def _append(self, data: bytes) -> None:
        """Opens for each write: survives a log folder that is emptied or rotated from outside."""
        if self.path.exists() and self.path.stat().st_size + len(data) > self._max_bytes:
            self.path.replace(self.path.with_name(self.path.name + ".1"))
        with self.path.open("ab", buffering=0) as file:
            file.write(data)


class StreamLog:
    """A log that is somebody else's to keep: lines to a text stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, line: bytes) -> None:
        with contextlib.suppress(OSError):
            print(line.decode("utf-8", "replace"), file=self._stream, flush=True)
