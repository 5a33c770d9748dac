"""Two runs of one workload, compared request by request.

Noise that both runs share (a long prompt, a burst) cancels in the ratio of a pair. Requests that follow each other are
not independent (they share queues and batches), so intervals come from a circular block bootstrap (Politis and Romano
1992): blocks of consecutive pairs are drawn, about the cube root of their number long (Künsch 1989). Of two runs of one
server that keeps up, some 5 of 100 such intervals leave out 1, as they should; of a server at its limit, where a single
queue lasts for the whole run, some 20 do.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from loadtest.metrics import Interval, attained

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from loadtest.columns import Floats, RequestColumns
    from loadtest.metrics import LoadMetrics
    from loadtest.report.document import LoadReport, ServerRun
    from workload.slo import SloClass

NUM_RESAMPLES = 2000
#: Of more pairs, so many are resampled, evenly spaced: enough for an interval a few per cent wide.
MAX_PAIRS = 5000
#: Fewer tell nothing.
MIN_PAIRS = 20
#: Resamples that are held in memory together.
_BATCH = 100
_SEED = 20_240_601
#: Below this attainment a server is taken to be at its limit.
_KEEPS_UP = 0.9
#: Offered rates further apart, relative, are another question than which server is faster.
_SAME_RATE = 0.02

_LATENCIES = ("ttft", "tpot", "itl", "second_token", "e2e")
_STATISTICS = ("mean_ms", "p50_ms", "p99_ms")
_RATES = ("offered_rps", "finished_rps", "goodput_rps", "prompt_tokens_per_s", "output_tokens_per_s")


class PairedRatio(msgspec.Struct, frozen=True, kw_only=True):
    """Of one figure of each request, B over A."""

    name: str
    #: Requests that have the figure in both runs.
    num_pairs: int
    #: Pairs that the interval was computed from.
    num_resampled: int
    #: Median over the pairs.
    ratio: float
    #: Of the median, 95 %; NaN of fewer than `MIN_PAIRS`.
    interval: Interval

    @property
    def differs(self) -> bool:
        """Whether the interval leaves out 1."""
        return self.interval.low > 1 or self.interval.high < 1


class PairedDifference(msgspec.Struct, frozen=True, kw_only=True):
    """Of the joint attainment, B - A, over requests that count in both runs; shares, not per cent."""

    num_pairs: int
    difference: float
    interval: Interval

    @property
    def differs(self) -> bool:
        return self.interval.low > 0 or self.interval.high < 0


class AggregateRatio(msgspec.Struct, frozen=True, kw_only=True):
    """A figure of each run as a whole; without an interval."""

    name: str
    a: float
    b: float
    #: B over A; NaN where it says nothing.
    ratio: float


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    name_a: str
    name_b: str
    #: Why requests could not be paired; empty where they were.
    unpaired_because: str
    paired: tuple[PairedRatio, ...]
    attainment: PairedDifference
    aggregates: tuple[AggregateRatio, ...]
    #: Sentences: what differs, what does not, and what forbids to conclude anything.
    verdict: tuple[str, ...]


def compare_reports(a: LoadReport, b: LoadReport, *, labels: tuple[str, str] = ("A", "B")) -> tuple[Comparison, ...]:
    """Runs of the same names, and a single run with a single one. Attainment is by A's targets. None where no run has
    a partner.
    """
    if len(a.runs) == len(b.runs) == 1:
        pairs = [(a.runs[0], b.runs[0])]
    else:
        by_name = {run.name: run for run in b.runs}
        pairs = [(run, by_name[run.name]) for run in a.runs if run.name in by_name]
    because = "" if a.workload_digest == b.workload_digest else "the reports are of different workloads"
    return tuple(
        _compare(
            run_a,
            run_b,
            a.slos,
            names=(f"{labels[0]} ({run_a.name})", f"{labels[1]} ({run_b.name})"),
            unpaired_because=because,
        )
        for run_a, run_b in pairs
    )


def compare_runs(runs: Sequence[ServerRun], slos: Sequence[SloClass]) -> tuple[Comparison, ...]:
    """The first run of a report against each other one: they asked the same."""
    return tuple(_compare(runs[0], run, slos, names=(runs[0].name, run.name), unpaired_because="") for run in runs[1:])


def _compare(
    a: ServerRun, b: ServerRun, slos: Sequence[SloClass], *, names: tuple[str, str], unpaired_because: str
) -> Comparison:
    paired: tuple[PairedRatio, ...] = ()
    attainment = PairedDifference(num_pairs=0, difference=math.nan, interval=Interval(math.nan, math.nan))
    if not unpaired_because:
        rows_a, rows_b = _matching_rows(a.requests, b.requests)
        paired = _paired_ratios(a.requests, b.requests, rows_a, rows_b)
        attainment = _paired_attainment(a.requests, b.requests, rows_a, rows_b, slos)
    return Comparison(
        name_a=names[0],
        name_b=names[1],
        unpaired_because=unpaired_because,
        paired=paired,
        attainment=attainment,
        aggregates=_aggregates(a.metrics, b.metrics),
        verdict=(*_reservations(a, b, names, unpaired_because), *_findings(paired, attainment, names)),
    )


def _matching_rows(a: RequestColumns, b: RequestColumns) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Of measured requests of one index, in the plan's order: neighbours share their fate."""
    measured_a, measured_b = np.flatnonzero(~a.is_warmup), np.flatnonzero(~b.is_warmup)
    _, in_a, in_b = np.intersect1d(a.index[measured_a], b.index[measured_b], return_indices=True)
    return measured_a[in_a], measured_b[in_b]


