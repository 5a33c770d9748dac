"""Tables say what the latency models say."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.latency import StepWork
from contracts.latency_models import DISTSERVE_OPT, CostCurve, FittedLatency
from contracts.roofline import DEVICES, Roofline
from contracts.roofline import MODELS as SHAPES
from coordinator.costs import WorkerCosts
from coordinator.policy.cost_tables import MAX_DECODES, CostTable, stack

if TYPE_CHECKING:
    from contracts.latency import LatencyModel

FITTED = FittedLatency(
    prefill=CostCurve(floor_s=0.02, knots=(0, 256, 4096), knot_s=(0.0, 0.03, 0.4)),
    pair_s=3e-9,
    decode=CostCurve(floor_s=0.015, knots=(0, 32, 128), knot_s=(0.015, 0.016, 0.03)),
    context_token_s=5e-8,
)
ROOFLINE = Roofline(SHAPES["llama-3-70b"], DEVICES["a800-80g"], tensor_parallel=8)
MODELS: dict[str, LatencyModel] = {"fitted": FITTED, "distserve": DISTSERVE_OPT["opt-13b-tp1"], "roofline": ROOFLINE}


def table_of(name: str, max_batch_tokens: int = 512, gap_s: float = 0.001) -> CostTable:
    costs = WorkerCosts(latency=MODELS[name], max_batch_tokens=max_batch_tokens, between_steps_s=gap_s)
    return CostTable(costs)


def step_by_step_s(name: str, new_tokens: int, cached_tokens: int, budget: int = 512, gap_s: float = 0.001) -> float:
    seconds, position, end = 0.0, cached_tokens, cached_tokens + new_tokens
    while position < end:
        chunk = min(budget, end - position)
        seconds += gap_s + MODELS[name].step_s(StepWork(chunk, chunk * position + 0.5 * chunk * (chunk + 1), 1))
        position += chunk
    return seconds


@given(name=st.sampled_from(sorted(MODELS)), new_tokens=st.integers(1, 20_000), cached_tokens=st.integers(0, 20_000))
def test_a_prompt_costs_what_its_steps_cost(name: str, new_tokens: int, cached_tokens: int) -> None:
    told_s = table_of(name).prompt_s(new_tokens, cached_tokens)
    assert told_s == pytest.approx(step_by_step_s(name, new_tokens, cached_tokens), rel=0.01)


@given(name=st.sampled_from(sorted(MODELS)), size=st.integers(1, MAX_DECODES), context=st.integers(1, 10**6))
def test_decode_steps_of_all_sizes(name: str, size: int, context: int) -> None:
    tables = stack([table_of(name)], any_mixed=False)
    told_s = tables.decode_step_s(np.array([0]), np.array([float(size)]), np.array([float(context)]))[0]
    assert told_s == pytest.approx(0.001 + MODELS[name].step_s(StepWork(0, 0.0, 0, size, context)), rel=0.02)


def test_larger_batches_count_like_the_largest() -> None:
    tables = stack([table_of("fitted")], any_mixed=False)
    kind = np.array([0, 0])
    step_s = tables.decode_step_s(kind, np.array([float(MAX_DECODES), 1e9]), np.array([0.0, 0.0]))
    assert step_s[0] == step_s[1]


def test_kinds_do_not_mix() -> None:
    one, other = table_of("fitted"), table_of("distserve")
    both = stack([one, other], any_mixed=False)
    sizes, context = np.array([3.0, 3.0]), np.array([100.0, 100.0])
    step_s = both.decode_step_s(np.array([0, 1]), sizes, context)
    alone_s = [
        stack([each], any_mixed=False).decode_step_s(np.array([0]), sizes[:1], context[:1])[0] for each in (one, other)
    ]
    assert step_s.tolist() == alone_s


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_share_of_full_steps(name: str) -> None:
    """Many short prompts together cost what their steps cost, less than each alone."""
    table = table_of(name)
    together_s = 16 * table.share_s(64, 0)
    full_s = 2 * (0.001 + MODELS[name].step_s(StepWork(512, 8 * 0.5 * 64 * 65, 8)))
    assert together_s == pytest.approx(full_s, rel=0.05)
    assert together_s < 16 * table.prompt_s(64, 0)


def test_pending_work() -> None:
    table = table_of("fitted")
    assert table.pending_s(0, 0.0) == 0.0
    assert table.pending_s(100, 5050.0) == step_by_step_s("fitted", 100, 0)
    assert table.pending_s(5120, 0.5 * 5120 * 5121) == pytest.approx(step_by_step_s("fitted", 5120, 0), rel=1e-6)


def test_answers_beside_a_full_chunk_of_mixed_workers() -> None:
    tables = stack([table_of("fitted")], any_mixed=True)
    for size in (0, 1, 8, 32, 200):
        alone_s = FITTED.step_s(StepWork(512, 0.0, 1))
        with_s = FITTED.step_s(StepWork(512, 0.0, 1, size))
        assert tables.beside_s[0, size] == pytest.approx(with_s - alone_s, rel=0.02, abs=1e-9)
    assert not stack([table_of("fitted")], any_mixed=False).beside_s.any()


def test_nobody() -> None:
    assert stack([], any_mixed=False).kinds == ()
