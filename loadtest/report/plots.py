"""The plots of a report's page, as SVG to stand in it."""

# matplotlib's own annotations leave the keyword arguments of nearly every method open.
# pyright: reportUnknownMemberType=false

from __future__ import annotations

import io
import re
from typing import TYPE_CHECKING, NamedTuple

import matplotlib as mpl
import numpy as np

from loadtest.metrics import attained, is_failed, phase_spans_s
from loadtest.report.notes import ttft_mark
from loadtest.report.timeline import ended, in_flight
from workload.plots import CURVE_POINTS, PLAIN_NUMBERS, finish, panels, scale, shades, thinned

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from loadtest.columns import Floats
    from loadtest.report.document import LoadReport, RateResult, ServerRun
    from workload.slo import SloClass

#: Inches of one plot: two stand beside each other on a laptop, and one can still be read on a phone.
_WIDTH, _HEIGHT = 5.8, 3.5
#: Of all runs together; each is an element of the page.
_DOTS = 2000
#: Of a name in a legend, in characters.
_MAX_NAME = 24

_RUNS = ("#1f77b4", "#ff7f0e", "#17becf", "#d62728", "#7f7f7f", "#bcbd22", "#111111", "#393b79")
_BESIDE = ("#555555", "#999999", "#b07aa1", "#76b7b2")
_MISSED, _TARGET = "#d62728", "#2ca02c"
_PHASES = {
    "send_lag": ("due to taken up", "#9c9c9c"),
    "connect": ("connecting", "#e377c2"),
    "headers": ("sent to headers", "#bcbd22"),
    "first_token": ("headers to first token", "#1f77b4"),
    "decode": ("first to last token", "#ff7f0e"),
}


class Plot(NamedTuple):
    title: str
    #: What it shows, for who cannot guess, or cannot see it.
    caption: str
    svg: str


def report_plots(report: LoadReport) -> dict[str, list[Plot]]:
    """By section of the page; sections without data are not there."""
    runs = [run for run in report.runs if len(run.requests)]
    sections = {
        "Latency": list(_latencies(runs, report.slos)),
        "Attainment by rate": list(_by_rate(report)),
        "Over time": list(_over_time(runs)),
        "Where the time went": [_phases(runs), _ttft_by_prompt(runs, report.slos)] if runs else [],
    }
    return {title: plots for title, plots in sections.items() if plots}


def _latencies(runs: Sequence[ServerRun], slos: Sequence[SloClass]) -> Iterator[Plot]:
    for name, caption in (
        ("TTFT", "Time from when a request was due to its first token, of all requests: a curve ends below 100 % where "
         "some never had a token."),
        ("TPOT", "Mean time per token after the first, of each finished request."),
        ("ITL", "Wait between two chunks of an answer."),
        ("End to end", "From when a request was due to its last token, of finished requests."),
    ):  # fmt: skip
        figure, (axis,) = panels(1, 1, width=_WIDTH, height=_HEIGHT)
        drawn = [_curve(axis, run, number, *_distribution(run, name)) for number, run in enumerate(runs)]
        if not any(len(values_ms) for values_ms in drawn):
            continue
        scale(axis, np.sort(np.concatenate(drawn)))
        _targets(axis, name, slos)
        axis.set_xlabel(f"{name} (ms)")
        axis.set_ylabel("gaps at or below (%)" if name == "ITL" else "requests at or below (%)")
        axis.set_ylim(0, 102)
        yield _plot(name, caption, figure, axis)


def _distribution(run: ServerRun, name: str) -> tuple[Floats, float]:
    """Quantiles at equal steps, in milliseconds, and the share of the requests that they are of."""
    if name == "ITL":
        return run.itl_quantiles_ms, 1.0
    requests = run.requests
    counted = requests.is_counted
    if name == "TTFT":
        values_s, share = requests.ttft_s[counted], None
    else:
        values_s, share = (requests.tpot_s if name == "TPOT" else requests.e2e_s)[counted & requests.is_finished], 1.0
    known = values_s[~np.isnan(values_s)]
    if not len(known):
        return known, 0.0
    quantiles_ms: Floats = np.quantile(known, np.linspace(0, 1, CURVE_POINTS)) * 1e3
    return quantiles_ms, len(known) / len(values_s) if share is None else share


