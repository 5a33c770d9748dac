"""Notices that the workload is no longer the one that was planned for, and asks for a better split of the workers.

`Replanning` is a machine: what arrives and what was answered go in, instructions come out. It compares rate, prompt
lengths (mean and 95th percentile) and answer lengths (mean) over a window with those of the plan. A change counts where
it is larger than `drift` by more than chance explains: by `NUM_ERRORS` standard errors, that of the rate widened by how
bursty arrivals were. A change that is noticed has to last: the window that decides begins with it, so that a burst is
no reason and a shift is judged by itself alone, at most two windows after it began. Then what was observed is
the workload that is planned for, whatever comes of the question: the same shift is told once.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

#: Standard errors by which a change must exceed what is allowed. Each window is looked at some twenty times, each time
#: for several changes.
NUM_ERRORS = 4.0
#: Parts of a window; the oldest is dropped as a whole.
_NUM_PARTS = 20
#: Lengths that are kept to be planned with.
_MAX_LENGTHS = 4096
_TAIL = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Expected:
    """The workload that was planned for. Raises ValueError for figures that are not above 0."""

    rate_rps: float
    mean_prompt_tokens: float
    p95_prompt_tokens: float
    mean_output_tokens: float

    def __post_init__(self) -> None:
        for name in ("rate_rps", "mean_prompt_tokens", "p95_prompt_tokens", "mean_output_tokens"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplanRules:
    """Raises ValueError for rules that cannot be kept."""

    mode: Literal["off", "propose", "apply"] = "propose"
    window_s: float = 600.0
    #: Relative change that is no reason yet.
    drift: float = 0.25
    #: Fewer than these in a window, expected or seen, tell nothing.
    min_requests: int = 100
    #: Standard deviation of answer lengths over their mean; only their sums are told.
    output_variation: float = 1.5
    #: A split that serves so much more, relative, is worth telling.
    min_gain: float = 0.05
    #: An answer that takes longer comes no more.
    answer_within_s: float = 3600.0

    def __post_init__(self) -> None:
        if not (0 < self.window_s < math.inf and self.drift > 0 and self.min_requests >= 1):
            raise ValueError(f"needs window_s > 0, drift > 0 and min_requests >= 1: {self}")
        if not (self.output_variation >= 0 and self.min_gain >= 0 and self.answer_within_s > 0):
            raise ValueError(f"needs output_variation >= 0, min_gain >= 0 and answer_within_s > 0: {self}")


# --- events -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Arrived:
    at_s: float
    prompt_tokens: int


@dataclass(frozen=True, slots=True)
class Answered:
    """Answers that ended since the last of these events, and their tokens."""

    at_s: float
    num_answers: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Looked:
    """Time has passed; a few times a window is often enough."""

    at_s: float


@dataclass(frozen=True, slots=True)
class Split:
    """What a planner made of the observed workload."""

    #: The pools, in words.
    text: str
    #: Goodput of it over that of the workers as they are, less 1.
    gain: float


@dataclass(frozen=True, slots=True)
class Planned:
    """The answer to `Ask`; None: there is no better split, or nobody could say."""

    at_s: float
    split: Split | None


Event = Arrived | Answered | Looked | Planned

# --- instructions -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Plan for what was observed."""

    observed: Expected
    #: Prompts of it, newest last, to draw from.
    prompt_tokens: tuple[int, ...]
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Tell the operator."""

    split: Split
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Apply:
    """Carry it out; where nobody can, tell the operator."""

    split: Split
    reason: str


Instruction = Ask | Propose | Apply


class _State(Enum):
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

    def __init__(self, rules: ReplanRules, expected: Expected, *, started_s: float) -> None:
        self._rules = rules
        self._part_s = rules.window_s / _NUM_PARTS
        self._state = _State.WATCHING
        self._asked_s = -math.inf
        self._reason = ""
        self._lengths: deque[int] = deque(maxlen=_MAX_LENGTHS)
        self._expect(expected, started_s)

    @property
    def expected(self) -> Expected:
        return self._expected

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
        self._long_tokens = expected.p95_prompt_tokens * (1.0 + self._rules.drift)
        self._longish_tokens = expected.p95_prompt_tokens * (1.0 - self._rules.drift)
        self._begin(now_s)

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
        reason = self._change(parts)
        if self._state is _State.WATCHING:
            if reason:
                self._state = _State.SETTLING
                self._begin(now_s)
            return []
        self._state = _State.WATCHING
        if not reason:
            return []
        observed, lengths = self._observed(parts), tuple(self._lengths)
        self._state, self._asked_s, self._reason = _State.ASKED, now_s, reason
        self._expect(observed, now_s)
        return [Ask(observed=observed, prompt_tokens=lengths, reason=reason)]

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

    def _change(self, parts: Sequence[_Part]) -> str:
        """What differs from the plan, or nothing."""
        expected, rules = self._expected, self._rules
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
            changes += self._of_tail(parts, count)
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

    def _of_tail(self, parts: Sequence[_Part], count: int) -> list[str]:
        """One prompt in twenty is above the percentile: how many are above it with the drift tells whether it moved,
        as a binomial."""
        allowed = NUM_ERRORS * math.sqrt(_TAIL * (1.0 - _TAIL) / count)
        long_share = sum(part.num_long for part in parts) / count
        longish_share = sum(part.num_longish for part in parts) / count
        planned = f"where {self._expected.p95_prompt_tokens:,.0f} is the planned 95th percentile"
        if long_share > _TAIL + allowed:
            return [f"{long_share:.1%} of the prompts above {self._long_tokens:,.0f} tokens, {planned}"]
        if longish_share < _TAIL - allowed:
            return [f"only {longish_share:.1%} of the prompts above {self._longish_tokens:,.0f} tokens, {planned}"]
        return []

    def _observed(self, parts: Sequence[_Part]) -> Expected:
        """As the new plan's workload; where nothing was seen, what was expected."""
        expected = self._expected
        count = sum(part.num_requests for part in parts)
        num_answers = sum(part.num_answers for part in parts)
        output_tokens = sum(part.output_tokens for part in parts)
        if not count:
            # Nobody comes: a plan needs a rate, and the lowest that can be told from none is one.
            return Expected(
                rate_rps=1.0 / (len(parts) * self._part_s),
                mean_prompt_tokens=expected.mean_prompt_tokens,
                p95_prompt_tokens=expected.p95_prompt_tokens,
                mean_output_tokens=expected.mean_output_tokens,
            )
        lengths = sorted(self._lengths)
        return Expected(
            rate_rps=count / (len(parts) * self._part_s),
            mean_prompt_tokens=sum(part.prompt_tokens for part in parts) / count,
            p95_prompt_tokens=float(lengths[math.ceil((1.0 - _TAIL) * len(lengths)) - 1]),
            mean_output_tokens=output_tokens / num_answers if output_tokens else expected.mean_output_tokens,
        )


