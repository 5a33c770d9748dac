"""What an engine's steps take, learned from the steps themselves while they run.

Two running fits, one of steps with chunks and one of steps that only decode, each of a constant and two slopes (see
`contracts.messages.LatencyFit`): least squares on relative error, with coefficients that are not negative. Older steps
count ever less, but those of other sizes than the latest fade slowly (the sums are kept by size class): an hour of
single answers does not unlearn what a large batch takes. Where nothing tells two coefficients apart they stay as they
were: each refit is drawn a little to the last one.

A step with chunks and decodes counts for the fit of chunks: each decode as a token more, without what its context
takes by the other fit. That is how `contracts.latency_models` puts the two together.
"""

from __future__ import annotations

from math import isfinite
from statistics import median
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from contracts.latency_models import from_fit
from contracts.messages import LatencyFit
from engine.chunk_budget import reading_s
from engine.profile_fit import non_negative_least_squares

if TYPE_CHECKING:
    from contracts.latency import StepWork
    from contracts.latency_models import FittedLatency

#: So many steps of its own size class later a step counts half, ...
CLASS_HALF_LIFE_STEPS = 24
#: ... and so many of its kind later.
HALF_LIFE_STEPS = 5000
#: The first steps of a kind count nothing: kernels are compiled and memory is touched.
WARM_UP_STEPS = 3
#: Steps of a kind before its first fit, and between two.
REFIT_STEPS = 16
#: When the median of these steps is off by more than this factor, the engine has become faster or slower as a whole:
#: what is known of other sizes is changed with it.
CHANGE = 1.25
#: A step that took longer, or shorter, than predicted by more than this factor counts as if it had by this: a process
#: that was paused says nothing of its engine.
SURPRISE = 2.0
#: What a step can take.
_SHORTEST_S, _LONGEST_S = 1e-9, 1e6
#: Weight of the last fit in the next, in squares of relative change, relative to that of all steps.
_INERTIA = 1e-3
#: What a coefficient counts for at least in these squares, as a share of a step.
_LEAST_SHARE = 0.05
#: Size classes that weigh less than this many steps are dropped.
_LEAST_WEIGHT = 0.01

#: Before sizes vary: how a step's time is divided among its constant and its two slopes. A large chunk is mostly
#: computing, a decode mostly reading the weights.
_FIRST_SHARES_CHUNKS = (0.45, 0.5, 0.05)
_FIRST_SHARES_DECODES = (0.9, 0.05, 0.05)

#: What another life learned counts as so many steps at most: it may have been on a quieter machine.
RECALLED_STEPS = 64

#: Kept of each size class.
_NUM_SUMS = 10

_CLASS_FADE = 0.5 ** (1.0 / CLASS_HALF_LIFE_STEPS)
_FADE = 0.5 ** (1.0 / HALF_LIFE_STEPS)


class LearnedClass(msgspec.Struct, frozen=True, array_like=True):
    """Weighted sums of the steps of one size class: see `_RunningFit`."""

    size_class: int
    attention_class: int
    sums: tuple[float, ...]


class LearnedFit(msgspec.Struct, frozen=True, array_like=True):
    coefficients: tuple[float, float, float]
    classes: tuple[LearnedClass, ...]


class LearnedSteps(msgspec.Struct, frozen=True, array_like=True):
    """What a `LiveLatency` knows, for one in another process."""

    chunks: LearnedFit | None
    decodes: LearnedFit | None


