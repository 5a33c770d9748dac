"""What the sampler keeps, draws and reports."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import Internal
from contracts.requests import SamplingParams
from engine.plan import Sampled, SampleSpec
from engine.sampling import Sampler

_EOS = (3,)
_SAMPLER = Sampler(_EOS)


def _spec(*, output_index: int = 0, history: tuple[int, ...] = (), num_prompt: int = 0, **params: Any) -> SampleSpec:
    return SampleSpec(
        params=SamplingParams(max_tokens=100, **params),
        output_index=output_index,
        history=history,
        num_prompt_tokens=num_prompt,
    )


def _sample(logits: list[list[float]], *specs: SampleSpec) -> list[Sampled]:
    return _SAMPLER.sample(torch.tensor(logits, dtype=torch.float32), specs)


def _tokens(logits: torch.Tensor, *specs: SampleSpec) -> list[int]:
    return [sampled.token_id for sampled in _SAMPLER.sample(logits, specs)]


def _random_logits(rows: int, vocab: int, seed: int, spread: float = 2.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))


def test_greedy_takes_the_lowest_id_among_maxima() -> None:
    rows = [[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0], [0.0, -1.0, -torch.inf, 0.0]]
    assert [each.token_id for each in _sample(rows, *[_spec(temperature=0.0)] * 3)] == [1, 0, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(Internal, match=r"row\(s\) \[1\]"):
        _sample([[0.0, 1.0], [bad, bad]], _spec(temperature=0.0), _spec())


def _kept(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """The distribution by the definitions, one token after the other, in fp64; `[V]`."""
    probs = (logits.double() / params.temperature).softmax(-1)
    order = sorted(range(len(probs)), key=lambda token: -float(probs[token]))
    if params.top_k:
        order = order[: params.top_k]
    total, reached, nucleus = sum(float(probs[token]) for token in order), 0.0, list[int]()
    for token in order:
        if reached < params.top_p * total:
            nucleus.append(token)
        reached += float(probs[token])
    best = float(probs[order[0]])
    kept = torch.zeros_like(probs)
    for token in nucleus:
        if float(probs[token]) >= params.min_p * best:
            kept[token] = probs[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.4},
        {"temperature": 1.7},
        {"top_k": 3},
        {"top_k": 1},
        {"top_p": 0.7},
        {"top_p": 0.999},
        {"top_p": 0.01},
        {"min_p": 0.2},
        {"temperature": 1.3, "top_k": 9, "top_p": 0.8, "min_p": 0.1},
    ],
)
def test_draws_follow_the_filtered_distribution(params: dict[str, Any]) -> None:
    """Chi-square of 4,000 draws (one per output index) against the definitions; nothing else is drawn."""
    logits = _random_logits(1, 17, seed=4)
    spec = _spec(**params)
    expected = _kept(logits[0], spec.params)
    draws = Counter(_tokens(logits, _spec(output_index=index, seed=77, **params))[0] for index in range(4000))
    assert set(draws) <= {token for token in range(17) if float(expected[token]) > 0}
    counted = [token for token in range(17) if float(expected[token]) * 4000 >= 5]
    statistic = sum(
        (draws[token] - float(expected[token]) * 4000) ** 2 / (float(expected[token]) * 4000) for token in counted
    )
    # Five standard deviations of the statistic above its mean.
    degrees = len(counted)
    assert statistic < degrees + 5 * (2 * degrees) ** 0.5


@given(
    st.integers(1, 700),
    st.integers(0, 2**32),
    st.sampled_from([0.0, 0.3, 1.0, 4.0]),
    st.integers(0, 50),
    st.sampled_from([1.0, 0.95, 0.5]),
    st.sampled_from([0.0, 0.05]),
)
def test_a_row_does_not_depend_on_its_batch(
    vocab: int, seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits = _random_logits(5, vocab, seed=vocab)
    mine = _spec(seed=seed, output_index=3, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    others = [_spec(seed=each, temperature=0.5 * each, top_k=each) for each in range(4)]
    alone = _tokens(logits[2:3], mine)
    assert _tokens(logits, others[0], others[1], mine, others[2], others[3])[2:3] == alone
    assert _tokens(logits[1:4], others[3], mine, others[0])[1:2] == alone


def test_noise_is_a_function_of_seed_and_index() -> None:
    logits = _random_logits(1, 1000, seed=1, spread=0.1)
    drawn = {
        (seed, index): _tokens(logits, _spec(seed=seed, output_index=index))[0]
        for seed in range(8)
        for index in range(8)
    }
    again = {(seed, index): _tokens(logits, _spec(seed=seed, output_index=index))[0] for seed, index in drawn}
    assert drawn == again
    assert len(set(drawn.values())) > 50


@pytest.mark.parametrize("spread", [0.01, 3.0])
def test_top_p_over_a_large_vocabulary(spread: float) -> None:
    """A nucleus within the probe of the likeliest tokens, and one that needs the whole row."""
    logits = _random_logits(1, 5000, seed=9, spread=spread)
    expected = _kept(logits[0], SamplingParams(max_tokens=1, top_p=0.9))
    for index in range(300):
        assert expected[_tokens(logits, _spec(seed=5, output_index=index, top_p=0.9))[0]] > 0


def test_a_tiny_temperature_is_greedy() -> None:
    logits = _random_logits(1, 300, seed=2)
    assert _tokens(logits, _spec(temperature=1e-30)) == _tokens(logits, _spec(temperature=0.0))


def test_end_tokens_are_masked_before_min_tokens() -> None:
    row = [0.0, 1.0, 7.0, 9.0]
    early = _spec(temperature=0.0, min_tokens=2, stop_token_ids=(2,), output_index=1)
    due = _spec(temperature=0.0, min_tokens=2, stop_token_ids=(2,), output_index=2)
    ignoring = _spec(temperature=0.0, min_tokens=2, stop_token_ids=(2,), ignore_eos=True)
    assert [each.token_id for each in _sample([row] * 3, early, due, ignoring)] == [1, 3, 3]


def test_a_mask_of_everything_is_ignored() -> None:
    spec = _spec(min_tokens=5, stop_token_ids=(0, 1, 2))
    assert _sample([[0.0, 50.0, 1.0]], spec)[0].token_id == 1


def test_ids_outside_the_vocabulary_mean_nothing() -> None:
    spec = _spec(temperature=0.0, min_tokens=5, stop_token_ids=(7, -1), logit_bias=((99, 3.0), (-1, 9.0)))
    assert _sample([[0.0, 2.0, 1.0]], spec)[0].token_id == 1


def test_bias_is_added() -> None:
    spec = _spec(temperature=0.0, logit_bias=((0, 5.0), (1, -100.0)))
    assert _sample([[0.0, 4.0, 4.5]], spec)[0].token_id == 0


def test_penalties() -> None:
    """Repetition counts prompt and output, frequency and presence the output only."""
    row = [4.0, 3.9, -1.0, 0.0]
    history = (0, 1, 1, 1)
    cases: dict[str, tuple[dict[str, Any], list[float]]] = {
        "repetition": ({"repetition_penalty": 2.0}, [2.0, 1.95, -1.0, 0.0]),
        "frequency": ({"frequency_penalty": 0.5}, [4.0, 2.4, -1.0, 0.0]),
        "presence": ({"presence_penalty": 0.5}, [4.0, 3.4, -1.0, 0.0]),
    }
    for name, (params, expected) in cases.items():
        spec = _spec(temperature=0.0, history=history, num_prompt=1, **params)
        assert _sample([row], spec)[0].token_id == int(np.argmax(expected)), name


def test_repetition_pushes_negative_logits_down() -> None:
    spec = _spec(temperature=0.0, history=(0,), num_prompt=1, repetition_penalty=2.0)
    assert _sample([[-1.0, -1.5]], spec)[0].token_id == 1


def test_logprobs_are_those_of_the_raw_logits() -> None:
    logits = _random_logits(3, 50, seed=6)
    specs = (
        _spec(temperature=0.7, top_k=4, logit_bias=((7, 50.0),), logprobs=5),
        _spec(temperature=0.0, logprobs=0),
        _spec(temperature=0.0),
    )
    first, second, third = _SAMPLER.sample(logits, specs)
    expected = logits.log_softmax(-1)
    assert first.token_id == 7
    assert first.logprobs is not None
    assert first.logprobs.logprob == pytest.approx(float(expected[0, 7]), abs=1e-5)
    values, ids = expected[0].topk(5)
    assert [each.token_id for each in first.logprobs.top] == [int(each) for each in ids]
    assert [each.logprob for each in first.logprobs.top] == pytest.approx([float(each) for each in values], abs=1e-5)
    assert second.logprobs is not None
    assert second.logprobs.top == ()
    assert third.logprobs is None


def test_more_logprobs_than_tokens() -> None:
    (sampled,) = _sample([[1.0, 2.0, 2.0]], _spec(temperature=0.0, logprobs=20))
    assert sampled.logprobs is not None
    assert [each.token_id for each in sampled.logprobs.top] == [1, 2, 0]


def test_the_logits_are_not_changed() -> None:
    logits = _random_logits(2, 30, seed=8)
    before = logits.clone()
    spec = _spec(history=(1, 2), num_prompt=1, repetition_penalty=1.5, presence_penalty=1.0, min_tokens=3, top_p=0.5)
    _SAMPLER.sample(logits, [spec, _spec(temperature=0.0)])
    assert torch.equal(logits, before)
