"""The prefill side of a worker in a study: the order of things as in `prefill.queue`, the decisions its policies'."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from engine.compose import Candidate
from engine.room import Demand
from prefill.admission import Handoffs, PromptVerdict, admit, handoffs_full, queue_full, retry_after_s
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
        self._also_writes = group.role == "mixed"
        self._overlap = context.spec.overlap
        self._budget_blocks = max(1, int(group.prefill.handoff_share * group.num_blocks))
        #: Prompts without blocks, oldest first, and some that were given up; of the others: how many, their tokens.
        self._waiting: deque[Request] = deque()
        self.num_waiting = 0
        self._waiting_tokens = 0
        #: With blocks and without a first token, by sequence id.
        self.running: dict[int, Request] = {}
        self._running_tokens = 0
        #: Sealed and not taken.
        self._untaken_count = 0
        self._untaken_blocks = 0

    @property
    def num_open(self) -> int:
        """Waiting or being read."""
        return self.num_waiting + len(self.running)

    @property
    def pending_tokens(self) -> int:
        """Prompt tokens not computed yet, waiting ones included."""
        return self._waiting_tokens + self._running_tokens

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
            self._context.on_refused(request, retry_after_s(now_s - self._head().received_s))
            return
        request.num_blocks = -(-request.prompt_tokens // self._block_tokens)
        request.hands_over = self._hands_over(request)
        request.received_s = now_s
        request.sequence_id = self._worker.next_sequence_id()
        growth_blocks = 0
        if not request.hands_over:
            growth_blocks = self._worker.growth_blocks_of(request, request.num_blocks)
        request.prompt_demand = Demand(arrival_s=now_s, num_blocks=request.num_blocks, growth_blocks=growth_blocks)
        request.candidate = Candidate(
            sequence_id=request.sequence_id, num_tokens=request.prompt_tokens, arrival=request.sequence_id
        )
        request.num_computed = 0
        request.prompt_stage = PromptStage.WAITING
        self._waiting.append(request)
        self.num_waiting += 1
        self._waiting_tokens += request.prompt_tokens
        if self.num_waiting == 1:
            # Behind others it changes nothing.
            self._note_head()
            self._worker.wake()

    def _hands_over(self, request: Request) -> bool:
        if request.decode is self._worker or request.output_tokens == 1:
            return False
        return not (self._also_writes and request.num_blocks > self._budget_blocks)

    def give_up(self, request: Request) -> None:
        """The request is over: forgets it, after the steps that write its blocks."""
        match request.prompt_stage:
            case PromptStage.WAITING:
                request.prompt_stage = PromptStage.ABSENT
                self._left_queue(request)
                self._note_head()
                self._worker.wake()
            case PromptStage.READING if not request.num_steps_in_flight:
                self._drop(request)
            case PromptStage.SEALED:
                self._taken(request)
            case _:
                # Not here, or in a step, whose end sees that it is over.
                pass

    def _head(self) -> Request:
        """The oldest that waits; there must be one."""
        while self._waiting[0].prompt_stage is not PromptStage.WAITING:
            self._waiting.popleft()
        return self._waiting[0]

    def _left_queue(self, request: Request) -> None:
        self.num_waiting -= 1
        self._waiting_tokens -= request.prompt_tokens

    # --- steps ------------------------------------------------------------------------------------

    def admit(self) -> None:
        """Gives blocks to the prompts at the head, as far as the policy lets it."""
        worker = self._worker
        admitted = False
        while self.num_waiting:
            request = self._head()
            assert request.prompt_demand is not None, "made with its place in the queue"
            verdict = admit(request.prompt_demand, worker.room.view(), self._handoffs(request))
            if verdict is not PromptVerdict.ADMIT:
                break
            self._waiting.popleft()
            self._left_queue(request)
            self._take_blocks(request)
            admitted = True
        if admitted:
            self._note_head()

    def _take_blocks(self, request: Request) -> None:
        worker = self._worker
        worker.take_blocks(request.num_blocks)
        request.prompt_stage = PromptStage.READING
        request.held_blocks = request.num_blocks
        self.running[request.sequence_id] = request
        self._running_tokens += request.prompt_tokens
        if request.hands_over:
            worker.room.lend(request.num_blocks)
            reader = _reader_of(request)
            self._heap.after(self._message_s, reader.incoming.offered, request)
        else:
            worker.room.promise(request.row, worker.growth_blocks_of(request, request.num_blocks))

    def _handoffs(self, request: Request) -> Handoffs | None:
        if not request.hands_over:
            return None
        return Handoffs(
            untaken_blocks=self._untaken_blocks,
            untaken_count=self._untaken_count,
            budget_blocks=self._budget_blocks,
            max_count=self._limits.max_handoffs,
            is_shared=self._also_writes,
        )

    def _note_head(self) -> None:
        """Tells the decode side which prompt waits for blocks; a worker that only reads has none."""
        if not self._also_writes:
            return
        room = self._worker.room
        room.prompt = None
        if not self.num_waiting:
            return
        request = self._head()
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
        request.candidate = None
        if remaining:
            request.candidate = Candidate(
                sequence_id=sequence_id, num_tokens=remaining, arrival=sequence_id, started=True
            )
        request.num_steps_in_flight += 1
        return request, request.prompt_tokens - candidate.num_tokens

    def apply(self, request: Request, num_tokens: int) -> None:
        """A step with a chunk of it has ended."""
        request.num_steps_in_flight -= 1
        request.num_computed += num_tokens
        self._running_tokens -= num_tokens
        if request.over:
            if not request.num_steps_in_flight:
                self._drop(request)
        elif request.num_computed == request.prompt_tokens:
            self._first_token(request)
        elif request.hands_over and self._overlap:
            self._announce(request, request.num_computed // self._block_tokens, sealed=False)

    def _announce(self, request: Request, num_blocks: int, *, sealed: bool) -> None:
        reader = _reader_of(request)
        self._heap.after(self._message_s, reader.incoming.announced, (request, num_blocks, sealed))

    def _first_token(self, request: Request) -> None:
        now_s = self._heap.now_s
        request.num_written = 1
        request.last_token_s = now_s
        request.first_token_s = now_s + self._message_s
        if request.output_tokens == 1:
            request.finished_s = request.first_token_s
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
        self._running_tokens -= request.prompt_tokens - request.num_computed
        request.prompt_stage = PromptStage.ABSENT
        self._free(request)

    def _free(self, request: Request) -> None:
        worker = self._worker
        worker.sync()
        if request.hands_over:
            worker.room.take_back(request.num_blocks)
        else:
            worker.room.forget(request.row)
        worker.free_blocks(request.num_blocks)
        self._note_head()
        worker.incoming.serve()
        worker.wake()


def _reader_of(request: Request) -> Worker:
    assert request.decode is not None, "placed before it was sent"
    return request.decode
