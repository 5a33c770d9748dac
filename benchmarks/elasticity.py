"""What moving requests and breathing pools bring: sixteen simulated workers, after Llumnix (OSDI'24, section 6).

    python -m benchmarks.elasticity [--quick] [--only PART ...]

The event heap runs the production policies (dispatch, moves, scaling, lending) over LLaMA-7B on A10-like memory;
lengths are the paper's power laws, gaps between arrivals are Gamma-distributed (`benchmarks.elasticity_runs` has all of
it). All workers are mixed but in the last part. No figure is of a real engine: steps take what a roofline says.

- curve: P99 of the time to the first token over the rate, without moves by two dispatchers (`freeness`: Llumnix' own,
  by what is really free; `ttft_min`: ours) and with moves. Capacity is the rate at which 90 % of the requests still
  meet 5 s and 100 ms with moves; the figure is that of 80 % of it, the better dispatcher without moves over the better
  one with them.
- mixes: the same at one rate for other lengths.
- priorities: a tenth of the requests are urgent. All alike; these read first; and with memory kept free around them,
  so that batches stay small.
- scaling: a day's load in short. The fewest workers that stay up all day and have as good a P99, against as many as
  the autoscaler wants. A start takes 30 s.
- shift: long prompts, then long answers. Workers are lent between prefill and decode; compared with the best split for
  each phase. And how often roles changed, and were changed back.

P99s are of all requests of all seeds. `--quick` has an eighth of the requests and of the seeds one: it shows that all
of it runs, within a minute; queues hardly grow in that time, and tails are those of single requests.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.elasticity_runs import Job, Load, Ran, at_rate, run
from benchmarks.elasticity_shift import shift
from benchmarks.report import finish, print_table

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from benchmarks.elasticity_runs import Priorities

PARTS = ("curve", "mixes", "priorities", "scaling", "shift")
#: Of the capacity: where the figures are taken.
LOAD_SHARE = 0.8
ATTAINED = 0.9
#: Where the curve was not measured: the capacity that it found.
KNOWN_CAPACITY_RPS = 9.5
#: For the other mixes: at about as much of what the memory can hold.
MIX_RATES_RPS = {"ss": 30.0, "mm": 7.6, "ll": 2.6, "sl": 3.4, "ls": 9.0}
PRIORITIES: tuple[Priorities, ...] = ("none", "order", "headroom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    rates_rps: tuple[float, ...]
    num_requests: int
    seeds: tuple[int, ...]
    mixes: tuple[str, ...]
    day_s: float
    static_workers: tuple[int, ...]
    phase_s: float


FULL = Effort(
    rates_rps=(6.0, 7.0, 8.0, 8.5, 9.0, 9.5, 10.0, 11.0),
    num_requests=10_000,
    seeds=(1, 2, 3),
    mixes=("ss", "ll", "sl", "ls"),
    day_s=3600.0,
    static_workers=(12, 13, 14, 15, 16),
    phase_s=240.0,
)
QUICK = Effort(
    rates_rps=(7.0, 9.0),
    num_requests=1000,
    seeds=(1,),
    mixes=("ss",),
    day_s=450.0,
    static_workers=(12, 14, 16),
    phase_s=40.0,
)


class Runner:
    """Runs jobs on all cores; equal jobs once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._ran: dict[Job, Future[Ran]] = {}

    def prepare(self, jobs: Iterable[Job]) -> None:
        """Begins with them, and does not wait."""
        for job in jobs:
            if job not in self._ran:
                self._ran[job] = self._pool.submit(run, job)

    def all(self, jobs: Iterable[Job]) -> list[Ran]:
        jobs = list(jobs)
        self.prepare(jobs)
        return [self._ran[job].result() for job in jobs]


# --- the curve ------------------------------------------------------------------------------------------

#: By name.
WAYS = {
    "freeness": Job(load=Load(), policy="freeness"),
    "ttft_min": Job(load=Load(), policy="ttft_min"),
    "freeness, moves": Job(load=Load(), policy="freeness", moves=True),
    "ttft_min, moves": Job(load=Load(), policy="ttft_min", moves=True),
}
#: Those of one place have the same dispatcher.
ALONE, MOVING = ("freeness", "ttft_min"), ("freeness, moves", "ttft_min, moves")


def jobs_at(load: Load, effort: Effort) -> dict[str, list[Job]]:
    """By way: one for each seed."""
    load = replace(load, num_requests=effort.num_requests)
    return {
        name: [at_rate(replace(way, load=load), load.rate_rps, seed) for seed in effort.seeds]
        for name, way in WAYS.items()
    }


