"""A latency model whose every term is a given figure: for checks by hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.latency import DecodeTerms

if TYPE_CHECKING:
    from contracts.latency import StepWork


@dataclass(frozen=True, slots=True, kw_only=True)
class AffineLatency:
    """`base + token * new tokens + pair * pairs + context_token * context + sequence * decodes`; seconds."""

    base_s: float = 0.0
    token_s: float = 0.0
    pair_s: float = 0.0
    context_token_s: float = 0.0
    sequence_s: float = 0.0

    def step_s(self, work: StepWork) -> float:
        return (
            self.base_s
            + self.token_s * work.prefill_tokens
            + self.pair_s * work.prefill_pairs
            + self.context_token_s * work.context_tokens
            + self.sequence_s * work.num_decodes
        )

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        return DecodeTerms(self.base_s + self.sequence_s * num_decodes, self.context_token_s)
