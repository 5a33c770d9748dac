"""Records and reports as a load test leaves them, made without a server: a queue before so many slots, failures,
cancellations.
"""

from __future__ import annotations

import heapq
import math
from array import array
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from loadtest.record import Outcome, RequestRecord
from loadtest.report.document import LoadReport, ServerRun
from loadtest.settings import Target
from loadtest.validity import ClientUsage
from workload.figures import summarise
from workload.slo import SloClass

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loadtest.report.compare import Comparison
    from loadtest.report.document import Beside, RateResult, ServerGauges
    from workload.goodput import GoodputSearch

SLOS = (SloClass("interactive", 400.0, 40.0), SloClass("batch", 4_000.0, 60.0))

#: Share of the requests, status, what the server said.
_FAILURES = {
    Outcome.REJECTED: (0.010, 429, "the queue is full"),
    Outcome.RESET_MID_STREAM: (0.008, 200, "Connection reset by peer"),
    Outcome.TIMEOUT: (0.006, 200, ""),
    Outcome.HTTP_5XX: (0.004, 500, "<b>engine</b> died & left"),
    Outcome.REFUSED: (0.002, None, "Connection refused"),
}


def record(
    due_s: float = 0.0,
    chunk_s: Sequence[float] = (),
    *,
    index: int = 0,
    outcome: Outcome = Outcome.FINISHED,
    end_s: float | None = None,
    taken_s: float | None = None,
    part: int = 0,
    slo_class: str = "interactive",
    prompt_tokens: int = 100,
    output_tokens: int | None = None,
    usage: tuple[int, int] | None = None,
    is_warmup: bool = False,
    detail: str = "",
) -> RequestRecord:
    """One by hand: it ends with its last chunk, is as long as planned, and is sent as soon as it is taken up, when it
    is due, unless told otherwise.
    """
    return RequestRecord(
        index=index,
        item=index,
        turn=0,
        slo_class=slo_class,
        prompt_tokens=prompt_tokens,
        output_tokens=len(chunk_s) if output_tokens is None else output_tokens,
        is_warmup=is_warmup,
        part=part,
        due_s=due_s,
        taken_s=due_s if taken_s is None else taken_s,
        sent_s=due_s if taken_s is None else taken_s,
        headers_s=due_s if taken_s is None else taken_s,
        chunk_s=array("d", chunk_s),
        end_s=end_s if end_s is not None else chunk_s[-1] if chunk_s else math.nan,
        outcome=outcome,
        usage_prompt_tokens=None if usage is None else usage[0],
        usage_output_tokens=None if usage is None else usage[1],
        detail=detail,
    )


class Server(NamedTuple):
    """A server that is not there: `num_slots` requests run at a time, the others wait in order."""

    num_slots: int = 24
    prefill_s_per_token: float = 2e-4
    itl_s: float = 0.02


def served(
    num_requests: int, rate_rps: float, *, seed: int, server: Server | None = None, failures: bool = True
) -> list[RequestRecord]:
    """Of Poisson arrivals in two classes, the first tenth warm-up. Equal seeds ask the same, whatever the server."""
    server = server or Server()
    asked = np.random.default_rng(seed)
    due_s = np.cumsum(asked.exponential(1 / rate_rps, num_requests))
    prompts = np.clip(asked.lognormal(5.8, 0.9, num_requests), 8, 8000).astype(int)
    outputs = np.clip(asked.lognormal(4.0, 0.7, num_requests), 2, 400).astype(int)
    is_batch = asked.random(num_requests) < 0.3
    fate = asked.random((2, num_requests))
    noise = np.random.default_rng((seed, server.num_slots))
    free_s = [0.0] * server.num_slots
    records: list[RequestRecord] = []
    for index in range(num_requests):
        record = RequestRecord(
            index=index,
            item=index,
            turn=0,
            slo_class="batch" if is_batch[index] else "interactive",
            prompt_tokens=int(prompts[index]),
            output_tokens=int(outputs[index]),
            is_warmup=index < num_requests // 10,
            due_s=float(due_s[index]),
        )
        records.append(record)
        _serve(record, server, free_s, noise)
        if failures:
            _spoil(record, float(fate[0, index]), cancelled=float(fate[1, index]) < 0.03)
    return records


