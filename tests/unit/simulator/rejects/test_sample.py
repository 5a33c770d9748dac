"""How many refused requests of each kind are tried, and which."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.rejects.sample import LEAST_OF_KIND, draw, kind_of, numbers_to_try
from tests.unit.simulator.rejects.test_replay import rebuilt_of


@pytest.mark.parametrize(
    ("sizes", "total", "numbers"),
    [
        ([], 5, []),
        ([3, 4], 100, [3, 4]),
        ([600, 300, 100], 100, [60, 30, 10]),
        ([1000, 1], 100, [99, 1]),
        # The smallest gets its least, though a tenth of that is its part.
        ([990, 990, 20], 100, [45, 45, 10]),
        ([5, 9, 7], 2, [0, 1, 1]),
    ],
)
def test_numbers_go_by_size_and_nobody_is_left_out(sizes: list[int], total: int, numbers: list[int]) -> None:
    assert numbers_to_try(sizes, total) == numbers


@given(sizes=st.lists(st.integers(1, 500), max_size=8), total=st.integers(0, 300))
def test_numbers_add_up_and_small_groups_have_their_least(sizes: list[int], total: int) -> None:
    numbers = numbers_to_try(sizes, total)
    assert sum(numbers) == min(total, sum(sizes))
    assert all(0 <= number <= size for number, size in zip(numbers, sizes, strict=True))
    least = min(LEAST_OF_KIND, total // max(1, 2 * len(sizes)))
    assert all(number >= min(size, least) for number, size in zip(numbers, sizes, strict=True))
    assert total < len(sizes) or all(numbers)


def test_some_of_every_kind_are_drawn_and_nobody_twice() -> None:
    names = [*((f"a{number}", "ttft") for number in range(60)), *((f"b{number}", "tpot") for number in range(4))]
    refused = list(rebuilt_of(accepted=0, refused=names).requests)
    drawn = draw(refused, 20, seed=3)
    assert len({each.last.request for each in drawn}) == len(drawn) == 20
    assert sum(kind_of(each) == ("x", "tpot") for each in drawn) == 4
    assert {each.last.request for each in draw(refused, 1000, seed=3)} == {name for name, _ in names}
