"""What an answer leaves behind, and what a handoff or a preempted answer finds of it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import NoCapacity, TransferAborted
from contracts.ids import Attempt, GatewayId, RequestId
from contracts.messages import Seal
from contracts.requests import GenerateRequest, KvClass, SamplingParams, TokenDelta
from tests.support.decode_side import Side
from tests.support.roles import BLOCK_TOKENS, generate, key


def asking(
    tokens: list[int], name: str, *, max_tokens: int = 5, salt: str = "", kv_class: KvClass = "exact"
) -> GenerateRequest:
    return GenerateRequest(
        request_id=RequestId(name),
        attempt=Attempt(1),
        gateway_id=GatewayId("g"),
        token_ids=tuple(tokens),
        num_prompt_tokens=len(tokens),
        sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
        deadline_s=100.0,
        cache_salt=salt,
        kv_class=kv_class,
    )


def finish(side: Side) -> list[int]:
    """Every answer to its end; the tokens written here."""
    while side.batch.open_count:
        side.step()
    return side.deltas.tokens


def cached_keys(side: Side) -> set[bytes]:
    return set(side.ledger.all_keys())


def test_full_blocks_of_prompt_and_answer_outlast_it_without_the_one_that_was_not_computed() -> None:
    side = Side(prefix_cache=True)
    request = generate(prompt=6, max_tokens=7)
    side.adopt(request)
    tokens = [*request.token_ids, 7, *finish(side)]
    assert len(tokens) == 13
    chain = side.prefixes.chain(tokens, "")
    assert cached_keys(side) == set(chain.part(0, 3)), "12 tokens are computed, the 13th was only sampled"
    assert side.kept == [chain.part(0, 3)]
    side.assert_clean()
    exactly = Side(prefix_cache=True)
    exactly.adopt(generate(prompt=6, max_tokens=6))
    finish(exactly)
    assert len(cached_keys(exactly)) == 2, "of 12 tokens the last was not computed"


def test_a_block_is_named_in_the_step_that_fills_it() -> None:
    side = Side(prefix_cache=True)
    side.adopt(generate(prompt=6, max_tokens=7))
    named = [len(cached_keys(side))]
    while side.batch.open_count:
        side.step()
        named.append(len(cached_keys(side)))
    assert named == [1, 1, 2, 2, 2, 2, 3]


def test_the_next_turn_moves_only_what_is_new() -> None:
    side = Side(prefix_cache=True)
    first = generate("turn-1", prompt=6, max_tokens=7)
    side.adopt(first)
    tokens = [*first.token_ids, 7, *finish(side), *range(900, 909)]
    second = asking(tokens, "turn-2")
    lease_id = side.offer(second)
    assert (side.reader.have[lease_id], side.reader.waits[lease_id]) == (3, False)
    assert side.ledger.load()["owned_blocks"] == 3, "nobody evicts them meanwhile"
    side.adopt_offered(second, lease_id)
    assert side.batch.skipped_blocks_total == 3
    assert side.ledger.blocks_of("turn-2#1.1")[-3:] == side.prefixes.match(side.prefixes.chain(tokens, "").part(0, 3))
    assert (side.prefixes.hit_blocks_total, side.prefixes.missed_blocks_total) == (3, 1 + 2)
    finish(side)
    side.assert_clean()


@pytest.mark.parametrize(("salt", "kv_class"), [("b", "exact"), ("a", "lossy")])
def test_other_salts_and_the_other_class_find_nothing(salt: str, kv_class: KvClass) -> None:
    side = Side(prefix_cache=True)
    tokens = list(range(10, 22))
    side.adopt(asking(tokens, "a", salt="a"))
    finish(side)
    other = asking(tokens, "b", salt=salt, kv_class=kv_class)
    lease_id = side.offer(other)
    assert side.reader.have[lease_id] == 0
    side.adopt_offered(other, lease_id)
    lease_id = side.offer(asking(tokens, "c", salt="a"))
    assert side.reader.have[lease_id] == 3


def test_a_prompt_that_ends_with_a_full_block_is_shared_whole_and_goes_on_behind_it() -> None:
    """The step helper refuses every write to a block with a key."""
    side = Side(prefix_cache=True)
    tokens = list(range(10, 10 + 2 * BLOCK_TOKENS))
    side.adopt(asking(tokens, "a", max_tokens=6))
    side.step()
    request = asking(tokens, "b", max_tokens=6)
    lease_id = side.offer(request)
    assert side.reader.have[lease_id] == 2, "nothing is left to move"
    side.adopt_offered(request, lease_id)
    shared = side.ledger.blocks_of("b#1.1")
    assert shared == side.ledger.blocks_of("a#1.1")[:2]
    side.step()
    tails = {name: [each for each in side.ledger.blocks_of(name) if each not in shared] for name in ("a#1.1", "b#1.1")}
    assert (len(tails["a#1.1"]), len(tails["b#1.1"])) == (1, 1)
    assert tails["a#1.1"] != tails["b#1.1"]
    finish(side)
    side.assert_clean()


def test_an_offer_that_would_wait_holds_nothing_and_takes_all_of_its_blocks() -> None:
    side = Side(num_blocks=8, growth_tokens=8, prefix_cache=True)
    tokens = list(range(10, 10 + 3 * BLOCK_TOKENS))
    side.adopt(asking(tokens, "first", max_tokens=2))
    finish(side)
    side.adopt(asking([1, *range(500, 514)], "runs", max_tokens=50))
    lease_id = side.offer(asking([*tokens, 1, 2, 3], "waits", max_tokens=50))
    assert (side.reader.have[lease_id], side.reader.waits[lease_id]) == (0, True)
    assert side.ledger.blocks_of(f"offer/{lease_id}") == []
    assert side.room.offer is not None
    assert side.room.offer.num_blocks == 4


def test_blocks_that_others_hold_take_no_room() -> None:
    """3 of 8 blocks are held by the answer that runs, and 4 kept for its growth and the newcomer's."""
    side = Side(num_blocks=8, growth_tokens=8, prefix_cache=True)
    tokens = list(range(10, 10 + 3 * BLOCK_TOKENS))
    side.adopt(asking(tokens, "runs", max_tokens=50))
    lease_id = side.offer(asking([*tokens, 1], "alike", max_tokens=50))
    assert (side.reader.have[lease_id], side.reader.waits[lease_id]) == (3, False)
    other = side.offer(asking([9, *tokens], "other", max_tokens=50))
    assert (side.reader.have[other], side.reader.waits[other]) == (0, True)


