"""How long an engine's steps take: the one interface of all latency models, and what they are asked about.

Models are pure and cheap: a study asks them millions of times. At a fixed number of sequences a decode step is
affine in the context it reads; that lets a study take thousands of steps in closed form.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol


class StepWork(NamedTuple):
    """One engine step, as far as its duration depends on it."""

    #: Prompt tokens computed, over all chunks in the step.
    prefill_tokens: int = 0
    #: Query-key pairs of these chunks under causal attention: the sum over chunks of `n * p + n * (n + 1) / 2`,
    #: for n new tokens behind p computed ones.
    prefill_pairs: float = 0.0
    #: Chunks in the step.
    num_chunks: int = 0
    #: Sequences that write one token each.
    num_decodes: int = 0
    #: Sum of their context lengths, the token being computed included.
    context_tokens: int = 0


class DecodeTerms(NamedTuple):
    """Seconds of a step that only decodes a fixed number of sequences: `base_s + per_context_token_s * context`."""

    base_s: float
    per_context_token_s: float


class LatencyModel(Protocol):
    """Seconds that an engine of some model on some device takes."""

    def step_s(self, work: StepWork) -> float:
        """One step; with no chunks the same as `decode_terms` says."""
        ...

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        """`num_decodes` > 0."""
        ...


class TransferModel(Protocol):
    """Seconds that KV takes between two workers."""

    def transfer_s(self, num_bytes: int, active_flows: int) -> float:
        """`active_flows` >= 1 pulls share the narrower end of the link, this one included."""
        ...
