"""The decode side of a worker: what of its answers is in the next step, and where its results go.

An answer that is preempted (`decode.answers`) is read again, in chunks, when blocks are free. Noise is counter-based
and greedy choice is exact, so the answer does not change. Full blocks have keys, so what nobody took meanwhile is found
again and need not be read. So that all this stays rare, what is admitted leaves room for what runs to grow
(`engine.room`).

Answers may leave for other workers, and come from them, while they are written (`decode.moves`).

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.failpoints import RarePath
from contracts.requests import GROWTH_TOKENS, PhaseTimes
from decode.answers import Answer, Answers
from decode.handoffs import Handoffs
from decode.moves.coming import MovesIn
from decode.moves.out import MovesOut
from decode.prefixes import AnswerPrefixes
from decode.usage import priorities_of, wanted_again
from engine.answer_tallies import AnswerTallies
from engine.compose import Candidate
from engine.recent import RecentTries
from engine.sequence import Sequence, failure, finish_after, request_key
from kvstore.write_back import keep_nothing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.clock import Clock
    from contracts.errors import TandemError
    from contracts.ids import GatewayId
    from contracts.messages import HandoffReply, HandoffRequest, Peer, PriorityUse, RequestKey
    from decode.handoffs import Handoff
    from decode.incoming import Incoming
    from decode.moves.calls import MoveCalls
    from decode.swap import Swaps
    from decode.usage import WaitingBlocks
    from engine.plan import Engine, Sampled, SequenceStep
    from engine.room import Room
    from engine.sequence import Emit
    from kvstore.prefix_cache import PrefixCache
    from kvstore.write_back import Keep
    from kvtransfer import HolderService, Ledger, ReaderService

_DEADLINE_PASSED = RarePath("decode.deadline_passed", "a deadline passed while the answer was written")


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeLimits:
    #: What is admitted leaves the blocks that everything admitted takes within so many tokens.
    growth_tokens: int = GROWTH_TOKENS


class DecodeBatch:
    """Implements `engine.source.StepSource`."""

    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        prefixes: PrefixCache,
        reader: ReaderService,
        room: Room,
        holder: HolderService,
        own: Peer,
        limits: DecodeLimits,
        emit: Emit,
        move_calls: MoveCalls,
        clock: Clock,
        on_change: Callable[[], None],
        sequence_ids: Iterator[int],
        keep: Keep = keep_nothing,
        swaps: Swaps | None = None,
    ) -> None:
        """`own`: this worker, as others address it. `on_change` is called when a pull ended: there may be work, or
        blocks, that were not there before. `keep` hears of each answer that ended of itself, when its blocks have been
        let go. `swaps`: None where preempted answers are always read again."""
        self._engine = engine
        self._layout = engine.identity.layout
        self._ledger = ledger
        self._room = room
        self._own_worker_id = own.worker_id
        self._limits = limits
        self._emit = emit
        self._swaps = swaps
        self._sequence_ids = sequence_ids
        self._keep = keep
        self._prefixes = AnswerPrefixes(prefixes, ledger)
        #: Ownerships that ended here, or were cancelled before they came.
        self._over = RecentTries()
        self._answers = Answers(
            engine=engine,
            ledger=ledger,
            prefixes=self._prefixes,
            room=room,
            over=self._over,
            own_worker_id=own.worker_id,
            emit=emit,
            swaps=swaps,
            on_gone=self._gone,
            on_blocks_freed=lambda: self._handoffs.ask_for_blocks(),
        )
        #: How moves from here and to here ended, since the start.
        self.move_outcomes: Counter[str] = Counter()
        self.moves_out = MovesOut(
            answers=self._answers,
            holder=holder,
            layout=self._layout,
            own=own,
            calls=move_calls,
            clock=clock,
            outcomes=self.move_outcomes,
            on_change=on_change,
        )
        self.moves_in = MovesIn(
            engine=engine,
            answers=self._answers,
            prefixes=self._prefixes,
            room=room,
            over=self._over,
            own=own,
            calls=move_calls,
            clock=clock,
            emit=emit,
            sequence_ids=sequence_ids,
            outcomes=self.move_outcomes,
            forget_kv=lambda key, reason: self._handoffs.forget_move(key, reason),
            on_change=on_change,
        )
        self._handoffs = Handoffs(
            engine=engine,
            ledger=ledger,
            prefixes=self._prefixes,
            reader=reader,
            room=room,
            over=self._over,
            own_worker_id=own.worker_id,
            clock=clock,
            workload=lambda: f"{len(self._answers.running)} answers run, {len(self._answers.preempted)} are preempted",
            moves=self.moves_in,
            on_adopted=self._adopted,
            on_failed=self._handoff_failed,
            on_change=on_change,
        )
        self.answer_tallies = AnswerTallies()

    def __repr__(self) -> str:
        return (
            f"<DecodeBatch [{len(self._handoffs)} incoming, {len(self._answers.running)} running, "
            f"{len(self._answers.preempted)} preempted, {len(self._answers.parked)} parked]>"
        )

    @property
    def open_count(self) -> int:
        return len(self._handoffs) + len(self._answers.all)

    @property
    def decode_count(self) -> int:
        """Answers that are written here, and those on their way whose prompt has been read."""
        return len(self._answers.all) + self._handoffs.num_sealed

    @property
    def preemptions_total(self) -> int:
        return self._answers.preemptions_total

    @property
    def recomputed_tokens_total(self) -> int:
        """Tokens whose KV was given up, was gone when its answer got blocks again, and had to be computed again."""
        return self._answers.recomputed_tokens_total

    @property
    def swapped_in_blocks_total(self) -> int:
        """Blocks of preempted answers that came back from the store."""
        return 0 if self._swaps is None else self._swaps.swapped_in_blocks_total

    @property
    def skipped_blocks_total(self) -> int:
        """Blocks of handoffs that were not moved, for they stood here, since the start."""
        return self._prefixes.skipped_blocks_total

    @property
    def running_count(self) -> int:
        return len(self._answers.running)

    @property
    def waiting_offers(self) -> int:
        """Offers that have no blocks yet."""
        return self._handoffs.num_waiting

    @property
    def waiting_count(self) -> int:
        return len(self._handoffs) + len(self._answers.preempted)

    @property
    def preempted_count(self) -> int:
        return len(self._answers.preempted)

    @property
    def preempted_blocks(self) -> WaitingBlocks:
        return wanted_again(self._answers, self._layout)

    @property
    def offered_blocks(self) -> int:
        """Blocks that offers without any would take."""
        return self._handoffs.waiting_blocks

    @property
    def priorities(self) -> tuple[PriorityUse, ...]:
        """Of answers that run."""
        return priorities_of(self._answers.running.values())

    @property
    def starving(self) -> bool:
        """Whether a preempted sequence waits for blocks: then nothing new should take any."""
        return bool(self._answers.preempted)

    @property
    def context_tokens(self) -> int:
        """Tokens of running and preempted sequences and of prompts on their way."""
        running = sum(len(answer.sequence.token_ids) for answer in self._answers.all.values())
        return running + self._handoffs.num_tokens

    @property
    def unread_tokens(self) -> int:
        """Of these, of prompts that are still being read elsewhere."""
        return self._handoffs.unread_tokens

    def keys_of(self, gateway_id: GatewayId) -> list[RequestKey]:
        """The tries whose tokens go to this gateway."""
        requests = self._handoffs.requests()
        requests += [answer.sequence.request for answer in self._answers.all.values()]
        return [request_key(request) for request in requests if request.gateway_id == gateway_id]

    def fail_all(self, code: str, message: str) -> None:
        """Ends every try on this side: the worker stops."""
        self._handoffs.fail_all(code, message)
        for answer in list(self._answers.all.values()):
            self._end(answer, code, message)

    def has(self, key: RequestKey) -> bool:
        """An answer under this key is here."""
        return key in self._answers.all

    def answers(self) -> list[Answer]:
        """Those that could move: that run or wait for blocks here, and are not on their way already."""
        books = (self._answers.running, self._answers.preempted)
        found = (answer for book in books for answer in book.values())
        return [one for one in found if one.move is None and one.when_free is None and not one.doomed]

    # --- requests ---------------------------------------------------------------------------------

    def offer(self, ask: HandoffRequest, now_s: float) -> HandoffReply:
        """Answers a handoff at once; raises what `Handoffs.offer` does."""
        return self._handoffs.offer(ask, now_s)

    def may_reserve(self) -> bool:
        """Whether the offer that has waited longest may have its blocks now: what the reader asks before each."""
        return self._handoffs.may_reserve()

    def take_over(self, sequence: Sequence, now_s: float) -> None:
        """A prompt read by this same worker: its blocks stay where they are."""
        chain = self._prefixes.chain(sequence.request, sequence.token_ids)
        num_named = min(len(chain), sequence.num_computed // self._layout.block_tokens)
        self._answers.start(
            Answer(sequence=sequence, chain=chain, num_named=num_named, adopted_s=now_s, handoff_s=None)
        )

    def cancel(self, key: RequestKey, reason: str) -> None:
        """Forgets a try. Unknown tries are no error."""
        if key in self.moves_in:
            self.moves_in.gone(key, reason)
            self._over.add(key)
            return
        self._handoffs.cancel(key, reason)
        answer = self._answers.all.get(key)
        if answer is not None:
            self._answers.drop(answer, reason)
        else:
            self._over.add(key)

    def expire(self, now_s: float) -> None:
        """Ends the tries whose deadline has passed."""
        message = f"the request's deadline passed on {self._own_worker_id}"
        for answer in [late for late in self._answers.all.values() if now_s > late.sequence.deadline_s]:
            if not answer.doomed:
                _DEADLINE_PASSED.reached()
                self._end(answer, "deadline_exceeded", message)
        self._handoffs.expire(now_s, message)

    def _end(self, answer: Answer, code: str, message: str) -> None:
        if answer.is_guest:
            # Somebody else answers for it, for now.
            self.moves_in.lost(answer.sequence.key, message)
        elif not answer.doomed:
            self._answers.fail(answer, code, message)

    # --- steps ------------------------------------------------------------------------------------

    def candidates(self, now_s: float) -> tuple[list[Candidate], list[Candidate]]:
        self._answers.make_room()
        self._answers.resume(now_s)
        # Whatever changed since (a prompt was admitted, blocks were taken back) may be what an offer waited for.
        self._handoffs.blocks_freed()
        decodes: list[Candidate] = []
        chunks: list[Candidate] = []
        for answer in self._answers.running.values():
            remaining = answer.sequence.num_remaining
            target = decodes if remaining == 1 else chunks
            target.append(_candidate(answer, remaining))
        for answer in self._answers.parked.values():
            # The last token stays: from it the next one would be sampled.
            if answer.is_guest and answer.sequence.num_remaining > 1:
                chunks.append(_candidate(answer, answer.sequence.num_remaining - 1))
        return decodes, chunks

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        answer = self._answer(sequence_id)
        answer.in_step = True
        return answer.sequence.step(num_tokens)

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        answer = self._answer(sequence_id)
        answer.in_step = False
        sequence = answer.sequence
        sequence.num_computed += num_tokens
        answer.num_named = self._prefixes.name_final(answer.chain, sequence, answer.num_named)
        if answer.doomed:
            self._answers.drop(answer)
            return
        if sampled is None:
            self._computed(answer)
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
            self._answers.drop(answer)
            self._keep(answer.chain, answer.num_named, sequence.request)
            return
        self._computed(answer)

    def fail(self, sequence_id: int, error: TandemError) -> None:
        answer = self._answer(sequence_id)
        answer.in_step = False
        if answer.doomed:
            self._answers.drop(answer)
        else:
            self._end(answer, error.code, error.message)

    def _answer(self, sequence_id: int) -> Answer:
        """One that is in the step; guests may be."""
        answer = self._answers.running.get(sequence_id)
        return self._answers.parked[sequence_id] if answer is None else answer

    def _gone(self, answer: Answer, reason: str) -> None:
        self.moves_out.gone(answer, reason)

    def _computed(self, answer: Answer) -> None:
        """It has more KV than before the step, and goes on."""
        if answer.when_free is not None:
            begin, answer.when_free = answer.when_free, None
            begin()
        elif answer.is_guest:
            self.moves_in.read(answer)
        elif answer.move is not None:
            self.moves_out.advanced(answer)

    # --- inside -----------------------------------------------------------------------------------

    def _adopted(self, handoff: Handoff) -> None:
        offer = handoff.offer
        sequence = Sequence(
            sequence_id=next(self._sequence_ids),
            request=offer.request,
            deadline_s=offer.deadline_s,
            token_ids=offer.token_ids,
            block_ids=handoff.block_ids,
            num_computed=handoff.num_computed,
        )
        answer = Answer(
            sequence=sequence,
            chain=offer.chain,
            num_named=self._prefixes.name_final(offer.chain, sequence, handoff.num_shared),
            adopted_s=handoff.adopted_s,
            handoff_s=handoff.adopted_s - offer.received_s,
        )
        if offer.is_move:
            answer.announced = True
            self._answers.keep_as_guest(answer)
            self.moves_in.arrived(answer)
        else:
            self._answers.start(answer)

    def _handoff_failed(self, offer: Incoming, code: str, message: str) -> None:
        self._emit(offer.request, failure(offer.request, offer.first_index, code, message))


def _candidate(answer: Answer, num_tokens: int) -> Candidate:
    sequence = answer.sequence
    return Candidate(
        sequence_id=sequence.sequence_id,
        num_tokens=num_tokens,
        arrival=sequence.sequence_id,
        started=True,
        num_computed=sequence.num_computed,
        tpot_target_s=sequence.request.tpot_target_s,
    )
