"""The joint step plan: what one forward pass computes, and what it answers.

One step may hold decodes (one new token of a running sequence) beside chunks of prompts, under one token
budget (Orca's iteration-level batching; Sarathi-Serve's chunked prefill). The engine computes the plan and
samples where asked; it keeps no state between steps but the KV pool and the weights: a sequence is only
its tokens and its blocks, which is what lets it move between workers.

What is made for every token is a msgspec struct: it costs a fifth of a frozen dataclass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

import msgspec

from contracts.ids import BlockId
from contracts.latency import StepWork
from contracts.requests import SamplingParams, TokenLogprobs

if TYPE_CHECKING:
    from contracts.layout import KvIdentity


class SampleSpec(msgspec.Struct, frozen=True, kw_only=True):
    """Ask for the token after the last new one of a sequence."""

    params: SamplingParams
    #: Output index of the token to choose: the counter of its noise, and what `min_tokens` compares with.
    output_index: int
    #: Prompt and output so far. Read only where `params` has penalties; may be the live list.
    history: Sequence[int]
    #: How many of `history` are prompt.
    num_prompt_tokens: int


class SequenceStep(msgspec.Struct, frozen=True, kw_only=True):
    """New tokens of one sequence: positions `[start, start + len(token_ids))`.

    `block_ids` cover at least `start + len(token_ids)` tokens; KV of positions before `start` is in them
    already. Nothing but these new positions is written.
    """

    #: Caller's key for the result; unique in a plan.
    sequence_id: int
    token_ids: Sequence[int]
    start: int
    block_ids: Sequence[BlockId]
    #: None: compute KV only (a chunk that is not the prompt's last).
    sample: SampleSpec | None


class StepPlan(msgspec.Struct, frozen=True):
    sequences: tuple[SequenceStep, ...]

    @property
    def num_tokens(self) -> int:
        return sum(len(sequence.token_ids) for sequence in self.sequences)


def work_of(plan: StepPlan) -> StepWork:
    """A plan as latency models see it: a sequence of one new token is a decode, a longer one a chunk."""
    prefill_tokens = num_chunks = num_decodes = context_tokens = 0
    pairs = 0.0
    for step in plan.sequences:
        num_new = len(step.token_ids)
        if num_new == 1:
            num_decodes += 1
            context_tokens += step.start + 1
        else:
            num_chunks += 1
            prefill_tokens += num_new
            pairs += num_new * step.start + num_new * (num_new + 1) / 2
    return StepWork(
        prefill_tokens=prefill_tokens,
        prefill_pairs=pairs,
        num_chunks=num_chunks,
        num_decodes=num_decodes,
        context_tokens=context_tokens,
    )


class Sampled(msgspec.Struct, frozen=True, kw_only=True):
    token_id: int
    logprobs: TokenLogprobs | None = None


class StepResult(msgspec.Struct, frozen=True, kw_only=True):
    """By `sequence_id`, for every sequence of the plan that asked; `duration_s` is the engine's own time."""

    sampled: dict[int, Sampled] = {}
    duration_s: float = 0.0


class Engine(Protocol):
    """What a worker's step loop awaits: live, a thread with a model; in simulation, a timer and a formula."""

    @property
    def identity(self) -> KvIdentity: ...

    @property
    def num_blocks(self) -> int: ...

    @property
    def max_context_tokens(self) -> int: ...

    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...

    @property
    def vocab_size(self) -> int:
        """Token ids from here on have no embedding: a step that holds one fails as a whole."""
        ...

    @property
    def description(self) -> str:
        """Device, kernels and threads, for people."""
        ...

    async def step(self, plan: StepPlan) -> StepResult:
        """Computes one plan. Steps never overlap. Cancelling the await does not stop a running step: the
        caller must not reuse the plan's blocks before `quiesce()` returns."""
        ...

    async def quiesce(self) -> None:
        """Returns when no step touches the pool any more."""
        ...

    async def close(self) -> None: ...
