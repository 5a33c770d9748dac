"""The directory against dictionaries of sets: whatever is stored, dropped, replaced, removed and swept in between."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coordinator.directory import Directory

if TYPE_CHECKING:
    from numpy.typing import NDArray

#: Multiples of this share one bucket in each half of every small table, whatever its hash functions.
ONE_BUCKET = 2**58

SOME = [*range(24), *(at * ONE_BUCKET for at in range(1, 24)), 2**64 - 1]
WORKERS = range(4)


def array(hints: list[int]) -> NDArray[np.uint64]:
    return np.array(hints, np.uint64)


def holders(directory: Directory, hint: int) -> set[int]:
    return set(directory.match(array([hint])).counts.nonzero()[0].tolist())


def lead(prompt: list[int], number: int, held: dict[int, set[int]]) -> int:
    """How many of the prompt's first blocks the worker holds."""
    return next((at for at, hint in enumerate(prompt) if number not in held[hint]), len(prompt))


def sweep_all(directory: Directory) -> None:
    while directory.sweep(7):
        pass


@dataclass
class Model:
    """What each worker holds, and what is staged for it."""

    held: dict[int, set[int]] = field(default_factory=dict[int, set[int]])
    staged: dict[int, set[int]] = field(default_factory=dict[int, set[int]])

    def holders(self, hint: int) -> set[int]:
        return {number for number, held in self.held.items() if hint in held}


hint_lists = st.lists(st.sampled_from(SOME), max_size=30)
steps = st.tuples(
    st.sampled_from(["store", "store", "drop", "replace", "begin", "stage", "commit", "remove", "add", "sweep"]),
    st.sampled_from(WORKERS),
    hint_lists,
)


def apply(directory: Directory, model: Model, step: tuple[str, int, list[int]]) -> None:
    what, number, some = step
    hints, as_set = array(some), {max(hint, 1) for hint in some}
    if what == "sweep":
        directory.sweep(len(some) + 1)
    elif what == "add":
        if number not in model.held:
            directory.add_worker(number)
            model.held[number] = set()
    elif number not in model.held:
        with pytest.raises(KeyError):
            directory.store(number, hints)
    elif what == "store":
        directory.store(number, hints)
        model.held[number] |= as_set
    elif what == "drop":
        directory.drop(number, hints)
        model.held[number] -= as_set
    elif what == "replace":
        directory.replace(number, hints)
        model.staged.pop(number, None)
        model.held[number] = as_set
    elif what == "begin":
        directory.begin(number)
        model.staged[number] = set()
    elif what == "remove":
        directory.remove_worker(number)
        del model.held[number]
        model.staged.pop(number, None)
    elif number not in model.staged:
        with pytest.raises(KeyError):
            directory.stage(number, hints)
    elif what == "stage":
        directory.stage(number, hints)
        model.staged[number] |= as_set
    else:
        directory.commit(number)
        model.held[number] = model.staged.pop(number)


@given(
    st.lists(steps, min_size=1, max_size=30),
    st.lists(st.sampled_from(SOME), max_size=40),
    st.sampled_from([8, 40, 1000]),
    st.booleans(),
)
@settings(max_examples=100)
def test_it_is_a_dictionary_of_sets(
    history: list[tuple[str, int, list[int]]], prompt: list[int], max_blocks: int, is_crowded: bool
) -> None:
    directory = Directory(max_blocks, max_sets=3 if is_crowded else 1000)
    model = Model()
    for number in WORKERS:
        apply(directory, model, ("add", number, []))
    for step in history:
        apply(directory, model, step)
        assert directory.num_blocks <= max_blocks
        match = directory.match(array(prompt))
        expected_held = {hint: model.holders(max(hint, 1)) for hint in prompt}
        for number in WORKERS:
            expected = lead(prompt, number, expected_held)
            is_exact = directory.num_dropped == directory.num_cut == 0
            assert match.counts[number] == expected if is_exact else match.counts[number] <= expected
    assert directory.check() == []
    if max_blocks == 1000 and not is_crowded and all(hint < ONE_BUCKET for _, _, some in history for hint in some):
        assert directory.num_dropped == directory.num_cut == 0, "only where its buckets are full is a hint lost"

    held = {hint: holders(directory, hint) for hint in SOME}
    prompts = [array(prompt[start:]) for start in range(20)]
    for some, together in zip(prompts, directory.match_each(prompts), strict=True):
        alone = directory.match(some)
        assert (together.counts.tolist(), together.lengths) == (alone.counts.tolist(), alone.lengths)
    match = directory.match(array(prompt))
    for number in WORKERS:
        assert match.counts[number] == lead(prompt, number, held)
    is_exact = directory.num_dropped == directory.num_cut == 0
    for hint, there in held.items():
        expected_there = model.holders(max(hint, 1))
        assert there == expected_there if is_exact else there <= expected_there, hint

    num_cut = directory.num_cut
    sweep_all(directory)
    assert directory.check() == []
    for hint, there in held.items():
        after = holders(directory, hint)
        assert after == there if directory.num_cut == num_cut else after <= there, hint
    if is_exact and not directory.num_cut:
        staged = {hint: {number for number, some in model.staged.items() if hint in some} for hint in SOME}
        sets = {(frozenset(model.holders(hint)), frozenset(staged[hint])) for hint in SOME}
        assert directory.num_sets == len(sets - {(frozenset(), frozenset())})
        assert directory.num_blocks == len(set[int]().union(*model.held.values(), *model.staged.values()))


