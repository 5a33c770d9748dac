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
        expected = {worker_id: _sum_of(asks) for worker_id, asks in self._asks.items() if asks}
        view = usage_of(self._conductor, Standing(unheard=away), closed, expected, self._heap.now_s)
        pairing = pair(view, self._rules, self._history, self._heap.now_s)
        self._moves.tallies.not_moved.update(pairing.not_moved)
        for move in pairing.moves:
            self._ask(move, view.worker_ids[move.source], view.worker_ids[move.destination])
        self._heap.after(self._spec.look_interval_s, self._look, None)

    def _ask(self, move: MovePair, source: WorkerId, target: WorkerId) -> None:
        number, now_s = move.max_requests, self._heap.now_s
        self._moves.tallies.asked[move.purpose] += number
        prompts = number if move.waiting and not move.num_blocks else 0
        leaving = Expected(moving_out=number, prompts=-prompts, reading_s=-move.reading_s)
        coming = Expected(moving_in=number, arriving_blocks=move.num_blocks, prompts=prompts, reading_s=move.reading_s)
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
        left = move.max_requests
        if move.waiting:
            left -= _move_some(source.answers.preempted(), self._moves.move_preempted, target, left)
            left -= _move_some(_from_the(source, move), self._moves.move_prompt, target, left)
        if move.running and left:
            left -= _move_some(_least_first(source, move), self._moves.move_answer, target, left)
        if left:
            self._history.refused(source_id, target_id, self._heap.now_s)
        if left < move.max_requests:
            self._history.moved(source_id, target_id, self._heap.now_s)


def _move_some(requests: Iterable[Request], begin: Callable[[Request, Worker], bool], target: Worker, most: int) -> int:
    """How many of them, in this order, begin to move."""
    begun = 0
    for request in list(requests):
        if begun >= most:
            break
        begun += begin(request, target)
    return begun


def _from_the(source: Worker, move: MovePair) -> list[Request]:
    """Waiting prompts: the first in line where that is in the way, else the last."""
    waiting = source.prompts.waiting()
    return waiting if move.purpose == "defragment" else waiting[::-1]


def _least_first(source: Worker, move: MovePair) -> list[Request]:
    """Answers: the lowest priority first, of one priority the shortest."""
    answers = source.answers
    running = [
        request
        for request in answers.running()
        if move.max_priority is None or counted_priority(request.priority) <= move.max_priority
    ]
    return sorted(running, key=lambda one: (counted_priority(one.priority), answers.tokens_of(one), one.sequence_id))


def _sum_of(asks: Iterable[tuple[float, Expected]]) -> Expected:
    total = NOTHING
    for _, ask in asks:
        total = total.plus(ask)
    return total
