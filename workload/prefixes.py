"""Shared prefixes for synthetic workloads: popular system prompts, and conversations of several turns."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from itertools import accumulate, count
from typing import TYPE_CHECKING

from workload.checks import require_not_negative, require_positive
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    import random
    from collections.abc import Iterator

    from workload.lengths import Lengths

#: Conversations that may wait for their next turn; beyond it the one due soonest ends instead.
MAX_WAITING = 65_536


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedPrefixes:
    """How prompts begin.

    A conversation opens with a system prompt, chosen by Zipf's law. Each turn's prompt holds all earlier prompts and
    answers, and new tokens; after a turn the conversation goes on with probability `1 - 1 / mean_turns`, no sooner
    than a think time after that turn arrived. An arrival is the next turn of the conversation that has been due
    for longest, or opens a new one where none is due: the arrival process stays what it is, and the number of
    turns is geometric.

    Hash ids stand for full blocks of `hash_block_tokens` and all before them, as in Mooncake's traces. A prompt's
    partial last block has an id of its own.
    """

    #: Different system prompts, all of `system_prompt_tokens`; the k-th has popularity 1 / k^`zipf_exponent`.
    num_system_prompts: int = 1
    #: A multiple of `hash_block_tokens`, so that all of it is shared; 0: none.
    system_prompt_tokens: int = 0
    zipf_exponent: float = 1.0
    mean_turns: float = 1.0
    #: Mean of the exponential time between a turn's arrival and when the next may come.
    mean_think_s: float = 30.0
    #: A conversation ends when its next prompt would be longer.
    max_prompt_tokens: int = 131_072
    hash_block_tokens: int = 512

    def __post_init__(self) -> None:
        require_positive(
            num_system_prompts=self.num_system_prompts,
            mean_think_s=self.mean_think_s,
            max_prompt_tokens=self.max_prompt_tokens,
            hash_block_tokens=self.hash_block_tokens,
        )
        require_not_negative(system_prompt_tokens=self.system_prompt_tokens, zipf_exponent=self.zipf_exponent)
        if self.mean_turns < 1:
            raise ValueError(f"mean_turns must be >= 1, got {self.mean_turns}")
        if self.system_prompt_tokens % self.hash_block_tokens:
            raise ValueError(
                f"system_prompt_tokens {self.system_prompt_tokens} must be a multiple of hash_block_tokens "
                f"{self.hash_block_tokens}"
            )
        if self.system_prompt_tokens >= self.max_prompt_tokens:
            raise ValueError(
                f"system_prompt_tokens {self.system_prompt_tokens} must be below max_prompt_tokens "
                f"{self.max_prompt_tokens}"
            )

    def requests(
        self,
        times: Iterator[float],
        prompts: Lengths,
        outputs: Lengths,
        classes: Iterator[str],
        lengths_rng: random.Random,
        rng: random.Random,
    ) -> Iterator[WorkloadRequest]:
        """One request for each of `times`; `prompts` are the new tokens of a turn, cut at `max_prompt_tokens`."""
        opened = _Opener(self, rng)
        #: (when the next turn may come, a number that no other has, the conversation)
        waiting: list[tuple[float, int, _Conversation]] = []
        turns = count()
        for arrival_s, slo_class in zip(times, classes, strict=False):
            due = waiting and waiting[0][0] <= arrival_s
            conversation = heapq.heappop(waiting)[2] if due else opened.open()
            new_tokens, output_tokens = prompts.sample(lengths_rng), outputs.sample(lengths_rng)
            prompt_tokens = min(conversation.tokens + new_tokens, self.max_prompt_tokens)
            hash_ids = opened.hash_ids(conversation, prompt_tokens)
            yield WorkloadRequest(arrival_s, prompt_tokens, output_tokens, hash_ids, self.hash_block_tokens, slo_class)
            conversation.tokens = prompt_tokens + output_tokens
            goes_on = rng.random() * self.mean_turns >= 1.0
            ready_s = arrival_s + rng.expovariate(1.0 / self.mean_think_s)
            if goes_on and conversation.tokens < self.max_prompt_tokens:
                heapq.heappush(waiting, (ready_s, next(turns), conversation))
                if len(waiting) > MAX_WAITING:
                    heapq.heappop(waiting)


@dataclass(slots=True)
class _Conversation:
    #: Of its full blocks so far.
    hash_ids: tuple[int, ...]
    #: Of the prompts and answers so far, and of the system prompt.
    tokens: int


class _Opener:
    """Opens conversations, and gives out hash ids: the system prompts' first, then one after another."""

    def __init__(self, prefixes: SharedPrefixes, rng: random.Random) -> None:
        self._prefixes = prefixes
        self._rng = rng
        self._blocks = prefixes.system_prompt_tokens // prefixes.hash_block_tokens
        self._fresh = count(prefixes.num_system_prompts * self._blocks)
        ranks = range(1, prefixes.num_system_prompts + 1)
        self._popularity = list(accumulate(rank**-prefixes.zipf_exponent for rank in ranks))

    def open(self) -> _Conversation:
        number = self._rng.choices(range(len(self._popularity)), cum_weights=self._popularity)[0]
        hash_ids = tuple(range(number * self._blocks, (number + 1) * self._blocks))
        return _Conversation(hash_ids, self._prefixes.system_prompt_tokens)

    def hash_ids(self, conversation: _Conversation, prompt_tokens: int) -> tuple[int, ...]:
        """Of a prompt of that length; the conversation keeps those of full blocks."""
        full, partial = divmod(prompt_tokens, self._prefixes.hash_block_tokens)
        missing = full - len(conversation.hash_ids)
        conversation.hash_ids += tuple(next(self._fresh) for _ in range(missing))
        return (*conversation.hash_ids, next(self._fresh)) if partial else conversation.hash_ids
