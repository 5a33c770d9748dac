"""How loaded a worker in a study is: as it tells the coordinator, and as time lines show it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from contracts.latency import StepWork
from contracts.messages import AnswerTally, WorkerLoad

if TYPE_CHECKING:
    from simulator.heap.request import Request
    from simulator.heap.worker import Worker


class Tallies:
    """Answers that ended at a worker."""

    def __init__(self) -> None:
        #: By `prompt_tokens.bit_length()`; made anew with each, so that reports can keep it.
        self.by_size: tuple[AnswerTally, ...] = ()
        self._without_work: WorkerLoad | None = None

    def add(self, request: Request) -> None:
        """Its answer was written to its end."""
        size = request.prompt_tokens.bit_length()
        tallies = [*self.by_size, *(AnswerTally(0, 0) for _ in range(size + 1 - len(self.by_size)))]
        answers, output_tokens = tallies[size].answers, tallies[size].output_tokens
        tallies[size] = AnswerTally(answers + 1, output_tokens + request.output_tokens)
        self.by_size = tuple(tallies)
        self._without_work = None

    def without_work(self, num_blocks: int) -> WorkerLoad:
        """What a worker with so many blocks, all of them free, reports while these are its answers."""
        if self._without_work is None:
            self._without_work = WorkerLoad(answers=self.by_size, free_blocks=num_blocks)
        return self._without_work


def load_of(worker: Worker) -> WorkerLoad:
    """As a live worker reports it, as far as policies look at it. Of a worker without work the same object, until an
    answer ends there."""
    prompts, answers, incoming = worker.prompts, worker.answers, worker.incoming
    # Most workers have one role: what belongs to the other need not be asked.
    num_waiting, num_reading, num_running, num_preempted, context_tokens = 0, 0, 0, 0, 0
    if worker.reads:
        num_waiting, num_reading = prompts.num_waiting, len(prompts.running)
    if worker.writes:
        num_running, num_preempted = answers.num_running, answers.num_preempted
        num_waiting += incoming.num_open + num_preempted
    is_idle = worker.available_blocks == worker.num_blocks and not num_waiting
    if is_idle and not (worker.is_draining or worker.moving_out or worker.moving_in):
        return worker.tallies.without_work(worker.num_blocks)
    worker.sync()
    if worker.writes:
        context_tokens = answers.context_tokens(worker.steps_ahead()) + incoming.num_tokens
    load = WorkerLoad(
        waiting_requests=num_waiting,
        waiting_offers=incoming.num_waiting,
        pending_prompt_tokens=prompts.pending_tokens,
        pending_prompt_pairs=float(prompts.pending_pairs),
        unread_for=prompts.unread_for(),
        running_requests=num_reading + num_running,
        running_decodes=num_running + num_preempted + incoming.num_sealed,
        context_tokens=context_tokens,
        unread_tokens=incoming.num_tokens - incoming.sealed_tokens,
        answers=worker.tallies.by_size,
        free_blocks=worker.available_blocks,
        offered_blocks=prompts.untaken_blocks,
        reserved_blocks=incoming.reserved_blocks,
        step_age_s=worker.step_age_s(),
    )
    return _with_moves(load, worker) if worker.tells_moves else load


def _with_moves(load: WorkerLoad, worker: Worker) -> WorkerLoad:
    """And what moves are decided by."""
    prompts, answers = worker.prompts, worker.answers
    head = worker.head_demand_blocks()
    return msgspec.structs.replace(
        load,
        draining=worker.is_draining,
        open_requests=prompts.num_open
        + worker.incoming.num_open
        + answers.num_running
        + answers.num_preempted
        + worker.moving_out
        + worker.moving_in,
        waiting_prompts=prompts.num_unread,
        head_demand_blocks=head,
        queued_demand_blocks=max(
            head, prompts.waiting_blocks + worker.incoming.waiting_blocks + answers.preempted_blocks()
        ),
        priorities=answers.priorities() if worker.writes else (),
        preempted_answers=answers.num_preempted,
        moving_out=worker.moving_out,
        moving_in=worker.moving_in,
        reserved_blocks=load.reserved_blocks + worker.arriving_blocks,
    )


def queue_s(worker: Worker) -> float:
    """What the prompts that are here take from now on, in whole steps of the budget."""
    tokens, pairs = worker.prompts.pending_tokens, worker.prompts.pending_pairs
    if not tokens:
        return 0.0
    num_steps = max(1.0, tokens / worker.max_batch_tokens)
    share = StepWork(prefill_tokens=round(tokens / num_steps), prefill_pairs=pairs / num_steps, num_chunks=1)
    return num_steps * (worker.latency.step_s(share) + worker.gap_s)


def tpot_s(worker: Worker) -> float:
    """From one token of its answers to the next, as they are now; 0 without answers."""
    num_decodes = worker.answers.num_running
    if not num_decodes:
        return 0.0
    base_s, per_token_s = worker.latency.decode_terms(num_decodes)
    return base_s + per_token_s * worker.answers.context_tokens(worker.steps_ahead()) + worker.gap_s
