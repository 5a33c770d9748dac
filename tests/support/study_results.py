"""Results of capacity studies made by hand: what a report says of them is known."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from contracts.latency_models import DISTSERVE_OPT
from contracts.transfer_models import LinkTransfer
from simulator.heap.histogram import Histogram
from simulator.heap.results import Outcome, RequestColumns, StudyResult, TimeLine, WorkerUsage
from simulator.heap.spec import StudySpec, WorkerGroup

LATENCY = DISTSERVE_OPT["opt-13b-tp1"]


class Row(NamedTuple):
    """One request; times in seconds since its arrival, NaN where it did not come so far."""

    arrival_s: float
    ttft_s: float = math.nan
    e2e_s: float = math.nan
    output_tokens: int = 11
    outcome: Outcome = Outcome.FINISHED
    slo_class: int = 0
    prompt_tokens: int = 100
    queue_s: float = 0.0
    second_token_gap_s: float = math.nan
    transfer_s: float = 0.0
    predicted_ttft_s: float = math.nan
    predicted_tpot_s: float = math.nan
    cached_tokens: int = 0
    fetched_tokens: int = 0
    fetch_s: float = 0.0
    refusal: int = -1


def make_result(
    *rows: Row,
    slo_classes: tuple[str, ...] = ("interactive",),
    duration_s: float = 100.0,
    transfer_bytes: int = 0,
    gaps_s: tuple[float, ...] = (),
) -> StudyResult:
    """Two prefill workers of one device and one decode worker of two."""
    itl_s = Histogram()
    for gap_s in gaps_s:
        itl_s.add(gap_s)
    at_s = np.arange(1.0, 11.0)
    return StudyResult(
        spec=make_spec(),
        requests=_columns(rows),
        slo_classes=slo_classes,
        itl_s=itl_s,
        workers=(
            _usage("prefill-0", busy_s=50.0, steps=10, prefill_tokens=1000, peak_blocks=40, mean_blocks=10.0),
            _usage("prefill-1", busy_s=30.0, steps=10, prefill_tokens=2000, peak_blocks=80, mean_blocks=30.0),
            _usage("decode-0", busy_s=90.0, steps=50, decode_tokens=400, peak_blocks=200, mean_blocks=50.0),
        ),
        time_line=TimeLine(
            at_s=at_s,
            prompts=np.arange(10, dtype=np.int32),
            answers=np.arange(10, dtype=np.int32),
            preempted=np.zeros(10, np.int32),
            prefill_busy=np.full(10, 0.4, np.float32),
            decode_busy=np.full(10, 0.9, np.float32),
            blocks_used=np.linspace(0, 1, 10, dtype=np.float32),
            prefill_load=np.full(10, np.nan, np.float32),
            decode_load=np.full(10, np.nan, np.float32),
        ),
        transfer_bytes=transfer_bytes,
        stored_bytes=0,
        fetched_bytes=sum(row.fetched_tokens for row in rows) * 1000,
        duration_s=duration_s,
        num_events=123,
        num_steps=70,
    )


def make_spec() -> StudySpec:
    return StudySpec(
        groups=(
            WorkerGroup(name="prefill", role="prefill", count=2, latency=LATENCY, num_blocks=100),
            WorkerGroup(name="decode", role="decode", count=1, latency=LATENCY, num_blocks=200, num_devices=2),
        ),
        transfer=LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=50e9),
        kv_token_bytes=1000,
    )


def _columns(rows: tuple[Row, ...]) -> RequestColumns:
    def float64(values: list[float]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        return np.array(values, np.float64)

    return RequestColumns(
        arrival_s=float64([row.arrival_s for row in rows]),
        prompt_tokens=np.array([row.prompt_tokens for row in rows], np.int32),
        output_tokens=np.array([row.output_tokens for row in rows], np.int32),
        outcome=np.array([row.outcome for row in rows], np.int8),
        prefill_worker=np.zeros(len(rows), np.int32),
        decode_worker=np.full(len(rows), 2, np.int32),
        started_s=float64([row.arrival_s + row.queue_s for row in rows]),
        first_token_s=float64([row.arrival_s + row.ttft_s for row in rows]),
        second_token_s=float64([row.arrival_s + row.ttft_s + row.second_token_gap_s for row in rows]),
        finished_s=float64([row.arrival_s + row.e2e_s for row in rows]),
        transfer_s=np.array([row.transfer_s for row in rows], np.float32),
        preemptions=np.zeros(len(rows), np.int16),
        slo_class=np.array([row.slo_class for row in rows], np.int16),
        predicted_ttft_s=float64([row.predicted_ttft_s for row in rows]),
        predicted_tpot_s=float64([row.predicted_tpot_s for row in rows]),
        cached_tokens=np.array([row.cached_tokens for row in rows], np.int32),
        fetched_tokens=np.array([row.fetched_tokens for row in rows], np.int32),
        fetch_s=np.array([row.fetch_s for row in rows], np.float32),
        refusal=np.array([row.refusal for row in rows], np.int8),
    )


def _usage(
    worker_id: str,
    *,
    busy_s: float,
    steps: int,
    peak_blocks: int,
    mean_blocks: float,
    prefill_tokens: int = 0,
    decode_tokens: int = 0,
) -> WorkerUsage:
    return WorkerUsage(
        worker_id=worker_id,
        role="decode" if worker_id.startswith("decode") else "prefill",
        busy_s=busy_s,
        steps=steps,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        cached_tokens=0,
        fetched_blocks=0,
        peak_blocks=peak_blocks,
        mean_blocks=mean_blocks,
        preemptions=0,
    )
