"""Plans: numbering, what is asked of whom, rounds, warm-up."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.plan import Plan, num_turns, warmup_items
from workload.chats import Chat, ChatTurn
from workload.request import WorkloadRequest

TURNS = st.lists(st.builds(ChatTurn, st.integers(1, 50), st.integers(1, 50), st.floats(0, 9)), min_size=1, max_size=4)
CHATS = st.builds(Chat, st.floats(0, 100), TURNS.map(tuple), st.integers(0, 3), st.integers(0, 64))
LONE = st.builds(WorkloadRequest, st.floats(0, 100), st.integers(1, 500), st.integers(1, 50))
ITEMS = st.lists(LONE | CHATS, min_size=1, max_size=30)


@given(ITEMS)
def test_requests_are_numbered_without_gaps(items: list[WorkloadRequest | Chat]) -> None:
    plan = Plan.of(items)
    indices = [
        plan.record(item, turn).index for item, asked in enumerate(plan.items) for turn in range(num_turns(asked))
    ]
    assert indices == list(range(plan.num_requests))


@given(ITEMS, st.integers(1, 8))
def test_rounds_cover_every_item_once_in_order(items: list[WorkloadRequest | Chat], num_rounds: int) -> None:
    plan = Plan.of(items)
    if num_rounds > len(items):
        with pytest.raises(ValueError, match="do not make"):
            plan.rounds(num_rounds)
        return
    rounds = plan.rounds(num_rounds)
    assert [item for each in rounds for item in each] == list(range(len(items)))
    assert max(map(len, rounds)) - min(map(len, rounds)) <= 1


def test_a_record_says_what_was_planned() -> None:
    chat = Chat(
        2.0, (ChatTurn(10, 5), ChatTurn(7, 3, 1.0)), system_prompt=1, system_prompt_tokens=100, slo_class="slow"
    )
    plan = Plan.of(
        [WorkloadRequest(0.0, 30, 4), chat],
        num_warmup_items=1,
        cancel_after=lambda index, tokens: tokens - 1 if index == 2 else None,
    )
    first, opening, second = plan.record(0, 0), plan.record(1, 0), plan.record(1, 1)
    assert (first.is_warmup, opening.is_warmup, second.is_warmup) == (True, False, False)
    assert (first.prompt_tokens, opening.prompt_tokens, second.prompt_tokens) == (30, 110, 100 + 10 + 5 + 7)
    assert (first.cancel_after_tokens, opening.cancel_after_tokens, second.cancel_after_tokens) == (None, None, 2)
    assert second.slo_class == "slow"


def test_warmup_must_leave_something() -> None:
    with pytest.raises(ValueError, match="leave none of 2"):
        Plan.of([WorkloadRequest(0.0, 1, 1)] * 2, num_warmup_items=2)


def test_warmup_by_number_and_by_time() -> None:
    items = [WorkloadRequest(time_s, 1, 1) for time_s in (3.0, 4.0, 5.5, 9.0)]
    assert warmup_items(items, first=3, until_s=None) == 3
    assert warmup_items(items, first=None, until_s=2.0) == 2
    assert warmup_items(items, first=None, until_s=None) == 0