def curve(runner: Runner, effort: Effort) -> dict[str, float]:
    jobs = {rate_rps: jobs_at(Load(rate_rps=rate_rps), effort) for rate_rps in effort.rates_rps}
    runner.prepare(job for each in jobs.values() for some in each.values() for job in some)
    ran = {rate_rps: {name: runner.all(some) for name, some in each.items()} for rate_rps, each in jobs.items()}
    capacity_rps = capacity({rate_rps: max(_attained(each[way]) for way in MOVING) for rate_rps, each in ran.items()})
    figure_rps = LOAD_SHARE * capacity_rps
    at_figure = {name: runner.all(some) for name, some in jobs_at(Load(rate_rps=figure_rps), effort).items()}
    ran[figure_rps] = at_figure
    print_table(
        f"M-M lengths, gaps with a coefficient of variation of 2; capacity {capacity_rps:.2f} requests/s",
        [
            "requests/s",
            "of capacity",
            *(f"P99 TTFT s, {name}" for name in WAYS),
            "gain",
            *(f"gain, {name}" for name in ALONE),
            "mean TTFT s",
            "with moves",
            "met",
            "with moves",
            "preempted",
            "with moves",
            "moved",
            "prompts",
            "pause ms",
            "memory used",
        ],
        [_row(rate_rps, rate_rps / capacity_rps, ran[rate_rps]) for rate_rps in sorted(ran)],
    )
    pauses_s = [each.pause_p99_s for way in MOVING for each in at_figure[way]]
    return {
        "capacity_rps": capacity_rps,
        "p99_ttft_gain": gain(at_figure),
        **{
            f"p99_ttft_gain_{alone}": p99(at_figure[alone], _ttft) / p99(at_figure[moving], _ttft)
            for alone, moving in zip(ALONE, MOVING, strict=True)
        },
        "best_p99_ttft_gain": max(gain(each) for each in ran.values()),
        "p99_ttft_dispatch_only_s": min(p99(at_figure[name], _ttft) for name in ALONE),
        "p99_ttft_moves_s": min(p99(at_figure[name], _ttft) for name in MOVING),
        "pause_p99_ms": 1e3 * float(np.nanmax(pauses_s)) if np.isfinite(pauses_s).any() else 0.0,
    }


def capacity(attained: dict[float, float]) -> float:
    """Where the line through the measured points crosses `ATTAINED` first; the last rate where it does not."""
    rates = sorted(attained)
    for low, high in itertools.pairwise(rates):
        if attained[high] < ATTAINED <= attained[low]:
            return low + (high - low) * (attained[low] - ATTAINED) / (attained[low] - attained[high])
    return rates[-1] if attained[rates[-1]] >= ATTAINED else rates[0]


def gain(ways: dict[str, list[Ran]]) -> float:
    """Of the better dispatcher without moves over the better one with moves."""
    return min(p99(ways[name], _ttft) for name in ALONE) / min(p99(ways[name], _ttft) for name in MOVING)


def mixes(runner: Runner, effort: Effort) -> dict[str, float]:
    jobs = {mix: jobs_at(Load(mix=mix, rate_rps=MIX_RATES_RPS[mix]), effort) for mix in effort.mixes}
    runner.prepare(job for each in jobs.values() for some in each.values() for job in some)
    ran = {mix: {name: runner.all(some) for name, some in each.items()} for mix, each in jobs.items()}
    print_table(
        "other lengths of prompts and answers",
        ["mix", "requests/s", *(f"P99 TTFT s, {name}" for name in WAYS), "gain", "met", "with moves", "memory used"],
        [
            [
                mix.upper(),
                MIX_RATES_RPS[mix],
                *(p99(each[name], _ttft) for name in WAYS),
                gain(each),
                max(_attained(each[name]) for name in ALONE),
                max(_attained(each[name]) for name in MOVING),
                float(np.mean([one.blocks_used for one in each[MOVING[0]]])),
            ]
            for mix, each in ran.items()
        ],
    )
    return {f"p99_ttft_gain_{mix}": gain(each) for mix, each in ran.items()}


def _row(rate_rps: float, share: float, ways: dict[str, list[Ran]]) -> list[object]:
    best, moving = (ways[min(names, key=lambda name: p99(ways[name], _ttft))] for names in (ALONE, MOVING))
    pauses_s = [one.pause_p50_s for one in moving]
    return [
        f"{rate_rps:.2f}",
        f"{share:.0%}",
        *(p99(each, _ttft) for each in ways.values()),
        gain(ways),
        *(p99(ways[one], _ttft) / p99(ways[other], _ttft) for one, other in zip(ALONE, MOVING, strict=True)),
        float(np.concatenate([one.ttft_s for one in best]).mean()),
        float(np.concatenate([one.ttft_s for one in moving]).mean()),
        _attained(best),
        _attained(moving),
        sum(one.num_preemptions for one in best),
        sum(one.num_preemptions for one in moving),
        sum(one.moved[0] + one.moved[2] for one in moving),
        sum(one.moved[1] for one in moving),
        1e3 * float(np.nanmedian(pauses_s)) if np.isfinite(pauses_s).any() else 0.0,
        float(np.mean([one.blocks_used for one in moving])),
    ]


def _attained(runs: Sequence[Ran]) -> float:
    return float(np.concatenate([one.is_met for one in runs]).mean())


def _ttft(one: Ran) -> NDArray[np.float32]:
    return one.ttft_s


