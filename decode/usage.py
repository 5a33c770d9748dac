"""What the answers of a worker have and want, for the coordinator (`contracts.messages.WorkerLoad`)."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from contracts.messages import PriorityUse
from contracts.requests import counted_priority

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.layout import BlockLayout
    from decode.answers import Answer, Answers


class WaitingBlocks(NamedTuple):
    """KV blocks that the first of those that wait for some would take, and what all of them would."""

    head: int = 0
    all: int = 0


def priorities_of(answers: Iterable[Answer]) -> tuple[PriorityUse, ...]:
    """By priority, rising. Blocks that several hold count for each of them."""
    found: dict[int, tuple[int, int]] = {}
    for answer in answers:
        priority = counted_priority(answer.sequence.request.priority)
        num_answers, num_blocks = found.get(priority, (0, 0))
        found[priority] = num_answers + 1, num_blocks + len(answer.sequence.block_ids)
    return tuple(PriorityUse(priority, *found[priority]) for priority in sorted(found))


def wanted_again(answers: Answers, layout: BlockLayout) -> WaitingBlocks:
    """By those that were preempted; the one that arrived first gets its blocks first."""
    preempted = answers.preempted
    if not preempted:
        return WaitingBlocks()
    blocks = {number: layout.blocks_for(len(answer.sequence.token_ids)) for number, answer in preempted.items()}
    return WaitingBlocks(blocks[min(preempted)], sum(blocks.values()))
