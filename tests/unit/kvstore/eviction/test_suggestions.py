"""Batches of suggestions: the lowest first, ends before beginnings, whatever happened since the batch was sorted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kvstore.eviction.columns import NO_PARENT, Columns
from kvstore.eviction.suggestions import Suggestions, lowest

if TYPE_CHECKING:
    from kvstore.eviction.columns import Rows
    from kvstore.eviction.policies import Scores


def forest(parents: list[int]) -> Columns:
    """Entry k is behind `parents[k]`."""
    columns = Columns(len(parents))
    columns.is_stored[:] = True
    columns.num_touched = len(parents)
    columns.serial[:] = np.arange(len(parents)) + 1
    for entry, parent in enumerate(parents):
        columns.parent[entry] = parent
        if parent != NO_PARENT:
            columns.parent_serial[entry] = columns.serial[parent]
            columns.num_children[parent] += 1
            columns.position[entry] = columns.position[parent] + 1
    return columns


class Scored:
    """Entry -> score, fixed; how often it was asked."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = np.array(scores)
        self.num_asked = 0

    def __call__(self, rows: Rows, now_s: float) -> Scores:
        self.num_asked += len(rows)
        return self.scores[rows]


def anything(entry: int) -> bool:
    return True


def entries(found: list[tuple[int, float]]) -> list[int]:
    return [entry for entry, _ in found]


def remove(columns: Columns, entry: int) -> None:
    parent = columns.parent_of(entry)
    if parent != NO_PARENT:
        columns.num_children[parent] -= 1
    columns.is_stored[entry] = False


PARENTS = st.lists(st.integers(0, 10**6), min_size=1, max_size=60).map(
    # A third begin a sequence; the others are behind any earlier one.
    lambda drawn: [each % at if at and each % 3 else NO_PARENT for at, each in enumerate(drawn)]
)


@given(PARENTS, st.data())
def test_the_lowest_end_goes_first(parents: list[int], data: st.DataObject) -> None:
    """Against the definition: of those behind which nothing stands, the one with the lowest score, one at a time."""
    scores = data.draw(st.lists(st.floats(0, 10), min_size=len(parents), max_size=len(parents), unique=True))
    refused = data.draw(st.sets(st.integers(0, len(parents) - 1), max_size=5))
    found = Suggestions(forest(parents), Scored(scores)).suggest(len(parents), 0.0, lambda entry: entry not in refused)
    left = set(range(len(parents)))
    expected: list[int] = []
    while ends := left - refused - {parents[entry] for entry in left}:
        expected.append(min(ends, key=lambda entry: scores[entry]))
        left.remove(expected[-1])
    assert entries(found) == expected
    assert [score for _, score in found] == [scores[entry] for entry in expected]


@given(PARENTS, st.integers(1, 7), st.integers(1, 5))
def test_everything_goes_some_time_and_ends_before_beginnings(parents: list[int], part: int, count: int) -> None:
    columns = forest(parents)
    suggestions = Suggestions(columns, Scored([1.0] * len(parents)), part_entries=part)
    gone: list[int] = []
    while found := entries(suggestions.suggest(count, 0.0, anything)):
        assert len(found) <= count
        for entry in found:
            assert columns.num_children[entry] == 0
            remove(columns, entry)
        gone += found
    assert sorted(gone) == list(range(len(parents)))


def test_what_was_used_since_is_not_suggested() -> None:
    columns = forest([NO_PARENT] * 100)
    suggestions = Suggestions(columns, Scored([float(entry) for entry in range(100)]))
    assert entries(suggestions.suggest(2, 0.0, anything)) == [0, 1]
    columns.last_used_s[2] = 1.0
    columns.is_stored[3] = False
    columns.serial[4] = 1000
    columns.num_children[5] = 1
    assert entries(suggestions.suggest(2, 0.0, anything)) == [6, 7]


def test_what_was_suggested_and_stayed_is_suggested_again() -> None:
    columns = forest([NO_PARENT, 0, 1])
    suggestions = Suggestions(columns, Scored([0.0, 0.0, 0.0]))
    for _ in range(3):
        assert entries(suggestions.suggest(3, 0.0, anything)) == [2, 1, 0]
    # The end stays: so does all before it.
    assert entries(suggestions.suggest(3, 0.0, lambda entry: entry != 2)) == []


def test_what_no_prompt_can_reach_goes_first() -> None:
    columns = forest([NO_PARENT, 0, NO_PARENT])
    suggestions = Suggestions(columns, Scored([5.0, 5.0, 1.0]))
    # Entry 0 has gone, and is another block now.
    columns.serial[0], columns.num_children[0] = 99, 0
    assert suggestions.suggest(3, 0.0, anything) == [(1, -np.inf), (2, 1.0), (0, 5.0)]


def test_a_batch_is_sorted_once() -> None:
    scored = Scored([float(entry) for entry in range(4096)])
    columns = forest([NO_PARENT] * 4096)
    suggestions = Suggestions(columns, scored)
    for expected in range(256):
        assert entries(suggestions.suggest(1, 0.0, anything)) == [expected]
        remove(columns, expected)
    assert scored.num_asked <= 4096 + 256


def test_of_a_large_tier_a_part_is_looked_at() -> None:
    scored = Scored([float(entry % 1000) for entry in range(20_000)])
    columns = forest([NO_PARENT] * 20_000)
    suggestions = Suggestions(columns, scored, part_entries=1024)
    found = suggestions.suggest(50, 0.0, anything)
    assert scored.num_asked <= 1024
    # A part has every twentieth; the lowest of it are among the lowest of all.
    assert max(score for _, score in found) < 100


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 99)), max_size=50), st.integers(0, 60))
def test_lowest_is_the_beginning_of_the_sorted(rows: list[tuple[int, int, int]], count: int) -> None:
    keys = [np.array([row[column] for row in rows], np.int64) for column in range(3)]
    if count == 0 or not rows:
        return
    found: list[int] = lowest(keys, count).tolist()
    assert sorted(rows[row] for row in found) == sorted(rows)[:count]
