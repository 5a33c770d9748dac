"""From logits to tokens: penalties, bias, temperature, top-k, top-p, min-p, and log-probabilities.

Order: repetition, frequency and presence penalties; logit bias; end tokens masked before `min_tokens`
(unless nothing would be left); then greedy, or temperature, top-k, top-p within what top-k kept, min-p. Where
candidates tie at the bound of top-k or top-p all of them are kept, so that what is kept depends on values
alone. One uniform number, a function of (seed, output index), is put through the inverse distribution over
the kept tokens in order of id. Log-probabilities are those of the model: of the logits before any of this.

Greedy tokens are found for the whole batch at once. Rows that draw are treated one by one, in host memory:
a row is thousands of numbers, which hides the cost of a call, and no result can depend on the rest of the
batch. Back-of-the-envelope, 8,192 tokens: exp 12 us, block sums 5 us, partition for top-k 14 us a row.

Shape legend: S rows, V vocabulary, C candidates that are left. Logits are fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import Internal
from contracts.requests import TokenLogprobs, TopLogprob
from engine.noise import uniform
from engine.plan import Sampled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from contracts.requests import SamplingParams
    from engine.plan import SampleSpec

    Floats = NDArray[np.float32]

#: Below this a temperature is as good as greedy, and a division by it could overflow.
_MIN_TEMPERATURE = 1e-5
#: Most distributions have their nucleus within so many tokens; the others are sorted whole.
_NUCLEUS_PROBE = 256
#: Weights are summed in blocks, so that only one block has to be walked token by token.
_SUM_BLOCK = 128


class Sampler:
    """Stateless but for the model's constants."""

    def __init__(self, eos_token_ids: tuple[int, ...]) -> None:
        self._eos_token_ids = eos_token_ids

    def sample(self, logits_SV: Tensor, specs: Sequence[SampleSpec]) -> list[Sampled]:
        """One token per row. Does not change `logits_SV`. Raises Internal when logits are not finite."""
        host_SV: Floats = logits_SV.cpu().numpy()
        greedy = _argmax(host_SV)
        return [
            self._sample_row(host_SV[row], token, spec)
            for row, (token, spec) in enumerate(zip(greedy, specs, strict=True))
        ]

    def _sample_row(self, logits_V: Floats, token: int, spec: SampleSpec) -> Sampled:
        """`token` is the row's greedy choice where nothing is processed."""
        params = spec.params
        processed_V = self._processed(logits_V, spec)
        if not params.greedy:
            token = _draw(processed_V, params, spec.output_index)
        elif processed_V is not logits_V:
            token = int(processed_V.argmax())
        if params.logprobs is None:
            return Sampled(token_id=token)
        return Sampled(token_id=token, logprobs=_logprobs(logits_V, token, params.logprobs))

    def _processed(self, logits_V: Floats, spec: SampleSpec) -> Floats:
        """The logits after penalties, bias and masks: a copy where there are some, else the argument."""
        params = spec.params
        masked = self._end_tokens(params) if spec.output_index < params.min_tokens else ()
        penalised = params.frequency_penalty != 0.0 or params.presence_penalty != 0.0
        if params.repetition_penalty == 1.0 and not (penalised or params.logit_bias or masked):
            return logits_V
        processed_V = logits_V.copy()
        if params.repetition_penalty != 1.0:
            _penalise_repetition(processed_V, spec.history, params.repetition_penalty)
        if penalised:
            _penalise_output(processed_V, spec)
        # Ids outside the vocabulary mean nothing, and must not fail the step of the others.
        for token_id, bias in params.logit_bias:
            if 0 <= token_id < logits_V.size:
                processed_V[token_id] += bias
        banned = {token_id for token_id in masked if 0 <= token_id < logits_V.size}
        if len(banned) < logits_V.size:
            processed_V[list(banned)] = -np.inf
        return processed_V

    def _end_tokens(self, params: SamplingParams) -> tuple[int, ...]:
        """Tokens that would end the answer; an ignored end-of-sequence token does not."""
        return params.stop_token_ids if params.ignore_eos else params.stop_token_ids + self._eos_token_ids


def _argmax(logits_SV: Floats) -> list[int]:
    """The lowest token id among each row's maxima. Raises Internal when a maximum is not finite."""
    tokens_S = logits_SV.argmax(axis=1)
    # A NaN counts as the maximum, so the maxima tell of every one.
    finite_S = np.isfinite(logits_SV[np.arange(len(tokens_S)), tokens_S])
    if not finite_S.all():
        rows = np.flatnonzero(~finite_S).tolist()
        raise Internal(f"logits of row(s) {rows} of the step are not finite: damaged weights or KV")
    return [int(token) for token in tokens_S]


