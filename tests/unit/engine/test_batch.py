"""A step plan as tensors, and what is refused before a kernel sees it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest, InvariantBroken
from contracts.ids import BlockId
from engine.batch import BatchLimits, build_batch
from engine.plan import SequenceStep, StepPlan
from tests.unit.engine.driver import greedy_sample

_CPU = torch.device("cpu")


def _limits(block_tokens: int = 4, num_blocks: int = 50) -> BatchLimits:
    return BatchLimits(block_tokens=block_tokens, num_blocks=num_blocks, max_context_tokens=90, vocab_size=100)


def _step(start: int, tokens: list[int], blocks: list[int], *, sample: bool = False, name: int = 0) -> SequenceStep:
    return SequenceStep(
        sequence_id=name,
        token_ids=tokens,
        start=start,
        block_ids=[BlockId(block) for block in blocks],
        sample=greedy_sample(tokens, len(tokens)) if sample else None,
    )


def _ints(tensor: torch.Tensor) -> list[int]:
    return [int(each) for each in tensor]


_SEQUENCES = st.lists(st.tuples(st.integers(0, 60), st.integers(1, 30), st.booleans()), min_size=1, max_size=5)


@given(_SEQUENCES, st.sampled_from([1, 3, 4, 16]))
def test_rows_tables_and_slots(shapes: list[tuple[int, int, bool]], block_tokens: int) -> None:
    limits = BatchLimits(block_tokens=block_tokens, num_blocks=1000, max_context_tokens=90, vocab_size=100)
    free = _ints(torch.randperm(1000, generator=torch.Generator().manual_seed(len(shapes))))
    steps = list[SequenceStep]()
    for name, (start, length, sample) in enumerate(shapes):
        num_blocks = -(-(start + length) // block_tokens) + name % 2
        blocks = [free.pop() for _ in range(num_blocks)]
        tokens = [(name * 31 + each) % 100 for each in range(length)]
        steps.append(_step(start, tokens, blocks, sample=sample, name=name))
    batch = build_batch(StepPlan(tuple(steps)), limits, _CPU)
    attention = batch.attention

    assert _ints(batch.token_ids_T) == [token for step in steps for token in step.token_ids]
    starts = _ints(attention.query_starts)
    assert starts[-1] == len(batch.token_ids_T)
    for index, step in enumerate(steps):
        rows = range(starts[index], starts[index + 1])
        positions = range(step.start, step.start + len(step.token_ids))
        assert _ints(attention.positions_T[rows.start : rows.stop]) == list(positions)
        slots = [step.block_ids[each // block_tokens] * block_tokens + each % block_tokens for each in positions]
        assert _ints(attention.slots_T[rows.start : rows.stop]) == slots
        used = -(-positions.stop // block_tokens)
        assert _ints(attention.block_tables_SM[index, :used]) == list(step.block_ids[:used])
    assert _ints(attention.context_lens) == [step.start + len(step.token_ids) for step in steps]
    assert attention.max_context_len == max(_ints(attention.context_lens))
    assert attention.max_query_len == max(len(step.token_ids) for step in steps)
    sampling = [step for step in steps if step.sample is not None]
    assert batch.sequence_ids == [step.sequence_id for step in sampling]
    rows_to_sample = [] if batch.sample_rows is None else _ints(batch.sample_rows)
    assert rows_to_sample == [starts[step.sequence_id + 1] - 1 for step in sampling]


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (_step(0, [1, 2, 3, 4, 5], [7]), r"tokens \[0, 5\) in 1 blocks of 4"),
        (_step(4, [], [7, 8]), r"tokens \[4, 4\)"),
        (_step(-1, [1], [7]), r"tokens \[-1, 0\)"),
        (_step(0, [1], [50]), r"blocks .* 50 of a pool of 50"),
        (_step(0, [1], [-1]), r"blocks -1 to"),
        (_step(90, [1], list(range(30))), r"91 tokens, the context holds 90"),
    ],
)
def test_impossible_plans_are_bugs(step: SequenceStep, message: str) -> None:
    with pytest.raises(InvariantBroken, match=message):
        build_batch(StepPlan((_step(0, [1], [3], name=1), step)), _limits(), _CPU)


@pytest.mark.parametrize("token", [-1, 100])
def test_tokens_outside_the_vocabulary(token: int) -> None:
    with pytest.raises(BadRequest, match=f"token id {token} is outside the vocabulary of 100"):
        build_batch(StepPlan((_step(0, [5, token], [3]),)), _limits(), _CPU)
