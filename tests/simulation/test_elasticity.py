"""What moves, scaling and lending bring, in studies small enough for a test."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.elasticity import capacity
from benchmarks.elasticity_runs import Job, Load, Phase, requests_of, run, study
from benchmarks.elasticity_shift import flips
from coordinator.policy.virtual_usage import HIGH_PRIORITY
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from tests.support.heap_studies import audit, ttft_s
from tests.support.long_tests import only_long
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from simulator.heap.results import StudyResult

#: Long answers all come to the second of two workers, by turns: alone it cannot hold them, together they can.
FRAGMENTED = Job(load=Load(), policy="round_robin", num_workers=2)
REQUESTS = [WorkloadRequest(1.5 * index, 200, 1500 if index % 2 else 10) for index in range(240)]


@pytest.fixture(scope="module")
def with_moves() -> StudyResult:
    return simulate(study(replace(FRAGMENTED, moves=True)), REQUESTS)


def test_moves_shorten_the_tail_where_memory_is_fragmented(with_moves: StudyResult) -> None:
    alone = simulate(study(FRAGMENTED), REQUESTS)
    assert np.quantile(ttft_s(alone), 0.99) > 3.0 * np.quantile(ttft_s(with_moves), 0.99)
    assert alone.requests.preemptions.sum() > with_moves.requests.preemptions.sum()
    assert with_moves.moves.answers > 10
    # Standing still is some messages, the last blocks and the rest of a step.
    assert with_moves.move_pause_s.quantile(0.99) < 0.1
    audit(with_moves)


def test_prompts_do_not_wait_behind_one_that_fits_nowhere() -> None:
    """Both workers have two long answers; a prompt comes that neither has room for, and short ones behind it."""
    requests = [
        *(WorkloadRequest(0.1 * index, 5000, 1500) for index in range(4)),
        WorkloadRequest(20.0, 6000, 10),
        *(WorkloadRequest(20.5 + 0.1 * index, 100, 10) for index in range(20)),
    ]
    alone, moving = (simulate(study(replace(FRAGMENTED, moves=moves)), requests) for moves in (False, True))
    assert np.max(ttft_s(alone)[5:]) > 10.0
    assert np.max(ttft_s(moving)[5:]) < 2.0
    assert moving.moves.prompts > 0
    audit(moving)


def test_a_study_with_moves_is_the_same_each_time(with_moves: StudyResult) -> None:
    again = simulate(study(replace(FRAGMENTED, moves=True)), REQUESTS)
    np.testing.assert_array_equal(with_moves.requests.finished_s, again.requests.finished_s)
    assert with_moves.moves == again.moves


def test_urgent_answers_are_left_room() -> None:
    """The policy sees priorities and headroom: the others leave the worker where an urgent answer runs."""
    requests = [
        *(WorkloadRequest(0.2 * index, 900, 1200) for index in range(20)),
        WorkloadRequest(10.0, 900, 1200, priority=HIGH_PRIORITY),
    ]
    job = replace(FRAGMENTED, moves=True)
    isolated, alike = (simulate(study(replace(job, priorities=way)), requests) for way in ("headroom", "order"))
    assert isolated.moves.asked["priority"] > 0
    assert alike.moves.asked["priority"] == 0


@only_long
def test_as_many_workers_as_the_load_needs() -> None:
    load = Load(rate_rps=0.9, amplitude=0.8, period_s=900.0, seed=2)
    job = Job(load=load, moves=True, num_workers=6, autoscale=True)
    result = simulate(study(job), requests_of(job))
    assert (result.requests.outcome == Outcome.FINISHED).all()
    audit(result)
    scaled, always = run(job), run(replace(job, autoscale=False))
    assert scaled.worker_s < 0.8 * always.worker_s
    assert scaled.attained > 0.95


def test_lent_workers_absorb_a_shift_and_do_not_swing() -> None:
    phases = (
        Phase(rate_rps=6.0, prompt_tokens=1200, output_tokens=30, seconds=60.0),
        Phase(rate_rps=4.6, prompt_tokens=150, output_tokens=400, seconds=120.0),
    )
    stays = Job(load=Load(phases=phases), num_workers=4, num_prefill=2, moves=True)
    job = replace(stays, autoscale=True)
    result = simulate(study(job), requests_of(job))
    assert (result.requests.outcome == Outcome.FINISHED).all()
    audit(result)
    lent = run(job)
    assert int(lent.is_met.sum()) > 1.15 * int(run(stays).is_met.sum())
    changes, turned_back = flips(lent)
    # One goes to help with the prompts and comes home, then two help with the answers.
    assert 1 <= changes <= 6
    assert turned_back <= 1


def test_capacity_lies_between_measured_rates() -> None:
    assert capacity({1.0: 1.02, 2.0: 0.99, 3.0: 0.95, 4.0: 0.99}) == pytest.approx(2.5)
    assert capacity({1.0: 1.0, 2.0: 0.98}) == 2.0
    assert capacity({1.0: 0.5, 2.0: 0.4}) == 1.0


def test_what_is_served_falls_short_of_what_comes_once_queues_grow() -> None:
    load = Load(rate_rps=2.0, cv=1.0, num_requests=900)
    calm = Job(load=load, policy="freeness", moves=True, num_workers=4)
    assert run(calm).served > 0.95
    assert run(replace(calm, load=replace(load, rate_rps=16.0))).served < 0.6