def _penalise_repetition(logits_V: Floats, history: Sequence[int], penalty: float) -> None:
    """Tokens of prompt and output: positive logits divided, negative ones multiplied (CTRL, section 4.1)."""
    seen = np.unique(np.asarray(history, dtype=np.int64))
    scores = logits_V[seen]
    logits_V[seen] = np.where(scores > 0, scores / penalty, scores * penalty)


def _penalise_output(logits_V: Floats, spec: SampleSpec) -> None:
    """Tokens of the output: `frequency * count + presence` is subtracted."""
    output = np.asarray(spec.history[spec.num_prompt_tokens :], dtype=np.int64)
    tokens, counts = np.unique(output, return_counts=True)
    logits_V[tokens] -= spec.params.frequency_penalty * counts + spec.params.presence_penalty


def _draw(logits_V: Floats, params: SamplingParams, output_index: int) -> int:
    """One token from the filtered distribution. Does not change its arguments; the maximum is finite."""
    scores = (logits_V - logits_V.max()) / np.float32(max(params.temperature, _MIN_TEMPERATURE))
    candidates = _top_k_ids(scores, params.top_k)
    if candidates is not None:
        scores = scores[candidates]
    # Relative to the likeliest token, whose weight is exactly 1.
    weights_C = np.exp(scores)
    if params.top_p < 1.0:
        weights_C[weights_C < _nucleus_bound(weights_C, params.top_p)] = 0.0
    if params.min_p > 0.0:
        weights_C[weights_C < params.min_p] = 0.0
    index = _invert(weights_C, uniform(params.seed, output_index))
    return index if candidates is None else int(candidates[index])


def _top_k_ids(scores_V: Floats, top_k: int) -> NDArray[np.int64] | None:
    """Ascending ids of the k highest scores and of those equal to the k-th; None for all (k = 0)."""
    if not 0 < top_k < scores_V.size:
        return None
    kth = scores_V.size - top_k
    return np.flatnonzero(scores_V >= np.partition(scores_V, kth)[kth])


def _nucleus_bound(weights_C: Floats, top_p: float) -> np.float32:
    """The weight of the last of the likeliest tokens whose sum reaches the share p (Holtzman et al. 2020)."""
    target = top_p * float(_block_sums(weights_C).sum())
    probe = weights_C
    if weights_C.size > _NUCLEUS_PROBE:
        probe = np.partition(weights_C, -_NUCLEUS_PROBE)[-_NUCLEUS_PROBE:]
    bound = _bound_within(probe, target)
    if bound is None and probe is not weights_C:
        bound = _bound_within(weights_C, target)
    # Rounding may leave the sum of all below a target of (nearly) all of it.
    return np.float32(0.0) if bound is None else bound


def _bound_within(weights: Floats, target: float) -> np.float32 | None:
    """The weight at which the sum from the largest down reaches `target`; None where all sum to less."""
    ascending = np.sort(weights)
    position = int(ascending[::-1].cumsum(dtype=np.float64).searchsorted(target))
    return None if position == ascending.size else ascending[-1 - position]


def _invert(weights_C: Floats, uniform_value: float) -> int:
    """Inverse distribution: the first candidate whose cumulative weight exceeds `uniform * total`.

    A candidate of weight 0 is never the answer.
    """
    cumulative = _block_sums(weights_C).cumsum()
    target = uniform_value * float(cumulative[-1])
    block = int(cumulative.searchsorted(target, side="right"))
    before = float(cumulative[block - 1]) if block else 0.0
    start = block * _SUM_BLOCK
    within = weights_C[start : start + _SUM_BLOCK].cumsum(dtype=np.float64)
    # The block's sum and its walk may differ in the last bits; the walk decides.
    residue = min(target - before, float(np.nextafter(within[-1], 0.0)))
    return start + int(within.searchsorted(residue, side="right"))


def _block_sums(weights_C: Floats) -> NDArray[np.float64]:
    """Sums of `_SUM_BLOCK` neighbours each, the last block possibly shorter."""
    sums = np.add.reduceat(weights_C, np.arange(0, weights_C.size, _SUM_BLOCK))
    return sums.astype(np.float64)


def _logprobs(logits_V: Floats, token: int, count: int) -> TokenLogprobs:
    """The token's and the `count` highest, ties by id."""
    shifted_V = logits_V - logits_V.max()
    log_total = float(np.log(np.exp(shifted_V).sum(dtype=np.float64)))
    candidates = _top_k_ids(shifted_V, count) if count else np.empty(0, dtype=np.int64)
    if candidates is None:
        candidates = np.arange(logits_V.size)
    best: list[int] = candidates[np.argsort(-shifted_V[candidates], kind="stable")][:count].tolist()
    top = tuple(TopLogprob(each, float(shifted_V[each]) - log_total) for each in best)
    return TokenLogprobs(float(shifted_V[token]) - log_total, top)
