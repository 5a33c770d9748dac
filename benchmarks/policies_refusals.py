"""Which refusals of a run were wrong: each of a sample is let in, alone, into the very cluster that refused it.

Repetitions of the run branch just before each request arrives (`simulator.study.branches`). Were they let in together,
the work of each would stay in queues that never empty, the policy would refuse others for it, and the next of the
sample would meet a cluster that would have decided otherwise.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.policies_runs import requests_of, study
from loadtest.metrics import wilson
from simulator.study.branches import Trial, simulate_with_branches

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from benchmarks.policies_runs import Job, Ran
    from simulator.study.branches import Fate

#: Reasons that say that targets would have been missed, or that queues were full; the others, that there was no place.
JUDGED = ("ttft", "tpot", "full", "queue")
#: Others go on arriving for that many times as long as the request is expected to take. Its answer writes on beside
#: fewer of them if it takes longer; its prompt, in order of arrival, does not notice.
_PATIENCE = 1.1
_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Requests that a job refuses, to be let in one by one."""

    job: Job
    trials: tuple[Trial, ...]


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


def parts(ran: Ran, sample: int, num_parts: int, seed: int) -> list[Part]:
    """A sample of the refused, in so many parts of equal size that follow one another."""
    refusals = ran.refusals
    among = np.flatnonzero(np.isin(refusals.reasons, JUDGED)).tolist()
    chosen = sorted(random.Random(seed).sample(among, min(sample, len(among))))
    answers = [request.output_tokens for request in requests_of(ran.job.load)] if chosen else []

    def trial(index: int) -> Trial:
        row = int(refusals.rows[index])
        expected_s = float(refusals.predicted_ttft_s[index]) + answers[row] * float(refusals.predicted_tpot_s[index])
        if not math.isfinite(expected_s):
            expected_s = ran.job.ttft_target_s
        return Trial(index=row, patience_s=_PATIENCE * expected_s + _PATIENCE_S)

    return [
        Part(job=ran.job, trials=tuple(map(trial, part.tolist())))
        for part in np.array_split(np.array(chosen, np.int64), num_parts)
        if len(part)
    ]


def let_in(part: Part) -> list[Fate]:
    """By their rows. Forks; raises Internal where one fails."""
    spec = study(part.job)
    _, fates = simulate_with_branches(spec, requests_of(part.job.load), part.trials, spec.slos, to_the_end=False)
    return fates


def verdicts(ran: Ran, came: Sequence[Fate]) -> list[Verdict]:
    """For all reasons together, then for each that occurred; none where nothing was tried."""
    if not came:
        return []
    refusals = ran.refusals
    at = np.searchsorted(refusals.rows, [each.index for each in came])
    met = np.array([each.met for each in came])
    ttft_error_s = refusals.predicted_ttft_s[at] - np.array([each.ttft_s for each in came])
    tpot_error_s = refusals.predicted_tpot_s[at] - np.array([each.tpot_s for each in came])

    def verdict(name: str, reasons: tuple[str, ...]) -> Verdict:
        these = np.isin(refusals.reasons[at], reasons)
        return Verdict(
            reason=name,
            num_offered=ran.num_requests,
            num_refused=int(np.isin(refusals.reasons, reasons).sum()),
            num_tried=int(these.sum()),
            num_met=int(met[these].sum()),
            ttft_error_s=_median(ttft_error_s[these]),
            tpot_error_s=_median(tpot_error_s[these]),
        )

    return [verdict("all", JUDGED), *(verdict(why, (why,)) for why in JUDGED if why in refusals.reasons)]


def _median(values: NDArray[np.float64]) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if len(known) else math.nan
