"""Small studies for tests of the event heap: specs, workloads, and the audit of what came out."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import numpy as np

from contracts.transfer_models import LinkTransfer
from engine.compose import StepBudget
from simulator.heap.results import Outcome
from simulator.heap.spec import StudySpec, WorkerGroup
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from contracts.latency import LatencyModel, TransferModel
    from simulator.heap.results import StudyResult

FAST_LINK = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=1e15)
WIDE_BUDGET = StepBudget(max_tokens=2048, max_sequences=256)


def disaggregated(
    latency: LatencyModel,
    *,
    num_prefill: int = 1,
    num_decode: int = 1,
    num_blocks: int = 1000,
    budget: StepBudget = WIDE_BUDGET,
    pipeline_stages: int = 1,
) -> tuple[WorkerGroup, ...]:
    return (
        WorkerGroup(
            name="p",
            role="prefill",
            count=num_prefill,
            latency=latency,
            num_blocks=num_blocks,
            budget=budget,
            pipeline_stages=pipeline_stages,
        ),
        WorkerGroup(name="d", role="decode", count=num_decode, latency=latency, num_blocks=num_blocks, budget=budget),
    )


def colocated(
    latency: LatencyModel, *, count: int = 1, num_blocks: int = 1000, budget: StepBudget = WIDE_BUDGET
) -> tuple[WorkerGroup, ...]:
    return (WorkerGroup(name="m", role="mixed", count=count, latency=latency, num_blocks=num_blocks, budget=budget),)


def study(groups: tuple[WorkerGroup, ...], *, transfer: TransferModel = FAST_LINK) -> StudySpec:
    """Without message times, so that only steps and transfers take time."""
    return StudySpec(groups=groups, transfer=transfer, kv_token_bytes=1000, message_s=0.0)


def poisson(
    rng: random.Random, rate: float, count: int, *, prompt_tokens: int, output_tokens: int
) -> Iterator[WorkloadRequest]:
    now_s = 0.0
    for _ in range(count):
        now_s += rng.expovariate(rate)
        yield WorkloadRequest(now_s, prompt_tokens, output_tokens)


def sharegpt_like(rng: random.Random, rate: float, count: int) -> Iterator[WorkloadRequest]:
    """Poisson arrivals; lognormal lengths with ShareGPT's means (DistServe, table 1), cut as in its 2,048-token
    context."""
    now_s = 0.0
    for _ in range(count):
        now_s += rng.expovariate(rate)
        yield WorkloadRequest(now_s, _length(rng, 755.5, longest=1500), _length(rng, 200.3, longest=500))


def _length(rng: random.Random, mean: float, *, longest: int) -> int:
    return min(longest, max(2, round(rng.lognormvariate(math.log(mean) - 0.5, 1.0))))


def ttft_s(result: StudyResult) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return result.requests.first_token_s - result.requests.arrival_s


def tpot_s(result: StudyResult) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    columns = result.requests
    return (columns.finished_s - columns.first_token_s) / np.maximum(1, columns.output_tokens - 1)


def attainment(result: StudyResult, *, ttft_limit_s: float, tpot_limit_s: float) -> float:
    """Share of requests that finished and met both."""
    finished = result.requests.outcome == Outcome.FINISHED
    return float((finished & (ttft_s(result) <= ttft_limit_s) & (tpot_s(result) <= tpot_limit_s)).mean())


def audit(result: StudyResult) -> None:
    """What holds in every study. That blocks conserve is checked by the study itself."""
    columns = result.requests
    outcomes = columns.outcome
    assert ((outcomes >= 0) & (outcomes <= max(Outcome))).all(), "every request ends"
    finished = outcomes == Outcome.FINISHED
    assert (np.isfinite(columns.finished_s) == finished).all()
    later = np.where(columns.output_tokens > 1, columns.second_token_s, columns.first_token_s)
    times = (columns.arrival_s, columns.started_s, columns.first_token_s, later, columns.finished_s)
    for earlier, after in itertools.pairwise(times):
        assert (earlier[finished] <= after[finished]).all(), "a request's life has an order"
    placed = columns.prefill_worker >= 0
    assert placed[finished].all()
    assert (columns.decode_worker >= 0).tolist() == placed.tolist()
    rejected = outcomes == Outcome.REJECTED
    assert not placed[rejected].any()
    written = sum(worker.decode_tokens for worker in result.workers)
    read = sum(worker.prefill_tokens for worker in result.workers)
    expected_written = int((columns.output_tokens[finished] - 1).sum())
    expected_read = int((columns.prompt_tokens - columns.cached_tokens)[finished].sum())
    if (finished | rejected).all():
        assert written == result.itl_s.weight == expected_written, "every token once"
        recomputed = bool(columns.preemptions.any())
        assert read > expected_read if recomputed else read == expected_read
    else:
        assert written >= expected_written
        assert read >= expected_read
    assert ((columns.cached_tokens >= 0) & (columns.cached_tokens < columns.prompt_tokens)).all()
    assert (columns.refusal[rejected] >= 0).all(), "a refusal has a reason"
    assert sum(worker.steps for worker in result.workers) == result.num_steps
    assert sum(worker.preemptions for worker in result.workers) == columns.preemptions.sum()
    spaces = [group.num_blocks for group in result.spec.groups for _ in range(group.count)]
    for worker, num_blocks in zip(result.workers, spaces, strict=True):
        assert 0 <= worker.mean_blocks <= worker.peak_blocks <= num_blocks
        assert worker.busy_s <= result.duration_s + 1e-6 or (outcomes == Outcome.TIMED_OUT).any()
