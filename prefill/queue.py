"""The prefill side of a worker: prompts waiting, being read, and sealed until their reader took them.

A prompt gets all its blocks when it is admitted, in the order of `prefill.ordering` and just ahead of the step that
begins it: those whose KV stands in the prefix cache are shared and not computed, the rest is allocated. The
lease to its decode worker is opened then, so that the reader can reserve, and pull what is there, while the first chunk
computes. After each chunk the lease advances over the blocks that will never be written again. After the last one the
first token is sampled and streamed at once, and the lease is sealed; from then on only the lease holds the blocks,
until the reader took them or the request's deadline passes. Backpressure, from the reader on: KV that waits for it has
a budget (`prefill.admission`); when that is full prompts wait as token ids; when too many do, the next one is refused.

Whose beginning comes from elsewhere waits outside of the queue, and may be read from the front meanwhile
(`prefill.read_ahead`).

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Protocol

from contracts.errors import DeadlineExceeded, TandemError, WorkerUnavailable
from contracts.failpoints import RarePath
from contracts.requests import PhaseTimes
from engine.answer_tallies import AnswerTallies
from engine.compose import Candidate
from engine.recent import RecentTries
from engine.sequence import Sequence, failure, finish_after, request_key
from kvstore.look_ahead import Wanted
from kvtransfer import LeaseOutcome
from prefill.intake import check_fits, hands_over
from prefill.leases import PromptLeases
from prefill.prefixes import PromptPrefixes
from prefill.prompts import Prompt
from prefill.read_ahead import ReadAhead
from prefill.turns import PromptTurns

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.ids import GatewayId, LeaseId, WorkerId
    from contracts.messages import PrefillRequest, RequestKey
    from contracts.requests import GenerateRequest
    from engine.plan import Engine, Sampled, SequenceStep
    from engine.room import Room
    from engine.sequence import Emit
    from kvstore.fetch_ends import StartFetch
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvtransfer import HolderService, Ledger
    from prefill.admission import PrefillLimits
    from prefill.leases import SendOffer
    from prefill.prefixes import ExpectedFetch

_KNOWN_TRY = RarePath("prefill.known_try", "a prompt came for a try that is here already, was cancelled, or has ended")
_CANCELLED_SEALED = RarePath("prefill.cancelled_sealed", "a try was cancelled while its KV waited for its reader")
_PARKED = RarePath("prefill.parked", "a prompt that waits here is on its way to another worker")
_DROPPED_IN_STEP = RarePath("prefill.dropped_in_step", "a prompt was dropped while a step read it")
_DEADLINE_PASSED = RarePath(
    "prefill.deadline_passed", "a deadline passed before the KV was read, or before it was taken"
)
_KEPT = RarePath(
    "prefill.kept_for_its_size", "a prompt too large to be handed over waited when the worker became mixed"
)
_HANDOFF_FAILED = RarePath("prefill.handoff_failed", "a lease ended without its KV having been taken")


class LocalHandoff(Protocol):
    """Gives a read prompt to the decode side of the same (mixed) worker; its blocks change hands."""

    def __call__(self, sequence: Sequence, now_s: float) -> None: ...


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
        expected_fetch_s: ExpectedFetch | None = None,
        on_read: Callable[[GenerateRequest, KeyChain], None] = lambda request, chain: None,
        on_order: Callable[[], None] = lambda: None,
    ) -> None:
        """`also_writes`: this worker writes answers too (role mixed); `on_blocks_freed` is called after a lease let
        blocks go, and when a prompt that others waited behind is not the next one any more.

        `ahead_tokens`: tokens of one step: no more than these are admitted ahead of it, so that the order of those that
        wait counts; None: as many as there are blocks for. `reading_s` estimates what reading so many tokens behind so
        many others takes, and `expected_fetch_s` a fetch; None: nothing is known of it.

        `on_read` is called when a prompt that was read whole leaves this worker's hands: its full blocks have their
        keys, and are cached if nobody else holds them. `on_order` is called when other prompts wait than before.
        """
        self._engine = engine
        self._layout = engine.identity.layout
        self._ledger = ledger
        self._own_worker_id = own_worker_id
        self._room = room
        self._emit = emit
        self._hand_over = hand_over
        self._also_writes = also_writes
        self._budget_blocks = limits.handoff_blocks(engine.num_blocks)
        self._on_blocks_freed = on_blocks_freed
        self._on_read = on_read
        self._sequence_ids = sequence_ids
        #: All and only prompts known here, by try.
        self._prompts: dict[RequestKey, Prompt] = {}
        #: Tries that ended here, or were cancelled before they came.
        self._over = RecentTries()
        self._leases = PromptLeases(
            holder=holder,
            room=room,
            block_tokens=self._layout.block_tokens,
            send_offer=send_offer,
            on_ended=self._lease_ended,
        )
        self._prefixes = PromptPrefixes(
            prefixes,
            ledger=ledger,
            lent=self._leases.lent,
            room=room,
            block_tokens=self._layout.block_tokens,
            start_fetch=start_fetch,
            expected_fetch_s=expected_fetch_s,
            reading_s=reading_s,
            on_fetched=self._fetched,
        )
        self._turns = PromptTurns(
            engine=engine,
            prefixes=self._prefixes,
            leases=self._leases,
            room=room,
            limits=limits,
            own_worker_id=own_worker_id,
            also_writes=also_writes,
            sequence_ids=sequence_ids,
            ahead_tokens=ahead_tokens,
            reading_s=reading_s,
            on_blocks_freed=on_blocks_freed,
            on_order=on_order,
        )
        self._running = self._turns.running
        self._ahead = ReadAhead(self._prefixes, room, block_tokens=self._layout.block_tokens)
        #: Answers that ended with their first token.
        self.answer_tallies = AnswerTallies()

    def __repr__(self) -> str:
        counts = (
            f"{self._prefixes.num_fetching} fetching, {self._turns.num_waiting} waiting, {len(self._running)} running, "
            f"{self._leases.untaken_count} untaken"
        )
        return f"<PrefillQueue [{counts}]>"

    @property
    def waiting_count(self) -> int:
        """Without blocks, those whose beginning is being fetched included."""
        return self._turns.num_waiting + self._prefixes.num_fetching

    @property
    def waiting_blocks(self) -> int:
        """Blocks that those without any would take."""
        running = self._running
        return sum(
            prompt.num_new_blocks
            for prompt in self._prompts.values()
            if not prompt.sealed and prompt.sequence.sequence_id not in running
        )

    @property
    def open_count(self) -> int:
        return len(self._prompts)

    @property
    def own_count(self) -> int:
        """Of those that are open: whose answers this worker writes itself, or that end with their first token."""
        return sum(prompt.reader is None for prompt in self._prompts.values())

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens not computed yet, waiting ones included; not those found in the prefix cache."""
        return sum(num_tokens for _, num_tokens in self._unread())

    @property
    def pending_pairs(self) -> float:
        """Query-key pairs of their attention: see `contracts.latency.StepWork.prefill_pairs`."""
        return sum(num_tokens * start + num_tokens * (num_tokens + 1) / 2 for start, num_tokens in self._unread())

    @property
    def unread_for(self) -> tuple[tuple[WorkerId, int], ...]:
        """Prompts that are not read whole, by the other worker that will write their answers; in order of id."""
        readers = (prompt.reader for prompt in self._prompts.values() if not prompt.sealed)
        return tuple(sorted(Counter(reader.worker_id for reader in readers if reader is not None).items()))

    def _unread(self) -> Iterator[tuple[int, int]]:
        """(first position, tokens) of what is to be computed of prompts that are not read whole."""
        for prompt in self._prompts.values():
            if not prompt.sealed:
                yield from prompt.unread(self._layout.block_tokens)

    @property
    def read_ahead_tokens_total(self) -> int:
        """Prompt tokens computed while the rest of their prompt's beginning was being fetched, since the start."""
        return self._ahead.tokens_total

    def wanted(self, limit: int) -> list[Wanted]:
        """What the next prompts, at most so many, are to fetch when their turn comes; the next one first."""
        wanted: list[Wanted] = []
        for prompt in self._turns.upcoming(limit):
            if prompt.plan is not None and prompt.plan.source is not None:
                stop = min(prompt.plan.source_blocks, self._prefixes.num_usable(prompt))
                wanted.append(Wanted(prompt.plan.source, prompt.chain.part(prompt.num_cached, stop)))
        return wanted

    def knows(self, request: GenerateRequest) -> bool:
        """Whether this try came before: it is here, has ended, or was cancelled."""
        key = request_key(request)
        return key in self._prompts or key in self._over

    def set_also_writes(self, also_writes: bool) -> None:
        """The worker's role has changed; what is open goes on.

        What has blocks keeps its reader, and its lease. Of what has none, a worker that writes too keeps what is larger
        than the whole budget of handoffs, as if it had come now (`hands_over`): under that budget it would never get
        its turn.
        """
        if also_writes == self._also_writes:
            return
        self._also_writes = self._turns.also_writes = also_writes
        if also_writes:
            for prompt in self._prompts.values():
                if prompt.num_blocks > self._budget_blocks and not self._has_blocks(prompt):
                    _KEPT.reached()
                    prompt.reader = None
        # Another budget holds up the next one, or does so no more; and who waited behind it may go on.
        self._turns.note_head()
        self._on_blocks_freed()

    def _has_blocks(self, prompt: Prompt) -> bool:
        """It was admitted."""
        return prompt.sealed or prompt.sequence.sequence_id in self._running

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
        if self.knows(request):
            _KNOWN_TRY.reached()
            return
        check_fits(request, self._engine, self._own_worker_id)
        self._turns.check_room(len(request.token_ids), now_s)
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=request,
            deadline_s=now_s + request.deadline_s,
            token_ids=list(request.token_ids),
        )
        num_blocks = self._layout.blocks_for(len(request.token_ids))
        to_another = hands_over(
            ask,
            num_blocks,
            own_worker_id=self._own_worker_id,
            budget_blocks=self._budget_blocks,
            also_writes=self._also_writes,
        )
        prompt = Prompt(
            sequence=sequence,
            reader=ask.decode if to_another else None,
            received_s=now_s,
            num_blocks=num_blocks,
            chain=self._prefixes.chain(request),
            plan=ask.prefix,
        )
        found = self._prefixes.find(prompt)
        self._prompts[sequence.key] = prompt
        self._turns.came(prompt, found, now_s)

    def cancel(self, key: RequestKey, reason: str) -> None:
        """Forgets a try; its reader is told through the lease. Unknown tries are no error."""
        prompt = self._prompts.get(key)
        if prompt is None:
            self._over.add(key)
            return
        if prompt.sealed:
            _CANCELLED_SEALED.reached()
        self._drop(prompt, reason)

    # --- moves to other workers -------------------------------------------------------------------

    def movable(self) -> list[Prompt]:
        """Those that wait for blocks and have had none, as far as can be said the last to be read first."""
        upcoming = self._turns.upcoming(self._turns.num_waiting)
        return [prompt for prompt in reversed(upcoming) if prompt.fetch is None and not prompt.in_step]

    def park(self, prompt: Prompt) -> None:
        """One of these stands still from now on: whoever asked ends it (`cancel`) or lets it go on (`unpark`)."""
        _PARKED.reached()
        prompt.parked = True
        self._turns.left(prompt)
        self._turns.note_head()

    def unpark(self, prompt: Prompt, request: GenerateRequest | None = None) -> None:
        """It waits again, where it has not ended meanwhile; with `request` as that."""
        sequence = prompt.sequence
        if not prompt.parked or self._prompts.get(sequence.key) is not prompt:
            return
        prompt.parked = False
        if request is not None:
            del self._prompts[sequence.key]
            self._over.add(sequence.key)
            sequence.request = request
            self._prompts[sequence.key] = prompt
        self._turns.came_back(prompt)

    def has(self, key: RequestKey) -> bool:
        """A prompt under this key is here."""
        return key in self._prompts

    def is_here(self, prompt: Prompt) -> bool:
        """It has not ended."""
        return self._prompts.get(prompt.sequence.key) is prompt

    def give_up(self, prompt: Prompt, reason: str) -> None:
        """One that stood still, and of which nobody can say whose it is."""
        if self.is_here(prompt):
            self._fail(prompt, WorkerUnavailable.code, reason)

    def check_room(self, request: GenerateRequest, now_s: float) -> None:
        """Raises as `submit` would."""
        check_fits(request, self._engine, self._own_worker_id)
        self._turns.check_room(len(request.token_ids), now_s)

    def submit_moved(self, ask: PrefillRequest, now_s: float) -> None:
        """As `submit`, of a prompt that is this worker's already: what would be raised is told to its gateway."""
        try:
            self.submit(ask, now_s)
        except TandemError as error:
            self.refuse(ask.request, error.code, error.message)

    def refuse(self, request: GenerateRequest, code: str, message: str) -> None:
        """Tells a gateway that a request which may be this worker's is not read here."""
        self._over.add(request_key(request))
        self._emit(request, failure(request, len(request.token_ids) - request.num_prompt_tokens, code, message))

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
        if self._turns.num_waiting or self._running or self._ahead.has_to_yield():
            self._stop_reading_ahead()
        self._turns.admit(now_s)
        chunks = [
            Candidate(
                sequence_id=sequence_id,
                num_tokens=prompt.num_next,
                arrival=prompt.place,
                started=prompt.started_s is not None,
                num_computed=prompt.sequence.num_computed,
            )
            for sequence_id, prompt in self._running.items()
        ]
        if not chunks and not self._turns.num_waiting and (ahead := self._ahead.candidate(now_s)) is not None:
            chunks.append(ahead)
        return [], chunks

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        prompt = self._in_hand(sequence_id)
        prompt.in_step = True
        prompt.step_tokens = num_tokens
        # What is read ahead belongs to the waiting for the rest.
        if prompt.started_s is None and sequence_id in self._running:
            prompt.started_s = now_s
        return prompt.sequence.step(num_tokens)

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        prompt = self._in_hand(sequence_id)
        self._turns.now_s = now_s
        prompt.in_step, prompt.step_tokens = False, 0
        if prompt is self._ahead.prompt:
            self._read_ahead(prompt, num_tokens, now_s)
            return
        prompt.note_computed(num_tokens)
        self._prefixes.name_final(prompt)
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        elif sampled is not None:
            self._first_token(prompt, sampled, now_s)
        else:
            self._leases.advance(prompt, prompt.num_named)

    def fail(self, sequence_id: int, error: TandemError) -> None:
        prompt = self._in_hand(sequence_id)
        prompt.in_step, prompt.step_tokens = False, 0
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        else:
            self._fail(prompt, error.code, error.message)

    def _in_hand(self, sequence_id: int) -> Prompt:
        """One of the candidates."""
        ahead = self._ahead.prompt
        return ahead if ahead is not None and ahead.sequence.sequence_id == sequence_id else self._running[sequence_id]

    # --- reading ahead ----------------------------------------------------------------------------

    def _read_ahead(self, prompt: Prompt, num_tokens: int, now_s: float) -> None:
        """A step has read so many tokens of one whose fetch is under way, or was when the step began."""
        self._ahead.computed(num_tokens)
        self._turns.charge(prompt, num_tokens)
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        elif prompt.fetch is None:
            self._settle(prompt)
        elif self._ahead.has_overtaken():
            self._ahead.note_overtaken()
            prompt.fetch_s = now_s - prompt.fetch.began_s
            self._prefixes.leave(prompt)
            self._settle(prompt)
        elif self._ahead.is_done():
            self._stop_reading_ahead()

    def _stop_reading_ahead(self) -> None:
        """Between steps. The prompt goes on waiting for its fetch, and finds what was read."""
        prompt = self._ahead.let_go()
        if prompt is not None:
            self._prefixes.find(prompt)
            self._on_blocks_freed()

    def _fetched(self, prompt: Prompt, ended_s: float) -> None:
        self._turns.now_s = ended_s
        # A step that reads ahead of it is let end.
        if not prompt.in_step:
            self._settle(prompt)

    def _settle(self, prompt: Prompt) -> None:
        """Its fetch is over: it waits for its turn."""
        if prompt is self._ahead.prompt:
            self._stop_reading_ahead()
        self._prefixes.settle(prompt)
        self._prefixes.find(prompt)
        self._turns.wait(prompt)
        self._turns.note_head()

    # --- how prompts end --------------------------------------------------------------------------

    def _lease_ended(self, prompt: Prompt, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
        self._turns.note_head()
        if prompt.sealed:
            self._on_read(prompt.sequence.request, prompt.chain)
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
            cached_tokens=sum(prompt.cached_by_tier.values()) if self._prefixes.enabled else None,
            cached_by_tier=prompt.cached_by_tier,
            prefill_s=now_s - started_s,
        )
        delta = sequence.append(sampled, finish, phases)
        self._emit(sequence.request, delta)
        if finish is not None:
            self.answer_tallies.add(sequence)
            self._drop(prompt, "finished with its first token")
            self._on_read(sequence.request, prompt.chain)
        elif prompt.lease_id is None:
            self._forget(prompt)
            self._hand_over(sequence, now_s)
        else:
            del self._running[sequence.sequence_id]
            self._leases.seal(prompt, delta)
            self._release(prompt)

    def _fail(self, prompt: Prompt, code: str, message: str) -> None:
        sequence = prompt.sequence
        self._emit(sequence.request, failure(sequence.request, sequence.output_count, code, message))
        self._drop(prompt, message)

    def _drop(self, prompt: Prompt, reason: str) -> None:
        """Ends a try on this side: lease withdrawn, blocks released (after the step that writes them)."""
        self._leases.withdraw(prompt, reason)
        self._turns.note_head()
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
        if prompt is self._ahead.prompt:
            self._ahead.let_go()
        elif prompt.sequence.block_ids:
            self._ledger.release(prompt.sequence.owner, prompt.sequence.block_ids)
            prompt.sequence.block_ids = []

    def _forget(self, prompt: Prompt) -> None:
        self._prompts.pop(prompt.sequence.key, None)
        self._over.add(prompt.sequence.key)
        self._running.pop(prompt.sequence.sequence_id, None)
        self._turns.left(prompt)
        self._turns.note_head()
