"""Chunks beside answers: as large as the tightest target allows, never none."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.latency import StepWork
from contracts.latency_models import CostCurve, FittedLatency
from engine.chunk_budget import MIN_CHUNK_TOKENS, TARGET_SHARE, TILE_TOKENS, chunk_tokens, mixed_budget, reading_s
from engine.compose import Candidate, GrantReason, StepBudget, compose

#: 10 ms and 0.1 ms a token, 1 us a pair; decodes 10 ms and 0.2 ms each, 1 us a token of context.
LATENCY = FittedLatency(
    prefill=CostCurve.line(10e-3, 0.1e-3), pair_s=1e-6, decode=CostCurve.line(10e-3, 0.2e-3), context_token_s=1e-6
)
BUDGET = StepBudget(max_tokens=1000, max_sequences=64)


def chunk(sequence_id: int, num_tokens: int, num_computed: int = 0) -> Candidate:
    return Candidate(
        sequence_id=sequence_id,
        num_tokens=num_tokens,
        arrival=sequence_id,
        started=num_computed > 0,
        num_computed=num_computed,
    )


def decode(sequence_id: int, context: int, tpot_target_s: float | None) -> Candidate:
    return Candidate(
        sequence_id=1000 + sequence_id,
        num_tokens=1,
        arrival=sequence_id,
        started=True,
        num_computed=context - 1,
        tpot_target_s=tpot_target_s,
    )


_CHUNKS = st.lists(st.tuples(st.integers(1, 2000), st.integers(0, 5000)), min_size=1, max_size=5).map(
    lambda spans: [chunk(number, *span) for number, span in enumerate(spans)]
)


def work_of_step(chunks: list[Candidate], num_decodes: int, context: int, budget: StepBudget) -> StepWork:
    """As the batch composition fills it; written anew here."""
    decodes = [decode(number, 1, None) for number in range(num_decodes)]
    by_id = {each.sequence_id: each for each in chunks}
    tokens, pairs, count = 0, 0.0, 0
    for grant in compose(decodes, chunks, budget):
        if grant.reason is not GrantReason.DECODE:
            prefix = by_id[grant.sequence_id].num_computed
            tokens += grant.num_tokens
            pairs += sum(prefix + place + 1 for place in range(grant.num_tokens))
            count += 1
    return StepWork(tokens, pairs, count, num_decodes, context)


@given(_CHUNKS, st.integers(1, 40), st.integers(0, 20_000), st.floats(1e-3, 0.3), st.integers(1, 900))
def test_the_largest_chunk_within_the_limit(
    chunks: list[Candidate], num_decodes: int, context: int, limit_s: float, max_tokens: int
) -> None:
    def step_s(num_tokens: int) -> float:
        budget = StepBudget(max_tokens=num_decodes + num_tokens, max_sequences=1000)
        return LATENCY.step_s(work_of_step(chunks, num_decodes, context, budget))

    tokens = chunk_tokens(
        chunks, LATENCY, num_decodes=num_decodes, context_tokens=context, limit_s=limit_s, max_tokens=max_tokens
    )
    allowed_s = limit_s * TARGET_SHARE
    assert min(MIN_CHUNK_TOKENS, max_tokens) <= tokens <= max_tokens
    assert tokens % TILE_TOKENS == 0 or tokens == max_tokens
    if tokens > MIN_CHUNK_TOKENS:
        assert step_s(tokens) <= allowed_s
    if tokens < max_tokens:
        assert step_s(min(max_tokens, tokens + TILE_TOKENS)) > allowed_s


def test_the_tightest_target_counts() -> None:
    chunks = [chunk(0, 5000)]
    loose = mixed_budget([decode(0, 10, 2.0), decode(1, 10, None)], chunks, BUDGET, LATENCY)
    tight = mixed_budget([decode(0, 10, 2.0), decode(1, 10, 0.04)], chunks, BUDGET, LATENCY)
    assert loose == BUDGET
    assert 2 + MIN_CHUNK_TOKENS < tight.max_tokens < 400
    gap = mixed_budget([decode(0, 10, 2.0), decode(1, 10, 0.04)], chunks, BUDGET, LATENCY, between_steps_s=0.02)
    assert gap.max_tokens < tight.max_tokens


def test_longer_contexts_leave_less() -> None:
    def tokens(context: int, prefix: int) -> int:
        return mixed_budget([decode(0, context, 0.04)], [chunk(0, 5000, prefix)], BUDGET, LATENCY).max_tokens

    assert tokens(10, 1) > tokens(8000, 1)
    assert tokens(10, 1) > tokens(10, 2000)


def test_prompts_never_starve() -> None:
    """Decodes alone take longer than promised."""
    decodes = [decode(number, 1000, 0.001) for number in range(50)]
    budget = mixed_budget(decodes, [chunk(0, 5000)], BUDGET, LATENCY)
    assert budget.max_tokens == 50 + MIN_CHUNK_TOKENS
    grants = compose(decodes, [chunk(0, 5000)], budget)
    assert [grant.num_tokens for grant in grants] == [1] * 50 + [MIN_CHUNK_TOKENS]


@pytest.mark.parametrize(
    ("decodes", "chunks", "latency"),
    [
        ([decode(0, 1, 0.001)], [chunk(0, 100)], None),
        ([decode(0, 1, None)], [chunk(0, 100)], LATENCY),
        ([decode(0, 1, 0.001)], [], LATENCY),
        ([], [chunk(0, 100)], LATENCY),
    ],
)
def test_without_target_model_or_mix_the_budget_stays(
    decodes: list[Candidate], chunks: list[Candidate], latency: FittedLatency | None
) -> None:
    assert mixed_budget(decodes, chunks, BUDGET, latency) is BUDGET


def test_other_limits_stay() -> None:
    budget = replace(BUDGET, saturation_tokens=7)
    tight = mixed_budget([decode(0, 1, 0.001)], [chunk(0, 5000)], budget, LATENCY)
    assert (tight.max_sequences, tight.saturation_tokens) == (64, 7)
    full = StepBudget(max_tokens=10, max_sequences=64)
    crowd = [decode(number, 1, 0.001) for number in range(20)]
    assert mixed_budget(crowd, [chunk(0, 5000)], full, LATENCY).max_tokens == 10


@given(st.integers(0, 3000), st.integers(0, 5000), st.integers(1, 700))
def test_reading_is_the_sum_of_its_steps(tokens: int, num_computed: int, max_tokens: int) -> None:
    num_steps = -(-tokens // max_tokens)
    pairs = sum(num_computed + place + 1 for place in range(tokens))
    expected_s = num_steps * 10e-3 + tokens * 0.1e-3 + pairs * 1e-6
    seconds = reading_s(LATENCY, tokens=tokens, num_computed=num_computed, max_tokens=max_tokens)
    assert seconds == pytest.approx(expected_s)