def _curve(axis: Axes, run: ServerRun, number: int, values_ms: Floats, share: float) -> Floats:
    if len(values_ms):
        shares = np.linspace(0, 100 * share, len(values_ms))
        axis.plot(values_ms, shares, color=_colour(number), linewidth=1.8, label=_name(run.name))
    return values_ms


def _targets(axis: Axes, name: str, slos: Sequence[SloClass]) -> None:
    if name == "End to end":
        return
    for slo, colour in zip(slos, shades(len(slos)), strict=True):
        target_ms = slo.ttft_ms if name == "TTFT" else slo.tpot_ms
        label = f"target of {_name(slo.name)}: {target_ms:g} ms"
        axis.axvline(target_ms, color=colour, linestyle="--", linewidth=1.2, label=label)


def _by_rate(report: LoadReport) -> Iterator[Plot]:
    lines = [(run.name, _colour(number), run.rates, "-") for number, run in enumerate(report.runs)]
    lines.extend(
        (
            f"{'simulated' if each.is_simulated else 'beside'}: {each.name}",
            _BESIDE[number % len(_BESIDE)],
            each.rates,
            "--",
        )
        for number, each in enumerate(report.beside)
    )
    lines = [line for line in lines if line[2]]
    if not any(len(rates) > 1 for _, _, rates, _ in lines):
        return
    figure, (axis,) = panels(1, 1, width=_WIDTH, height=_HEIGHT)
    for name, colour, rates, style in lines:
        _attainment_line(axis, name, colour, rates, style)
    for target in sorted({run.search.target for run in report.runs if run.search is not None}):
        axis.axhline(100 * target, color=_TARGET, linestyle=":", linewidth=1.2, label=f"target: {target:.0%}")
    axis.set_ylabel("requests that met both targets (%)")
    axis.set_ylim(-2, 104)
    caption = "Bars: 95 % intervals (Wilson). Hollow: the client was the bottleneck."
    yield _rate_plot("Attainment", caption, figure, axis, [each.rate_rps for line in lines for each in line[2]])
    for name, figure_of, caption in (
        ("TTFT p99", "ttft_p99_ms", "Triangles are lower bounds: at that rate requests were given up."),
        ("TPOT p99", "tpot_p99_ms", "Of the requests that finished."),
    ):  # fmt: skip
        figure, (axis,) = panels(1, 1, width=_WIDTH, height=_HEIGHT)
        rates_rps: list[float] = []
        values_ms: list[float] = []
        for label, colour, rates, style in lines:
            points = sorted((each.rate_rps, getattr(each, figure_of)) for each in rates)
            known = [(rate, value) for rate, value in points if value == value]
            rates_rps.extend(rate for rate, _ in known)
            values_ms.extend(value for _, value in known)
            if known:
                axis.plot(*zip(*known, strict=True), f"o{style}", color=colour, markersize=4, label=_name(label))
            bounds = [each for each in rates if name == "TTFT p99" and ttft_mark(each.ttft_p99_ms, each.num_given_up)]
            if bounds:
                bounds_ms = [each.ttft_p99_ms for each in bounds]
                axis.scatter([each.rate_rps for each in bounds], bounds_ms, s=70, marker="^", color=colour, zorder=3)
        if not rates_rps:
            continue
        if 0 < 10 * min(values_ms) < max(values_ms):
            axis.set_yscale("log")
        else:
            axis.set_ylim(0, 1.1 * max(values_ms))
        axis.yaxis.set_major_formatter(PLAIN_NUMBERS)
        axis.yaxis.set_minor_formatter(PLAIN_NUMBERS)
        axis.set_ylabel(f"{name} (ms)")
        yield _rate_plot(name, caption, figure, axis, rates_rps)


