"""What is learned from an engine's own steps: the truth, in the face of noise, pauses, change and sameness."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.latency import StepWork
from contracts.latency_models import CostCurve, FittedLatency, from_fit
from contracts.messages import LatencyFit
from engine.live_latency import (
    RECALLED_STEPS,
    REFIT_STEPS,
    WARM_UP_STEPS,
    LearnedClass,
    LearnedFit,
    LearnedSteps,
    LiveLatency,
)

TRUTH = FittedLatency(
    prefill=CostCurve.line(8e-3, 0.05e-3), pair_s=60e-9, decode=CostCurve.line(9e-3, 0.15e-3), context_token_s=0.4e-6
)
#: Of as many sizes as drawn here, after which what was before a change hardly counts.
SETTLED_STEPS = 2000


@dataclass(frozen=True, slots=True)
class Steps:
    """Random steps of an engine, with noise."""

    seed: int
    noise: float = 0.05

    def chunks(self, count: int) -> list[StepWork]:
        rng = random.Random(self.seed)
        return [_chunk(rng.randint(2, 512), rng.randint(0, 8000)) for _ in range(count)]

    def decodes(self, count: int) -> list[StepWork]:
        rng = random.Random(self.seed)
        return [_decode(batch := rng.randint(1, 64), batch * rng.randint(50, 4000)) for _ in range(count)]

    def feed(self, live: LiveLatency, works: list[StepWork], truth: FittedLatency = TRUTH, factor: float = 1.0) -> None:
        rng = random.Random(self.seed + 1)
        for work in works:
            live.observe(work, factor * truth.step_s(work) * math.exp(rng.gauss(0, self.noise)))


def _chunk(tokens: int, prefix: int = 0) -> StepWork:
    return StepWork(tokens, tokens * prefix + tokens * (tokens + 1) / 2, 1)


def _decode(batch: int, context: int) -> StepWork:
    return StepWork(num_decodes=batch, context_tokens=context)


def _model(live: LiveLatency) -> FittedLatency:
    model = live.as_latency_model()
    assert model is not None
    return model


@pytest.mark.parametrize("seed", range(5))
def test_known_coefficients_are_found_in_noise(seed: int) -> None:
    live, steps = LiveLatency(), Steps(seed)
    steps.feed(live, steps.chunks(1500))
    steps.feed(live, steps.decodes(1500))
    fit = live.fit()
    assert (fit.prefill_base_s, fit.prefill_token_s, fit.pair_s) == pytest.approx((8e-3, 0.05e-3, 60e-9), rel=0.05)
    assert (fit.decode_base_s, fit.sequence_s, fit.context_token_s) == pytest.approx((9e-3, 0.15e-3, 0.4e-6), rel=0.05)
    assert min(fit.num_prefill_steps, fit.num_decode_steps) > 200


@pytest.mark.parametrize("seed", range(5))
def test_steps_of_both_kinds_teach_what_chunks_take(seed: int) -> None:
    """A mixed worker that never reads prompts alone; decodes cost there what prompt tokens do."""
    line = CostCurve.line(9e-3, 0.05e-3)
    truth = FittedLatency(prefill=line, pair_s=60e-9, decode=line, context_token_s=0.4e-6)
    live, steps = LiveLatency(), Steps(seed)
    steps.feed(live, steps.decodes(1000), truth)
    both = [
        StepWork(*chunk[:3], decodes.num_decodes, decodes.context_tokens)
        for chunk, decodes in zip(steps.chunks(1500), Steps(seed + 7).decodes(1500), strict=True)
    ]
    steps.feed(live, both, truth)
    model = _model(live)
    for work in both[-10:]:
        assert model.step_s(work) == pytest.approx(truth.step_s(work), rel=0.05)
    for work in (_chunk(64), _chunk(512), _chunk(512, 8000)):
        assert model.step_s(work) == pytest.approx(truth.step_s(work), rel=0.1)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 600), st.integers(0, 9000), st.integers(0, 70), st.integers(0, 90_000), st.floats(1e-5, 30)
        ),
        max_size=150,
    ),
    st.integers(1, 3),
)
def test_coefficients_are_never_negative(steps: list[tuple[int, int, int, int, float]], repeats: int) -> None:
    """Whatever a machine does: any works, any times."""
    live = LiveLatency()
    for tokens, prefix, batch, context, seconds in steps * repeats:
        chunk = _chunk(tokens, prefix) if tokens else StepWork()
        live.observe(StepWork(*chunk[:3], batch, context if batch else 0), seconds)
    fit = live.fit()
    coefficients = (
        fit.prefill_base_s,
        fit.prefill_token_s,
        fit.pair_s,
        fit.decode_base_s,
        fit.sequence_s,
        fit.context_token_s,
    )
    assert all(0 <= each < math.inf for each in coefficients)
    assert live.as_latency_model() == from_fit(fit)


@pytest.mark.parametrize("factor", [0.4, 1.5, 4.0])
def test_a_change_is_followed(factor: float) -> None:
    live, steps = LiveLatency(), Steps(3)
    steps.feed(live, steps.decodes(SETTLED_STEPS))
    steps.feed(live, steps.chunks(SETTLED_STEPS))
    steps.feed(live, steps.decodes(SETTLED_STEPS), factor=factor)
    steps.feed(live, steps.chunks(SETTLED_STEPS), factor=factor)
    model = _model(live)
    for work in (_chunk(64), _chunk(512, 4000), _decode(1, 500), _decode(60, 60_000)):
        assert model.step_s(work) == pytest.approx(factor * TRUTH.step_s(work), rel=0.05)


def test_pauses_and_first_steps_hardly_count() -> None:
    """One step in fifty takes ten seconds; the very first ones took a minute."""
    live, steps = LiveLatency(), Steps(5, noise=0.0)
    for _ in range(WARM_UP_STEPS):
        live.observe(_decode(1, 10), 60.0)
    for number, work in enumerate(steps.decodes(1000)):
        live.observe(work, 10.0 if number % 50 == 30 else TRUTH.step_s(work))
    model = _model(live)
    for work in (_decode(1, 500), _decode(60, 60_000)):
        assert model.step_s(work) == pytest.approx(TRUTH.step_s(work), rel=0.05)


def test_what_is_not_seen_for_long_stays_known() -> None:
    """An hour of single answers does not unlearn what large batches take."""
    live, steps = LiveLatency(), Steps(11)
    steps.feed(live, steps.decodes(1500))
    rng = random.Random(1)
    steps.feed(live, [_decode(1, rng.randint(100, 200)) for _ in range(20_000)])
    model = _model(live)
    assert model.step_s(_decode(1, 150)) == pytest.approx(TRUTH.step_s(_decode(1, 150)), rel=0.03)
    assert model.step_s(_decode(48, 48_000)) == pytest.approx(TRUTH.step_s(_decode(48, 48_000)), rel=0.25)


def test_steps_of_one_size_are_divided_plausibly() -> None:
    """Nothing tells constant and slopes apart; both directions are still bounded by common sense."""
    live = LiveLatency()
    for _ in range(100):
        live.observe(_chunk(512), 0.1)
        live.observe(_decode(4, 400), 0.02)
    model = _model(live)
    assert model.step_s(_chunk(512)) == pytest.approx(0.1, rel=0.01)
    assert 0.02 < model.step_s(_chunk(32)) < 0.08
    assert model.step_s(_decode(4, 400)) == pytest.approx(0.02, rel=0.01)
    assert 0.02 < model.step_s(_decode(40, 4000)) < 0.06


def test_nothing_is_known_before_enough_steps() -> None:
    live = LiveLatency()
    for _ in range(WARM_UP_STEPS + REFIT_STEPS - 1):
        live.observe(_decode(2, 100), 0.01)
    assert live.as_latency_model() is None
    assert live.reading_s(tokens=100, num_computed=0, max_tokens=50) == 0.0
    assert live.fit() == LatencyFit(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0)
    before = live.fit()
    live.observe(_decode(2, 100), 0.01)
    assert live.fit() is not before
    assert live.fit().num_decode_steps > 0
    assert live.reading_s(tokens=100, num_computed=0, max_tokens=50) > 0.0, "chunks borrow from decodes"


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.inf, math.nan, 5e-324, 1e300])
def test_times_that_cannot_be_are_ignored(seconds: float) -> None:
    live = LiveLatency()
    for _ in range(100):
        live.observe(_decode(1, 1), seconds)
        live.observe(_chunk(5), seconds)
        live.observe(StepWork(), 1.0)
    assert live.as_latency_model() is None


def test_another_life_recalls_what_was_learned_and_unlearns_it_where_it_is_wrong() -> None:
    steps, first, second = Steps(3), LiveLatency(), LiveLatency()
    steps.feed(first, steps.chunks(SETTLED_STEPS))
    steps.feed(first, steps.decodes(SETTLED_STEPS))
    assert second.recall(msgspec.msgpack.decode(msgspec.msgpack.encode(first.learned()), type=LearnedSteps))
    assert second.fit().num_prefill_steps <= RECALLED_STEPS
    for work in (_chunk(300, 1000), _decode(20, 20_000)):
        assert _model(second).step_s(work) == pytest.approx(_model(first).step_s(work), rel=1e-6)
    # This machine is half as fast.
    steps.feed(second, steps.chunks(4 * REFIT_STEPS), factor=2.0)
    steps.feed(second, steps.decodes(4 * REFIT_STEPS), factor=2.0)
    for work in (_chunk(300, 1000), _decode(20, 20_000)):
        assert _model(second).step_s(work) == pytest.approx(2 * TRUTH.step_s(work), rel=0.2)
    assert not second.recall(first.learned())


def test_one_kind_of_steps_is_recalled_without_the_other() -> None:
    steps, first, second = Steps(4), LiveLatency(), LiveLatency()
    assert not second.recall(first.learned())
    steps.feed(first, steps.decodes(SETTLED_STEPS))
    assert second.recall(first.learned())
    assert second.fit().num_prefill_steps == 0 < second.fit().num_decode_steps


@given(
    coefficients=st.tuples(*[st.floats() | st.floats(0, 1)] * 3),
    sums=st.lists(st.floats(0.0, 1e60), min_size=10, max_size=10) | st.lists(st.floats(), min_size=9, max_size=11),
    works=st.integers(0, 40),
)
def test_figures_that_no_life_can_have_learned_break_nothing(
    coefficients: tuple[float, float, float], sums: list[float], works: int
) -> None:
    live = LiveLatency()
    live.recall(LearnedSteps(LearnedFit(coefficients, (LearnedClass(4, 4, tuple(sums)),)), None))
    for _ in range(works):
        live.observe(_chunk(10), 0.01)
    assert all(math.isfinite(each) and each >= 0.0 for each in msgspec.to_builtins(live.fit()))
