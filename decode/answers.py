"""The answers of a worker and their blocks: which run, which were preempted, which stand still while they move.

A running answer takes one block more whenever its next token would not fit; when none is free the one that arrived
last is preempted by recompute (vLLM, SOSP'23, section 4.5). Preempted ones come before offers that wait for blocks,
the one that arrived first before the others.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.failpoints import Failpoint, RarePath
from decode.admission import may_resume
from engine.room import Demand
from engine.sequence import failure

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import BlockId
    from contracts.layout import BlockLayout
    from contracts.messages import RequestKey
    from contracts.requests import GenerateRequest
    from decode.moves.source import SourceMove
    from decode.prefixes import AnswerPrefixes
    from decode.swap import Swaps
    from engine.plan import Engine
    from engine.recent import RecentTries
    from engine.room import Room
    from engine.sequence import Emit, Sequence
    from kvstore.fetch_ends import FetchTicket
    from kvstore.prefix_cache import KeyChain
    from kvtransfer import Ledger

_PREEMPTS = Failpoint("decode.preempts", "the newest answer is preempted although blocks are free")

_PREEMPTED = RarePath("decode.preempted", "an answer lost its blocks")
_RESUMED = RarePath("decode.resumed", "a preempted answer is read again")
_DROPPED_IN_STEP = RarePath("decode.dropped_in_step", "a try ended while a step computed it")


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """One ownership of a request on this side."""

    sequence: Sequence
    #: Keys of its full blocks; grows with it.
    chain: KeyChain
    #: Leading blocks that have theirs.
    num_named: int
    #: When its blocks became this side's.
    adopted_s: float
    #: Offer received to adopted; None when there was no handoff.
    handoff_s: float | None
    #: While preempted: tokens whose KV was given up.
    num_lost: int = 0
    in_step: bool = False
    #: Cancelled or failed while in a step; dropped when that step ends.
    doomed: bool = False
    #: Its first delta from this side is out.
    announced: bool = False
    #: On its way to another worker; None: it is not.
    move: SourceMove | None = None
    #: While preempted: it was offered to the store; it is on its way back from there.
    swapped: bool = False
    fetch: FetchTicket | None = None
    #: When reading it would have ended.
    fetch_late_s: float = 0.0
    #: Called once, when no step computes it any more, if it has not ended then.
    when_free: Callable[[], None] | None = None
    #: Another worker's still: it is read as far as its tokens go, and nothing is written.
    is_guest: bool = False


class Answers:
    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        prefixes: AnswerPrefixes,
        room: Room,
        over: RecentTries,
        own_worker_id: str,
        emit: Emit,
        swaps: Swaps | None,
        on_gone: Callable[[Answer, str], None],
        on_blocks_freed: Callable[[], None],
    ) -> None:
        """`over`: ownerships that ended on this side, which this adds to. `on_gone` hears, with a reason, of each
        answer that has ended, or lost its blocks, although it was on its way somewhere."""
        self._engine = engine
        self._layout: BlockLayout = engine.identity.layout
        self._ledger = ledger
        self._prefixes = prefixes
        self._room = room
        self._over = over
        self._own_worker_id = own_worker_id
        self._emit = emit
        self._swaps = swaps
        self._on_gone = on_gone
        self._on_blocks_freed = on_blocks_freed
        #: All and only those that are here, by key.
        self.all: dict[RequestKey, Answer] = {}
        # Each is in exactly one of these, by sequence id.
        #: With blocks; every step may write their next token.
        self.running: dict[int, Answer] = {}
        #: Without blocks, for which they wait.
        self.preempted: dict[int, Answer] = {}
        #: Standing still: about to leave, or not this worker's yet. With blocks, or preempted before.
        self.parked: dict[int, Answer] = {}
        self.preemptions_total = 0
        #: Tokens whose KV was given up, was gone when its answer got blocks again, and had to be computed again.
        self.recomputed_tokens_total = 0

    def start(self, answer: Answer) -> None:
        """A new one, with blocks, runs."""
        self.all[answer.sequence.key] = answer
        self.run(answer)

    def keep_as_guest(self, answer: Answer) -> None:
        """A new one, with blocks, that another worker still answers for."""
        answer.is_guest = True
        self.all[answer.sequence.key] = answer
        self.parked[answer.sequence.sequence_id] = answer
        self._promise_growth(answer.sequence)

    def park(self, answer: Answer) -> None:
        """One that runs or is preempted, and is in no step, stands still from now on."""
        sequence_id = answer.sequence.sequence_id
        self.running.pop(sequence_id, None)
        self.preempted.pop(sequence_id, None)
        self._stop_fetching(answer)
        self.parked[sequence_id] = answer

    def unpark(self, answer: Answer) -> None:
        """It goes on where it stopped."""
        sequence_id = answer.sequence.sequence_id
        del self.parked[sequence_id]
        answer.is_guest = False
        if answer.sequence.block_ids:
            self.run(answer)
        else:
            self.preempted[sequence_id] = answer
            self._note_starving()

    def rename(self, answer: Answer, request: GenerateRequest) -> None:
        """The same request under another ownership, with the blocks that it has."""
        sequence = answer.sequence
        old_owner, old_key = sequence.owner, sequence.key
        sequence.request = request
        self._ledger.share(sequence.owner, sequence.block_ids)
        self._ledger.release(old_owner, sequence.block_ids)
        self._room.forget(old_owner)
        self._promise_growth(sequence)
        del self.all[old_key]
        self._over.add(old_key)
        self.all[sequence.key] = answer

    def run(self, answer: Answer) -> None:
        self.running[answer.sequence.sequence_id] = answer
        self._promise_growth(answer.sequence)

    def growth(self, request: GenerateRequest, num_blocks: int) -> int:
        return self._room.growth(request, num_blocks, max_context_tokens=self._engine.max_context_tokens)

    def _promise_growth(self, sequence: Sequence) -> None:
        self._room.promise(sequence.owner, self.growth(sequence.request, len(sequence.block_ids)))

    # --- blocks -----------------------------------------------------------------------------------

    def make_room(self) -> None:
        """Gives every running answer the blocks for its remaining tokens, oldest first, preempting the newest.
        Sequence ids grow with arrival."""
        order = deque(sorted(self.running) if len(self.running) > 1 else self.running)
        if order and _PREEMPTS.fires():
            self._preempt(self.running[order.pop()])
        while order:
            if self.extend(self.running[order[0]].sequence):
                order.popleft()
            else:
                self._preempt(self.running[order.pop()])

    def extend(self, sequence: Sequence, num_spare: int = 0) -> bool:
        """Blocks for all of its tokens, and so many more; False, and nothing changes, where there are not enough."""
        missing = self._layout.blocks_for(len(sequence.token_ids)) + num_spare - len(sequence.block_ids)
        if missing <= 0:
            return True
        blocks = self._ledger.allocate(sequence.owner, missing)
        if blocks is None:
            return False
        sequence.block_ids.extend(blocks)
        self._promise_growth(sequence)
        return True

    def _preempt(self, answer: Answer) -> None:
        sequence = answer.sequence
        del self.running[sequence.sequence_id]
        if self._swaps is not None:
            self._swaps.lose(answer)
        self._release(sequence)
        answer.num_lost, answer.num_named = sequence.num_computed, 0
        sequence.num_computed = 0
        if answer.move is not None:
            self._on_gone(answer, "it was preempted")
        if self._layout.blocks_for(len(sequence.token_ids)) > self._engine.num_blocks:
            message = f"the answer outgrew the {self._engine.num_blocks} KV blocks of {self._own_worker_id}"
            self.fail(answer, "no_capacity", message)
            return
        _PREEMPTED.reached()
        self.preemptions_total += 1
        self.preempted[sequence.sequence_id] = answer
        self._note_starving()

    def resume(self, now_s: float) -> None:
        """Gives preempted answers their blocks again, as far as there are some."""
        while self.preempted:
            sequence_id = min(self.preempted)
            answer = self.preempted[sequence_id]
            if answer.fetch is not None and not (self._swaps is not None and self._swaps.is_late(answer, now_s)):
                # Its own blocks are on their way; the others come after it.
                return
            sequence = answer.sequence
            needed = self._layout.blocks_for(len(sequence.token_ids))
            found, num_held = self._prefixes.find_lost(answer.chain, sequence)
            growth = self.growth(sequence.request, needed)
            demand = Demand(arrival_s=answer.adopted_s, num_blocks=needed - num_held, growth_blocks=growth)
            if not may_resume(demand, self._room.view()):
                return
            if self._swaps is not None and self._swaps.fetch(answer, found, now_s, self._note_starving):
                self._note_starving()
                return
            self.take_again(answer, found)
            _RESUMED.reached()
            self.recomputed_tokens_total += max(0, answer.num_lost - sequence.num_computed)
            del self.preempted[sequence_id]
            self._note_starving()
            self.run(answer)

    def _note_starving(self) -> None:
        """One whose blocks are on their way does not keep others from any: its fetch could have none either."""
        self._room.starving = any(answer.fetch is None for answer in self.preempted.values())

    def _stop_fetching(self, answer: Answer) -> None:
        if self._swaps is not None:
            self._swaps.leave(answer)
        self._note_starving()

    def take_again(self, answer: Answer, found: list[BlockId]) -> None:
        """All blocks for one without any: those that were just found, and others, which there must be."""
        sequence = answer.sequence
        needed = self._layout.blocks_for(len(sequence.token_ids))
        # Shared first, lest they be evicted for the others.
        self._prefixes.share_again(answer.chain, sequence, found)
        blocks = self._ledger.allocate(sequence.owner, needed - len(found))
        assert blocks is not None, (self._ledger, needed, len(found))
        sequence.block_ids += blocks
        answer.num_named = len(found)

    # --- ends -------------------------------------------------------------------------------------

    def fail(self, answer: Answer, code: str, message: str) -> None:
        """Ends it, and tells its gateway."""
        sequence = answer.sequence
        self._emit(sequence.request, failure(sequence.request, sequence.output_count, code, message))
        self.drop(answer, message)

    def drop(self, answer: Answer, reason: str = "it has ended") -> None:
        """Ends it on this side; its blocks are released after the step that writes them."""
        if answer.in_step:
            _DROPPED_IN_STEP.reached()
            answer.doomed = True
            return
        sequence = answer.sequence
        self._release(sequence)
        self.all.pop(sequence.key, None)
        if not answer.is_guest:
            # Who was a guest may come again.
            self._over.add(sequence.key)
        for book in (self.running, self.preempted, self.parked):
            book.pop(sequence.sequence_id, None)
        self._stop_fetching(answer)
        if answer.move is not None:
            self._on_gone(answer, reason)
        self._on_blocks_freed()

    def _release(self, sequence: Sequence) -> None:
        self._room.forget(sequence.owner)
        if sequence.block_ids:
            self._ledger.release(sequence.owner, sequence.block_ids)
            sequence.block_ids = []
