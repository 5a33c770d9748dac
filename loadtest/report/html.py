"""A report as one HTML page that needs nothing else: no script, no font, no image from elsewhere."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import msgspec

from loadtest.report.notes import notes_on, notes_on_rates, search_result, ttft_mark
from loadtest.report.page_style import STYLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from loadtest.metrics import LoadMetrics
    from loadtest.report.compare import Comparison
    from loadtest.report.document import Beside, LoadReport, ServerRun
    from loadtest.report.plots import Plot
    from workload.figures import LatencySummary

#: Of what a server said, shown of one error.
_MAX_EXAMPLE = 300

#: Where there is no figure.
_NONE = "\N{EN DASH}"

_LATENCIES = ("ttft", "tpot", "itl", "second_token", "e2e")
_LATENCY_NAMES = {
    "ttft": "TTFT",
    "tpot": "TPOT",
    "itl": "ITL",
    "second_token": "First chunk to second",
    "e2e": "End to end",
}


def report_html(report: LoadReport) -> str:
    """The whole page. Everything that a server, a file or a user wrote is escaped."""
    from loadtest.report.plots import report_plots

    title = f"Load test of {' and '.join(run.name for run in report.runs)}"
    sections = [
        _section("Figures", _figures(report.runs, report.beside)),
        *(_section(name, _grid(plots)) for name, plots in report_plots(report).items()),
        _section("Rates tried", _rates(report.runs)),
        _section("Service levels", _attainments(report.runs)),
        _section("Errors", _errors(report.runs)),
        *(_section(f"{each.name_b} against {each.name_a}", _comparison(each)) for each in report.comparisons),
        _section("What to know of these figures", _notes(report)),
        _section("Configuration", _configuration(report)),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        f"<h1>{escape(title)}</h1>\n<p class=lead>{escape(report.workload)}</p>\n"
        f"{''.join(_validity(run) for run in report.runs)}"
        f'<div class="cards">{"".join(_card(run) for run in report.runs)}</div>\n'
        f"{''.join(sections)}</main>\n</body>\n</html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{content}\n</section>\n" if content else ""


def _validity(run: ServerRun) -> str:
    if run.validity.valid:
        return ""
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in run.validity.reasons)
    return (
        f'<div class="banner"><strong>{escape(run.name)}: this run is invalid.</strong> It measured the client, not '
        f"the server.<ul>{reasons}</ul></div>\n"
    )


def _card(run: ServerRun) -> str:
    metrics, interval = run.metrics, run.metrics.attainment_interval
    num_failed = sum(error.count for error in metrics.errors)
    tiles = (
        (
            "goodput",
            f"{_figure(metrics.goodput_rps, 3)}/s",
            f"of {_figure(metrics.offered_rps, 3)} requests/s offered",
        ),
        (
            "attainment",
            f"{_percent(metrics.attainment.joint)}",
            f"95 %: {_percent(interval.low)} to {_percent(interval.high)}",
        ),
        ("TTFT p50", f"{_figure(metrics.ttft.p50_ms)} ms", f"p99 {_ttft_p99(metrics)} ms"),
        ("TPOT p50", f"{_figure(metrics.tpot.p50_ms)} ms", f"p99 {_figure(metrics.tpot.p99_ms)} ms"),
        ("output", f"{_figure(metrics.output_tokens_per_s, 0)}", "tokens/s in finished requests"),
        (
            "failed",
            f"{num_failed:,}",
            f"of {metrics.num_requests:,} requests"
            + (f", {metrics.num_given_up:,} given up" if metrics.num_given_up else ""),
        ),
    )
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in tiles
    )
    verdict = "valid" if run.validity.valid else "invalid"
    return (
        f'<article><h3>{escape(run.name)} <span class="{verdict}">{verdict}</span></h3>'
        f"<p>{escape(run.model)} at {escape(run.base_url)}, {escape(run.endpoint)}</p><dl>{shown}</dl></article>"
    )


def _figures(runs: Sequence[ServerRun], beside: Sequence[Beside]) -> str:
    headings = [
        "",
        *(run.name for run in runs),
        *(f"{each.name} ({'simulated' if each.is_simulated else 'beside'})" for each in beside),
    ]
    return _table([headings, *_figure_rows(runs, beside)])


def _figure_rows(runs: Sequence[ServerRun], beside: Sequence[Beside]) -> Iterator[Sequence[str]]:
    measured = [run.metrics for run in runs]
    sides: tuple[LoadMetrics | Beside, ...] = (*measured, *beside)
    yield ("Requests", *(f"{each.num_requests:,}" for each in sides))
    yield ("Finished", *(f"{each.num_finished:,}" for each in sides))
    yield ("Offered, requests/s", *(_figure(each.offered_rps, 3) for each in sides))
    yield (
        "Both targets met",
        *(_percent(each.attainment.joint) for each in measured),
        *(_percent(each.attainment) for each in beside),
    )
    yield ("Goodput, requests/s", *(_figure(each.goodput_rps, 3) for each in sides))
    searches = (*(run.search for run in runs), *(each.search for each in beside))
    if any(search is not None for search in searches):
        found = (_NONE if search is None else _figure(search.goodput_rps, 3) for search in searches)
        yield ("Highest goodput found, requests/s", *found)
    for latency in _LATENCIES:
        summaries: list[LatencySummary] = [getattr(each, latency) for each in sides]
        for statistic in ("mean", "p50", "p90", "p99"):
            values = [_figure(getattr(summary, f"{statistic}_ms")) for summary in summaries]
            if (latency, statistic) == ("ttft", "p99"):
                values[: len(measured)] = map(_ttft_p99, measured)
            yield (f"{_LATENCY_NAMES[latency]} {statistic}, ms", *values)
    yield ("Prompt tokens/s", *(_figure(each.prompt_tokens_per_s, 0) for each in sides))
    yield ("Output tokens/s", *(_figure(each.output_tokens_per_s, 0) for each in sides))
    none = (_NONE,) * len(beside)
    yield ("Prompt tokens cached", *(_percent(each.cached_prompt_share) for each in measured), *none)
    if any(each.takeovers.num_told for each in measured):
        told = [each.takeovers for each in measured]
        for name, counts in (
            ("Moves to other workers", [each.num_moves for each in told]),
            ("Replays at other workers", [each.num_replays for each in told]),
        ):
            known = (f"{count:,}" if each.num_told else _NONE for count, each in zip(counts, told, strict=True))
            yield (name, *known, *none)
    for phase in sorted({name for each in measured for name in each.server_phases}):
        means = (
            each.server_phases[phase].mean_ms if phase in each.server_phases else float("nan") for each in measured
        )
        yield (f"Server: {phase}, mean", *map(_figure, means), *none)
    yield ("Send lag p99, ms", *(_figure(each.send_lag.p99_ms, 2) for each in measured), *none)
    yield ("Client: event loop's delay p99, ms", *(_figure(run.client.loop_delay.p99_ms, 2) for run in runs), *none)
    yield ("Client: share of a core", *(_percent(run.client.cpu_share) for run in runs), *none)


def _rates(runs: Sequence[ServerRun]) -> str:
    """Of one rate, all servers below each other."""
    rows = [
        [
            run.name,
            f"{each.rate_rps:,.3f}",
            _figure(each.offered_rps, 3),
            _percent(each.attainment),
            f"{_percent(each.interval.low)} to {_percent(each.interval.high)}",
            _figure(each.goodput_rps, 3),
            f"{ttft_mark(each.ttft_p99_ms, each.num_given_up)}{_figure(each.ttft_p99_ms)}",
            _figure(each.tpot_p99_ms),
            _figure(each.output_tokens_per_s, 0),
            "" if each.valid else "invalid",
        ]
        for run, each in sorted(
            ((run, each) for run in runs for each in run.rates), key=lambda run_and_rate: run_and_rate[1].rate_rps
        )
    ]
    heading = [
        "", "Requests/s tried", "Offered", "Both met", "95 %", "Goodput", "TTFT p99, ms", "TPOT p99, ms",
        "Output tokens/s", "",
    ]  # fmt: skip
    return _table([heading, *rows], last_is_text=True) if rows else ""


def _attainments(runs: Sequence[ServerRun]) -> str:
    rows = [["", "Class", "TTFT target, ms", "TPOT target, ms", "Requests", "Both met", "TTFT met", "TPOT met"]]
    for run in runs:
        classes = run.metrics.classes
        for each in classes if len(classes) == 1 else (*classes, run.metrics.attainment):
            targets = (_NONE if ms is None else f"{ms:g}" for ms in (each.ttft_target_ms, each.tpot_target_ms))
            shares = (_percent(share) for share in (each.joint, each.ttft_only, each.tpot_only))
            rows.append([run.name, each.name, *targets, f"{each.num_requests:,}", *shares])
    return _table(rows, num_text=2)


def _errors(runs: Sequence[ServerRun]) -> str:
    rows = [
        [run.name, error.kind, f"{error.count:,}", " | ".join(example[:_MAX_EXAMPLE] for example in error.examples)]
        for run in runs
        for error in run.metrics.errors
    ]
    return _table([["", "Kind", "Requests", "For example"], *rows], num_text=2, last_is_text=True) if rows else ""


def _comparison(comparison: Comparison) -> str:
    verdict = "".join(f"<li>{escape(each)}</li>" for each in comparison.verdict)
    change = comparison.attainment
    paired = [
        [
            each.name,
            _figure(each.ratio, 4),
            f"{_figure(each.interval.low, 4)} to {_figure(each.interval.high, 4)}",
            f"{each.num_pairs:,}",
        ]
        for each in comparison.paired
    ]
    if change.num_pairs:
        low, high = (f"{100 * end:+.2f}" for end in (change.interval.low, change.interval.high))
        paired.append(
            ["Attainment, difference in points", f"{100 * change.difference:+.2f}", f"{low} to {high}",
             f"{change.num_pairs:,}"]
        )  # fmt: skip
    tables = [_table([["Of each request", "Median ratio", "95 %", "Pairs"], *paired])] if paired else []
    aggregates = [
        [each.name, _figure(each.a, 3), _figure(each.b, 3), _figure(each.ratio, 4)] for each in comparison.aggregates
    ]
    whole = _table([["Of the whole run", comparison.name_a, comparison.name_b, "Ratio"], *aggregates])
    tables.append(f"<details><summary>Figures of the whole runs</summary>{whole}</details>")
    return f"<ul>{verdict}</ul>{''.join(tables)}"


def _notes(report: LoadReport) -> str:
    told = list(report.warnings)
    for run in report.runs:
        prefix = f"{run.name}: " if len(report.runs) > 1 else ""
        searched = () if run.search is None else (f"highest goodput: {search_result(run.search)}",)
        notes = (*searched, *run.notes, *notes_on_rates(run.rates), *notes_on(run.metrics))
        told.extend(f"{prefix}{note}" for note in notes)
    for each in report.beside:
        told.append(f"{each.name}: {each.workload}")
        if each.search is not None:
            told.append(f"{each.name}: highest goodput: {search_result(each.search)}")
    told.append(
        "Latencies count from when a request was due, whenever it was sent. Attainment is over all requests that were "
        "due, failures included."
    )
    return f"<ul>{''.join(f'<li>{escape(each)}</li>' for each in told)}</ul>"


def _configuration(report: LoadReport) -> str:
    shown = msgspec.json.format(msgspec.json.encode(report.loadtest), indent=2).decode()
    return (
        f"<p>Workload digest <code>{escape(report.workload_digest)}</code></p>"
        f"<details><summary>Command, settings, machine</summary><pre>{escape(shown)}</pre></details>"
    )


def _grid(plots: Iterable[Plot]) -> str:
    figures = (
        f'<figure><h3>{escape(plot.title)}</h3><div class="plot">{plot.svg}</div>'
        f"<figcaption>{escape(plot.caption)}</figcaption></figure>"
        for plot in plots
    )
    return f'<div class="grid">{"".join(figures)}</div>'


def _table(rows: Iterable[Sequence[str]], *, num_text: int = 1, last_is_text: bool = False) -> str:
    """The first row is the heading; the first columns are text, and numbers stand to the right."""
    heading, *lines = rows
    text = {*range(num_text), *([len(heading) - 1] if last_is_text else [])}

    def cells(row: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=text' if column in text else ''}>{escape(cell)}</{tag}>" for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells(row, 'td')}</tr>\n" for row in lines)
    return (
        f'<div class="wide"><table><thead><tr>{cells(heading, "th")}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _ttft_p99(metrics: LoadMetrics) -> str:
    return f"{ttft_mark(metrics.ttft.p99_ms, metrics.num_given_up)}{_figure(metrics.ttft.p99_ms)}"


def _figure(value: float, decimals: int = 1) -> str:
    return _NONE if value != value else f"{value:,.{decimals}f}"


def _percent(share: float) -> str:
    return _NONE if share != share else f"{100 * share:.2f} %"
