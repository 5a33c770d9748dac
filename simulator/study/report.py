"""A study's report: a table for people and one JSON document with the same figures."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from workload.tables import attainment_rows, facts, latency_rows, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from simulator.study.metrics import StudyMetrics
    from workload.figures import LatencySummary
    from workload.goodput import GoodputSearch

FORMAT = "tandem-study-1"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunFigures:
    """What the simulation itself cost."""

    wall_s: float
    num_events: int
    num_steps: int
    events_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """Field names are the keys of the JSON document; units are in the names."""

    #: One line each about what was simulated, and what repeats it: plain data.
    study: dict[str, object]
    workload: str
    cluster: str
    latency: str
    metrics: StudyMetrics
    run: RunFigures
    goodput_search: GoodputSearch | None = None
    #: What a reader must know before trusting a figure.
    warnings: tuple[str, ...] = ()


def unserved_warnings(metrics: StudyMetrics) -> tuple[str, ...]:
    """A cluster that refuses half of its requests may serve the others fast."""
    counts = ((metrics.num_rejected, "refused"), (metrics.num_timed_out, "timed out"))
    told = " and ".join(f"{count:,} {what}" for count, what in counts if count)
    if not told:
        return ()
    return (
        f"of {metrics.num_requests:,} requests, {told}: latency percentiles leave out what these did not reach, and "
        f"look better than what clients saw. Attainment counts them as missed",
    )


def report_json(report: Report) -> bytes:
    """UTF-8, indented; a figure that is not defined (NaN or infinite) is null."""
    document = {"format": FORMAT, **{name: getattr(report, name) for name in Report.__slots__}}
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def report_text(report: Report) -> str:
    """Sections of aligned columns, about 118 characters wide; ends with a line break."""
    metrics = report.metrics
    sections = [
        facts(
            ("workload", report.workload),
            ("cluster", report.cluster),
            ("latency", report.latency),
            ("outcome", _outcome(metrics)),
        ),
        table(attainment_rows(metrics.classes, metrics.attainment)),
        facts(
            ("goodput", _goodput(metrics)),
            *(() if report.goodput_search is None else (("highest", _searched(report.goodput_search, metrics)),)),
        ),
        "" if report.goodput_search is None else table(_search_rows(report.goodput_search)),
        table(latency_rows(_latencies(metrics))),
        table(_pool_rows(metrics)),
        facts(
            (
                "tokens",
                f"{metrics.prompt_tokens_per_s:,.0f} prompt tokens/s read, "
                f"{metrics.output_tokens_per_s:,.0f} output tokens/s written",
            ),
            ("transfer", _transfer(metrics)),
            *_prefixes(metrics),
            *_predictions(metrics),
            ("run", _run(report.run, metrics)),
        ),
        facts(*(("warning", warning) for warning in report.warnings)),
    ]
    return "\n".join(section for section in sections if section)


def _outcome(metrics: StudyMetrics) -> str:
    parts = [f"{metrics.num_finished:,} of {metrics.num_requests:,} requests finished"]
    reasons = ", ".join(f"{reason} {count:,}" for reason, count in metrics.rejected_for.items())
    for count, what in (
        (metrics.num_rejected, f"refused ({reasons})" if reasons else "refused"),
        (metrics.num_timed_out, "timed out"),
        (metrics.num_failed, "failed for want of KV blocks"),
    ):
        if count:
            parts.append(f"{count:,} {what}")
    return f"{', '.join(parts)}; all over after {metrics.duration_s:,.1f} s"


def _goodput(metrics: StudyMetrics) -> str:
    return (
        f"{metrics.goodput_rps:,.3f} requests/s met both targets, of {metrics.offered_rps:,.3f} offered; "
        f"{metrics.goodput_per_device_rps:,.4f} on each of {metrics.num_devices:,} devices"
    )


def _searched(search: GoodputSearch, metrics: StudyMetrics) -> str:
    runs = f"{len(search.points)} runs"
    if search.goodput_rps == 0:
        return f"no rate: even {search.missed_rps:,.3f} requests/s miss {search.target:.0%} attainment ({runs})"
    found = f"{search.goodput_rps:,.3f} requests/s with attainment >= {search.target:.0%}"
    per_device = f"{search.goodput_rps / metrics.num_devices:.4f} per device"
    if search.missed_rps == float("inf"):
        return f"at least {found} ({per_device}): the highest rate that was tried ({runs})"
    return f"{found} ({per_device}); {search.missed_rps:,.3f} miss it ({runs})"


def _search_rows(search: GoodputSearch) -> Iterator[tuple[str, ...]]:
    yield ("requests/s tried", "both met %")
    for point in sorted(search.points, key=lambda point: point.rate_rps):
        yield (f"{point.rate_rps:,.3f}", f"{100 * point.attainment:.2f}")


def _latencies(metrics: StudyMetrics) -> Iterator[tuple[str, LatencySummary]]:
    yield "TTFT", metrics.ttft
    yield "TPOT", metrics.tpot
    yield "ITL", metrics.itl
    yield "end to end", metrics.e2e
    yield "queue", metrics.queue
    yield "2nd token", metrics.second_token


def _pool_rows(metrics: StudyMetrics) -> Iterator[tuple[str, ...]]:
    yield (
        "pool",
        "role",
        "workers",
        "devices",
        "busy %",
        "KV mean %",
        "KV peak %",
        "steps",
        "prompt tokens/step",
        "answers/step",
        "preempted",
    )
    for pool in metrics.pools:
        yield (
            pool.name,
            pool.role,
            f"{pool.num_workers:,}",
            f"{pool.num_devices:,}",
            f"{100 * pool.busy_share:.1f}",
            f"{100 * pool.mean_kv_share:.1f}",
            f"{100 * pool.peak_kv_share:.1f}",
            f"{pool.num_steps:,}",
            f"{pool.prefill_tokens_per_step:,.1f}",
            f"{pool.decodes_per_step:,.1f}",
            f"{pool.num_preemptions:,}",
        )


def _transfer(metrics: StudyMetrics) -> str:
    transfer = metrics.transfer
    if not transfer.num_transfers:
        return "no KV crossed between workers"
    return (
        f"{transfer.total_bytes / 1e9:,.1f} GB of KV in {transfer.num_transfers:,} handoffs, "
        f"{transfer.mean_bytes_per_s / 1e9:,.2f} GB/s on average; one takes {transfer.mean_ms:,.1f} ms "
        f"at {transfer.mean_flow_bytes_per_s / 1e9:,.1f} GB/s"
    )


def _prefixes(metrics: StudyMetrics) -> Iterator[tuple[str, str]]:
    prefixes = metrics.prefixes
    if not prefixes.cached_share:
        return
    text = f"{prefixes.cached_share:.1%} of the prompt tokens read were found in a cache"
    if prefixes.num_fetches:
        text += (
            f", {prefixes.fetched_share:.1%} had been copied there: {prefixes.num_fetches:,} copies, "
            f"{prefixes.fetched_bytes / 1e9:,.1f} GB, {prefixes.mean_fetch_ms:,.1f} ms each"
        )
    yield "prefixes", text


def _predictions(metrics: StudyMetrics) -> Iterator[tuple[str, str]]:
    errors = metrics.predictions
    if not math.isnan(errors.ttft_median_s):
        yield (
            "predicted",
            f"TTFT {1e3 * errors.ttft_median_s:+,.1f} ms in the median ({errors.ttft_later_share:.0%} came later than "
            f"predicted; nine in ten within {1e3 * errors.ttft_p90_abs_s:,.1f} ms), TPOT "
            f"{1e3 * errors.tpot_median_s:+,.1f} ms ({errors.tpot_later_share:.0%} later; within "
            f"{1e3 * errors.tpot_p90_abs_s:,.1f} ms)",
        )


def _run(run: RunFigures, metrics: StudyMetrics) -> str:
    return (
        f"{run.wall_s:,.1f} s for {metrics.duration_s:,.1f} virtual s: {run.num_events:,} events "
        f"({run.events_per_s:,.0f}/s), {run.num_steps:,} engine steps"
    )