@pytest.mark.parametrize("end", ["refused", "cancelled", "aborted", "deadline", "no first token"])
def test_what_is_held_for_an_offer_is_let_go_however_it_ends(end: str) -> None:
    side = Side(prefix_cache=True)
    first = generate("turn-1", prompt=8, max_tokens=5)
    side.adopt(first)
    tokens = [*first.token_ids, 7, *finish(side), 1, 2]
    request = asking(tokens, "turn-2")
    if end == "refused":
        side.reader.refusal = NoCapacity("no")
        with pytest.raises(NoCapacity):
            side.offer(request)
        side.assert_clean()
        return
    lease_id = side.offer(request)
    assert side.ledger.load()["owned_blocks"] == 3
    match end:
        case "cancelled":
            side.batch.cancel(key("turn-2"), "test")
        case "aborted":
            side.reader.aborted(lease_id, TransferAborted("the holder died"))
        case "deadline":
            side.batch.expire(101.0)
        case _:
            side.reader.adopted(lease_id, [], Seal(num_tokens=len(tokens)))
    assert side.ledger.load()["owned_blocks"] == 0
    side.assert_clean()


def test_a_preempted_answer_goes_on_from_what_nobody_took() -> None:
    side = Side(num_blocks=5, prefix_cache=True)
    side.adopt(asking(list(range(100, 108)), "old", max_tokens=9))
    side.adopt(asking(list(range(200, 208)), "new", max_tokens=9))
    while not side.batch.preemptions_total:
        side.step()
    finish(side)
    assert side.batch.preemptions_total == 1
    assert side.batch.recomputed_tokens_total == 4, "of its 2 full blocks the first still stood"
    by_request = {
        name: [delta.index for delta in side.deltas.seen if delta.request_id == name] for name in ("old", "new")
    }
    assert by_request == {"old": list(range(1, 9)), "new": list(range(1, 9))}
    side.assert_clean()