def _attainment_line(axis: Axes, name: str, colour: str, rates: Sequence[RateResult], style: str) -> None:
    rates = sorted(rates, key=lambda each: each.rate_rps)
    rate_rps = np.array([each.rate_rps for each in rates])
    shares = 100 * np.array([each.attainment for each in rates])
    low, high = (100 * np.array([getattr(each.interval, end) for each in rates]) for end in ("low", "high"))
    axis.plot(rate_rps, shares, style, color=colour, linewidth=1.5, label=_name(name))
    axis.errorbar(
        rate_rps, shares, (shares - low, high - shares), fmt="none", ecolor=colour, elinewidth=1, capsize=2.5, alpha=0.7
    )
    faces = [colour if each.valid else "white" for each in rates]
    axis.scatter(rate_rps, shares, s=22, c=faces, edgecolors=colour, linewidths=1.2, zorder=3)


def _rate_plot(title: str, caption: str, figure: Figure, axis: Axes, rates_rps: Sequence[float]) -> Plot:
    scale(axis, np.sort(np.array(rates_rps)))
    axis.set_xlabel("requests/s tried")
    return _plot(title, caption, figure, axis)


def _over_time(runs: Sequence[ServerRun]) -> Iterator[Plot]:
    if runs:
        yield _in_flight(runs)
        yield _ended(runs)
    with_gauges = [(number, run.gauges) for number, run in enumerate(runs) if run.gauges is not None]
    if not with_gauges:
        return
    figure, axes = panels(2, 1, width=_WIDTH, height=_HEIGHT * 1.25, share_time=True)
    for number, gauges in with_gauges:
        label = _name(runs[number].name)
        axes[0].plot(gauges.at_s, gauges.waiting, color=_colour(number), linewidth=1.2, label=label)
        axes[1].plot(gauges.at_s, gauges.running, color=_colour(number), linewidth=1.2)
    _stack(axes, "queued", "running")
    yield _plot("As the server counts", "What the server says of its queue and of what it runs.", figure)


def _in_flight(runs: Sequence[ServerRun]) -> Plot:
    figure, axes = panels(2, 1, width=_WIDTH, height=_HEIGHT * 1.25, share_time=True)
    for number, run in enumerate(runs):
        line = in_flight(run.requests)
        axes[0].plot(line.at_s, line.waiting, color=_colour(number), linewidth=1.2, label=_name(run.name))
        axes[1].plot(line.at_s, line.streaming, color=_colour(number), linewidth=1.2)
    _stack(axes, "without a token", "streaming")
    return _plot("As the client counts", "Requests that were due and had no token yet, and those that had.", figure)


def _ended(runs: Sequence[ServerRun]) -> Plot:
    figure, axes = panels(2, 1, width=_WIDTH, height=_HEIGHT * 1.25, share_time=True)
    for number, run in enumerate(runs):
        line = ended(run.requests, is_failed(run.requests))
        if number == 0 and len(line.edges_s):
            axes[0].stairs(line.due_rps, line.edges_s, color="#bbbbbb", fill=True, label=f"due ({_name(run.name)})")
        if len(line.edges_s):
            axes[0].stairs(line.finished_rps, line.edges_s, color=_colour(number), linewidth=1.3, label=_name(run.name))
            axes[1].stairs(line.failed_rps, line.edges_s, color=_colour(number), linewidth=1.3)
    _stack(axes, "finished/s", "failed/s")
    return _plot(
        "Finished and failed", "Requests a second, by the time of their end; grey: by when they were due.", figure
    )


def _stack(axes: Sequence[Axes], upper: str, lower: str) -> None:
    for axis, label in zip(axes, (upper, lower), strict=True):
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        finish(axis, legend_above=True)
    axes[1].set_xlabel("time since the start (s)")