def p99(runs: Sequence[Ran], of: Callable[[Ran], NDArray[np.float32]]) -> float:
    """The smallest value with 99 % of all at or below it."""
    return float(np.quantile(np.concatenate([of(one) for one in runs]), 0.99, method="inverted_cdf"))


# --- priorities -----------------------------------------------------------------------------------------


def priorities(runner: Runner, effort: Effort, capacity_rps: float) -> dict[str, float]:
    load = Load(rate_rps=LOAD_SHARE * capacity_rps, num_requests=effort.num_requests)
    jobs = {
        way: [at_rate(Job(load=load, moves=True, priorities=way), load.rate_rps, seed) for seed in effort.seeds]
        for way in PRIORITIES
    }
    runner.prepare(job for some in jobs.values() for job in some)
    ran = {way: runner.all(some) for way, some in jobs.items()}
    print_table(
        f"a tenth is urgent, at {load.rate_rps:.2f} requests/s; P99 of the urgent and of the others",
        [
            "priorities",
            "TTFT s",
            "TPOT ms",
            "mean TPOT ms",
            "request s",
            "others' TTFT s",
            "TPOT ms",
            "request s",
            "moved",
        ],
        [
            [
                way,
                p99(runs, lambda one: one.ttft_s[one.is_high]),
                1e3 * p99(runs, lambda one: one.tpot_s[one.is_high]),
                1e3 * float(np.concatenate([one.tpot_s[one.is_high] for one in runs]).mean()),
                p99(runs, lambda one: one.e2e_s[one.is_high]),
                p99(runs, lambda one: one.ttft_s[~one.is_high]),
                1e3 * p99(runs, lambda one: one.tpot_s[~one.is_high]),
                p99(runs, lambda one: one.e2e_s[~one.is_high]),
                sum(one.moved[0] for one in runs),
            ]
            for way, runs in ran.items()
        ],
    )

    def gained(of: Callable[[Ran], NDArray[np.float32]]) -> float:
        return p99(ran["none"], of) / p99(ran["headroom"], of)

    return {
        "high_priority_gain": gained(lambda one: one.tpot_s[one.is_high]),
        "high_priority_ttft_gain": gained(lambda one: one.ttft_s[one.is_high]),
        "high_priority_request_gain": gained(lambda one: one.e2e_s[one.is_high]),
        "others_request_loss": p99(ran["headroom"], lambda one: one.e2e_s[~one.is_high])
        / p99(ran["none"], lambda one: one.e2e_s[~one.is_high]),
    }


# --- scaling --------------------------------------------------------------------------------------------


def scaling(runner: Runner, effort: Effort, capacity_rps: float) -> dict[str, float]:
    # At noon just below what all can do; in the mean a little more than half of that.
    amplitude = 0.8
    load = Load(rate_rps=LOAD_SHARE * capacity_rps / (1 + amplitude), amplitude=amplitude, period_s=effort.day_s)
    base = Job(load=load, moves=True)
    static_jobs = {count: replace(base, num_workers=count) for count in effort.static_workers}
    runner.prepare([replace(base, autoscale=True), *static_jobs.values()])
    (scaled,) = runner.all([replace(base, autoscale=True)])
    static = dict(zip(static_jobs, runner.all(static_jobs.values()), strict=True))
    scaled_s = p99([scaled], _ttft)
    print_table(
        f"a day of {effort.day_s:.0f} s, {load.rate_rps:.2f} requests/s and {amplitude:.0%} more or less",
        ["workers", "worker-hours", "P99 TTFT s", "mean s", "met", "preempted", "starts and stops"],
        [
            [
                name,
                one.worker_s / 3600,
                p99([one], _ttft),
                float(one.ttft_s.mean()),
                one.attained,
                one.num_preemptions,
                len(one.operations),
            ]
            for name, one in [*((f"{count}, always", one) for count, one in static.items()), ("as needed", scaled)]
        ],
    )
    alike = [count for count, one in static.items() if p99([one], _ttft) <= scaled_s]
    peak = min(alike, default=max(static))
    return {
        "worker_hours_saved": 1.0 - scaled.worker_s / static[peak].worker_s,
        "static_workers": peak,
        "scaled_p99_ttft_s": scaled_s,
        "static_p99_ttft_s": p99([static[peak]], _ttft),
    }


# --- all ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 60 s: an eighth of the requests, one seed")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts alone")
    arguments = parser.parse_args()
    effort: Effort = QUICK if arguments.quick else FULL
    parts = arguments.only or PARTS
    figures: dict[str, float] = {}
    num_processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        runner = Runner(pool)
        if "curve" in parts:
            figures |= curve(runner, effort)
        if "mixes" in parts:
            figures |= mixes(runner, effort)
        if "priorities" in parts:
            figures |= priorities(runner, effort, KNOWN_CAPACITY_RPS)
        if "scaling" in parts:
            figures |= scaling(runner, effort, KNOWN_CAPACITY_RPS)
        if "shift" in parts:
            figures |= shift(runner.all, effort.phase_s)
    finish("elasticity", figures)


if __name__ == "__main__":
    main()
