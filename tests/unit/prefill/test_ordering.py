"""The orders of waiting prompts, and the queue in which they wait."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.requests import MOST_PRIORITY
from prefill.ordering import UNHURRIED_AGEINGS, OrderName, QueueRules, longest_span_s, place_of
from prefill.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Sequence

AGEING_S = 10.0
MAX_TOKENS = 4096
MAX_PRIORITY = 3
ORDERS: tuple[OrderName, ...] = get_args(OrderName)


@dataclass(frozen=True, slots=True)
class Ask:
    name: int
    received_s: float
    tokens: int = 100
    due_in_s: float | None = None
    priority: int = 0
    read_s: float = 0.0


def rules(order: OrderName) -> QueueRules:
    return QueueRules(order=order, ageing_s=AGEING_S)


def queue_of(order: OrderName, asks: Sequence[Ask]) -> WaitingQueue[Ask]:
    queue: WaitingQueue[Ask] = WaitingQueue(rules(order))
    for ask in asks:
        add(queue, ask)
    return queue


def add(queue: WaitingQueue[Ask], ask: Ask) -> None:
    queue.add(
        ask,
        tokens=ask.tokens,
        received_s=ask.received_s,
        due_s=None if ask.due_in_s is None else ask.received_s + ask.due_in_s,
        read_s=ask.read_s,
        priority=ask.priority,
    )


def served(queue: WaitingQueue[Ask], now_s: float) -> list[Ask]:
    """All of them, taken at one time."""
    order: list[Ask] = []
    while queue:
        order.append(queue.first(now_s))
        assert queue.discard(order[-1])
    return order


def names(asks: Sequence[Ask]) -> list[int]:
    return [ask.name for ask in asks]


@st.composite
def _asks(draw: st.DrawFn) -> list[Ask]:
    gaps_s = draw(st.lists(st.floats(0, 60), max_size=30))
    asks: list[Ask] = []
    received_s = 0.0
    for name, gap_s in enumerate(gaps_s):
        received_s += gap_s
        asks.append(
            Ask(
                name,
                received_s,
                tokens=draw(st.integers(1, MAX_TOKENS)),
                due_in_s=draw(st.none() | st.floats(-20, 200)),
                priority=draw(st.integers(0, MAX_PRIORITY) | st.integers(-(2**31), 2**31)),
                read_s=draw(st.floats(0, 10)),
            )
        )
    return asks


@given(_asks(), st.sampled_from(ORDERS))
def test_everybody_is_served_exactly_once(asks: list[Ask], order: OrderName) -> None:
    queue = queue_of(order, asks)
    assert queue.num_tokens == sum(ask.tokens for ask in asks)
    assert sorted(names(served(queue, 1e9))) == names(asks)
    assert (len(queue), queue.num_tokens) == (0, 0)


@given(_asks())
def test_first_come_first_served_is_the_order_of_arrival(asks: list[Ask]) -> None:
    alike = [replace(ask, priority=0) for ask in asks]
    assert names(served(queue_of("fcfs", alike), 1e9)) == names(alike)


@given(_asks())
def test_without_targets_the_earliest_deadline_is_the_earliest_arrival(asks: list[Ask]) -> None:
    alike = [replace(ask, priority=0, due_in_s=None) for ask in asks]
    assert names(served(queue_of("edf", alike), 1e9)) == names(alike)


@given(_asks(), st.sampled_from(ORDERS), st.lists(st.floats(0, 30), min_size=30, max_size=30))
def test_nobody_is_passed_by_what_came_much_later(asks: list[Ask], order: OrderName, pauses_s: list[float]) -> None:
    """Prompts come and are served as time goes on; each is passed only by those of a bounded span behind it."""
    most = max((ask.priority for ask in asks), default=0)
    least = min((ask.priority for ask in asks), default=0)
    span_s = longest_span_s(rules(order), max_tokens=MAX_TOKENS, priorities=most - least)
    assert span_s <= longest_span_s(rules(order), max_tokens=MAX_TOKENS)
    queue: WaitingQueue[Ask] = WaitingQueue(rules(order))
    coming, now_s = list(asks), 0.0
    pauses = iter(pauses_s)
    while coming or queue:
        now_s += next(pauses, 1.0)
        while coming and (coming[0].received_s <= now_s or not queue):
            now_s = max(now_s, coming[0].received_s)
            add(queue, coming.pop(0))
        first = queue.first(now_s)
        assert first.received_s - queue.oldest().received_s <= span_s + 1e-6
        queue.discard(first)


@given(_asks(), st.sampled_from(ORDERS), st.data())
def test_who_leaves_early_changes_nothing_for_the_others(
    asks: list[Ask], order: OrderName, data: st.DataObject
) -> None:
    queue = queue_of(order, asks)
    for ask in data.draw(st.lists(st.sampled_from(asks), unique=True)) if asks else []:
        assert queue.discard(ask)
        assert not queue.discard(ask)
        assert ask not in queue
        asks = [other for other in asks if other is not ask]
    expected = served(queue_of(order, asks), 50.0)
    assert queue.num_tokens == sum(ask.tokens for ask in asks)
    assert served(queue, 50.0) == expected


@given(st.lists(st.booleans(), max_size=300))
def test_what_left_is_not_kept(stays: list[bool]) -> None:
    """A queue whose head is stuck forgets those that are cancelled behind it."""
    queue = queue_of("fcfs", [Ask(-1, 0.0)])
    asks = [Ask(number, 1.0) for number in range(len(stays))]
    for ask, stay in zip(asks, stays, strict=True):
        add(queue, ask)
        if not stay:
            queue.discard(ask)
    held = sum(len(line.heap) for line in queue._lines.values())  # pyright: ignore[reportPrivateUsage]
    assert held <= 2 * len(queue) + 33


def test_shortest_counts_ageing_as_half_the_tokens() -> None:
    asks = [Ask(0, 0.0, tokens=1024), Ask(1, 9.9, tokens=512), Ask(2, 10.1, tokens=512), Ask(3, 12.0, tokens=64)]
    assert names(served(queue_of("shortest", asks), 20.0)) == [3, 1, 0, 2]


def test_the_first_token_due_next_comes_first_and_no_target_is_a_late_one() -> None:
    unhurried_s = UNHURRIED_AGEINGS * AGEING_S
    asks = [
        Ask(0, 0.0),
        Ask(1, 1.0, due_in_s=30.0),
        Ask(2, 2.0, due_in_s=5.0),
        Ask(3, 3.0, due_in_s=10 * unhurried_s),
        Ask(4, 4.0, due_in_s=unhurried_s - 4.5),
    ]
    assert names(served(queue_of("edf", asks), 4.0)) == [2, 1, 4, 0, 3]


def test_who_cannot_be_in_time_any_more_goes_behind_those_who_can() -> None:
    asks = [Ask(0, 0.0, due_in_s=5.0, read_s=2.0), Ask(1, 1.0, due_in_s=8.0), Ask(2, 2.0, due_in_s=59.0)]
    assert names(served(queue_of("edf", asks), 3.0)) == [0, 1, 2]
    assert names(served(queue_of("edf", asks), 3.1)) == [1, 0, 2], "late, it counts as due after six ageing times"
    assert names(served(queue_of("edf", asks), 9.1)) == [0, 1, 2]


def test_one_priority_is_worth_one_ageing() -> None:
    asks = [Ask(0, 0.0), Ask(1, 9.9, priority=1), Ask(2, 10.1, priority=1), Ask(3, 19.0, priority=2)]
    for order in ORDERS:
        assert names(served(queue_of(order, asks), 20.0)) == [3, 1, 0, 2]


@pytest.mark.parametrize("order", ORDERS)
def test_whoever_asks_for_most_cannot_keep_others_waiting(order: OrderName) -> None:
    """One client after the other of the same tenant asks to be first of all, once a second."""
    queue = queue_of(order, [Ask(0, 0.0, due_in_s=0.5), Ask(1, 0.0, due_in_s=0.5, priority=2**31)])
    most_s = int(AGEING_S * (UNHURRIED_AGEINGS + MOST_PRIORITY))
    turns: list[int] = []
    for now_s in range(1, most_s + 3):
        turns.append(queue.first(now_s).name)
        queue.discard(queue.first(now_s))
        add(queue, Ask(now_s + 1, now_s, due_in_s=0.5, priority=2**31))
    assert 0 in turns


@given(
    st.sampled_from(ORDERS),
    st.floats(0, 1e6),
    st.integers(1, MAX_TOKENS),
    st.none() | st.floats(-1e3, 1e6),
    st.integers(-5, 5),
)
def test_being_late_never_helps(
    order: OrderName, received_s: float, tokens: int, due_s: float | None, priority: int
) -> None:
    place = place_of(rules(order), received_s=received_s, tokens=tokens, due_s=due_s, priority=priority)
    assert place.late_key >= place.key
    assert all(map(math.isfinite, (place.key, place.late_key)))


@given(st.sampled_from(ORDERS), st.integers(1, MAX_TOKENS), st.lists(st.integers(-5, 5), min_size=2))
def test_a_higher_priority_never_hurts(order: OrderName, tokens: int, priorities: list[int]) -> None:
    places = [
        place_of(rules(order), received_s=7.0, tokens=tokens, due_s=9.0, priority=priority)
        for priority in sorted(priorities)
    ]
    assert all(higher.key <= lower.key for lower, higher in pairwise(places))


@pytest.mark.parametrize("ageing_s", [0.0, -1.0, math.inf, math.nan])
def test_ageing_is_a_time(ageing_s: float) -> None:
    with pytest.raises(ValueError, match="ageing_s"):
        QueueRules(ageing_s=ageing_s)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.inf, math.nan])
def test_weights_are_shares(weight: float) -> None:
    with pytest.raises(ValueError, match="weight of tenant 'a'"):
        QueueRules(tenant_weights={"a": weight})
