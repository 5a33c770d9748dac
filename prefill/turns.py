"""Whose turn it is to be read: prompts that wait for blocks, and those that have got them and are not read whole.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity
from contracts.failpoints import Failpoint, RarePath
from engine.room import Demand
from prefill.admission import (
    Handoffs,
    PromptVerdict,
    admit,
    handoffs_full,
    queue_full,
    reads_enough,
    retry_after_s,
)
from prefill.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from engine.plan import Engine
    from engine.room import Room
    from prefill.admission import PrefillLimits
    from prefill.leases import PromptLeases
    from prefill.prefixes import Found, PromptPrefixes
    from prefill.prompts import Prompt

_SAYS_FULL = Failpoint("prefill.says_full", "a prompt is refused as if too many waited")

_SHARED = RarePath("prefill.shared", "a prompt shares leading blocks with prompts that were read before")
_FETCHED_LATER = RarePath("prefill.fetched_later", "a prompt's fetch was begun when its turn had come")
_NOT_ADMITTED = RarePath("prefill.not_admitted", "the prompt at the head of the queue has to wait for room")


class PromptTurns:
    def __init__(
        self,
        *,
        engine: Engine,
        prefixes: PromptPrefixes,
        leases: PromptLeases,
        room: Room,
        limits: PrefillLimits,
        own_worker_id: str,
        also_writes: bool,
        sequence_ids: Iterator[int],
        ahead_tokens: int | None,
        reading_s: Callable[[int, int], float] | None,
        on_blocks_freed: Callable[[], None],
        on_order: Callable[[], None],
    ) -> None:
        """As `PrefillQueue`."""
        self._engine = engine
        self._layout = engine.identity.layout
        self._prefixes = prefixes
        self._leases = leases
        self._room = room
        self._limits = limits
        self._own_worker_id = own_worker_id
        #: As `PrefillQueue`; changes with the worker's role.
        self.also_writes = also_writes
        self._budget_blocks = limits.handoff_blocks(engine.num_blocks)
        self._sequence_ids = sequence_ids
        self._ahead_tokens = ahead_tokens
        self._reading_s = reading_s
        self._on_blocks_freed = on_blocks_freed
        self._on_order = on_order
        #: The latest time that this side was told.
        self.now_s = -math.inf
        self._waiting: WaitingQueue[Prompt] = WaitingQueue(limits.queue)
        #: Tokens of the prompts in `_waiting` and of those whose beginning is being fetched, cached ones included.
        self._num_tokens = 0
        #: All and only prompts with blocks of their own whose first token is not sampled, in order of admission; not
        #: one that is read ahead.
        self.running: dict[int, Prompt] = {}

    @property
    def num_waiting(self) -> int:
        """For blocks; not those whose beginning is being fetched."""
        return len(self._waiting)

    def upcoming(self, limit: int) -> list[Prompt]:
        """Prompts that wait for blocks, at most so many, as far as can be said the next first."""
        return self._waiting.upcoming(limit, self.now_s)

    def charge(self, prompt: Prompt, num_tokens: int) -> None:
        """So many tokens of it are computed for its tenant."""
        self._waiting.charge(prompt.sequence.request.tenant, num_tokens)

    def check_room(self, num_tokens: int, now_s: float) -> None:
        """Raises NoCapacity, with numbers and when to ask again, where a prompt of so many tokens may not even wait."""
        problem = queue_full(
            self._limits,
            self._layout,
            num_blocks=self._engine.num_blocks,
            waiting=len(self._waiting) + self._prefixes.num_fetching,
            waiting_tokens=self._num_tokens,
            num_tokens=num_tokens,
        )
        if problem is None and _SAYS_FULL.fires():
            raise NoCapacity(f"{self._own_worker_id} is full on purpose", retry_after_s=retry_after_s(0.0))
        if problem is not None:
            oldest = self._waiting.oldest() if self._waiting else self._prefixes.oldest_fetching()
            waited_s = now_s - oldest.received_s
            raise NoCapacity(f"{self._own_worker_id} has {problem}", retry_after_s=retry_after_s(waited_s))

    def came(self, prompt: Prompt, found: Found, now_s: float) -> None:
        """A new prompt, and what stands of it: it waits for its beginning, or for blocks."""
        self.now_s = now_s
        self._num_tokens += len(prompt.sequence.token_ids)
        idle = not (self.running or self._waiting or self._prefixes.num_fetching)
        if not self._prefixes.fetch(prompt, found.leading, now_s, idle=idle):
            self.wait(prompt)
        self.note_head()

    def wait(self, prompt: Prompt) -> None:
        """It waits for blocks from now on."""
        request = prompt.sequence.request
        num_cached = prompt.num_cached * self._layout.block_tokens
        num_tokens = sum(num_tokens for _, num_tokens in prompt.unread(self._layout.block_tokens))
        due_s, read_s = None, 0.0
        if request.ttft_due_s is not None:
            due_s = prompt.received_s + request.ttft_due_s
            read_s = 0.0 if self._reading_s is None else self._reading_s(num_tokens, num_cached)
        self._waiting.add(
            prompt,
            tokens=num_tokens,
            received_s=prompt.received_s,
            tenant=request.tenant,
            due_s=due_s,
            read_s=read_s,
            priority=request.priority,
        )
        self._on_order()

    def came_back(self, prompt: Prompt) -> None:
        """One that left waits for blocks again."""
        self._num_tokens += len(prompt.sequence.token_ids)
        self.wait(prompt)
        self.note_head()

    def left(self, prompt: Prompt) -> None:
        """It waits for blocks, or for its beginning, no more. Of one that waits for neither: nothing."""
        if not (self._waiting.discard(prompt) or self._prefixes.is_fetching(prompt)):
            return
        self._prefixes.settle(prompt)
        self._on_order()
        self._num_tokens -= len(prompt.sequence.token_ids)

    def _reads_enough(self) -> bool:
        unread = (prompt.num_unread - prompt.step_tokens for prompt in self.running.values())
        return reads_enough(sum(unread), self._ahead_tokens)

    def admit(self, now_s: float) -> None:
        """Gives blocks to those whose turn it is, as far as the next step goes."""
        self.now_s = now_s
        if not self._waiting:
            return
        noted, admitted = self._room.prompt, False
        while self._waiting and not self._reads_enough():
            prompt = self._waiting.first(now_s)
            found = self._prefixes.find(prompt)
            # What it would take itself does not stand in the way of its own fetch.
            self._room.prompt = None
            if self._prefixes.fetch(prompt, found.leading, now_s, idle=False):
                # There was no room for it, or the holder was busy, when the prompt came.
                _FETCHED_LATER.reached()
                self._waiting.discard(prompt)
                self._on_order()
                continue
            verdict = admit(self._demand(prompt), self._room.view(), self._handoffs(prompt))
            if verdict is not PromptVerdict.ADMIT:
                _NOT_ADMITTED.reached()
                break
            self.take_blocks(prompt, found, now_s)
            admitted = True
        self.note_head()
        if not admitted and noted is not None and self._room.prompt != noted:
            # The head turned out to be late: an offer that waited behind it may be next.
            self._on_blocks_freed()

    def take_blocks(self, prompt: Prompt, found: Found, now_s: float) -> None:
        """It is read from now on; `found` just now."""
        sequence = prompt.sequence
        if found.leading:
            _SHARED.reached()
        self._prefixes.take(prompt, found, prompt.num_blocks)
        self._prefixes.note_admitted(prompt, found)
        self.left(prompt)
        self.charge(prompt, prompt.num_unread)
        prompt.place = next(self._sequence_ids)
        self.running[sequence.sequence_id] = prompt
        if prompt.reader is None:
            self._room.promise(sequence.owner, self._demand(prompt).growth_blocks)
        else:
            self._leases.open(prompt, prompt.reader, now_s)

    def _demand(self, prompt: Prompt) -> Demand:
        growth_blocks = 0
        if prompt.reader is None:
            growth_blocks = self._room.growth(
                prompt.sequence.request, prompt.num_blocks, max_context_tokens=self._engine.max_context_tokens
            )
        return Demand(arrival_s=prompt.received_s, num_blocks=prompt.num_new_blocks, growth_blocks=growth_blocks)

    def _handoffs(self, prompt: Prompt) -> Handoffs | None:
        if prompt.reader is None:
            return None
        return Handoffs(
            untaken_blocks=len(self._leases.untaken),
            untaken_count=self._leases.untaken_count,
            budget_blocks=self._budget_blocks,
            max_count=self._limits.max_handoffs,
            is_shared=self.also_writes,
            more_blocks=prompt.num_blocks - prompt.num_cached_lent,
        )

    def note_head(self) -> None:
        """Tells the other side which prompt waits for blocks; not one that waits for other workers, or for its turn.

        Its blocks there: all that have to come from this worker's own, those that others here hold included.
        """
        self._room.prompt = None
        if not self._waiting or self._reads_enough():
            return
        prompt = self._waiting.first(self.now_s)
        demand, handoffs = self._demand(prompt), self._handoffs(prompt)
        if handoffs is None or not handoffs_full(demand, handoffs, self._room.view().lent_blocks):
            self._room.prompt = replace(demand, num_blocks=prompt.num_blocks - prompt.num_cached_lent)
