"""Which idle copies a node agent compresses: what it keeps in mind between looks at them, and the compressed forms.

The decision is `coldstart.compressing.judge`'s, whether there is room the machine's (`coldstart.residence`). A codec is
tried on a copy's own chunks by the process that would compress it; what that told is remembered for a while.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from coldstart.compressing import CodecRates, ColdView, TierRates, Verdict, judge
from coldstart.residence import CopyState

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from coldstart.compressing import CompressRules
    from coldstart.residence import Copy, WeightsKey

#: The tier of compressed copies, in logs and among rates.
COMPRESSED_TIER = "compressed"
#: How long a trial of a codec, and how fast compressed copies came, stand for now: the machine may have been busy.
VALID_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RawMemory:
    """A whole copy, for one that compresses it."""

    #: Read-only.
    descriptor: int
    weight_bytes: int
    index_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    rates: CodecRates
    #: Memory that the result has at most.
    bound_bytes: int


class Compressing(Protocol):
    """One copy being compressed, into a descriptor of empty memory."""

    async def tried(self) -> Trial:
        """What its codec does with some of its chunks. Raises LoadError."""
        ...

    async def compressed(self) -> int:
        """Lets it take the memory, which has the bound's size now; returns the bytes that the result takes, when it is
        complete and nobody holds a mapping of it any more. Raises LoadError."""
        ...

    async def abort(self) -> None:
        """Ends it; returns when it holds nothing any more. Idempotent, also after its end."""
        ...


@dataclass(slots=True)
class _Form:
    """A copy, compressed."""

    descriptor: int
    #: From which it came before.
    next_tier: str


class ColdCopies:
    """Beside one `Residence`: nothing here takes time."""

    def __init__(
        self,
        rules: CompressRules,
        start: Callable[[WeightsKey, RawMemory, int], Compressing],
        log: Callable[[str], None],
    ) -> None:
        """`start(key, memory, descriptor)` begins to compress a copy into a memfd; descriptors stay the caller's."""
        self.start = start
        self._rules = rules
        self._log = log
        self._rates = TierRates()
        self._forms: dict[WeightsKey, _Form] = {}
        #: When each copy was tried, and what that told.
        self._trials: dict[WeightsKey, tuple[float, Trial]] = {}
        #: Copies not to be looked at again, or of which nothing is to be said again, until their next use: when the
        #: last one was.
        self._given_up: dict[WeightsKey, float] = {}
        self._said: dict[WeightsKey, tuple[float, bool]] = {}

    def close(self) -> None:
        for form in self._forms.values():
            os.close(form.descriptor)
        self._forms.clear()

    def observe_load(self, tier: str, num_bytes: int, seconds: float, now_s: float) -> None:
        self._rates.observe(tier, num_bytes, seconds, now_s)

    # --- compressed forms -------------------------------------------------------------------------------

    def keep(self, key: WeightsKey, descriptor: int, next_tier: str) -> None:
        """Takes over the descriptor of a form that is complete."""
        self._forms[key] = _Form(descriptor, next_tier)

    def descriptor(self, key: WeightsKey) -> int:
        """Of the form that is here."""
        return self._forms[key].descriptor

    def next_tier(self, key: WeightsKey) -> str | None:
        """Where the copy came from before it was compressed; None of one that is not here compressed."""
        form = self._forms.get(key)
        return None if form is None else form.next_tier

    def drop(self, key: WeightsKey) -> bool:
        """Gives back the form's memory; False where there is none."""
        form = self._forms.pop(key, None)
        if form is not None:
            os.close(form.descriptor)
        return form is not None

    def forget(self, key: WeightsKey) -> None:
        """The model has left memory in every form."""
        self.drop(key)
        for known in (self._trials, self._given_up, self._said):
            known.pop(key, None)

    # --- which ------------------------------------------------------------------------------------------

    def coldest(
        self, copies: Sequence[Copy], budget_bytes: int, next_tiers: Callable[[WeightsKey], str], now_s: float
    ) -> WeightsKey | None:
        """What is to be compressed, or tried, now, if anything."""
        calm = (CopyState.RESIDENT, CopyState.COMPRESSED)
        if any(copy.state not in calm for copy in copies):
            return None
        for copy in sorted(copies, key=lambda copy: (copy.used_s, copy.key)):
            if copy.state is not CopyState.RESIDENT or copy.pins or self._given_up.get(copy.key) == copy.used_s:
                continue
            trial = self._trial(copy.key, now_s)
            verdict = self._judge(copy, copies, budget_bytes, next_tiers(copy.key), trial, now_s)
            if verdict.action != "leave":
                return copy.key
            if now_s - copy.used_s >= self._rules.cold_after_s:
                self._say(copy, trial is not None, verdict.reason)
        return None

    def judge_trial(
        self, copy: Copy, trial: Trial, copies: Sequence[Copy], budget_bytes: int, next_tier: str, now_s: float
    ) -> Verdict:
        """Whether to go on with what was tried."""
        self._trials[copy.key] = (now_s, trial)
        verdict = self._judge(copy, copies, budget_bytes, next_tier, trial, now_s)
        if verdict.action != "compress":
            self._say(copy, True, verdict.reason)
        return verdict

    def give_up(self, copy: Copy) -> None:
        """It could not be compressed: not again before its next use."""
        self._given_up[copy.key] = copy.used_s

    def _trial(self, key: WeightsKey, now_s: float) -> Trial | None:
        at_s, trial = self._trials.get(key, (0.0, None))
        return trial if now_s - at_s < VALID_S else None

    def _judge(
        self,
        copy: Copy,
        copies: Sequence[Copy],
        budget_bytes: int,
        next_tier: str,
        trial: Trial | None,
        now_s: float,
    ) -> Verdict:
        view = ColdView(
            num_bytes=copy.num_bytes,
            idle_s=now_s - copy.used_s,
            free_bytes=budget_bytes - sum(each.held_bytes for each in copies),
            largest_bytes=max(each.whole_bytes for each in copies),
            next_tier=next_tier,
            next_bytes_per_s=self._rates.bytes_per_s(next_tier),
            decoded_bytes_per_s=self._rates.bytes_per_s(COMPRESSED_TIER, since_s=now_s - VALID_S),
            rates=None if trial is None else trial.rates,
            bound_bytes=0 if trial is None else trial.bound_bytes,
        )
        return judge(view, self._rules)

    def _say(self, copy: Copy, is_tried: bool, reason: str) -> None:
        """Once for each time that it goes cold, and once more when its codec was tried."""
        if self._said.get(copy.key) != (copy.used_s, is_tried):
            self._said[copy.key] = (copy.used_s, is_tried)
            self._log(f"weights of {copy.key.folder} are not compressed: {reason}")
