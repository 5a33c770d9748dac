"""What a run will ask, in order: lone requests and chats, numbered, with what is warm-up and who goes away early."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

from loadtest.record import RequestRecord
from workload.chats import Chat

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from workload.request import WorkloadRequest

    #: (index of the request, tokens of its answer) -> after how many of them the client goes away; None: it stays.
    CancelAfter = Callable[[int, int], int | None]


def _stays(index: int, output_tokens: int) -> int | None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Items by arrival, and the number of each one's first request. One plan can be carried out many times."""

    items: tuple[WorkloadRequest | Chat, ...]
    #: As long as `items`.
    first_index: tuple[int, ...]
    num_requests: int
    #: Leading items that are sent like all others and left out of every figure.
    num_warmup_items: int = 0
    cancel_after: CancelAfter = _stays

    @classmethod
    def of(
        cls, items: Iterable[WorkloadRequest | Chat], *, num_warmup_items: int = 0, cancel_after: CancelAfter = _stays
    ) -> Plan:
        """Raises ValueError when nothing but warm-up is left."""
        items = tuple(items)
        if num_warmup_items >= len(items):
            raise ValueError(f"{num_warmup_items} items of warm-up leave none of {len(items)} to measure")
        ends = list(accumulate(map(num_turns, items)))
        return cls(
            items=items,
            first_index=(0, *ends[:-1]),
            num_requests=ends[-1],
            num_warmup_items=num_warmup_items,
            cancel_after=cancel_after,
        )

    def record(self, item: int, turn: int) -> RequestRecord:
        """A fresh one, of a request that was not sent yet."""
        index = self.first_index[item] + turn
        asked = self.items[item]
        if isinstance(asked, Chat):
            output_tokens = asked.turns[turn].output_tokens
            prompt_tokens = asked.prompt_tokens()[turn]
        else:
            prompt_tokens, output_tokens = asked.prompt_tokens, asked.output_tokens
        return RequestRecord(
            index=index,
            item=item,
            turn=turn,
            slo_class=asked.slo_class,
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            cancel_after_tokens=self.cancel_after(index, output_tokens),
            is_warmup=item < self.num_warmup_items,
        )

    def rounds(self, num_rounds: int) -> tuple[range, ...]:
        """Items in so many parts of about equal number, in order; warm-up belongs to the first. None is empty."""
        bounds = [round(number * len(self.items) / num_rounds) for number in range(num_rounds + 1)]
        if any(low >= high for low, high in pairwise(bounds)):
            raise ValueError(f"{len(self.items)} items do not make {num_rounds} rounds")
        return tuple(range(low, high) for low, high in pairwise(bounds))

    def num_requests_of(self, items: range) -> int:
        return sum(num_turns(self.items[item]) for item in items)

    def with_cancels(self, cancel_after: CancelAfter) -> Plan:
        return replace(self, cancel_after=cancel_after)


def num_turns(item: WorkloadRequest | Chat) -> int:
    return len(item.turns) if isinstance(item, Chat) else 1


def warmup_items(items: Sequence[WorkloadRequest | Chat], *, first: int | None, until_s: float | None) -> int:
    """How many leading items are warm-up: the first so many, or those that arrive before a time."""
    if first is not None:
        return first
    if until_s is None:
        return 0
    start_s = items[0].arrival_s if items else 0.0
    return sum(item.arrival_s - start_s < until_s for item in items)
