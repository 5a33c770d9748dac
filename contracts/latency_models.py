"""Latency models with fitted coefficients: our own form, and DistServe's with its published figures.

Both follow `contracts.latency.LatencyModel` and share one rule for steps that hold chunks and decodes: the
linear layers see all tokens together, and each kind keeps its own attention. With n new prompt tokens, b
decodes, P and D the linear parts of a step of one kind, and C what one more decode costs in a large batch:

    linear(n, b) = P(n)                                     where b = 0
                   D(b)                                     where n = 0
                   max(D(b), P(n + b), P(n) + C b)          else

A decode costs at least what a prompt token does, and what it costs beside others once the weights are read
anyway. The rule equals the two pure forms, never gets shorter by more work of either kind, and is continuous in
the tokens of steps that hold both kinds.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from contracts.latency import DecodeTerms

if TYPE_CHECKING:
    from contracts.latency import StepWork
    from contracts.messages import LatencyFit


class CostCurve(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds by a count (tokens, sequences): `max(floor, piecewise-linear)`, never falling.

    Raises ValueError for numbers that are no such curve.
    """

    #: Whatever the count, the weights are read.
    floor_s: float = 0.0
    #: Where the slope changes: counts, growing from 0, ...
    knots: tuple[int, ...]
    #: ... and the seconds there. Past the last knot it goes on as between the last two.
    knot_s: tuple[float, ...]

    @classmethod
    def line(cls, base_s: float, slope_s: float) -> CostCurve:
        return cls(knots=(0, 1), knot_s=(base_s, base_s + slope_s))

    def __post_init__(self) -> None:
        if not all(seconds >= 0 and math.isfinite(seconds) for seconds in (self.floor_s, *self.knot_s)):
            raise ValueError(f"a cost must be finite and not negative: {self}")
        if len(self.knots) != len(self.knot_s) or len(self.knots) < 2 or self.knots[0] != 0:
            raise ValueError(f"a cost curve needs two knots or more, the first at 0: {self}")
        if any(later <= earlier for earlier, later in zip(self.knots, self.knots[1:], strict=False)):
            raise ValueError(f"knots must grow: {self}")
        if any(later < earlier for earlier, later in zip(self.knot_s, self.knot_s[1:], strict=False)):
            raise ValueError(f"a cost must not fall: {self}")

    @property
    def last_slope_s(self) -> float:
        """Per count, at the far end."""
        return (self.knot_s[-1] - self.knot_s[-2]) / (self.knots[-1] - self.knots[-2])

    def at(self, count: int) -> float:
        """`count` >= 0."""
        knots, knot_s = self.knots, self.knot_s
        upper = min(bisect_right(knots, count), len(knots) - 1) if len(knots) > 2 else 1
        start, start_s = knots[upper - 1], knot_s[upper - 1]
        slope_s = (knot_s[upper] - start_s) / (knots[upper] - start)
        return max(self.floor_s, start_s + slope_s * (count - start))


