"""Studies small enough to be followed by hand, and what holds in all of them."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.transfer_models import LinkTransfer
from coordinator.conductor import ConductorSettings
from decode import DecodeLimits
from engine.compose import StepBudget
from prefill import PrefillLimits
from simulator.heap.answers import Answers
from simulator.heap.results import Outcome, StudyResult
from simulator.heap.spec import StudySpec, WorkerGroup
from simulator.heap.study import simulate
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import FAST_LINK, audit, colocated, disaggregated, study
from workload.request import WorkloadRequest

#: Every step takes a second.
SECOND = AffineLatency(base_s=1.0)
#: No two sums of these are equal, so that nothing happens at once by chance.
UNEVEN = AffineLatency(base_s=0.010_100_3, token_s=1.03e-4, pair_s=1.07e-7, context_token_s=1.7e-5, sequence_s=3.1e-4)


def test_a_request_by_hand() -> None:
    """Prompt in three chunks, KV in three pulls beside and behind them, three more tokens."""
    budget = StepBudget(max_tokens=32, max_sequences=4)
    spec = replace(
        study(disaggregated(SECOND, budget=budget), transfer=LinkTransfer(latency_s=0.25, bandwidth_bytes_s=1e12)),
        message_s=0.01,
    )
    result = simulate(spec, [WorkloadRequest(5.0, 80, 4)])
    columns = result.requests
    # To the coordinator, back, to the worker; there it begins at once.
    assert columns.started_s == pytest.approx(5.03)
    assert columns.first_token_s == pytest.approx(8.03 + 0.01)
    # Seal, last pull, Confirm and its answer; then a step, and the token's own message.
    assert columns.second_token_s == pytest.approx(8.03 + 0.01 + 0.25 + 0.02 + 1.0 + 0.01)
    assert columns.finished_s == pytest.approx(columns.second_token_s + 2.0)
    assert columns.transfer_s == pytest.approx(3 * 0.25)
    assert result.transfer_bytes == 5 * 16 * 1000
    prefill, decode = result.workers
    assert (prefill.steps, prefill.prefill_tokens, decode.steps, decode.decode_tokens) == (3, 80, 3, 3)
    assert [prefill.busy_s, decode.busy_s] == pytest.approx([3.0, 3.0])
    # 80 tokens fill 5 blocks, 83 need a sixth.
    assert (prefill.peak_blocks, decode.peak_blocks) == (5, 6)
    assert result.itl_s.mean == pytest.approx((0.01 + 0.25 + 0.02 + 3.0) / 3)
    audit(result)


def test_without_overlap_all_kv_travels_after_the_last_chunk() -> None:
    budget = StepBudget(max_tokens=32, max_sequences=4)
    link = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=80_000.0)
    spec = study(disaggregated(SECOND, budget=budget), transfer=link)
    request = WorkloadRequest(0.0, 80, 2)
    overlapped = simulate(spec, [request]).requests
    serial = simulate(replace(spec, overlap=False), [request]).requests
    # Five blocks a second; with overlap four of them have travelled beside the second and third chunk.
    assert overlapped.second_token_s - overlapped.first_token_s == pytest.approx(0.2 + 1.0)
    assert serial.second_token_s - serial.first_token_s == pytest.approx(1.0 + 1.0)


def test_an_adopted_answer_joins_at_the_next_step() -> None:
    """Two answers; the second is adopted in the midst of a stretch of the first."""
    latency = AffineLatency(base_s=1.0, sequence_s=0.5)
    spec = study(disaggregated(latency))
    result = simulate(spec, [WorkloadRequest(0.0, 10, 10), WorkloadRequest(2.25, 10, 3)])
    columns = result.requests
    # Read from 0 to 1, steps of 1.5 s from there; the second is adopted at 3.25, in the step that ends at 4.
    assert columns.first_token_s == pytest.approx([1.0, 3.25])
    assert columns.second_token_s == pytest.approx([2.5, 6.0])
    # Two steps of two answers, then again one alone.
    assert columns.finished_s == pytest.approx([1.0 + 2 * 1.5 + 2 * 2.0 + 5 * 1.5, 8.0])
    audit(result)


def test_a_mixed_worker_keeps_its_prompts() -> None:
    result = simulate(study(colocated(SECOND)), [WorkloadRequest(0.0, 10, 3), WorkloadRequest(1.5, 10, 1)])
    # Read, one token; then a step with one token of the first and the whole second prompt.
    assert result.requests.first_token_s == pytest.approx([1.0, 3.0])
    assert result.requests.finished_s == pytest.approx([3.0, 3.0])
    assert result.transfer_bytes == 0
    assert result.workers[0].steps == 3
    audit(result)


def test_the_newest_answer_is_read_again_when_blocks_run_out() -> None:
    """Three answers of 17 blocks in a pool of 40: more than room to grow is promised for, so one is preempted."""
    groups = colocated(SECOND, num_blocks=40, budget=StepBudget(max_tokens=64, max_sequences=8))
    requests = [WorkloadRequest(0.01 * index, 16, 250) for index in range(3)]
    result = simulate(study(groups), requests)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    assert result.requests.preemptions[0] == 0
    assert result.requests.preemptions[2] >= 1
    assert result.workers[0].peak_blocks == 40
    audit(result)


def test_an_answer_that_outgrows_the_pool_fails() -> None:
    groups = colocated(SECOND, num_blocks=4)
    result = simulate(study(groups), [WorkloadRequest(0.0, 30, 100), WorkloadRequest(0.0, 30, 20)])
    assert result.requests.outcome.tolist() == [Outcome.FAILED, Outcome.FINISHED]
    # 64 tokens have a place; the 65th is known when there is none left.
    assert result.workers[0].decode_tokens == (64 - 30) + 19
    audit(result)


def test_an_answer_ends_with_the_context() -> None:
    spec = replace(study(disaggregated(SECOND)), max_context_tokens=100)
    result = simulate(spec, [WorkloadRequest(0.0, 90, 50), WorkloadRequest(0.0, 100, 50)])
    assert result.requests.output_tokens[0] == 10
    assert result.requests.outcome.tolist() == [Outcome.FINISHED, Outcome.REJECTED]


def test_refused_requests_come_again_as_often_as_they_may() -> None:
    limits = PrefillLimits(max_waiting=1)
    # Each prompt needs all blocks; one may wait.
    groups = tuple(replace(group, prefill=limits) for group in disaggregated(SECOND, num_blocks=2))
    requests = [WorkloadRequest(0.0, 20, 1), *(WorkloadRequest(0.5, 20, 1) for _ in range(3))]
    once = simulate(study(groups), requests)
    assert sorted(once.requests.outcome) == [Outcome.FINISHED] * 2 + [Outcome.REJECTED] * 2
    thrice = simulate(replace(study(groups), max_retries=3), requests)
    assert (thrice.requests.outcome == Outcome.FINISHED).all()
    audit(once)
    audit(thrice)


@pytest.mark.parametrize("after_s", [0.5, 2.5, 5.2, 7.5])
def test_a_request_that_takes_too_long_is_given_up_wherever_it_is(after_s: float) -> None:
    """In the midst of its prompt, of its pulls, of its answer: the workers end empty."""
    budget = StepBudget(max_tokens=32, max_sequences=4)
    link = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=20_000.0)
    spec = replace(study(disaggregated(SECOND, budget=budget), transfer=link), request_timeout_s=after_s)
    result = simulate(spec, [WorkloadRequest(0.0, 80, 4)])
    assert result.requests.outcome.tolist() == [Outcome.TIMED_OUT]
    assert np.isfinite(result.requests.first_token_s).tolist() == [after_s > 3.0]
    assert np.isnan(result.requests.finished_s).all()
    assert result.duration_s == after_s
    audit(result)


def test_requests_are_taken_as_they_arrive() -> None:
    taken_at: list[float] = []
    reached_s = 0.0

    def workload() -> object:
        for index in range(50):
            taken_at.append(reached_s)
            yield WorkloadRequest(float(index), 10, 2)

    def note(now_s: float, _: int) -> None:
        nonlocal reached_s
        reached_s = now_s

    simulate(study(disaggregated(AffineLatency(base_s=0.1))), workload(), progress=note)  # type: ignore[arg-type]
    assert all(index - 2 <= seen_s <= index for index, seen_s in enumerate(taken_at))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([WorkloadRequest(1.0, 5, 5), WorkloadRequest(0.5, 5, 5)], "one at 0.5 s follows one at 1.0 s"),
        ([WorkloadRequest(math.inf, 5, 5)], "arrives at inf s"),
        ([WorkloadRequest(0.0, 0, 5)], "needs prompt and output tokens"),
        ([WorkloadRequest(0.0, 5, 0)], "needs prompt and output tokens"),
    ],
)
def test_a_workload_must_be_one(requests: list[WorkloadRequest], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(study(disaggregated(SECOND)), requests)


def test_a_spec_must_be_one() -> None:
    request = [WorkloadRequest(0.0, 5, 5)]
    with pytest.raises(ValueError, match="at least one group"):
        simulate(study(()), request)
    with pytest.raises(ValueError, match=r"group m \(mixed\) with 2 pipeline stages"):
        simulate(study(tuple(replace(group, pipeline_stages=2) for group in colocated(SECOND))), request)
    with pytest.raises(ValueError, match="names of their own: m, m"):
        simulate(study(colocated(SECOND) * 2), request)
    with pytest.raises(ValueError, match=r"p-0 gives a step of 0.0 s"):
        simulate(study(disaggregated(AffineLatency())), request)


# --- all kinds of studies ---------------------------------------------------------------------------------


@st.composite
def specs(draw: st.DrawFn) -> StudySpec:
    """Small clusters, often with too few blocks, short queues, time-outs and slow links."""

    def group(name: str, role: str, count: int, stages: int = 1) -> WorkerGroup:
        return WorkerGroup(
            name=name,
            role=role,  # type: ignore[arg-type]
            count=count,
            latency=UNEVEN,
            num_blocks=draw(st.sampled_from([12, 20, 40, 200])),
            pipeline_stages=stages,
            budget=StepBudget(
                max_tokens=draw(st.sampled_from([8, 32, 64])), max_sequences=draw(st.sampled_from([2, 4, 16]))
            ),
            prefill=PrefillLimits(
                max_waiting=draw(st.sampled_from([1, 3, 512])),
                max_handoffs=draw(st.sampled_from([1, 256])),
                handoff_share=draw(st.sampled_from([0.1, 0.5])),
            ),
            decode=DecodeLimits(growth_tokens=draw(st.sampled_from([1, 8, 64]))),
        )

    groups: tuple[WorkerGroup, ...]
    if draw(st.booleans()):
        groups = (group("m", "mixed", draw(st.integers(1, 2))),)
    else:
        stages = draw(st.sampled_from([1, 1, 2, 3]))
        groups = (
            group("p", "prefill", draw(st.integers(1, 2)), stages),
            group("d", "decode", draw(st.integers(1, 3))),
        )
    return StudySpec(
        groups=groups,
        transfer=LinkTransfer(
            latency_s=draw(st.sampled_from([0.000_7, 0.03])), bandwidth_bytes_s=draw(st.sampled_from([1e5, 1e7]))
        ),
        kv_token_bytes=100,
        block_tokens=4,
        max_context_tokens=draw(st.sampled_from([70, 1000])),
        request_timeout_s=draw(st.sampled_from([0.713, 3.01, 600.0])),
        max_retries=draw(st.sampled_from([0, 2])),
        between_steps_s=draw(st.sampled_from([0.0, 0.0013])),
        overlap=draw(st.booleans()),
        sample_interval_s=0.51,
    )


@st.composite
def workloads(draw: st.DrawFn) -> list[WorkloadRequest]:
    rng = random.Random(draw(st.integers(0, 2**32)))
    rate = draw(st.sampled_from([3.0, 20.0, 200.0]))
    requests: list[WorkloadRequest] = []
    now_s = 0.0
    for _ in range(draw(st.integers(1, 40))):
        now_s += rng.expovariate(rate)
        requests.append(WorkloadRequest(now_s, rng.randint(1, 60), rng.randint(1, 40)))
    return requests


@settings(max_examples=60)
@given(spec=specs(), workload=workloads())
def test_nothing_is_lost_and_stretches_are_their_steps(spec: StudySpec, workload: list[WorkloadRequest]) -> None:
    """Each study twice: as it is, and with stretches of one step only. Placed by whole tokens: where predictions of two
    workers are equal but for rounding, either may be chosen, and all that follows is different."""
    audit(simulate(spec, workload))
    spec = replace(spec, conductor=ConductorSettings(policy="least_loaded"))
    result = simulate(spec, workload)
    audit(result)
    with mock.patch.object(Answers, "steps_within_blocks", return_value=1):
        stepped = simulate(spec, workload)
    audit(stepped)
    assert_equal(result, stepped)


def assert_equal(one: StudyResult, other: StudyResult) -> None:
    for name in one.requests.__dataclass_fields__:
        mine, theirs = getattr(one.requests, name), getattr(other.requests, name)
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-9, err_msg=name)
    for worker, same in zip(one.workers, other.workers, strict=True):
        assert replace(worker, busy_s=0.0, mean_blocks=0.0) == replace(same, busy_s=0.0, mean_blocks=0.0)
        assert worker.busy_s == pytest.approx(same.busy_s, abs=1e-9)
    assert one.itl_s.weight == other.itl_s.weight
    assert not one.itl_s.weight or one.itl_s.mean == pytest.approx(other.itl_s.mean, abs=1e-9)
    for name in one.time_line.__dataclass_fields__:
        np.testing.assert_allclose(getattr(one.time_line, name), getattr(other.time_line, name), atol=1e-6)
    assert (one.transfer_bytes, one.num_steps) == (other.transfer_bytes, other.num_steps)
    assert one.duration_s == pytest.approx(other.duration_s, abs=1e-9)


def test_equal_studies_give_equal_results() -> None:
    workload = [WorkloadRequest(0.03 * index, 1 + index * 7 % 50, 1 + index * 5 % 30) for index in range(60)]
    spec = study(disaggregated(UNEVEN, num_prefill=2, num_decode=2, num_blocks=30), transfer=FAST_LINK)
    one, other = simulate(spec, workload), simulate(spec, workload)
    for name in one.requests.__dataclass_fields__:
        assert getattr(one.requests, name).tobytes() == getattr(other.requests, name).tobytes()
    assert one.num_events == other.num_events
