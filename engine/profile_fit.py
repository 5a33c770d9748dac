"""From measured steps to a `FittedLatency`. Pure.

Least squares on relative error, because a step of 5 ms matters as much as one of 500 ms; coefficients are not
negative, because no work makes a step shorter. Each phase is a floor and up to three slopes (by new tokens, by
sequences) plus its attention (pairs, context): how many of the smallest counts lie on the floor and where the
slopes change is chosen by Akaike's criterion for few points (AICc), so that a knee is believed only where the
points demand one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate, combinations, pairwise
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from contracts.latency_models import CostCurve, FittedLatency

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from contracts.latency import LatencyModel, StepWork

Floats = NDArray[np.floating[Any]]

#: Slopes change at most this often.
_MAX_KNEES = 2
#: Relative error below which measurements cannot tell two fits apart.
_RESOLUTION = 0.003
#: Steps and distinct counts of a phase without which a line and its attention are not determined.
_MIN_STEPS = 5
_MIN_COUNTS = 3


@dataclass(frozen=True, slots=True)
class MeasuredStep:
    work: StepWork
    duration_s: float


def relative_error(model: LatencyModel, step: MeasuredStep) -> float:
    """Signed: positive where the model takes longer."""
    return model.step_s(step.work) / step.duration_s - 1.0


def fit_latency(steps: Sequence[MeasuredStep]) -> FittedLatency:
    """Steps that hold both chunks and decodes take no part.

    Raises ValueError for too few steps or sizes of a phase, and for durations that are not positive.
    """
    if any(step.duration_s <= 0 for step in steps):
        raise ValueError("a step's duration must be positive")
    prefills = [
        _Sample(step.work.prefill_tokens, step.work.prefill_pairs, step.duration_s)
        for step in steps
        if step.work.num_decodes == 0
    ]
    decodes = [
        _Sample(step.work.num_decodes, step.work.context_tokens, step.duration_s)
        for step in steps
        if step.work.prefill_tokens == 0
    ]
    prefill = _best_fit("prefill", prefills)
    decode = _best_fit("decode", decodes)
    return FittedLatency(
        prefill=prefill.curve,
        pair_s=prefill.attention_s,
        decode=decode.curve,
        context_token_s=decode.attention_s,
    )


class _Sample(NamedTuple):
    """A step of one phase."""

    #: What the linear layers work on: new tokens, or sequences.
    size: int
    #: What attention works on: pairs, or tokens of context.
    attention: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class _Fit:
    curve: CostCurve
    attention_s: float
    num_coefficients: int

    def relative_error(self, sample: _Sample) -> float:
        return (self.curve.at(sample.size) + self.attention_s * sample.attention) / sample.duration_s - 1.0


def _best_fit(phase: str, samples: Sequence[_Sample]) -> _Fit:
    num_counts = len({sample.size for sample in samples})
    if len(samples) < _MIN_STEPS or num_counts < _MIN_COUNTS:
        raise ValueError(
            f"a fit needs {_MIN_STEPS} steps of {_MIN_COUNTS} sizes of {phase}, not {len(samples)} of {num_counts}"
        )
    return min(_fits(samples), key=lambda fit: _aicc(fit, samples))


def _fits(samples: Sequence[_Sample]) -> Iterator[_Fit]:
    """One for each choice of the counts on the floor and of the knees; at least two counts stay on the slopes."""
    counts = sorted({sample.size for sample in samples})
    for num_on_floor in range(len(counts) - 1):
        for num_knees in range(_MAX_KNEES + 1):
            for knees in combinations(counts[num_on_floor + 1 : -1], num_knees):
                yield _fit(samples, counts[:num_on_floor], (0, *knees, counts[-1]))


def _fit(samples: Sequence[_Sample], floor_counts: Sequence[int], knots: tuple[int, ...]) -> _Fit:
    """The coefficients with which samples of `floor_counts` lie on the floor and the others on the slopes."""
    segments = [(start, end - start) for start, end in pairwise(knots)]

    def row(sample: _Sample) -> list[float]:
        if sample.size in floor_counts:
            return [1.0, 0.0, *(0.0 for _ in segments), sample.attention]
        return [
            0.0,
            1.0,
            *(float(min(max(sample.size - start, 0), size)) for start, size in segments),
            sample.attention,
        ]

    floor_s, base_s, *slopes_s, attention_s = _relative_least_squares(
        [row(sample) for sample in samples], [sample.duration_s for sample in samples]
    )
    rises_s = (slope_s * size for slope_s, (_, size) in zip(slopes_s, segments, strict=True))
    curve = CostCurve(floor_s=floor_s, knots=knots, knot_s=tuple(accumulate(rises_s, initial=base_s)))
    return _Fit(curve, attention_s, num_coefficients=bool(floor_counts) + len(slopes_s) + 2)


def _aicc(fit: _Fit, samples: Sequence[_Sample]) -> float:
    """Of the relative errors of the fit as a whole; infinite where samples do not outnumber coefficients."""
    count, num_coefficients = len(samples), fit.num_coefficients
    if count <= num_coefficients + 1:
        return math.inf
    mean_square = fmean(fit.relative_error(sample) ** 2 for sample in samples)
    penalty = 2.0 * num_coefficients * count / (count - num_coefficients - 1)
    return count * math.log(mean_square + _RESOLUTION**2) + penalty


def _relative_least_squares(rows: Sequence[Sequence[float]], targets: Sequence[float]) -> list[float]:
    """Coefficients >= 0 that minimise the squares of `rows @ coefficients / target - 1`."""
    matrix = np.array(rows, dtype=float) / np.array(targets)[:, None]
    # Pairs are millions where the constant is one.
    scales = np.linalg.norm(matrix, axis=0)
    scales[scales == 0.0] = 1.0
    scaled = non_negative_least_squares(matrix / scales, np.ones(len(targets)))
    return [float(value) for value in scaled / scales]


def non_negative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 that minimises `|matrix @ x - target|`: the active-set method of Lawson and Hanson (1974, ch. 23).

    Columns should be of like size. Raises ValueError when it does not settle, which takes a degenerate matrix.
    """
    num_columns = matrix.shape[1]
    free = np.zeros(num_columns, dtype=bool)
    solution = np.zeros(num_columns)
    for _ in range(10 * num_columns):
        gradient = matrix.T @ (target - matrix @ solution)
        gradient[free] = -math.inf
        entering = int(np.argmax(gradient))
        if gradient[entering] <= 1e-10:
            return solution
        free[entering] = True
        while True:
            trial = np.zeros(num_columns)
            trial[free] = np.linalg.lstsq(matrix[:, free], target, rcond=None)[0]
            leaving = free & (trial <= 0.0)
            if not leaving.any():
                break
            # As far towards the trial as no coefficient turns negative; those that reach zero stay there.
            step = np.min(solution[leaving] / (solution[leaving] - trial[leaving]))
            solution = solution + step * (trial - solution)
            free &= solution > 1e-14
        solution = trial
    raise ValueError(f"least squares of {matrix.shape[0]} steps and {num_columns} coefficients did not settle")