def _dispersion(parts: Sequence[_Part]) -> float:
    """Variance over mean of the counts of requests: 1 for Poisson arrivals, which is the least that is taken."""
    mean = sum(part.num_requests for part in parts) / len(parts)
    if mean == 0 or len(parts) < 2:
        return 1.0
    return max(1.0, sum((part.num_requests - mean) ** 2 for part in parts) / (len(parts) - 1) / mean)


class Replanner:
    """The machine's shell: asks the planner it is given, tells, and lets a hook apply.

    `plan` answers an `Ask` with a split, or None; it may take long and is called where `carry_out` is. `apply` is None
    where workers cannot change their roles: what was to be applied is then told as a proposal.
    """

    def __init__(
        self,
        machine: Replanning,
        *,
        plan: Callable[[Ask], Split | None],
        tell: Callable[[str], None],
        apply: Callable[[Split], None] | None = None,
    ) -> None:
        self._machine = machine
        self._plan = plan
        self._tell = tell
        self._apply = apply

    def handle(self, event: Event) -> None:
        """Gives the machine the event, and carries out all that follows from it."""
        for instruction in self._machine.handle(event):
            self.carry_out(instruction, event.at_s)

    def carry_out(self, instruction: Instruction, now_s: float) -> None:
        match instruction:
            case Ask():
                self.handle(Planned(now_s, self._plan(instruction)))
            case Propose():
                self._tell(f"a better split: {_in_words(instruction.split, instruction.reason)}")
            case Apply() if self._apply is None:
                words = _in_words(instruction.split, instruction.reason)
                self._tell(f"a better split, not applied for workers cannot change roles here: {words}")
            case Apply():
                self._tell(f"applying a better split: {_in_words(instruction.split, instruction.reason)}")
                assert self._apply is not None, "the case above"
                self._apply(instruction.split)


def _in_words(split: Split, reason: str) -> str:
    return f"{split.text} would serve {split.gain:+.0%}; {reason}"