def _serve(record: RequestRecord, server: Server, free_s: list[float], noise: np.random.Generator) -> None:
    lag_s, connect_s = noise.exponential(2e-4), noise.exponential(4e-4)
    record.connect_s = connect_s if noise.random() < 0.1 else math.nan
    record.taken_s = record.due_s + lag_s
    record.sent_s = record.taken_s + (connect_s if record.connect_s == connect_s else 0.0)
    record.headers_s = record.sent_s + 0.001
    start_s = max(record.headers_s, heapq.heappop(free_s))
    first_s = start_s + 0.01 + record.prompt_tokens * server.prefill_s_per_token * noise.lognormal(0, 0.1)
    gaps_s = server.itl_s * noise.lognormal(0, 0.25, record.output_tokens - 1)
    record.chunk_s = array("d", first_s + np.cumsum([0.0, *gaps_s]))
    record.end_s = record.chunk_s[-1] + 0.0005
    heapq.heappush(free_s, record.end_s)
    record.outcome, record.status, record.finish_reason = Outcome.FINISHED, 200, "length"
    record.usage_prompt_tokens, record.usage_output_tokens = record.prompt_tokens, record.output_tokens
    record.usage_cached_tokens = record.prompt_tokens // 4
    record.server_phases_ms = {
        "queue_ms": (start_s - record.headers_s) * 1e3,
        "prefill_ms": (first_s - start_s) * 1e3,
    }
    record.num_moves, record.num_replays = int(record.index % 10 == 3), 2 * int(record.index % 50 == 7)


def _spoil(record: RequestRecord, fate: float, *, cancelled: bool) -> None:
    for outcome, (share, status, detail) in _FAILURES.items():
        if fate < share:
            num_chunks = len(record.chunk_s) // 2 if status == 200 else 0
            _cut(record, num_chunks)
            record.outcome, record.status, record.detail = outcome, status, detail
            if status is None:
                record.sent_s = record.headers_s = record.connect_s = math.nan
            return
        fate -= share
    if cancelled:
        record.cancel_after_tokens = max(1, len(record.chunk_s) // 3)
        _cut(record, record.cancel_after_tokens)
        record.outcome = Outcome.CANCELLED


def _cut(record: RequestRecord, num_chunks: int) -> None:
    """The answer ends after so many chunks, and says nothing of itself."""
    del record.chunk_s[num_chunks:]
    record.end_s = record.chunk_s[-1] if num_chunks else record.headers_s
    record.finish_reason = record.usage_prompt_tokens = record.usage_output_tokens = record.usage_cached_tokens = None
    record.server_phases_ms = record.num_moves = record.num_replays = None


def make_run(
    records: Sequence[RequestRecord],
    *,
    name: str = "server",
    cpu_share: float = 0.5,
    gauges: ServerGauges | None = None,
    search: GoodputSearch | None = None,
    rates: tuple[RateResult, ...] = (),
    notes: tuple[str, ...] = (),
) -> ServerRun:
    """By a client that was never late."""
    return ServerRun.of(
        Target(name=name, base_url="http://127.0.0.1:8000", model="tiny", endpoint="completions"),
        records,
        SLOS,
        client=ClientUsage(cpu_share=cpu_share, loop_delay=summarise(np.full(100, 0.0005))),
        max_lag_ms=10.0,
        gauges=gauges,
        search=search,
        rates=rates,
        notes=notes,
    )


def make_report(
    *runs: ServerRun,
    digest: str = "5ca1ab1e",
    workload: str = "requests made by hand",
    comparisons: tuple[Comparison, ...] = (),
    beside: tuple[Beside, ...] = (),
    warnings: tuple[str, ...] = ("mind this",),
) -> LoadReport:
    return LoadReport(
        loadtest={"command": "tandem loadtest http://127.0.0.1:8000", "settings": {"concurrency": None}},
        workload=workload,
        workload_digest=digest,
        slos=SLOS,
        runs=runs,
        comparisons=comparisons,
        beside=beside,
        warnings=warnings,
    )
