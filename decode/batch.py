"""The decode side of a worker: offers being pulled, sequences running, and those preempted.

A running sequence takes one block more whenever its next token would not fit; when none is free the
sequence that arrived last is preempted by recompute (vLLM, SOSP'23, section 4.5): its blocks are freed, and its
prompt and output are read again, in chunks, when blocks are free. Noise is counter-based and greedy choice is
exact, so the answer does not change. So that this stays rare, what is admitted leaves room for what runs to grow
(`engine.room`). Preempted sequences come before offers that wait for blocks (`decode.admission`), the one that
arrived first before the others.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import BadRequest, Cancelled, NoCapacity
from contracts.failpoints import Failpoint, RarePath
from contracts.requests import GROWTH_TOKENS, PhaseTimes
from decode.admission import OfferVerdict, admit, may_resume, retry_after_s
from decode.incoming import Incoming, IncomingOffers
from engine.answer_tallies import AnswerTallies
from engine.compose import Candidate
from engine.recent import RecentTries
from engine.room import Demand
from engine.sequence import Sequence, failure, finish_after, owner_name, request_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.clock import Clock
    from contracts.errors import TandemError
    from contracts.ids import BlockId, GatewayId, LeaseId
    from contracts.messages import HandoffReply, HandoffRequest, RequestKey, Seal
    from contracts.requests import GenerateRequest
    from engine.plan import Engine, Sampled, SequenceStep
    from engine.room import Room
    from engine.sequence import Emit
    from kvtransfer import Ledger, ReaderService

_HOLDS_BACK = Failpoint("decode.holds_back", "an offer waits although there is room for it")
_PREEMPTS = Failpoint("decode.preempts", "the newest answer is preempted although blocks are free")

_PREEMPTED = RarePath("decode.preempted", "an answer lost its blocks")
_RESUMED = RarePath("decode.resumed", "a preempted answer is read again")
_OFFERED_TOO_LATE = RarePath("decode.offered_too_late", "an offer came for a try that was cancelled or has ended")
_CANCELLED_COMING = RarePath("decode.cancelled_coming", "a try was cancelled while its KV was on its way")
_DROPPED_IN_STEP = RarePath("decode.dropped_in_step", "a try ended while a step computed it")
_DEADLINE_PASSED = RarePath("decode.deadline_passed", "a deadline passed while the KV came or the answer was written")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    #: What is admitted leaves the blocks that everything admitted takes within so many tokens.
    growth_tokens: int = GROWTH_TOKENS


@dataclass(slots=True, kw_only=True, eq=False)
class _Answer:
    """One try of a request on this side."""

    sequence: Sequence
    #: When its blocks became this side's.
    adopted_s: float
    #: Offer received to adopted; None when there was no handoff.
    handoff_s: float | None
    in_step: bool = False
    #: Cancelled or failed while in a step; dropped when that step ends.
    doomed: bool = False
    #: Its first delta from this side is out.
    announced: bool = False


class DecodeBatch:
    """Implements `engine.source.StepSource`."""

    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        reader: ReaderService,
        room: Room,
        own_worker_id: str,
        limits: DecodeLimits,
        emit: Emit,
        clock: Clock,
        on_change: Callable[[], None],
        sequence_ids: Iterator[int],
    ) -> None:
        """`on_change` is called when a pull ended: there may be work, or blocks, that were not there before."""
        self._engine = engine
        self._layout = engine.identity.layout
        self._ledger = ledger
        self._reader = reader
        self._room = room
        self._own_worker_id = own_worker_id
        self._limits = limits
        self._emit = emit
        self._clock = clock
        self._on_change = on_change
        self._sequence_ids = sequence_ids
        self._incoming = IncomingOffers(room, ledger.is_reserved)
        #: All and only tries with adopted KV or preempted, by try.
        self._answers: dict[RequestKey, _Answer] = {}
        #: Those with blocks, by sequence id.
        self._running: dict[int, _Answer] = {}
        #: Those without blocks, by sequence id.
        self._preempted: dict[int, _Answer] = {}
        #: Tries that ended here, or were cancelled before they came.
        self._over = RecentTries()
        self.preemptions_total = 0
        #: Tokens whose KV was given up and had to be computed again.
        self.recomputed_tokens_total = 0
        self.answer_tallies = AnswerTallies()

    def __repr__(self) -> str:
        return (
            f"<DecodeBatch [{len(self._incoming)} incoming, {len(self._running)} running, "
            f"{len(self._preempted)} preempted]>"
        )

    @property
    def open_count(self) -> int:
        return len(self._incoming) + len(self._answers)

    @property
    def decode_count(self) -> int:
        """Answers that are written here, and those on their way whose prompt has been read."""
        return len(self._answers) + sum(self._reader.is_sealed(each.lease_id) for each in self._incoming)

    @property
    def running_count(self) -> int:
        return len(self._running)

    @property
    def waiting_offers(self) -> int:
        """Offers that have no blocks yet."""
        return self._incoming.num_waiting

    @property
    def waiting_count(self) -> int:
        return len(self._incoming) + len(self._preempted)

    @property
    def starving(self) -> bool:
        """Whether a preempted sequence waits for blocks: then nothing new should take any."""
        return bool(self._preempted)

    @property
    def context_tokens(self) -> int:
        """Tokens of running and preempted sequences and of prompts on their way."""
        running = sum(len(answer.sequence.token_ids) for answer in self._answers.values())
        return running + self._incoming.num_tokens

    @property
    def unread_tokens(self) -> int:
        """Of these, of prompts that are still being read elsewhere."""
        return sum(len(each.request.token_ids) for each in self._incoming if not self._reader.is_sealed(each.lease_id))

    def keys_of(self, gateway_id: GatewayId) -> list[RequestKey]:
        """The tries whose tokens go to this gateway."""
        requests = [incoming.request for incoming in self._incoming]
        requests += [answer.sequence.request for answer in self._answers.values()]
        return [request_key(request) for request in requests if request.gateway_id == gateway_id]

    def fail_all(self, code: str, message: str) -> None:
        """Ends every try on this side: the worker stops."""
        for incoming in self._incoming:
            self.cancel(incoming.key, message)
            self._fail_incoming(incoming, code, message)
        for answer in list(self._answers.values()):
            if not answer.doomed:
                self._fail(answer, code, message)

    # --- requests ---------------------------------------------------------------------------------

    def offer(self, ask: HandoffRequest, now_s: float) -> HandoffReply:
        """Answers a handoff at once.

        Raises BadRequest, IncompatiblePeer, StaleIncarnation; Cancelled for a try that is over; NoCapacity,
        with numbers and when to ask again, for an offer that may not even wait.
        """
        key = request_key(ask.request)
        if key in self._over:
            _OFFERED_TOO_LATE.reached()
            raise Cancelled(f"request {key.request_id} attempt {key.attempt} is over at {self._own_worker_id}")
        self._check_fits(ask)
        lease_id = ask.terms.lease_id
        if lease_id in self._incoming:
            return self._ask_reader(ask, owner_name(key), now_s)
        # Known before the reader decides: it asks `may_reserve` about the offer that has waited longest.
        self._incoming.add(
            Incoming(
                lease_id=lease_id,
                request=ask.request,
                received_s=now_s,
                num_blocks=ask.terms.num_blocks,
                growth_blocks=self._growth(ask.request, ask.terms.num_blocks),
            )
        )
        try:
            return self._ask_reader(ask, owner_name(key), now_s)
        except BaseException:
            self._incoming.take(lease_id)
            raise

    def _ask_reader(self, ask: HandoffRequest, owner: str, now_s: float) -> HandoffReply:
        try:
            return self._reader.offer(ask.terms, owner=owner, on_adopted=self._adopted, on_aborted=self._aborted)
        except NoCapacity as error:
            first = self._incoming.note_blocks()
            waited_s = now_s - first.received_s if first is not None else 0.0
            raise NoCapacity(
                f"{self._own_worker_id} takes no more offers: {error.message}; {len(self._running)} answers run, "
                f"{len(self._preempted)} are preempted",
                retry_after_s=retry_after_s(waited_s, ask.terms.ttl_s),
            ) from error

    def may_reserve(self) -> bool:
        """Whether the offer that has waited longest may have its blocks now: what the reader asks before each."""
        first = self._incoming.note_blocks()
        if _HOLDS_BACK.fires():
            return False
        return first is None or admit(first.demand, self._room.view()) is OfferVerdict.RESERVE

    def take_over(self, sequence: Sequence, now_s: float) -> None:
        """A prompt read by this same worker: its blocks stay where they are."""
        self._start(_Answer(sequence=sequence, adopted_s=now_s, handoff_s=None))

    def cancel(self, key: RequestKey, reason: str) -> None:
        """Forgets a try. Unknown tries are no error."""
        lease_id = self._incoming.lease_of(key)
        if lease_id is not None:
            _CANCELLED_COMING.reached()
            self._incoming.take(lease_id)
            self._over.add(key)
            self._reader.cancel(lease_id, reason)
        answer = self._answers.get(key)
        if answer is not None:
            self._drop(answer)
        else:
            self._over.add(key)

    def expire(self, now_s: float) -> None:
        """Ends the tries whose deadline has passed."""
        message = f"the request's deadline passed on {self._own_worker_id}"
        for answer in [late for late in self._answers.values() if now_s > late.sequence.deadline_s]:
            if not answer.doomed:
                _DEADLINE_PASSED.reached()
                self._fail(answer, "deadline_exceeded", message)
        for incoming in self._incoming:
            if now_s > incoming.deadline_s:
                _DEADLINE_PASSED.reached()
                self.cancel(incoming.key, message)
                self._fail_incoming(incoming, "deadline_exceeded", message)

    # --- steps ------------------------------------------------------------------------------------

    def candidates(self, now_s: float) -> tuple[list[Candidate], list[Candidate]]:
        self._make_room()
        self._resume()
        # Whatever changed since (a prompt was admitted, blocks were taken back) may be what an offer waited for.
        self._reader.blocks_freed()
        self._incoming.note_blocks()
        decodes: list[Candidate] = []
        chunks: list[Candidate] = []
        for sequence_id, answer in self._running.items():
            remaining = answer.sequence.num_remaining
            target = decodes if remaining == 1 else chunks
            target.append(
                Candidate(
                    sequence_id=sequence_id,
                    num_tokens=remaining,
                    arrival=sequence_id,
                    started=True,
                    num_computed=answer.sequence.num_computed,
                    tpot_target_s=answer.sequence.request.tpot_target_s,
                )
            )
        return decodes, chunks

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        answer = self._running[sequence_id]
        answer.in_step = True
        return answer.sequence.step(num_tokens)

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        answer = self._running[sequence_id]
        answer.in_step = False
        sequence = answer.sequence
        sequence.num_computed += num_tokens
        if answer.doomed:
            self._drop(answer)
            return
        if sampled is None:
            return
        finish = finish_after(
            sampled.token_id,
            output_count=sequence.output_count + 1,
            sequence_tokens=len(sequence.token_ids) + 1,
            sampling=sequence.request.sampling,
            eos_token_ids=self._engine.eos_token_ids,
            max_context_tokens=self._engine.max_context_tokens,
        )
        phases = None
        if not answer.announced or finish is not None:
            phases = PhaseTimes(
                handoff_s=None if answer.announced else answer.handoff_s, decode_s=now_s - answer.adopted_s
            )
        answer.announced = True
        self._emit(sequence.request, sequence.append(sampled, finish, phases))
        if finish is not None:
            self.answer_tallies.add(sequence)
            self._drop(answer)

    def fail(self, sequence_id: int, error: TandemError) -> None:
        answer = self._running[sequence_id]
        answer.in_step = False
        if answer.doomed:
            self._drop(answer)
        else:
            self._fail(answer, error.code, error.message)

    # --- inside -----------------------------------------------------------------------------------

    def _check_fits(self, ask: HandoffRequest) -> None:
        # One token more than the prompt must fit, else not even the second token could be computed.
        needed = self._layout.blocks_for(len(ask.request.token_ids) + 1)
        if max(needed, ask.terms.num_blocks) > self._engine.num_blocks:
            raise BadRequest(
                f"the request needs {needed} KV blocks, {self._own_worker_id} has {self._engine.num_blocks} in all"
            )

    def _adopted(self, lease_id: LeaseId, block_ids: list[BlockId], seal: Seal) -> None:
        """The reader's report that a pull was confirmed; the blocks are owned in the request's name."""
        incoming = self._incoming.take(lease_id)
        if seal.first_delta is None:
            self._ledger.release_all(owner_name(incoming.key))
            self._fail_incoming(incoming, BadRequest.code, f"lease {lease_id} was sealed without a first token")
            self._on_change()
            return
        now_s = self._clock.now_s()
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=incoming.request,
            deadline_s=incoming.deadline_s,
            token_ids=[*incoming.request.token_ids, *seal.first_delta.token_ids],
            block_ids=block_ids,
            num_computed=seal.num_tokens,
        )
        self._start(_Answer(sequence=sequence, adopted_s=now_s, handoff_s=now_s - incoming.received_s))
        self._on_change()

    def _aborted(self, lease_id: LeaseId, error: TandemError) -> None:
        """The reader's report that a pull ended without adoption. Cancelled says that somebody ended it who answers
        for the request himself: this worker, or its holder; anything else is told to the client as what it is."""
        if lease_id in self._incoming:
            incoming = self._incoming.take(lease_id)
            if isinstance(error, Cancelled):
                self._over.add(incoming.key)
            else:
                self._fail_incoming(incoming, error.code, error.message)
        self._on_change()

    def _fail_incoming(self, incoming: Incoming, code: str, message: str) -> None:
        request = incoming.request
        self._over.add(request_key(request))
        self._emit(request, failure(request, incoming.first_index, code, message))

    def _start(self, answer: _Answer) -> None:
        self._answers[answer.sequence.key] = answer
        self._run(answer)

    def _run(self, answer: _Answer) -> None:
        self._running[answer.sequence.sequence_id] = answer
        self._promise_growth(answer.sequence)

    def _growth(self, request: GenerateRequest, num_blocks: int) -> int:
        return self._room.growth(request, num_blocks, max_context_tokens=self._engine.max_context_tokens)

    def _promise_growth(self, sequence: Sequence) -> None:
        self._room.promise(sequence.owner, self._growth(sequence.request, len(sequence.block_ids)))

    def _make_room(self) -> None:
        """Gives every running sequence the blocks for its remaining tokens, oldest first, preempting the
        newest. Sequence ids grow with arrival."""
        order = deque(sorted(self._running) if len(self._running) > 1 else self._running)
        if order and _PREEMPTS.fires():
            self._preempt(self._running[order.pop()])
        while order:
            if self._extend(self._running[order[0]].sequence):
                order.popleft()
            else:
                self._preempt(self._running[order.pop()])

    def _extend(self, sequence: Sequence) -> bool:
        missing = self._layout.blocks_for(len(sequence.token_ids)) - len(sequence.block_ids)
        if missing <= 0:
            return True
        blocks = self._ledger.allocate(sequence.owner, missing)
        if blocks is None:
            return False
        sequence.block_ids.extend(blocks)
        self._promise_growth(sequence)
        return True

    def _preempt(self, answer: _Answer) -> None:
        sequence = answer.sequence
        del self._running[sequence.sequence_id]
        self._release(sequence)
        num_lost, sequence.num_computed = sequence.num_computed, 0
        if self._layout.blocks_for(len(sequence.token_ids)) > self._engine.num_blocks:
            message = f"the answer outgrew the {self._engine.num_blocks} KV blocks of {self._own_worker_id}"
            self._fail(answer, "no_capacity", message)
            return
        _PREEMPTED.reached()
        self.preemptions_total += 1
        self.recomputed_tokens_total += num_lost
        self._preempted[sequence.sequence_id] = answer
        self._room.starving = True

    def _resume(self) -> None:
        while self._preempted:
            sequence_id = min(self._preempted)
            answer = self._preempted[sequence_id]
            sequence = answer.sequence
            needed = self._layout.blocks_for(len(sequence.token_ids))
            growth = self._growth(sequence.request, needed)
            demand = Demand(arrival_s=answer.adopted_s, num_blocks=needed, growth_blocks=growth)
            if not may_resume(demand, self._room.view()):
                return
            blocks = self._ledger.allocate(sequence.owner, needed)
            assert blocks is not None, (self._ledger, needed)
            _RESUMED.reached()
            sequence.block_ids = blocks
            del self._preempted[sequence_id]
            self._room.starving = bool(self._preempted)
            self._run(answer)

    def _fail(self, answer: _Answer, code: str, message: str) -> None:
        sequence = answer.sequence
        self._emit(sequence.request, failure(sequence.request, sequence.output_count, code, message))
        self._drop(answer)

    def _drop(self, answer: _Answer) -> None:
        """Ends a try on this side; its blocks are released after the step that writes them."""
        if answer.in_step:
            _DROPPED_IN_STEP.reached()
            answer.doomed = True
            return
        sequence = answer.sequence
        self._release(sequence)
        self._answers.pop(sequence.key, None)
        self._over.add(sequence.key)
        self._running.pop(sequence.sequence_id, None)
        self._preempted.pop(sequence.sequence_id, None)
        self._room.starving = bool(self._preempted)
        self._reader.blocks_freed()

    def _release(self, sequence: Sequence) -> None:
        self._room.forget(sequence.owner)
        if sequence.block_ids:
            self._ledger.release(sequence.owner, sequence.block_ids)
            sequence.block_ids = []
