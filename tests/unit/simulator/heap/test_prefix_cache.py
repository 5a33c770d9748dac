"""The prefix cache of a worker in a study, against a plain list."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from simulator.heap.prefix_cache import PrefixCache, hints_of


def nobody() -> None:
    pass


def test_only_leading_blocks_count() -> None:
    cache = PrefixCache(10, nobody)
    cache.put((1, 2, 4))
    assert cache.leading((1, 2, 3, 4)) == 2
    assert cache.leading((1, 2, 4), most=1) == 1
    assert cache.leading((3, 1)) == cache.leading(()) == 0


def test_the_end_of_the_prompt_that_was_used_least_recently_goes_first() -> None:
    cache = PrefixCache(5, nobody)
    cache.put((1, 2, 3))
    cache.put((7, 8))
    cache.use((1, 2, 3, 99))
    cache.put((5,))
    assert cache.leading((7, 8)) == 1
    cache.put((6,))
    assert cache.leading((7, 8)) == 0
    cache.put((9,))
    assert cache.leading((1, 2, 3)) == 2
    assert len(cache) == 5


def test_a_prompt_larger_than_the_cache_leaves_its_beginning() -> None:
    cache = PrefixCache(2, nobody)
    cache.put((1, 2, 3, 4))
    assert cache.leading((1, 2, 3, 4)) == 2


def test_what_comes_and_goes_between_two_reports_is_not_told() -> None:
    told: list[int] = []
    cache = PrefixCache(2, lambda: told.append(len(cache)))
    cache.put((1,))
    assert len(told) == 1
    cache.put((2,))
    cache.put((3,))
    stored, dropped = cache.take_changes()
    assert sorted(stored.tolist()) == sorted(hints_of((2, 3)).tolist())
    assert dropped.tolist() == []
    cache.put((4,))
    cache.put((2,))
    stored, dropped = cache.take_changes()
    assert stored.tolist() == hints_of((4,)).tolist()
    assert dropped.tolist() == hints_of((3,)).tolist()


@given(st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 9), unique=True, max_size=6)), max_size=40))
def test_who_listens_to_the_changes_knows_what_is_there(steps: list[tuple[bool, list[int]]]) -> None:
    """And the cache holds what an ordered list of the most recently used would."""
    cache = PrefixCache(4, nobody)
    model: list[int] = []
    heard: set[int] = set()
    for is_put, hash_ids in steps:
        if is_put:
            cache.put(hash_ids)
        else:
            cache.use(hash_ids)
        for hash_id in reversed(hash_ids[:4] if is_put else hash_ids):
            if hash_id in model:
                model.remove(hash_id)
            elif not is_put:
                continue
            model.append(hash_id)
            del model[:-4]
        if len(model) % 2:
            stored, dropped = cache.take_changes()
            assert heard.isdisjoint(stored.tolist())
            assert heard.issuperset(dropped.tolist())
            heard = (heard | set(stored.tolist())) - set(dropped.tolist())
        assert len(cache) == len(model)
        assert all(cache.leading((hash_id,)) == (hash_id in model) for hash_id in range(10))
    stored, dropped = cache.take_changes()
    assert (heard | set(stored.tolist())) - set(dropped.tolist()) == set(hints_of(model).tolist())


def test_hints_differ_in_all_their_bits() -> None:
    hints = hints_of(range(1000)).tolist()
    assert len(set(hints)) == 1000
    for bit in range(64):
        assert 400 < sum(hint >> bit & 1 for hint in hints) < 600
