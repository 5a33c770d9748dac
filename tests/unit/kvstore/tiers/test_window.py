"""Which waiting prompts are brought from disk: as many as fit, whole but for the last, each worker's next one first."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvstore.tiers.window import blocks_ahead
from tests.support.store_chains import CHAINS, chain

#: Leading blocks of a few prompts, some of which begin alike.
PROMPTS = st.sampled_from([*CHAINS, chain(0, 7), chain(0, 1, 2, 3, 4, 5, 6, 7)]).flatmap(
    lambda keys: st.integers(0, len(keys)).map(lambda stop: keys[:stop])
)
WINDOWS = st.lists(st.lists(PROMPTS, max_size=4), max_size=4)


def in_order_of_need(windows: list[list[tuple[bytes, ...]]]) -> list[tuple[bytes, ...]]:
    longest = max(map(len, windows), default=0)
    return [window[rank] for rank in range(longest) for window in windows if rank < len(window)]


@given(WINDOWS, st.integers(0, 20))
def test_it_is_what_taking_one_block_after_another_gives(windows: list[list[tuple[bytes, ...]]], most: int) -> None:
    wanted: dict[bytes, None] = {}
    for keys in in_order_of_need(windows):
        for key in keys:
            if len(wanted) < most:
                wanted[key] = None
    chosen = blocks_ahead(windows, most)
    assert list(dict.fromkeys(key for keys in chosen for key in keys)) == list(wanted)


@given(WINDOWS, st.integers(0, 20))
def test_what_is_chosen_begins_waiting_prompts_in_order(windows: list[list[tuple[bytes, ...]]], most: int) -> None:
    waiting = [keys for keys in in_order_of_need(windows) if keys]
    chosen = blocks_ahead(windows, most)
    assert all(chosen), "nothing of a prompt is nothing to say"
    for number, (part, keys) in enumerate(zip(chosen, waiting, strict=False), 1):
        assert part == (keys if number < len(chosen) else keys[: len(part)])


def test_nobody_waits() -> None:
    assert blocks_ahead([], 8) == []
    assert blocks_ahead([[], []], 8) == []
    assert blocks_ahead([[CHAINS[0]]], 0) == []
