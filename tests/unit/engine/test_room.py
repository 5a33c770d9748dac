"""The shared rule of admission: what fits, what is promised, and the promise that follows from both."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from engine.room import Demand, Fit, Room, RoomView, fit
from kvtransfer import Ledger
from tests.support.roles import BLOCK_TOKENS, IDENTITY, generate, room_over

COUNTS = st.integers(0, 40)


@given(num_blocks=st.integers(1, 40), growth=COUNTS, available=COUNTS, admitted=st.integers(0, 3), promised=COUNTS)
def test_what_fits_leaves_room_for_everything_promised(
    num_blocks: int, growth: int, available: int, admitted: int, promised: int
) -> None:
    demand = Demand(arrival_s=0.0, num_blocks=num_blocks, growth_blocks=growth)
    view = RoomView(num_blocks=40, available_blocks=available, num_admitted=admitted, promised_blocks=promised)
    verdict = fit(demand, view)
    left = available - num_blocks
    assert verdict.fits == (left >= 0 and (admitted == 0 or left >= promised + growth))
    assert (verdict is Fit.NO_BLOCKS) == (left < 0)
    assert admitted or verdict in (Fit.ALONE, Fit.NO_BLOCKS), "alone, only its own blocks count"


@given(num_blocks=st.integers(1, 40), available=COUNTS, admitted=st.integers(0, 3), promised=COUNTS, more=COUNTS)
def test_what_fits_still_fits_with_more_room_and_fewer_promises(
    num_blocks: int, available: int, admitted: int, promised: int, more: int
) -> None:
    demand = Demand(arrival_s=0.0, num_blocks=num_blocks, growth_blocks=1)
    view = RoomView(num_blocks=99, available_blocks=available, num_admitted=admitted, promised_blocks=promised)
    if admitted and fit(demand, view).fits:
        left = max(0, promised - more)
        assert fit(demand, replace(view, available_blocks=available + more, promised_blocks=left)).fits


@given(
    prompt=st.integers(1, 30),
    max_tokens=st.integers(1, 30),
    growth_tokens=st.integers(1, 20),
    context=st.integers(31, 64),
)
def test_growth_covers_the_next_tokens_and_ends_with_the_answer(
    prompt: int, max_tokens: int, growth_tokens: int, context: int
) -> None:
    room = room_over(Ledger(64), growth_tokens=growth_tokens)
    request = generate(prompt=prompt, max_tokens=max_tokens)
    blocks_for = IDENTITY.layout.blocks_for
    last = min(prompt + max_tokens, context) - 1
    for length in range(prompt, last + 1):
        held = blocks_for(length)
        growth = room.growth(request, held, max_context_tokens=context)
        assert growth >= blocks_for(min(length + growth_tokens, last)) - held
        assert growth <= -(-growth_tokens // BLOCK_TOKENS)
    assert room.growth(request, blocks_for(last), max_context_tokens=context) == 0


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.integers(0, 9)), max_size=30))
def test_promises_are_replaced_summed_and_forgotten(promises: list[tuple[str, int | None]]) -> None:
    room = Room(layout=IDENTITY.layout, num_blocks=8, growth_tokens=4, available_blocks=lambda: 8)
    kept: dict[str, int] = {}
    for owner, blocks in promises:
        if blocks is None:
            room.forget(owner)
            kept.pop(owner, None)
        else:
            room.promise(owner, blocks)
            kept[owner] = blocks
        view = room.view()
        assert (view.num_admitted, view.promised_blocks) == (len(kept), sum(kept.values()))
