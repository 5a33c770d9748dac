"""What moving requests and breathing pools bring: sixteen simulated workers, after Llumnix (OSDI'24, section 6).

    python -m benchmarks.elasticity [--quick] [--only PART ...]

The event heap runs the production policies (dispatch, moves, scaling, lending) over LLaMA-7B on A10-like memory;
lengths are the paper's power laws, gaps between arrivals are Gamma-distributed (`benchmarks.elasticity_runs` has all of
it). All workers are mixed but in the last part. No figure is of a real engine: steps take what a roofline says.

- curve: P99 of the time to the first token over the rate, without moves by the dispatchers that there are (`freeness`
  counts queued demand and is what the paper compares with as INFaaS++; `ttft_min` is ours) and with moves. The figure
  is that of 80 % of the capacity: the best dispatcher without moves over the better one with them; the ratio to each
  stands beside it, also of `least_loaded` (the shortest queue) and `round_robin`.
- mixes: the same at one rate for other lengths.
- cvs: the same at 80 % for burstier arrivals, and for Poisson ones as in the paper's section 6.3.
- priorities: a tenth of the requests are urgent, coefficients of variation of 2 to 8 (section 6.4), at 80 %. All alike;
  these read first; and with memory kept free around them. The figure is the smallest of the gains in the urgent ones'
  P99 over the coefficients. The paper has S-S lengths; 10,000 of these are over before memory is as full as it gets.

**Capacity** is the highest rate at which a fleet with moves is stable: of what arrives in the second half of a run it
ends as much in that time (97 %, for counts of a finite run differ by chance; the line through the probed rates says
where it falls below). The paper names no capacity. It takes rates at which memory is what is scarce and queues come and
go: most requests begin at once, the tail waits. The highest such rate is where queues begin to grow without end; a
limit of ours for latency would instead name the rate at which the tail is short, and leave moves nothing to do.
- scaling: a day's load in short. The fewest workers that stay up all day and have as good a P99, against as many as
  the autoscaler wants. A start takes 30 s.
- shift: long prompts, then long answers. Workers are lent between prefill and decode; compared with the best split for
  each phase. And how often roles changed, and were changed back.

P99s are of all requests of all seeds. `--quick` has a tenth of the requests and of the seeds one: it shows that all
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
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from concurrent.futures import Future

    from numpy.typing import NDArray

    from benchmarks.elasticity_runs import Priorities

PARTS = ("curve", "mixes", "cvs", "priorities", "scaling", "shift")
#: Of the capacity: where the figures are taken.
LOAD_SHARE = 0.8
#: Of what arrives in the second half of a run: what must end in it, at least.
SERVED = 0.97
#: Where the curve was not measured: the capacity that it found.
KNOWN_CAPACITY_RPS = 9.2
#: Of the day: at 80 % of this nearly all requests meet 5 s and 100 ms.
SCALING_CAPACITY_RPS = 9.5
#: For the other mixes: at about as much of what the memory can hold.
MIX_RATES_RPS = {"ss": 30.0, "mm": 7.6, "ll": 2.6, "sl": 3.4, "ls": 9.0}
PRIORITIES: tuple[Priorities, ...] = ("none", "order", "headroom")


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    #: Where the capacity is looked for.
    probed_rps: tuple[float, ...]
    #: Of the capacity: the points of the curve.
    shares: tuple[float, ...]
    num_requests: int
    seeds: tuple[int, ...]
    mixes: tuple[str, ...]
    cvs: tuple[float, ...]
    urgent_cvs: tuple[float, ...]
    day_s: float
    static_workers: tuple[int, ...]
    phase_s: float


FULL = Effort(
    probed_rps=(9.0, 10.0, 11.0),
    shares=(0.5, 0.6, 0.7, LOAD_SHARE, 0.9, 1.0),
    num_requests=10_000,
    seeds=(1, 2, 3),
    mixes=("ss", "ll", "sl", "ls"),
    cvs=(1.0, 4.0, 8.0),
    urgent_cvs=(2.0, 4.0, 6.0, 8.0),
    day_s=3600.0,
    static_workers=(12, 13, 14, 15, 16),
    phase_s=240.0,
)
QUICK = Effort(
    probed_rps=(9.0, 12.0),
    shares=(LOAD_SHARE,),
    num_requests=1000,
    seeds=(1,),
    mixes=("ss",),
    cvs=(4.0,),
    urgent_cvs=(8.0,),
    day_s=300.0,
    static_workers=(12, 16),
    phase_s=30.0,
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
#: Compared with where the figure is taken.
SIMPLE = {
    "least_loaded": Job(load=Load(), policy="least_loaded"),
    "round_robin": Job(load=Load(), policy="round_robin"),
}
#: Those of one place have the same dispatcher.
ALONE, MOVING = ("freeness", "ttft_min"), ("freeness, moves", "ttft_min, moves")


def jobs_at(load: Load, effort: Effort, ways: Mapping[str, Job] = WAYS) -> dict[str, list[Job]]:
    """By way: one for each seed."""
    load = replace(load, num_requests=effort.num_requests)
    return {
        name: [at_rate(replace(way, load=load), load.rate_rps, seed) for seed in effort.seeds]
        for name, way in ways.items()
    }


def find_capacity(runner: Runner, effort: Effort) -> float:
    """With the dispatcher that does better at each rate."""
    moving = {name: WAYS[name] for name in MOVING}
    jobs = {rate_rps: jobs_at(Load(rate_rps=rate_rps), effort, moving) for rate_rps in effort.probed_rps}
    runner.prepare(job for each in jobs.values() for some in each.values() for job in some)
    return capacity(
        {
            rate_rps: max(float(np.mean([one.served for one in runner.all(some)])) for some in each.values())
            for rate_rps, each in jobs.items()
        }
    )


def curve(runner: Runner, effort: Effort) -> dict[str, float]:
    capacity_rps = find_capacity(runner, effort)
    jobs = {share: jobs_at(Load(rate_rps=share * capacity_rps), effort) for share in effort.shares}
    simple = jobs_at(Load(rate_rps=LOAD_SHARE * capacity_rps), effort, SIMPLE)
    runner.prepare(job for each in (*jobs.values(), simple) for some in each.values() for job in some)
    ran = {share: {name: runner.all(some) for name, some in each.items()} for share, each in jobs.items()}
    at_figure = ran[LOAD_SHARE]
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
            "served",
            "with moves",
            "preempted",
            "with moves",
            "moved",
            "prompts",
            "pause ms",
            "memory used",
        ],
        [_row(share * capacity_rps, share, each) for share, each in ran.items()],
    )
    best_s = min(p99(at_figure[name], _ttft) for name in MOVING)
    pauses_s = [each.pause_p99_s for way in MOVING for each in at_figure[way]]
    return {
        "capacity_rps": capacity_rps,
        "p99_ttft_gain": gain(at_figure),
        **{f"p99_ttft_gain_{alone}": p99(at_figure[alone], _ttft) / best_s for alone in ALONE},
        **{f"p99_ttft_gain_{name}": p99(runner.all(some), _ttft) / best_s for name, some in simple.items()},
        "best_p99_ttft_gain": max(gain(each) for each in ran.values()),
        "p99_ttft_dispatch_only_s": min(p99(at_figure[name], _ttft) for name in ALONE),
        "p99_ttft_moves_s": best_s,
        "pause_p99_ms": 1e3 * float(np.nanmax(pauses_s)) if np.isfinite(pauses_s).any() else 0.0,
    }


def capacity(served: dict[float, float]) -> float:
    """Where the line through the measured points crosses `SERVED` first; the last rate where it does not."""
    rates = sorted(served)
    for low, high in itertools.pairwise(rates):
        if served[high] < SERVED <= served[low]:
            return low + (high - low) * (served[low] - SERVED) / (served[low] - served[high])
    return rates[-1] if served[rates[-1]] >= SERVED else rates[0]


def gain(ways: dict[str, list[Ran]]) -> float:
    """Of the better dispatcher without moves over the better one with moves."""
    return min(p99(ways[name], _ttft) for name in ALONE) / min(p99(ways[name], _ttft) for name in MOVING)


def mixes(runner: Runner, effort: Effort) -> dict[str, float]:
    loads = {mix: Load(mix=mix, rate_rps=MIX_RATES_RPS[mix]) for mix in effort.mixes}
    return _compare(runner, effort, "other lengths of prompts and answers", loads)


def cvs(runner: Runner, effort: Effort, capacity_rps: float) -> dict[str, float]:
    rate_rps = LOAD_SHARE * capacity_rps
    loads = {f"cv{cv:g}": Load(rate_rps=rate_rps, cv=cv) for cv in effort.cvs}
    return _compare(runner, effort, "M-M lengths, other coefficients of variation", loads)


def _compare(runner: Runner, effort: Effort, title: str, loads: Mapping[str, Load]) -> dict[str, float]:
    jobs = {name: jobs_at(load, effort) for name, load in loads.items()}
    runner.prepare(job for each in jobs.values() for some in each.values() for job in some)
    ran = {name: {way: runner.all(some) for way, some in each.items()} for name, each in jobs.items()}
    print_table(
        title,
        ["load", "requests/s", *(f"P99 TTFT s, {way}" for way in WAYS), "gain", "served", "with moves", "memory used"],
        [
            [
                name.upper(),
                loads[name].rate_rps,
                *(p99(each[way], _ttft) for way in WAYS),
                gain(each),
                max(_served(each[way]) for way in ALONE),
                max(_served(each[way]) for way in MOVING),
                float(np.mean([one.blocks_used for one in each[MOVING[0]]])),
            ]
            for name, each in ran.items()
        ],
    )
    return {f"p99_ttft_gain_{name}": gain(each) for name, each in ran.items()}


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
        _served(best),
        _served(moving),
        sum(one.num_preemptions for one in best),
        sum(one.num_preemptions for one in moving),
        sum(one.moved[0] + one.moved[2] for one in moving),
        sum(one.moved[1] for one in moving),
        1e3 * float(np.nanmedian(pauses_s)) if np.isfinite(pauses_s).any() else 0.0,
        float(np.mean([one.blocks_used for one in moving])),
    ]


def _served(runs: Sequence[Ran]) -> float:
    return float(np.mean([one.served for one in runs]))


def _ttft(one: Ran) -> NDArray[np.float32]:
    return one.ttft_s


def p99(runs: Sequence[Ran], of: Callable[[Ran], NDArray[np.float32]]) -> float:
    """The smallest value with 99 % of all at or below it."""
    return float(np.quantile(np.concatenate([of(one) for one in runs]), 0.99, method="inverted_cdf"))


# --- priorities -----------------------------------------------------------------------------------------


def priorities(runner: Runner, effort: Effort, capacity_rps: float) -> dict[str, float]:
    load = Load(rate_rps=LOAD_SHARE * capacity_rps, num_requests=effort.num_requests)
    # Headroom is Llumnix': its dispatcher knows of it.
    base = Job(load=load, policy="freeness", moves=True)
    jobs = {
        (cv, way): [
            at_rate(replace(base, load=replace(load, cv=cv), priorities=way), load.rate_rps, seed)
            for seed in effort.seeds
        ]
        for cv in effort.urgent_cvs
        for way in PRIORITIES
    }
    runner.prepare(job for some in jobs.values() for job in some)
    ran = {key: runner.all(some) for key, some in jobs.items()}
    print_table(
        f"a tenth is urgent, M-M lengths at {load.rate_rps:.2f} requests/s; P99 of the urgent and of the others",
        [
            "variation",
            "priorities",
            "TTFT s",
            "mean s",
            "TPOT ms",
            "mean TPOT ms",
            "request s",
            "mean s",
            "others' TTFT s",
            "TPOT ms",
            "request s",
            "mean s",
            "moved",
        ],
        [
            [
                cv,
                way,
                p99(runs, _high_ttft),
                _mean(runs, _high_ttft),
                1e3 * p99(runs, _high_tpot),
                1e3 * _mean(runs, _high_tpot),
                p99(runs, _high_request),
                _mean(runs, _high_request),
                p99(runs, lambda one: one.ttft_s[~one.is_high]),
                1e3 * p99(runs, lambda one: one.tpot_s[~one.is_high]),
                p99(runs, _other_request),
                _mean(runs, _other_request),
                sum(one.moved[0] for one in runs),
            ]
            for (cv, way), runs in ran.items()
        ],
    )

    def gained(cv: float, of: Callable[[Ran], NDArray[np.float32]]) -> float:
        return p99(ran[cv, "none"], of) / p99(ran[cv, "headroom"], of)

    return {
        "high_priority_gain": min(gained(cv, _high_ttft) for cv in effort.urgent_cvs),
        **{f"high_priority_gain_cv{cv:g}": gained(cv, _high_ttft) for cv in effort.urgent_cvs},
        "high_priority_tpot_gain": min(gained(cv, _high_tpot) for cv in effort.urgent_cvs),
        "high_priority_request_gain": min(gained(cv, _high_request) for cv in effort.urgent_cvs),
        "others_mean_request_loss": max(
            _mean(ran[cv, "headroom"], _other_request) / _mean(ran[cv, "none"], _other_request)
            for cv in effort.urgent_cvs
        ),
    }


def _mean(runs: Sequence[Ran], of: Callable[[Ran], NDArray[np.float32]]) -> float:
    return float(np.concatenate([of(one) for one in runs]).mean())


def _high_ttft(one: Ran) -> NDArray[np.float32]:
    return one.ttft_s[one.is_high]


def _high_tpot(one: Ran) -> NDArray[np.float32]:
    return one.tpot_s[one.is_high]


def _high_request(one: Ran) -> NDArray[np.float32]:
    return one.e2e_s[one.is_high]


def _other_request(one: Ran) -> NDArray[np.float32]:
    return one.e2e_s[~one.is_high]


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
    parser.add_argument("--quick", action="store_true", help="within 60 s: a tenth of the requests, one seed")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts alone")
    parser.add_argument("--requests", type=int, help="of each run")
    parser.add_argument("--seeds", type=int, help="how many")
    arguments = parser.parse_args()
    effort: Effort = QUICK if arguments.quick else FULL
    if arguments.requests:
        effort = replace(effort, num_requests=arguments.requests)
    if arguments.seeds:
        effort = replace(effort, seeds=tuple(range(1, arguments.seeds + 1)))
    parts = arguments.only or PARTS
    figures: dict[str, float] = {}
    num_processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        runner = Runner(pool)
        if "curve" in parts:
            figures |= curve(runner, effort)
        if "mixes" in parts:
            figures |= mixes(runner, effort)
        capacity_rps = figures.get("capacity_rps", KNOWN_CAPACITY_RPS)
        if "cvs" in parts:
            figures |= cvs(runner, effort, capacity_rps)
        if "priorities" in parts:
            figures |= priorities(runner, effort, capacity_rps)
        if "scaling" in parts:
            figures |= scaling(runner, effort, SCALING_CAPACITY_RPS)
        if "shift" in parts:
            figures |= shift(runner.all, effort.phase_s)
    finish("elasticity", figures)


if __name__ == "__main__":
    main()
