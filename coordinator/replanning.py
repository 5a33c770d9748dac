"""Notices that the workload is no longer the one that was planned for, and asks for a better split of the workers.

`Replanning` is a machine: what arrives and what was answered go in, instructions come out. It compares rate, prompt
lengths (mean and 95th percentile) and answer lengths (mean) over a window with those of the plan. A change counts where
it is larger than `drift` by more than chance explains: by `NUM_ERRORS` standard errors, that of the rate widened by how
bursty arrivals were. A change that is noticed has to last: the window that decides begins with it, so that a burst is
no reason and a shift is judged by itself alone, at most two windows after it began. Then what was observed is
the workload that is planned for, whatever comes of the question: the same shift is told once. What a plan does not say
of its workload is that of the first two windows that are alike and have enough requests.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING

from coordinator.replan_terms import (
    Answered,
    Apply,
    Arrived,
    Ask,
    Expected,
    Looked,
    PartlyExpected,
    Planned,
    Propose,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.replan_terms import Event, Instruction, ReplanRules

#: Standard errors by which a change must exceed what is allowed. Each window is looked at some twenty times, each time
#: for several changes.
NUM_ERRORS = 4.0
#: Parts of a window; the oldest is dropped as a whole.
_NUM_PARTS = 20
#: Lengths that are kept to be planned with.
_MAX_LENGTHS = 4096
_TAIL = 0.05


class _State(Enum):
    #: What is expected is not known yet.
    LEARNING = "learning"
    WATCHING = "watching"
    #: Something changed; whether it lasts is seen from what comes since.
    SETTLING = "settling"
    ASKED = "asked"


@dataclass(slots=True)
class _Part:
    """What happened in a part of a window."""

    start_s: float
    num_requests: int = 0
    prompt_tokens: int = 0
    prompt_squares: float = 0.0
    #: Prompts longer than the expected 95th percentile allows, and than it less the drift.
    num_long: int = 0
    num_longish: int = 0
    num_answers: int = 0
    output_tokens: int = 0


class Replanning:
    """`handle(event) -> instructions`; events come in order of time. Holds a bounded number of figures."""

    def __init__(self, rules: ReplanRules, expected: Expected | PartlyExpected, *, started_s: float) -> None:
        self._rules = rules
        self._part_s = rules.window_s / _NUM_PARTS
        self._said = expected if isinstance(expected, PartlyExpected) else PartlyExpected()
        self._asked_s = -math.inf
        self._reason = ""
        self._lengths: deque[int] = deque(maxlen=_MAX_LENGTHS)
        #: Prompts longer than these are counted.
        self._long_tokens = self._longish_tokens = math.inf
        whole = expected.whole() if isinstance(expected, PartlyExpected) else expected
        self._state = _State.LEARNING if whole is None else _State.WATCHING
        self._expected = whole
        #: While what is expected is being learnt: of the window before.
        self._seen_before: Expected | None = None
        if whole is None:
            self._begin(started_s)
        else:
            self._expect(whole, started_s)

    @property
    def expected(self) -> Expected | None:
        """None: it is not known yet."""
        return self._expected

    @property
    def look_every_s(self) -> float:
        """More often there is nothing new to see."""
        return self._part_s

    def handle(self, event: Event) -> list[Instruction]:
        if self._rules.mode == "off":
            return []
        match event:
            case Arrived():
                part = self._part_at(event.at_s)
                tokens = event.prompt_tokens
                part.num_requests += 1
                part.prompt_tokens += tokens
                part.prompt_squares += float(tokens) * tokens
                part.num_long += tokens > self._long_tokens
                part.num_longish += tokens > self._longish_tokens
                self._lengths.append(tokens)
                return []
            case Answered():
                part = self._part_at(event.at_s)
                part.num_answers += event.num_answers
                part.output_tokens += event.output_tokens
                return []
            case Looked():
                return self._look(event.at_s)
            case Planned():
                return self._planned(event)

    def _expect(self, expected: Expected, now_s: float) -> None:
        self._expected = expected
        self._count_beyond(expected)
        self._begin(now_s)

    def _count_beyond(self, expected: Expected) -> None:
        self._long_tokens = expected.p95_prompt_tokens * (1.0 + self._rules.drift)
        self._longish_tokens = expected.p95_prompt_tokens * (1.0 - self._rules.drift)

    def _begin(self, now_s: float) -> None:
        """What came before counts no more."""
        self._since_s = now_s
        self._lengths.clear()
        self._parts: deque[_Part] = deque([_Part(now_s)])

    def _part_at(self, at_s: float) -> _Part:
        last = self._parts[-1]
        passed = int((at_s - last.start_s) / self._part_s)
        if passed > 0:
            # Parts in which nothing happened count for the burstiness; more than a window of them are one.
            first = max(1, passed - _NUM_PARTS)
            start_s = last.start_s
            self._parts.extend(_Part(start_s + number * self._part_s) for number in range(first, passed + 1))
            while len(self._parts) > _NUM_PARTS + 1:
                self._parts.popleft()
        return self._parts[-1]

    def _look(self, now_s: float) -> list[Instruction]:
        self._part_at(now_s)
        if self._state is _State.ASKED:
            if now_s - self._asked_s > self._rules.answer_within_s:
                self._state = _State.WATCHING
            return []
        # The last part is not over.
        parts = list(self._parts)[:-1]
        if now_s - self._since_s < self._rules.window_s or len(parts) < _NUM_PARTS:
            return []
        expected = self._expected
        if expected is None:
            self._learn(parts, now_s)
            return []
        reason = self._change(parts, expected)
        if self._state is _State.WATCHING:
            if reason:
                self._state = _State.SETTLING
                self._begin(now_s)
            return []
        self._state = _State.WATCHING
        if not reason:
            return []
        observed, lengths = self._observed(parts, expected), tuple(self._lengths)
        self._state, self._asked_s, self._reason = _State.ASKED, now_s, reason
        self._expect(observed, now_s)
        return [Ask(observed=observed, prompt_tokens=lengths, reason=reason)]

    def _learn(self, parts: Sequence[_Part], now_s: float) -> None:
        """Takes what the window tells, if it tells enough, and the one before told the same: a cluster that has just
        started is still being filled."""
        num_requests = sum(part.num_requests for part in parts)
        num_answers = sum(part.num_answers for part in parts)
        knows_answers = self._said.mean_output_tokens is not None
        if num_requests < self._rules.min_requests or not (knows_answers or num_answers >= self._rules.min_requests):
            return
        before, self._seen_before = self._seen_before, self._seen(parts, self._said.mean_output_tokens or 1.0)
        if before is not None and not self._change(parts, before):
            self._state = _State.WATCHING
            self._expect(self._said.completed(self._seen_before), now_s)
        else:
            self._count_beyond(self._seen_before)
            self._begin(now_s)

    def _planned(self, event: Planned) -> list[Instruction]:
        if self._state is not _State.ASKED:
            return []
        self._state = _State.WATCHING
        split = event.split
        if split is None or split.gain < self._rules.min_gain:
            return []
        if self._rules.mode == "apply":
            return [Apply(split=split, reason=self._reason)]
        return [Propose(split=split, reason=self._reason)]

    # --- figures ----------------------------------------------------------------------------------

    def _change(self, parts: Sequence[_Part], expected: Expected) -> str:
        """What differs from the plan, or nothing."""
        rules = self._rules
        span_s = len(parts) * self._part_s
        count = sum(part.num_requests for part in parts)
        changes: list[str] = []
        if max(count, expected.rate_rps * span_s) >= rules.min_requests:
            error_rps = math.sqrt(max(count, 1) * _dispersion(parts)) / span_s
            changes += self._of_mean("rate", "/s", count / span_s, expected.rate_rps, error_rps)
        if count >= rules.min_requests:
            mean = sum(part.prompt_tokens for part in parts) / count
            variance = max(0.0, sum(part.prompt_squares for part in parts) / count - mean * mean)
            error = math.sqrt(variance / count)
            changes += self._of_mean("mean prompt", " tokens", mean, expected.mean_prompt_tokens, error)
            changes += self._of_tail(parts, count, expected)
        num_answers = sum(part.num_answers for part in parts)
        if num_answers >= rules.min_requests:
            mean = sum(part.output_tokens for part in parts) / num_answers
            error = rules.output_variation * mean / math.sqrt(num_answers)
            changes += self._of_mean("mean answer", " tokens", mean, expected.mean_output_tokens, error)
        return "; ".join(changes)

    def _of_mean(self, what: str, unit: str, seen: float, expected: float, error: float) -> list[str]:
        if abs(seen - expected) <= self._rules.drift * expected + NUM_ERRORS * error:
            return []
        return [f"{what} {seen:.4g}{unit} instead of {expected:.4g} ({seen / expected - 1.0:+.0%})"]

    def _of_tail(self, parts: Sequence[_Part], count: int, expected: Expected) -> list[str]:
        """One prompt in twenty is above the percentile: how many are above it with the drift tells whether it moved,
        as a binomial."""
        allowed = NUM_ERRORS * math.sqrt(_TAIL * (1.0 - _TAIL) / count)
        long_share = sum(part.num_long for part in parts) / count
        longish_share = sum(part.num_longish for part in parts) / count
        planned = f"where {expected.p95_prompt_tokens:,.0f} is the planned 95th percentile"
        if long_share > _TAIL + allowed:
            return [f"{long_share:.1%} of the prompts above {self._long_tokens:,.0f} tokens, {planned}"]
        if longish_share < _TAIL - allowed:
            return [f"only {longish_share:.1%} of the prompts above {self._longish_tokens:,.0f} tokens, {planned}"]
        return []

    def _observed(self, parts: Sequence[_Part], expected: Expected) -> Expected:
        """As the new plan's workload; where nothing was seen, what was expected."""
        if any(part.num_requests for part in parts):
            return self._seen(parts, expected.mean_output_tokens)
        # Nobody comes: a plan needs a rate, and the lowest that can be told from none is one.
        return replace(expected, rate_rps=1.0 / (len(parts) * self._part_s))

    def _seen(self, parts: Sequence[_Part], mean_output_tokens: float) -> Expected:
        """There must be a request; `mean_output_tokens` where no answer ended."""
        count = sum(part.num_requests for part in parts)
        num_answers = sum(part.num_answers for part in parts)
        output_tokens = sum(part.output_tokens for part in parts)
        lengths = sorted(self._lengths)
        return Expected(
            rate_rps=count / (len(parts) * self._part_s),
            mean_prompt_tokens=sum(part.prompt_tokens for part in parts) / count,
            p95_prompt_tokens=float(percentile_95(lengths)),
            mean_output_tokens=output_tokens / num_answers if output_tokens else mean_output_tokens,
        )


def percentile_95(ascending: Sequence[int]) -> int:
    """One in twenty is larger at most. There must be one."""
    return ascending[math.ceil((1.0 - _TAIL) * len(ascending)) - 1]


def _dispersion(parts: Sequence[_Part]) -> float:
    """Variance over mean of the counts of requests: 1 for Poisson arrivals, which is the least that is taken."""
    mean = sum(part.num_requests for part in parts) / len(parts)
    if mean == 0 or len(parts) < 2:
        return 1.0
    return max(1.0, sum((part.num_requests - mean) ** 2 for part in parts) / (len(parts) - 1) / mean)
