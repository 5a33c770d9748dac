"""A load test's report for a terminal: figures, then what must be known of them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loadtest.report.notes import notes_on, notes_on_rates, over_parts, search_result, ttft_mark
from workload.tables import attainment_rows, facts, latency_rows, number, table

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from loadtest.metrics import LoadMetrics, Takeovers
    from loadtest.report.compare import Comparison
    from loadtest.report.document import Beside, LoadReport, RateResult, ServerRun
    from workload.figures import LatencySummary

#: Of what a server said, in a line of the table.
_MAX_EXAMPLE = 60


def report_text(report: LoadReport) -> str:
    """Sections of aligned columns, about 118 characters wide; ends with a line break."""
    sections = [
        facts(("workload", report.workload)),
        *(section for run in report.runs for section in _run_sections(run)),
        table(_goodput_rows(report.runs)) if len(report.runs) > 1 and any(run.rates for run in report.runs) else "",
        table(_beside_rows(report.beside)) if report.beside else "",
        *(comparison_text(each) for each in report.comparisons),
        facts(*(("warning", warning) for warning in report.warnings)),
    ]
    return _printable("\n".join(section for section in sections if section))


def comparison_text(comparison: Comparison) -> str:
    """Ends with a line break."""
    sections = [
        facts(("compare", f"A = {comparison.name_a}, B = {comparison.name_b}; ratios are B / A, below 1 B is faster")),
        table(_paired_rows(comparison)) if comparison.paired else "",
        table(_aggregate_rows(comparison)),
        facts(("verdict", "\n".join(comparison.verdict))),
    ]
    return _printable("\n".join(section for section in sections if section))


def _run_sections(run: ServerRun) -> Iterator[str]:
    metrics = run.metrics
    yield facts(
        ("server", f"{run.name}: {run.model} at {run.base_url}, {run.endpoint}"),
        *(("INVALID", reason) for reason in run.validity.reasons),
        ("outcome", _outcome(metrics)),
    )
    yield table(attainment_rows(metrics.classes, metrics.attainment))
    yield facts(
        ("goodput", _goodput(metrics)), *(() if run.search is None else (("highest", search_result(run.search)),))
    )
    if run.rates:
        yield table(_rate_rows(run.rates))
    yield table(latency_rows(_latencies(metrics)))
    yield table(_phase_rows(metrics))
    if metrics.errors:
        yield table(_error_rows(metrics))
    yield facts(
        ("tokens", _tokens(metrics)),
        *((("workers", _takeovers(metrics.takeovers)),) if metrics.takeovers.num_told else ()),
        ("client", _client(run)),
        *(("note", note) for note in (*run.notes, *notes_on_rates(run.rates), *notes_on(metrics))),
    )


def _outcome(metrics: LoadMetrics) -> str:
    counts = (
        (metrics.num_cancelled, "cancelled by plan"),
        (metrics.num_rejected, "refused (429)"),
        (metrics.num_timed_out, "timed out"),
        (metrics.num_failed, "failed"),
        (metrics.num_given_up, "given up"),
        (metrics.num_interrupted, "interrupted"),
        (metrics.num_unsent, "not sent"),
        (metrics.num_warmup, "before them as warm-up"),
    )
    parts = [f"{metrics.num_finished:,} of {metrics.num_requests:,} requests finished"]
    parts.extend(f"{count:,} {what}" for count, what in counts if count)
    return (
        f"{', '.join(parts)}; {metrics.duration_s:,.1f} s, of which {metrics.tail_s:,.1f} s after the last was due"
        f"{over_parts(metrics)}"
    )


def _goodput(metrics: LoadMetrics) -> str:
    interval = metrics.attainment_interval
    return (
        f"{number(metrics.goodput_rps, 3)} requests/s met both targets, of {number(metrics.offered_rps, 3)} offered: "
        f"{number(100 * metrics.attainment.joint, 2)} % "
        f"(95 %: {number(100 * interval.low, 2)} to {number(100 * interval.high, 2)})"
    )


def _rate_rows(rates: tuple[RateResult, ...]) -> Iterator[tuple[str, ...]]:
    """What was offered has a column where it is not what was planned."""
    with_offered = not all(each.is_as_planned for each in rates)
    offered = ("offered",) if with_offered else ()
    latencies = ("TTFT p99 ms", "TPOT p99 ms", "output tokens/s", "")
    yield ("requests/s tried", *offered, "both met %", "95 % from", "to", *latencies)
    for each in sorted(rates, key=lambda each: each.rate_rps):
        yield (
            f"{each.rate_rps:,.3f}",
            *((number(each.offered_rps, 3),) if with_offered else ()),
            number(100 * each.attainment, 2),
            number(100 * each.interval.low, 2),
            number(100 * each.interval.high, 2),
            f"{ttft_mark(each.ttft_p99_ms, each.num_given_up)}{number(each.ttft_p99_ms)}",
            number(each.tpot_p99_ms),
            number(each.output_tokens_per_s, 0),
            "" if each.valid else "invalid",
        )


def _goodput_rows(runs: Sequence[ServerRun]) -> Iterator[tuple[str, ...]]:
    """Of servers that were tried at several rates: the highest found, and those at rates that all were tried at."""
    yield ("goodput, requests/s", *(run.name for run in runs))
    if any(run.search is not None for run in runs):
        yield ("highest found", *("-" if run.search is None else number(run.search.goodput_rps, 3) for run in runs))
    by_rate = [{each.rate_rps: each.goodput_rps for each in run.rates} for run in runs]
    for rate_rps in sorted(by_rate[0]):
        if all(rate_rps in goodputs for goodputs in by_rate):
            yield (f"at {rate_rps:,.3f} tried", *(number(goodputs[rate_rps], 3) for goodputs in by_rate))


def _latencies(metrics: LoadMetrics) -> Iterator[tuple[str, LatencySummary]]:
    yield "TTFT", metrics.ttft
    yield "TPOT", metrics.tpot
    yield "ITL", metrics.itl
    yield "end to end", metrics.e2e
    yield "2nd chunk", metrics.second_token
    yield "TTFT from sending", metrics.ttft_from_sending


def _phase_rows(metrics: LoadMetrics) -> Iterator[tuple[str, ...]]:
    phases = metrics.phases
    named: list[tuple[str, LatencySummary]] = [
        ("due -> taken up", phases.send_lag),
        ("connecting", phases.connect),
        ("sent -> headers", phases.headers),
        ("headers -> token", phases.first_token),
        ("1st -> last token", phases.decode),
        *((f"server: {name}", summary) for name, summary in metrics.server_phases.items()),
    ]
    heading, *rows = latency_rows(named)
    yield ("phase ms", *heading[1:])
    yield from rows


def _error_rows(metrics: LoadMetrics) -> Iterator[tuple[str, ...]]:
    yield ("errors, with an example", "requests")
    for error in metrics.errors:
        example = f": {' '.join(error.examples[0].split())[:_MAX_EXAMPLE]}" if error.examples else ""
        yield (f"{error.kind}{example}", f"{error.count:,}")


def _tokens(metrics: LoadMetrics) -> str:
    cached = metrics.cached_prompt_share
    known = "" if cached != cached else f" ({cached:.0%} of them cached)"
    return (
        f"{number(metrics.prompt_tokens_per_s, 0)} prompt tokens/s{known} and "
        f"{number(metrics.output_tokens_per_s, 0)} output tokens/s in finished requests "
        f"({number(metrics.finished_rps, 3)}/s); {number(metrics.chunks_per_s, 0)} chunks/s"
    )


def _takeovers(told: Takeovers) -> str:
    return (
        f"{told.num_moved:,} of {told.num_told:,} requests moved to another one while they were written "
        f"({told.num_moves:,} moves), {told.num_replayed:,} were taken up again ({told.num_replays:,} replays)"
    )


def _client(run: ServerRun) -> str:
    connected = run.metrics.answers.num_connected
    return (
        f"{run.client.cpu_share:.0%} of a core; send lag p99 {number(run.metrics.send_lag.p99_ms, 2)} ms, event "
        f"loop's delay p99 {number(run.client.loop_delay.p99_ms, 2)} ms; {connected:,} connections opened"
    )


def _beside_rows(beside: tuple[Beside, ...]) -> Iterator[tuple[str, ...]]:
    yield ("beside", "requests/s", "both met %", "TTFT p50", "p99 ms", "TPOT p50", "p99 ms", "output tokens/s")
    for each in beside:
        yield (
            f"{each.name}{', simulated' if each.is_simulated else ''}",
            number(each.offered_rps, 3),
            number(100 * each.attainment, 2),
            number(each.ttft.p50_ms),
            number(each.ttft.p99_ms),
            number(each.tpot.p50_ms),
            number(each.tpot.p99_ms),
            number(each.output_tokens_per_s, 0),
        )


def _paired_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    yield ("of each request", "median B/A", "95 % from", "to", "pairs", "")
    for each in comparison.paired:
        yield (
            each.name,
            number(each.ratio, 4),
            number(each.interval.low, 4),
            number(each.interval.high, 4),
            f"{each.num_pairs:,}",
            "differs" if each.differs else "",
        )
    change = comparison.attainment
    points = (100 * change.difference, 100 * change.interval.low, 100 * change.interval.high)
    yield (
        "attainment B - A, points",
        *(number(each, 2) for each in points),
        f"{change.num_pairs:,}",
        "differs" if change.differs else "",
    )


def _aggregate_rows(comparison: Comparison) -> Iterator[tuple[str, ...]]:
    yield ("of the whole run", "A", "B", "B/A")
    for each in comparison.aggregates:
        yield (each.name, number(each.a, 3), number(each.b, 3), number(each.ratio, 4))


def _printable(text: str) -> str:
    """What servers say must not move the cursor, or worse."""
    return "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text)
