"""The figures of a capacity study, from the rows that the event heap leaves. Pure; a million rows take a second.

A request attains its SLO when it finished and both its TTFT and its TPOT are within the targets. Requests that were
refused, given up or failed count as missed in every attainment. TPOT is the mean time of an answer's tokens after the
first; an answer of one token has none and meets any target.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import ConfigError
from simulator.heap.results import REFUSALS, Outcome
from workload.figures import Attainment, LatencySummary, summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from contracts.messages import Role
    from simulator.heap.histogram import Histogram
    from simulator.heap.results import RequestColumns, StudyResult, WorkerUsage
    from simulator.heap.spec import WorkerGroup
    from workload.slo import SloClass


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolUsage:
    """The workers of one group together."""

    name: str
    role: Role
    num_workers: int
    num_devices: int
    #: Share of the study's time that its workers spent in steps.
    busy_share: float
    num_steps: int
    prefill_tokens: int
    decode_tokens: int
    prefill_tokens_per_step: float
    #: Answers that wrote a token in a step, on average: the decode batch.
    decodes_per_step: float
    #: Of the KV blocks: time-weighted mean over the workers, and the highest of any.
    mean_kv_share: float
    peak_kv_share: float
    num_preemptions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferUsage:
    """KV that went from prefill to decode workers."""

    num_transfers: int
    total_bytes: int
    mean_ms: float
    #: Over the whole study.
    mean_bytes_per_s: float
    #: While a transfer was on the wire, of one.
    mean_flow_bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixUsage:
    """What prompts found in the prefix caches of their workers, as shares of all prompt tokens that were read."""

    cached_share: float
    #: Of these: copied from another worker for the prompt.
    fetched_share: float
    num_fetches: int
    fetched_bytes: int
    #: From asking for a prefix to having it.
    mean_fetch_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PredictionErrors:
    """What the coordinator expected of requests that finished, less what came: seconds; NaN where it expected
    nothing. Medians tell the bias, the shares how many came later than expected."""

    ttft_median_s: float
    ttft_p90_abs_s: float
    ttft_later_share: float
    tpot_median_s: float
    tpot_p90_abs_s: float
    tpot_later_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyMetrics:
    num_requests: int
    num_finished: int
    num_rejected: int
    #: By the reason that was given last.
    rejected_for: dict[str, int]
    num_timed_out: int
    num_failed: int
    num_preemptions: int
    num_devices: int
    #: From the first arrival to the last; the study's duration where all came at once.
    offered_s: float
    #: To the end of the last request.
    duration_s: float
    offered_rps: float
    #: Requests a second, of those offered, that met both targets.
    goodput_rps: float
    goodput_per_device_rps: float
    #: Over all requests, each against its own class.
    attainment: Attainment
    classes: tuple[Attainment, ...]
    ttft: LatencySummary
    tpot: LatencySummary
    itl: LatencySummary
    e2e: LatencySummary
    #: From the arrival to the begin of the first step.
    queue: LatencySummary
    #: From the first token to the second: what a client sees of the handoff, where there is one.
    second_token: LatencySummary
    #: Of finished requests, over the whole study.
    prompt_tokens_per_s: float
    output_tokens_per_s: float
    pools: tuple[PoolUsage, ...]
    transfer: TransferUsage
    prefixes: PrefixUsage
    predictions: PredictionErrors


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLatencies:
    """Seconds for each request, in order of arrival; NaN where it did not come so far."""

    ttft_s: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    e2e_s: NDArray[np.float64]
    queue_s: NDArray[np.float64]
    second_token_gap_s: NDArray[np.float64]
    finished: NDArray[np.bool_]
    #: Within the targets; False unless finished.
    met_ttft: NDArray[np.bool_]
    met_tpot: NDArray[np.bool_]

    @property
    def met(self) -> NDArray[np.bool_]:
        return self.met_ttft & self.met_tpot


def targets_by_class(slo_classes: Sequence[str], slos: Sequence[SloClass]) -> tuple[SloClass, ...]:
    """The SLO of each class of a result. Raises ConfigError for a class without one."""
    by_name = {slo.name: slo for slo in slos}
    missing = sorted(set(slo_classes) - set(by_name))
    if missing:
        raise ConfigError(f"no SLO is given for the class {missing[0]!r}; there are {', '.join(sorted(by_name))}")
    return tuple(by_name[name] for name in slo_classes)


def request_latencies(result: StudyResult, slos: Sequence[SloClass]) -> RequestLatencies:
    """Raises ConfigError as `targets_by_class`."""
    rows = result.requests
    targets = targets_by_class(result.slo_classes, slos)
    finished = rows.outcome == Outcome.FINISHED
    ttft_s = rows.first_token_s - rows.arrival_s
    gaps = np.maximum(rows.output_tokens - 1, 1)
    tpot_s = np.where(finished & (rows.output_tokens > 1), (rows.finished_s - rows.first_token_s) / gaps, np.nan)
    ttft_target_s = np.array([slo.ttft_ms / 1e3 for slo in targets])[rows.slo_class]
    tpot_target_s = np.array([slo.tpot_ms / 1e3 for slo in targets])[rows.slo_class]
    return RequestLatencies(
        ttft_s=ttft_s,
        tpot_s=tpot_s,
        e2e_s=np.where(finished, rows.finished_s - rows.arrival_s, np.nan),
        queue_s=rows.started_s - rows.arrival_s,
        second_token_gap_s=rows.second_token_s - rows.first_token_s,
        finished=finished,
        met_ttft=finished & (ttft_s <= ttft_target_s),
        met_tpot=finished & ((rows.output_tokens == 1) | (tpot_s <= tpot_target_s)),
    )


def measure(result: StudyResult, slos: Sequence[SloClass]) -> StudyMetrics:
    """Everything that a report tells. Raises ConfigError as `targets_by_class`, ValueError without a request."""
    rows = result.requests
    if len(rows.arrival_s) == 0:
        raise ValueError("a study without requests has no figures")
    latencies = request_latencies(result, slos)
    attainment = _attainment("all", slos[0] if len(slos) == 1 else None, latencies, np.ones_like(latencies.finished))
    offered_s, offered_rps = _offered(rows, result)
    goodput_rps = offered_rps * attainment.joint
    num_outcomes = np.bincount(rows.outcome, minlength=len(Outcome))
    return StudyMetrics(
        num_requests=len(rows.arrival_s),
        num_finished=int(num_outcomes[Outcome.FINISHED]),
        num_rejected=int(num_outcomes[Outcome.REJECTED]),
        rejected_for=_rejected_for(rows),
        num_timed_out=int(num_outcomes[Outcome.TIMED_OUT]),
        num_failed=int(num_outcomes[Outcome.FAILED]),
        num_preemptions=int(rows.preemptions.sum()),
        num_devices=result.spec.num_devices,
        offered_s=offered_s,
        duration_s=result.duration_s,
        offered_rps=offered_rps,
        goodput_rps=goodput_rps,
        goodput_per_device_rps=goodput_rps / result.spec.num_devices,
        attainment=attainment,
        classes=_by_class(result, slos, latencies),
        ttft=summarise(latencies.ttft_s),
        tpot=summarise(latencies.tpot_s),
        itl=_histogram_summary(result.itl_s),
        e2e=summarise(latencies.e2e_s),
        queue=summarise(latencies.queue_s),
        second_token=summarise(latencies.second_token_gap_s),
        prompt_tokens_per_s=_total(rows.prompt_tokens, latencies.finished) / result.duration_s,
        output_tokens_per_s=_total(rows.output_tokens, latencies.finished) / result.duration_s,
        pools=tuple(_pool(group, result) for group in result.spec.groups),
        transfer=_transfer(rows, result),
        prefixes=_prefixes(rows, result),
        predictions=_predictions(rows, latencies),
    )


def _offered(rows: RequestColumns, result: StudyResult) -> tuple[float, float]:
    """Seconds over which the workload was offered, and its mean rate: gaps over the time from first to last."""
    span_s = float(rows.arrival_s[-1] - rows.arrival_s[0])
    if span_s > 0:
        return span_s, (len(rows.arrival_s) - 1) / span_s
    return result.duration_s, len(rows.arrival_s) / result.duration_s


def _attainment(name: str, slo: SloClass | None, latencies: RequestLatencies, chosen: NDArray[np.bool_]) -> Attainment:
    count = int(chosen.sum())

    def share(met: NDArray[np.bool_]) -> float:
        return int((met & chosen).sum()) / count if count else math.nan

    return Attainment(
        name=name,
        ttft_target_ms=None if slo is None else slo.ttft_ms,
        tpot_target_ms=None if slo is None else slo.tpot_ms,
        num_requests=count,
        joint=share(latencies.met),
        ttft_only=share(latencies.met_ttft),
        tpot_only=share(latencies.met_tpot),
    )


def _by_class(result: StudyResult, slos: Sequence[SloClass], latencies: RequestLatencies) -> tuple[Attainment, ...]:
    targets = targets_by_class(result.slo_classes, slos)
    named = zip(result.slo_classes, targets, strict=True)
    return tuple(
        _attainment(name, slo, latencies, result.requests.slo_class == index) for index, (name, slo) in enumerate(named)
    )


def _histogram_summary(values: Histogram) -> LatencySummary:
    return LatencySummary(
        count=round(values.weight),
        mean_ms=values.mean * 1e3,
        p50_ms=values.quantile(0.5) * 1e3,
        p90_ms=values.quantile(0.9) * 1e3,
        p95_ms=values.quantile(0.95) * 1e3,
        p99_ms=values.quantile(0.99) * 1e3,
        max_ms=values.max * 1e3,
    )


def _total(tokens: NDArray[np.int32], finished: NDArray[np.bool_]) -> int:
    return int(tokens[finished].sum(dtype=np.int64))


def _pool(group: WorkerGroup, result: StudyResult) -> PoolUsage:
    workers = [worker for worker in result.workers if _group_name(worker) == group.name]
    num_steps = sum(worker.steps for worker in workers)
    prefill_tokens = sum(worker.prefill_tokens for worker in workers)
    decode_tokens = sum(worker.decode_tokens for worker in workers)
    return PoolUsage(
        name=group.name,
        role=group.role,
        num_workers=group.count,
        num_devices=group.count * group.num_devices,
        busy_share=sum(worker.busy_s for worker in workers) / (group.count * result.duration_s),
        num_steps=num_steps,
        prefill_tokens=prefill_tokens,
        decode_tokens=decode_tokens,
        prefill_tokens_per_step=prefill_tokens / max(1, num_steps),
        decodes_per_step=decode_tokens / max(1, num_steps),
        mean_kv_share=sum(worker.mean_blocks for worker in workers) / (group.count * group.num_blocks),
        peak_kv_share=max(worker.peak_blocks for worker in workers) / group.num_blocks,
        num_preemptions=sum(worker.preemptions for worker in workers),
    )


def _group_name(worker: WorkerUsage) -> str:
    return worker.worker_id.rpartition("-")[0]


def _transfer(rows: RequestColumns, result: StudyResult) -> TransferUsage:
    on_wire_s = rows.transfer_s[rows.transfer_s > 0]
    total_s = float(on_wire_s.sum(dtype=np.float64))
    return TransferUsage(
        num_transfers=len(on_wire_s),
        total_bytes=result.transfer_bytes,
        mean_ms=total_s / len(on_wire_s) * 1e3 if len(on_wire_s) else math.nan,
        mean_bytes_per_s=result.transfer_bytes / result.duration_s,
        mean_flow_bytes_per_s=result.transfer_bytes / total_s if total_s else math.nan,
    )


def _rejected_for(rows: RequestColumns) -> dict[str, int]:
    reasons = rows.refusal[(rows.outcome == Outcome.REJECTED) & (rows.refusal >= 0)]
    counts = np.bincount(reasons, minlength=len(REFUSALS))
    return {reason: int(count) for reason, count in zip(REFUSALS, counts, strict=True) if count}


def _prefixes(rows: RequestColumns, result: StudyResult) -> PrefixUsage:
    read = np.isfinite(rows.started_s)
    prompt_tokens = max(1, _total(rows.prompt_tokens, read))
    fetched = rows.fetched_tokens > 0
    return PrefixUsage(
        cached_share=_total(rows.cached_tokens, read) / prompt_tokens,
        fetched_share=_total(rows.fetched_tokens, read) / prompt_tokens,
        num_fetches=int(fetched.sum()),
        fetched_bytes=result.fetched_bytes,
        mean_fetch_ms=float(rows.fetch_s[fetched].mean()) * 1e3 if fetched.any() else math.nan,
    )


def _predictions(rows: RequestColumns, latencies: RequestLatencies) -> PredictionErrors:
    ttft_s = (rows.predicted_ttft_s - latencies.ttft_s)[latencies.finished]
    tpot_s = (rows.predicted_tpot_s - latencies.tpot_s)[latencies.finished]
    ttft_s, tpot_s = ttft_s[np.isfinite(ttft_s)], tpot_s[np.isfinite(tpot_s)]
    return PredictionErrors(
        ttft_median_s=_quantile(ttft_s, 0.5),
        ttft_p90_abs_s=_quantile(np.abs(ttft_s), 0.9),
        ttft_later_share=_later_share(ttft_s),
        tpot_median_s=_quantile(tpot_s, 0.5),
        tpot_p90_abs_s=_quantile(np.abs(tpot_s), 0.9),
        tpot_later_share=_later_share(tpot_s),
    )


def _quantile(values: NDArray[np.float64], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else math.nan


def _later_share(errors_s: NDArray[np.float64]) -> float:
    """Of those that came later than expected."""
    return float((errors_s < 0).mean()) if len(errors_s) else math.nan
