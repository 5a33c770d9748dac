"""Requests on their way from and to a decode batch; gateway, lease and the other worker are played by hand."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import Cancelled, NoCapacity, NotFound, NotReady, TransferAborted, WorkerUnavailable
from contracts.ids import GatewayId, Incarnation, LeaseId, OwnerEpoch, WorkerId
from contracts.messages import (
    ClaimVerdict,
    HandoffRequest,
    LeaseTerms,
    Move,
    Peer,
    RequestKey,
    Seal,
    TakeOverRequest,
    YieldReply,
)
from contracts.requests import TokenDelta
from decode.moves.source import CLAIM_BACK_AFTER_S
from engine.sequence import owner_name, request_key
from kvtransfer import LeaseOutcome
from tests.support.decode_side import Side
from tests.support.roles import BLOCK_TOKENS, IDENTITY, generate

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from contracts.errors import TandemError
    from contracts.requests import GenerateRequest
    from decode.answers import Answer

OTHER = Peer(worker_id=WorkerId("d1"), incarnation=Incarnation(3), address="d1:1")
PROMPT, MAX_TOKENS = 6, 40


def running(side: Side, name: str = "r") -> Answer:
    """An answer that has written two tokens."""
    side.adopt(generate(name, prompt=PROMPT, max_tokens=MAX_TOKENS))
    side.step()
    return next(one for one in side.batch.answers() if one.sequence.request.request_id == name)


async def _awaited(call: Awaitable[object]) -> object:
    return await call


def next_key(request: GenerateRequest) -> RequestKey:
    return RequestKey(request.request_id, request.attempt, OwnerEpoch(request.owner_epoch + 1))


def verdict(key: RequestKey, *, granted: bool, next_index: int = 0) -> ClaimVerdict:
    return ClaimVerdict(key=key, granted=granted, next_index=next_index, reason="" if granted else "it is another's")


class Rest:
    """What a yield was answered with."""

    def __init__(self) -> None:
        self.answers: list[YieldReply | TandemError] = []

    def __call__(self, answer: YieldReply | TandemError) -> None:
        self.answers.append(answer)


# --- from here ------------------------------------------------------------------------------------


def test_kv_moves_while_the_answer_is_written_and_the_rest_when_it_is_asked_for() -> None:
    side = Side()
    answer = running(side)
    request = answer.sequence.request
    assert side.batch.moves_out.send_kv(answer, OTHER, 2)
    assert ("open", len(answer.sequence.block_ids), "d1") in side.holder.calls
    for token in range(BLOCK_TOKENS):
        side.step(20 + token)
    assert ("advance", "lease-1", answer.sequence.num_computed // BLOCK_TOKENS) in side.holder.calls
    rest = Rest()
    side.batch.moves_out.yield_asked(request_key(request), rest)
    # It is in no step: it stops at once, and nothing computes it any more.
    assert side.step() == 0
    (reply,) = rest.answers
    assert isinstance(reply, YieldReply)
    assert reply.delta is not None
    assert reply.delta.token_ids == tuple(range(20, 20 + BLOCK_TOKENS))
    assert (reply.delta.index, reply.delta.owner_epoch) == (2, 2)
    num_computed = len(answer.sequence.token_ids) - 1
    assert side.holder.calls[-1] == ("seal", "lease-1", IDENTITY.layout.blocks_for(num_computed), num_computed)
    # The gateway's word that it is the other's.
    side.batch.cancel(request_key(request), "moved")
    assert (len(side.batch.moves_out), side.batch.move_outcomes["left"]) == (0, 1)
    side.assert_clean()
    assert side.calls.cancelled == []


def test_what_is_in_a_step_stops_after_it() -> None:
    side = Side()
    answer = running(side)
    side.batch.moves_out.send_kv(answer, OTHER, 2)
    decodes, _ = side.batch.candidates(2.0)
    side.batch.build(decodes[0].sequence_id, 1, 2.0)
    rest = Rest()
    side.batch.moves_out.yield_asked(answer.sequence.key, rest)
    assert rest.answers == []
    from engine.plan import Sampled

    side.batch.apply(decodes[0].sequence_id, 1, Sampled(token_id=33), 2.1)
    (reply,) = rest.answers
    assert isinstance(reply, YieldReply)
    assert reply.delta is not None
    assert reply.delta.token_ids == (33,)
    assert side.step() == 0


def test_an_answer_that_ends_meanwhile_is_taken_back() -> None:
    side = Side()
    side.adopt(generate("r", prompt=PROMPT, max_tokens=3))
    side.step()
    answer = side.batch.answers()[0]
    side.batch.moves_out.send_kv(answer, OTHER, 2)
    side.step()
    assert side.holder.calls[-1][:2] == ("withdraw", "lease-1")
    rest = Rest()
    side.batch.moves_out.yield_asked(answer.sequence.key, rest)
    assert isinstance(rest.answers[0], NotFound)
    side.assert_clean()


def test_a_reader_that_does_not_take_it_leaves_it_where_it_is() -> None:
    side = Side()
    answer = running(side)
    side.calls.refusal = NoCapacity("no room")
    side.batch.moves_out.send_kv(answer, OTHER, 2)
    send = side.holder.send_offer[LeaseId("lease-1")]
    terms = LeaseTerms(
        lease_id=LeaseId("lease-1"), holder=OTHER, identity=IDENTITY, endpoints={}, num_blocks=4, ttl_s=10.0
    )
    # It is not offered again and again.
    with pytest.raises(TransferAborted, match="no room"):
        asyncio.run(_awaited(send(terms, 1.0)))
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.REFUSED, "no room")
    assert side.step() == 1
    assert side.batch.move_outcomes["stayed"] == 1
    assert side.batch.answers() == [answer]


def test_a_source_that_hears_nothing_claims_back_and_goes_on_under_the_new_epoch() -> None:
    side = Side()
    answer = running(side)
    request = answer.sequence.request
    side.batch.moves_out.send_kv(answer, OTHER, 2)
    side.batch.moves_out.yield_asked(request_key(request), Rest())
    side.holder.end(LeaseId("lease-1"), LeaseOutcome.RELEASED, "acknowledged")
    side.batch.moves_out.look(1.0 + CLAIM_BACK_AFTER_S)
    assert side.calls.claims == []
    side.clock.time_s = 5.0
    side.batch.moves_out.look(5.0)
    (claim,) = side.calls.claims
    assert (claim.owner_epoch, claim.num_outputs) == (2, 2)
    assert side.batch.moves_out.claim_answered(verdict(next_key(request), granted=True, next_index=2))
    assert side.step(44) == 1
    assert side.deltas.seen[-1].owner_epoch == 2
    # The late word about the first ownership does not touch the second.
    side.batch.cancel(request_key(request), "moved")
    assert side.step(45) == 1
    side.batch.cancel(next_key(request), "over")
    side.assert_clean()


def test_a_source_whose_claim_is_refused_lets_go_in_silence() -> None:
    side = Side()
    answer = running(side)
    request, num_deltas = answer.sequence.request, len(side.deltas.seen)
    side.batch.moves_out.send_kv(answer, OTHER, 2)
    side.batch.moves_out.yield_asked(request_key(request), Rest())
    side.clock.time_s = 5.0
    side.batch.moves_out.look(5.0)
    assert side.batch.moves_out.claim_answered(verdict(next_key(request), granted=False))
    assert len(side.deltas.seen) == num_deltas
    side.assert_clean()


def test_a_preempted_answer_moves_by_its_tokens_and_stands_still_meanwhile() -> None:
    side = Side(num_blocks=6, growth_tokens=1)
    running(side, "old")
    running(side, "new")
    while not side.batch.starving:
        side.step()
    answer = next(one for one in side.batch.answers() if not one.sequence.block_ids)
    side.batch.moves_out.send_tokens(answer, OTHER)
    assert not side.batch.starving
    ask, on_answer = side.calls.taken_over[0]
    assert (ask.final, ask.request.token_ids) == (True, tuple(answer.sequence.token_ids))
    on_answer(WorkerUnavailable("it is gone"))
    assert side.batch.starving
    assert side.batch.move_outcomes["stayed"] == 1


# --- to here --------------------------------------------------------------------------------------


def coming(side: Side, *, outputs: int = 2, max_tokens: int = MAX_TOKENS) -> tuple[GenerateRequest, LeaseId]:
    """A request whose KV is on its way, with so many output tokens."""
    original = generate("r", prompt=PROMPT, max_tokens=max_tokens)
    request = msgspec.structs.replace(
        original, owner_epoch=OwnerEpoch(2), token_ids=(*original.token_ids, *range(50, 50 + outputs))
    )
    terms = LeaseTerms(
        lease_id=LeaseId("lease-m"),
        holder=OTHER,
        identity=IDENTITY,
        endpoints={"shm": b""},
        num_blocks=IDENTITY.layout.blocks_for(len(request.token_ids)) + 2,
        ttl_s=10.0,
    )
    move = Move(source=OTHER, key=request_key(original))
    side.batch.offer(HandoffRequest(target=Incarnation(1), terms=terms, request=request, move=move), 0.0)
    return request, terms.lease_id


def adopt(side: Side, request: GenerateRequest, lease_id: LeaseId, rest: tuple[int, ...]) -> None:
    num_tokens = len(request.token_ids) + len(rest)
    blocks = side.ledger.allocate(owner_name(request_key(request)), IDENTITY.layout.blocks_for(num_tokens - 1))
    assert blocks is not None
    first = TokenDelta(request_id=request.request_id, index=2, token_ids=rest)
    side.reader.adopted(lease_id, blocks, Seal(num_tokens=num_tokens - 1, first_delta=first))


def test_a_request_that_comes_is_written_once_the_gateway_has_granted_it() -> None:
    side = Side()
    request, lease_id = coming(side)
    assert side.reader.waits[lease_id] is False
    side.reader.followers[lease_id](lease_id, 1)
    (ask, on_answer) = side.calls.yields[0]
    assert (ask.target, ask.key.owner_epoch) == (OTHER.incarnation, 1)
    on_answer(YieldReply())
    adopt(side, request, lease_id, (60, 61))
    assert (side.calls.claims[-1].owner_epoch, side.calls.claims[-1].num_outputs) == (2, 4)
    assert side.step() == 0
    assert side.batch.moves_in.claim_answered(verdict(request_key(request), granted=True, next_index=4))
    assert side.step(70) == 1
    (delta,) = side.deltas.seen
    assert (delta.index, delta.token_ids, delta.owner_epoch) == (4, (70,), 2)


def test_tokens_that_the_client_lacks_are_sent_by_the_new_owner() -> None:
    side = Side()
    request, lease_id = coming(side)
    adopt(side, request, lease_id, (60, 61))
    side.batch.moves_in.claim_answered(verdict(request_key(request), granted=True, next_index=3))
    (delta,) = side.deltas.seen
    assert (delta.index, delta.token_ids, delta.owner_epoch) == (3, (61,), 2)


@pytest.mark.parametrize("how", ["refused", "cancelled", "aborted", "unanswered", "worker ends", "late"])
def test_a_request_that_does_not_come_leaves_nothing_and_is_told_to_nobody(how: str) -> None:
    side = Side()
    request, lease_id = coming(side)
    key = request_key(request)
    if how == "aborted":
        side.reader.aborted(lease_id, TransferAborted("the wire broke"))
    else:
        adopt(side, request, lease_id, ())
        match how:
            case "refused":
                side.batch.moves_in.claim_answered(verdict(key, granted=False))
            case "cancelled":
                side.batch.cancel(key, "the client left")
            case "worker ends":
                side.batch.fail_all("worker_unavailable", "it ends")
            case "late":
                side.batch.expire(1000.0)
            case _:
                for now_s in range(1, 10):
                    side.clock.time_s = float(now_s)
                    side.batch.moves_in.look(float(now_s))
    told = [(delta.finish, delta.owner_epoch) for delta in side.deltas.seen]
    # Whoever may be the owner without knowing it says that it is not going on.
    assert told == ([("error", 2)] if how in ("unanswered", "worker ends", "late") else [])
    side.assert_clean()
    if how == "aborted":
        # It was never claimed: it may be moved here again.
        coming(side)
    else:
        with pytest.raises(Cancelled):
            coming(side)


def test_a_second_move_has_to_wait_until_the_first_is_over() -> None:
    side = Side()
    request, lease_id = coming(side)
    adopt(side, request, lease_id, ())
    move = Move(source=OTHER, key=RequestKey(request.request_id, request.attempt))
    with pytest.raises(NotReady, match="already"):
        side.batch.moves_in.take_over(TakeOverRequest(target=Incarnation(1), request=request, move=move), 1.0)
    side.batch.moves_in.claim_answered(verdict(request_key(request), granted=True, next_index=2))
    assert side.step() == 1


def test_a_rest_that_is_meant_for_who_was_told_more_is_not_taken() -> None:
    side = Side()
    request = take_over(side, final=False)
    side.step()
    ((_, on_answer),) = side.calls.yields
    on_answer(YieldReply(delta=TokenDelta(request_id=request.request_id, index=5, token_ids=(52, 53))))
    assert side.calls.claims == []
    side.assert_clean()


def test_a_gateway_that_does_not_listen_is_a_reason_not_to_take_it() -> None:
    side = Side()
    side.calls.deaf.add(GatewayId("g"))
    with pytest.raises(NotReady, match="does not listen"):
        coming(side)
    side.assert_clean()


def test_without_room_a_move_is_refused_and_waits_for_nothing() -> None:
    side = Side(num_blocks=4, growth_tokens=4)
    side.adopt(generate("here", prompt=2 * BLOCK_TOKENS, max_tokens=MAX_TOKENS))
    with pytest.raises(NoCapacity):
        coming(side)
    assert side.batch.waiting_offers == 0


def take_over(side: Side, *, final: bool) -> GenerateRequest:
    original = generate("r", prompt=3 * BLOCK_TOKENS, max_tokens=MAX_TOKENS)
    request = msgspec.structs.replace(
        original, owner_epoch=OwnerEpoch(2), token_ids=(*original.token_ids, 50, 51), deadline_s=50.0
    )
    move = Move(source=OTHER, key=request_key(original))
    ask = TakeOverRequest(target=Incarnation(1), request=request, move=move, final=final)
    side.batch.moves_in.take_over(ask, 0.0)
    return request


def test_tokens_are_read_as_far_as_they_go_before_the_rest_is_asked_for() -> None:
    side = Side()
    request = take_over(side, final=False)
    assert side.calls.yields == []
    side.step()
    ((_, on_answer),) = side.calls.yields
    assert side.step() == 0
    on_answer(YieldReply(delta=TokenDelta(request_id=request.request_id, index=2, token_ids=(52, 53))))
    assert side.calls.claims[-1].num_outputs == 4
    # The rest is read while the claim is on its way, the last token is not.
    side.step()
    assert side.deltas.seen == []
    side.batch.moves_in.claim_answered(verdict(request_key(request), granted=True, next_index=4))
    side.step(77)
    assert [(delta.index, delta.token_ids) for delta in side.deltas.seen] == [(4, (77,))]


def test_what_stood_still_is_claimed_at_once() -> None:
    side = Side()
    request = take_over(side, final=True)
    assert side.calls.claims[-1].num_outputs == 2
    side.batch.moves_in.claim_answered(verdict(request_key(request), granted=True, next_index=2))
    side.step(77)
    assert side.deltas.tokens == [77]
    side.batch.cancel(request_key(request), "over")
    side.assert_clean()
