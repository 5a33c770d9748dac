"""The ledger with somebody who chooses what goes: the choice is honoured, whole, or refused by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvariantBroken
from contracts.ids import BlockId, LeaseId
from kvtransfer.ledger import BlockClass, Ledger

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

NUM_BLOCKS = 8


class Chooser:
    def __init__(self, choose: Callable[[int], Sequence[int]]) -> None:
        self._choose = choose
        self.asked: list[int] = []

    def victims(self, num_blocks: int) -> list[BlockId]:
        self.asked.append(num_blocks)
        return [BlockId(block) for block in self._choose(num_blocks)]


class Keys:
    def __init__(self) -> None:
        self.heard: list[tuple[str, bytes]] = []

    def stored(self, key: bytes) -> None:
        self.heard.append(("stored", key))

    def removed(self, key: bytes) -> None:
        self.heard.append(("removed", key))


def key_of(block: int) -> bytes:
    return b"key %d" % block


def cached(num_cached: int, choose: Callable[[int], Sequence[int]]) -> tuple[Ledger, Chooser, Keys]:
    """A ledger whose blocks `[0, num_cached)` are cached, the rest free."""
    ledger = Ledger(NUM_BLOCKS)
    blocks = ledger.allocate("r", num_cached) or []
    assert blocks == list(range(num_cached))
    for block in blocks:
        ledger.set_key(block, key_of(block))
    ledger.release_all("r")
    chooser, keys = Chooser(choose), Keys()
    ledger.evictor, ledger.key_listener = chooser, keys
    return ledger, chooser, keys


def test_the_chosen_ones_go_and_only_as_many_as_are_missing() -> None:
    ledger, chooser, keys = cached(6, lambda count: [1, 4, 2][:count])
    generations = [ledger.generation(BlockId(block)) for block in range(NUM_BLOCKS)]
    assert ledger.allocate("a", 2) == [6, 7]
    assert chooser.asked == [], "free blocks go first"
    assert sorted(ledger.allocate("b", 3) or ()) == [1, 2, 4]
    assert chooser.asked == [3]
    assert keys.heard == [("removed", key_of(block)) for block in (1, 4, 2)]
    assert [ledger.lookup(key_of(block)) for block in range(6)] == [0, None, None, 3, None, 5]
    assert [ledger.generation(BlockId(block)) - generations[block] for block in range(6)] == [0, 1, 1, 0, 1, 0]
    ledger.check()


@pytest.mark.parametrize("take", ["allocate", "reserve"])
def test_nothing_is_taken_where_not_enough_may_go(take: str) -> None:
    ledger, chooser, keys = cached(6, lambda _: [])
    before = ledger.load()
    taken = ledger.allocate("a", 3) if take == "allocate" else ledger.reserve(LeaseId("a"), 3)
    assert taken is None
    assert (chooser.asked, keys.heard, ledger.load()) == ([1], [], before)
    assert ledger.available_blocks == 8, "as far as others know"
    ledger.check()


def test_nobody_is_asked_for_more_than_there_are() -> None:
    ledger, chooser, _ = cached(6, lambda count: range(count))
    assert ledger.allocate("a", 9) is None
    assert ledger.allocate("a", 0) == []
    assert chooser.asked == []


@pytest.mark.parametrize(
    ("choice", "why"),
    [
        ([0], "fewer"),
        ([0, 1, 2], "more"),
        ([0, 0], "one twice"),
        ([0, 7], "one that is free"),
        ([0, 6], "one that is owned"),
        ([0, 5], "one that is pinned by a lease"),
    ],
)
def test_a_choice_that_cannot_be_is_a_bug_and_evicts_nothing(choice: list[int], why: str) -> None:
    ledger, _, keys = cached(6, lambda _: choice)
    ledger.pin(LeaseId("l"), [BlockId(5)])
    assert ledger.allocate("held", 2) == [6, 7]
    ledger.release("held", [BlockId(7)])
    with pytest.raises(InvariantBroken, match="different cached blocks"):
        ledger.allocate("a", 3)
    assert (keys.heard, len(ledger.cached_blocks())) == ([], 5), why
    ledger.check()


def test_evict_gives_up_what_is_cached_and_leaves_the_rest() -> None:
    ledger, chooser, keys = cached(6, lambda _: [])
    ledger.share("r", [BlockId(1)])
    ledger.pin(LeaseId("l"), [BlockId(2)])
    assert ledger.evict([BlockId(block) for block in (0, 1, 2, 3, 7)]) == 2
    assert keys.heard == [("removed", key_of(0)), ("removed", key_of(3))]
    assert ledger.block_class(BlockId(3)) is BlockClass.FREE
    assert [ledger.key_of(BlockId(block)) for block in range(4)] == [None, key_of(1), key_of(2), None]
    assert ledger.evict([BlockId(0)]) == ledger.evict([]) == 0, "it went before"
    assert chooser.asked == []
    ledger.check()


def test_what_is_cached_is_told_in_the_order_of_its_last_use() -> None:
    ledger, _, _ = cached(4, lambda _: [])
    assert ledger.cached_blocks() == [3, 2, 1, 0], "of a prefix the end first"
    ledger.share("r", [BlockId(2)])
    assert (ledger.is_cached(BlockId(2)), ledger.is_cached(BlockId(1)), ledger.is_cached(BlockId(7))) == (
        False,
        True,
        False,
    )
    ledger.release_all("r")
    assert ledger.cached_blocks() == [3, 1, 0, 2]
    assert ledger.key_of(BlockId(2)) == key_of(2)


@given(st.integers(0, NUM_BLOCKS), st.lists(st.integers(1, 4), max_size=4), st.data())
def test_whoever_chooses_blocks_are_conserved_and_exactly_the_chosen_ones_go(
    num_cached: int, wanted: list[int], data: st.DataObject
) -> None:
    chosen: list[int] = []

    def choose(count: int) -> Sequence[int]:
        candidates = ledger.cached_blocks()
        chosen[:] = data.draw(st.permutations(candidates))[:count] if data.draw(st.booleans()) else []
        return chosen

    ledger, chooser, keys = cached(num_cached, choose)
    for number, count in enumerate(wanted):
        before, num_free, num_asked = set(ledger.all_keys()), ledger.load()["free_blocks"], len(chooser.asked)
        keys.heard.clear()
        chosen.clear()
        possible = count <= ledger.available_blocks
        blocks = ledger.allocate(f"r{number}", count)
        was_asked = len(chooser.asked) > num_asked
        assert was_asked == (possible and count > num_free)
        assert (blocks is None) == (not possible or (was_asked and not chosen))
        assert before - set(ledger.all_keys()) == {key_of(block) for block in chosen}
        assert len(keys.heard) == len(chosen)
        assert set(chosen) <= set(blocks or ())
        ledger.check()
