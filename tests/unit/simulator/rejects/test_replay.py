"""How refusals are judged, with a cluster that is told what it does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.messages import Predicted
from loadtest.metrics import wilson
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from simulator.rejects.rebuild import Asked, Rebuilt, rebuild
from simulator.rejects.replay import ReplaySettings, SimulatedCluster, replay
from simulator.study.branches import Fate
from tests.support.decision_logs import HEADER, decision
from tests.unit.simulator.rejects.test_rebuild import stretch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from simulator.heap.results import StudyResult

PREDICTED = Predicted(waited_s=0.0, queue_s=0.0, transfer_s=0.0, prefill_s=0.2, ttft_s=0.2, tpot_s=0.03)


@dataclass(slots=True)
class Told:
    """Serves everybody; those whose ids begin with `late` miss their targets; refuses `refuses` on its own."""

    refuses: int = 0
    followed: list[str] = field(default_factory=list[str])
    tried: list[str] = field(default_factory=list[str])

    def follow(self, rebuilt: Rebuilt, tried: Sequence[Asked]) -> tuple[StudyResult, list[Fate]]:
        accepted = [each for each in rebuilt.requests if each.is_accepted]
        self.followed = [each.last.request for each in accepted]
        self.tried = [each.last.request for each in tried]
        fates = [
            Fate(index=index, ttft_s=0.1, tpot_s=0.02, met=not each.last.request.startswith("late"))
            for index, each in enumerate(rebuilt.requests)
            if each.last.request in self.tried
        ]
        return _served(rebuilt, accepted), fates

    def decide(self, rebuilt: Rebuilt) -> StudyResult:
        result = _served(rebuilt, rebuilt.requests)
        outcome = result.requests.outcome.copy()
        outcome[: self.refuses] = Outcome.REJECTED
        return replace(result, requests=replace(result.requests, outcome=outcome))


def _served(rebuilt: Rebuilt, requests: Sequence[Asked]) -> StudyResult:
    """First tokens after 0.1 s, the others every 20 ms; of those that are late, the first after 1 s."""
    spec = replace(rebuilt.spec, forced=frozenset(range(len(requests))))
    result = simulate(spec, (each.workload for each in requests))
    rows = result.requests
    late = np.array([each.last.request.startswith("late") for each in requests], np.bool_)
    first_token_s = rows.arrival_s + np.where(late, 1.0, 0.1)
    changed = replace(
        rows,
        first_token_s=first_token_s,
        finished_s=first_token_s + 0.02 * (rows.output_tokens - 1),
        outcome=np.full(len(requests), Outcome.FINISHED, np.int8),
    )
    return replace(result, requests=changed)


def rebuilt_of(*, accepted: int, refused: Sequence[tuple[str, str]]) -> Rebuilt:
    """`refused`: names and reasons."""
    return rebuild(
        stretch(
            *(
                decision(f"ok{number}", at_s=float(number), slo_class="x", predicted=PREDICTED)
                for number in range(accepted)
            ),
            *(
                decision(name, at_s=0.5 + number, slo_class="x", outcome=reason)
                for number, (name, reason) in enumerate(refused)
            ),
        )
    )


def test_accepted_requests_are_followed_and_some_of_the_refused_tried() -> None:
    refused = [(f"{'late' if number % 4 else 'fine'}{number}", "ttft") for number in range(20)]
    told = Told(refuses=6)
    result = replay(rebuilt_of(accepted=30, refused=refused), ReplaySettings(num_tried=9), told)
    assert told.followed == [f"ok{number}" for number in range(30)]
    assert len(set(told.tried)) == len(told.tried) == 9
    overall = result.overall
    assert (overall.num_refused, overall.num_tried) == (20, 9)
    assert overall.num_met == sum(name.startswith("fine") for name in told.tried)
    assert overall.share == overall.num_met / 9
    assert overall.interval == wilson(overall.share, 9)
    assert (result.num_accepted, result.accepted_met, result.refused_again) == (30, 1.0, 6 / 50)


def test_all_are_tried_where_they_are_few_and_verdicts_go_by_reason() -> None:
    refused = [("late", "ttft"), ("fine1", "ttft"), ("fine2", "tpot"), ("fine3", "tpot")]
    result = replay(rebuilt_of(accepted=10, refused=refused), ReplaySettings(num_tried=4), Told())
    assert [
        (each.slo_class, each.reason, each.num_refused, each.num_tried, each.num_met) for each in result.verdicts
    ] == [
        ("x", "tpot", 2, 2, 2),
        ("x", "ttft", 2, 2, 1),
    ]
    assert (result.overall.num_tried, result.overall.share) == (4, 0.75)


def test_a_kind_counts_for_what_it_has_of_all_refusals() -> None:
    """Of 90 right refusals 8 are tried and of 10 wrong ones 2: a tenth of them is wrong, not a fifth."""
    right = [(f"late{number}", "ttft") for number in range(90)]
    refused = [*right, *((f"fine{number}", "tpot") for number in range(10))]
    result = replay(rebuilt_of(accepted=5, refused=refused), ReplaySettings(num_tried=10), Told())
    tpot, ttft = result.verdicts
    assert (tpot.num_tried, tpot.share, ttft.num_tried, ttft.share) == (2, 1.0, 8, 0.0)
    overall = result.overall
    assert (overall.num_tried, overall.num_met) == (10, 2)
    assert overall.share == pytest.approx(0.1)
    worth = 100**2 / (90**2 / 8 + 10**2 / 2)
    assert overall.interval == wilson(overall.share, worth)
    assert worth < 10


def test_predictions_are_held_against_what_came() -> None:
    errors = replay(rebuilt_of(accepted=5, refused=()), ReplaySettings(), Told()).calibration
    assert errors.num_requests == 5
    assert errors.ttft_median_s == pytest.approx(0.1)
    assert errors.ttft_p90_abs_s == pytest.approx(0.1)


@pytest.mark.parametrize("cluster", [Told(), SimulatedCluster()])
def test_nothing_refused_and_nothing_accepted_are_no_reason_to_fail(cluster: Told | SimulatedCluster) -> None:
    settings = ReplaySettings(num_tried=2)
    calm = replay(rebuilt_of(accepted=5, refused=()), settings, cluster)
    assert (calm.num_refused, calm.overall.num_tried, calm.verdicts) == (0, 0, ())
    assert math.isnan(calm.overall.share)
    assert math.isnan(calm.overall.interval.low)
    closed = replay(rebuilt_of(accepted=0, refused=[("fine", "full"), ("too", "full")]), settings, cluster)
    assert (closed.num_accepted, closed.overall.num_tried, closed.overall.num_met) == (0, 2, 2)
    assert math.isnan(closed.accepted_met)
    with pytest.raises(ValueError, match="nothing to replay"):
        replay(rebuilt_of(accepted=0, refused=()), settings, cluster)


def test_those_that_are_tried_follow_from_the_seed() -> None:
    made = rebuilt_of(accepted=10, refused=[(f"fine{number}", "ttft") for number in range(50)])

    def tried(seed: int) -> list[str]:
        told = Told()
        replay(made, ReplaySettings(num_tried=10, seed=seed), told)
        return told.tried

    assert tried(1) == tried(1) != tried(2)
    assert HEADER.default_slo is None
