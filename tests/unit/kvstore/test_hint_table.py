"""The flat table: what is stored is found until it is erased, through growth and in full buckets."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.hint_table import LARGEST_LOAD, PAIR_SLOTS, HintTable


def array(hints: list[int]) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.array(hints, np.uint64)


#: Multiples of this share one bucket in each half of every small table, whatever its hash functions.
ONE_BUCKET = 2**58


def test_nothing_is_found_in_an_empty_table() -> None:
    table = HintTable(100, 0)
    assert table.find(array([1, 2, 2**64 - 1])).tolist() == [-1, -1, -1]
    assert table.find(array([])).tolist() == []
    assert not table.scan(0, table.num_slots).any()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_what_is_stored_stays_through_growth(seed: int) -> None:
    rng = np.random.default_rng(seed)
    hints = rng.permutation(np.arange(1, 20_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    table = HintTable(20_000, seed)
    for start in range(0, len(hints), 500):
        batch = hints[start : start + 500]
        table.reserve(len(batch))
        assert table.insert(batch, start + 1) == len(batch)
        known = hints[: start + 500]
        slots = table.find(known)
        assert table.values(slots).tolist() == [at - at % 500 + 1 for at in range(len(known))]
        assert len(set(slots.tolist())) == len(known) == table.num_hints
        assert slots.max() < table.num_slots
        assert table.num_hints <= table.num_slots * LARGEST_LOAD
    assert np.count_nonzero(table.scan(0, table.num_slots)) == len(hints)


def test_memory_per_hint_is_bounded() -> None:
    table = HintTable(1_000_000, 0)
    for start in range(0, 1_000_000, 10_000):
        table.reserve(10_000)
        table.insert(np.arange(start + 1, start + 10_001, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15), 1)
        assert table.num_bytes <= 27 * (start + 10_000) + 2000


def test_hints_that_share_their_buckets_fill_them_and_no_more() -> None:
    table = HintTable(1000, 0)
    hints = array([at * ONE_BUCKET for at in range(1, 33)])
    table.reserve(len(hints))
    assert table.insert(hints, 7) == PAIR_SLOTS == table.num_hints
    slots = table.find(hints)
    assert np.count_nonzero(slots >= 0) == PAIR_SLOTS
    table.erase(slots[slots >= 0][:3])
    assert table.insert(hints[slots < 0], 8) == 3
    assert table.num_hints == PAIR_SLOTS


def test_erased_slots_are_used_again() -> None:
    table = HintTable(1000, 0)
    rng = np.random.default_rng(0)
    for _ in range(200):
        hints = rng.integers(1, 2**63, 100, np.uint64)
        table.reserve(100)
        assert table.insert(hints, 1) == 100
        table.erase(table.find(hints))
        assert table.num_hints == 0
        assert not (table.find(hints) >= 0).any()
    assert table.num_slots < 300


@given(
    st.lists(
        st.tuples(
            st.booleans(), st.lists(st.one_of(st.integers(1, 300), st.integers(1, 40).map(lambda at: at * ONE_BUCKET)))
        ),
        max_size=12,
    ),
    st.integers(0, 3),
)
def test_it_is_a_dictionary(steps: list[tuple[bool, list[int]]], seed: int) -> None:
    table, model = HintTable(400, seed), dict[int, int]()
    for value, (is_insert, some) in enumerate(steps, 1):
        if is_insert:
            new = array(sorted(set(some) - set(model)))
            table.reserve(len(new))
            num_stored = table.insert(new, value)
            stored = [hint for hint, slot in zip(new.tolist(), table.find(new).tolist(), strict=True) if slot >= 0]
            assert len(stored) == num_stored
            # Only hints made to meet, now or before, fill a pair of buckets.
            assert num_stored == len(new) or any(hint >= ONE_BUCKET for hint in (*new.tolist(), *model))
            model |= dict.fromkeys(stored, value)
        else:
            old = array(sorted(set(some) & set(model)))
            table.erase(table.find(old))
            for hint in old.tolist():
                del model[hint]
        assert table.num_hints == len(model)
        slots = table.find(array(list(model)))
        assert (slots >= 0).all()
        assert table.values(slots).tolist() == list(model.values())
        gone = array(sorted(set(range(1, 300)) - set(model)))
        assert (table.find(gone) < 0).all()
        assert np.count_nonzero(table.scan(0, table.num_slots)) == len(model)


def test_a_table_of_more_than_it_can_address_is_refused() -> None:
    with pytest.raises(ValueError, match="max_hints is"):
        HintTable(2**30, 0)
