"""The prefill side: admission, chunks, the lease it drives, and every way a prompt can end."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest, DeadlineExceeded, IncompatiblePeer, Internal, NoCapacity, TandemError
from contracts.ids import Incarnation, LeaseId, RequestId, WorkerId
from contracts.messages import LeaseTerms, Peer, PrefixPlan
from engine.plan import Sampled
from engine.room import Demand
from kvstore.prefix_cache import PrefixCache
from kvtransfer import LeaseOutcome
from prefill import PrefillLimits
from tests.support.prefill_side import Side
from tests.support.roles import EOS, IDENTITY, READER, generate, key

TERMS = LeaseTerms(
    lease_id=LeaseId("lease-1"),
    holder=Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(1), address="p0:1"),
    identity=IDENTITY,
    endpoints={},
    num_blocks=1,
    ttl_s=10.0,
)


def test_chunks_advance_the_lease_over_full_blocks_and_the_seal_takes_the_tail() -> None:
    side = Side()
    side.submit(generate(prompt=10))
    side.step(5)
    side.step(4)
    side.step(1, token_id=7)
    assert side.holder.calls == [
        ("open", 3, "d0"),
        ("advance", "lease-1", 1),
        ("advance", "lease-1", 2),
        ("seal", "lease-1", 3, 10),
    ]
    assert side.deltas.tokens == [7]
    assert side.deltas.seen[0].finish is None
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    side.assert_clean()


def test_phases_count_from_receipt_to_first_step_to_first_token() -> None:
    side = Side()
    side.submit(generate(prompt=4), now_s=1.0)
    side.step(4, token_id=7, now_s=3.0)
    phases = side.deltas.seen[0].phases
    assert phases is not None
    assert (phases.queue_s, phases.prefill_s) == (2.0, 0.5)


def test_an_answer_that_ends_with_its_first_token_withdraws_the_offer() -> None:
    side = Side()
    side.submit(generate(prompt=4, max_tokens=5))
    side.step(4, token_id=EOS)
    assert side.deltas.seen[0].finish == "stop"
    assert side.holder.calls[-1][0] == "withdraw"
    side.assert_clean()


def test_an_answer_of_one_token_is_offered_to_nobody() -> None:
    side = Side()
    side.submit(generate(prompt=4, max_tokens=1))
    side.step(4, token_id=7)
    assert side.deltas.seen[0].finish == "length"
    assert (side.holder.calls, side.handed_over) == ([], [])
    side.assert_clean()


def test_a_mixed_worker_keeps_the_blocks() -> None:
    side = Side()
    side.submit(generate(prompt=6), local=True)
    side.step(6, token_id=7)
    assert side.holder.calls == []
    sequence = side.handed_over[0]
    assert sequence.token_ids[-1] == 7
    assert sequence.num_computed == 6
    assert side.ledger.blocks_of(sequence.owner) == sequence.block_ids
    assert side.queue.open_count == 0


def test_prompts_are_admitted_in_order_while_blocks_last() -> None:
    side = Side(num_blocks=4)
    for name, prompt in (("a", 8), ("b", 12), ("c", 4)):
        side.submit(generate(name, prompt=prompt))
    _, chunks = side.queue.candidates(0.0)
    assert len(chunks) == 1, "b does not fit beside a, and c must not overtake b"
    side.queue.cancel(key("a"), "test")
    _, chunks = side.queue.candidates(0.0)
    assert [chunk.num_tokens for chunk in chunks] == [12, 4]


def test_nothing_is_admitted_while_an_answer_starves_or_an_older_offer_waits() -> None:
    side = Side()
    side.submit(generate(), now_s=1.0)
    side.room.starving = True
    assert side.queue.candidates(1.0) == ([], [])
    side.room.starving = False
    side.room.offer = Demand(arrival_s=0.5, num_blocks=1)
    assert side.queue.candidates(1.0) == ([], [])
    side.room.offer = Demand(arrival_s=1.5, num_blocks=1)
    assert len(side.queue.candidates(1.0)[1]) == 1
    assert side.queue.waiting_count == 0


def test_a_full_queue_refuses_with_numbers_and_when_to_ask_again() -> None:
    side = Side(limits=PrefillLimits(max_waiting=1))
    side.submit(generate("a"), now_s=0.0)
    with pytest.raises(NoCapacity, match="p0 has 1 prompts waiting") as refused:
        side.submit(generate("b"), now_s=7.0)
    assert refused.value.retry_after_s == 7.0


def test_the_queue_is_bounded_in_tokens_but_one_prompt_may_always_wait() -> None:
    side = Side(num_blocks=4, limits=PrefillLimits(max_waiting_pools=0.5))
    side.submit(generate("large", prompt=16))
    with pytest.raises(NoCapacity, match="16 prompt tokens waiting, 1 more would pass the limit of 8"):
        side.submit(generate("b", prompt=1))
    side.queue.cancel(key("large"), "test")
    side.submit(generate("c", prompt=8))
    assert side.queue.pending_tokens == 8


def test_kv_that_nobody_takes_stops_the_computing_at_its_budget() -> None:
    """8 of 16 blocks: two prompts of 4; the third stays token ids although 8 blocks are free."""
    side = Side()
    for name in ("a", "b", "c"):
        side.submit(generate(name, prompt=16))
    for _ in range(3):
        side.step(16, token_id=7)
    assert side.ledger.available_blocks == 16, "a recording holder pins nothing"
    for name in ("d", "e"):
        side.submit(generate(name, prompt=4))
    assert side.queue.candidates(2.0) == ([], [])
    assert side.room.prompt is None, "it waits for readers, not for blocks"
    side.holder.end(LeaseId("lease-2"), LeaseOutcome.RELEASED)
    assert side.queue.candidates(2.0) == ([], []), "8 blocks are still untaken"
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    assert len(side.queue.candidates(2.0)[1]) == 2


def test_untaken_handoffs_are_bounded_in_number() -> None:
    side = Side(limits=PrefillLimits(max_handoffs=1))
    side.submit(generate("a", prompt=2))
    side.step(2, token_id=7)
    side.submit(generate("b", prompt=2))
    assert side.queue.candidates(2.0) == ([], [])
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    assert len(side.queue.candidates(2.0)[1]) == 1


def test_a_worker_that_writes_too_never_lends_more_than_the_budget() -> None:
    side = Side(also_writes=True)
    side.submit(generate("a", prompt=20))
    side.submit(generate("b", prompt=16))
    _, chunks = side.queue.candidates(1.0)
    assert len(chunks) == 1, "5 blocks of 8 are lent; 4 more would be too many"
    assert side.room.view().lent_blocks == 5
    assert side.room.prompt is None


def test_a_worker_that_writes_too_keeps_what_is_larger_than_the_budget() -> None:
    side = Side(also_writes=True)
    side.submit(generate("large", prompt=33))
    side.step(33, token_id=7)
    assert side.holder.calls == []
    assert [sequence.request.request_id for sequence in side.handed_over] == ["large"]


def test_a_local_prompt_leaves_room_for_what_was_promised() -> None:
    side = Side(num_blocks=8, also_writes=True)
    side.room.promise("running", 2)
    side.submit(generate("a", prompt=20, max_tokens=50), local=True)
    assert side.queue.candidates(1.0) == ([], []), "5 blocks, 2 promised, 2 to grow: 9 of 8"
    assert side.room.prompt is not None
    side.room.promise("running", 1)
    assert len(side.queue.candidates(1.0)[1]) == 1
    assert side.room.view().promised_blocks == 3


def test_what_never_fits_is_refused_with_numbers() -> None:
    side = Side(num_blocks=2)
    with pytest.raises(BadRequest, match="needs 3 KV blocks, p0 has 2"):
        side.submit(generate(prompt=9))
    with pytest.raises(BadRequest, match="64 prompt tokens leave no room"):
        side.submit(generate(prompt=64))


def test_an_unknown_token_fails_its_request_and_not_the_step_of_others() -> None:
    side = Side()
    with pytest.raises(BadRequest, match="token id 1000 is outside the model's vocabulary of 1000"):
        side.submit(msgspec.structs.replace(generate(), token_ids=(1, 1000)))
    side.assert_clean()


def test_a_repeat_changes_nothing() -> None:
    side = Side()
    side.submit(generate())
    side.submit(generate())
    assert side.queue.open_count == 1
    side.step(6, token_id=EOS)
    side.submit(generate())
    side.assert_clean()


def test_a_cancel_that_overtakes_its_request_wins() -> None:
    side = Side()
    side.queue.cancel(key(), "client gone")
    side.submit(generate())
    side.assert_clean()
    side.submit(generate(attempt=2))
    assert side.queue.open_count == 1


def test_cancel_in_a_step_frees_the_blocks_only_after_it() -> None:
    side = Side()
    side.submit(generate(prompt=8))
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 8, 0.0)
    side.queue.cancel(key(), "client gone")
    assert side.holder.calls[-1] == ("withdraw", "lease-1", "client gone")
    assert side.ledger.load()["owned_blocks"] == 2, "the engine still writes them"
    side.queue.apply(chunks[0].sequence_id, 8, Sampled(token_id=7), 1.0)
    assert side.deltas.seen == []
    side.assert_clean()


@pytest.mark.parametrize("stage", ["waiting", "running", "sealed"])
def test_cancel_at_each_stage(stage: str) -> None:
    side = Side()
    side.submit(generate(prompt=4))
    if stage == "running":
        side.step(2)
    elif stage == "sealed":
        side.step(4, token_id=7)
    side.queue.cancel(key(), "client gone")
    side.assert_clean()


@pytest.mark.parametrize("outcome", [LeaseOutcome.EXPIRED, LeaseOutcome.REFUSED])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_lost_reader_fails_the_request(outcome: LeaseOutcome, sealed: bool) -> None:
    side = Side()
    side.submit(generate(prompt=4))
    side.step(4 if sealed else 2, token_id=7 if sealed else None)
    side.holder.end(LeaseId("lease-1"), outcome, "gone")
    last = side.deltas.seen[-1]
    assert (last.finish, last.index) == ("error", 1 if sealed else 0)
    assert last.error is not None
    assert last.error.code == "transfer_aborted"
    side.assert_clean()


def test_a_failed_step_fails_the_request() -> None:
    side = Side()
    side.submit(generate(prompt=4))
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 4, 0.0)
    side.queue.fail(chunks[0].sequence_id, Internal("boom"))
    assert side.deltas.seen[-1].error is not None
    side.assert_clean()


def test_deadlines_end_prompts_wherever_they_are() -> None:
    side = Side()
    side.submit(generate("sealed", prompt=4, deadline_s=5.0))
    side.step(4, token_id=7)
    side.submit(generate("waits", prompt=4, deadline_s=5.0))
    side.queue.expire(4.9)
    assert side.queue.open_count == 2
    side.queue.expire(5.1)
    ended = {delta.request_id: delta.error for delta in side.deltas.seen if delta.finish == "error"}
    assert {name: error.code for name, error in ended.items() if error} == {
        "sealed": "deadline_exceeded",
        "waits": "deadline_exceeded",
    }
    error = ended[RequestId("sealed")]
    assert error is not None
    assert error.message == "the request's deadline passed before d0 had taken its KV"
    assert ("withdraw", "lease-1", error.message) in side.holder.calls
    side.assert_clean()


def test_a_lease_may_wait_for_its_reader_as_long_as_the_request_may() -> None:
    side = Side()
    side.submit(generate(prompt=4, deadline_s=50.0), now_s=1.0)
    side.queue.candidates(11.0)
    max_age_s = side.holder.max_age_s[LeaseId("lease-1")]
    assert max_age_s is not None
    assert max_age_s >= 40.0


@pytest.mark.parametrize(
    ("refusal", "code"),
    [
        (NoCapacity("d0 takes no more offers"), "no_capacity"),
        (IncompatiblePeer("rope_base"), "incompatible_peer"),
        (BadRequest("can never fit"), "bad_request"),
        (DeadlineExceeded("no answer within 2.5 s"), "worker_unavailable"),
    ],
)
async def test_why_the_reader_refused_reaches_the_client(refusal: TandemError, code: str) -> None:
    side = Side(answer=refusal)
    side.submit(generate(prompt=4))
    side.queue.candidates(0.0)
    with pytest.raises(type(refusal)):
        await side.holder.send_offer[LeaseId("lease-1")](TERMS, 1.0)
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.REFUSED, refusal.message)
    error = side.deltas.seen[-1].error
    assert error is not None
    assert error.code == code
    assert refusal.message in error.message
    side.assert_clean()


async def test_a_reader_that_gave_up_what_it_had_accepted_speaks_for_itself() -> None:
    side = Side()
    side.submit(generate(prompt=4))
    side.queue.candidates(0.0)
    await side.holder.send_offer[LeaseId("lease-1")](TERMS, 1.0)
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.REFUSED, "the reader let the lease go")
    assert side.deltas.seen == []
    side.assert_clean()


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    also_writes=st.booleans(),
    ends=st.lists(st.tuples(st.integers(0, 11), st.sampled_from(LeaseOutcome)), max_size=12),
    cancels=st.lists(st.integers(0, 11), max_size=4),
)
def test_whatever_ends_the_books_are_clean_and_the_budget_holds(
    sizes: list[int], also_writes: bool, ends: list[tuple[int, LeaseOutcome]], cancels: list[int]
) -> None:
    side = Side(also_writes=also_writes, limits=PrefillLimits(max_handoffs=3))
    for number, size in enumerate(sizes):
        side.submit(generate(f"r{number}", prompt=size))

    def work() -> None:
        for _ in range(2 * len(sizes)):
            _, chunks = side.queue.candidates(1.0)
            assert not also_writes or side.room.view().lent_blocks <= 8
            if not chunks:
                return
            side.step(chunks[0].num_tokens, token_id=7)
            for sequence in side.handed_over:
                side.ledger.release_all(sequence.owner)
                side.room.forget(sequence.owner)

    work()
    for number, outcome in ends:
        open_leases = list(side.holder.on_ended)
        if open_leases:
            side.holder.end(open_leases[number % len(open_leases)], outcome)
        work()
    for number in cancels:
        side.queue.cancel(key(f"r{number % len(sizes)}"), "test")
    while side.holder.on_ended and side.queue.open_count:
        side.holder.end(next(iter(side.holder.on_ended)), LeaseOutcome.RELEASED)
        work()
    side.assert_clean()


# --- the prefix cache -----------------------------------------------------------------------------------------------


def read_whole(side: Side, name: str, *, prompt: int, now_s: float = 0.0, salt: str = "") -> None:
    """Submits a prompt for another worker, reads it in one step, and has it taken."""
    request = msgspec.structs.replace(generate(name, prompt=prompt), cache_salt=salt)
    side.submit(request, now_s=now_s)
    _, chunks = side.queue.candidates(now_s)
    side.step(chunks[0].num_tokens, token_id=7, now_s=now_s)
    side.holder.end(LeaseId(f"lease-{side.holder.opened}"), LeaseOutcome.RELEASED)


def test_a_prompt_that_begins_like_another_computes_only_what_is_new() -> None:
    side = Side()
    read_whole(side, "a", prompt=10)
    assert side.ledger.load()["cached_blocks"] == 2, "the tail is not full"
    side.submit(generate("b", prompt=14))
    assert side.queue.pending_tokens == 6, "what is found does not count"
    _, chunks = side.queue.candidates(0.0)
    assert [chunk.num_tokens for chunk in chunks] == [6]
    side.step(6, token_id=7)
    assert side.holder.calls[-3:] == [("open", 4, "d0"), ("advance", "lease-2", 2), ("seal", "lease-2", 4, 14)]
    phases = side.deltas.seen[-1].phases
    assert phases is not None
    assert phases.cached_tokens == 8
    side.holder.end(LeaseId("lease-2"), LeaseOutcome.RELEASED)
    side.assert_clean()


def test_a_prompt_known_whole_computes_its_last_block_again() -> None:
    side = Side()
    read_whole(side, "a", prompt=12)
    side.submit(generate("b", prompt=12))
    _, chunks = side.queue.candidates(0.0)
    assert [chunk.num_tokens for chunk in chunks] == [4]
    side.queue.cancel(key("b"), "test")
    side.assert_clean()


def test_blocks_of_a_prompt_that_is_still_read_are_shared_as_far_as_they_are_final() -> None:
    side = Side()
    side.submit(generate("a", prompt=12))
    side.step(6)
    side.submit(generate("b", prompt=12))
    _, chunks = side.queue.candidates(0.0)
    assert [chunk.num_tokens for chunk in chunks] == [6, 8]
    a, b = side.ledger.blocks_of("a#1.1"), side.ledger.blocks_of("b#1.1")
    assert (a[0], len(set(a) | set(b))) == (b[0], 5)
    assert side.room.view().lent_blocks == 5, "a shared block is lent once"
    side.queue.cancel(key("a"), "test")
    assert side.room.view().lent_blocks == 3
    side.queue.cancel(key("b"), "test")
    side.assert_clean()


def test_a_failed_step_leaves_only_what_was_final_before() -> None:
    side = Side()
    side.submit(generate("a", prompt=12))
    side.step(4)
    _, chunks = side.queue.candidates(0.0)
    side.queue.build(chunks[0].sequence_id, 8, 0.0)
    side.queue.fail(chunks[0].sequence_id, Internal("the step failed"))
    assert side.ledger.load()["cached_blocks"] == 1
    side.assert_clean()


def test_prompts_with_other_salts_share_nothing() -> None:
    side = Side()
    read_whole(side, "a", prompt=10, salt="tenant-a")
    for salt, num_tokens in (("tenant-b", 10), ("tenant-a", 2)):
        side.submit(msgspec.structs.replace(generate(salt, prompt=10), cache_salt=salt))
        assert side.queue.candidates(0.0)[1][0].num_tokens == num_tokens
        side.queue.cancel(key(salt), "test")
    side.assert_clean()


def test_without_the_cache_nothing_is_kept() -> None:
    side = Side(prefix_cache=False)
    read_whole(side, "a", prompt=10)
    assert side.ledger.load()["free_blocks"] == side.num_blocks
    side.submit(generate("b", prompt=10))
    assert side.queue.candidates(0.0)[1][0].num_tokens == 10
    side.queue.cancel(key("b"), "test")
    side.assert_clean()


def test_shared_blocks_that_others_hold_take_no_room() -> None:
    """5 of 8 blocks are held; 3 more suffice for a prompt of 7 whose first 4 are among them."""
    side = Side(num_blocks=8)
    side.submit(generate("a", prompt=20))
    side.step(16)
    side.submit(generate("b", prompt=28))
    assert len(side.queue.candidates(0.0)[1]) == 2
    assert side.ledger.available_blocks == 0
    for name in ("a", "b"):
        side.queue.cancel(key(name), "test")
    side.assert_clean()


def test_cached_blocks_that_a_prompt_shares_count_as_taken() -> None:
    """A prompt of 7 whose first 4 are cached needs 7 of the available ones, not 3."""
    side = Side(num_blocks=8)
    read_whole(side, "a", prompt=16)
    side.submit(generate("other", prompt=8))
    assert side.ledger.load()["cached_blocks"] == 4
    request = msgspec.structs.replace(generate("x", prompt=8), token_ids=tuple(range(500, 508)))
    side.queue.cancel(key("other"), "test")
    side.submit(request)
    side.queue.candidates(0.0)
    assert side.ledger.available_blocks == 6
    side.submit(generate("b", prompt=28))
    assert len(side.queue.candidates(0.0)[1]) == 1
    assert side.queue.waiting_count == 1
    side.queue.cancel(key("x"), "test")
    assert [chunk.num_tokens for chunk in side.queue.candidates(0.0)[1]] == [12]
    side.queue.cancel(key("b"), "test")
    side.assert_clean()


def test_an_answer_of_one_token_is_tallied() -> None:
    side = Side()
    side.submit(generate(prompt=5, max_tokens=1))
    side.step(5, token_id=9)
    assert [(tally.answers, tally.output_tokens) for tally in side.queue.answer_tallies.report()] == [
        (0, 0),
        (0, 0),
        (0, 0),
        (1, 1),
    ]


def test_pending_pairs_count_from_what_is_cached() -> None:
    side = Side()
    read_whole(side, "a", prompt=8)
    side.submit(generate("b", prompt=12))
    assert side.queue.pending_pairs == 4 * 8 + 10
    side.queue.candidates(0.0)
    assert side.queue.pending_pairs == 4 * 8 + 10
    side.queue.cancel(key("b"), "test")
    assert side.queue.pending_pairs == 0


def test_prompts_count_for_their_writers_until_they_are_read() -> None:
    side = Side()
    side.submit(generate("a", prompt=8))
    side.submit(generate("b", prompt=8))
    side.submit(generate("own", prompt=8), local=True)
    assert dict(side.queue.unread_for) == {READER.worker_id: 2}
    side.queue.candidates(0.0)
    side.step(8, token_id=9)
    assert dict(side.queue.unread_for) == {READER.worker_id: 1}
    side.queue.cancel(key("b"), "test")
    side.queue.cancel(key("own"), "test")
    assert not side.queue.unread_for


# --- prefixes from other workers ------------------------------------------------------------------------------------

SOURCE = Peer(worker_id=WorkerId("p1"), incarnation=Incarnation(1), address="p1:1")


def from_source(blocks: int, *, local: int = 0) -> PrefixPlan:
    return PrefixPlan(local_blocks=local, source=SOURCE, source_blocks=blocks)


def arrive(side: Side, num_tokens: int) -> None:
    """As a fetch that brings the first blocks of a prompt of `generate`."""
    prefixes = PrefixCache(side.ledger, IDENTITY)
    chain = prefixes.chain(generate(prompt=num_tokens).token_ids, "")
    blocks = side.ledger.allocate("fetch", len(chain))
    assert blocks is not None
    prefixes.name(chain, blocks, 0, len(chain))
    side.ledger.release_all("fetch")


def test_a_prompt_is_queued_when_its_beginning_has_come_and_computes_the_rest() -> None:
    side = Side()
    side.submit(generate("a", prompt=14), prefix=from_source(9), now_s=1.0)
    assert side.fetches == [("p1", 0, 3)], "the last token is computed here"
    assert side.queue.candidates(1.0) == ([], [])
    assert (side.queue.waiting_count, side.ledger.load()["free_blocks"]) == (1, 16), "it waits without blocks"
    arrive(side, 12)
    side.fetched(1.5, dram=2, ssd=1)
    assert [chunk.num_tokens for chunk in side.queue.candidates(2.0)[1]] == [2]
    side.step(2, token_id=7, now_s=2.0)
    phases = side.deltas.seen[-1].phases
    assert phases is not None
    assert (phases.queue_s, phases.fetch_s, phases.cached_tokens) == (1.0, 0.5, 12)
    assert phases.cached_by_tier == {"dram": 8, "ssd": 4}
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED)
    side.assert_clean()


def test_a_fetch_that_brings_nothing_costs_only_the_computing() -> None:
    side = Side()
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    side.fetched(0.5)
    assert [chunk.num_tokens for chunk in side.queue.candidates(1.0)[1]] == [14]
    side.queue.cancel(key("a"), "test")
    side.assert_clean()


def test_others_are_read_while_a_prompt_waits_for_its_beginning_and_it_keeps_its_turn() -> None:
    side = Side(num_blocks=8)
    side.submit(generate("a", prompt=14), prefix=from_source(3), now_s=0.0)
    for name, base in (("b", 100), ("c", 200)):
        tokens = tuple(range(base, base + 14))
        side.submit(msgspec.structs.replace(generate(name, prompt=14), token_ids=tokens), now_s=1.0)
    assert len(side.queue.candidates(1.0)[1]) == 2
    side.fetched(1.5)
    assert side.queue.waiting_count == 1
    for name in ("a", "b", "c"):
        side.queue.cancel(key(name), "test")
    side.assert_clean()


def test_a_cancelled_prompt_waits_for_no_fetch() -> None:
    side = Side()
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    side.queue.cancel(key("a"), "test")
    assert side.waiters == []
    side.submit(generate("b", prompt=14, deadline_s=1.0), prefix=from_source(3))
    side.queue.expire(2.0)
    assert side.waiters == []
    assert side.deltas.seen[-1].finish == "error"
    side.assert_clean()


def test_prompts_that_wait_for_fetches_count_in_the_bound_of_the_queue() -> None:
    side = Side(limits=PrefillLimits(max_waiting=1))
    side.submit(generate("a", prompt=14), prefix=from_source(3), now_s=0.0)
    with pytest.raises(NoCapacity, match="p0 has 1 prompts waiting") as refused:
        side.submit(generate("b"), now_s=7.0)
    assert refused.value.retry_after_s == 7.0


@pytest.mark.parametrize(
    ("here", "plan", "stop"),
    [
        (0, from_source(3), 3),
        (4, from_source(3), 3),
        (4, from_source(3, local=1), 3),
        (8, from_source(3), 0),
        (12, from_source(3), 0),
        (8, from_source(3, local=2), 3),
        (4, PrefixPlan(local_blocks=1), 0),
        (4, PrefixPlan(source_blocks=3), 0),
    ],
)
def test_what_is_fetched_is_what_still_gains_at_least_half(here: int, plan: PrefixPlan, stop: int) -> None:
    side = Side()
    if here:
        arrive(side, here)
    side.submit(generate("a", prompt=14), prefix=plan)
    assert side.fetches == ([("p1", here // 4, stop)] if stop else [])
    assert len(side.queue.candidates(0.0)[1]) == (0 if stop else 1)


def test_a_fetch_takes_no_room_that_is_promised_or_waited_for() -> None:
    side = Side(num_blocks=8)
    side.room.promise("answer", 6)
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    side.room.forget("answer")
    side.room.offer = Demand(arrival_s=0.0, num_blocks=1)
    side.submit(generate("b", prompt=14), prefix=from_source(3))
    side.room.offer = None
    side.room.starving = True
    side.submit(generate("c", prompt=14), prefix=from_source(3))
    assert side.fetches == []
    side.room.starving = False
    side.submit(generate("d", prompt=14), prefix=from_source(3))
    assert len(side.fetches) == 1


def test_a_fetch_leaves_the_blocks_that_the_head_of_the_queue_waits_for() -> None:
    side = Side(num_blocks=8)
    side.room.promise("answer", 2)
    side.submit(generate("head", prompt=22), local=True)
    assert side.queue.candidates(0.0) == ([], []), "6 blocks and one to grow, besides the 2 that are promised"
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    assert side.fetches == []
    side.room.forget("answer")
    assert len(side.queue.candidates(0.0)[1]) == 1
    assert side.fetches == [], "whoever is queued already stays there"


def test_a_fetch_beside_a_head_that_has_room_is_begun() -> None:
    side = Side(num_blocks=16)
    side.submit(generate("head", prompt=22), local=True)
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    assert len(side.fetches) == 1


def test_a_prompt_that_may_not_be_fetched_for_is_queued_at_once() -> None:
    side = Side(may_fetch=False)
    side.submit(generate("a", prompt=14), prefix=from_source(3))
    assert len(side.fetches) == 1
    assert [chunk.num_tokens for chunk in side.queue.candidates(0.0)[1]] == [14]


def test_prompts_without_blocks_are_told_with_what_they_would_take() -> None:
    side = Side(prefix_cache=False)
    side.submit(generate("a", prompt=5 * 4))
    side.submit(generate("b", prompt=12 * 4))
    assert side.queue.waiting_blocks == 5 + 12
    side.step(20, token_id=EOS)
    # Of 16 blocks the first had five.
    assert side.queue.waiting_blocks == 12
    side.step(48, token_id=EOS)
    assert side.queue.waiting_blocks == 0
