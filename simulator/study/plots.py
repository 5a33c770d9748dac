"""A study's plots, as PNG files. Imported only when they are asked for: matplotlib takes half a second to load."""

# matplotlib's own annotations leave the keyword arguments of nearly every method open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter

from simulator.study.metrics import request_latencies

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from numpy.typing import NDArray

    from simulator.heap.results import StudyResult
    from simulator.study.metrics import RequestLatencies
    from workload.slo import SloClass

#: Points of a curve, dots of a scatter plot, and bins along the time: what an eye can tell apart.
_CURVE_POINTS = 400
_SCATTER_POINTS = 4000
_TIME_BINS = 60

_DPI = 110
_PREFILL, _DECODE, _TARGET, _MISSED, _NEUTRAL = "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#555555"
_PLAIN_NUMBERS = StrMethodFormatter("{x:,g}")
_SHADES = ("#2ca02c", "#9467bd", "#8c564b", "#e377c2")


def write_plots(result: StudyResult, slos: Sequence[SloClass], folder: Path) -> tuple[Path, ...]:
    """Writes into an existing folder, over files of the same names. Raises ConfigError as `request_latencies`."""
    latencies = request_latencies(result, slos)
    figures = {
        "latency_cdf.png": _latency_cdf(result, latencies, slos),
        "timeline.png": _timeline(result),
        "attainment.png": _attainment(result, latencies),
        "ttft_by_prompt.png": _ttft_by_prompt(result, latencies, slos),
    }
    paths: list[Path] = []
    for name, figure in figures.items():
        figure.savefig(folder / name)
        paths.append(folder / name)
    return tuple(paths)


def _latency_cdf(result: StudyResult, latencies: RequestLatencies, slos: Sequence[SloClass]) -> Figure:
    shares = np.linspace(0.0, 1.0, _CURVE_POINTS)
    curves = (
        ("TTFT", _quantiles(latencies.ttft_s, shares), [slo.ttft_ms for slo in slos]),
        ("TPOT", _quantiles(latencies.tpot_s, shares), [slo.tpot_ms for slo in slos]),
        ("ITL", _histogram_quantiles(result, shares), [slo.tpot_ms for slo in slos]),
    )
    figure, axes = _panels(1, 3, width=13, height=4)
    for axis, (name, values_ms, targets_ms) in zip(axes, curves, strict=True):
        if len(values_ms):
            axis.plot(values_ms, 100 * shares, color=_PREFILL, linewidth=1.8)
            _scale(axis, values_ms)
        for slo, target_ms, colour in zip(slos, targets_ms, _shades(len(slos)), strict=True):
            label = f"{slo.name} {'TPOT' if name == 'ITL' else name} target: {target_ms:g} ms"
            axis.axvline(target_ms, color=colour, linestyle="--", linewidth=1.2, label=label)
        axis.set_xlabel(f"{name} (ms)")
        axis.set_ylim(0, 100)
        _finish(axis)
    axes[0].set_ylabel("requests at or below (%)")
    axes[2].set_ylabel("gaps between tokens at or below (%)")
    figure.suptitle("Distribution of latencies")
    return figure


def _timeline(result: StudyResult) -> Figure:
    line = result.time_line
    figure, axes = _panels(3, 1, width=11, height=8, share_time=True)
    axes[0].plot(line.at_s, line.prompts, color=_PREFILL, label="prompts waiting or being read")
    axes[0].plot(line.at_s, line.answers, color=_DECODE, label="answers being written")
    if line.preempted.any():
        axes[0].plot(line.at_s, line.preempted, color=_MISSED, label="answers preempted")
    axes[0].set_ylabel("requests")
    roles = {group.role for group in result.spec.groups}
    if roles & {"prefill", "mixed"}:
        axes[1].plot(line.at_s, 100 * line.prefill_busy, color=_PREFILL, label="workers that read prompts")
    if roles & {"decode", "mixed"}:
        axes[1].plot(line.at_s, 100 * line.decode_busy, color=_DECODE, label="workers that write answers")
    axes[1].set_ylabel("time in steps (%)")
    axes[1].set_ylim(0, 105)
    axes[2].plot(line.at_s, 100 * line.blocks_used, color=_NEUTRAL, label="KV blocks that are not free, all workers")
    axes[2].set_ylabel("KV blocks (%)")
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel("time since the start (s)")
    for axis in axes:
        _finish(axis, legend_above=True)
    figure.suptitle("Load over time")
    return figure


