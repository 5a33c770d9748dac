"""Reading the front of a prompt while its fetch runs: how it is split, who yields to whom, and what is counted."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import Internal
from contracts.ids import LeaseId
from engine.room import Demand
from kvstore.prefix_cache import PrefixCache
from kvtransfer import LeaseOutcome
from prefill.read_ahead import AHEAD_SHARE, split
from tests.support.prefill_side import Side
from tests.support.roles import IDENTITY, generate, key
from tests.unit.prefill.test_queue import from_source

#: 10 full blocks of 4 and a tail.
PROMPT = 42


@given(
    start=st.integers(0, 50),
    length=st.integers(1, 200),
    block_s=st.floats(1e-4, 1.0),
    step_s=st.floats(0.0, 1.0),
    fetch_block_s=st.floats(0.0, 1.0),
    ask_s=st.floats(0.0, 1.0),
)
def test_a_split_is_the_largest_with_which_reading_is_over_first(
    start: int, length: int, block_s: float, step_s: float, fetch_block_s: float, ask_s: float
) -> None:
    stop = start + length

    def read_s(num_blocks: int) -> float:
        return step_s + block_s * num_blocks

    def fetch_s(num_blocks: int) -> float:
        return ask_s + fetch_block_s * num_blocks

    middle = split(start, stop, read_s=read_s, fetch_s=fetch_s)
    assert start <= middle < stop
    in_time = [m for m in range(start + 1, stop) if read_s(m - start) <= AHEAD_SHARE * fetch_s(stop - m)]
    assert middle == max(in_time, default=start)


def test_nothing_is_read_ahead_where_one_of_the_two_is_not_known() -> None:
    assert split(2, 9, read_s=lambda blocks: 0.0, fetch_s=lambda blocks: 1.0) == 2
    assert split(2, 9, read_s=lambda blocks: 0.1, fetch_s=lambda blocks: None) == 2


def slow_link() -> Side:
    """Reading a block takes 1 s, fetching one 2 s: of 10 blocks 6 are read and 4 fetched, but for the share."""
    return Side(num_blocks=24, read_block_s=1.0, fetch_block_s=2.0)


def begin(side: Side) -> None:
    side.submit(generate("a", prompt=PROMPT), prefix=from_source(10))
    assert side.fetches == [("p1", 6, 10)]


def bring(side: Side, start: int, stop: int) -> None:
    """As a fetch that brings these blocks of the prompt."""
    prefixes = PrefixCache(side.ledger, IDENTITY)
    chain = prefixes.chain(generate(prompt=PROMPT).token_ids, "")
    blocks = side.ledger.allocate("fetch", stop - start)
    assert blocks is not None
    for position, block in enumerate(blocks, start):
        side.ledger.set_key(block, chain[position])
    side.ledger.release_all("fetch")


def ahead_tokens(side: Side) -> list[int]:
    return [chunk.num_tokens for chunk in side.queue.candidates(0.0)[1]]


def end(side: Side) -> None:
    side.queue.cancel(key("a"), "test")
    side.assert_clean()


def test_an_idle_engine_reads_up_to_the_split_and_holds_nothing_then() -> None:
    side = slow_link()
    begin(side)
    assert ahead_tokens(side) == [24]
    assert side.queue.waiting_count == 1
    side.step(10)
    assert ahead_tokens(side) == [14]
    side.step(14)
    assert ahead_tokens(side) == []
    load = side.ledger.load()
    assert (load["owned_blocks"], load["cached_blocks"]) == (0, 6)
    assert side.holder.calls == [], "no lease stands for what is not admitted"
    end(side)


def test_what_was_read_and_what_was_fetched_meet_and_only_the_rest_is_computed() -> None:
    side = slow_link()
    begin(side)
    side.step(24)
    bring(side, 6, 10)
    side.fetched(8.0, 6, dram=3, ssd=1)
    assert ahead_tokens(side) == [2]
    side.step(2, token_id=7, now_s=9.0)
    phases = side.deltas.seen[-1].phases
    assert phases is not None
    assert (phases.cached_tokens, phases.cached_by_tier) == (16, {"dram": 12, "ssd": 4})
    assert (phases.queue_s, phases.fetch_s, phases.prefill_s) == (9.0, 8.0, 0.5)
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    assert side.read == ["a"]
    side.assert_clean()


def test_a_fetch_that_ends_early_ends_the_reading_at_the_next_step_and_the_gap_is_read_in_its_turn() -> None:
    side = slow_link()
    begin(side)
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 9, 0.0)
    bring(side, 6, 10)
    side.fetched(0.5, 6, peer=4)
    side.queue.apply(chunks[0].sequence_id, 9, None, 1.0)
    # Blocks 0 and 1 are final; 2 to 5 are the gap.
    assert ahead_tokens(side) == [16]
    assert side.queue.pending_tokens == 16 + 2
    assert side.holder.calls == [("open", 11, "d0"), ("advance", "lease-1", 2)]
    side.step(10)
    assert side.holder.calls[-1] == ("advance", "lease-1", 4)
    side.step(6)
    assert side.holder.calls[-1] == ("advance", "lease-1", 10), "what was fetched follows at once"
    assert ahead_tokens(side) == [2]
    side.step(2, token_id=7)
    phases = side.deltas.seen[-1].phases
    assert phases is not None
    assert phases.cached_by_tier == {"peer": 16}
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    side.assert_clean()


def test_a_fetch_that_fails_leaves_what_was_read() -> None:
    side = slow_link()
    begin(side)
    side.step(24)
    side.fetched(8.0, 6)
    assert ahead_tokens(side) == [PROMPT - 24]
    side.step(PROMPT - 24, token_id=7)
    phases = side.deltas.seen[-1].phases
    assert phases is not None
    assert (phases.cached_tokens, phases.cached_by_tier) == (0, {})
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    side.assert_clean()


def test_a_late_fetch_is_overtaken_and_not_waited_for() -> None:
    side = slow_link()
    begin(side)
    side.step(24)
    # Expected after 8 s, and reading all takes 10.
    assert ahead_tokens(side) == []
    assert [chunk.num_tokens for chunk in side.queue.candidates(10.5)[1]] == [16]
    side.step(16, now_s=10.5)
    assert side.waiters == [], "its fetch is not wanted any more"
    assert [chunk.num_tokens for chunk in side.queue.candidates(11.0)[1]] == [2]
    end(side)


def test_whoever_comes_goes_first() -> None:
    side = slow_link()
    begin(side)
    side.step(8)
    other = msgspec.structs.replace(generate("b", prompt=8), token_ids=tuple(range(500, 508)))
    side.submit(other, now_s=1.0)
    assert ahead_tokens(side) == [8]
    assert side.ledger.load()["cached_blocks"] == 2
    side.step(8, token_id=7)
    assert ahead_tokens(side) == [16], "and then it is read on"
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    end(side)


def test_it_yields_to_an_offer_and_takes_no_room_that_somebody_waits_for() -> None:
    side = slow_link()
    begin(side)
    side.step(8)
    side.room.offer = Demand(arrival_s=0.0, num_blocks=20)
    assert ahead_tokens(side) == []
    assert side.ledger.load()["owned_blocks"] == 0
    side.room.offer = None
    side.room.promise("answer", 24)
    assert ahead_tokens(side) == []
    side.room.forget("answer")
    assert ahead_tokens(side) == [16]
    end(side)


def test_it_is_not_split_where_others_want_the_engine() -> None:
    side = slow_link()
    side.submit(msgspec.structs.replace(generate("b", prompt=8), token_ids=tuple(range(500, 508))))
    side.submit(generate("a", prompt=PROMPT), prefix=from_source(10))
    assert side.fetches == [("p1", 0, 10)]
    side.queue.cancel(key("b"), "test")
    assert ahead_tokens(side) == [], "all of it is on its way"
    end(side)


def test_one_dropped_in_a_step_that_reads_ahead_lets_go_when_that_ends() -> None:
    side = slow_link()
    begin(side)
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 10, 0.0)
    side.queue.cancel(key("a"), "test")
    assert side.waiters == []
    assert side.ledger.load()["owned_blocks"] == 6, "the engine writes them"
    side.queue.apply(chunks[0].sequence_id, 10, None, 1.0)
    side.assert_clean()


def test_a_step_that_fails_ends_the_prompt_that_was_read_ahead() -> None:
    side = slow_link()
    begin(side)
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 10, 0.0)
    side.queue.fail(chunks[0].sequence_id, Internal("the engine broke"))
    assert side.deltas.seen[-1].finish == "error"
    assert side.waiters == []
    side.assert_clean()


def test_a_deadline_that_passes_while_it_is_read_ahead_ends_it() -> None:
    side = slow_link()
    side.submit(generate("a", prompt=PROMPT, deadline_s=1.0), prefix=from_source(10))
    side.step(10, now_s=0.5)
    side.queue.expire(2.0)
    assert side.deltas.seen[-1].finish == "error"
    side.assert_clean()


def test_a_fetch_for_which_there_was_no_room_is_begun_when_its_turn_has_come() -> None:
    side = Side(num_blocks=16)
    side.room.promise("answer", 16)
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    assert side.fetches == []
    assert [(wanted.store.worker_id, len(wanted.keys)) for wanted in side.queue.wanted(8)] == [("p1", 3)]
    side.room.forget("answer")
    assert ahead_tokens(side) == []
    assert side.fetches == [("p1", 0, 3)]
    assert side.queue.wanted(8) == []
    side.fetched(0.5, 0)
    assert ahead_tokens(side) == [14], "it came to nothing, and is not tried again"
    assert len(side.fetches) == 1
    end(side)


def test_a_prompt_that_joined_a_longer_fetch_takes_no_more_of_it_than_it_can_use() -> None:
    """Its last token is always computed, though another prompt goes on with the same blocks."""
    side = slow_link()
    side.submit(generate("a", prompt=36), prefix=from_source(10))
    start = side.fetches[0][1]
    assert 0 < start < 8
    bring(side, start, 10)
    side.fetched(1.0, start, peer=10 - start)
    assert ahead_tokens(side) == [4 * start]
    side.step(4 * start)
    assert ahead_tokens(side) == [4]
    end(side)
