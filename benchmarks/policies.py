"""Which policy serves the most: Mooncake's conversation hour on 8 prefill and 8 decode workers of eight A800 each.

    python -m benchmarks.policies [--quick] [--trace FILE] [--only PART ...]

Everything is simulated by the event heap: a 70 B model by its roofline, prefix caches of 3 M tokens a prefill worker,
targets of 30 s to the first token and of 100 or 200 ms per token, the hour of the trace run faster or slower.

- capacity: the highest load at which `ttft_min` keeps 90 % of all requests within both targets; 100 % from here on.
- curve: every dispatch policy from 50 to 150 % of it, without admission control. The paper's mean times to the first
  token (FAST'25, section 5.3) stand beside ours at 100 %.
- overload: the three forms of admission at 120 and 150 %. Of the refused requests independent thin samples are
  admitted nevertheless, in runs of their own: how many meet both targets tells how many were refused for nothing.
- oscillation: the loads of both pools where decode is the bottleneck, by admission that looks at the present decode
  load and by admission that forecasts it.

`--quick` takes the first 450 s of the trace, 3 loads, and fewer samples. Without the trace nothing is measured.
"""

from __future__ import annotations

import argparse
import os
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.policies_runs import TPOT_TARGETS_S, Job, Load, Ran, forced_samples, run
from benchmarks.report import finish, print_table
from workload.goodput import search

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from contracts.config import AdmissionForm, DispatchPolicyName

TRACE = Path("../shared/traces/mooncake_conversation.jsonl")
PARTS = ("curve", "overload", "oscillation")
POLICIES: tuple[DispatchPolicyName, ...] = ("random", "round_robin", "least_loaded", "prefix_only", "ttft_min")
FORMS: tuple[AdmissionForm, ...] = ("none", "current", "predicted")
JUDGING_FORMS: tuple[AdmissionForm, ...] = ("current", "predicted")
#: Mooncake (FAST'25): mean TTFT of its scheduling strategies, seconds.
PAPER_MEAN_TTFT_S = {"random": 19.65, "least_loaded": 5.27, "prefix_only": 3.58, "ttft_min": 3.07}
#: Figures are those of the looser target; tables have both.
TPOT_TARGET_S = TPOT_TARGETS_S[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    #: Of the trace, from its start.
    trace_s: float | None
    loads: tuple[float, ...]
    tolerance: float
    #: Runs with samples of the refused, and how much of these each admits.
    num_samples: int
    sample_share: float
    oscillation_s: float


FULL = Effort(
    trace_s=None,
    loads=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 1.4, 1.5),
    tolerance=0.01,
    num_samples=8,
    sample_share=0.015,
    oscillation_s=600.0,
)
QUICK = Effort(
    trace_s=450.0, loads=(0.5, 1.0, 1.2), tolerance=0.05, num_samples=2, sample_share=0.02, oscillation_s=120.0
)


class Runner:
    """Runs jobs on all cores; equal jobs once."""

    def __init__(self, pool: ProcessPoolExecutor) -> None:
        self._pool = pool
        self._ran: dict[Job, Ran] = {}

    def all(self, jobs: Iterable[Job]) -> list[Ran]:
        jobs = list(jobs)
        missing = list(dict.fromkeys(job for job in jobs if job not in self._ran))
        self._ran.update(zip(missing, self._pool.map(run, missing), strict=True))
        return [self._ran[job] for job in jobs]


# --- capacity -------------------------------------------------------------------------------------------


def capacity(runner: Runner, at_start: Load, tolerance: float) -> float:
    """The speed of the trace at which 90 % of the requests meet both targets."""

    def attained(speed: float) -> float:
        (ran,) = runner.all([Job(load=replace(at_start, speed=speed))])
        return ran.attained[TPOT_TARGET_S]

    found = search(attained, start_rps=1.5, low_rps=0.1, high_rps=20.0, tolerance=tolerance)
    print_table(
        "capacity: the trace's hour at some multiple of its speed, ttft_min",
        ["speed", "both targets met"],
        [[point.rate_rps, point.attainment] for point in sorted(found.points, key=lambda point: point.rate_rps)],
    )
    return found.goodput_rps


# --- the curve ------------------------------------------------------------------------------------------


def curve(runner: Runner, at_capacity: Load, loads: tuple[float, ...]) -> dict[str, float]:
    jobs = {(policy, load): _job(at_capacity, load, policy) for load in loads for policy in POLICIES}
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
            ]
            for (policy, load), each in ran.items()
        ],
    )
    print_table(
        "mean TTFT at 100 %, seconds, and Mooncake's (FAST'25: other engine, same kind of nodes and trace)",
        ["policy", "ours", "ours p90", "theirs"],
        [
            [policy, ran[policy, 1.0].mean_ttft_s, ran[policy, 1.0].p90_ttft_s, PAPER_MEAN_TTFT_S.get(policy, "-")]
            for policy in POLICIES
        ],
    )
    figures = {f"mean_ttft_{policy}_s": ran[policy, 1.0].mean_ttft_s for policy in POLICIES}
    figures |= {f"p90_ttft_{policy}_s": ran[policy, 1.0].p90_ttft_s for policy in POLICIES}
    figures["met_alone_over_least_loaded"] = _ratio(ran["ttft_min", 1.2], ran["least_loaded", 1.2])
    return figures


