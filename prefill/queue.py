"""The prefill side of a worker: prompts waiting, being read, and sealed until their reader took them.

A prompt gets all its blocks when it is admitted, first come first served; the lease to its decode worker is
opened then, so that the reader can reserve while the first chunk computes. After each chunk the lease
advances over the blocks that will never be written again. After the last one the first token is sampled
and streamed at once, and the lease is sealed; from then on only the lease holds the blocks. Blocks that wait
for a slow reader are the backpressure: what they hold, no new prompt can have.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from contracts.errors import BadRequest, NoCapacity
from contracts.messages import Seal
from contracts.requests import PhaseTimes
from engine.compose import Candidate
from engine.recent import RecentTries
from engine.sequence import Sequence, failure, finish_after, request_key
from kvtransfer import LeaseOutcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.errors import TandemError
    from contracts.ids import GatewayId, LeaseId
    from contracts.messages import HandoffReply, LeaseTerms, Peer, PrefillRequest, RequestKey
    from contracts.requests import GenerateRequest
    from engine.plan import Engine, Sampled, SequenceStep
    from engine.sequence import Emit
    from kvtransfer import HolderService, Ledger


class LocalHandoff(Protocol):
    """Gives a read prompt to the decode side of the same (mixed) worker; its blocks change hands."""

    def __call__(self, sequence: Sequence, now_s: float) -> None: ...


class SendOffer(Protocol):
    """Pushes an offer to its reader."""

    async def __call__(
        self, reader: Peer, terms: LeaseTerms, request: GenerateRequest, timeout_s: float
    ) -> HandoffReply: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    #: Prompts accepted and not yet admitted; the next one is refused.
    max_waiting: int = 512


@dataclass(slots=True, kw_only=True, eq=False)
class _Prompt:
    """One try of a request on this side."""

    sequence: Sequence
    #: The reader, or None when this worker writes the answer itself.
    reader: Peer | None
    received_s: float
    #: Start of the first step that computed it.
    started_s: float | None = None
    lease_id: LeaseId | None = None
    #: A step is writing its blocks.
    in_step: bool = False
    #: The first token is out and the lease sealed: the engine is done with it.
    sealed: bool = False
    #: It was cancelled or failed while in a step; dropped when that step ends.
    doomed: bool = False


class PrefillQueue:
    """Implements `engine.source.StepSource`."""

    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        holder: HolderService,
        own_worker_id: str,
        limits: PrefillLimits,
        emit: Emit,
        send_offer: SendOffer,
        hand_over: LocalHandoff,
        may_admit: Callable[[], bool],
        on_blocks_freed: Callable[[], None],
        sequence_ids: Iterator[int],
    ) -> None:
        """`may_admit` says whether new prompts may take blocks now (not while preempted answers starve);
        `on_blocks_freed` is called after a lease let blocks go."""
        self._engine = engine
        self._block_tokens = engine.identity.layout.block_tokens
        self._ledger = ledger
        self._holder = holder
        self._own_worker_id = own_worker_id
        self._limits = limits
        self._emit = emit
        self._send_offer = send_offer
        self._hand_over = hand_over
        self._may_admit = may_admit
        self._on_blocks_freed = on_blocks_freed
        self._sequence_ids = sequence_ids
        #: All and only prompts known here, by try.
        self._prompts: dict[RequestKey, _Prompt] = {}
        #: Tries that ended here, or were cancelled before they came.
        self._over = RecentTries()
        #: All and only prompts without blocks, oldest first.
        self._waiting: deque[_Prompt] = deque()
        #: All and only prompts with blocks whose first token is not sampled, in order of admission.
        self._running: dict[int, _Prompt] = {}
        #: All and only prompts whose lease has not ended.
        self._leased: dict[LeaseId, _Prompt] = {}

    def __repr__(self) -> str:
        sealed = sum(prompt.sealed for prompt in self._prompts.values())
        return f"<PrefillQueue [{len(self._waiting)} waiting, {len(self._running)} running, {sealed} sealed]>"

    @property
    def waiting_count(self) -> int:
        return len(self._waiting)

    @property
    def open_count(self) -> int:
        return len(self._prompts)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens not computed yet, waiting ones included."""
        waiting = sum(len(prompt.sequence.token_ids) for prompt in self._waiting)
        return waiting + sum(prompt.sequence.num_remaining for prompt in self._running.values())

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

        Raises NoCapacity when the queue is full, BadRequest when the prompt can never fit.
        """
        request = ask.request
        key = request_key(request)
        if key in self._prompts or key in self._over:
            return
        self._check_fits(request)
        if len(self._waiting) >= self._limits.max_waiting:
            raise NoCapacity(
                f"{self._own_worker_id} has {len(self._waiting)} prompts waiting, the limit", retry_after_s=1.0
            )
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=request,
            deadline_s=now_s + request.deadline_s,
            token_ids=list(request.token_ids),
        )
        prompt = _Prompt(
            sequence=sequence,
            reader=None if ask.decode.worker_id == self._own_worker_id else ask.decode,
            received_s=now_s,
        )
        self._prompts[sequence.key] = prompt
        self._waiting.append(prompt)

    def cancel(self, key: RequestKey, reason: str) -> None:
        """Forgets a try; its reader is told through the lease. Unknown tries are no error."""
        prompt = self._prompts.get(key)
        if prompt is None:
            self._over.add(key)
        else:
            self._drop(prompt, reason)

    def expire(self, now_s: float) -> None:
        """Ends the tries whose deadline has passed."""
        for prompt in [prompt for prompt in self._prompts.values() if now_s > prompt.sequence.deadline_s]:
            if not prompt.doomed and not prompt.sealed:
                self._fail(prompt, "deadline_exceeded", "the request's deadline passed during prefill")

    # --- steps ------------------------------------------------------------------------------------

    def candidates(self, now_s: float) -> tuple[list[Candidate], list[Candidate]]:
        self._admit()
        chunks = [
            Candidate(
                sequence_id=sequence_id,
                num_tokens=prompt.sequence.num_remaining,
                arrival=sequence_id,
                started=prompt.started_s is not None,
            )
            for sequence_id, prompt in self._running.items()
        ]
        return [], chunks

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        prompt = self._running[sequence_id]
        prompt.in_step = True
        if prompt.started_s is None:
            prompt.started_s = now_s
        return prompt.sequence.step(num_tokens)

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        prompt = self._running[sequence_id]
        prompt.in_step = False
        prompt.sequence.num_computed += num_tokens
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        elif sampled is not None:
            self._first_token(prompt, sampled, now_s)
        elif prompt.lease_id is not None:
            self._holder.advance(prompt.lease_id, prompt.sequence.num_computed // self._block_tokens)

    def fail(self, sequence_id: int, error: TandemError) -> None:
        prompt = self._running[sequence_id]
        prompt.in_step = False
        if prompt.doomed:
            self._release(prompt)
            self._forget(prompt)
        else:
            self._fail(prompt, error.code, error.message)

    # --- inside -----------------------------------------------------------------------------------

    def _check_fits(self, request: GenerateRequest) -> None:
        num_tokens = len(request.token_ids)
        largest = max(request.token_ids)
        if largest >= self._engine.vocab_size:
            raise BadRequest(f"token id {largest} is outside the model's vocabulary of {self._engine.vocab_size}")
        if num_tokens >= self._engine.max_context_tokens:
            raise BadRequest(
                f"{num_tokens} prompt tokens leave no room for an answer in a context of "
                f"{self._engine.max_context_tokens}"
            )
        needed = self._engine.identity.layout.blocks_for(num_tokens)
        if needed > self._engine.num_blocks:
            raise BadRequest(
                f"the prompt needs {needed} KV blocks, {self._own_worker_id} has {self._engine.num_blocks} in all"
            )

    def _admit(self) -> None:
        while self._waiting and self._may_admit():
            sequence = self._waiting[0].sequence
            needed = self._engine.identity.layout.blocks_for(len(sequence.token_ids))
            blocks = self._ledger.allocate(sequence.owner, needed)
            if blocks is None:
                return
            sequence.block_ids = blocks
            prompt = self._waiting.popleft()
            self._running[sequence.sequence_id] = prompt
            if prompt.reader is not None:
                self._open_lease(prompt, prompt.reader)

    def _open_lease(self, prompt: _Prompt, reader: Peer) -> None:
        request = prompt.sequence.request

        async def send(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            return await self._send_offer(reader, terms, request, timeout_s)

        lease_id = self._holder.open(prompt.sequence.block_ids, reader, send_offer=send, on_ended=self._lease_ended)
        prompt.lease_id = lease_id
        self._leased[lease_id] = prompt

    def _lease_ended(self, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
        """The holder's one report of how a lease ended; its pins are dropped already."""
        prompt = self._leased.pop(lease_id, None)
        if prompt is None:
            return
        prompt.lease_id = None
        if outcome is LeaseOutcome.RELEASED:
            self._forget(prompt)
        else:
            self._fail(prompt, "transfer_aborted", f"handoff {lease_id} {outcome}: {reason}")
        self._on_blocks_freed()

    def _first_token(self, prompt: _Prompt, sampled: Sampled, now_s: float) -> None:
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
        phases = PhaseTimes(queue_s=started_s - prompt.received_s, prefill_s=now_s - started_s)
        delta = sequence.append(sampled, finish, phases)
        self._emit(sequence.request, delta)
        if finish is not None:
            self._drop(prompt, "finished with its first token")
        elif prompt.lease_id is None:
            self._forget(prompt)
            self._hand_over(sequence, now_s)
        else:
            del self._running[sequence.sequence_id]
            prompt.sealed = True
            seal = Seal(num_tokens=sequence.num_computed, first_delta=delta)
            self._holder.seal(prompt.lease_id, len(sequence.block_ids), seal)
            self._release(prompt)

    def _fail(self, prompt: _Prompt, code: str, message: str) -> None:
        sequence = prompt.sequence
        self._emit(sequence.request, failure(sequence.request, sequence.output_count, code, message))
        self._drop(prompt, message)

    def _drop(self, prompt: _Prompt, reason: str) -> None:
        """Ends a try on this side: lease withdrawn, blocks released (after the step that writes them)."""
        if prompt.lease_id is not None:
            lease_id, prompt.lease_id = prompt.lease_id, None
            self._leased.pop(lease_id, None)
            self._holder.withdraw(lease_id, reason)
        if prompt.in_step:
            prompt.doomed = True
            return
        self._release(prompt)
        self._forget(prompt)

    def _release(self, prompt: _Prompt) -> None:
        if prompt.sequence.block_ids:
            self._ledger.release(prompt.sequence.owner, prompt.sequence.block_ids)
            prompt.sequence.block_ids = []

    def _forget(self, prompt: _Prompt) -> None:
        self._prompts.pop(prompt.sequence.key, None)
        self._over.add(prompt.sequence.key)
        self._running.pop(prompt.sequence.sequence_id, None)
        if prompt in self._waiting:
            self._waiting.remove(prompt)
