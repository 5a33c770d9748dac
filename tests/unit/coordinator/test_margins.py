"""Predictions may reach less of a target that too many accepted requests missed."""

from __future__ import annotations

import random
from collections import deque
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.messages import TtftTally
from coordinator.conductor import AdmissionRule, ConductorSettings
from coordinator.decision import Refused
from coordinator.margins import LEAST, STEP, Margins
from tests.support.conductors import conductor_of, item_of
from workload.slo import SloClass

if TYPE_CHECKING:
    from contracts.config import AdmissionForm

SLO = SloClass("interactive", 1000.0, 100.0)


def margins(miss_share: float = 0.05, ttft_share: float = 1.0) -> Margins:
    return Margins(AdmissionRule(miss_share=miss_share, ttft_share=ttft_share), ["a", "b"])


def told(promised: float, count: int = 1, late: int = 0, slo_class: str = "a") -> TtftTally:
    return TtftTally(slo_class, TtftTally.of("", promised, is_late=False).promised, count, late)


def test_each_that_is_late_lowers_it_and_many_in_time_raise_it_again() -> None:
    made = margins()
    made.note(told(0.8, 10, 10))
    assert made.shares() == {"a": pytest.approx(1.0 - 10 * STEP * 0.95), "b": 1.0}
    made.note(told(0.1, 190))
    assert made.of("a") == pytest.approx(1.0)
    made.note(told(0.1, 10_000))
    assert made.of("a") == 1.0, "never more than the target"


def test_a_crowd_lowers_it_to_what_would_not_be_accepted_again() -> None:
    made = margins()
    made.note(told(0.9, 1000, 1000))
    assert made.of("a") == pytest.approx(0.9)
    made.note(told(0.95, 1000, 1000))
    assert made.of("a") == pytest.approx(0.9), "these would be refused by now"
    made.note(told(0.6, 1000, 1000))
    made.note(told(0.5, 1000, 1000))
    assert made.of("a") == LEAST
    lower = margins(ttft_share=0.8)
    lower.note(told(0.6, 1000, 1000))
    assert lower.of("a") == pytest.approx(0.75), "0.6 of the target is 0.75 of what the rule allows"


def test_who_was_late_although_nothing_was_in_his_way_says_nothing() -> None:
    made = margins()
    made.note(told(0.4, 50, 50))
    assert made.of("a") == 1.0


def test_predictions_can_be_taken_at_their_word() -> None:
    for rule in (AdmissionRule(miss_share=0.0), AdmissionRule(form="none")):
        made = Margins(rule, ["a"])
        made.note(told(0.9, 10, 10))
        assert made.shares() == {"a": 1.0}


@given(st.lists(st.tuples(*[st.integers(-(2**70), 2**70)] * 3), max_size=20))
def test_whatever_is_told_it_stays_within_its_bounds(counts: list[tuple[int, int, int]]) -> None:
    made = margins()
    for each in counts:
        made.note(TtftTally("a", *each))
        made.note(TtftTally("unheard of", *each))
    assert LEAST <= made.of("a") <= 1.0
    assert list(made.shares()) == ["a", "b"]


@pytest.mark.parametrize("noise", [0.1, 0.25])
@pytest.mark.parametrize("lag", [1, 75])
def test_so_many_are_late_in_the_end(noise: float, lag: int) -> None:
    """Predictions at the edge, half of them too good by chance, and outcomes that come `lag` requests later."""
    rng, made, late, coming = random.Random(7), margins(0.03), list[bool](), deque[TtftTally]()
    for _ in range(40_000):
        promised = made.of("a") * rng.uniform(0.9, 1.0)
        late.append(promised * rng.lognormvariate(0.0, noise) > 1.0)
        coming.append(TtftTally.of("a", promised, is_late=late[-1]))
        if len(coming) > lag:
            made.note(coming.popleft())
    assert sum(late[:100]) > 10
    assert sum(late[10_000:]) / 30_000 == pytest.approx(0.03, abs=0.012)


def refusal(num_late: int, form: AdmissionForm = "predicted") -> tuple[bool, str]:
    """Of a prompt that takes 879 ms, after so many that were late."""
    settings = ConductorSettings(admission=AdmissionRule(form=form))
    made = conductor_of(["p0", "d0"], slos=[SLO], settings=settings)
    made.margins.note(told(0.7, num_late, num_late, SLO.name))
    item = item_of(900, slo_class=SLO.name)
    decision = made.decide(item, 0.0)
    message = getattr(made.in_words(item, decision, 0.0), "message", "")
    return isinstance(decision, Refused), message


def test_requests_are_refused_by_it_and_told_so() -> None:
    assert refusal(0) == (False, "")
    is_refused, message = refusal(40)
    assert is_refused
    assert message.endswith("is above the 806 ms that its class allows, 81% of its target for now")
    assert refusal(40, form="none") == (False, "")