class FittedLatency(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Coefficients of an engine on a device, as measured by a profile.

    Prefill: `max(floor, piecewise-linear in new tokens) + pair_s * pairs`. Decode: the same form in sequences,
    `+ context_token_s * context`; the well-known `A + B * context + C * batch` has a straight line there, but
    where cores compute, a batch soon costs more than reading the weights, and the line has a knee. Chunks of a
    prompt add up to the pairs of the whole, while each pays the floor. Raises ValueError for negative figures.
    """

    #: Linear part by new tokens, of steps with chunks.
    prefill: CostCurve
    #: Per query-key pair of the chunks' causal attention.
    pair_s: float
    #: Linear part by sequences, of steps that only decode.
    decode: CostCurve
    #: Per token of context that a decode reads.
    context_token_s: float

    def __post_init__(self) -> None:
        if not (0 <= self.pair_s < math.inf and 0 <= self.context_token_s < math.inf):
            raise ValueError(f"a cost must be finite and not negative: {self}")

    def step_s(self, work: StepWork) -> float:
        """As `LatencyModel.step_s`; 0 for a step of nothing."""
        new_tokens, pairs, _, num_decodes, context_tokens = work
        if num_decodes == 0:
            return self.prefill.at(new_tokens) + self.pair_s * pairs if new_tokens else 0.0
        linear_s = self.decode.at(num_decodes)
        if new_tokens:
            linear_s = max(
                linear_s,
                self.prefill.at(new_tokens + num_decodes),
                self.prefill.at(new_tokens) + self.decode.last_slope_s * num_decodes,
            )
        return linear_s + self.pair_s * pairs + self.context_token_s * context_tokens

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        return DecodeTerms(self.decode.at(num_decodes), self.context_token_s)


def from_fit(fit: LatencyFit) -> FittedLatency | None:
    """The model whose coefficients a worker measured of its own steps; None where it has measured nothing.

    A kind of step that it has not seen borrows from the other: a sequence that writes is a chunk of one token whose
    pairs are its context. Raises ValueError for coefficients that are negative or not finite.
    """
    prefill = CostCurve.line(fit.prefill_base_s, fit.prefill_token_s)
    decode = CostCurve.line(fit.decode_base_s, fit.sequence_s)
    pair_s, context_token_s = fit.pair_s, fit.context_token_s
    if not fit.num_prefill_steps and not fit.num_decode_steps:
        return None
    if not fit.num_prefill_steps:
        prefill, pair_s = decode, context_token_s
    elif not fit.num_decode_steps:
        decode, context_token_s = prefill, pair_s
    return FittedLatency(prefill=prefill, pair_s=pair_s, decode=decode, context_token_s=context_token_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class DistServeLatency:
    """DistServe's fit (OSDI'24, appendix A, in the form of its public simulator).

    Prefill `A + B * sum(len) + C * sum(len^2)`, decode `A + B * sum(context) + C * batch`.

    The squares come from the pairs: a whole prompt of n tokens has n(n+1)/2 of them, so n^2 = 2 pairs - n. For a
    chunk of n tokens behind p this gives (p+n)^2 - p^2: the chunks of a prompt together pay its square once, and
    A once each.
    """

    prefill_base_s: float
    prefill_token_s: float
    prefill_square_s: float
    decode_base_s: float
    context_token_s: float
    sequence_s: float

    def step_s(self, work: StepWork) -> float:
        """As `LatencyModel.step_s`; 0 for a step of nothing."""
        new_tokens, pairs, _, num_decodes, context_tokens = work
        if new_tokens == 0 and num_decodes == 0:
            return 0.0
        linear_s = self.decode_base_s + self.sequence_s * num_decodes if num_decodes else 0.0
        if new_tokens:
            beside_s = max(self.prefill_token_s, self.sequence_s) * num_decodes
            linear_s = max(linear_s, self.prefill_base_s + self.prefill_token_s * new_tokens + beside_s)
        squares = 2.0 * pairs - new_tokens
        return linear_s + self.prefill_square_s * squares + self.context_token_s * context_tokens

    def decode_terms(self, num_decodes: int) -> DecodeTerms:
        return DecodeTerms(self.decode_base_s + self.sequence_s * num_decodes, self.context_token_s)


def _published(prefill_ms: tuple[float, float, float], decode_ms: tuple[float, float, float]) -> DistServeLatency:
    """The coefficients A, B, C of the two phases."""
    return DistServeLatency(
        prefill_base_s=prefill_ms[0] / 1e3,
        prefill_token_s=prefill_ms[1] / 1e3,
        prefill_square_s=prefill_ms[2] / 1e3,
        decode_base_s=decode_ms[0] / 1e3,
        context_token_s=decode_ms[1] / 1e3,
        sequence_s=decode_ms[2] / 1e3,
    )


#: OPT models on A100-80G by tensor parallelism. The decode figures are those of DistServe's fit for small batches
#: (below 95 sequences); its second fit, for larger ones, is not in here, so large batches are extrapolated.
DISTSERVE_OPT: dict[str, DistServeLatency] = {
    "opt-13b-tp1": _published((18.10, 0.10191, 7.12e-6), (19.93, 6.27e-4, 0.0385)),
    "opt-13b-tp2": _published((14.74, 0.06858, 2.45e-6), (13.29, 3.41e-4, 0.0630)),
    "opt-66b-tp4": _published((29.44, 0.15135, 8.32e-6), (30.76, 4.52e-4, 0.0633)),
    "opt-66b-tp8": _published((25.49, 0.10659, 3.39e-6), (23.16, 2.27e-4, 0.0480)),
}

#: vLLM of 2023 on the same devices, as DistServe's public simulator has it for its baseline
#: (profiler-a100-80g.vllm.json); again the fit for small batches.
DISTSERVE_VLLM_OPT: dict[str, DistServeLatency] = {
    "opt-13b-tp1": _published((23.627, 0.15055, 8.6535e-6), (19.563, 4.9411e-4, 0.050606)),
    "opt-13b-tp2": _published((19.601, 0.064675, 6.0372e-6), (20.450, 1.8700e-4, 0.072632)),
    "opt-66b-tp4": _published((30.690, 0.15205, 3.2864e-5), (32.985, 5.7881e-4, 0.11317)),
}
