"""A tally of shared blocks counts each one once, for as long as somebody holds it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvariantBroken
from contracts.ids import BlockId
from prefill.block_tally import BlockTally

SETS = st.sets(st.integers(0, 9).map(BlockId), max_size=6)


@given(st.lists(st.tuples(SETS, st.booleans()), max_size=20))
def test_it_counts_the_union(steps: list[tuple[set[BlockId], bool]]) -> None:
    tally = BlockTally()
    held: list[set[BlockId]] = []
    for blocks, ends in steps:
        before = set[BlockId]().union(*held)
        if ends and held:
            gone = held.pop(0)
            assert tally.remove(gone) == len(before) - len(set[BlockId]().union(*held))
        else:
            held.append(blocks)
            assert tally.add(blocks) == len(blocks - before)
        now = set[BlockId]().union(*held)
        assert len(tally) == len(now)
        assert all((block in tally) == (block in now) for block in map(BlockId, range(10)))


def test_what_nobody_holds_cannot_be_removed() -> None:
    tally = BlockTally()
    tally.add([BlockId(1)])
    with pytest.raises(InvariantBroken, match="block 2"):
        tally.remove([BlockId(2)])