def _attainment(result: StudyResult, latencies: RequestLatencies) -> Figure:
    arrival_s = result.requests.arrival_s
    span_s = arrival_s[-1] - arrival_s[0]
    # All at once are those of one second.
    edges_s = arrival_s[0] + (np.linspace(0.0, span_s, _TIME_BINS + 1) if span_s > 0 else np.array([0.0, 1.0]))
    totals, _ = np.histogram(arrival_s, edges_s)
    middle_s = (edges_s[:-1] + edges_s[1:]) / 2
    figure, axes = _panels(2, 1, width=11, height=6, share_time=True)
    named = (
        ("both met", latencies.met, "#bbbbbb", "-", 4.0),
        ("TTFT met", latencies.met_ttft, _PREFILL, "--", 1.5),
        ("TPOT met", latencies.met_tpot, _DECODE, ":", 1.8),
    )
    known = totals > 0
    marker = "o" if len(totals) == 1 else None
    for label, met, colour, style, width in named:
        shares = np.histogram(arrival_s[met], edges_s)[0][known] / totals[known]
        axes[0].plot(middle_s[known], 100 * shares, style, color=colour, linewidth=width, marker=marker, label=label)
    axes[0].set_ylabel("requests (%)")
    axes[0].set_ylim(-2, 102)
    width_s = edges_s[1] - edges_s[0]
    met_counts, _ = np.histogram(arrival_s[latencies.met], edges_s)
    axes[1].stairs(totals / width_s, edges_s, color=_NEUTRAL, linewidth=1.5, label="offered")
    axes[1].stairs(met_counts / width_s, edges_s, color=_TARGET, linewidth=1.5, label="met both targets (goodput)")
    axes[1].set_ylabel("requests/s")
    axes[1].set_ylim(bottom=0)
    axes[1].set_xlabel("time of arrival since the start (s)")
    for axis in axes:
        _finish(axis, legend_above=True)
    figure.suptitle("SLO attainment by time of arrival")
    return figure


def _ttft_by_prompt(result: StudyResult, latencies: RequestLatencies, slos: Sequence[SloClass]) -> Figure:
    known = np.flatnonzero(latencies.ttft_s > 0)
    chosen = (
        known[np.linspace(0, len(known) - 1, min(len(known), _SCATTER_POINTS)).astype(int)] if len(known) else known
    )
    figure, axes = _panels(1, 1, width=8, height=5.5)
    for label, met, colour in (("met both targets", True, _PREFILL), ("missed one or both", False, _MISSED)):
        rows = chosen[latencies.met[chosen] == met]
        if len(rows):
            axes[0].scatter(
                result.requests.prompt_tokens[rows],
                latencies.ttft_s[rows] * 1e3,
                s=7,
                alpha=0.4,
                color=colour,
                linewidths=0,
                label=label,
            )
    for slo, colour in zip(slos, _shades(len(slos)), strict=True):
        label = f"{slo.name} TTFT target: {slo.ttft_ms:g} ms"
        axes[0].axhline(slo.ttft_ms, color=colour, linestyle="--", linewidth=1.2, label=label)
    if len(chosen):
        axes[0].set_xscale("log")
        axes[0].set_yscale("log")
        axes[0].xaxis.set_major_formatter(_PLAIN_NUMBERS)
        axes[0].yaxis.set_major_formatter(_PLAIN_NUMBERS)
    axes[0].set_xlabel("prompt (tokens)")
    axes[0].set_ylabel("TTFT (ms)")
    _finish(axes[0])
    shown = "" if len(chosen) == len(known) else f", {len(chosen):,} of {len(known):,} requests"
    figure.suptitle(f"TTFT by prompt length{shown}")
    return figure


def _panels(
    rows: int, columns: int, *, width: float, height: float, share_time: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=share_time)
    return figure, [axis for row in grid for axis in row]


def _scale(axis: Axes, values: NDArray[np.float64]) -> None:
    """Logarithmic where the values, ascending, differ by much."""
    if 0 < 20 * values[0] < values[-1]:
        axis.set_xscale("log")
        axis.xaxis.set_major_formatter(_PLAIN_NUMBERS)


def _finish(axis: Axes, *, legend_above: bool = False) -> None:
    axis.grid(alpha=0.3, which="both", linewidth=0.5)
    names = axis.get_legend_handles_labels()[1]
    if names and legend_above:
        axis.legend(fontsize="small", frameon=False, ncols=len(names), loc="lower right", bbox_to_anchor=(1.0, 0.98))
    elif names:
        axis.legend(fontsize="small", framealpha=0.85)


def _shades(count: int) -> tuple[str, ...]:
    return tuple(_SHADES[index % len(_SHADES)] for index in range(count))


def _quantiles(values_s: NDArray[np.float64], shares: NDArray[np.float64]) -> NDArray[np.float64]:
    known = values_s[~np.isnan(values_s)]
    return np.quantile(known, shares) * 1e3 if len(known) else known


def _histogram_quantiles(result: StudyResult, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    if not result.itl_s.weight:
        return np.empty(0)
    return np.array([result.itl_s.quantile(float(share)) for share in shares]) * 1e3
