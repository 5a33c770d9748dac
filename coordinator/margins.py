"""How much of its TTFT target a class's predictions may reach, so that few of the accepted miss it.

Predictions are means of what is known, and they err: other processes take a worker's cores, answers are longer than
those before them, several prompts come at once. At the edge of overload every request is accepted whose prediction just
meets its target, so that small errors make many late. So it is counted what became of those that were accepted: each
one that was late lowers what predictions of its class may reach by `STEP`, each that was not raises it, by so much less
that both balance where `miss_share` of the accepted are late. This is stochastic approximation of a quantile (Robbins
and Monro, 1951), as in adaptive conformal inference (Gibbs and Candès, NeurIPS 2021, equation 2).

Outcomes come late, and many together. What would be refused by now says nothing new: a crowd that was accepted at one
prediction lowers the share to just below that, and no further. Nor does one say anything that was late although hardly
anything was predicted: refusing more would not have helped it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.messages import TtftTally
    from coordinator.policy.settings import AdmissionRule

STEP = 0.005
#: However many are late: where a target is out of reach for other reasons than load, refusing more does not help.
LEAST = 0.5
#: Of one tally: what is counted at most, whatever it says.
_MOST = 10_000


class Margins:
    """Not thread-safe; reads no clock."""

    def __init__(self, rule: AdmissionRule, classes: Iterable[str]) -> None:
        """Without admission, or with a `miss_share` of 0, predictions are taken at their word."""
        self._miss_share = rule.miss_share if rule.form != "none" else 0.0
        self._ttft_share = rule.ttft_share
        self._shares = dict.fromkeys(classes, 1.0)

    def of(self, slo_class: str) -> float:
        """A share of what the rule lets predictions of TTFT reach."""
        return self._shares.get(slo_class, 1.0)

    def shares(self) -> dict[str, float]:
        """Of all classes, by name."""
        return dict(self._shares)

    def note(self, tally: TtftTally) -> None:
        """What became of requests that were accepted by prediction. Of classes that are not here: no effect."""
        before = self._shares.get(tally.slo_class)
        if before is None or not self._miss_share:
            return
        num_judged = max(0, min(tally.num_first_tokens, _MOST))
        num_late = max(0, min(tally.num_late, num_judged))
        promised = tally.promised_least / self._ttft_share
        if promised >= before:
            return
        if promised < LEAST:
            num_late = 0
        after = before + STEP * (self._miss_share * num_judged - num_late)
        self._shares[tally.slo_class] = min(1.0, max(after, min(before, promised), LEAST))
