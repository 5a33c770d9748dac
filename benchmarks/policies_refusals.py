"""Which refusals of a run were wrong: each of a sample is let in, alone, into the very cluster that refused it.

A process that repeats the run forks just before the request arrives: in the fork it is accepted and its fate awaited,
while the run itself goes on without it. So one repetition judges many requests, and none of them meets another. Were
they let in together, the work of each would stay in queues that never empty, the policy would refuse others for it, and
the next of the sample would meet a cluster that would have decided otherwise.
"""

from __future__ import annotations

import math
import os
import pickle
import random
import traceback
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.policies_runs import requests_of, study
from loadtest.metrics import wilson
from simulator.heap.study import simulate
from simulator.study.metrics import request_latencies

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from benchmarks.policies_runs import Job, Ran
    from workload import WorkloadRequest

#: Reasons that say that targets would have been missed, or that queues were full; the others, that there was no place.
JUDGED = ("ttft", "tpot", "full", "queue")
#: Others go on arriving for that many times as long as the request is expected to take. Its answer writes on beside
#: fewer of them if it takes longer; its prompt, in order of arrival, does not notice.
_PATIENCE = 1.1
_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """Requests that a job refuses, in order, to be let in one by one."""

    job: Job
    rows: tuple[int, ...]
    #: How long each is expected to take.
    expected_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LetIn:
    """What came of a request that was let in alone. NaN where nothing came."""

    row: int
    ttft_s: float
    tpot_s: float
    met: bool


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


def trials(ran: Ran, sample: int, parts: int, seed: int) -> list[Trial]:
    """A sample of the refused, in so many parts of equal size that follow one another."""
    refusals = ran.refusals
    among = np.flatnonzero(np.isin(refusals.reasons, JUDGED)).tolist()
    chosen = sorted(random.Random(seed).sample(among, min(sample, len(among))))
    answers = [request.output_tokens for request in requests_of(ran.job.load)] if chosen else []

    def expected_s(index: int) -> float:
        answer_s = answers[int(refusals.rows[index])] * float(refusals.predicted_tpot_s[index])
        whole_s = float(refusals.predicted_ttft_s[index]) + answer_s
        return whole_s if math.isfinite(whole_s) else ran.job.ttft_target_s

    return [
        Trial(job=ran.job, rows=tuple(refusals.rows[part].tolist()), expected_s=tuple(map(expected_s, part.tolist())))
        for part in np.array_split(np.array(chosen, np.int64), parts)
        if len(part)
    ]


def let_in(trial: Trial) -> list[LetIn]:
    """Raises RuntimeError where a fork dies; that has said why."""
    forced = _Forced()
    spec = replace(study(trial.job), forced=forced)
    branches = _Branches(trial, forced)
    try:
        result = simulate(spec, branches.requests())
        if branches.pipe is None:
            return branches.came
        latencies = request_latencies(result, spec.slos)
        row = forced.row
        ttft_s, tpot_s, met = (float(each[row]) for each in (latencies.ttft_s, latencies.tpot_s, latencies.met))
        with os.fdopen(branches.pipe, "wb") as pipe:
            pickle.dump(LetIn(row=row, ttft_s=ttft_s, tpot_s=tpot_s, met=bool(met)), pipe)
    except BaseException:
        if branches.pipe is None:
            raise
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


class _Forced(frozenset[int]):
    """Empty until a fork says which request it is about: a study asks as each arrives."""

    row = -1

    def __contains__(self, row: object) -> bool:
        return row == self.row


class _Branches:
    """The workload of a trial, which forks before each of its requests."""

    def __init__(self, trial: Trial, forced: _Forced) -> None:
        self._trial = trial
        self._forced = forced
        self.came: list[LetIn] = []
        #: Set in a fork alone.
        self.pipe: int | None = None

    def requests(self) -> Iterator[WorkloadRequest]:
        """Ends with the last of the trial, in a fork when its request should have ended."""
        expected_s = dict(zip(self._trial.rows, self._trial.expected_s, strict=True))
        end_s = math.inf
        for row, request in enumerate(requests_of(self._trial.job.load)):
            if request.arrival_s > end_s:
                return
            if self.pipe is None and row in expected_s:
                self._fork(row)
                if self.pipe is not None:
                    end_s = request.arrival_s + _PATIENCE * expected_s[row] + _PATIENCE_S
                elif row == self._trial.rows[-1]:
                    return
            yield request

    def _fork(self, row: int) -> None:
        """Comes back in the fork at once, and here when that has ended."""
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            os.close(reader)
            self.pipe, self._forced.row = writer, row
            return
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            said = pipe.read()
        _, status = os.waitpid(child, 0)
        if status:
            raise RuntimeError(f"the fork that let in request {row} died: status {status}")
        self.came.append(pickle.loads(said))


def verdicts(ran: Ran, came: Sequence[LetIn]) -> list[Verdict]:
    """For all reasons together, then for each that occurred; none where nothing was tried."""
    if not came:
        return []
    refusals = ran.refusals
    at = np.searchsorted(refusals.rows, [each.row for each in came])
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
