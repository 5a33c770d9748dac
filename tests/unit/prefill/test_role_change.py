"""A worker's role changes while prompts are open: what has blocks goes on as it was, what has none gets its turn."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import LeaseId
from kvtransfer import LeaseOutcome
from prefill import PrefillLimits
from tests.support.prefill_side import Side
from tests.support.roles import generate


def written(side: Side) -> list[str]:
    """Whose answers this worker writes, in order."""
    return [sequence.request.request_id for sequence in side.handed_over]


def write_out(side: Side) -> None:
    """What was handed over here ends."""
    for sequence in side.handed_over:
        side.ledger.release_all(sequence.owner)
        side.room.forget(sequence.owner)


def release(side: Side, number: int) -> None:
    side.holder.end(LeaseId(f"lease-{number}"), LeaseOutcome.RELEASED)


@pytest.mark.parametrize("chunks", [(10,), (5, 5), (4, 4, 2)])
def test_a_prompt_that_is_being_read_keeps_its_reader_and_its_tokens(chunks: tuple[int, ...]) -> None:
    """However much of it was read when the worker became mixed, and single again."""
    for flips in range(len(chunks) + 1):
        side = Side(prefix_cache=False)
        side.submit(generate(prompt=10))
        for number, num_tokens in enumerate(chunks):
            if number == flips:
                side.queue.set_also_writes(True)
            side.step(num_tokens, token_id=7 if number == len(chunks) - 1 else None)
        side.queue.set_also_writes(flips < len(chunks))
        assert side.holder.calls[0] == ("open", 3, "d0")
        assert side.holder.calls[-1] == ("seal", "lease-1", 3, 10)
        assert (side.deltas.tokens, written(side)) == ([7], [])
        release(side, 1)
        side.assert_clean()


def test_what_waits_for_its_reader_is_lent_under_whatever_role() -> None:
    side = Side(prefix_cache=False)
    side.submit(generate("a", prompt=20))
    side.step(20, token_id=7)
    side.queue.set_also_writes(True)
    assert (side.room.view().lent_blocks, side.queue.open_count, side.queue.own_count) == (5, 1, 0)
    side.submit(generate("b", prompt=16))
    assert side.queue.candidates(2.0) == ([], []), "5 blocks of 8 are lent; 4 more would be too many"
    release(side, 1)
    side.step(16, token_id=8)
    release(side, 2)
    side.assert_clean()


def test_the_budget_of_a_mixed_worker_holds_up_what_waits_until_it_is_single_again() -> None:
    side = Side(prefix_cache=False)
    side.submit(generate("a", prompt=20))
    side.queue.candidates(1.0)
    side.queue.set_also_writes(True)
    side.submit(generate("b", prompt=16))
    assert len(side.queue.candidates(1.0)[1]) == 1
    assert side.room.prompt is None
    side.queue.set_also_writes(False)
    assert side.room.prompt is not None, "nothing but blocks holds it up"
    assert len(side.queue.candidates(1.0)[1]) == 2


def test_a_waiting_prompt_larger_than_the_budget_is_written_here_once_the_worker_is_mixed() -> None:
    """Under the budget of a mixed worker it would wait for ever: it is larger than all of it."""
    side = Side(prefix_cache=False)
    side.submit(generate("first", prompt=32))
    side.step(32, token_id=7)
    side.submit(generate("large", prompt=33))
    side.submit(generate("small", prompt=8))
    assert side.queue.candidates(1.0) == ([], []), "8 blocks of 8 wait for their reader"
    assert side.queue.unread_for == (("d0", 2),)
    side.queue.set_also_writes(True)
    assert side.queue.unread_for == (("d0", 1),), "the reader need not wait for it"
    assert side.queue.own_count == 1
    release(side, 1)
    side.step(33, token_id=8)
    assert written(side) == ["large"]
    side.step(8, token_id=9)
    assert [call[:2] for call in side.holder.calls if call[0] == "open"] == [("open", 8), ("open", 2)]
    release(side, 2)
    write_out(side)
    side.assert_clean()


def test_one_that_is_parked_is_written_here_when_it_does_not_leave() -> None:
    side = Side(prefix_cache=False)
    side.submit(generate("large", prompt=33))
    (prompt,) = side.queue.movable()
    side.queue.park(prompt)
    side.queue.set_also_writes(True)
    side.queue.unpark(prompt)
    side.step(33, token_id=7)
    assert (written(side), side.holder.calls) == (["large"], [])
    write_out(side)
    side.assert_clean()


def test_one_that_has_its_blocks_stays_lent_however_large_it_is() -> None:
    side = Side(prefix_cache=False)
    side.submit(generate("large", prompt=33))
    side.step(16)
    side.queue.set_also_writes(True)
    side.step(17, token_id=7)
    assert (written(side), side.holder.calls[-1]) == ([], ("seal", "lease-1", 9, 33))
    release(side, 1)
    side.assert_clean()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    local=st.sets(st.integers(0, 11)),
    flips=st.sets(st.integers(0, 30)),
    also_writes=st.booleans(),
)
def test_every_prompt_is_read_once_however_often_the_role_changes(
    sizes: list[int], local: set[int], flips: set[int], also_writes: bool
) -> None:
    side = Side(prefix_cache=False, also_writes=also_writes, limits=PrefillLimits(max_handoffs=3))
    for number, size in enumerate(sizes):
        side.submit(generate(f"r{number}", prompt=size), local=number in local)
    turn, idle = 0, 0
    while side.queue.open_count:
        if turn in flips:
            also_writes = not also_writes
            side.queue.set_also_writes(also_writes)
        turn += 1
        _, chunks = side.queue.candidates(1.0)
        if chunks:
            side.step(chunks[0].num_tokens, token_id=7)
            write_out(side)
            idle = 0
        elif side.holder.on_ended:
            side.holder.end(next(iter(side.holder.on_ended)), LeaseOutcome.RELEASED)
        idle += 1
        assert idle < 2 * len(sizes) + 4, side.queue
    assert sorted(delta.request_id for delta in side.deltas.seen) == sorted(
        f"r{number}" for number in range(len(sizes))
    )
    side.assert_clean()