def _paired_ratios(
    a: RequestColumns, b: RequestColumns, rows_a: NDArray[np.intp], rows_b: NDArray[np.intp]
) -> tuple[PairedRatio, ...]:
    figures = (
        ("TTFT", a.ttft_s, b.ttft_s),
        ("TPOT", np.where(a.is_finished, a.tpot_s, np.nan), np.where(b.is_finished, b.tpot_s, np.nan)),
        ("longest gap", a.longest_gap_s, b.longest_gap_s),
        ("end to end", np.where(a.is_finished, a.e2e_s, np.nan), np.where(b.is_finished, b.e2e_s, np.nan)),
    )
    return tuple(_paired_ratio(name, of_a[rows_a], of_b[rows_b]) for name, of_a, of_b in figures)


def _paired_ratio(name: str, a: Floats, b: Floats) -> PairedRatio:
    # Logarithms make B over A the exact reciprocal of A over B.
    logs: Floats = np.log(b[(a > 0) & (b > 0)]) - np.log(a[(a > 0) & (b > 0)])
    sample = _thinned(logs)
    low, high = _bootstrap(sample, median=True)
    return PairedRatio(
        name=name,
        num_pairs=len(logs),
        num_resampled=len(sample),
        ratio=math.exp(float(np.median(logs))) if len(logs) else math.nan,
        interval=Interval(math.exp(low), math.exp(high)),
    )


def _paired_attainment(
    a: RequestColumns,
    b: RequestColumns,
    rows_a: NDArray[np.intp],
    rows_b: NDArray[np.intp],
    slos: Sequence[SloClass],
) -> PairedDifference:
    of_a, of_b = attained(a, slos), attained(b, slos)
    judged = of_a.judged[rows_a] & of_b.judged[rows_b]
    change = of_b.both[rows_b].astype(np.float64)[judged] - of_a.both[rows_a].astype(np.float64)[judged]
    low, high = _bootstrap(_thinned(change), median=False)
    return PairedDifference(
        num_pairs=len(change),
        difference=float(change.mean()) if len(change) else math.nan,
        interval=Interval(low, high),
    )


def _thinned(values: Floats) -> Floats:
    if len(values) <= MAX_PAIRS:
        return values
    return values[np.linspace(0, len(values) - 1, MAX_PAIRS).astype(np.intp)]


