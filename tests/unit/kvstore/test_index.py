"""The index answers like a dict, whatever keys share their first bytes; its memory and its bounds are what it says."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvariantBroken, NoCapacity
from kvstore.index import KeyIndex, num_leading

#: Multiples of this share one bucket in each half of every small table: so many keys find no room there.
ONE_BUCKET = 2**58


def key(hint: int, rest: int = 0) -> bytes:
    return hint.to_bytes(8, "little") + rest.to_bytes(24, "little")


def keys(count: int, start: int = 0) -> list[bytes]:
    return [key((number * 0x9E3779B97F4A7C15) % 2**64, number) for number in range(start, start + count)]


def test_leading_keys_are_counted_up_to_the_first_that_is_missing() -> None:
    index = KeyIndex(100)
    known = keys(10)
    assert index.add(known).tolist() == list(range(10))
    assert index.num_leading(known) == 10
    assert index.num_leading([*known[:4], *keys(1, 50), *known[4:]]) == 4
    assert index.num_leading(keys(3, 50)) == 0
    assert index.num_leading([]) == 0
    assert index.find(b"".join([known[3], *keys(1, 50), known[0]])).tolist() == [3, -1, 0]
    assert num_leading(index.find(known[2:])) == 8


def test_entries_are_given_out_again() -> None:
    index = KeyIndex(4)
    index.add(keys(4))
    assert index.remove(keys(2, 1)).tolist() == [1, 2]
    assert len(index) == 2
    assert index.add(keys(2, 7)).tolist() == [2, 1]
    assert index.entries().tolist() == [0, 1, 2, 3]


def test_what_finds_no_room_is_refused_whole() -> None:
    index = KeyIndex(4)
    index.add(keys(2))
    with pytest.raises(NoCapacity, match="3 new keys, 2 of 4 entries taken"):
        index.add(keys(5))
    assert len(index) == 2
    assert index.find(keys(5)).tolist() == [0, 1, -1, -1, -1]
    assert index.add(keys(4)).tolist() == [0, 1, 2, 3]


def test_equal_keys_of_one_batch_are_one_key() -> None:
    index = KeyIndex(3)
    one, other = keys(2)
    assert index.add([one, other, one, one]).tolist() == [0, 1, 0, 0]
    assert index.remove([one, one]).tolist() == [0, -1]
    assert len(index) == 1


def test_keys_with_equal_hints_are_told_apart() -> None:
    index = KeyIndex(100)
    alike = [key(77, rest) for rest in range(40)]
    assert index.add(alike[:1]).tolist() == [0]
    assert index.find(alike[1:]).tolist() == [-1] * 39
    assert index.add(alike).tolist() == list(range(40))
    # The one that has the place in the table goes, the others stay where they are.
    index.remove(alike[:1])
    assert index.find(alike).tolist() == [-1, *range(1, 40)]
    assert index.add([key(0), key(1)]).tolist() == [0, 40]
    assert index.find([key(1), key(0)]).tolist() == [40, 0]


def test_keys_that_find_their_buckets_full_are_kept_all_the_same() -> None:
    index = KeyIndex(1000)
    crowd = [key(ONE_BUCKET * number, number) for number in range(1, 61)]
    entries = index.add(crowd)
    assert index.find(crowd).tolist() == entries.tolist() == list(range(60))
    index.remove(crowd[:30])
    assert index.find(crowd).tolist() == [-1] * 30 + list(range(30, 60))


def test_growth_loses_nothing() -> None:
    index = KeyIndex(30_000)
    every = keys(30_000)
    for start in range(0, 30_000, 700):
        index.add(every[start : start + 700])
    assert index.find(every).tolist() == list(range(30_000))
    assert [index.find((each,)).tolist() for each in every[::97]] == [[entry] for entry in range(0, 30_000, 97)]
    assert [index.key_of(entry) for entry in (0, 699, 700, 29_999)] == [every[at] for at in (0, 699, 700, 29_999)]
    # Ten million in a gigabyte is a hundred bytes each.
    assert index.num_bytes / len(index) < 90


def test_misuse_is_named() -> None:
    index = KeyIndex(3)
    with pytest.raises(InvariantBroken, match="33 bytes of keys; each key has 32"):
        index.find(bytes(33))
    with pytest.raises(InvariantBroken, match="64 bytes of keys"):
        index.add([bytes(64)])
    with pytest.raises(InvariantBroken, match="no key has entry 0; 0 keys"):
        index.key_of(0)
    index.add(keys(1))
    index.remove(keys(1))
    with pytest.raises(InvariantBroken, match="no key has entry 0"):
        index.key_of(0)
    with pytest.raises(ValueError, match="max_keys must be between 1 and"):
        KeyIndex(0)


# Few hints, some of one bucket and one 0, so that every way of sharing a place occurs.
KEYS = st.builds(
    key,
    st.one_of(st.integers(0, 3), st.integers(1, 24).map(lambda number: ONE_BUCKET * number)),
    st.integers(0, 2),
)
STEPS = st.lists(st.tuples(st.sampled_from(["add", "remove"]), st.lists(KEYS, max_size=40)), max_size=30)


@given(STEPS, st.integers(0, 3))
def test_it_answers_like_a_dict(steps: list[tuple[str, list[bytes]]], seed: int) -> None:
    index, model = KeyIndex(60, seed), dict[bytes, int]()
    for what, batch in steps:
        if what == "remove":
            assert index.remove(batch).tolist() == [model.pop(each, -1) for each in batch]
        elif len(model.keys() | set(batch)) > 60:
            with pytest.raises(NoCapacity):
                index.add(batch)
        else:
            entries = index.add(batch).tolist()
            for each, entry in zip(batch, entries, strict=True):
                assert model.setdefault(each, entry) == entry
        assert len(index) == len(model) == len(set(model.values()))
        assert index.find([*batch, *model]).tolist() == [model.get(each, -1) for each in (*batch, *model)]
        # One key takes another way than many.
        assert all(index.find([each]).tolist() == [model.get(each, -1)] for each in (*batch, *model))
        assert sorted(model.values()) == index.entries().tolist()
        assert all(index.key_of(entry) == each for each, entry in model.items())
