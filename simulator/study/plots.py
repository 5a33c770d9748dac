"""A study's plots, as PNG files. Imported only when they are asked for: matplotlib takes half a second to load."""

# matplotlib's own annotations leave the keyword arguments of nearly every method open.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from simulator.study.metrics import request_latencies
from workload.plots import (
    CURVE_POINTS,
    PLAIN_NUMBERS,
    SCATTER_POINTS,
    finish,
    panels,
    quantiles_ms,
    scale,
    shades,
    thinned,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from simulator.heap.results import StudyResult
    from simulator.study.metrics import RequestLatencies
    from workload.slo import SloClass

#: Along the time: what an eye can tell apart.
_TIME_BINS = 60

_PREFILL, _DECODE, _TARGET, _MISSED, _NEUTRAL = "#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#555555"


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
    shares = np.linspace(0.0, 1.0, CURVE_POINTS)
    curves = (
        ("TTFT", quantiles_ms(latencies.ttft_s, shares), [slo.ttft_ms for slo in slos]),
        ("TPOT", quantiles_ms(latencies.tpot_s, shares), [slo.tpot_ms for slo in slos]),
        ("ITL", _histogram_quantiles(result, shares), [slo.tpot_ms for slo in slos]),
    )
    figure, axes = panels(1, 3, width=13, height=4)
    for axis, (name, values_ms, targets_ms) in zip(axes, curves, strict=True):
        if len(values_ms):
            axis.plot(values_ms, 100 * shares, color=_PREFILL, linewidth=1.8)
            scale(axis, values_ms)
        for slo, target_ms, colour in zip(slos, targets_ms, shades(len(slos)), strict=True):
            label = f"{slo.name} {'TPOT' if name == 'ITL' else name} target: {target_ms:g} ms"
            axis.axvline(target_ms, color=colour, linestyle="--", linewidth=1.2, label=label)
        axis.set_xlabel(f"{name} (ms)")
        axis.set_ylim(0, 100)
        finish(axis)
    axes[0].set_ylabel("requests at or below (%)")
    axes[2].set_ylabel("gaps between tokens at or below (%)")
    figure.suptitle("Distribution of latencies")
    return figure


def _timeline(result: StudyResult) -> Figure:
    line = result.time_line
    figure, axes = panels(3, 1, width=11, height=8, share_time=True)
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
        finish(axis, legend_above=True)
    figure.suptitle("Load over time")
    return figure


def _attainment(result: StudyResult, latencies: RequestLatencies) -> Figure:
    arrival_s = result.requests.arrival_s
    span_s = arrival_s[-1] - arrival_s[0]
    # All at once are those of one second.
    edges_s = arrival_s[0] + (np.linspace(0.0, span_s, _TIME_BINS + 1) if span_s > 0 else np.array([0.0, 1.0]))
    totals, _ = np.histogram(arrival_s, edges_s)
    middle_s = (edges_s[:-1] + edges_s[1:]) / 2
    figure, axes = panels(2, 1, width=11, height=6, share_time=True)
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
        finish(axis, legend_above=True)
    figure.suptitle("SLO attainment by time of arrival")
    return figure


def _ttft_by_prompt(result: StudyResult, latencies: RequestLatencies, slos: Sequence[SloClass]) -> Figure:
    known = np.flatnonzero(latencies.ttft_s > 0)
    chosen = thinned(known, SCATTER_POINTS)
    figure, axes = panels(1, 1, width=8, height=5.5)
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
    for slo, colour in zip(slos, shades(len(slos)), strict=True):
        label = f"{slo.name} TTFT target: {slo.ttft_ms:g} ms"
        axes[0].axhline(slo.ttft_ms, color=colour, linestyle="--", linewidth=1.2, label=label)
    if len(chosen):
        axes[0].set_xscale("log")
        axes[0].set_yscale("log")
        axes[0].xaxis.set_major_formatter(PLAIN_NUMBERS)
        axes[0].yaxis.set_major_formatter(PLAIN_NUMBERS)
    axes[0].set_xlabel("prompt (tokens)")
    axes[0].set_ylabel("TTFT (ms)")
    finish(axes[0])
    shown = "" if len(chosen) == len(known) else f", {len(chosen):,} of {len(known):,} requests"
    figure.suptitle(f"TTFT by prompt length{shown}")
    return figure


def _histogram_quantiles(result: StudyResult, shares: NDArray[np.float64]) -> NDArray[np.float64]:
    if not result.itl_s.weight:
        return np.empty(0)
    return np.array([result.itl_s.quantile(float(share)) for share in shares]) * 1e3