def _bootstrap(values: Floats, *, median: bool) -> tuple[float, float]:
    """95 % interval of the median or the mean; NaN of too few."""
    count = len(values)
    if count < MIN_PAIRS:
        return math.nan, math.nan
    generator = np.random.default_rng(_SEED)
    length = round(count ** (1 / 3))
    offsets = np.arange(length, dtype=np.int64)
    statistics: list[Floats] = []
    for _ in range(NUM_RESAMPLES // _BATCH):
        starts: NDArray[np.int64] = generator.integers(0, count, (_BATCH, -(-count // length), 1))
        rows: NDArray[np.int64] = (starts + offsets) % count
        drawn = values[rows.reshape((_BATCH, -1))[:, :count]]
        statistics.append(np.median(drawn, axis=1) if median else drawn.mean(axis=1))
    low, high = np.quantile(np.concatenate(statistics), (0.025, 0.975))
    return float(low), float(high)


def _aggregates(a: LoadMetrics, b: LoadMetrics) -> tuple[AggregateRatio, ...]:
    named = [(name, getattr(a, name), getattr(b, name)) for name in _RATES]
    for latency in _LATENCIES:
        for statistic in _STATISTICS:
            of_a, of_b = getattr(getattr(a, latency), statistic), getattr(getattr(b, latency), statistic)
            named.append((f"{latency}_{statistic.replace('_ms', '')}_ms", of_a, of_b))
    return tuple(
        AggregateRatio(name=name, a=of_a, b=of_b, ratio=of_b / of_a if of_a > 0 else math.nan)
        for name, of_a, of_b in named
    )


def _reservations(a: ServerRun, b: ServerRun, names: tuple[str, str], unpaired_because: str) -> list[str]:
    told = [
        f"{name} is invalid, so nothing follows for its server: {'; '.join(run.validity.reasons)}."
        for name, run in zip(names, (a, b), strict=True)
        if not run.validity.valid
    ]
    if unpaired_because:
        told.append(f"Requests are not paired: {unpaired_because}. Only the figures of the whole runs are compared.")
    rate_a, rate_b = a.metrics.offered_rps, b.metrics.offered_rps
    if abs(math.log(rate_b / rate_a)) > _SAME_RATE if rate_a > 0 and rate_b > 0 else rate_a != rate_b:
        told.append(f"The offered rates differ: {rate_a:,.3f} and {rate_b:,.3f} requests/s.")
    if not unpaired_because and min(a.metrics.attainment.joint, b.metrics.attainment.joint) < _KEEPS_UP:
        told.append(
            f"Under {_KEEPS_UP:.0%} of the requests met their targets: where one queue lasts for a whole run, "
            "intervals are too narrow. Repeat with other seeds before believing a small difference."
        )
    return told


def _findings(paired: Sequence[PairedRatio], attainment: PairedDifference, names: tuple[str, str]) -> list[str]:
    if not paired:
        return []
    told = [
        f"{each.name}: {names[1]} takes {each.ratio:.3f} times as long as {names[0]} "
        f"(95 %: {each.interval.low:.3f} to {each.interval.high:.3f})."
        for each in paired
        if each.differs
    ]
    if attainment.differs:
        told.append(
            f"Attainment: that of {names[1]} is {100 * attainment.difference:+.1f} points from that of {names[0]} "
            f"(95 %: {100 * attainment.interval.low:+.1f} to {100 * attainment.interval.high:+.1f})."
        )
    same = [each.name for each in paired if not each.differs and each.num_pairs >= MIN_PAIRS]
    if attainment.num_pairs >= MIN_PAIRS and not attainment.differs:
        same.append("attainment")
    few = [each.name for each in paired if each.num_pairs < MIN_PAIRS]
    if same:
        told.append(f"No difference that is more than noise: {', '.join(same)}.")
    if few:
        told.append(f"Too few pairs to tell (under {MIN_PAIRS}): {', '.join(few)}.")
    return told
