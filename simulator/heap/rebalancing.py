"""Moves between the workers of a study: looks with the production policy at what workers told last, as live the
coordinator's rebalancer does, and asks sources for what it says."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING

from contracts.requests import counted_priority
from coordinator.membership import Standing
from coordinator.policy.migration_pairs import pair
from coordinator.policy.move_terms import MoveHistory
from coordinator.rebalancer import SETTLED_AFTER_S
from coordinator.usage_rows import NOTHING, Expected, usage_of
from decode.moves.victims import Candidate, Kind, Wanted, begin_some
from simulator.heap.request import AnswerStage, PromptStage

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from contracts.ids import WorkerId
    from coordinator.conductor import Conductor
    from coordinator.policy.move_terms import MovePair, MoveRules
    from simulator.heap.context import Context
    from simulator.heap.moves import Moves
    from simulator.heap.request import Request
    from simulator.heap.worker import Worker


class Rebalancing:
    def __init__(
        self,
        context: Context,
        rules: MoveRules,
        conductor: Conductor,
        workers: Mapping[WorkerId, Worker],
        *,
        is_over: Callable[[], bool],
    ) -> None:
        self._heap = context.heap
        self._moves: Moves = context.moves
        self._spec = context.spec
        self._rules = rules
        self._conductor = conductor
        self._workers = workers
        self._is_over = is_over
        self._history = MoveHistory()
        #: By worker: when it was asked for something that no report of it contains, and what that comes to.
        self._asks: defaultdict[WorkerId, list[tuple[float, Expected]]] = defaultdict(list)

    def start(self) -> None:
        self._heap.after(self._spec.look_interval_s, self._look, None)

    def heard(self, worker_id: WorkerId) -> None:
        """Its report contains what it was asked a while before."""
        if asks := self._asks.get(worker_id):
            settled_s = self._heap.now_s - SETTLED_AFTER_S
            asks[:] = [ask for ask in asks if ask[0] > settled_s]

    def gone(self, worker_id: WorkerId) -> None:
        """It has become another worker."""
        self._history.forget(worker_id)
        self._asks.pop(worker_id, None)

    def _look(self, _: None) -> None:
        if self._is_over():
            self._heap.overtaken()
            return
        workers = self._workers.items()
        away = frozenset(worker_id for worker_id, worker in workers if not worker.is_up)
        closed = frozenset(worker_id for worker_id, worker in workers if worker.is_draining)
        keep_answers = frozenset(worker_id for worker_id, worker in workers if worker.keeps_answers)
        expected = {worker_id: _sum_of(asks) for worker_id, asks in self._asks.items() if asks}
        now_s, standing = self._heap.now_s, Standing(unheard=away)
        view = usage_of(self._conductor, standing, closed, expected, now_s, keep_answers=keep_answers)
        pairing = pair(view, self._rules, self._history, self._heap.now_s)
        self._moves.tallies.not_moved.update(pairing.not_moved)
        for move in pairing.moves:
            self._ask(move, view.worker_ids[move.source], view.worker_ids[move.destination])
        self._heap.after(self._spec.look_interval_s, self._look, None)

    def _ask(self, move: MovePair, source: WorkerId, target: WorkerId) -> None:
        number, now_s = move.max_requests, self._heap.now_s
        self._moves.tallies.asked[move.purpose] += number
        prompts = number if move.are_prompts else 0
        # Prompts that move are nothing that leaves room behind, and no bound counts them.
        moving = number - prompts
        leaving = Expected(moving_out=moving, prompts=-prompts, reading_s=-move.reading_s)
        coming = Expected(moving_in=moving, arriving_blocks=move.num_blocks, prompts=prompts, reading_s=move.reading_s)
        self._asks[source].append((now_s, leaving))
        self._asks[target].append((now_s, coming))
        self._heap.after(self._spec.message_s, self._asked, (move, source, target))

    def _asked(self, news: tuple[MovePair, WorkerId, WorkerId]) -> None:
        """The source hears of it, and chooses."""
        move, source_id, target_id = news
        source, target = self._workers[source_id], self._workers[target_id]
        if target.is_draining or not target.is_up:
            self._history.refused(source_id, target_id, self._heap.now_s)
            return
        source.sync()
        wanted = Wanted(
            max_requests=move.max_requests,
            waiting=move.waiting,
            running=move.running,
            first_in_line=move.purpose == "defragment",
            max_priority=move.max_priority,
            max_blocks=move.max_blocks,
            need_blocks=move.need_blocks,
        )
        number = begin_some(
            _candidates(source, move, self._spec.block_tokens), wanted, lambda one: self._begin(one, target)
        )
        # How many prompts fit was a guess.
        if not number or (number < move.max_requests and not move.are_prompts):
            self._history.refused(source_id, target_id, self._heap.now_s)
        if number:
            self._history.moved(source_id, target_id, self._heap.now_s)

    def _begin(self, request: Request, target: Worker) -> bool:
        if request.prompt_stage is PromptStage.WAITING:
            return self._moves.move_prompt(request, target)
        if request.answer_stage is AnswerStage.PREEMPTED:
            return self._moves.move_preempted(request, target)
        return self._moves.move_answer(request, target)


def _candidates(source: Worker, move: MovePair, block_tokens: int) -> list[Candidate[Request]]:
    found: list[Candidate[Request]] = []
    answers = source.answers

    def add(request: Request, kind: Kind, num_tokens: int, place: int = 0) -> None:
        num_blocks = -(-num_tokens // block_tokens)
        found.append(Candidate(request, kind, counted_priority(request.priority), num_tokens, num_blocks, place))

    if move.waiting:
        for request in answers.preempted():
            add(request, Kind.PREEMPTED, request.num_tokens)
        for place, request in enumerate(source.prompts.waiting()):
            add(request, Kind.PROMPT, request.prompt_tokens, place)
    if move.running:
        for request in sorted(answers.running(), key=lambda one: one.sequence_id):
            add(request, Kind.RUNNING, answers.tokens_of(request))
    return found


def _sum_of(asks: Iterable[tuple[float, Expected]]) -> Expected:
    total = NOTHING
    for _, ask in asks:
        total = total.plus(ask)
    return total
