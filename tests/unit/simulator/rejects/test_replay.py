"""How refusals are judged, with a cluster that is told what it does."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from contracts.messages import Predicted
from simulator.heap.results import Outcome
from simulator.rejects.rebuild import Asked, Rebuilt, rebuild
from simulator.rejects.replay import ReplaySettings, replay, run_requests
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
    asked: list[tuple[list[str], bool]] = field(default_factory=list[tuple[list[str], bool]])

    def run(self, rebuilt: Rebuilt, requests: Sequence[Asked], forced: bool) -> StudyResult:
        names = [each.last.request for each in requests]
        self.asked.append((names, forced))
        result = run_requests(rebuilt, requests, True)
        rows = result.requests
        late = np.array([name.startswith("late") for name in names])
        first_token_s = rows.arrival_s + np.where(late, 1.0, 0.1)
        outcome = np.full(len(names), Outcome.FINISHED, np.int8)
        if not forced:
            outcome[: self.refuses] = Outcome.REJECTED
        finished_s = first_token_s + 0.02 * (rows.output_tokens - 1)
        changed = replace(rows, first_token_s=first_token_s, finished_s=finished_s, outcome=outcome)
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


def test_each_refused_request_is_tried_at_most_once_beside_all_accepted_ones() -> None:
    refused = [(f"{'late' if number % 4 else 'fine'}{number}", "ttft") for number in range(20)]
    told = Told(refuses=6)
    result = replay(rebuilt_of(accepted=30, refused=refused), ReplaySettings(num_samples=3, share=0.1), told.run)
    alone, *samples, again = told.asked
    accepted = {f"ok{number}" for number in range(30)}
    assert (set(alone[0]), alone[1]) == (accepted, True)
    assert (len(again[0]), again[1]) == (50, False)
    tried = [set(names) - accepted for names, _ in samples]
    assert all(forced for _, forced in samples)
    assert [len(each) for each in tried] == [3, 3, 3]
    names = {name for each in tried for name in each}
    assert len(names) == 9
    overall = result.overall
    assert (overall.num_refused, overall.num_tried) == (20, 9)
    assert overall.num_met == sum(name.startswith("fine") for name in names)
    assert overall.interval.low <= overall.share <= overall.interval.high
    assert (result.accepted_met, result.accepted_met_beside) == (1.0, 1.0)
    assert result.refused_again == 6 / 50


def test_for_each_that_is_let_in_as_many_tokens_behind_it_go() -> None:
    told = Told()
    made = rebuild(
        stretch(
            decision("before", at_s=0.0, prompt_tokens=100),
            decision("in", at_s=1.0, prompt_tokens=250, outcome="ttft"),
            decision("large", at_s=2.0, prompt_tokens=600),
            decision("first", at_s=3.0, prompt_tokens=200),
            decision("second", at_s=4.0, prompt_tokens=90),
            decision("third", at_s=5.0, prompt_tokens=90),
            decision("out", at_s=6.0, prompt_tokens=5, outcome="ttft"),
            decision("fourth", at_s=7.0, prompt_tokens=10),
        )
    )
    replay(made, ReplaySettings(num_samples=2, share=0.01), told.run)
    by_sample = {("in" in names): names for names, _ in told.asked[1:-1]}
    # 250 are owed: 600 would be too many, 200 go, then one of 90, of which 40 were too many.
    assert by_sample[True] == ["before", "in", "large", "third", "fourth"]
    assert by_sample[False] == ["before", "large", "first", "second", "third", "out", "fourth"]


def test_all_are_tried_where_they_are_few_and_verdicts_go_by_reason() -> None:
    refused = [("late", "ttft"), ("fine1", "ttft"), ("fine2", "tpot"), ("fine3", "tpot")]
    result = replay(rebuilt_of(accepted=10, refused=refused), ReplaySettings(num_samples=8, share=0.01), Told().run)
    assert [
        (each.slo_class, each.reason, each.num_refused, each.num_tried, each.num_met) for each in result.verdicts
    ] == [
        ("x", "tpot", 2, 2, 2),
        ("x", "ttft", 2, 2, 1),
    ]
    assert (result.overall.num_tried, result.overall.share) == (4, 0.75)


def test_predictions_are_held_against_what_came() -> None:
    errors = replay(rebuilt_of(accepted=5, refused=()), ReplaySettings(), Told().run).calibration
    assert errors.num_requests == 5
    assert errors.ttft_median_s == pytest.approx(0.1)
    assert errors.ttft_p90_abs_s == pytest.approx(0.1)


def test_nothing_refused_and_nothing_accepted_are_no_reason_to_fail() -> None:
    settings = ReplaySettings(num_samples=2, share=0.5)
    calm = replay(rebuilt_of(accepted=5, refused=()), settings, Told().run)
    assert (calm.num_refused, calm.overall.num_tried, calm.verdicts) == (0, 0, ())
    assert math.isnan(calm.overall.share)
    closed = replay(rebuilt_of(accepted=0, refused=[("fine", "full"), ("late", "full")]), settings, Told().run)
    assert (closed.num_accepted, closed.overall.num_tried, closed.overall.num_met) == (0, 2, 1)
    assert math.isnan(closed.accepted_met)
    with pytest.raises(ValueError, match="nothing to replay"):
        replay(rebuilt_of(accepted=0, refused=()), settings, Told().run)


def test_samples_follow_from_the_seed() -> None:
    refused = [(f"fine{number}", "ttft") for number in range(50)]
    made = rebuilt_of(accepted=10, refused=refused)

    def asked(seed: int) -> list[tuple[list[str], bool]]:
        told = Told()
        replay(made, ReplaySettings(num_samples=2, share=0.2, seed=seed), told.run)
        return told.asked

    assert asked(1) == asked(1) != asked(2)
    assert HEADER.default_slo is None
