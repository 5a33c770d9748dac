"""What fetches take: a line through the latest, which errs on the short side where it knows little."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import WorkerId
from contracts.messages import FetchReply
from kvstore.fetch_ends import FETCH_LIMIT_S, LONGEST_FETCH_S, FetchEnd, limit_s, tiers_of
from kvstore.fetch_rates import MAX_HOLDERS, FetchRates

STORE = WorkerId("store")


def test_nothing_is_said_of_a_holder_before_two_fetches() -> None:
    rates = FetchRates()
    assert rates.expected_s(STORE, 10) is None
    rates.observe(STORE, 10, 1.0)
    rates.observe(WorkerId("other"), 10, 5.0)
    assert rates.expected_s(STORE, 10) is None
    rates.observe(STORE, 10, 1.0)
    assert rates.expected_s(STORE, 10) == pytest.approx(1.0)


def test_fetches_of_several_sizes_tell_the_constant_from_the_slope() -> None:
    rates = FetchRates()
    for num_blocks in (10, 40, 10, 90, 25):
        rates.observe(STORE, num_blocks, 0.1 + 0.01 * num_blocks)
    for num_blocks in (1, 50, 400):
        assert rates.expected_s(STORE, num_blocks) == pytest.approx(0.1 + 0.01 * num_blocks)


def test_fetches_of_one_size_are_read_the_short_way() -> None:
    rates = FetchRates()
    for _ in range(5):
        rates.observe(STORE, 20, 1.0)
    assert rates.expected_s(STORE, 5) == pytest.approx(0.25), "as if it were all slope"
    assert rates.expected_s(STORE, 200) == pytest.approx(1.0), "as if it were all constant"


def test_a_holder_that_became_slower_is_believed_soon() -> None:
    rates = FetchRates()
    for size in (10, 30) * 20:
        rates.observe(STORE, size, 0.001 * size)
    for size in (10, 30) * 10:
        rates.observe(STORE, size, 0.1 * size)
    expected_s = rates.expected_s(STORE, 20)
    assert expected_s is not None
    assert expected_s > 1.8


@given(
    fetches=st.lists(st.tuples(st.integers(1, 500), st.floats(1e-4, 20.0)), min_size=2, max_size=20),
    sizes=st.lists(st.integers(1, 4096), min_size=2, max_size=5),
)
def test_more_blocks_never_take_less_and_nothing_less_than_none(
    fetches: list[tuple[int, float]], sizes: list[int]
) -> None:
    rates = FetchRates()
    for num_blocks, seconds in fetches:
        rates.observe(STORE, num_blocks, seconds)
    expected = [rates.expected_s(STORE, size) or 0.0 for size in sorted(sizes)]
    assert expected[0] >= -1e-9
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(expected))


def test_only_the_holders_of_late_are_remembered() -> None:
    rates = FetchRates()
    for number in range(MAX_HOLDERS + 1):
        for _ in range(2):
            rates.observe(WorkerId(str(number)), 1, 1.0)
    assert rates.expected_s(WorkerId("0"), 1) is None
    assert rates.expected_s(WorkerId("1"), 1) is not None


def test_a_fetch_has_time_by_its_bytes_but_not_for_ever() -> None:
    assert limit_s(0) == FETCH_LIMIT_S
    assert FETCH_LIMIT_S + 1.9 < limit_s(200_000_000) < FETCH_LIMIT_S + 2.1
    assert limit_s(10**12) == LONGEST_FETCH_S


@pytest.mark.parametrize(
    ("told", "num_blocks", "tiers"),
    [
        ({"device": 8}, 8, {"peer": 8}),
        ({}, 8, {"peer": 8}),
        ({"dram": 3, "ssd": 5}, 8, {"dram": 3, "ssd": 5}),
        ({"ssd": 5, "dram": 3}, 6, {"dram": 3, "ssd": 3}),
        ({"dram": 3, "ssd": 5}, 2, {"dram": 2}),
        ({"dram": 3}, 8, {"dram": 3, "peer": 5}),
        ({"device": 1, "tape": 2}, 4, {"peer": 4}),
        ({"dram": -3}, 4, {"peer": 4}),
        ({"dram": 3}, 0, {}),
    ],
)
def test_what_came_is_counted_by_where_it_stood(told: dict[str, int], num_blocks: int, tiers: dict[str, int]) -> None:
    found = tiers_of(FetchReply(tier_blocks=told), num_blocks)
    assert found == tiers
    assert FetchEnd(ended_s=0.0, start=5, tier_blocks=found).stop == 5 + num_blocks
