"""The jobs of `benchmarks.policies`, on all cores."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from benchmarks.policies_refusals import let_in, parts
from benchmarks.policies_runs import TPOT_TARGETS_S, Job, Load, Ran, run

if TYPE_CHECKING:
    from collections.abc import Iterable
    from concurrent.futures import Future, ProcessPoolExecutor

    from contracts.config import AdmissionForm, DispatchPolicyName
    from simulator.study.branches import Fate

FORMS: tuple[AdmissionForm, ...] = ("none", "current", "predicted")
JUDGING_FORMS: tuple[AdmissionForm, ...] = ("current", "predicted")
#: Figures are those of the looser target; the table of the policies has both.
TPOT_TARGET_S = TPOT_TARGETS_S[1]


class Runner:
    """Runs jobs on all cores; equal jobs once."""

    def __init__(self, pool: ProcessPoolExecutor, num_processes: int) -> None:
        self._pool = pool
        self._num_processes = num_processes
        self._ran: dict[Job, Future[Ran]] = {}

    def prepare(self, jobs: Iterable[Job]) -> None:
        """Begins with them, and does not wait."""
        for job in jobs:
            if job not in self._ran:
                self._ran[job] = self._pool.submit(run, job)

    def all(self, jobs: Iterable[Job]) -> list[Ran]:
        jobs = list(jobs)
        self.prepare(jobs)
        return [self._ran[job].result() for job in jobs]

    def let_in(self, ran: Ran, sample: int) -> list[Future[list[Fate]]]:
        """Begins with a sample of the refused, and does not wait."""
        return [self._pool.submit(let_in, part) for part in parts(ran, sample, 2 * self._num_processes, seed=1)]


def job_at(load: Load, factor: float, policy: DispatchPolicyName, form: AdmissionForm = "none") -> Job:
    """At a multiple of the load."""
    return Job(load=replace(load, speed=load.speed * factor), policy=policy, form=form, tpot_target_s=TPOT_TARGET_S)