def test_a_cancelled_answer_is_not_kept_but_stays_cached() -> None:
    side = Side(prefix_cache=True)
    side.adopt(generate(prompt=8, max_tokens=9))
    side.step()
    side.batch.cancel(key(), "test")
    assert side.kept == []
    assert side.ledger.load()["cached_blocks"] == 2


def test_a_seal_before_what_is_shared_never_has_shared_blocks_written() -> None:
    side = Side(prefix_cache=True)
    tokens = list(range(10, 22))
    side.adopt(asking(tokens, "a"))
    request = asking(tokens, "b")
    lease_id = side.offer(request)
    first = TokenDelta(request_id=request.request_id, index=0, token_ids=(7,))
    side.reader.adopted(lease_id, [], Seal(num_tokens=5, first_delta=first))
    finish(side)
    side.assert_clean()


@given(
    turns=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(2, 7), st.integers(0, 3)), min_size=1, max_size=12
    ),
    num_blocks=st.integers(10, 24),
)
def test_conversations_that_share_beginnings_never_write_what_is_shared(
    turns: list[tuple[int, int, int, int]], num_blocks: int
) -> None:
    """Chats that begin alike go on with their own answers or are asked again, several at once, in a pool that is too
    small: whatever is shared, evicted, preempted or found again, no step writes a block that has a key (the helper
    looks), every index comes once, and each key names the tokens that it should."""
    side = Side(num_blocks=num_blocks, prefix_cache=True)
    chats = [[10, 11, 12, 13, 14, 15, 16, 17][: 8 - chat] for chat in range(3)]
    asked: dict[str, list[int]] = {}
    for number, (chat, num_new, max_tokens, num_steps) in enumerate(turns):
        tokens = [*chats[chat], *range(50 + number, 50 + number + num_new)][: 4 * (num_blocks - 4)]
        request = asking(tokens, f"r{number}", max_tokens=max_tokens)
        if side.ledger.available_blocks * BLOCK_TOKENS >= len(tokens) + BLOCK_TOKENS:
            lease_id = side.offer(request)
            side.adopt_offered(request, lease_id)
            asked[f"r{number}"] = tokens
        for _ in range(num_steps):
            side.step(token_id=100 + number)
        if f"r{number}" in asked and max_tokens % 2:
            mine = [
                token for delta in side.deltas.seen if delta.request_id == f"r{number}" for token in delta.token_ids
            ]
            chats[chat] = [*tokens, 7, *mine][:40]
    for _ in range(400):
        if not side.batch.open_count:
            break
        side.step(token_id=99)
    side.assert_clean()
    for name, tokens in asked.items():
        chain = side.prefixes.chain(tokens, "")
        for index, block in enumerate(side.prefixes.match(chain.part(0, len(chain)))):
            assert side.content[block] == tokens[index * BLOCK_TOKENS : (index + 1) * BLOCK_TOKENS]
        deltas = [delta for delta in side.deltas.seen if delta.request_id == name]
        indices = [delta.index for delta in deltas]
        assert indices == list(range(1, len(deltas) + 1)) or deltas[-1].error is not None
    assert side.ledger.load()["free_blocks"] + side.ledger.load()["cached_blocks"] == num_blocks
