"""What the server really did, on its own clock: what clients' figures are held against."""

from __future__ import annotations

import math
from array import array
from collections import deque
from dataclasses import dataclass, field
from typing import Any


def _times() -> array[float]:
    return array("d")


@dataclass(slots=True, kw_only=True)
class LogEntry:
    """One generation request. Times are `time.perf_counter()`, which all processes on Linux share; NaN: never."""

    #: Counted from 0 over the server's life, in order of arrival.
    number: int
    #: Of connections, counted likewise.
    connection: int
    #: The request's header `x-request-id`, or empty.
    request_id: str
    path: str
    fault: str | None = None
    #: Zero, and `status` 400 or so, where the request was refused.
    prompt_tokens: int = 0
    output_tokens: int = 0
    #: Its last bytes were read.
    arrival_s: float
    #: It had waited its turn.
    start_s: float = math.nan
    #: The first byte of the response was written.
    headers_s: float = math.nan
    #: Each write that had tokens, and how many it had.
    chunk_s: array[float] = field(default_factory=_times)
    chunk_tokens: array[int] = field(default_factory=lambda: array("I"))
    #: The last byte of the response was written, or the connection was broken by the script.
    end_s: float = math.nan
    #: The client went away before that.
    left_s: float = math.nan

    def as_json(self) -> dict[str, Any]:
        return {
            "number": self.number,
            "connection": self.connection,
            "request_id": self.request_id,
            "path": self.path,
            "fault": self.fault,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "arrival_s": self.arrival_s,
            "start_s": _known(self.start_s),
            "headers_s": _known(self.headers_s),
            "chunk_s": self.chunk_s.tolist(),
            "chunk_tokens": self.chunk_tokens.tolist(),
            "end_s": _known(self.end_s),
            "left_s": _known(self.left_s),
        }


class Log:
    """The last `max_entries` requests."""

    def __init__(self, max_entries: int) -> None:
        self.entries: deque[LogEntry] = deque(maxlen=max_entries)
        self.num_requests = 0
        self.num_connections = 0

    def add(self, entry: LogEntry) -> None:
        self.entries.append(entry)
        self.num_requests += 1

    def as_json(self) -> dict[str, Any]:
        return {
            "num_requests": self.num_requests,
            "num_connections": self.num_connections,
            "num_forgotten": self.num_requests - len(self.entries),
            "requests": [entry.as_json() for entry in self.entries],
        }


def _known(time_s: float) -> float | None:
    return None if math.isnan(time_s) else time_s