class LiveLatency:
    """Tell it each step that ended well; O(1) per step, and a small system of equations every `REFIT_STEPS`.

    Nothing here reads a clock. Not thread-safe.
    """

    def __init__(self) -> None:
        self._chunks = _RunningFit(_FIRST_SHARES_CHUNKS)
        self._decodes = _RunningFit(_FIRST_SHARES_DECODES)
        self._fit = _latency_fit(self._chunks, self._decodes)
        self._model: FittedLatency | None = None

    def observe(self, work: StepWork, seconds: float) -> None:
        """A step of this work took so long. Steps of nothing and times that cannot be are ignored: among them such as
        no sum of squares can be made of."""
        new_tokens, pairs, _, num_decodes, context_tokens = work
        if not _SHORTEST_S <= seconds <= _LONGEST_S:
            return
        if new_tokens:
            _, _, context_token_s = self._decodes.coefficients
            seconds -= context_token_s * context_tokens
            changed = (
                pairs > 0.0 and seconds >= _SHORTEST_S and self._chunks.add(new_tokens + num_decodes, pairs, seconds)
            )
        else:
            changed = num_decodes > 0 and context_tokens > 0 and self._decodes.add(num_decodes, context_tokens, seconds)
        if changed:
            self._fit = _latency_fit(self._chunks, self._decodes)
            self._model = from_fit(self._fit)

    def learned(self) -> LearnedSteps:
        """As of the last refit."""
        return LearnedSteps(self._chunks.learned(), self._decodes.learned())

    def recall(self, learned: LearnedSteps) -> bool:
        """Begins with what another life on the same machine learned; whether anything was taken. Nothing is where a
        step of the kind was fitted here already, nor of figures that no life can have learned."""
        # Both, whatever comes of the first.
        taken = [
            fit.recall(known)
            for fit, known in ((self._chunks, learned.chunks), (self._decodes, learned.decodes))
            if known is not None
        ]
        if not any(taken):
            return False
        self._fit = _latency_fit(self._chunks, self._decodes)
        self._model = from_fit(self._fit)
        return True

    def fit(self) -> LatencyFit:
        """The coefficients as of the last refit; the same object until the next. Without steps of a kind they are 0."""
        return self._fit

    def as_latency_model(self) -> FittedLatency | None:
        """Follows `contracts.latency.LatencyModel`; None before the first fit."""
        return self._model

    def reading_s(self, *, tokens: int, num_computed: int, max_tokens: int) -> float:
        """As `engine.chunk_budget.reading_s`; 0 before the first fit."""
        model = self._model
        if model is None:
            return 0.0
        return reading_s(model, tokens=tokens, num_computed=num_computed, max_tokens=max_tokens)


def _latency_fit(chunks: _RunningFit, decodes: _RunningFit) -> LatencyFit:
    return LatencyFit(
        *chunks.coefficients,
        *decodes.coefficients,
        num_prefill_steps=chunks.num_fitted,
        num_decode_steps=decodes.num_fitted,
    )


