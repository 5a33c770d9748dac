"""A canary: a few tokens whose next one is known, computed before a worker serves. Wrong weights, and weights that were
bound or mapped wrongly, answer otherwise."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from contracts.errors import CorruptCheckpoint
from contracts.ids import BlockId
from contracts.requests import SamplingParams
from engine.plan import SampleSpec, SequenceStep, StepPlan

if TYPE_CHECKING:
    from torch import Tensor

    from engine.runner import Runner

#: Of the longest prompt.
NUM_TOKENS = 8
#: Between the logits of the answer and of the next best token: other kernels must not turn it, in bfloat16 either.
CLEAR_MARGIN = 0.25


class Canary(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    prompt: tuple[int, ...]
    token: int
    #: Between its logit and the next best one's.
    margin: float


def check_canary(runner: Runner, canary: Canary) -> None:
    """Raises CorruptCheckpoint where the model answers otherwise, or not in numbers. Of a canary without a clear answer
    that is all. Overwrites the first blocks of the runner's pool; one too small for the prompt is let pass."""
    if runner.max_context_tokens < len(canary.prompt):
        return
    logits_V = _logits(runner, canary.prompt)
    token = int(logits_V.argmax())
    if not bool(logits_V.isfinite().all()):
        raise CorruptCheckpoint("canary: the model computes numbers that are none: its weights are wrong")
    if token != canary.token and canary.margin >= CLEAR_MARGIN:
        raise CorruptCheckpoint(
            f"canary: after {list(canary.prompt)} comes token {canary.token}, but the model says {token}: "
            "its weights are wrong"
        )


def _logits(runner: Runner, prompt: tuple[int, ...]) -> Tensor:
    block_tokens = runner.pool.layout.block_tokens
    blocks = tuple(BlockId(number) for number in range(-(-len(prompt) // block_tokens)))
    params = SamplingParams(max_tokens=1, temperature=0.0)
    sample = SampleSpec(params=params, output_index=0, history=prompt, num_prompt_tokens=len(prompt))
    step = SequenceStep(sequence_id=0, token_ids=prompt, start=0, block_ids=blocks, sample=sample)
    return runner.logits(StepPlan((step,)))[0]
