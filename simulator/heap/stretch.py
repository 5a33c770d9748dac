"""Steps that follow each other, each a constant longer than the one before: when they end, in closed form.

A step that decodes n sequences takes `base + slope * context`, and each step adds n tokens to the context. So the
durations are an arithmetic series, and the end of the k-th step is a quadratic in k.
"""

from __future__ import annotations

import math
from typing import NamedTuple


class Stretch(NamedTuple):
    start_s: float
    #: Of the first step; > 0.
    first_s: float
    #: By how much each step is longer than the one before; >= 0.
    growth_s: float
    #: Between the end of a step and the start of the next; >= 0.
    gap_s: float

    def end_s(self, num_steps: int) -> float:
        """When that many steps have ended; `num_steps` > 0."""
        return (
            self.start_s
            + num_steps * self.first_s
            + 0.5 * self.growth_s * (num_steps * (num_steps - 1))
            + (num_steps - 1) * self.gap_s
        )

    def ended_by(self, time_s: float) -> int:
        """How many steps have ended at `time_s`."""
        start_s, first_s, growth_s, gap_s = self
        since_s = time_s - start_s + gap_s
        if since_s <= 0.0:
            return 0
        linear_s = first_s + gap_s - 0.5 * growth_s
        root_s = math.sqrt(max(0.0, linear_s * linear_s + 2.0 * growth_s * since_s))
        num_steps = int(2.0 * since_s / (linear_s + root_s))
        # Rounding: what `end_s` says counts.
        while num_steps and self.end_s(num_steps) > time_s:
            num_steps -= 1
        while self.end_s(num_steps + 1) <= time_s:
            num_steps += 1
        return num_steps

    def busy_s(self, time_s: float, num_ended: int) -> float:
        """Seconds in steps until `time_s`, by when `num_ended` steps have ended; the next may be under way."""
        whole_s = self.end_s(num_ended) - self.start_s - (num_ended - 1) * self.gap_s if num_ended else 0.0
        return max(whole_s, time_s - self.start_s - num_ended * self.gap_s)