class _RunningFit:
    """`seconds = base + size_s * size + attention_s * attention`."""

    def __init__(self, first_shares: tuple[float, float, float]) -> None:
        self._first_shares = first_shares
        self._num_seen = 0
        #: Steps since the last refit.
        self._latest: list[tuple[int, float, float]] = []
        #: By size class: the number of the last step there, and weighted sums over steps of r r' (the upper triangle,
        #: by rows), of r, and of 1, where r is (1, size, attention) / seconds.
        self._classes: dict[tuple[int, int], tuple[int, list[float]]] = {}
        #: (base, size_s, attention_s); zeros before the first fit.
        self.coefficients = (0.0, 0.0, 0.0)
        #: How many steps of full weight the coefficients rest on.
        self.num_fitted = 0

    def add(self, size: int, attention: float, seconds: float) -> bool:
        """Whether the coefficients were fitted anew. All > 0."""
        self._num_seen += 1
        if self._num_seen <= WARM_UP_STEPS:
            return False
        self._latest.append((size, attention, seconds))
        if len(self._latest) < REFIT_STEPS:
            return False
        if self.num_fitted:
            self._follow_change()
        for step in self._latest:
            self._take(*step)
        self._latest.clear()
        self._refit()
        return True

    def learned(self) -> LearnedFit | None:
        """None before the first fit."""
        if not self.num_fitted:
            return None
        classes: list[LearnedClass] = []
        for (size, attention), (last, sums) in self._classes.items():
            fade = _FADE ** (self._num_seen - last)
            if fade * sums[-1] >= _LEAST_WEIGHT:
                classes.append(LearnedClass(size, attention, tuple(fade * each for each in sums)))
        return LearnedFit(self.coefficients, tuple(classes))

    def recall(self, learned: LearnedFit) -> bool:
        """Whether it was taken."""
        if self.num_fitted or not _can_be(learned):
            return False
        weight = sum(each.sums[-1] for each in learned.classes)
        share = min(1.0, RECALLED_STEPS / weight)
        self._classes = {
            (each.size_class, each.attention_class): (self._num_seen, [share * total for total in each.sums])
            for each in learned.classes
        }
        self.coefficients = learned.coefficients
        self.num_fitted = max(1, round(share * weight))
        return True

    def _expected_s(self, size: int, attention: float) -> float:
        base_s, size_s, attention_s = self.coefficients
        return base_s + size_s * size + attention_s * attention

    def _follow_change(self) -> None:
        factor = median(seconds / self._expected_s(size, attention) for size, attention, seconds in self._latest)
        if 1 / CHANGE <= factor <= CHANGE:
            return
        base_s, size_s, attention_s = self.coefficients
        self.coefficients = (factor * base_s, factor * size_s, factor * attention_s)
        # The sums as if all steps had taken so much longer.
        factors = [factor**-2.0] * 6 + [1 / factor] * 3 + [1.0]
        for key, (last, sums) in self._classes.items():
            self._classes[key] = (last, [part * total for part, total in zip(factors, sums, strict=True)])

    def _take(self, size: int, attention: float, seconds: float) -> None:
        if self.num_fitted:
            expected_s = self._expected_s(size, attention)
            seconds = min(max(seconds, expected_s / SURPRISE), expected_s * SURPRISE)
        key = (size.bit_length(), int(attention).bit_length() // 2)
        last, sums = self._classes.get(key, (self._num_seen, [0.0] * _NUM_SUMS))
        fade = _CLASS_FADE * _FADE ** (self._num_seen - last)
        one = 1.0 / seconds
        row, pairs = size * one, attention * one
        terms = (one * one, one * row, one * pairs, row * row, row * pairs, pairs * pairs, one, row, pairs, 1.0)
        self._classes[key] = (self._num_seen, [fade * total + term for total, term in zip(sums, terms, strict=True)])

    def _sums(self) -> list[float]:
        """Over all classes, as they count now."""
        totals = [0.0] * _NUM_SUMS
        for key, (last, sums) in list(self._classes.items()):
            fade = _FADE ** (self._num_seen - last)
            if fade * sums[-1] < _LEAST_WEIGHT:
                del self._classes[key]
            else:
                totals = [total + fade * part for total, part in zip(totals, sums, strict=True)]
        return totals

    def _refit(self) -> None:
        """Minimises `sum of (r x - 1)^2 + inertia * sum of ((x - before) / scale)^2` over x >= 0."""
        a, b, c, d, e, f, *rows, weight = self._sums()
        squares = np.array([[a, b, c], [b, d, e], [c, e, f]])
        # What one second of each coefficient stands for in a step, as a share of it.
        means = np.sqrt(squares.diagonal() / weight)
        before = np.array(self.coefficients)
        if not self.num_fitted:
            before = np.array(self._first_shares) / means
        scales = np.maximum(before, _LEAST_SHARE / means)
        inertia = _INERTIA * weight
        # In units of the scales, and as a system of equations whose normal equations these are.
        normal = squares * np.outer(scales, scales) + inertia * np.eye(3)
        target = np.array(rows) * scales + inertia * before / scales
        root = np.linalg.cholesky(normal)
        solution = scales * non_negative_least_squares(root.T, np.linalg.solve(root, target))
        base_s, size_s, attention_s = (float(value) for value in solution)
        self.coefficients = (base_s, size_s, attention_s)
        self.num_fitted = max(1, round(weight))


def _can_be(learned: LearnedFit) -> bool:
    """Whether steps can have led to this, so that no refit fails on it."""
    return (
        all(isfinite(each) and 0.0 <= each <= _LONGEST_S for each in learned.coefficients)
        and max(learned.coefficients) > 0.0
        and len(learned.classes) > 0
        and all(_are_sums(known.sums) for known in learned.classes)
    )


def _are_sums(sums: tuple[float, ...]) -> bool:
    """Of products of positive numbers with each other: what they are sums of can be found."""
    if len(sums) != _NUM_SUMS or not all(isfinite(each) and 1e-40 <= each <= 1e40 for each in sums):
        return False
    a, b, c, d, e, f, *_ = sums
    squares = np.array([[a, b, c], [b, d, e], [c, e, f]])
    scales = np.sqrt(squares.diagonal())
    return bool(np.linalg.eigvalsh(squares / np.outer(scales, scales))[0] >= -1e-6)
