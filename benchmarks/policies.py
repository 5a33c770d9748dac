"""Which policy serves the most: Mooncake's conversation hour on 8 prefill and 8 decode workers of eight A800 each.

    python -m benchmarks.policies [--quick] [--trace FILE] [--only PART ...]

Everything is simulated by the event heap: a 70 B model by its roofline, prefix caches of 3 M tokens a prefill worker,
targets of 30 s to the first token and of 100 or 200 ms per token, the hour of the trace run faster or slower. Its times
are rounded to 3 s; requests of one time are spread over these.

- capacity: the highest load at which `ttft_min` keeps 90 % of all requests within both targets; 100 % from here on.
- curve: every dispatch policy from 50 to 150 % of it, without admission control. The paper's mean times to the first
  token (FAST'25, section 5.3) stand beside ours at 100 %, and where that of `ttft_min` is nearest to theirs.
- overload: the three forms of admission at 120 and 150 %. Of the refused requests a sample is let in, each alone into
  the cluster that refused it: how many meet both targets tells how many were refused for nothing.
- oscillation: the loads of both pools where decode is the bottleneck, by admission that looks at the present decode
  load and by admission that forecasts it.
- store: `ttft_min` at 100 % where workers have caches of a tenth as much, with a store that all share and without.

Studies run on all cores; events/s are those of one core's time. Of the hour the first 45 minutes are taken; with
`--quick` 5 of them, 3 loads and smaller samples, too short for queues to grow as long. Without the trace nothing is
measured.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.policies_overload import overload, overload_jobs
from benchmarks.policies_runner import FORMS, JUDGING_FORMS, TPOT_TARGET_S, Runner, job_at
from benchmarks.policies_runs import TPOT_TARGETS_S, Job, Load, Ran
from benchmarks.report import finish, print_table
from workload.goodput import search

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from contracts.config import AdmissionForm, DispatchPolicyName

TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
PARTS = ("curve", "overload", "oscillation", "store")
POLICIES: tuple[DispatchPolicyName, ...] = ("random", "round_robin", "least_loaded", "prefix_only", "ttft_min")
#: Mooncake (FAST'25): mean TTFT of its scheduling strategies, seconds.
PAPER_MEAN_TTFT_S = {"random": 19.65, "least_loaded": 5.27, "prefix_only": 3.58, "ttft_min": 3.07}


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    #: Of the trace, from its start.
    trace_s: float | None
    loads: tuple[float, ...]
    tolerance: float
    #: Refused requests that are let in, each alone, by form of admission.
    num_let_in: dict[AdmissionForm, int]
    oscillation_s: float


FULL = Effort(
    trace_s=2700.0,
    loads=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.35, 1.5),
    tolerance=0.02,
    num_let_in={"current": 60, "predicted": 180},
    oscillation_s=600.0,
)
QUICK = Effort(
    trace_s=300.0,
    loads=(0.5, 1.0, 1.2),
    tolerance=0.05,
    num_let_in={"current": 8, "predicted": 24},
    oscillation_s=120.0,
)


# --- capacity -------------------------------------------------------------------------------------------


def capacity(runner: Runner, at_start: Load, tolerance: float) -> float:
    """The speed of the trace at which 90 % of the requests meet both targets."""

    def attained(speed: float) -> float:
        (ran,) = runner.all([Job(load=replace(at_start, speed=speed))])
        return ran.attained[TPOT_TARGET_S]

    found = search(attained, start_rps=1.5, low_rps=0.1, high_rps=20.0, tolerance=tolerance)
    print_table(
        "capacity: the trace at some multiple of its speed, ttft_min",
        ["speed", "both targets met"],
        [[point.rate_rps, point.attainment] for point in sorted(found.points, key=lambda point: point.rate_rps)],
    )
    return found.goodput_rps


# --- the curve ------------------------------------------------------------------------------------------


def curve_jobs(at_capacity: Load, loads: tuple[float, ...]) -> dict[tuple[DispatchPolicyName, float], Job]:
    return {(policy, load): job_at(at_capacity, load, policy) for load in loads for policy in POLICIES}


def curve(runner: Runner, at_capacity: Load, loads: tuple[float, ...]) -> dict[str, float]:
    jobs = curve_jobs(at_capacity, loads)
    ran = dict(zip(jobs, runner.all(jobs.values()), strict=True))
    print_table(
        "dispatch policies without admission control, by load in parts of the capacity",
        [
            "policy",
            "load",
            "TTFT mean s",
            "p90 s",
            "TPOT mean ms",
            *(f"met at {target_s * 1e3:.0f} ms" for target_s in TPOT_TARGETS_S),
            "cached",
            "fetched",
            "prefill busy",
            "decode busy",
            "events",
            "events/s",
        ],
        [
            [
                policy,
                load,
                each.mean_ttft_s,
                each.p90_ttft_s,
                each.mean_tpot_s * 1e3,
                *(each.attained[target_s] for target_s in TPOT_TARGETS_S),
                each.cached_share,
                each.fetched_share,
                each.prefill_busy,
                each.decode_busy,
                each.num_events,
                each.events_per_s,
            ]
            for (policy, load), each in ran.items()
        ],
    )
    paper_s = PAPER_MEAN_TTFT_S["ttft_min"]
    nearest = min(loads, key=lambda load: abs(ran["ttft_min", load].mean_ttft_s - paper_s))
    print_table(
        f"mean TTFT at 100 %, and at the step nearest to the paper's level ({nearest:.0%} of the capacity), seconds; "
        "Mooncake's beside them (FAST'25: other engine, same kind of nodes and trace)",
        ["policy", "at 100 %", "p90", f"at {nearest:.0%}", "p90", "theirs"],
        [
            [
                policy,
                *(_seconds(value) for at in (1.0, nearest) for value in _mean_and_p90(ran[policy, at])),
                PAPER_MEAN_TTFT_S.get(policy, "-"),
            ]
            for policy in POLICIES
        ],
    )
    figures = {f"mean_ttft_{policy}_s": ran[policy, 1.0].mean_ttft_s for policy in POLICIES}
    figures |= {f"p90_ttft_{policy}_s": ran[policy, 1.0].p90_ttft_s for policy in POLICIES}
    figures["paper_level_load"] = nearest
    figures |= {f"paper_level_mean_ttft_{policy}_s": ran[policy, nearest].mean_ttft_s for policy in POLICIES}
    figures["events_per_s"] = _events_per_s(ran.values())
    return figures


def _mean_and_p90(ran: Ran) -> tuple[float, float]:
    return ran.mean_ttft_s, ran.p90_ttft_s


def _seconds(value: float) -> str:
    return f"{value:.2f}"


def _events_per_s(ran: Iterable[Ran]) -> float:
    """Of all together."""
    every = list(ran)
    return sum(each.num_events for each in every) / sum(each.cpu_s for each in every)


# --- oscillation ----------------------------------------------------------------------------------------


def oscillation_jobs(seconds: float) -> list[Job]:
    """At 1.5 times what the decode worker can write, by form of admission."""
    load = Load(trace=None, speed=10.0, seconds=seconds)
    return [Job(load=load, form=form, ttft_target_s=24.0, tpot_target_s=OSCILLATION_TPOT_S) for form in FORMS]


def oscillation(runner: Runner, seconds: float) -> dict[str, float]:
    ran: dict[AdmissionForm, Ran] = dict(zip(FORMS, runner.all(oscillation_jobs(seconds)), strict=True))
    loads: dict[AdmissionForm, tuple[NDArray[np.float32], NDArray[np.float32]]] = {
        form: (each.prefill_load[WARM_UP:], each.decode_load[WARM_UP:]) for form, each in ran.items()
    }
    print_table(
        "loads of both pools where decode is the bottleneck, in parts of the targets, once both have filled",
        [
            "admission",
            "prefill mean",
            "deviation",
            "decode mean",
            "deviation",
            "lowest",
            "highest",
            "correlation",
            "accepted",
            "met of all",
            "events/s",
        ],
        [
            [
                form,
                float(prefill.mean()),
                float(prefill.std()),
                float(decode.mean()),
                float(decode.std()),
                float(decode.min()),
                float(decode.max()),
                float(np.corrcoef(prefill, decode)[0, 1]),
                ran[form].num_accepted / ran[form].num_requests,
                ran[form].attained[OSCILLATION_TPOT_S],
                ran[form].events_per_s,
            ]
            for form, (prefill, decode) in loads.items()
        ],
    )
    figures = {f"oscillation_correlation_{form}": float(np.corrcoef(*loads[form])[0, 1]) for form in JUDGING_FORMS}
    for form in JUDGING_FORMS:
        figures[f"prefill_load_deviation_{form}"] = float(loads[form][0].std())
        figures[f"decode_load_deviation_{form}"] = float(loads[form][1].std())
        figures[f"oscillation_in_slo_{form}"] = ran[form].attained[OSCILLATION_TPOT_S]
    return figures


OSCILLATION_TPOT_S = 0.06
#: Samples of a second.
WARM_UP = 40


# --- the store ------------------------------------------------------------------------------------------

#: What device memory might hold of each worker's prompts, and the store: millions of tokens.
SMALL_CACHE_M = 0.3
STORES_M = (0, 3, 100)


def store_jobs(at_capacity: Load) -> dict[int, Job]:
    cache_tokens = round(SMALL_CACHE_M * 1e6)
    return {
        size_m: Job(load=at_capacity, prefix_cache_tokens=cache_tokens, store_tokens=size_m * 1_000_000)
        for size_m in STORES_M
    }


def store(runner: Runner, at_capacity: Load) -> dict[str, float]:
    jobs = store_jobs(at_capacity)
    ran = dict(zip(jobs, runner.all(jobs.values()), strict=True))
    print_table(
        f"a store for all workers, of which each caches {SMALL_CACHE_M} M tokens itself; ttft_min at 100 %",
        ["store M tokens", "TTFT mean s", "p90 s", "met both", "cached", "fetched", "prefill busy"],
        [
            [
                size_m,
                each.mean_ttft_s,
                each.p90_ttft_s,
                each.attained[TPOT_TARGET_S],
                each.cached_share,
                each.fetched_share,
                each.prefill_busy,
            ]
            for size_m, each in ran.items()
        ],
    )
    figures = {f"store_{size_m}m_mean_ttft_s": each.mean_ttft_s for size_m, each in ran.items()}
    return figures | {f"store_{size_m}m_cached": each.cached_share for size_m, each in ran.items()}


# --- all ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 60 s: part of the trace, few loads and samples")
    parser.add_argument("--trace", type=Path, default=TRACE, help=f"the conversation trace (default {TRACE})")
    parser.add_argument("--only", choices=PARTS, nargs="+", help="these parts alone, beside the capacity")
    arguments = parser.parse_args()
    effort: Effort = QUICK if arguments.quick else FULL
    parts = arguments.only or PARTS
    if not arguments.trace.exists():
        parser.error(f"no trace at {arguments.trace}: give --trace FILE")
    figures: dict[str, float] = {}
    num_processes = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn")) as pool:
        runner = Runner(pool, num_processes)
        load = Load(trace=arguments.trace, speed=1.0, seconds=effort.trace_s)
        if "oscillation" in parts:
            # The search for the capacity leaves the other cores idle.
            runner.prepare(oscillation_jobs(effort.oscillation_s))
        if {"curve", "overload", "store"} & set(parts):
            speed = figures["capacity_speed"] = capacity(runner, load, effort.tolerance)
            at_capacity = replace(load, speed=speed)
            if "overload" in parts:
                # Refusals are judged when these are known.
                runner.prepare(overload_jobs(at_capacity).values())
            if "curve" in parts:
                # Those with the longest queues take longest.
                runner.prepare(reversed(curve_jobs(at_capacity, effort.loads).values()))
            if "overload" in parts:
                figures |= overload(runner, at_capacity, effort.num_let_in)
            if "curve" in parts:
                figures |= curve(runner, at_capacity, effort.loads)
            if "store" in parts:
                figures |= store(runner, at_capacity)
        if "oscillation" in parts:
            figures |= oscillation(runner, effort.oscillation_s)
    finish("policies", figures)


if __name__ == "__main__":
    main()
