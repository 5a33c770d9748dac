"""Arrivals, placements, refusals and time-outs: what a gateway does."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

from contracts.errors import ERROR_BY_CODE, NoCapacity
from contracts.ids import WorkerId
from gateway.limits import GatewayLimits
from gateway.replay import Failure, Retry, Stage, decide
from simulator.heap.prefix_cache import hints_of
from simulator.heap.request import NEW, Request
from simulator.heap.results import Outcome

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.messages import Role
    from coordinator.decision import Refused
    from simulator.heap.context import Context
    from simulator.heap.worker import Worker
    from workload.request import WorkloadRequest


class Gateway:
    def __init__(
        self, context: Context, place: Callable[[Request], Refused | None], requests: Iterator[WorkloadRequest]
    ) -> None:
        """`place` asks the coordinator."""
        spec = context.spec
        self._context = context
        self._heap = context.heap
        self._spec = spec
        self._ask = place
        self._requests = requests
        self._limits = GatewayLimits()
        self._targets = {slo.name: slo for slo in spec.slos}
        self._default_target = None if spec.default_slo is None else self._targets[spec.default_slo]
        self._to_coordinator_s = spec.gateway_s + spec.message_s
        self._exhausted = False
        self._last_arrival_s = 0.0
        self._num_open = 0
        #: By deadline, all that are not over and some that are.
        self._deadlines: deque[Request] = deque()
        self._deadline_set = False
        self.num_ended = 0
        #: When the last request ended.
        self.end_s = 0.0

    @property
    def done(self) -> bool:
        """Every request has come and ended."""
        return self._exhausted and not self._num_open

    def start(self) -> None:
        self._await_next()

    def names(self, worker: Worker, role: Role | None = None) -> bool:
        """A request that is not over will be read or written there, as far as is known; with `role`, what a worker of
        that role does not do."""
        return any(
            (role != "decode" and request.decode is worker)
            or (role != "prefill" and request.prefill is worker and math.isnan(request.first_token_s))
            for request in self._deadlines
            if not request.over
        )

    # --- arrivals and placements ------------------------------------------------------------------

    def _await_next(self) -> None:
        """The next of the workload, as it will reach the coordinator."""
        item = next(self._requests, None)
        if item is None:
            self._exhausted = True
            return
        request = self._request(item)
        self._num_open += 1
        self._heap.at(item.arrival_s + self._to_coordinator_s, self._arrive, request)

    def _request(self, item: WorkloadRequest) -> Request:
        arrival_s = item.arrival_s
        if not arrival_s >= self._last_arrival_s:
            raise ValueError(
                f"requests must be in order of arrival: one at {arrival_s} s follows one at {self._last_arrival_s} s"
            )
        if not math.isfinite(arrival_s):
            raise ValueError(f"a request arrives at {arrival_s} s: {item}")
        if item.prompt_tokens < 1 or item.output_tokens < 1:
            raise ValueError(f"a request needs prompt and output tokens: {item}")
        self._last_arrival_s = arrival_s
        room_tokens = max(1, self._spec.max_context_tokens - item.prompt_tokens)
        output_tokens = min(item.output_tokens, room_tokens)
        row = self._context.recorder.add(arrival_s, item.prompt_tokens, output_tokens, item.slo_class)
        request = Request(row, arrival_s, item.prompt_tokens, output_tokens, arrival_s + self._spec.request_timeout_s)
        request.slo_class, request.tenant, request.priority = item.slo_class, item.tenant, item.priority
        target = self._targets.get(item.slo_class, self._default_target)
        if target is not None:
            request.due_s = arrival_s + target.ttft_ms / 1e3
            request.tpot_target_s = target.tpot_ms / 1e3
        if item.hash_ids:
            request.hash_ids = self._full_blocks(item)
            request.block_keys = hints_of(request.hash_ids).astype("<u8", copy=False).tobytes()
        request.was_accepted = row in self._spec.forced
        return request

    def _full_blocks(self, item: WorkloadRequest) -> tuple[int, ...]:
        block_tokens = self._context.hash_block_tokens
        if item.hash_block_tokens != block_tokens:
            raise ValueError(
                f"hash ids of blocks of {item.hash_block_tokens} and of {block_tokens} tokens do not mix: {item}"
            )
        return item.hash_ids[: item.prompt_tokens // block_tokens]

    def _arrive(self, request: Request) -> None:
        self._await_next()
        deadlines = self._deadlines
        # Else a million that are over would wait for theirs.
        while deadlines and deadlines[0].over:
            deadlines.popleft()
        deadlines.append(request)
        if not self._deadline_set:
            self._watch_deadline()
        self._place(request)

    def _place(self, request: Request) -> None:
        if request.over:
            self._heap.overtaken()
            return
        refused = self._ask(request)
        if refused is not None:
            request.refused_why = refused.why
            error = ERROR_BY_CODE[refused.code](refused.why, retry_after_s=refused.retry_after_s)
            self._fail(request, Failure(Stage.REJECTED, error))
            return
        prefill = request.prefill
        assert prefill is not None, "just placed"
        if request.refusal is not None and request.refusal[0] is prefill:
            # It has just said no, and there is nobody else: it is not asked again.
            request.prefill = request.decode = None
            self._fail(request, Failure(Stage.REJECTED, request.refusal[1]))
            return
        self._heap.at(self._heap.now_s + 2 * self._spec.message_s, prefill.prompts.submit, request)

    # --- ends -------------------------------------------------------------------------------------

    def refuse(self, request: Request, retry_after_s: float) -> None:
        """Its prefill worker has no room for it, and says when it may come again."""
        worker = request.prefill
        assert worker is not None, "placed before it was sent"
        request.prefill = request.decode = None
        request.refused_why = "queue"
        error = NoCapacity(f"the queue of {worker.worker_id} is full", retry_after_s=retry_after_s)
        request.refusal = worker, error
        request.history = request.history.placed()
        self._fail(request, Failure(Stage.REFUSED, error, (WorkerId(worker.worker_id),)))

    def _fail(self, request: Request, failure: Failure) -> None:
        """Its gateway will hear of it in a moment; what it does then is the production policy's to say."""
        message_s = self._spec.message_s
        verdict = decide(request.history, failure, self._heap.now_s + message_s, self._limits)
        if isinstance(verdict, Retry):
            request.history = verdict.history
            self._heap.after(message_s + verdict.delay_s + message_s, self._place, request)
            return
        self._turn_away(request, verdict.error.retry_after_s)

    def _turn_away(self, request: Request, retry_after_s: float | None) -> None:
        """The client hears no, and comes again after that time, if it may; 0 or None: never."""
        request.num_refusals += 1
        if request.num_refusals > self._spec.max_retries or not retry_after_s:
            self.end(request, Outcome.REJECTED)
            return
        request.history, request.refusal = NEW, None
        self._heap.after(self._spec.message_s + retry_after_s + self._to_coordinator_s, self._place, request)

    def end(self, request: Request, outcome: Outcome) -> None:
        """Once for each request."""
        request.over = True
        self._num_open -= 1
        self.num_ended += 1
        self.end_s = self._heap.now_s
        self._context.recorder.end(request, outcome)

    def _watch_deadline(self) -> None:
        """There is at most one timer, for the request that is given up next."""
        deadlines = self._deadlines
        while deadlines and deadlines[0].over:
            deadlines.popleft()
        self._deadline_set = bool(deadlines)
        if deadlines:
            self._heap.at(deadlines[0].deadline_s, self._deadline_passes, None)

    def _deadline_passes(self, _: None) -> None:
        now_s = self._heap.now_s
        deadlines = self._deadlines
        num_late = 0
        while deadlines and (deadlines[0].over or deadlines[0].deadline_s <= now_s):
            request = deadlines.popleft()
            if not request.over:
                self._give_up(request)
                num_late += 1
        if not num_late:
            self._heap.overtaken()
        self._watch_deadline()

    def _give_up(self, request: Request) -> None:
        """Its workers hear of it at once."""
        prefill, decode = request.prefill, request.decode
        if prefill is None or decode is None:
            self.end(request, Outcome.TIMED_OUT)
            return
        decode.note_second_token(request)
        self.end(request, Outcome.TIMED_OUT)
        prefill.sync()
        decode.sync()
        prefill.prompts.give_up(request)
        decode.answers.give_up(request)
