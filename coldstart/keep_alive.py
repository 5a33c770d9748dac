"""For how long an idle model is held, and whether it is let go of and warmed again before it is asked for.

What is held is a copy in DRAM or a worker with its devices; the policies are the same. All time is idle time: seconds
from the end of a model's last request. A `Window` says when the model is held: from `warm_s` (0: it is not let go of
first) until `until_s`. Four ways:

- `fixed`: so many seconds, the same for all.
- `lru`: as long as nobody needs the room; then the one goes that was used longest ago.
- `histogram`: from the idle times seen (Shahrad et al., "Serverless in the Wild", ATC'20): let go of at once and warmed
  shortly before the head of the distribution (5th percentile, less a margin), until its tail (99th, and a margin).
  Where there are too few times, too many beyond the histogram, or no shape in it (the coefficient of variation of its
  bins below 2), the model is held for the histogram's whole range. The paper forecasts the ones beyond by ARIMA; here
  not.
- `cost_aware`: while a second of holding costs less than it is likely to save: bytes times a price, against the time of
  a reload times the chance that the next request comes in that second. A model with few times of its own borrows those
  of all models.

Under pressure (`make_room`) models go in the order of how little is lost with each. Pure; `IdleTimes` is what is
remembered: 2 KiB for each model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, assert_never

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

Way = Literal["fixed", "lru", "histogram", "cost_aware"]

#: Of the bins' counts: below it the paper finds that a histogram says nothing.
_LEAST_BIN_CV = 2.0
#: Of all idle times: with more beyond the histogram it is not asked.
_MOST_BEYOND = 0.5
_HEAD, _TAIL, _MARGIN = 0.05, 0.99, 0.1
#: Of a reload: what warming must be expected to save. A few late idle times always stand close together somewhere.
_LEAST_WARMING = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class KeepRules:
    way: Way = "cost_aware"
    #: Of `fixed`.
    fixed_s: float = 600.0
    #: Of `histogram` and `cost_aware`: no statement from fewer idle times of a model.
    min_times: int = 8
    #: Of `cost_aware`: seconds of waiting that are worth as much as one GiB held for one second. At 1e-4 a model of
    #: 16 GiB that takes 10 s to load is held where it is asked for every hour and a half or more often.
    wait_s_per_gib_s: float = 1e-4
    #: Of `cost_aware`: how many idle times of its own outweigh the borrowed ones.
    borrowed_times: float = 4.0

    def __post_init__(self) -> None:
        if min(self.fixed_s, self.wait_s_per_gib_s, self.borrowed_times) < 0 or self.min_times < 1:
            raise ValueError(f"rules must not be negative: {self}")


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldModel:
    """An idle model and what it would take to have it back."""

    model: str
    num_bytes: int
    #: To have it as ready again as it is now.
    reload_s: float
    #: End of the last request.
    idle_since_s: float
    #: Whether it is held at present; one that is not may be warmed.
    is_held: bool = True


@dataclass(frozen=True, slots=True)
class Window:
    warm_s: float
    #: At least `warm_s`; equal: it is not held at all. May be infinite.
    until_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class KeepDecision:
    model: str
    kind: Literal["keep", "release", "warm"]
    #: Ask again then; infinite: when it was used or room is needed.
    next_s: float
    reason: str


class IdleTimes:
    """Histograms of how long models were idle before they were asked again."""

    def __init__(self, bin_s: float = 60.0, num_bins: int = 240) -> None:
        """The paper's: four hours in minutes. Beyond, times are only counted."""
        if bin_s <= 0 or num_bins < 2:
            raise ValueError(f"bins must have a width, and there must be two, got {bin_s} s, {num_bins}")
        self.bin_s = bin_s
        self.num_bins = num_bins
        self._counts: dict[str, NDArray[np.int64]] = {}
        self._all: NDArray[np.int64] = np.zeros(num_bins + 1, np.int64)

    @property
    def range_s(self) -> float:
        return self.bin_s * self.num_bins

    def observe(self, model: str, idle_s: float) -> None:
        """A request came `idle_s` >= 0 after the end of the model's last one."""
        if idle_s < 0:
            raise ValueError(f"an idle time must not be negative, got {idle_s}")
        place = int(min(idle_s // self.bin_s, self.num_bins))
        self._counts.setdefault(model, np.zeros(self.num_bins + 1, np.int64))[place] += 1
        self._all[place] += 1

    def forget(self, models: Iterable[str]) -> None:
        """Models that no longer exist. What others borrow from them stays."""
        for model in models:
            self._counts.pop(model, None)

    def counts(self, model: str) -> NDArray[np.int64]:
        """By bin, and last those beyond. Read only."""
        found = self._counts.get(model)
        return np.zeros(self.num_bins + 1, np.int64) if found is None else found

    def shares(self, model: str, borrowed_times: float) -> NDArray[np.float64]:
        """By bin, and last beyond: how likely an idle time is, if all models' weigh as much as so many of its own.

        With nothing seen at all everything is beyond.
        """
        own = self.counts(model).astype(np.float64)
        total = int(self._all.sum())
        if total and borrowed_times:
            own += self._all * (borrowed_times / total)
        seen = own.sum()
        if not seen:
            own[-1] = seen = 1.0
        shares: NDArray[np.float64] = own / seen
        return shares


def window(model: HeldModel, rules: KeepRules, times: IdleTimes) -> Window:
    """When the model is held, in seconds since its last request ended."""
    match rules.way:
        case "fixed":
            return Window(0.0, rules.fixed_s, f"held for {rules.fixed_s:g} s")
        case "lru":
            return Window(0.0, math.inf, "held until room is needed")
        case "histogram":
            return _by_histogram(model, rules, times)
        case "cost_aware":
            return _by_cost(model, rules, times)
        case _:
            assert_never(rules.way)


def decide(model: HeldModel, rules: KeepRules, times: IdleTimes, now_s: float) -> KeepDecision:
    """What to do with an idle model now, and when to look again."""
    look = window(model, rules, times)
    # Compared as they are given out: who asks again exactly then must not find that it is a rounding too early.
    warm_at_s, until_at_s = model.idle_since_s + look.warm_s, model.idle_since_s + look.until_s
    if now_s >= until_at_s or look.until_s <= look.warm_s:
        return KeepDecision(model.model, "release", math.inf, look.reason)
    if now_s < warm_at_s:
        return KeepDecision(model.model, "release", warm_at_s, look.reason)
    kind: Literal["keep", "warm"] = "keep" if model.is_held else "warm"
    return KeepDecision(model.model, kind, until_at_s, look.reason)


def make_room(
    held: Sequence[HeldModel], num_bytes: int, rules: KeepRules, times: IdleTimes, now_s: float
) -> list[KeepDecision] | None:
    """Idle models to let go of so that so many bytes become free; None where all of them are not enough.

    `cost_aware`: the least loss for each byte first; the others: the one used longest ago first. None goes in vain:
    those are kept that turn out not to be needed once larger ones have gone.
    """
    if sum(one.num_bytes for one in held if one.is_held) < num_bytes:
        return None

    def loss(one: HeldModel) -> float:
        if rules.way != "cost_aware":
            return one.idle_since_s
        return loss_s(one, rules, times, now_s) / one.num_bytes

    ordered = sorted((one for one in held if one.is_held), key=lambda one: (loss(one), one.idle_since_s, one.model))
    chosen: list[HeldModel] = []
    freed = 0
    for one in ordered:
        if freed >= num_bytes:
            break
        chosen.append(one)
        freed += one.num_bytes
    for one in reversed(chosen.copy()):
        if freed - one.num_bytes >= num_bytes:
            chosen.remove(one)
            freed -= one.num_bytes
    return [
        KeepDecision(
            one.model,
            "release",
            math.inf,
            f"{num_bytes / 2**30:.2f} GiB are needed; idle for {now_s - one.idle_since_s:.0f} s, "
            f"{loss_s(one, rules, times, now_s):.2f} s are expected to be lost",
        )
        for one in chosen
    ]


def loss_s(model: HeldModel, rules: KeepRules, times: IdleTimes, now_s: float) -> float:
    """Expected seconds lost by letting go of it now: its reload, times the chance that it is asked for again while it
    would be held. Without any times seen it counts as certain. Nothing where it would not be held now anyway."""
    idle_s = max(0.0, now_s - model.idle_since_s)
    look = window(model, rules, times)
    until_s = look.until_s
    if until_s <= idle_s or idle_s < look.warm_s:
        return 0.0
    shares = times.shares(model.model, rules.borrowed_times)
    if shares[-1] == 1.0:
        return model.reload_s
    left = _later(shares, idle_s / times.bin_s)
    if left <= 0:
        return 0.0
    asked = left - (0.0 if math.isinf(until_s) else _later(shares, until_s / times.bin_s))
    return float(model.reload_s * asked / left)


def _by_histogram(model: HeldModel, rules: KeepRules, times: IdleTimes) -> Window:
    counts = times.counts(model.model)
    total = int(counts.sum())
    inside: NDArray[np.float64] = counts[:-1].astype(np.float64)
    if total < rules.min_times:
        return Window(0.0, times.range_s, f"{total} idle times say nothing: held for {times.range_s:g} s")
    if counts[-1] > _MOST_BEYOND * total:
        return Window(0.0, times.range_s, f"{counts[-1]} of {total} idle times are longer than {times.range_s:g} s")
    bin_cv = float(inside.std()) / float(inside.mean())
    if bin_cv < _LEAST_BIN_CV:
        return Window(0.0, times.range_s, f"{total} idle times have no shape (coefficient of variation {bin_cv:.1f})")
    shares: NDArray[np.float64] = np.cumsum(inside) / float(inside.sum())
    head, tail = np.count_nonzero(shares < _HEAD), np.count_nonzero(shares < _TAIL) + 1
    # The paper rounds the head down to its bin and the tail up, and then leaves a margin on both sides.
    warm_s = float(head * times.bin_s * (1.0 - _MARGIN))
    until_s = float(tail * times.bin_s * (1.0 + _MARGIN))
    # The model must be there by then; what would be away only for as long as it takes to come back does not go.
    warm_s = 0.0 if warm_s <= 2 * model.reload_s else warm_s - model.reload_s
    words = f"{total} idle times, most of {head * times.bin_s:g} to {tail * times.bin_s:g} s"
    return Window(warm_s, until_s, words)


def _by_cost(model: HeldModel, rules: KeepRules, times: IdleTimes) -> Window:
    """The span that saves most. What a bin saves does not depend on the others, so it is a largest sum in a row."""
    total = int(times.counts(model.model).sum())
    price = rules.wait_s_per_gib_s * model.num_bytes / 2**30
    shares = times.shares(model.model, rules.borrowed_times if total else 1.0)
    if shares[-1] == 1.0 and total < rules.min_times:
        # Nobody knows anything: for as long as holding costs what a reload does.
        until_s = model.reload_s / price if price else math.inf
        return Window(0.0, until_s, f"{total} idle times say nothing: held for what a reload costs, {until_s:.0f} s")
    asked = shares[:-1]
    after = 1.0 - np.cumsum(asked)
    # Within its bin an idle time ends in the middle.
    held_s = times.bin_s * (after + asked / 2)
    sums = np.concatenate(([0.0], np.cumsum(model.reload_s * asked - price * held_s)))
    end = int(sums.argmax())
    stays_s = float(sums[end])
    # Let go of and warmed: what is not asked for before is loaded once more, and held while it loads.
    still_away = np.concatenate(([1.0], after))
    costs = still_away * price * model.reload_s
    best_later = np.maximum.accumulate(sums[::-1])[::-1]
    later = best_later - sums - costs
    later[0] = -math.inf
    begin = int(later.argmax())
    words = f"{total} idle times, {asked.sum():.0%} of them within {times.range_s:g} s"
    warm_s = begin * times.bin_s - model.reload_s
    if later[begin] > max(stays_s, _LEAST_WARMING * model.reload_s) and warm_s > model.reload_s:
        until_s = times.bin_s * (begin + int(sums[begin:].argmax()))
        return Window(warm_s, until_s, f"{words}: away for {warm_s:.0f} s, then held until {until_s:.0f} s")
    if end == 0:
        return Window(0.0, 0.0, f"{words}: no time of holding is worth it")
    if price == 0 and end == len(asked):
        return Window(0.0, math.inf, f"{words}: holding costs nothing")
    return Window(0.0, times.bin_s * end, f"{words}: held for {times.bin_s * end:.0f} s, saves {stays_s:.2f} s")


def _later(shares: NDArray[np.float64], bins: float) -> float:
    """The share of idle times longer than so many bins; within a bin they are spread evenly."""
    whole = int(min(bins, len(shares) - 1))
    later = float(shares[whole:].sum())
    if whole < len(shares) - 1:
        later -= float(shares[whole]) * (bins - whole)
    return max(0.0, later)
