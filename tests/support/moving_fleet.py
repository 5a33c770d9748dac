"""A fleet of answers that only ever move: what migration policies decide is carried out at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from contracts.ids import WorkerId
from contracts.messages import PriorityUse
from coordinator.policy.virtual_usage import WorkerUse, usage_view

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.policy.move_terms import MovePair
    from coordinator.policy.virtual_usage import UsageView


class Answer(NamedTuple):
    """In the order in which a worker gives them away."""

    priority: int
    num_blocks: int


@dataclass(slots=True)
class Worker:
    total_blocks: int
    answers: list[Answer] = field(default_factory=list[Answer])
    is_draining: bool = False

    @property
    def available_blocks(self) -> int:
        return self.total_blocks - sum(answer.num_blocks for answer in self.answers)

    def use(self, name: str) -> WorkerUse:
        priorities = sorted({answer.priority for answer in self.answers})
        return WorkerUse(
            WorkerId(name),
            total_blocks=self.total_blocks,
            available_blocks=self.available_blocks,
            priorities=[
                PriorityUse(level, len(those), sum(answer.num_blocks for answer in those))
                for level in priorities
                if (those := [answer for answer in self.answers if answer.priority == level])
            ],
            is_draining=self.is_draining,
        )


def view_of(workers: Sequence[Worker]) -> UsageView:
    return usage_view([worker.use(f"decode-{number}") for number, worker in enumerate(workers)])


def carry_out(workers: Sequence[Worker], move: MovePair) -> int:
    """How many moved."""
    source, destination = workers[move.source], workers[move.destination]
    for number in range(move.max_requests):
        most = move.max_priority
        chosen = min((answer for answer in source.answers if most is None or answer.priority <= most), default=None)
        if chosen is None:
            return number
        source.answers.remove(chosen)
        destination.answers.append(chosen)
    return move.max_requests
