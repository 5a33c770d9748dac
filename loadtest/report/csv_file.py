"""Every request of a report as a line of a CSV file, for spreadsheets and notebooks."""

from __future__ import annotations

import csv
import io
import math
from typing import TYPE_CHECKING

from loadtest.columns import UNKNOWN, TextColumn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from loadtest.report.document import LoadReport, ServerRun

_COLUMNS = (
    "index",
    "item",
    "turn",
    "part",
    "slo_class",
    "is_warmup",
    "outcome",
    "status",
    "detail",
    "finish_reason",
    "prompt_tokens",
    "output_tokens",
    "cancel_after_tokens",
    "answered_tokens",
    "num_chunks",
    "usage_prompt_tokens",
    "usage_output_tokens",
    "usage_cached_tokens",
    "due_s",
    "taken_s",
    "sent_s",
    "connect_s",
    "headers_s",
    "first_token_s",
    "last_token_s",
    "end_s",
    "num_retries",
    "num_stale_connections",
    "num_moves",
    "num_replays",
)
#: Property of the columns, in seconds -> column in milliseconds.
_LATENCIES = {
    "ttft_s": "ttft_ms",
    "tpot_s": "tpot_ms",
    "e2e_s": "e2e_ms",
    "longest_gap_s": "longest_gap_ms",
    "lag_s": "send_lag_ms",
}
#: A spreadsheet would take a text that begins like this for a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def requests_csv(report: LoadReport) -> str:
    """The first line names the columns; what is not known is empty. Runs stand one after the other."""
    lines = io.StringIO()
    writer = csv.writer(lines, lineterminator="\n")
    phases = sorted({name for run in report.runs for name in run.requests.server_phases_ms})
    writer.writerow(("run", *_COLUMNS, *_LATENCIES.values(), *(f"server_{name}" for name in phases)))
    for run in report.runs:
        writer.writerows(zip(*_run_columns(run, phases), strict=True))
    return lines.getvalue()


def _run_columns(run: ServerRun, phases: Iterable[str]) -> Iterator[Iterable[object]]:
    requests = run.requests
    yield [run.name] * len(requests)
    for name in _COLUMNS:
        column = getattr(requests, name)
        if isinstance(column, TextColumn):
            yield [_plain(column[row]) for row in range(len(requests))]
        else:
            yield map(_cell, column.tolist())
    for name in _LATENCIES:
        yield map(_cell, (getattr(requests, name) * 1e3).round(3).tolist())
    for name in phases:
        known = requests.server_phases_ms.get(name)
        yield [""] * len(requests) if known is None else map(_cell, known.tolist())


def _cell(value: bool | float) -> object:
    if isinstance(value, bool):
        return int(value)
    return "" if value == UNKNOWN or math.isnan(value) else value


def _plain(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA) else text
