"""The prefill side of a worker in a study: the order of things as in `prefill.queue`, the decisions its policies'."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

from contracts.ids import WorkerId
from contracts.latency import StepWork
from engine.compose import Candidate
from engine.room import Demand
from prefill.admission import Handoffs, PromptVerdict, admit, handoffs_full, queue_full, reads_enough, retry_after_s
from prefill.waiting import WaitingQueue
from simulator.heap.fetches import Fetches
from simulator.heap.request import PromptStage
from simulator.heap.results import Outcome

if TYPE_CHECKING:
    from simulator.heap.context import Context
    from simulator.heap.request import Request
    from simulator.heap.spec import WorkerGroup
    from simulator.heap.worker import Worker


class Prompts:
    def __init__(self, context: Context, worker: Worker, group: WorkerGroup) -> None:
        self._context = context
        self._heap = context.heap
        self._message_s = context.spec.message_s
        self._layout = context.layout
        self._block_tokens = context.layout.block_tokens
        self._worker = worker
        self._limits = group.prefill
        self._overlap = context.spec.overlap
        self._budget_blocks = group.prefill.handoff_blocks(group.num_blocks)
        self._hash_block_tokens = context.hash_block_tokens
        self._fetches = Fetches(context, worker, self._enqueue)
        self._latency = group.latency
        #: Prompts without blocks.
        self._waiting: WaitingQueue[Request] = WaitingQueue(group.prefill.queue)
        #: Of these, and of those that wait for their prefix: what they hold, computed or not.
        self._waiting_tokens = 0
        #: With blocks and without a first token, by sequence id.
        self.running: dict[int, Request] = {}
        #: Of these: tokens that are not part of a step yet; no more are admitted ahead than fill a step.
        self._unread_tokens = 0
        self._ahead_tokens = group.budget.max_tokens
        #: Prompts that got blocks so far.
        self._num_admitted = 0
        #: Prompt tokens to be computed, waiting ones included, and the query-key pairs of their attention.
        self.pending_tokens = 0
        self.pending_pairs = 0
        self.cached_tokens = 0
        #: Prompts that are not read whole, by the other worker that will write their answers.
        self._unread_for: Counter[str] = Counter()
        #: The same as a report has it; None: it changed since.
        self._told_unread_for: tuple[tuple[WorkerId, int], ...] | None = None
        #: Sealed and not taken.
        self._untaken_count = 0
        self._untaken_blocks = 0

    @property
    def num_waiting(self) -> int:
        """Without blocks, or without their prefix."""
        return len(self._waiting) + self._fetches.num_open

    @property
    def num_unread(self) -> int:
        """That nobody has begun to read, and that could be read elsewhere."""
        return len(self._waiting)

    @property
    def waiting_blocks(self) -> int:
        """What all those would take."""
        return -(-self._waiting_tokens // self._block_tokens)

    def next_demand(self) -> Demand | None:
        """Of the prompt whose turn it is; None where nobody waits, or where there is enough to be read."""
        if not self._waiting or self._reads_enough():
            return None
        return self._waiting.first(self._heap.now_s).prompt_demand

    @property
    def num_open(self) -> int:
        """Waiting or being read."""
        return self.num_waiting + len(self.running)

    @property
    def num_own(self) -> int:
        """Of these, whose answers are written here."""
        return sum(not request.hands_over for request in (*self.waiting(), *self.running.values()))

    @property
    def untaken_blocks(self) -> int:
        """Of prompts that were read whole and that their readers have not taken."""
        return self._untaken_blocks

    @property
    def fetched_blocks(self) -> int:
        """KV blocks that came from other workers' caches."""
        return self._fetches.num_blocks

    # --- requests ---------------------------------------------------------------------------------

    def submit(self, request: Request) -> None:
        """The Prefill call arrives."""
        if request.over:
            self._heap.overtaken()
            return
        problem = queue_full(
            self._limits,
            self._layout,
            num_blocks=self._worker.num_blocks,
            waiting=self.num_waiting,
            waiting_tokens=self._waiting_tokens,
            num_tokens=request.prompt_tokens,
        )
        now_s = self._heap.now_s
        if problem is not None:
            waited_s = now_s - self._waiting.oldest().received_s if self._waiting else 0.0
            self._context.on_refused(request, retry_after_s(waited_s))
            return
        request.num_blocks = -(-request.prompt_tokens // self._block_tokens)
        request.hands_over = self._hands_over(request)
        if not request.num_moves:
            # Who changes lines keeps its place in time.
            request.received_s = now_s
        request.sequence_id = self._worker.next_sequence_id()
        growth_blocks = 0
        if not request.hands_over:
            growth_blocks = self._worker.growth_blocks_of(request, request.num_blocks)
        request.prompt_demand = Demand(arrival_s=now_s, num_blocks=request.num_blocks, growth_blocks=growth_blocks)
        self._waiting_tokens += request.prompt_tokens
        request.counted_tokens = 0
        self.pending_tokens += request.prompt_tokens
        self.pending_pairs += _pairs(0, request.prompt_tokens)
        self._note_unread(request, 1)
        if self._fetches.begin(request):
            self._count(request, self._reusable(request, request.fetch_hash_blocks))
        else:
            self._enqueue(request)

    def _enqueue(self, request: Request) -> None:
        """It waits for blocks from now on."""
        request.prompt_stage = PromptStage.WAITING
        self._keep_if_large(request)
        self._count(request, self._cached(request))
        num_left = request.prompt_tokens - request.counted_tokens
        read_s = 0.0
        if request.due_s is not None:
            pairs = _pairs(request.counted_tokens, request.prompt_tokens)
            read_s = self._latency.step_s(StepWork(num_left, pairs, num_chunks=1))
        waiting = self._waiting
        waiting.add(
            request,
            tokens=num_left,
            received_s=request.received_s,
            tenant=request.tenant,
            due_s=request.due_s,
            read_s=read_s,
            priority=request.priority,
        )
        if waiting.first(self._heap.now_s) is request:
            # Behind others it changes nothing.
            self.note_head()
            self._worker.wake()

    def _cached(self, request: Request) -> int:
        """Leading tokens that need not be computed, for their KV is here."""
        cache = self._worker.prefix_cache
        return 0 if cache is None else self._reusable(request, cache.leading(request.hash_ids))

    def _reusable(self, request: Request, hash_blocks: int) -> int:
        """Of a prefix of so many blocks: whole KV blocks, and never the last token, which gives the answer's first."""
        most = (request.prompt_tokens - 1) // self._block_tokens * self._block_tokens
        return min(most, hash_blocks * self._hash_block_tokens)

    def _count(self, request: Request, num_tokens: int) -> None:
        """From now on all but so many of its leading tokens are pending."""
        self.pending_tokens -= num_tokens - request.counted_tokens
        self.pending_pairs -= _pairs(0, num_tokens) - _pairs(0, request.counted_tokens)
        if num_tokens == request.prompt_tokens > request.counted_tokens:
            self._note_unread(request, -1)
        request.counted_tokens = num_tokens

    def _note_unread(self, request: Request, change: int) -> None:
        writer = _reader_of(request)
        if writer is not self._worker:
            self._unread_for[writer.worker_id] += change
            self._told_unread_for = None

    def unread_for(self) -> tuple[tuple[WorkerId, int], ...]:
        """As a live worker reports it. The same object until it changes."""
        if self._told_unread_for is None:
            unread = [(WorkerId(name), count) for name, count in self._unread_for.items() if count]
            self._told_unread_for = tuple(sorted(unread))
        return self._told_unread_for

    def _hands_over(self, request: Request) -> bool:
        if request.decode is self._worker or request.output_tokens == 1:
            return False
        return not (self._worker.writes and request.num_blocks > self._budget_blocks)

    def role_changed(self) -> None:
        """As `PrefillQueue.set_also_writes`: what is open goes on."""
        for request in self.waiting():
            self._keep_if_large(request)
        self._worker.room.prompt = None
        self.note_head()

    def _keep_if_large(self, request: Request) -> None:
        """Of one without blocks that was to be handed over: a worker that writes too keeps what is larger than the
        whole budget, also where it only read when the prompt came."""
        if request.hands_over and not self._hands_over(request):
            assert request.prompt_demand is not None, "made with its place in the queue"
            growth_blocks = self._worker.growth_blocks_of(request, request.num_blocks)
            request.hands_over = False
            request.prompt_demand = replace(request.prompt_demand, growth_blocks=growth_blocks)

    def give_up(self, request: Request) -> None:
        """The request is over: forgets it, after the steps that write its blocks."""
        match request.prompt_stage:
            case PromptStage.FETCHING:
                self._fetches.give_up(request)
                self._waiting_tokens -= request.prompt_tokens
                self._count(request, request.prompt_tokens)
            case PromptStage.WAITING:
                self.take_away(request)
            case PromptStage.READING if not request.num_steps_in_flight:
                self._drop(request)
            case PromptStage.SEALED:
                self._taken(request)
            case _:
                # Not here, or in a step, whose end sees that it is over.
                pass

    def waiting(self) -> list[Request]:
        """Those without blocks, in the order of their turns."""
        return self._waiting.upcoming(len(self._waiting), self._heap.now_s)

    def take_away(self, request: Request) -> None:
        """It waits elsewhere from now on; nobody has begun to read it."""
        request.prompt_stage = PromptStage.ABSENT
        self._left_queue(request)
        self._count(request, request.prompt_tokens)
        self.note_head()
        self._worker.wake()

    def _left_queue(self, request: Request) -> None:
        self._waiting.discard(request)
        self._waiting_tokens -= request.prompt_tokens

    # --- steps ------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Gives blocks to the prompts whose turn it is, as far as the policy lets it."""
        waiting, worker = self._waiting, self._worker
        if not waiting:
            return
        noted, admitted, now_s = worker.room.prompt, False, self._heap.now_s
        while waiting and not self._reads_enough():
            request = waiting.first(now_s)
            assert request.prompt_demand is not None, "made with its place in the queue"
            verdict = admit(request.prompt_demand, worker.room.view(), self._handoffs(request))
            if verdict is not PromptVerdict.ADMIT:
                break
            self._left_queue(request)
            self._take_blocks(request)
            waiting.charge(request.tenant, request.prompt_tokens - request.cached_tokens)
            admitted = True
        self.note_head()
        if not admitted and noted is not None and worker.room.prompt != noted:
            # The head turned out to be late: an offer that waited behind it may be next.
            worker.incoming.serve()

    def _reads_enough(self) -> bool:
        return reads_enough(self._unread_tokens, self._ahead_tokens)

    def _take_blocks(self, request: Request) -> None:
        worker = self._worker
        worker.take_blocks(request.num_blocks)
        request.prompt_stage = PromptStage.READING
        request.held_blocks = request.num_blocks
        self.running[request.sequence_id] = request
        self._reuse(request)
        if request.hands_over:
            worker.room.lend(request.num_blocks)
            reader = _reader_of(request)
            self._heap.after(self._message_s, reader.incoming.offered, request)
        else:
            worker.room.promise(request.row, worker.growth_blocks_of(request, request.num_blocks))

    def _reuse(self, request: Request) -> None:
        """It begins behind what is cached; its reader hears of these blocks with the offer."""
        cached_tokens = request.cached_tokens = request.num_computed = self._cached(request)
        self._count(request, cached_tokens)
        request.announced_blocks = 0
        if cached_tokens:
            self.cached_tokens += cached_tokens
            cache = self._worker.prefix_cache
            assert cache is not None, "nothing is cached nowhere"
            cache.use(request.hash_ids)
            if self._overlap:
                request.announced_blocks = cached_tokens // self._block_tokens
        self._num_admitted += 1
        request.admitted_as = self._num_admitted
        request.candidate = Candidate(
            sequence_id=request.sequence_id,
            num_tokens=request.prompt_tokens - cached_tokens,
            arrival=request.admitted_as,
            num_computed=cached_tokens,
        )
        self._unread_tokens += request.candidate.num_tokens

    def _handoffs(self, request: Request) -> Handoffs | None:
        if not request.hands_over:
            return None
        return Handoffs(
            untaken_blocks=self._untaken_blocks,
            untaken_count=self._untaken_count,
            budget_blocks=self._budget_blocks,
            max_count=self._limits.max_handoffs,
            is_shared=self._worker.writes,
        )

    def note_head(self) -> None:
        """Tells the decode side which prompt waits for blocks; a worker that only reads has none."""
        if not self._worker.writes:
            return
        room = self._worker.room
        room.prompt = None
        if not self._waiting or self._reads_enough():
            return
        request = self._waiting.first(self._heap.now_s)
        demand, handoffs = request.prompt_demand, self._handoffs(request)
        assert demand is not None, "made with its place in the queue"
        if handoffs is None or not handoffs_full(demand, handoffs, room.lent_blocks):
            room.prompt = demand

    def candidates(self) -> list[Candidate]:
        return [request.candidate for request in self.running.values() if request.candidate is not None]

    def build(self, sequence_id: int, num_tokens: int, start_s: float) -> tuple[Request, int]:
        """Puts that many more tokens into a step; the request, and how many came before."""
        request = self.running[sequence_id]
        candidate = request.candidate
        assert candidate is not None, "granted without being a candidate"
        if not candidate.started:
            request.started_s = start_s
        remaining = candidate.num_tokens - num_tokens
        num_before = request.prompt_tokens - candidate.num_tokens
        request.candidate = None
        if remaining:
            request.candidate = Candidate(
                sequence_id=sequence_id,
                num_tokens=remaining,
                arrival=request.admitted_as,
                started=True,
                num_computed=num_before + num_tokens,
            )
        self._unread_tokens -= num_tokens
        request.num_steps_in_flight += 1
        return request, num_before

    def apply(self, request: Request, num_tokens: int) -> None:
        """A step with a chunk of it has ended."""
        request.num_steps_in_flight -= 1
        before = request.num_computed
        request.num_computed += num_tokens
        self._count(request, request.num_computed)
        if request.hash_ids:
            self._keep(request, before)
        if request.over:
            if not request.num_steps_in_flight:
                self._drop(request)
        elif request.num_computed == request.prompt_tokens:
            self._first_token(request)
        elif request.hands_over and self._overlap:
            self._announce(request, request.num_computed // self._block_tokens, sealed=False)

    def _keep(self, request: Request, before: int) -> None:
        """What was computed beyond `before` tokens enters the cache."""
        cache = self._worker.prefix_cache
        if cache is None:
            return
        first, last = before // self._hash_block_tokens, request.num_computed // self._hash_block_tokens
        if last > first:
            cache.put(request.hash_ids[first:last])
        if request.num_computed == request.prompt_tokens:
            cache.use(request.hash_ids)

    def _announce(self, request: Request, num_blocks: int, *, sealed: bool) -> None:
        reader = _reader_of(request)
        self._heap.after(self._message_s, reader.incoming.announced, (request, num_blocks, sealed))

    def _first_token(self, request: Request) -> None:
        now_s = self._heap.now_s
        request.num_written = 1
        request.last_token_s = now_s
        request.first_token_s = now_s + self._message_s
        self._context.on_first_token(request)
        if request.hash_ids:
            self._context.on_read(request, self._worker)
        if request.output_tokens == 1:
            request.finished_s = request.first_token_s
            self._worker.tallies.add(request)
            self._drop(request)
            self._context.on_end(request, Outcome.FINISHED)
        elif request.hands_over:
            del self.running[request.sequence_id]
            request.prompt_stage = PromptStage.SEALED
            self._untaken_count += 1
            self._untaken_blocks += request.num_blocks
            self._announce(request, request.num_blocks, sealed=True)
        else:
            del self.running[request.sequence_id]
            request.prompt_stage = PromptStage.ABSENT
            self._worker.answers.take_over(request)

    # --- ends -------------------------------------------------------------------------------------

    def acknowledged(self, request: Request) -> None:
        """The reader has adopted the KV."""
        if request.prompt_stage is not PromptStage.SEALED:
            self._heap.overtaken()
            return
        self._taken(request)

    def _taken(self, request: Request) -> None:
        """Nobody reads the sealed blocks any more."""
        request.prompt_stage = PromptStage.ABSENT
        self._untaken_count -= 1
        self._untaken_blocks -= request.num_blocks
        self._free(request)

    def _drop(self, request: Request) -> None:
        """Ends it on this side; no step writes its blocks."""
        del self.running[request.sequence_id]
        self._count(request, request.prompt_tokens)
        if request.candidate is not None:
            self._unread_tokens -= request.candidate.num_tokens
            request.candidate = None
        request.prompt_stage = PromptStage.ABSENT
        self._free(request)

    def _free(self, request: Request) -> None:
        worker = self._worker
        worker.sync()
        if request.hands_over:
            worker.room.take_back(request.num_blocks)
        else:
            worker.room.forget(request.row)
        worker.freed(request.num_blocks)


def _pairs(num_cached: int, num_tokens: int) -> int:
    """Query-key pairs of the tokens of a prompt behind the first `num_cached`."""
    return (num_tokens * (num_tokens + 1) - num_cached * (num_cached + 1)) // 2


def _reader_of(request: Request) -> Worker:
    assert request.decode is not None, "placed before it was sent"
    return request.decode
