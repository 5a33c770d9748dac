"""Who has the blocks of a worker in a study, by priority."""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.messages import PriorityUse
from contracts.requests import counted_priority

if TYPE_CHECKING:
    from collections.abc import Iterable

    from simulator.heap.lockstep import Lockstep
    from simulator.heap.request import Request


def uses_of(running: Iterable[Request], ahead: int, group: Lockstep) -> tuple[PriorityUse, ...]:
    """As a live worker reports them. `running`: members of the group, which is `ahead` steps on, and others."""
    counts: dict[int, tuple[int, int]] = {}
    for request in running:
        is_member = request.sequence_id in group.members
        blocks = group.blocks_of(request, ahead) if is_member else request.held_blocks
        priority = counted_priority(request.priority)
        num_answers, num_blocks = counts.get(priority, (0, 0))
        counts[priority] = num_answers + 1, num_blocks + blocks
    return tuple(PriorityUse(priority, *counts[priority]) for priority in sorted(counts))
