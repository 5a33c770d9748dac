"""The prefill side of a worker: prompts waiting, being read, and sealed until their reader took them.

A prompt gets all its blocks when it is admitted, in the order of `prefill.ordering` and just ahead of the step that
begins it: leading ones whose KV stands in the prefix cache are shared and not computed, the rest is allocated. The
lease to its decode worker is opened then, so that the reader can reserve, and pull what is there, while the first chunk
computes. After each chunk the lease advances over the blocks that will never be written again. After the last one the
first token is sampled and streamed at once, and the lease is sealed; from then on only the lease holds the blocks,
until the reader took them or the request's deadline passes. Backpressure, from the reader on: KV that waits for it has
a budget (`prefill.admission`); when that is full prompts wait as token ids; when too many do, the next one is refused.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

from contracts.errors import BadRequest, DeadlineExceeded, NoCapacity, TandemError
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import Seal
from contracts.requests import PhaseTimes
from engine.answer_tallies import AnswerTallies
from engine.compose import Candidate
from engine.recent import RecentTries
from engine.room import Demand
from engine.sequence import Sequence, failure, finish_after, request_key
from kvtransfer import LeaseOutcome
from prefill.admission import (
    Handoffs,
    PromptVerdict,
    admit,
    handoffs_full,
    queue_full,
    reads_enough,
    retry_after_s,
)
from prefill.block_tally import BlockTally
from prefill.prefixes import PromptPrefixes
from prefill.prompts import Prompt
from prefill.waiting import WaitingQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.ids import BlockId, GatewayId, LeaseId, WorkerId
    from contracts.messages import HandoffReply, LeaseTerms, Peer, PrefillRequest, RequestKey
    from contracts.requests import GenerateRequest
    from engine.plan import Engine, Sampled, SequenceStep
    from engine.room import Room
    from engine.sequence import Emit
    from kvstore.prefix_cache import PrefixCache
    from kvtransfer import HolderService, Ledger
    from prefill.admission import PrefillLimits
    from prefill.prefixes import StartFetch

#: How long after its deadline a prompt's lease may stand at most: `PrefillQueue.expire` is called more often.
DEADLINE_SLACK_S = 5.0

_SAYS_FULL = Failpoint("prefill.says_full", "a prompt is refused as if too many waited")

_KNOWN_TRY = RarePath("prefill.known_try", "a prompt came for a try that is here already, was cancelled, or has ended")
_CANCELLED_SEALED = RarePath("prefill.cancelled_sealed", "a try was cancelled while its KV waited for its reader")
_DROPPED_IN_STEP = RarePath("prefill.dropped_in_step", "a prompt was dropped while a step read it")
_DEADLINE_PASSED = RarePath(
    "prefill.deadline_passed", "a deadline passed before the KV was read, or before it was taken"
)
_PARTIAL_TAIL = RarePath("prefill.partial_tail", "a lease was sealed whose last block is not full")
_SHARED = RarePath("prefill.shared", "a prompt shares leading blocks with prompts that were read before")
_NOT_ADMITTED = RarePath("prefill.not_admitted", "the prompt at the head of the queue has to wait for room")
_HANDOFF_FAILED = RarePath("prefill.handoff_failed", "a lease ended without its KV having been taken")


class LocalHandoff(Protocol):
    """Gives a read prompt to the decode side of the same (mixed) worker; its blocks change hands."""

    def __call__(self, sequence: Sequence, now_s: float) -> None: ...


class SendOffer(Protocol):
    """Pushes an offer to its reader."""

    async def __call__(
        self, reader: Peer, terms: LeaseTerms, request: GenerateRequest, timeout_s: float
    ) -> HandoffReply: ...


class PrefillQueue:
    """Implements `engine.source.StepSource`."""

    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        prefixes: PrefixCache,
        holder: HolderService,
        own_worker_id: str,
        room: Room,
        limits: PrefillLimits,
        emit: Emit,
        send_offer: SendOffer,
        start_fetch: StartFetch,
        hand_over: LocalHandoff,
        also_writes: bool,
        on_blocks_freed: Callable[[], None],
        sequence_ids: Iterator[int],
        ahead_tokens: int | None = None,
        reading_s: Callable[[int, int], float] | None = None,
    ) -> None:
        """`also_writes`: this worker writes answers too (role mixed); `on_blocks_freed` is called after a lease let
        blocks go, and when a prompt that others waited behind is not the next one any more.

        `ahead_tokens`: tokens of one step: no more than these are admitted ahead of it, so that the order of those that
        wait counts; None: as many as there are blocks for. `reading_s` estimates what reading so many tokens behind so
        many others takes; None: nothing is known of it.
        """
        self._engine = engine
        self._layout = engine.identity.layout
        self._ledger = ledger
        self._holder = holder
        self._own_worker_id = own_worker_id
        self._room = room
        self._limits = limits
        self._emit = emit
        self._send_offer = send_offer
        self._hand_over = hand_over
        self._also_writes = also_writes
        self._budget_blocks = limits.handoff_blocks(engine.num_blocks)
        self._on_blocks_freed = on_blocks_freed
        self._sequence_ids = sequence_ids
        #: All and only prompts known here, by try.
        self._prompts: dict[RequestKey, Prompt] = {}
        #: Tries that ended here, or were cancelled before they came.
        self._over = RecentTries()
        self._ahead_tokens = ahead_tokens
        self._reading_s = reading_s
        #: The latest time this side was told.
        self._now_s = -math.inf
        self._waiting: WaitingQueue[Prompt] = WaitingQueue(limits.queue)
        #: Tokens of the prompts in `_waiting` and of those whose beginning is being fetched, cached ones included.
        self._waiting_tokens = 0
        #: All and only prompts with blocks whose first token is not sampled, in order of admission.
        self._running: dict[int, Prompt] = {}
        #: All and only prompts whose lease has not ended.
        self._leased: dict[LeaseId, Prompt] = {}
        #: Blocks of all of them.
        self._lent = BlockTally()
        #: Prompts whose beginning is being fetched hold nothing, and are queued when that has ended.
        self._prefixes = PromptPrefixes(
            prefixes,
            lent=self._lent,
            room=room,
            block_tokens=self._layout.block_tokens,
            start_fetch=start_fetch,
            on_fetched=self._fetched,
        )
        #: Those of `_leased` that are sealed, and their blocks.
        self._untaken_count = 0
        self._untaken = BlockTally()
        #: Answers that ended with their first token.
        self.answer_tallies = AnswerTallies()

    def __repr__(self) -> str:
        counts = (
            f"{self._prefixes.num_fetching} fetching, {len(self._waiting)} waiting, {len(self._running)} running, "
            f"{self._untaken_count} untaken"
        )
        return f"<PrefillQueue [{counts}]>"

    @property
    def waiting_count(self) -> int:
        """Without blocks, those whose beginning is being fetched included."""
        return len(self._waiting) + self._prefixes.num_fetching

    @property
    def open_count(self) -> int:
        return len(self._prompts)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens not computed yet, waiting ones included; not those found in the prefix cache."""
        return sum(num_tokens for _, num_tokens in self._uncomputed())

    @property
    def pending_pairs(self) -> float:
        """Query-key pairs of their attention: see `contracts.latency.StepWork.prefill_pairs`."""
        return sum(num_tokens * start + num_tokens * (num_tokens + 1) / 2 for start, num_tokens in self._uncomputed())

    @property
    def unread_for(self) -> tuple[tuple[WorkerId, int], ...]:
        """Prompts that are not read whole, by the other worker that will write their answers; in order of id."""
        readers = (prompt.reader for prompt in self._prompts.values() if not prompt.sealed)
        return tuple(sorted(Counter(reader.worker_id for reader in readers if reader is not None).items()))

    def _uncomputed(self) -> Iterator[tuple[int, int]]:
        """(computed, remaining) tokens of each prompt that is not read whole."""
        for prompt in self._prompts.values():
            if not prompt.sealed:
                sequence = prompt.sequence
                start = sequence.num_computed or prompt.num_cached * self._layout.block_tokens
                yield start, len(sequence.token_ids) - start

    def keys_of(self, gateway_id: GatewayId) -> list[RequestKey]:
        """The tries whose tokens go to this gateway."""
        return [key for key, prompt in self._prompts.items() if prompt.sequence.request.gateway_id == gateway_id]

    def fail_all(self, code: str, message: str) -> None:
        """Ends every try on this side: the worker stops."""
        for prompt in list(self._prompts.values()):
            if not prompt.doomed:
                self._fail(prompt, code, message)

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, ask: PrefillRequest, now_s: float) -> None:
        """Takes a prompt. A repeat of a known try, or one cancelled already, changes nothing.

        Raises NoCapacity when the queue is full (with numbers, and when to ask again), BadRequest when the prompt
        can never fit.
        """
        request = ask.request
        key = request_key(request)
        if key in self._prompts or key in self._over:
            _KNOWN_TRY.reached()
            return
        self._check_fits(request)
        self._check_queue(len(request.token_ids), now_s)
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=request,
            deadline_s=now_s + request.deadline_s,
            token_ids=list(request.token_ids),
        )
        num_blocks = self._layout.blocks_for(len(request.token_ids))
        prompt = Prompt(
            sequence=sequence,
            reader=ask.decode if self._hands_over(ask, num_blocks) else None,
            received_s=now_s,
            num_blocks=num_blocks,
            chain=self._prefixes.chain(request),
        )
        cached = self._prefixes.find(prompt)
        self._prompts[sequence.key] = prompt
        self._now_s = now_s
        self._waiting_tokens += len(sequence.token_ids)
        if ask.prefix is None or not self._prefixes.fetch(prompt, cached, ask.prefix, now_s):
            self._wait(prompt)
        self._note_head()

    def cancel(self, key: RequestKey, reason: str) -> None:
        """Forgets a try; its reader is told through the lease. Unknown tries are no error."""
        prompt = self._prompts.get(key)
        if prompt is None:
            self._over.add(key)
            return
        if prompt.sealed:
            _CANCELLED_SEALED.reached()
        self._drop(prompt, reason)

    def expire(self, now_s: float) -> None:
        """Ends the tries whose deadline has passed."""
        for prompt in [prompt for prompt in self._prompts.values() if now_s > prompt.sequence.deadline_s]:
            if prompt.doomed:
                continue
            _DEADLINE_PASSED.reached()
            message = "the request's deadline passed during prefill"
            if prompt.sealed and prompt.reader is not None:
                message = f"the request's deadline passed before {prompt.reader.worker_id} had taken its KV"
            if prompt.refusal is not None:
                message += f": {prompt.refusal.message}"
            self._fail(prompt, DeadlineExceeded.code, message)

    # --- steps ------------------------------------------------------------------------------------

    def candidates(self, now_s: float) -> tuple[list[Candidate], list[Candidate]]:
        self._now_s = now_s
        self._admit(now_s)
        chunks = [
            Candidate(
                sequence_id=sequence_id,
                num_tokens=prompt.sequence.num_remaining,
                arrival=prompt.place,
                started=prompt.started_s is not None,
                num_computed=prompt.sequence.num_computed,
            )
            for sequence_id, prompt in self._running.items()
        ]
        return [], chunks

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        prompt = self._running[sequence_id]
        prompt.in_step = True
        prompt.step_tokens = num_tokens
        if prompt.started_s is None:
            prompt.started_s = now_s
        return prompt.sequence.step(num_tokens)

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        prompt = self._running[sequence_id]
        self._now_s = now_s
        prompt.in_step, prompt.step_tokens = False, 0
        prompt.sequence.num_computed += num_tokens
        self._prefixes.name_final(prompt)
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        elif sampled is not None:
            self._first_token(prompt, sampled, now_s)
        elif prompt.lease_id is not None:
            self._holder.advance(prompt.lease_id, prompt.sequence.num_computed // self._layout.block_tokens)

    def fail(self, sequence_id: int, error: TandemError) -> None:
        prompt = self._running[sequence_id]
        prompt.in_step, prompt.step_tokens = False, 0
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        else:
            self._fail(prompt, error.code, error.message)

    # --- inside -----------------------------------------------------------------------------------

    def _check_fits(self, request: GenerateRequest) -> None:
        num_tokens = len(request.token_ids)
        smallest, largest = min(request.token_ids), max(request.token_ids)
        if smallest < 0 or largest >= self._engine.vocab_size:
            outside = smallest if smallest < 0 else largest
            raise BadRequest(f"token id {outside} is outside the model's vocabulary of {self._engine.vocab_size}")
        if num_tokens >= self._engine.max_context_tokens:
            raise BadRequest(
                f"{num_tokens} prompt tokens leave no room for an answer in a context of "
                f"{self._engine.max_context_tokens}"
            )
        needed = self._layout.blocks_for(num_tokens)
        if needed > self._engine.num_blocks:
            raise BadRequest(
                f"the prompt needs {needed} KV blocks, {self._own_worker_id} has {self._engine.num_blocks} in all"
            )

    def _check_queue(self, num_tokens: int, now_s: float) -> None:
        problem = queue_full(
            self._limits,
            self._layout,
            num_blocks=self._engine.num_blocks,
            waiting=self.waiting_count,
            waiting_tokens=self._waiting_tokens,
            num_tokens=num_tokens,
        )
        if problem is None and _SAYS_FULL.fires():
            raise NoCapacity(f"{self._own_worker_id} is full on purpose", retry_after_s=retry_after_s(0.0))
        if problem is not None:
            oldest = self._waiting.oldest() if self._waiting else self._prefixes.oldest_fetching()
            waited_s = now_s - oldest.received_s
            raise NoCapacity(f"{self._own_worker_id} has {problem}", retry_after_s=retry_after_s(waited_s))

    def _hands_over(self, ask: PrefillRequest, num_blocks: int) -> bool:
        """Whether another worker gets this KV. An answer of one token ends here, and a worker that writes answers too
        keeps a prompt that is larger than its whole budget: waiting for its reader it would hold up what waits
        for nobody."""
        request = ask.request
        num_to_write = request.num_prompt_tokens + request.sampling.max_tokens - len(request.token_ids)
        if ask.decode.worker_id == self._own_worker_id or num_to_write <= 1:
            return False
        return not (self._also_writes and num_blocks > self._budget_blocks)

    # --- admission --------------------------------------------------------------------------------

    def _wait(self, prompt: Prompt) -> None:
        """It waits for blocks from now on."""
        request = prompt.sequence.request
        num_cached = prompt.num_cached * self._layout.block_tokens
        num_tokens = len(prompt.sequence.token_ids) - num_cached
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

    def _fetched(self, prompt: Prompt, ended_s: float) -> None:
        self._now_s = ended_s
        self._wait(prompt)
        self._note_head()

    def _left_queue(self, prompt: Prompt) -> None:
        """It waits for blocks, or for its beginning, no more."""
        self._waiting.discard(prompt)
        self._prefixes.forget(prompt)
        self._waiting_tokens -= len(prompt.sequence.token_ids)

    def _reads_enough(self) -> bool:
        unread = (prompt.sequence.num_remaining - prompt.step_tokens for prompt in self._running.values())
        return reads_enough(sum(unread), self._ahead_tokens)

    def _admit(self, now_s: float) -> None:
        if not self._waiting:
            return
        noted, admitted = self._room.prompt, False
        while self._waiting and not self._reads_enough():
            prompt = self._waiting.first(now_s)
            cached = self._prefixes.find(prompt)
            verdict = admit(self._demand(prompt), self._room.view(), self._handoffs(prompt))
            if verdict is not PromptVerdict.ADMIT:
                _NOT_ADMITTED.reached()
                break
            self._take_blocks(prompt, cached, now_s)
            admitted = True
        self._note_head()
        if not admitted and noted is not None and self._room.prompt != noted:
            # The head turned out to be late: an offer that waited behind it may be next.
            self._on_blocks_freed()

    def _take_blocks(self, prompt: Prompt, cached: list[BlockId], now_s: float) -> None:
        sequence = prompt.sequence
        # Shared first, lest they be evicted for the others.
        self._ledger.share(sequence.owner, cached)
        new = self._ledger.allocate(sequence.owner, prompt.num_blocks - len(cached))
        assert new is not None, (self._ledger, prompt.num_blocks, len(cached))
        if cached:
            _SHARED.reached()
        sequence.block_ids = [*cached, *new]
        sequence.num_computed = len(cached) * self._layout.block_tokens
        prompt.num_named = len(cached)
        self._left_queue(prompt)
        self._waiting.charge(sequence.request.tenant, sequence.num_remaining)
        prompt.place = next(self._sequence_ids)
        self._running[sequence.sequence_id] = prompt
        if prompt.reader is None:
            self._room.promise(sequence.owner, self._demand(prompt).growth_blocks)
        else:
            self._open_lease(prompt, prompt.reader, now_s)

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
            untaken_blocks=len(self._untaken),
            untaken_count=self._untaken_count,
            budget_blocks=self._budget_blocks,
            max_count=self._limits.max_handoffs,
            is_shared=self._also_writes,
            more_blocks=prompt.num_blocks - prompt.num_cached_lent,
        )

    def _note_head(self) -> None:
        """Tells the other side which prompt waits for blocks; not one that waits for other workers, or for its turn.

        Its blocks there: all that have to come from this worker's own, those that others here hold included.
        """
        self._room.prompt = None
        if not self._waiting or self._reads_enough():
            return
        prompt = self._waiting.first(self._now_s)
        demand, handoffs = self._demand(prompt), self._handoffs(prompt)
        if handoffs is None or not handoffs_full(demand, handoffs, self._room.view().lent_blocks):
            self._room.prompt = replace(demand, num_blocks=prompt.num_blocks - prompt.num_cached_lent)

    # --- leases -----------------------------------------------------------------------------------

    def _open_lease(self, prompt: Prompt, reader: Peer, now_s: float) -> None:
        request = prompt.sequence.request

        async def send(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            try:
                reply = await self._send_offer(reader, terms, request, timeout_s)
            except TandemError as error:
                prompt.refusal = error
                raise
            prompt.refusal, prompt.accepted = None, True
            return reply

        # A reader without room is asked again until the request's deadline; `expire` comes first and says so.
        max_age_s = prompt.sequence.deadline_s - now_s + DEADLINE_SLACK_S
        lease_id = self._holder.open(
            prompt.sequence.block_ids,
            reader,
            send_offer=send,
            on_ended=self._lease_ended,
            num_final_blocks=prompt.num_cached,
            max_age_s=max_age_s,
        )
        prompt.lease_id = lease_id
        prompt.lent = tuple(prompt.sequence.block_ids)
        self._leased[lease_id] = prompt
        self._room.lend(self._lent.add(prompt.lent))

    def _end_lease(self, lease_id: LeaseId) -> Prompt | None:
        """Takes a lease out of the books; None where it is out already."""
        prompt = self._leased.pop(lease_id, None)
        if prompt is not None:
            prompt.lease_id = None
            self._room.take_back(self._lent.remove(prompt.lent))
            if prompt.sealed:
                self._untaken_count -= 1
                self._untaken.remove(prompt.lent)
            prompt.lent = ()
            self._note_head()
        return prompt

    def _lease_ended(self, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
        """The holder's one report of how a lease ended; its pins are dropped already."""
        prompt = self._end_lease(lease_id)
        if prompt is None:
            return
        if outcome is LeaseOutcome.RELEASED:
            self._forget(prompt)
        elif outcome is LeaseOutcome.REFUSED and prompt.accepted:
            # A reader that gives up what it had accepted tells the client why.
            self._drop(prompt, reason)
        else:
            _HANDOFF_FAILED.reached()
            self._fail(prompt, prompt.refusal_code, f"handoff {lease_id} {outcome}: {reason}")
        self._on_blocks_freed()

    def _first_token(self, prompt: Prompt, sampled: Sampled, now_s: float) -> None:
        sequence = prompt.sequence
        started_s = prompt.started_s
        assert started_s is not None, "sampled before any step"
        finish = finish_after(
            sampled.token_id,
            output_count=sequence.output_count + 1,
            sequence_tokens=len(sequence.token_ids) + 1,
            sampling=sequence.request.sampling,
            eos_token_ids=self._engine.eos_token_ids,
            max_context_tokens=self._engine.max_context_tokens,
        )
        phases = PhaseTimes(
            queue_s=started_s - prompt.received_s,
            fetch_s=prompt.fetch_s,
            cached_tokens=prompt.num_cached * self._layout.block_tokens if self._prefixes.enabled else None,
            prefill_s=now_s - started_s,
        )
        delta = sequence.append(sampled, finish, phases)
        self._emit(sequence.request, delta)
        if finish is not None:
            self.answer_tallies.add(sequence)
            self._drop(prompt, "finished with its first token")
        elif prompt.lease_id is None:
            self._forget(prompt)
            self._hand_over(sequence, now_s)
        else:
            del self._running[sequence.sequence_id]
            if sequence.num_computed % self._layout.block_tokens:
                _PARTIAL_TAIL.reached()
            prompt.sealed = True
            self._untaken_count += 1
            self._untaken.add(prompt.lent)
            seal = Seal(num_tokens=sequence.num_computed, first_delta=delta)
            self._holder.seal(prompt.lease_id, len(sequence.block_ids), seal)
            self._release(prompt)

    def _fail(self, prompt: Prompt, code: str, message: str) -> None:
        sequence = prompt.sequence
        self._emit(sequence.request, failure(sequence.request, sequence.output_count, code, message))
        self._drop(prompt, message)

    def _drop(self, prompt: Prompt, reason: str) -> None:
        """Ends a try on this side: lease withdrawn, blocks released (after the step that writes them)."""
        if prompt.lease_id is not None:
            lease_id = prompt.lease_id
            self._end_lease(lease_id)
            self._holder.withdraw(lease_id, reason)
        self._prefixes.leave(prompt)
        if prompt.in_step:
            _DROPPED_IN_STEP.reached()
            prompt.doomed = True
            return
        self._release(prompt)
        self._forget(prompt)

    def _release(self, prompt: Prompt) -> None:
        if prompt.reader is None:
            self._room.forget(prompt.sequence.owner)
        if prompt.sequence.block_ids:
            self._ledger.release(prompt.sequence.owner, prompt.sequence.block_ids)
            prompt.sequence.block_ids = []

    def _forget(self, prompt: Prompt) -> None:
        self._prompts.pop(prompt.sequence.key, None)
        self._over.add(prompt.sequence.key)
        self._running.pop(prompt.sequence.sequence_id, None)
        if prompt in self._waiting or self._prefixes.is_fetching(prompt):
            self._left_queue(prompt)
        self._note_head()
