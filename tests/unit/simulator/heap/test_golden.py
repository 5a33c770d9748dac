"""Studies against what is known: queueing theory's closed forms, and the shape of DistServe's published curves."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.latency_models import DISTSERVE_OPT
from contracts.roofline import MODELS
from contracts.transfer_models import LinkTransfer
from engine.compose import StepBudget
from simulator.heap.spec import StudySpec
from simulator.heap.study import simulate
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import attainment, colocated, disaggregated, poisson, sharegpt_like, study, ttft_s

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: One prompt a step.
ONE_BY_ONE = StepBudget(max_tokens=2048, max_sequences=1)
D_S = 0.1
#: Simulated one by one, and those over which a mean comes within 0.5 % of its limit.
NUM_REQUESTS, NUM_FOR_MEANS = 3000, 1_000_000


def waits_s(arrivals_s: NDArray[np.float64], interval_s: float) -> NDArray[np.float64]:
    """Of a queue that takes one every `interval_s`, by Lindley's recursion: `W' = max(0, W + interval - gap)`."""
    walk = np.concatenate(([0.0], np.cumsum(interval_s - np.diff(arrivals_s))))
    return walk - np.minimum.accumulate(walk)


def mean_ttft_s(load: float, step_s: float, *, pipeline_stages: int = 1) -> float:
    """Prefill alone: Poisson arrivals at `load / D` a second, every prompt a step of `step_s`, one token each.

    Each simulated request is compared with the recursion, which is then carried on.
    """
    groups = disaggregated(AffineLatency(base_s=step_s), budget=ONE_BY_ONE, pipeline_stages=pipeline_stages)
    workload = list(poisson(random.Random(1), load / D_S, NUM_REQUESTS, prompt_tokens=100, output_tokens=1))
    arrivals_s = np.array([request.arrival_s for request in workload])
    interval_s = step_s / pipeline_stages
    simulated_s = ttft_s(simulate(study(groups), workload))
    np.testing.assert_allclose(simulated_s, waits_s(arrivals_s, interval_s) + step_s, rtol=0, atol=1e-9)
    many_s = np.cumsum(np.random.default_rng(1).exponential(D_S / load, NUM_FOR_MEANS))
    return float(waits_s(many_s, interval_s).mean() + step_s)


@pytest.mark.parametrize("load", [0.2, 0.5])
def test_one_prefill_worker_is_an_md1_queue(load: float) -> None:
    """DistServe (OSDI'24), equation 1: `D + R D^2 / (2 (1 - R D))`."""
    rate = load / D_S
    expected_s = D_S + rate * D_S**2 / (2 * (1 - rate * D_S))
    assert mean_ttft_s(load, D_S) == pytest.approx(expected_s, rel=0.005)


@pytest.mark.parametrize("load", [0.5, 1.0])
def test_two_pipeline_stages_halve_the_interval_not_the_latency(load: float) -> None:
    """DistServe, equation 2: `D + R D^2 / (4 (2 - R D))`."""
    rate = load / D_S
    expected_s = D_S + rate * D_S**2 / (4 * (2 - rate * D_S))
    assert mean_ttft_s(load, D_S, pipeline_stages=2) == pytest.approx(expected_s, rel=0.005)


@pytest.mark.parametrize("speed_up", [1.5, 1.9])
def test_tensor_parallelism_shortens_the_step(speed_up: float) -> None:
    """DistServe, equation 3: `D / K + R D^2 / (2 K (K - R D))`."""
    rate = 0.5 / D_S
    expected_s = D_S / speed_up + rate * D_S**2 / (2 * speed_up * (speed_up - rate * D_S))
    assert mean_ttft_s(0.5, D_S / speed_up) == pytest.approx(expected_s, rel=0.005)


# --- DistServe --------------------------------------------------------------------------------------------

#: OPT-66B on four A100 a worker; DistServe's TTFT target for it as a chatbot. Its TPOT target (150 ms) binds neither
#: side with stall-free chunked prefill, which its baseline did not have; 60 ms does.
OPT_66B = DISTSERVE_OPT["opt-66b-tp4"]
TTFT_LIMIT_S, TPOT_LIMIT_S = 2.5, 0.06
NUM_BLOCKS = 4000


def chat_attainment(groups_of_two: str, rate_per_worker: float) -> float:
    """Of two workers, alone or as a pair, under ShareGPT-like load."""
    if groups_of_two == "colocated":
        groups = colocated(OPT_66B, count=2, num_blocks=NUM_BLOCKS)
    else:
        groups = disaggregated(OPT_66B, num_blocks=NUM_BLOCKS)
    spec = StudySpec(
        groups=groups,
        transfer=LinkTransfer(latency_s=0.001, bandwidth_bytes_s=300e9, efficiency=0.8),
        kv_token_bytes=MODELS["opt-66b"].kv_token_bytes,
        max_context_tokens=2048,
    )
    result = simulate(spec, sharegpt_like(random.Random(1), 2 * rate_per_worker, 1500))
    return attainment(result, ttft_limit_s=TTFT_LIMIT_S, tpot_limit_s=TPOT_LIMIT_S)


def test_the_colocated_curve_collapses_while_the_disaggregated_stays() -> None:
    """Both have the same workers and rates."""
    rates = (1.0, 2.25, 3.0)
    together = [chat_attainment("colocated", rate) for rate in rates]
    apart = [chat_attainment("disaggregated", rate) for rate in rates]
    assert together[0] >= 0.99
    assert together[0] > together[1] > together[2]
    assert together[2] <= 0.65
    assert min(apart) >= 0.99
