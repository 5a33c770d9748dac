"""How much of prompts a step may hold beside answers, so that these keep the time between tokens that their clients
were promised (Sarathi-Serve, OSDI'24, section 4.3): the most prompt tokens with which the step's predicted time is
within the tightest target of its decodes. Pure.

Prompts never starve: a step always may hold `MIN_CHUNK_TOKENS` of them, even where decodes alone take longer than
promised. The hard limits of `StepBudget` stay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.latency import StepWork
from engine.compose import BY_ARRIVAL

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.latency import LatencyModel
    from engine.compose import Candidate, StepBudget

#: Chunks are multiples of it: matrix kernels work in tiles (257 tokens cost a third more than 256, as the paper found).
TILE_TOKENS = 16
MIN_CHUNK_TOKENS = 16
#: Share of a target that predicted steps may take: a mean over steps that take just as long as promised would be late
#: half of the time.
TARGET_SHARE = 0.95


def mixed_budget(
    decodes: Sequence[Candidate],
    chunks: Sequence[Candidate],
    budget: StepBudget,
    latency: LatencyModel | None,
    *,
    context_tokens: int | None = None,
    between_steps_s: float = 0.0,
) -> StepBudget:
    """The budget with which a step of these candidates keeps the decodes' targets; `budget` itself where there is no
    target, nothing to mix, or nothing known of what steps take. `context_tokens` of all decodes; None: as each says."""
    targets_s = [decode.tpot_target_s for decode in decodes if decode.tpot_target_s is not None]
    if latency is None or not chunks or not targets_s:
        return budget
    num_decodes = min(len(decodes), budget.max_sequences, budget.max_tokens)
    if context_tokens is None:
        context_tokens = sum(decode.num_computed + decode.num_tokens for decode in decodes)
    num_tokens = chunk_tokens(
        chunks,
        latency,
        num_decodes=num_decodes,
        context_tokens=context_tokens,
        limit_s=min(targets_s) - between_steps_s,
        max_tokens=budget.max_tokens - num_decodes,
    )
    return replace(budget, max_tokens=num_decodes + num_tokens)


def chunk_tokens(
    chunks: Sequence[Candidate],
    latency: LatencyModel,
    *,
    num_decodes: int,
    context_tokens: int,
    limit_s: float,
    max_tokens: int,
) -> int:
    """Prompt tokens for a step beside `num_decodes` answers with `context_tokens` in all: the largest multiple of
    `TILE_TOKENS` with which it is predicted to take at most `TARGET_SHARE * limit_s`, but at least `MIN_CHUNK_TOKENS`
    and at most `max_tokens`. `latency` must not fall with more work."""
    by_arrival = sorted(chunks, key=BY_ARRIVAL) if len(chunks) > 1 else chunks
    # As they are served: the sort is stable, and what has begun goes first.
    in_order = sorted(by_arrival, key=lambda chunk: not chunk.started)
    limit_s *= TARGET_SHARE

    def fits(num_tokens: int) -> bool:
        return latency.step_s(_work(in_order, num_tokens, num_decodes, context_tokens)) <= limit_s

    if max_tokens <= MIN_CHUNK_TOKENS or fits(max_tokens):
        return max_tokens
    low, high = MIN_CHUNK_TOKENS // TILE_TOKENS, -(-max_tokens // TILE_TOKENS)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * TILE_TOKENS):
            low = middle
        else:
            high = middle
    return low * TILE_TOKENS


def reading_s(latency: LatencyModel, *, tokens: int, num_computed: int, max_tokens: int) -> float:
    """Seconds that reading `tokens` of a prompt behind `num_computed` takes in steps of its own of at most
    `max_tokens`: what there is at least between its beginning and its first token."""
    seconds = 0.0
    while tokens > 0:
        chunk = min(tokens, max_tokens)
        seconds += latency.step_s(StepWork(chunk, _pairs(chunk, num_computed), 1))
        num_computed += chunk
        tokens -= chunk
    return seconds


def _work(in_order: Sequence[Candidate], num_tokens: int, num_decodes: int, context_tokens: int) -> StepWork:
    """Of a step with the first `num_tokens` tokens of these chunks, or all they have."""
    left, num_chunks, pairs = num_tokens, 0, 0.0
    for chunk in in_order:
        if not left:
            break
        taken = min(left, chunk.num_tokens)
        num_chunks += 1
        pairs += _pairs(taken, chunk.num_computed)
        left -= taken
    return StepWork(num_tokens - left, pairs, num_chunks, num_decodes, context_tokens)


def _pairs(num_tokens: int, num_computed: int) -> float:
    return num_tokens * num_computed + num_tokens * (num_tokens + 1) / 2
