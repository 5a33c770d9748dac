"""The fit finds what made its points, through noise, and believes no more than they show."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.latency import StepWork
from contracts.latency_models import CostCurve, FittedLatency
from engine.profile import PointSpec, ProfileRange, fit_points, profile_points
from engine.profile_fit import MeasuredStep, fit_latency, non_negative_least_squares

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.latency import LatencyModel

SPECS = profile_points(ProfileRange(max_chunk_tokens=512, max_context_tokens=2048, max_sequences=32))

#: Of a device that is bound by memory in small steps: a floor, then a slope, no knee.
FLOOR = CostCurve(floor_s=0.030, knots=(0, 512), knot_s=(0.002, 0.258))
#: As on cores whose caches overflow: the slope changes twice.
KNEES = CostCurve(knots=(0, 32, 256, 512), knot_s=(0.004, 0.010, 0.122, 0.314))
DECODE_LINE = CostCurve.line(0.020, 0.0004)
DECODE_FLOOR = CostCurve(floor_s=0.009, knots=(0, 32), knot_s=(0.002, 0.080))


def truth(prefill: CostCurve = FLOOR, decode: CostCurve = DECODE_LINE) -> FittedLatency:
    return FittedLatency(prefill=prefill, pair_s=2e-7, decode=decode, context_token_s=1.5e-6)


def measured(
    model: LatencyModel, specs: Sequence[PointSpec], factor: Callable[[], float] = lambda: 1.0
) -> list[MeasuredStep]:
    return [MeasuredStep(spec.work, model.step_s(spec.work) * factor()) for spec in specs]


@pytest.mark.parametrize("prefill", [FLOOR, KNEES, CostCurve.line(0.005, 0.0005)])
@pytest.mark.parametrize("decode", [DECODE_LINE, DECODE_FLOOR])
def test_exact_points_give_back_what_made_them(prefill: CostCurve, decode: CostCurve) -> None:
    model = truth(prefill, decode)
    report = fit_points(SPECS, measured(model, SPECS))
    assert report.latency.pair_s == pytest.approx(model.pair_s, rel=0.02)
    assert report.latency.context_token_s == pytest.approx(model.context_token_s, rel=0.02)
    # A floor may end anywhere between two sizes; the knees of these lie on measured ones.
    assert max(report.errors.prefill, report.errors.decode, report.errors.mixed) < 0.01


@pytest.mark.parametrize("seed", range(5))
def test_noise_of_three_percent_is_averaged_out(seed: int) -> None:
    rng = random.Random(seed)
    model = truth(FLOOR, DECODE_FLOOR)
    latency = fit_points(SPECS, measured(model, SPECS, lambda: rng.gauss(1.0, 0.03))).latency
    for spec in SPECS:
        assert latency.step_s(spec.work) == pytest.approx(model.step_s(spec.work), rel=0.08)


@pytest.mark.parametrize("seed", range(5))
def test_noise_makes_no_knees(seed: int) -> None:
    rng = random.Random(seed)
    model = truth(CostCurve.line(0.005, 0.0005), DECODE_LINE)
    latency = fit_points(SPECS, measured(model, SPECS, lambda: rng.gauss(1.0, 0.02))).latency
    assert len(latency.prefill.knots) <= 3
    assert latency.prefill.at(2048) == pytest.approx(model.prefill.at(2048), rel=0.15)


def test_a_cost_of_another_form_shows_in_the_held_out_errors() -> None:
    """Every fifth batch takes twice as long, as where a kernel lacks a size: no such fit may pass unnoticed."""
    steps = [
        MeasuredStep(step.work, step.duration_s * (2 if spec.num_decodes in (5, 10, 20) else 1))
        for spec, step in zip(SPECS, measured(truth(), SPECS), strict=True)
    ]
    assert fit_points(SPECS, steps).errors.decode > 0.05


def test_held_out_points_take_no_part() -> None:
    steps = measured(truth(), SPECS)
    spoiled = [
        MeasuredStep(step.work, step.duration_s * (10 if spec.held_out else 1))
        for spec, step in zip(SPECS, steps, strict=True)
    ]
    assert fit_points(SPECS, spoiled).latency == fit_points(SPECS, steps).latency


def test_held_out_points_lie_within_what_is_fitted() -> None:
    for kind in ("chunk_tokens", "num_decodes"):
        of_kind = [spec for spec in SPECS if getattr(spec, kind) and not (spec.chunk_tokens and spec.num_decodes)]
        fitted = [getattr(spec, kind) for spec in of_kind if not spec.held_out]
        held_out = [getattr(spec, kind) for spec in of_kind if spec.held_out]
        assert len(held_out) >= 3
        assert min(fitted) < min(held_out) <= max(held_out) < max(fitted)


@settings(max_examples=20)
@given(st.integers(64, 4096), st.integers(0, 10_000), st.integers(8, 300), st.sampled_from([truth(), truth(KNEES)]))
def test_any_range_gives_points_that_determine_a_fit(
    chunk_tokens: int, more_context: int, max_sequences: int, model: FittedLatency
) -> None:
    extent = ProfileRange(
        max_chunk_tokens=chunk_tokens,
        max_context_tokens=2 * chunk_tokens + more_context,
        max_sequences=max_sequences,
    )
    specs = profile_points(extent)
    assert all(max(spec.sequence_tokens) <= extent.max_context_tokens for spec in specs)
    assert all(spec.num_decodes <= max_sequences and spec.chunk_tokens <= chunk_tokens for spec in specs)
    assert all(tokens > 0 for spec in specs for tokens in spec.sequence_tokens)
    errors = fit_points(specs, measured(model, specs)).errors
    assert errors.decode < 0.05


@pytest.mark.parametrize("kind", ["prefill", "decode"])
def test_too_few_points_are_refused_by_their_phase(kind: str) -> None:
    steps = measured(truth(), [spec for spec in SPECS if not spec.held_out])
    few = [step for step in steps if (step.work.num_decodes == 0) != (kind == "prefill")] + [
        step for step in steps if (step.work.num_decodes == 0) == (kind == "prefill")
    ][:4]
    with pytest.raises(ValueError, match=f"5 steps of 3 sizes of {kind}, not 4"):
        fit_latency(few)


def test_a_step_without_a_duration_is_refused() -> None:
    with pytest.raises(ValueError, match="must be positive"):
        fit_latency([MeasuredStep(StepWork(16, 136.0, 1), 0.0)])


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(5, 12))
def test_least_squares_meet_the_conditions_of_a_minimum(seed: int, num_columns: int, num_rows: int) -> None:
    """Karush-Kuhn-Tucker: no slope at positive coefficients, none downhill at those that are zero."""
    rng = np.random.default_rng(seed)
    matrix, target = rng.uniform(-1, 1, (num_rows, num_columns)), rng.uniform(-1, 1, num_rows)
    solution = non_negative_least_squares(matrix, target)
    uphill = matrix.T @ (matrix @ solution - target)
    assert (solution >= 0).all()
    assert (uphill > -1e-7).all()
    assert np.abs(uphill[solution > 0]).max(initial=0.0) < 1e-7