def test_counts_are_those_of_leading_blocks_by_worker() -> None:
    directory = Directory(1000)
    for number in (0, 1, 2, 5):
        directory.add_worker(number)
    prompt = array(list(range(10, 30)))
    directory.store(0, prompt[:4])
    directory.store(1, prompt)
    directory.store(2, prompt[1:])
    directory.store(5, np.concatenate((prompt[:4], prompt[5:])))
    match = directory.match(prompt)
    assert match.counts.tolist() == [4, 20, 0, 0, 0, 4]
    assert match.counts.dtype == np.int32
    assert (match.lengths, match.best) == ((4, 20), 20)
    assert directory.num_numbers == 6
    nothing = directory.match(array([7, 10]))
    assert (nothing.counts.tolist(), nothing.lengths, nothing.best) == ([0] * 6, (), 0)
    assert directory.match(array([])).best == 0


@pytest.mark.parametrize("num_workers", [1, 9, 64, 65, 1000])
def test_many_workers_and_long_prompts(num_workers: int) -> None:
    rng = np.random.default_rng(num_workers)
    directory = Directory(100_000)
    prompt = rng.integers(2, 2**64 - 1, 1700, np.uint64)
    lengths = rng.choice([0, 3, 512, 513, 600, 1700], num_workers)
    for number, length in enumerate(lengths.tolist()):
        directory.add_worker(number)
        directory.store(number, prompt[:length])
    match = directory.match(prompt)
    assert match.counts.tolist() == lengths.tolist()
    assert match.lengths == tuple(sorted(set(lengths.tolist()) - {0}))
    assert directory.num_sets <= 6


def test_a_removed_worker_is_out_of_sight_at_once_and_swept_later() -> None:
    directory = Directory(100_000)
    for number in range(3):
        directory.add_worker(number)
    mine, shared = np.arange(2, 20_002, dtype=np.uint64), np.arange(20_002, 20_102, dtype=np.uint64)
    directory.store(0, mine)
    directory.store(0, shared)
    directory.store(1, shared)
    directory.remove_worker(0)
    assert directory.num_blocks == 20_100
    assert directory.match(mine).best == 0
    assert directory.match(shared).counts.tolist() == [0, 100, 0]
    assert directory.free_number() == 0
    directory.add_worker(0)
    assert directory.match(mine).best == 0, "a new worker of the same number holds nothing of the old one's"
    directory.store(0, mine[:5])
    sweep_all(directory)
    assert directory.num_blocks == 105
    assert directory.num_sets == 2
    assert directory.match(mine).counts.tolist() == [5, 0, 0]


def test_a_step_of_the_sweep_is_bounded() -> None:
    directory = Directory(100_000)
    directory.add_worker(0)
    directory.store(0, np.arange(2, 50_002, dtype=np.uint64))
    directory.remove_worker(0)
    before = directory.num_blocks
    num_steps = 0
    while directory.sweep(1000):
        assert before - directory.num_blocks <= 1000
        before = directory.num_blocks
        num_steps += 1
    assert num_steps >= 50
    assert directory.num_blocks == 0
    assert not directory.sweep(1000)


