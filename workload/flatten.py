"""Chats as lone requests, for whoever has no answers to wait for: simulators and planners."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING

from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from workload.chats import Chat
    from workload.slo import SloClass

#: What one hash id of a flattened chat stands for: a block of the size that serving engines cache by.
BLOCK_TOKENS = 16


def flatten(chats: Iterable[Chat], slos: Mapping[str, SloClass]) -> Iterator[WorkloadRequest]:
    """Every turn of every chat, by arrival.

    A turn is due its think time after the answer before it, and an answer is taken to last as long as the class of its
    chat just allows: `ttft_ms`, and `tpot_ms` for each token after the first. Where answers are faster or slower the
    turns would really come earlier or later. A prompt holds the system prompt, all messages and answers before, and
    the new message; hash ids say so in full blocks of `BLOCK_TOKENS`, and a partial last block has an id of its own.
    Raises KeyError for a class that `slos` lacks.
    """
    ids = _Ids()
    #: (due, a number that no other has, the chat)
    waiting: list[tuple[float, int, _OpenChat]] = []
    for number, chat in enumerate(chats):
        while waiting and waiting[0][0] <= chat.arrival_s:
            yield _next_turn(waiting, ids)
        heapq.heappush(waiting, (chat.arrival_s, number, _OpenChat(chat, slos[chat.slo_class], ids.opening(chat))))
    while waiting:
        yield _next_turn(waiting, ids)


@dataclass(slots=True)
class _OpenChat:
    chat: Chat
    slo: SloClass
    #: Of its full blocks so far.
    hash_ids: tuple[int, ...]
    turn: int = 0
    #: What the next message is put behind: the system prompt, and all messages and answers so far.
    tokens: int = field(init=False)

    def __post_init__(self) -> None:
        self.tokens = self.chat.system_prompt_tokens


class _Ids:
    """Gives out hash ids one after another; those of a system prompt are given again to whoever shares it."""

    def __init__(self) -> None:
        self._fresh = count()
        self._of_system_prompt: dict[tuple[int, int], tuple[int, ...]] = {}

    def opening(self, chat: Chat) -> tuple[int, ...]:
        key = (chat.system_prompt, chat.system_prompt_tokens)
        if key not in self._of_system_prompt:
            self._of_system_prompt[key] = self.fresh(chat.system_prompt_tokens // BLOCK_TOKENS)
        return self._of_system_prompt[key]

    def fresh(self, num_ids: int) -> tuple[int, ...]:
        return tuple(next(self._fresh) for _ in range(num_ids))


def _next_turn(waiting: list[tuple[float, int, _OpenChat]], ids: _Ids) -> WorkloadRequest:
    """The first that is due; its chat goes back with the next turn, while it has one."""
    due_s, number, opened = waiting[0]
    chat, turn = opened.chat, opened.chat.turns[opened.turn]
    prompt_tokens = opened.tokens + turn.new_tokens
    full, partial = divmod(prompt_tokens, BLOCK_TOKENS)
    opened.hash_ids += ids.fresh(full - len(opened.hash_ids))
    hash_ids = (*opened.hash_ids, *ids.fresh(1)) if partial else opened.hash_ids
    opened.tokens = prompt_tokens + turn.output_tokens
    opened.turn += 1
    if opened.turn < len(chat.turns):
        answer_s = (opened.slo.ttft_ms + (turn.output_tokens - 1) * opened.slo.tpot_ms) / 1e3
        next_s = due_s + answer_s + chat.turns[opened.turn].think_s
        heapq.heapreplace(waiting, (next_s, number, opened))
    else:
        heapq.heappop(waiting)
    return WorkloadRequest(due_s, prompt_tokens, turn.output_tokens, hash_ids, BLOCK_TOKENS, chat.slo_class)
