"""The decode side: adoption, growth, preemption by recompute, and every way an answer can end."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest, Cancelled, Internal, NoCapacity, TransferAborted
from contracts.messages import Seal
from contracts.requests import TokenDelta
from engine.plan import Sampled
from engine.room import Demand
from engine.sequence import owner_name, request_key
from tests.support.decode_side import Side
from tests.support.roles import BLOCK_TOKENS, EOS, IDENTITY, generate, key


def test_an_adopted_sequence_decodes_from_its_second_token_to_its_end() -> None:
    side = Side()
    side.adopt(generate(prompt=6, max_tokens=4))
    while side.batch.open_count:
        side.step()
    assert [delta.index for delta in side.deltas.seen] == [1, 2, 3]
    assert [delta.finish for delta in side.deltas.seen] == [None, None, "length"]
    side.assert_clean()


def test_phases_on_the_first_and_the_last_delta() -> None:
    side = Side()
    side.adopt(generate(prompt=6, max_tokens=4), now_s=1.0)
    for now_s in (2.0, 3.0, 4.0):
        side.step(now_s=now_s)
    first, middle, last = (delta.phases for delta in side.deltas.seen)
    assert first is not None
    assert (first.handoff_s, first.decode_s) == (1.0, 1.0)
    assert middle is None
    assert last is not None
    assert (last.handoff_s, last.decode_s) == (None, 3.0)


def test_an_end_token_ends() -> None:
    side = Side()
    side.adopt(generate())
    side.step(token_id=EOS)
    assert side.deltas.seen[-1].finish == "stop"
    side.assert_clean()


def test_blocks_grow_with_the_answer() -> None:
    side = Side()
    side.adopt(generate(prompt=BLOCK_TOKENS, max_tokens=50))
    assert side.ledger.load()["owned_blocks"] == 1
    side.step()
    assert side.ledger.load()["owned_blocks"] == 2, "the first output token's KV needs a second block"


def test_out_of_blocks_the_newest_is_preempted_and_read_again() -> None:
    side = Side(num_blocks=4)
    side.adopt(generate("old", prompt=8, max_tokens=4))
    side.adopt(generate("new", prompt=8, max_tokens=4))
    assert side.step() == 1
    assert side.batch.preemptions_total == 1
    assert side.batch.starving
    while side.batch.open_count:
        assert side.step() == 1
    by_request = {
        name: [delta.index for delta in side.deltas.seen if delta.request_id == name] for name in ("old", "new")
    }
    assert by_request == {"old": [1, 2, 3], "new": [1, 2, 3]}
    side.assert_clean()


def test_an_answer_that_outgrows_the_worker_fails_alone() -> None:
    side = Side(num_blocks=2)
    side.adopt(generate(prompt=4, max_tokens=50))
    while side.batch.open_count:
        side.step()
    last = side.deltas.seen[-1]
    assert last.error is not None
    assert last.error.message == "the answer outgrew the 2 KV blocks of d0"
    side.assert_clean()


@pytest.mark.parametrize("stage", ["incoming", "running", "preempted"])
def test_cancel_at_each_stage(stage: str) -> None:
    side = Side(num_blocks=4)
    if stage == "incoming":
        lease_id = side.offer(generate("x"))
        side.batch.cancel(key("x"), "test")
        assert side.reader.cancelled == [lease_id]
    else:
        if stage == "preempted":
            side.adopt(generate("old", prompt=8))
        side.adopt(generate("x", prompt=8))
        side.step()
        assert side.batch.starving == (stage == "preempted")
        side.batch.cancel(key("x"), "test")
        side.batch.cancel(key("old"), "test")
    side.assert_clean()


def test_cancel_in_a_step_frees_the_blocks_only_after_it() -> None:
    side = Side()
    side.adopt(generate())
    decodes, _ = side.batch.candidates(1.0)
    side.batch.build(decodes[0].sequence_id, 1, 1.0)
    side.batch.cancel(key(), "test")
    assert side.ledger.load()["owned_blocks"] == 2
    side.batch.apply(decodes[0].sequence_id, 1, Sampled(token_id=8), 1.0)
    assert side.deltas.seen == []
    side.assert_clean()


def test_a_try_that_is_over_is_refused() -> None:
    side = Side()
    side.batch.cancel(key(), "test")
    with pytest.raises(Cancelled, match="request r attempt 1 is over at d0"):
        side.offer(generate())
    side.assert_clean()


def test_an_aborted_pull_fails_the_request() -> None:
    side = Side()
    lease_id = side.offer(generate())
    side.reader.aborted(lease_id, TransferAborted("the holder died"))
    last = side.deltas.seen[-1]
    assert (last.index, last.finish) == (0, "error")
    assert last.error is not None
    assert last.error.message == "the holder died"
    side.assert_clean()


def test_who_ended_an_offer_himself_answers_for_it() -> None:
    """Cancelled: the holder withdrew it (and told the client why), or this worker did."""
    side = Side()
    lease_id = side.offer(generate())
    side.reader.aborted(lease_id, Cancelled("withdrawn: finished with its first token"))
    assert side.deltas.seen == []
    side.assert_clean()
    with pytest.raises(Cancelled, match="request r attempt 1 is over at d0"):
        side.offer(generate())


def test_an_offer_that_may_not_even_wait_is_refused_with_numbers_and_when_to_ask_again() -> None:
    side = Side()
    side.adopt(generate("runs"))
    side.offer(generate("waits"), now_s=1.0)
    side.reader.refusal = NoCapacity("2 blocks wanted, 0 available, and 1 offers wait already")
    with pytest.raises(NoCapacity, match=r"d0 takes no more offers: 2 blocks .* 1 answers run, 0 are") as refused:
        side.offer(generate("refused"), now_s=2.5)
    assert refused.value.retry_after_s == 1.5
    assert side.batch.open_count == 2


def test_an_offer_waits_until_what_runs_can_grow_beside_it() -> None:
    side = Side(num_blocks=8, growth_tokens=8)
    side.adopt(generate("runs", prompt=8, max_tokens=50))
    side.offer(generate("waits", prompt=12, max_tokens=50))
    assert not side.batch.may_reserve(), "3 blocks, 2 for each to grow: 7 of 6"
    assert side.batch.waiting_offers == 1
    side.batch.cancel(key("runs"), "test")
    assert side.batch.may_reserve(), "alone it may have what there is"


def test_an_offer_with_blocks_is_promised_its_growth_until_it_ends() -> None:
    side = Side(num_blocks=16, growth_tokens=8)
    lease_id = side.offer(generate("a", prompt=4, max_tokens=50))
    assert side.room.view().promised_blocks == 0
    side.ledger.reserve(lease_id, 1)
    side.offer(generate("b", prompt=4, max_tokens=50))
    assert side.batch.may_reserve()
    view = side.room.view()
    assert (view.promised_blocks, view.offer) == (2, Demand(arrival_s=0.0, num_blocks=1, growth_blocks=2))
    side.ledger.abort(lease_id)
    side.reader.aborted(lease_id, TransferAborted("gone"))
    side.batch.cancel(key("b"), "test")
    side.assert_clean()


def test_the_preempted_come_back_in_the_order_of_their_arrival() -> None:
    side = Side(num_blocks=6, growth_tokens=4)
    for name in ("first", "second", "third"):
        side.adopt(generate(name, prompt=8, max_tokens=20))
    side.step()
    assert side.batch.preemptions_total == 1, "the third gave way to the first and the second"
    while len([delta for delta in side.deltas.seen if delta.finish]) < 3:
        side.step()
    assert [delta.request_id for delta in side.deltas.seen if delta.finish] == ["first", "second", "third"]
    assert side.batch.recomputed_tokens_total == 8 + 12, "the third at 8 tokens, the second when its 13th had no place"
    side.assert_clean()


@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 16)), min_size=1, max_size=10),
    num_blocks=st.integers(10, 24),
)
def test_answers_no_longer_than_the_headroom_are_never_preempted(
    prompts: list[tuple[int, int]], num_blocks: int
) -> None:
    """Admission as the reader does it: in order, each offer once its turn has come and `may_reserve` says yes."""
    side = Side(num_blocks=num_blocks, growth_tokens=16)
    waiting = [
        generate(f"r{number}", prompt=prompt, max_tokens=max_tokens + 1)
        for number, (prompt, max_tokens) in enumerate(prompts)
    ]
    leases = [side.offer(request) for request in waiting]
    for _ in range(400):
        while leases and side.batch.may_reserve():
            request, lease_id = waiting.pop(0), leases.pop(0)
            reserved = side.ledger.reserve(lease_id, IDENTITY.layout.blocks_for(len(request.token_ids)))
            assert reserved is not None, "what may reserve has its blocks"
            blocks = side.ledger.adopt(lease_id, owner_name(request_key(request)))
            first = TokenDelta(request_id=request.request_id, index=0, token_ids=(7,))
            side.reader.adopted(lease_id, blocks, Seal(num_tokens=len(request.token_ids), first_delta=first))
        if not side.batch.open_count:
            break
        side.step()
    assert (waiting, side.batch.preemptions_total) == ([], 0)
    side.assert_clean()


def test_what_never_fits_is_refused() -> None:
    side = Side(num_blocks=2)
    with pytest.raises(BadRequest, match="needs 3 KV blocks, d0 has 2"):
        side.offer(generate(prompt=8))


def test_a_failed_step_fails_its_sequences() -> None:
    side = Side()
    side.adopt(generate())
    decodes, _ = side.batch.candidates(1.0)
    side.batch.build(decodes[0].sequence_id, 1, 1.0)
    side.batch.fail(decodes[0].sequence_id, Internal("boom"))
    assert side.deltas.seen[-1].error is not None
    side.assert_clean()


def test_deadlines_end_answers_and_incoming_prompts() -> None:
    side = Side()
    side.adopt(generate("a", deadline_s=5.0))
    side.offer(generate("b", deadline_s=5.0))
    side.batch.expire(5.1)
    assert sorted(delta.request_id for delta in side.deltas.seen) == ["a", "b"]
    assert side.reader.cancelled == ["lease-b"]
    side.assert_clean()


@given(
    prompts=st.lists(st.tuples(st.integers(1, 20), st.integers(1, 12)), min_size=1, max_size=6),
    num_blocks=st.integers(8, 24),
    cancels=st.sets(st.integers(0, 40), max_size=4),
)
def test_whatever_is_preempted_or_cancelled_indices_are_gapless_and_no_block_is_lost(
    prompts: list[tuple[int, int]], num_blocks: int, cancels: set[int]
) -> None:
    side = Side(num_blocks=num_blocks)
    names: list[str] = []
    for number, (prompt, max_tokens) in enumerate(prompts):
        request = generate(f"r{number}", prompt=prompt, max_tokens=max_tokens + 1)
        if side.ledger.available_blocks >= IDENTITY.layout.blocks_for(prompt):
            side.adopt(request)
            names.append(request.request_id)
    for step in range(400):
        if step in cancels and names:
            side.batch.cancel(key(names[step % len(names)]), "test")
        if side.batch.open_count == 0:
            break
        side.step()
    side.assert_clean()
    for name in names:
        indices = [delta.index for delta in side.deltas.seen if delta.request_id == name]
        assert indices == list(range(1, len(indices) + 1))


def test_a_handoff_that_is_sealed_without_a_first_token_fails_and_leaves_nothing() -> None:
    side = Side()
    request = generate(prompt=6)
    lease_id = side.offer(request)
    blocks = side.ledger.allocate("r#1.1", 2)
    assert blocks is not None
    side.reader.adopted(lease_id, blocks, Seal(num_tokens=6))
    error = side.deltas.seen[-1].error
    assert error is not None
    assert (error.code, side.batch.running_count) == ("bad_request", 0)
    side.assert_clean()


def test_answers_that_end_of_themselves_are_tallied_by_the_length_of_their_prompts() -> None:
    side = Side()
    for name, prompt, max_tokens in (("a", 6, 3), ("b", 7, 2), ("c", 2, 4), ("cancelled", 6, 5)):
        side.adopt(generate(name, prompt=prompt, max_tokens=max_tokens))
    side.step()
    side.batch.cancel(key("cancelled"), "test")
    while side.step():
        pass
    assert [(tally.answers, tally.output_tokens) for tally in side.batch.answer_tallies.report()] == [
        (0, 0),
        (0, 0),
        (1, 4),
        (2, 5),
    ]