def _job(load: Load, factor: float, policy: DispatchPolicyName, form: AdmissionForm = "none") -> Job:
    return Job(load=replace(load, speed=load.speed * factor), policy=policy, form=form, tpot_target_s=TPOT_TARGET_S)


def _ratio(ours: Ran, theirs: Ran) -> float:
    """Of requests within both targets."""
    return ours.attained[TPOT_TARGET_S] / max(1e-9, theirs.attained[TPOT_TARGET_S])


# --- overload -------------------------------------------------------------------------------------------


#: Of a run under overload.
Key = tuple["DispatchPolicyName", "AdmissionForm", float]


def overload(runner: Runner, at_capacity: Load, effort: Effort) -> dict[str, float]:
    policies: tuple[DispatchPolicyName, ...] = ("least_loaded", "ttft_min")
    keys: list[Key] = [(policy, form, factor) for factor in (1.2, 1.5) for policy in policies for form in FORMS]
    jobs = [_job(at_capacity, factor, policy, form) for policy, form, factor in keys]
    ran = dict(zip(keys, runner.all(jobs), strict=True))
    false_rejects = {
        key: _false_rejects(runner, ran[key], effort)
        for key in keys
        if key[0] == "ttft_min" and key[1] != "none" and key[2] == 1.5
    }
    print_table(
        "admission under overload; targets of 30 s and 200 ms. Falsely refused, of the offered: sampled",
        [
            "policy",
            "admission",
            "load",
            "accepted",
            "met of all",
            "missed of accepted",
            "falsely refused",
            "refused for",
        ],
        [
            [
                policy,
                form,
                factor,
                each.num_accepted / each.num_requests,
                each.attained[TPOT_TARGET_S],
                each.accepted_missing,
                false_rejects.get((policy, form, factor), "-"),
                ", ".join(f"{name} {count}" for name, count in each.num_rejected_for.items()) or "-",
            ]
            for (policy, form, factor), each in ran.items()
        ],
    )
    predicted: Key = ("ttft_min", "predicted", 1.5)
    return {
        "in_slo_over_least_loaded": _ratio(ran["ttft_min", "predicted", 1.2], ran["least_loaded", "none", 1.2]),
        "in_slo_over_least_loaded_predicted": _ratio(
            ran["ttft_min", "predicted", 1.2], ran["least_loaded", "predicted", 1.2]
        ),
        "false_reject_rate": false_rejects[predicted],
        "accepted_missing_slo": ran[predicted].accepted_missing,
        **{f"in_slo_{form}": ran["ttft_min", form, 1.5].attained[TPOT_TARGET_S] for form in FORMS},
    }


def _false_rejects(runner: Runner, ran: Ran, effort: Effort) -> float:
    """Share of the offered requests that were refused and would have met both targets."""
    samples = forced_samples(ran, effort.sample_share, effort.num_samples, seed=1)
    if not samples:
        return 0.0
    again = runner.all(samples)
    met = sum(each.forced_met for each in again) / sum(len(each.job.forced) for each in again)
    return met * len(ran.refused) / ran.num_requests


# --- oscillation ----------------------------------------------------------------------------------------


def oscillation(runner: Runner, seconds: float) -> dict[str, float]:
    """At 1.5 times what the decode worker can write."""
    load = Load(trace=None, speed=10.0, seconds=seconds)
    jobs = [Job(load=load, form=form, ttft_target_s=24.0, tpot_target_s=OSCILLATION_TPOT_S) for form in FORMS]
    ran: dict[AdmissionForm, Ran] = dict(zip(FORMS, runner.all(jobs), strict=True))
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
    with ProcessPoolExecutor(max_workers=os.cpu_count()) as pool:
        runner = Runner(pool)
        load = Load(trace=arguments.trace, speed=1.0, seconds=effort.trace_s)
        if "curve" in parts or "overload" in parts:
            speed = figures["capacity_speed"] = capacity(runner, load, effort.tolerance)
            at_capacity = replace(load, speed=speed)
            if "curve" in parts:
                figures |= curve(runner, at_capacity, effort.loads)
            if "overload" in parts:
                figures |= overload(runner, at_capacity, effort)
        if "oscillation" in parts:
            figures |= oscillation(runner, effort.oscillation_s)
    finish("policies", figures)


if __name__ == "__main__":
    main()