def _phases(runs: Sequence[ServerRun]) -> Plot:
    figure, (axis,) = panels(1, 1, width=_WIDTH, height=1.6 + 0.45 * len(runs))
    left_ms = np.zeros(len(runs))
    spans = [phase_spans_s(run.requests) for run in runs]
    for phase, (label, colour) in _PHASES.items():
        mean_ms = np.array([1e3 * float(each[phase].mean()) if len(each[phase]) else 0.0 for each in spans])
        axis.barh(range(len(runs)), mean_ms, left=left_ms, color=colour, height=0.6, label=label)
        left_ms += mean_ms
    axis.set_yticks(range(len(runs)), [_name(run.name) for run in runs])
    axis.invert_yaxis()
    axis.set_xlabel("mean time of a finished request (ms)")
    axis.grid(alpha=0.3, axis="x", linewidth=0.5)
    figure.legend(fontsize="small", frameon=False, ncols=3, loc="outside upper left")
    return _plot("Phases", "What end-to-end time consists of, as the client sees it.", figure)


def _ttft_by_prompt(runs: Sequence[ServerRun], slos: Sequence[SloClass]) -> Plot:
    figure, (axis,) = panels(1, 1, width=_WIDTH, height=_HEIGHT * 1.1)
    shown = total = 0
    for number, run in enumerate(runs):
        requests = run.requests
        known = np.flatnonzero(requests.is_counted & (requests.ttft_s > 0))
        chosen = thinned(known, max(1, _DOTS // len(runs)))
        shown, total = shown + len(chosen), total + len(known)
        groups = [(_name(run.name), _colour(number), chosen)]
        if len(runs) == 1:
            met = attained(requests, slos).both[chosen]
            groups = [("met both targets", _colour(0), chosen[met]), ("missed one or both", _MISSED, chosen[~met])]
        for label, colour, rows in groups:
            if len(rows):
                ttft_ms = requests.ttft_s[rows] * 1e3
                axis.scatter(
                    requests.prompt_tokens[rows], ttft_ms, s=6, alpha=0.45, color=colour, linewidths=0, label=label
                )
    for slo, colour in zip(slos, shades(len(slos)), strict=True):
        label = f"target of {_name(slo.name)}: {slo.ttft_ms:g} ms"
        axis.axhline(slo.ttft_ms, color=colour, linestyle="--", linewidth=1.2, label=label)
    if total:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.xaxis.set_major_formatter(PLAIN_NUMBERS)
        axis.yaxis.set_major_formatter(PLAIN_NUMBERS)
    axis.set_xlabel("prompt (tokens)")
    axis.set_ylabel("TTFT (ms)")
    told = "Each dot is a request." if shown == total else f"{shown:,} of {total:,} requests, evenly chosen."
    return _plot("TTFT by prompt length", told, figure, axis)


def _colour(number: int) -> str:
    return _RUNS[number % len(_RUNS)]


def _name(text: str) -> str:
    """For legends: short, and no formula."""
    shown = text if len(text) <= _MAX_NAME else f"{text[: _MAX_NAME - 1]}…"
    return shown.replace("$", r"\$")


def _plot(title: str, caption: str, figure: Figure, axis: Axes | None = None) -> Plot:
    if axis is not None:
        finish(axis)
    return Plot(title, caption, _svg(figure))


def _svg(figure: Figure) -> str:
    """To stand in a page: text stays text, no ids but those that are referred to, size from the page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "tandem"}):
        figure.savefig(text, format="svg", metadata={"Date": None}, transparent=True)
    drawn = text.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<metadata>.*?</metadata>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*"', "<g", drawn)
    return re.sub(r'(<svg [^>]*?) width="[^"]*"| height="[^"]*"(?=[^>]*viewBox)', r"\1", drawn, count=2)
