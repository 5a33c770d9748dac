"""Replays a stretch of a log over the event heap, as decided, and with samples of the refused let in.

*As decided*: the accepted requests alone, none refused. Beside them, each in a run of its own, thin samples of the
refused, drawn without putting back. For each of a sample, accepted requests behind it go that have as many prompt
tokens: a coordinator that takes one more refuses others for it, and in a queue that never empties the work of every
sampled request would stay for all that follow. Nor may the policy decide anew: what it accepts after the first of a
sample is not what it accepted then, and the next of the sample meets a cluster that would not have refused it. So each
refused request meets the cluster that it was refused by, and whether it meets its targets there is what its refusal is
judged by. The interval takes all that were tried as independent.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from loadtest.metrics import wilson
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from simulator.rejects.summary import NO_CLASS
from simulator.study.metrics import request_latencies

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from loadtest.metrics import Interval
    from simulator.heap.results import StudyResult
    from simulator.rejects.rebuild import Asked, Rebuilt
    from simulator.study.metrics import RequestLatencies


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplaySettings:
    #: Runs with samples, and the size of each as a share of the accepted requests.
    num_samples: int = 8
    share: float = 0.01
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """On the refusals of one kind."""

    slo_class: str
    reason: str
    num_refused: int
    num_tried: int
    #: Of these: met both targets.
    num_met: int

    @property
    def share(self) -> float:
        return self.num_met / self.num_tried if self.num_tried else math.nan

    @property
    def interval(self) -> Interval:
        """Of the share, 95 %."""
        return wilson(self.share, self.num_tried)


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
    #: Share of the accepted that met their targets: as decided, and beside the samples.
    accepted_met: float
    accepted_met_beside: float
    #: Share of these requests that the same policy refuses where the replay lets it decide.
    refused_again: float
    calibration: Calibration


def replay(
    rebuilt: Rebuilt,
    settings: ReplaySettings,
    run: Callable[[Rebuilt, Sequence[Asked], bool], StudyResult] | None = None,
) -> Replayed:
    """Equal arguments give equal results. `run` simulates some of the requests, all of them forced or none. Raises
    ValueError where nothing was accepted nor refused."""
    run = run or run_requests
    accepted = [each for each in rebuilt.requests if each.is_accepted]
    refused = [each for each in rebuilt.requests if not each.is_accepted]
    if not rebuilt.requests:
        raise ValueError("nothing to replay")
    met_alone, calibration = math.nan, _NOTHING_KNOWN
    if accepted:
        result = run(rebuilt, accepted, True)
        latencies = request_latencies(result, rebuilt.slos)
        met_alone = float(latencies.met.mean())
        calibration = _calibrate(accepted, latencies)
    size = max(1, round(settings.share * len(accepted)))
    order = random.Random(settings.seed).sample(refused, len(refused))
    samples = [order[at : at + size] for at in range(0, len(order), size)][: settings.num_samples]
    tried: list[tuple[Asked, bool]] = []
    met_beside: list[float] = []
    for sample in samples:
        requests = beside(sample, rebuilt.requests)
        met = request_latencies(run(rebuilt, requests, True), rebuilt.slos).met
        chosen = {id(each) for each in sample}
        is_sample = np.array([id(each) in chosen for each in requests])
        tried += [(each, bool(was_met)) for each, was_met in zip(requests, met, strict=True) if id(each) in chosen]
        if len(sample) < len(requests):
            met_beside.append(float(met[~is_sample].mean()))
    again = run(rebuilt, rebuilt.requests, False).requests.outcome
    return Replayed(
        num_accepted=len(accepted),
        num_refused=len(refused),
        overall=_verdict("all", "", refused, tried),
        verdicts=_verdicts(refused, tried),
        accepted_met=met_alone,
        accepted_met_beside=float(np.mean(met_beside)) if met_beside else math.nan,
        refused_again=float((again == Outcome.REJECTED).mean()),
        calibration=calibration,
    )


def beside(sample: Sequence[Asked], requests: Sequence[Asked]) -> list[Asked]:
    """The sample and the accepted ones, in order, without those that go for it."""
    chosen = {id(each) for each in sample}
    kept: list[Asked] = []
    owed_tokens = 0
    for each in requests:
        tokens = each.workload.prompt_tokens
        if id(each) in chosen:
            owed_tokens += tokens
        elif not each.is_accepted:
            continue
        elif 2 * owed_tokens > tokens:
            # Rounded to whole requests; what is too much counts for the next.
            owed_tokens -= tokens
            continue
        kept.append(each)
    return kept


def run_requests(
    rebuilt: Rebuilt,
    requests: Sequence[Asked],
    forced: bool,
    progress: Callable[[float, int], None] | None = None,
) -> StudyResult:
    """Requests in order of arrival; `progress` as `simulate` has it."""
    spec = replace(rebuilt.spec, forced=frozenset(range(len(requests))) if forced else frozenset())
    return simulate(spec, (each.workload for each in requests), progress=progress)


_NOTHING_KNOWN = Calibration(
    num_requests=0, ttft_median_s=math.nan, ttft_p90_abs_s=math.nan, tpot_median_s=math.nan, tpot_p90_abs_s=math.nan
)


def _verdicts(refused: Sequence[Asked], tried: Sequence[tuple[Asked, bool]]) -> tuple[Verdict, ...]:
    strata = sorted({_stratum(each) for each in refused})
    return tuple(
        _verdict(
            *stratum,
            [each for each in refused if _stratum(each) == stratum],
            [(each, met) for each, met in tried if _stratum(each) == stratum],
        )
        for stratum in strata
    )


def _stratum(asked: Asked) -> tuple[str, str]:
    return asked.last.slo_class or NO_CLASS, asked.last.outcome


def _verdict(slo_class: str, reason: str, refused: Sequence[Asked], tried: Sequence[tuple[Asked, bool]]) -> Verdict:
    return Verdict(
        slo_class=slo_class,
        reason=reason,
        num_refused=len(refused),
        num_tried=len(tried),
        num_met=sum(met for _, met in tried),
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