def test_changes_alone_keep_lost_marks_from_piling_up() -> None:
    """Without anybody who sweeps: each replacement loses a mark, and the masks stay narrow."""
    directory = Directory(100_000)
    directory.add_worker(0)
    directory.add_worker(1)
    directory.store(1, np.arange(2, 30_002, dtype=np.uint64))
    for start in range(1000):
        directory.replace(0, np.arange(start + 2, start + 12, dtype=np.uint64))
    assert directory.num_blocks < 31_100
    assert directory.num_sets < 100
    assert directory.match(np.arange(1001, 1020, dtype=np.uint64)).counts.tolist() == [10, 19]


def test_a_replacement_shows_only_when_it_is_complete() -> None:
    directory = Directory(1000)
    directory.add_worker(3)
    old, new = array([2, 3, 4]), array([2, 7, 8])
    directory.store(3, old)
    directory.begin(3)
    directory.stage(3, new[:2])
    directory.store(3, array([5]))
    assert directory.match(old).counts[3] == 3
    assert directory.match(new).counts[3] == 1
    directory.stage(3, new[2:])
    directory.commit(3)
    assert directory.match(old).counts[3] == 1
    assert directory.match(new).counts[3] == 3
    assert directory.match(array([5])).best == 0
    with pytest.raises(KeyError):
        directory.commit(3)


def test_beyond_its_size_it_takes_no_more_and_counts_that() -> None:
    directory = Directory(100)
    directory.add_worker(0)
    directory.add_worker(1)
    hints = np.arange(2, 152, dtype=np.uint64)
    directory.store(0, hints)
    assert (directory.num_blocks, directory.num_dropped) == (100, 50)
    directory.store(1, hints[:10])
    assert directory.match(hints[:10]).counts.tolist() == [10, 10], "what is known may get more holders"
    directory.drop(0, hints[:20])
    directory.store(1, hints[100:110])
    assert directory.match(hints[100:110]).counts.tolist() == [0, 10]
    assert directory.num_dropped == 50


def test_hints_whose_buckets_are_full_are_lost_and_counted() -> None:
    directory = Directory(1000)
    directory.add_worker(0)
    hints = array([at * ONE_BUCKET for at in range(1, 33)])
    directory.store(0, hints)
    assert (directory.num_blocks, directory.num_dropped) == (16, 16)
    assert sum(bool(holders(directory, hint)) for hint in hints.tolist()) == 16
    assert directory.check() == []


def test_too_many_different_sets_cost_holders_but_not_the_newest() -> None:
    directory = Directory(1000, max_sets=8)
    rng = np.random.default_rng(0)
    hints = np.arange(2, 202, dtype=np.uint64)
    for number in range(10):
        directory.add_worker(number)
    for number in range(10):
        some = hints[rng.random(len(hints)) < 0.5]
        directory.store(number, some)
        assert all(number in holders(directory, hint) for hint in some.tolist())
        assert directory.check() == []
    assert directory.num_cut > 0
    assert directory.num_sets <= 8 + 10


def test_numbers_in_use_are_refused() -> None:
    directory = Directory(10)
    directory.add_worker(0)
    directory.add_worker(2)
    assert directory.free_number() == 1
    with pytest.raises(ValueError, match="worker number 2 is in use"):
        directory.add_worker(2)
    with pytest.raises(ValueError, match="worker number -1 < 0"):
        directory.add_worker(-1)
    with pytest.raises(KeyError):
        directory.remove_worker(1)
    with pytest.raises(ValueError, match="max_blocks is 0"):
        Directory(0)


def test_long_prompts_are_looked_up_together_too() -> None:
    directory = Directory(10_000)
    for number in (0, 1):
        directory.add_worker(number)
    hints = np.arange(1, 2001, dtype=np.uint64)
    directory.store(0, hints[:1500])
    directory.store(1, hints[:512])
    prompts = [hints[:length] for length in (2000, 512, 513, 0, 3)]
    matches = directory.match_each(prompts)
    assert [match.counts.tolist() for match in matches] == [[1500, 512], [512, 512], [513, 512], [0, 0], [3, 3]]
    assert [match.lengths for match in matches] == [(512, 1500), (512,), (512, 513), (), (3,)]
    assert directory.match_each([]) == []
