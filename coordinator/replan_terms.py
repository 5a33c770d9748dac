"""What replanning goes by, what it is told, and what it asks for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from contracts.messages import Role


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
class PartlyExpected:
    """As `Expected`, where None stands for what nobody has said."""

    rate_rps: float | None = None
    mean_prompt_tokens: float | None = None
    p95_prompt_tokens: float | None = None
    mean_output_tokens: float | None = None

    def completed(self, seen: Expected) -> Expected:
        """What is not said is taken from what was seen."""
        return Expected(
            rate_rps=self.rate_rps or seen.rate_rps,
            mean_prompt_tokens=self.mean_prompt_tokens or seen.mean_prompt_tokens,
            p95_prompt_tokens=self.p95_prompt_tokens or seen.p95_prompt_tokens,
            mean_output_tokens=self.mean_output_tokens or seen.mean_output_tokens,
        )

    def whole(self) -> Expected | None:
        """None where something is not said."""
        rate_rps, mean, p95, outputs = (
            self.rate_rps,
            self.mean_prompt_tokens,
            self.p95_prompt_tokens,
            self.mean_output_tokens,
        )
        if rate_rps is None or mean is None or p95 is None or outputs is None:
            return None
        return Expected(rate_rps=rate_rps, mean_prompt_tokens=mean, p95_prompt_tokens=p95, mean_output_tokens=outputs)


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
    #: Goodput of it over that of the workers as they are, less 1; infinite where these serve nothing within targets.
    gain: float
    #: The pools as they are, in words.
    instead_of: str
    #: Numbers of workers by role; empty: not said.
    workers: tuple[tuple[Role, int], ...] = ()


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
