"""Fitted models: the two pure forms, the rule for both at once, and what chunks add up to."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.latency import StepWork
from contracts.latency_models import DISTSERVE_OPT, CostCurve, DistServeLatency, FittedLatency, from_fit
from contracts.messages import LatencyFit

if TYPE_CHECKING:
    from contracts.latency import LatencyModel

FITTED = FittedLatency(
    prefill=CostCurve(floor_s=0.010, knots=(0, 100, 500), knot_s=(0.004, 0.014, 0.114)),
    pair_s=1e-8,
    decode=CostCurve(floor_s=0.009, knots=(0, 8), knot_s=(0.001, 0.017)),
    context_token_s=1e-6,
)


def prompt(num_tokens: int, prefix: int = 0) -> StepWork:
    pairs = num_tokens * prefix + num_tokens * (num_tokens + 1) / 2
    return StepWork(prefill_tokens=num_tokens, prefill_pairs=pairs, num_chunks=1)


def decodes(count: int, context_tokens: int) -> StepWork:
    return StepWork(num_decodes=count, context_tokens=context_tokens)


def both(first: StepWork, second: StepWork) -> StepWork:
    return StepWork(
        prefill_tokens=first.prefill_tokens + second.prefill_tokens,
        prefill_pairs=first.prefill_pairs + second.prefill_pairs,
        num_chunks=first.num_chunks + second.num_chunks,
        num_decodes=first.num_decodes + second.num_decodes,
        context_tokens=first.context_tokens + second.context_tokens,
    )


seconds = st.floats(0.0, 1.0)


@st.composite
def curves(draw: st.DrawFn) -> CostCurve:
    steps = draw(st.lists(st.tuples(st.integers(1, 500), seconds), min_size=1, max_size=4))
    knots, knot_s = [0], [draw(seconds)]
    for width, rise_s in steps:
        knots.append(knots[-1] + width)
        knot_s.append(knot_s[-1] + rise_s)
    return CostCurve(floor_s=draw(seconds), knots=tuple(knots), knot_s=tuple(knot_s))


fitted_models = st.builds(
    FittedLatency, prefill=curves(), pair_s=st.floats(0, 1e-6), decode=curves(), context_token_s=st.floats(0, 1e-4)
)
distserve_models = st.builds(
    DistServeLatency,
    prefill_base_s=seconds,
    prefill_token_s=st.floats(0, 1e-2),
    prefill_square_s=st.floats(0, 1e-6),
    decode_base_s=seconds,
    context_token_s=st.floats(0, 1e-4),
    sequence_s=st.floats(0, 1e-2),
)
models = st.one_of(fitted_models, distserve_models)

chunk_sizes = st.integers(0, 3000)
batches = st.integers(0, 300)


def _work(num_tokens: int, prefix: int, count: int, context: int) -> StepWork:
    return both(prompt(num_tokens, prefix) if num_tokens else StepWork(), decodes(count, count * context))


works = st.builds(_work, chunk_sizes, chunk_sizes, batches, st.integers(1, 3000))


@pytest.mark.parametrize(
    ("num_tokens", "linear_s"), [(1, 0.010), (60, 0.010), (80, 0.012), (100, 0.014), (300, 0.064), (900, 0.214)]
)
def test_prefill_is_floor_then_slopes_plus_pairs(num_tokens: int, linear_s: float) -> None:
    work = prompt(num_tokens, prefix=50)
    assert FITTED.step_s(work) == pytest.approx(linear_s + 1e-8 * work.prefill_pairs)


@pytest.mark.parametrize(("count", "linear_s"), [(1, 0.009), (4, 0.009), (5, 0.011), (8, 0.017), (16, 0.033)])
def test_decode_is_floor_then_slope_plus_context(count: int, linear_s: float) -> None:
    assert FITTED.step_s(decodes(count, 7000)) == pytest.approx(linear_s + 0.007)


def test_in_a_step_of_both_a_decode_costs_at_least_what_it_costs_in_a_large_batch() -> None:
    # 20 tokens and 20 decodes: the chunk alone 10 ms, the decodes alone 41 ms, as 40 prompt tokens 10 ms; beside the
    # chunk each decode adds its 2 ms.
    step = both(prompt(20), decodes(20, 1000))
    assert FITTED.step_s(step) == pytest.approx(0.010 + 20 * 0.002 + 210e-8 + 0.001)


@given(models, batches.filter(bool), st.integers(0, 100_000))
def test_a_step_that_only_decodes_follows_its_terms(model: LatencyModel, count: int, context_tokens: int) -> None:
    terms = model.decode_terms(count)
    expected_s = terms.base_s + terms.per_context_token_s * context_tokens
    assert model.step_s(decodes(count, context_tokens)) == pytest.approx(expected_s)


@given(models, works, works)
def test_more_work_never_takes_less_time(model: LatencyModel, work: StepWork, more: StepWork) -> None:
    assert model.step_s(both(work, more)) >= model.step_s(work) * (1 - 1e-12)


@given(fitted_models, works)
def test_one_more_token_of_a_chunk_adds_no_more_than_the_steepest_slope(model: FittedLatency, work: StepWork) -> None:
    """Continuous: nothing jumps while a step holds both kinds."""
    step = both(work, both(prompt(1), decodes(1, 1)))
    longer = step._replace(prefill_tokens=step.prefill_tokens + 1)
    curve = model.prefill
    slopes = (
        (curve.knot_s[index + 1] - curve.knot_s[index]) / (curve.knots[index + 1] - curve.knots[index])
        for index in range(len(curve.knots) - 1)
    )
    assert model.step_s(longer) <= model.step_s(step) + max(slopes) + 1e-9


@given(models)
def test_nothing_to_do_takes_no_time(model: LatencyModel) -> None:
    assert model.step_s(StepWork()) == 0.0


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_chunks_pay_the_pairs_of_their_prompt_once(sizes: list[int]) -> None:
    model = FittedLatency(
        prefill=CostCurve.line(0.0, 1e-4), pair_s=1e-7, decode=CostCurve.line(0.0, 1.0), context_token_s=0.0
    )
    in_chunks_s = sum(model.step_s(prompt(size, sum(sizes[:index]))) for index, size in enumerate(sizes))
    assert in_chunks_s == pytest.approx(model.step_s(prompt(sum(sizes))))


@given(fitted_models)
def test_a_fitted_model_survives_its_json(model: FittedLatency) -> None:
    assert msgspec.json.decode(msgspec.json.encode(model), type=FittedLatency) == model


@pytest.mark.parametrize(
    ("curve", "complaint"),
    [
        ({"knots": (0, 5), "knot_s": (0.1, math.nan)}, "finite"),
        ({"knots": (0, 5), "knot_s": (-0.1, 0.1)}, "not negative"),
        ({"knots": (0, 5), "knot_s": (0.1,)}, "two knots"),
        ({"knots": (0,), "knot_s": (0.1,)}, "two knots"),
        ({"knots": (1, 5), "knot_s": (0.1, 0.2)}, "first at 0"),
        ({"knots": (0, 5, 5), "knot_s": (0.1, 0.2, 0.3)}, "grow"),
        ({"knots": (0, 5), "knot_s": (0.2, 0.1)}, "fall"),
    ],
)
def test_what_is_no_cost_curve_is_refused(curve: dict[str, object], complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert(curve, CostCurve)


def test_negative_attention_is_refused() -> None:
    with pytest.raises(ValueError, match="not negative"):
        msgspec.structs.replace(FITTED, pair_s=-1e-9)


def test_distserve_sums_squares_of_whole_prompts() -> None:
    # OPT-13B on one A100: 18.10 + 0.10191 * 3000 + 7.12e-6 * (1000^2 + 2000^2) ms.
    step_s = DISTSERVE_OPT["opt-13b-tp1"].step_s(both(prompt(1000), prompt(2000)))
    assert step_s == pytest.approx((18.10 + 305.73 + 35.6) / 1e3)


@given(st.lists(st.integers(1, 700), min_size=1, max_size=6))
def test_distserve_chunks_pay_the_square_once_and_the_base_each(sizes: list[int]) -> None:
    model = DISTSERVE_OPT["opt-66b-tp4"]
    in_chunks_s = sum(model.step_s(prompt(size, sum(sizes[:index]))) for index, size in enumerate(sizes))
    whole_s = model.step_s(prompt(sum(sizes)))
    assert in_chunks_s == pytest.approx(whole_s + (len(sizes) - 1) * model.prefill_base_s)


def test_distserve_decode() -> None:
    assert DISTSERVE_OPT["opt-66b-tp8"].step_s(decodes(40, 20_000)) == pytest.approx((23.16 + 4.54 + 1.92) / 1e3)


FIT = LatencyFit(0.008, 5e-5, 6e-8, 0.009, 1.5e-4, 4e-7, num_prefill_steps=40, num_decode_steps=70)


def test_a_workers_own_fit_as_a_model() -> None:
    model = from_fit(FIT)
    assert model is not None
    assert model.step_s(prompt(100, 1000)) == pytest.approx(0.008 + 100 * 5e-5 + (100_000 + 5050) * 6e-8)
    assert model.step_s(decodes(8, 4000)) == pytest.approx(0.009 + 8 * 1.5e-4 + 4000 * 4e-7)


def test_what_a_worker_has_not_seen_is_borrowed() -> None:
    only_prompts = from_fit(msgspec.structs.replace(FIT, num_decode_steps=0))
    only_answers = from_fit(msgspec.structs.replace(FIT, num_prefill_steps=0))
    assert only_prompts is not None
    assert only_answers is not None
    assert only_prompts.step_s(decodes(1, 101)) == pytest.approx(only_prompts.step_s(prompt(1, 100)))
    assert only_answers.step_s(prompt(1, 100)) == pytest.approx(only_answers.step_s(decodes(1, 101)))
    assert from_fit(msgspec.structs.replace(FIT, num_prefill_steps=0, num_decode_steps=0)) is None


@pytest.mark.parametrize("seconds", [-1e-9, math.inf, math.nan])
@pytest.mark.parametrize("name", FIT.__struct_fields__[:6])
def test_a_fit_that_is_no_cost_is_refused(name: str, seconds: float) -> None:
    with pytest.raises(ValueError, match="cost"):
        from_fit(msgspec.structs.replace(FIT, **{name: seconds}))
