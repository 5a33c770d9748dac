"""What became of requests that were accepted because they were predicted to meet their TTFT target."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.messages import TtftTally

if TYPE_CHECKING:
    from contracts.messages import Predicted
    from gateway.terms import Terms


class Promises:
    """Counts by class and by what was predicted, until they are taken: for the coordinator."""

    def __init__(self) -> None:
        self._tallies: dict[tuple[str, int], TtftTally] = {}

    def first_token(self, terms: Terms, predicted: Predicted, ttft_s: float) -> None:
        """It came so long after the request. No effect without a target."""
        target_s = terms.ttft_target_s
        if target_s is None:
            return
        one = TtftTally.of(terms.slo_class, predicted.ttft_s / target_s, is_late=ttft_s > target_s)
        key = one.slo_class, one.promised
        before = self._tallies.get(key)
        self._tallies[key] = one if before is None else before + one

    def take(self) -> tuple[TtftTally, ...]:
        """Everything since the last call."""
        tallies, self._tallies = self._tallies, {}
        return tuple(tallies.values())
