"""Replay of public request traces: Mooncake (JSON lines), Azure LLM inference and BurstGPT (CSV)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING

from contracts.errors import ConfigError
from workload.request import WorkloadRequest
from workload.trace_rows import CONVERSATIONS, MOONCAKE_BLOCK_TOKENS, TraceKind, TraceRow, detect, rows

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

#: A trace is held in memory, about 0.2 kB a request without hash ids; the largest public one has 10 million.
MAX_ROWS = 12_000_000

#: Rows that are written when requests end, or by several writers, are out of order by seconds. More is two
#: traces in one file, or a clock that was set.
MAX_DISORDER_S = 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceSummary:
    """What stood in a trace file, and what was made of it."""

    kind: TraceKind
    num_rows: int
    num_requests: int
    #: Rows left out because they have no prompt.
    num_without_prompt: int
    #: Rows left out because they have no output: BurstGPT writes failed requests so.
    num_without_output: int
    #: Rows that came earlier than the row before them in the file.
    num_out_of_order: int
    #: From the first arrival to the last.
    duration_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Trace:
    """A trace read: its requests by arrival, the first at 0 s; rows of one instant in the order of the file."""

    requests: tuple[WorkloadRequest, ...]
    summary: TraceSummary


def read_trace(path: Path, kind: TraceKind | None = None) -> Trace:
    """Reads the whole file; `kind` None tells the format from the first line. Raises as `parse_trace`."""
    return parse_trace(str(path), read_bytes(path), kind)


def read_bytes(path: Path) -> bytes:
    """The whole file, or pipe. Raises ConfigError where it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(f"trace {path}: cannot be read: {error.strerror}") from error


def parse_trace(name: str, text: bytes, kind: TraceKind | None = None) -> Trace:
    """The requests in the text of a file called `name`; `kind` None tells the format from the first line.

    Rows without prompt or output tokens are left out and counted. Rows out of order by up to `MAX_DISORDER_S` are
    sorted. Raises ConfigError `file:line: what` for a bad row, more disorder, more than `MAX_ROWS` rows, no request at
    all, or a file of conversations, which come at no time of their own.
    """
    told = kind or detect(name, text)
    if told == CONVERSATIONS:
        raise ConfigError(f"trace {name}: holds conversations without times, not requests")
    return _trace(name, told, rows(name, text, told))


def _trace(name: str, kind: TraceKind, read: Iterable[TraceRow]) -> Trace:
    requests: list[WorkloadRequest] = []
    hash_block_tokens = MOONCAKE_BLOCK_TOKENS if kind == "mooncake" else 0
    num_rows = num_out_of_order = num_without_prompt = num_without_output = 0
    latest_s = previous_s = -math.inf
    for row in read:
        num_rows += 1
        _check(name, row, num_rows, latest_s)
        num_out_of_order += row.time_s < previous_s
        previous_s = row.time_s
        latest_s = max(latest_s, previous_s)
        if row.prompt_tokens == 0:
            num_without_prompt += 1
        elif row.output_tokens == 0:
            num_without_output += 1
        else:
            requests.append(
                WorkloadRequest(row.time_s, row.prompt_tokens, row.output_tokens, row.hash_ids, hash_block_tokens)
            )
    if not requests:
        raise ConfigError(f"trace {name}: no request in {num_rows} rows")
    if num_out_of_order:
        requests.sort(key=attrgetter("arrival_s"))
    _begin_at_zero(requests)
    summary = TraceSummary(
        kind=kind,
        num_rows=num_rows,
        num_requests=len(requests),
        num_without_prompt=num_without_prompt,
        num_without_output=num_without_output,
        num_out_of_order=num_out_of_order,
        duration_s=requests[-1].arrival_s,
        prompt_tokens=sum(request.prompt_tokens for request in requests),
        output_tokens=sum(request.output_tokens for request in requests),
    )
    return Trace(tuple(requests), summary)


def _check(name: str, row: TraceRow, num_rows: int, latest_s: float) -> None:
    if not math.isfinite(row.time_s):
        raise ConfigError(f"{name}:{row.line}: the time must be finite, got {row.time_s}")
    if row.time_s < latest_s - MAX_DISORDER_S:
        raise ConfigError(
            f"{name}:{row.line}: {latest_s - row.time_s:.3f} s earlier than a row before it; "
            f"only disorder of up to {MAX_DISORDER_S:.0f} s is sorted"
        )
    if num_rows > MAX_ROWS:
        raise ConfigError(f"{name}:{row.line}: more than {MAX_ROWS} rows; split the trace")


def _begin_at_zero(requests: list[WorkloadRequest]) -> None:
    """Counts the ordered arrivals from the first, in whole microseconds; in place, since there may be millions."""
    origin_s = requests[0].arrival_s
    for index, request in enumerate(requests):
        requests[index] = WorkloadRequest(round(request.arrival_s - origin_s, 6), *request[1:])
