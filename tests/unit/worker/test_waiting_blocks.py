"""Who is first in line for a worker's blocks."""

from __future__ import annotations

import pytest

from decode.usage import WaitingBlocks
from engine.room import Demand, RoomView
from worker.waiting_blocks import waiting_blocks

_OFFER = Demand(arrival_s=2.0, num_blocks=5)
_PROMPT = Demand(arrival_s=3.0, num_blocks=7)
_EARLIER_PROMPT = Demand(arrival_s=1.0, num_blocks=7)


@pytest.mark.parametrize(
    ("offer", "prompt", "preempted", "head"),
    [
        (None, None, WaitingBlocks(), 0),
        (_OFFER, None, WaitingBlocks(), 5),
        (None, _PROMPT, WaitingBlocks(), 7),
        (_OFFER, _PROMPT, WaitingBlocks(), 5),
        (_OFFER, _EARLIER_PROMPT, WaitingBlocks(), 7),
        (_OFFER, _EARLIER_PROMPT, WaitingBlocks(head=3, all=9), 3),
    ],
    ids=["nobody", "offer", "prompt", "the older offer", "the older prompt", "preempted first"],
)
def test_preempted_answers_first_then_whoever_came_first(
    offer: Demand | None, prompt: Demand | None, preempted: WaitingBlocks, head: int
) -> None:
    room = RoomView(num_blocks=100, available_blocks=0, offer=offer, prompt=prompt)
    found = waiting_blocks(room, preempted=preempted, offered_blocks=20, unread_blocks=300)
    assert found == WaitingBlocks(head, 320 + preempted.all)
