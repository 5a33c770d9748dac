"""How the benchmark of the policies judges refusals: as a run that lets in that one request, and no other."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest

from benchmarks.policies_refusals import let_in, parts, verdicts
from benchmarks.policies_runs import Job, Load, requests_of, run, study
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies

#: Half again as many come as the decode worker can write for; nearly half are refused.
JOB = Job(load=Load(trace=None, speed=10.0, seconds=25.0), form="current", ttft_target_s=24.0, tpot_target_s=0.06)


def test_each_of_a_sample_meets_what_it_meets_when_nothing_else_is_different() -> None:
    ran = run(JOB)
    some = parts(ran, sample=4, num_parts=2, seed=3)
    assert [len(part.trials) for part in some] == [2, 2]
    # Forks of a process that has no threads.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        came = [each for part in pool.map(let_in, some) for each in part]
    assert [each.index for each in came] == [trial.index for part in some for trial in part.trials]
    for each in came:
        spec = replace(study(JOB), forced=frozenset([each.index]))
        alone = request_latencies(simulate(spec, requests_of(JOB.load)), spec.slos)
        assert each.ttft_s == alone.ttft_s[each.index]
        assert each.tpot_s == pytest.approx(alone.tpot_s[each.index], rel=0.03)
        assert each.met == alone.met[each.index]
    overall, *by_reason = verdicts(ran, came)
    assert (overall.num_tried, overall.num_met) == (4, sum(each.met for each in came))
    assert overall.num_refused == len(ran.refusals.rows) == sum(each.num_refused for each in by_reason)
    low, high = overall.interval
    assert 0 <= low <= overall.of_offered <= high <= overall.num_refused / ran.num_requests
    at = np.searchsorted(ran.refusals.rows, [each.index for each in came])
    errors_s = ran.refusals.predicted_ttft_s[at] - np.array([each.ttft_s for each in came])
    assert overall.ttft_error_s == pytest.approx(np.median(errors_s))
