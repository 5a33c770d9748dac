"""What the members of a lockstep group are promised while they grow: the room's book, kept without looking at each.

A member's promise stays the same until its blocks come near those of its whole answer; then it falls by one with
each block. So each member waits, by the step with which its promise changes next, to be looked at then.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decode import DecodeLimits
    from engine.room import Room
    from simulator.heap.context import Context
    from simulator.heap.lockstep import Lockstep
    from simulator.heap.request import Request


class GrowthBook:
    def __init__(self, lockstep: Lockstep, room: Room, limits: DecodeLimits, context: Context) -> None:
        self._lockstep = lockstep
        self._room = room
        self._layout = context.layout
        self._block_tokens = context.layout.block_tokens
        self._growth_blocks = context.layout.blocks_for(limits.growth_tokens)
        #: (step, sequence id, membership, member): not later than when its promise changes; and some that left.
        self._changes: list[tuple[int, int, int, Request]] = []

    def follow(self, request: Request) -> None:
        """It has joined the group, its promise is right."""
        last_blocks = self._layout.blocks_for(request.prompt_tokens + request.output_tokens - 1)
        if last_blocks > request.held_blocks:
            self._wait(request, max(request.held_blocks + 1, last_blocks - self._growth_blocks + 1))

    def note(self, ahead: int) -> None:
        """The group is in that step and has its blocks."""
        changes, lockstep = self._changes, self._lockstep
        step = lockstep.step + ahead
        while changes and changes[0][0] <= step:
            _, _, membership, request = heappop(changes)
            if membership != request.membership:
                continue
            held_blocks = lockstep.blocks_of(request, ahead)
            promised = self._room.growth_until(request.prompt_tokens + request.output_tokens - 1, held_blocks)
            self._room.promise(request.row, promised)
            if promised:
                self._wait(request, held_blocks + 1)

    def _wait(self, request: Request, num_blocks: int) -> None:
        """Until it has that many blocks."""
        step = self._block_tokens * (num_blocks - 1) - request.offset + 1
        heappush(self._changes, (step, request.sequence_id, request.membership, request))
