"""Which refusals of a run were wrong: samples of the refused are let in, beside what the run accepted.

The method, and why nothing less will do, is that of `tandem rejects --replay`: a request is judged by whether it meets
its targets in the very cluster that refused it. Were the policy to decide anew behind the first of a sample, it would
refuse others for it, and the next of the sample would meet a cluster that has more room than the one that refused it.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.policies_runs import Trial
from loadtest.metrics import wilson

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.policies_runs import Job, Ran

#: Reasons that say that targets would have been missed; the others, that there was no place at all.
JUDGED = ("ttft", "tpot", "full", "queue")


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """On a run's refusals for one reason, or for all of them."""

    reason: str
    num_offered: int
    num_refused: int
    num_tried: int
    #: Of these: met both targets.
    num_met: int
    #: Seconds that the coordinator expected more than came, median over those tried; NaN: nothing came.
    ttft_error_s: float
    tpot_error_s: float

    @property
    def of_offered(self) -> float:
        """Share of all requests that were refused and would have met their targets."""
        return self._of_offered(self.num_met / max(1, self.num_tried))

    @property
    def interval(self) -> tuple[float, float]:
        """Of `of_offered`, 95 %; all that were tried count as independent."""
        found = wilson(self.num_met / max(1, self.num_tried), self.num_tried)
        return self._of_offered(found.low), self._of_offered(found.high)

    def _of_offered(self, share: float) -> float:
        return share * self.num_refused / self.num_offered


def trials(ran: Ran, share: float, count: int, seed: int) -> list[Job]:
    """At most so many runs, each with other refused requests let in: so many for each request that was accepted."""
    judged = ran.judged
    refused = [row for row, why in zip(judged.rows.tolist(), judged.reasons.tolist(), strict=True) if why in JUDGED]
    size = max(1, round(share * ran.num_accepted))
    order = random.Random(seed).sample(refused, len(refused))
    samples = [tuple(sorted(order[at : at + size])) for at in range(0, len(order), size)][:count]
    every = tuple(judged.rows.tolist())
    return [replace(ran.job, trial=Trial(refused=every, let_in=sample)) for sample in samples]


def verdicts(ran: Ran, tried: Sequence[Ran]) -> list[Verdict]:
    """For all reasons together, then for each that occurred; none where nothing was tried. `tried`: what came of
    `trials(ran)`."""
    if not tried:
        return []
    judged, came = ran.judged, [each.judged for each in tried]
    rows = np.concatenate([each.job.trial.let_in for each in tried if each.job.trial is not None])
    expected = np.searchsorted(judged.rows, rows)
    reasons = judged.reasons[expected]
    met = np.concatenate([each.met for each in came])
    ttft_error_s = judged.predicted_ttft_s[expected] - np.concatenate([each.ttft_s for each in came])
    tpot_error_s = judged.predicted_tpot_s[expected] - np.concatenate([each.tpot_s for each in came])

    def verdict(name: str, chosen: tuple[str, ...]) -> Verdict:
        these = np.isin(reasons, chosen)
        return Verdict(
            reason=name,
            num_offered=ran.num_requests,
            num_refused=int(np.isin(judged.reasons, chosen).sum()),
            num_tried=int(these.sum()),
            num_met=int(met[these].sum()),
            ttft_error_s=_median(ttft_error_s[these]),
            tpot_error_s=_median(tpot_error_s[these]),
        )

    return [verdict("all", JUDGED), *(verdict(why, (why,)) for why in JUDGED if why in judged.reasons)]


def accepted_missing_beside(tried: Sequence[Ran]) -> float:
    """Of the accepted, beside the samples: far from what the run itself has, the samples disturb what they measure."""
    return float(np.mean([each.accepted_missing for each in tried])) if tried else math.nan


def _median(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan
