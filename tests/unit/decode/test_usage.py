"""What the decode side tells of its answers and of what waits for blocks."""

from __future__ import annotations

import msgspec

from contracts.messages import PriorityUse
from decode.usage import WaitingBlocks
from tests.support.decode_side import Side
from tests.support.roles import BLOCK_TOKENS, generate

_WITHOUT = WaitingBlocks(0, 0)


def test_answers_and_their_blocks_by_priority() -> None:
    side = Side(num_blocks=64)
    assert not side.batch.priorities
    for name, priority, num_blocks in (("a", 0, 1), ("b", 2, 3), ("c", 0, 2), ("d", -99, 1)):
        request = generate(name, prompt=num_blocks * BLOCK_TOKENS, max_tokens=20)
        side.adopt(msgspec.structs.replace(request, priority=priority))
    # The least that counts is -6.
    assert side.batch.priorities == (PriorityUse(-6, 1, 1), PriorityUse(0, 2, 3), PriorityUse(2, 1, 3))
    side.step()
    assert side.batch.priorities == (PriorityUse(-6, 1, 2), PriorityUse(0, 2, 5), PriorityUse(2, 1, 4))


def test_what_was_preempted_wants_its_blocks_again_the_oldest_first() -> None:
    side = Side(num_blocks=8)
    assert side.batch.preempted_blocks == _WITHOUT
    # All of the blocks; each wants another one for its next token.
    for name, num_blocks in (("old", 2), ("middle", 3), ("new", 3)):
        side.adopt(generate(name, prompt=num_blocks * BLOCK_TOKENS, max_tokens=30))
    side.batch.candidates(2.0)
    assert side.batch.preempted_count == 1
    assert side.batch.preempted_blocks == WaitingBlocks(head=4, all=4)
    assert sum(use.answers for use in side.batch.priorities) == 2, "it runs no more"


def test_offers_without_blocks_are_told_with_what_they_would_take() -> None:
    side = Side(num_blocks=64)
    side.offer(generate("a", prompt=3 * BLOCK_TOKENS))
    side.offer(generate("b", prompt=2 * BLOCK_TOKENS))
    assert side.batch.waiting_offers == 2
    assert side.batch.offered_blocks == 5
