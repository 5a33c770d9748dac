"""What waits for KV blocks at a worker, on both of its sides, for the coordinator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from decode.usage import WaitingBlocks

if TYPE_CHECKING:
    from engine.room import RoomView


def waiting_blocks(
    room: RoomView, *, preempted: WaitingBlocks, offered_blocks: int, unread_blocks: int
) -> WaitingBlocks:
    """Preempted answers come before offers and prompts, and of these the older one first, as they are admitted.

    `preempted` is what such answers want, `offered_blocks` what offers without blocks would take, and `unread_blocks`
    prompts without.
    """
    total = preempted.all + offered_blocks + unread_blocks
    if preempted.head:
        return WaitingBlocks(preempted.head, total)
    first = min(
        (each for each in (room.offer, room.prompt) if each is not None), key=lambda each: each.arrival_s, default=None
    )
    return WaitingBlocks(0 if first is None else first.num_blocks, total)
