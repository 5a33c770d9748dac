"""Turns between tenants: the bound of virtual token counters under any pattern of arrivals."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefill.fairness import TokenCounters
from prefill.ordering import QueueRules
from prefill.waiting import WaitingQueue

TENANTS: tuple[str, ...] = ("a", "b", "c")
WEIGHTS = {"a": 1.0, "b": 2.0, "c": 0.5}
MAX_TOKENS = 100


@dataclass(frozen=True, slots=True, eq=False)
class Ask:
    tenant: str
    tokens: int
    #: Of these, how many must be computed, as is found when it is served.
    uncached_tokens: int


class Served:
    """A queue whose items come and are served, and what each tenant got."""

    def __init__(self, *, fair: bool = True, weights: dict[str, float] | None = None) -> None:
        self.queue: WaitingQueue[Ask] = WaitingQueue(QueueRules(order="fcfs", fair=fair, tenant_weights=weights or {}))
        self.tokens = dict.fromkeys(TENANTS, 0)
        self.waiting = dict.fromkeys(TENANTS, 0)
        self.num_events = 0

    def add(self, ask: Ask, priority: int = 0) -> None:
        self.num_events += 1
        self.waiting[ask.tenant] += 1
        self.queue.add(ask, tokens=ask.tokens, received_s=float(self.num_events), tenant=ask.tenant, priority=priority)

    def serve(self) -> Ask:
        ask = self.queue.first(1e6)
        self.queue.discard(ask)
        self.queue.charge(ask.tenant, ask.uncached_tokens)
        self.waiting[ask.tenant] -= 1
        self.tokens[ask.tenant] += ask.uncached_tokens
        return ask


@st.composite
def _ask(draw: st.DrawFn) -> Ask:
    tokens = draw(st.integers(1, MAX_TOKENS))
    return Ask(draw(st.sampled_from(TENANTS)), tokens, draw(st.integers(0, tokens)))


@given(st.lists(_ask() | st.none(), max_size=120), st.booleans())
def test_tenants_that_wait_all_the_time_get_the_same_by_weight(events: list[Ask | None], weighted: bool) -> None:
    """None serves the next one. For every pair, in every span in which both wait throughout, the difference stays
    within twice the largest prompt, whatever arrives."""
    weights = WEIGHTS if weighted else dict.fromkeys(TENANTS, 1.0)
    served = Served(weights=weights)
    bound = 2 * MAX_TOKENS / min(weights.values())
    #: By pair: what both had got when they began to wait together, and the extremes of the difference since.
    extremes: dict[tuple[str, str], tuple[float, float]] = {}
    for event in events:
        if event is not None:
            served.add(event)
        elif served.queue:
            served.serve()
        for one, other in combinations(TENANTS, 2):
            if not (served.waiting[one] and served.waiting[other]):
                extremes.pop((one, other), None)
                continue
            difference = served.tokens[one] / weights[one] - served.tokens[other] / weights[other]
            lowest, highest = extremes.get((one, other), (difference, difference))
            lowest, highest = min(lowest, difference), max(highest, difference)
            extremes[one, other] = (lowest, highest)
            assert highest - lowest <= bound


@given(st.lists(_ask(), max_size=60))
def test_it_works_as_long_as_anybody_waits(asks: list[Ask]) -> None:
    served = Served()
    for ask in asks:
        served.add(ask)
    assert {id(served.serve()) for _ in asks} == {id(ask) for ask in asks}
    assert (len(served.queue), served.queue.num_tokens) == (0, 0)


@given(st.lists(_ask() | st.none(), max_size=60), st.booleans())
def test_one_tenant_notices_nothing(events: list[Ask | None], fair: bool) -> None:
    served = Served(fair=fair)
    expected: list[Ask] = []
    for event in events:
        if event is not None:
            ask = Ask("a", event.tokens, event.uncached_tokens)
            expected.append(ask)
            served.add(ask)
        elif expected:
            assert served.serve() is expected.pop(0)


def test_two_to_one_by_weight() -> None:
    served = Served(weights={"a": 2.0})
    for _ in range(300):
        served.add(Ask("a", 10, 10))
        served.add(Ask("b", 10, 10))
    for _ in range(150):
        served.serve()
    assert served.tokens == {"a": 1000, "b": 500, "c": 0}


def test_a_flood_does_not_delay_the_others() -> None:
    served = Served()
    for _ in range(50):
        served.add(Ask("a", 10, 10))
    served.serve()
    served.add(Ask("b", 10, 10))
    assert "b" in {served.serve().tenant for _ in range(2)}


def test_without_fairness_a_flood_goes_first() -> None:
    served = Served(fair=False)
    for _ in range(50):
        served.add(Ask("a", 10, 10))
    served.add(Ask("b", 10, 10))
    assert [served.serve().tenant for _ in range(51)] == ["a"] * 50 + ["b"]


def test_a_pause_saves_nothing_up() -> None:
    """b asked for nothing while a got a thousand tokens: from its return on they take turns."""
    served = Served()
    for _ in range(110):
        served.add(Ask("a", 10, 10))
    for _ in range(100):
        served.serve()
    for _ in range(10):
        served.add(Ask("b", 10, 10))
    turns = [served.serve().tenant for _ in range(20)]
    assert (turns.count("a"), turns.count("b")) == (10, 10)
    assert turns[:6].count("a") == 3


def test_who_comes_to_an_empty_queue_begins_where_the_last_one_stopped() -> None:
    served = Served()
    for _ in range(100):
        served.add(Ask("a", 10, 10))
    for _ in range(100):
        served.serve()
    for _ in range(10):
        served.add(Ask("b", 10, 10))
        served.add(Ask("a", 10, 10))
    assert [served.serve().tenant for _ in range(6)].count("b") == 3


def test_cached_tokens_cost_nothing() -> None:
    served = Served()
    for _ in range(20):
        served.add(Ask("a", 100, 1))
        served.add(Ask("b", 100, 100))
    for _ in range(21):
        served.serve()
    assert served.tokens["a"] == 20
    assert served.tokens["b"] <= 200


def test_priorities_act_within_a_tenant() -> None:
    served = Served()
    urgent, patient = Ask("a", 10, 10), Ask("b", 10, 10)
    served.add(Ask("a", 10, 10))
    served.serve()
    served.add(patient)
    served.add(Ask("a", 10, 10))
    served.add(urgent, priority=100)
    order = [served.serve() for _ in range(3)]
    assert order.index(urgent) < 2
    assert next(ask for ask in order if ask.tenant == "a") is urgent
    assert order.index(patient) < 2, "another tenant's priority does not take its turn away"


def test_memory_of_tenants_is_bounded() -> None:
    counters = TokenCounters({}, max_remembered=3)
    for number in range(100):
        counters.wait(f"t{number}")
        counters.rest(f"t{number}")
        counters.charge(f"t{number}", 1 + number)
    known = [number for number in range(100) if counters.counter(f"t{number}")]
    assert known == [97, 98, 99]


def test_a_charge_is_not_negative() -> None:
    counters = TokenCounters({})
    counters.wait("a")
    with pytest.raises(ValueError, match="tenant 'a' cannot be charged -1 tokens"):
        counters.charge("a", -1)


@given(
    asks=st.lists(_ask(), max_size=30),
    weighted=st.booleans(),
    fair=st.booleans(),
    priorities=st.lists(st.integers(-2, 2), min_size=30, max_size=30),
    limit=st.integers(0, 40),
    num_served=st.integers(0, 10),
)
def test_those_to_come_are_told_in_the_order_of_their_turns(
    asks: list[Ask], weighted: bool, fair: bool, priorities: list[int], limit: int, num_served: int
) -> None:
    """Where each turns out to be what it was thought to be, and equal counters aside."""
    served = Served(fair=fair, weights=WEIGHTS if weighted else None)
    for ask, priority in zip(asks, priorities, strict=False):
        served.add(Ask(ask.tenant, ask.tokens, ask.tokens), priority)
    for _ in range(min(num_served, len(asks))):
        served.serve()
    upcoming = served.queue.upcoming(limit, 1e6)
    assert len(upcoming) == min(limit, len(served.queue))
    if upcoming:
        assert upcoming[0] is served.queue.first(1e6)
    in_turn = [served.serve() for _ in range(len(served.queue))]
    for tenant in TENANTS:
        own = [ask for ask in upcoming if ask.tenant == tenant]
        assert own == [ask for ask in in_turn if ask.tenant == tenant][: len(own)]
    # Between tenants equal counters go either way.
    if not fair or len({ask.tenant for ask in in_turn}) <= 1:
        assert upcoming == in_turn[: len(upcoming)]
