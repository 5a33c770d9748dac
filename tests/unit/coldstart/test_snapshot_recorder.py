"""What is chosen for a snapshot: shared blocks, never without those before them, in the order of their first touch."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from coldstart.snapshot.format import BlockEntry
from coldstart.snapshot.recorder import UseRecorder


def key(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


def keys(path: str) -> list[bytes]:
    """Of the blocks of a prompt whose blocks are the letters of `path`: content is all that stands before."""
    return [key(path[: end + 1]) for end in range(len(path))]


def note(recorder: UseRecorder, *paths: str) -> None:
    for path in paths:
        recorder.note(keys(path))


def chosen(recorder: UseRecorder, most: int = 100, gone: tuple[str, ...] = ()) -> list[str]:
    missing = {key(name) for name in gone}
    return [entry.key.rstrip(b"\0").decode() for entry in recorder.chosen(most, lambda each: each not in missing)]


def test_what_two_prompts_share_is_kept_in_the_order_of_its_first_touch() -> None:
    recorder = UseRecorder()
    note(recorder, "ab", "xyz", "xyq", "abc")
    assert chosen(recorder) == ["a", "ab", "x", "xy"]


def test_of_more_than_fits_the_most_used_is_kept() -> None:
    recorder = UseRecorder()
    note(recorder, "ab", "ab", "xy", "xy", "xy")
    assert chosen(recorder, 2) == ["x", "xy"]
    assert chosen(recorder, 3) == ["a", "x", "xy"]


def test_what_does_not_stand_is_left_with_all_behind_it() -> None:
    recorder = UseRecorder()
    note(recorder, "abc", "abc", "xy", "xy")
    assert chosen(recorder, gone=("ab",)) == ["a", "x", "xy"]


def test_an_earlier_life_counts_half_and_stands_behind_what_this_one_touched() -> None:
    first = UseRecorder()
    note(first, *["xy"] * 8, *["ab"] * 8, *["m"] * 3)
    second = UseRecorder()
    second.carry(first.chosen(100, lambda each: True))
    assert chosen(second) == ["x", "xy", "a", "ab"]
    note(second, "ab", "cd", "cd")
    assert chosen(second) == ["a", "ab", "c", "cd", "x", "xy"]


def test_what_nobody_uses_any_more_fades_over_lives() -> None:
    recorder = UseRecorder()
    note(recorder, *["ab"] * 8)
    for life in range(3):
        entries = recorder.chosen(100, lambda each: True)
        assert [entry.uses for entry in entries] == [8.0 / 2**life] * 2
        recorder = UseRecorder()
        recorder.carry(entries)
    assert chosen(recorder) == []


def test_uses_fade_with_the_number_of_prompts() -> None:
    recorder = UseRecorder(half_life_prompts=4)
    note(recorder, "ab", "ab", "ab", "x")
    assert chosen(recorder) == []
    note(recorder, "ab")
    assert chosen(recorder) == ["a", "ab"]


def test_blocks_behind_one_that_is_not_known_are_not_carried() -> None:
    recorder = UseRecorder()
    recorder.carry([BlockEntry(key("ab"), key("a"), 9.0)])
    assert chosen(recorder) == []


@given(
    paths=st.lists(st.text("ab", min_size=1, max_size=5), max_size=40),
    most=st.integers(0, 12),
    gone=st.sets(st.text("ab", min_size=1, max_size=5), max_size=4),
    carried=st.integers(0, 20),
    half_life=st.integers(2, 30),
    tracked=st.integers(4, 40),
)
def test_every_block_stands_behind_its_parent_and_memory_is_bounded(
    paths: list[str], most: int, gone: set[str], carried: int, half_life: int, tracked: int
) -> None:
    earlier = UseRecorder()
    note(earlier, *paths[:carried])
    recorder = UseRecorder(half_life_prompts=half_life, max_tracked=tracked)
    for number, path in enumerate(paths):
        recorder.note(keys(path))
        if number == carried:
            recorder.carry(earlier.chosen(100, lambda each: True))
    missing = {key(name) for name in gone}
    entries = recorder.chosen(most, lambda each: each not in missing)
    assert len(entries) <= most
    seen: set[bytes | None] = {None}
    for entry in entries:
        assert entry.parent in seen
        assert entry.key not in seen
        assert entry.key not in missing
        seen.add(entry.key)
    uses = {entry.key: entry.uses for entry in entries}
    assert all(entry.parent is None or entry.uses <= uses[entry.parent] for entry in entries)
    note(recorder, "a")
    assert len(recorder.chosen(10**6, lambda each: True)) <= tracked + 5
