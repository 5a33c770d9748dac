"""Replays a stretch of a log over the event heap, as decided, and lets in some of the refused, each alone.

*As decided*: the accepted requests come and none is refused. Just before a refused one that is tried would have come,
the replay branches: there it is let in, while the replay itself goes on without it (`simulator.study.branches`). So
each meets the cluster that it was refused by, and whether it meets its targets there is what its refusal is judged by.

In its branch others go on arriving until it must have ended to meet its targets, so the verdict is the same as with all
of them. What comes after the log's end is not known: for the last refusals of a stretch, fewer arrive than did.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import numpy as np

from loadtest.metrics import wilson
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from simulator.rejects.sample import by_kind, draw
from simulator.study.branches import Trial, simulate_with_branches
from simulator.study.metrics import request_latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from loadtest.metrics import Interval
    from simulator.heap.results import StudyResult
    from simulator.rejects.rebuild import Asked, Rebuilt
    from simulator.study.branches import Fate
    from simulator.study.metrics import RequestLatencies


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    #: Refused requests that are tried.
    num_tried: int = 200
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """On the refusals of one kind, or on all."""

    slo_class: str
    reason: str
    num_refused: int
    num_tried: int
    #: Of these: met both targets.
    num_met: int
    #: Of the refused, that would have met them, and its 95 % interval: each that was tried counts as independent, and
    #: for as many as it stands for. NaN where none was tried.
    share: float
    interval: Interval


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """What the coordinator expected of accepted requests, less what the replay saw: seconds; NaN where nothing is
    known."""

    num_requests: int
    ttft_median_s: float
    ttft_p90_abs_s: float
    tpot_median_s: float
    tpot_p90_abs_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Replayed:
    num_accepted: int
    num_refused: int
    #: All refusals together, and by class and reason.
    overall: Verdict
    verdicts: tuple[Verdict, ...]
    #: Share of the accepted that met their targets, as decided.
    accepted_met: float
    #: Share of these requests that the same policy refuses where the replay lets it decide.
    refused_again: float
    calibration: Calibration


class Cluster(Protocol):
    """Where a replay runs."""

    def follow(self, rebuilt: Rebuilt, tried: Sequence[Asked]) -> tuple[StudyResult, list[Fate]]:
        """The accepted requests, none refused, and the fates of refused ones, by their places in `rebuilt.requests`."""
        ...

    def decide(self, rebuilt: Rebuilt) -> StudyResult:
        """All requests; the policy decides."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedCluster:
    """The event heap, with up to so many processes beside this one."""

    max_branches: int = 1
    progress: Callable[[float, int], None] | None = None

    def follow(self, rebuilt: Rebuilt, tried: Sequence[Asked]) -> tuple[StudyResult, list[Fate]]:
        chosen = {id(each) for each in tried}
        slos = {slo.name: slo for slo in rebuilt.slos}
        trials: list[Trial] = []
        for index, each in enumerate(rebuilt.requests):
            if id(each) in chosen:
                targets, request = slos[each.workload.slo_class], each.workload
                # Longer than that, and one of the targets is missed.
                longest_s = (targets.ttft_ms + targets.tpot_ms * request.output_tokens) / 1e3
                trials.append(Trial(index=index, patience_s=min(longest_s, rebuilt.spec.request_timeout_s)))
        return simulate_with_branches(
            replace(rebuilt.spec, forced=frozenset(range(len(rebuilt.requests)))),
            (each.workload for each in rebuilt.requests),
            trials,
            rebuilt.slos,
            passed_over=frozenset(index for index, each in enumerate(rebuilt.requests) if not each.is_accepted),
            max_branches=self.max_branches,
            progress=self.progress,
        )

    def decide(self, rebuilt: Rebuilt) -> StudyResult:
        return simulate(rebuilt.spec, (each.workload for each in rebuilt.requests), progress=self.progress)


def replay(rebuilt: Rebuilt, settings: ReplaySettings, cluster: Cluster | None = None) -> Replayed:
    """Equal arguments give equal results. Raises ValueError where nothing was accepted nor refused."""
    if not rebuilt.requests:
        raise ValueError("nothing to replay")
    cluster = cluster or SimulatedCluster()
    accepted = [each for each in rebuilt.requests if each.is_accepted]
    refused = [each for each in rebuilt.requests if not each.is_accepted]
    result, fates = cluster.follow(rebuilt, draw(refused, settings.num_tried, settings.seed))
    latencies = request_latencies(result, rebuilt.slos)
    again = cluster.decide(rebuilt).requests.outcome
    met = {id(rebuilt.requests[fate.index]): fate.met for fate in fates}
    verdicts = tuple(_verdict(*kind, members, met) for kind, members in by_kind(refused).items())
    return Replayed(
        num_accepted=len(accepted),
        num_refused=len(refused),
        overall=_overall(verdicts),
        verdicts=verdicts,
        accepted_met=float(latencies.met.mean()) if accepted else math.nan,
        refused_again=float((again == Outcome.REJECTED).mean()),
        calibration=_calibrate(accepted, latencies),
    )


def _verdict(slo_class: str, reason: str, refused: Sequence[Asked], met: dict[int, bool]) -> Verdict:
    """`met` of those tried, by identity."""
    tried = [met[id(each)] for each in refused if id(each) in met]
    share = sum(tried) / len(tried) if tried else math.nan
    return Verdict(
        slo_class=slo_class,
        reason=reason,
        num_refused=len(refused),
        num_tried=len(tried),
        num_met=sum(tried),
        share=share,
        interval=wilson(share, len(tried)),
    )


def _overall(verdicts: Sequence[Verdict]) -> Verdict:
    """Small kinds are tried more than their part: each counts for what it has of all. The interval is that of as many
    equal trials as these are worth (Kish's effective sample size)."""
    known = [each for each in verdicts if each.num_tried]
    num_known = sum(each.num_refused for each in known)
    share = sum(each.share * each.num_refused for each in known) / num_known if known else math.nan
    worth = num_known**2 / sum(each.num_refused**2 / each.num_tried for each in known) if known else 0
    return Verdict(
        slo_class="all",
        reason="",
        num_refused=sum(each.num_refused for each in verdicts),
        num_tried=sum(each.num_tried for each in verdicts),
        num_met=sum(each.num_met for each in verdicts),
        share=share,
        interval=wilson(share, worth),
    )


def _calibrate(accepted: Sequence[Asked], latencies: RequestLatencies) -> Calibration:
    """Of those that finished."""
    predicted = [each.last.predicted if each.last.is_placed else None for each in accepted]
    ttft_s = np.array([math.nan if each is None else each.ttft_s for each in predicted]) - latencies.ttft_s
    tpot_s = np.array([math.nan if each is None else each.tpot_s for each in predicted]) - latencies.tpot_s
    ttft_s, tpot_s = _known(ttft_s, latencies), _known(tpot_s, latencies)
    return Calibration(
        num_requests=len(ttft_s),
        ttft_median_s=_quantile(ttft_s, 0.5),
        ttft_p90_abs_s=_quantile(np.abs(ttft_s), 0.9),
        tpot_median_s=_quantile(tpot_s, 0.5),
        tpot_p90_abs_s=_quantile(np.abs(tpot_s), 0.9),
    )


def _known(errors_s: NDArray[np.float64], latencies: RequestLatencies) -> NDArray[np.float64]:
    return errors_s[latencies.finished & np.isfinite(errors_s)]


def _quantile(values: NDArray[np.float64], share: float) -> float:
    return float(np.quantile(values, share)) if len(values) else math.nan
