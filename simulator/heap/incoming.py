"""Offers and pulls of a worker in a study: the order of things as in `decode.incoming` and `kvtransfer.reader`, the
decisions the policies'.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING

from decode.admission import OfferVerdict, admit, retry_after_s
from engine.room import Demand
from simulator.heap.request import AnswerStage
from worker.shell import WorkerLimits

if TYPE_CHECKING:
    from simulator.heap.context import Context
    from simulator.heap.request import Request
    from simulator.heap.worker import Worker

#: Of a worker as it is started without further ado.
_LIVE_LIMITS = WorkerLimits()


class Incoming:
    def __init__(self, context: Context, worker: Worker) -> None:
        self._heap = context.heap
        self._wires = context.wires
        self._message_s = context.spec.message_s
        self._worker = worker
        #: Offered and not adopted: how many, and their prompts' tokens.
        self.num_open = 0
        self.num_tokens = 0
        #: Of these, those whose prompts have been read whole.
        self.num_sealed = 0
        self.sealed_tokens = 0
        #: Blocks that are set aside for them.
        self.reserved_blocks = 0
        #: Offers without blocks, oldest first, and some that were given up; of the others: how many.
        self._offers: deque[Request] = deque()
        self._num_offers = 0

    @property
    def num_waiting(self) -> int:
        """Offers without blocks."""
        return self._num_offers

    @property
    def waiting_blocks(self) -> int:
        """What these would take."""
        waiting = (request for request in self._offers if request.answer_stage is AnswerStage.OFFERED)
        return sum(request.num_blocks for request in waiting)

    def offered(self, request: Request) -> None:
        """An offer arrives, for the first time or again after a refusal."""
        if request.over:
            self._heap.overtaken()
            return
        worker, now_s = self._worker, self._heap.now_s
        worker.sync()
        demand = request.answer_demand
        if demand is None:
            growth_blocks = worker.growth_blocks_of(request, request.num_blocks)
            demand = Demand(arrival_s=now_s, num_blocks=request.num_blocks, growth_blocks=growth_blocks)
        if self._num_offers >= _LIVE_LIMITS.max_waiting_offers:
            waited_s = now_s - demand_of(self._first_offer()).arrival_s
            pause_s = retry_after_s(waited_s, _LIVE_LIMITS.lease_ttl_s)
            self._heap.after(2 * self._message_s + pause_s, self.offered, request)
            return
        request.answer_demand = demand
        request.answer_stage = AnswerStage.OFFERED
        self.num_open += 1
        self.num_tokens += request.prompt_tokens
        self._offers.append(request)
        self._num_offers += 1
        self.serve()

    def _first_offer(self) -> Request:
        """The offer that has waited longest; there must be one."""
        while self._offers[0].answer_stage is not AnswerStage.OFFERED:
            self._offers.popleft()
        return self._offers[0]

    def serve(self) -> None:
        """Reserves blocks for waiting offers in the order of arrival, as far as the policy lets it. The worker's
        blocks must be up to date."""
        worker = self._worker
        room = worker.room
        served = False
        room.offer = None
        while self._num_offers:
            request = self._first_offer()
            demand = room.offer = demand_of(request)
            if admit(demand, room.view()) is not OfferVerdict.RESERVE:
                break
            room.offer = None
            self._offers.popleft()
            self._num_offers -= 1
            worker.take_blocks(request.num_blocks)
            self.reserved_blocks += request.num_blocks
            request.answer_stage = AnswerStage.PULLING
            room.promise(request.row, demand.growth_blocks)
            self._drive(request)
            served = True
        if served:
            worker.refit()

    def announced(self, news: tuple[Request, int, bool]) -> None:
        """A Progress call arrives: these blocks are final, and whether they are all."""
        request, num_blocks, sealed = news
        if request.over:
            self._heap.overtaken()
            return
        request.announced_blocks = num_blocks
        if sealed and not request.sealed:
            request.sealed = True
            self._count_sealed(request, 1)
        if request.answer_stage is AnswerStage.PULLING:
            self._drive(request)

    def _drive(self, request: Request) -> None:
        """Pulls what is announced, one pull at a time; confirms once everything is here."""
        if request.flow is not None:
            return
        if request.pulled_blocks < request.announced_blocks:
            holder = request.prefill
            assert holder is not None, "placed before it was sent"
            request.flow = self._wires.pull(
                holder.interface,
                self._worker.interface,
                request,
                request.announced_blocks - request.pulled_blocks,
                self._pulled,
            )
        elif request.sealed:
            self._heap.after(2 * self._message_s, self._confirmed, request)

    def _pulled(self, request: Request, num_blocks: int) -> None:
        if request.flow is not None:
            request.transfer_s += self._heap.now_s - request.flow.started_s
        request.flow = None
        request.pulled_blocks += num_blocks
        if request.over:
            # Until now its blocks were quarantined.
            self.reserved_blocks -= request.num_blocks
            self._worker.sync()
            self._worker.free_blocks(request.num_blocks)
            self._blocks_may_be_free()
            return
        self._drive(request)

    def _confirmed(self, request: Request) -> None:
        """The lease still stood after the last byte: the answer goes on here."""
        if request.over:
            self._heap.overtaken()
            return
        worker = self._worker
        worker.sync()
        self.num_open -= 1
        self.num_tokens -= request.prompt_tokens
        self.reserved_blocks -= request.num_blocks
        self._count_sealed(request, -1)
        worker.answers.adopt(request)
        worker.wake()
        assert request.prefill is not None, "placed before it was sent"
        self._heap.after(self._message_s, request.prefill.prompts.acknowledged, request)

    def give_up(self, request: Request) -> None:
        """The request is over: forgets its offer, its blocks only after the pull that writes them."""
        waits = request.answer_stage is AnswerStage.OFFERED
        request.answer_stage = AnswerStage.ABSENT
        self.num_open -= 1
        self.num_tokens -= request.prompt_tokens
        if request.sealed:
            self._count_sealed(request, -1)
        self._worker.room.forget(request.row)
        if waits:
            self._num_offers -= 1
        elif request.flow is None:
            self.reserved_blocks -= request.num_blocks
            self._worker.free_blocks(request.num_blocks)
        # What it was promised is free in any case.
        self._blocks_may_be_free()

    def _count_sealed(self, request: Request, sign: int) -> None:
        self.num_sealed += sign
        self.sealed_tokens += sign * request.prompt_tokens

    def _blocks_may_be_free(self) -> None:
        self.serve()
        self._worker.wake()


def demand_of(request: Request) -> Demand:
    """What it asks of its decode worker."""
    assert request.answer_demand is not None, "made when it came there"
    return request.answer_demand
