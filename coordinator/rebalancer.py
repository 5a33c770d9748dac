"""The shell of `coordinator.policy.migration_pairs`: looks at what workers told, and asks sources to move requests.

It keeps nothing but what it asked for lately. Whatever becomes of a move is between the two workers and the gateway;
the next reports tell. So calls are not repeated, and a coordinator that starts anew goes on where the reports stand.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.failpoints import RarePath
from contracts.messages import MIGRATE, MigrateRequest, Peer
from coordinator.policy.migration_pairs import pair
from coordinator.policy.move_terms import MoveHistory, MoveRules
from coordinator.shell_figures import RebalanceFigures
from coordinator.usage_rows import NOTHING, Expected, usage_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.ids import WorkerId
    from contracts.messages import MigrateReply, WorkerInfo, WorkerLoad
    from coordinator.conductor import Conductor
    from coordinator.membership import Standing
    from coordinator.policy.move_terms import MovePair
    from coordinator.policy.virtual_usage import UsageView
    from rpc import Network

    #: Measured bytes a second from the first to the second; None: not known.
    Bandwidth = Callable[[WorkerId, WorkerId], float | None]

#: What a source may take to answer; it begins moves, and does not wait for them.
CALL_TIMEOUT_S = 1.0
#: A report that is so much younger than an ask contains what came of it.
SETTLED_AFTER_S = 0.25
#: Asks of a worker that tells nothing any more are forgotten.
_FORGOTTEN_AFTER_S = 5.0
#: Of moves that were begun so many are told within a second.
_LINES_PER_S = 10

_REFUSED = RarePath("coordinator.move_refused", "a worker began none of the moves that it was asked for")
_AT_ONCE = RarePath("coordinator.moves_at_once", "moves were looked for before their time")


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceSettings:
    rules: MoveRules
    #: From one look to the next; at once where a worker preempts or drains, but not more often than twice as often.
    interval_s: float = 0.2


@dataclass(slots=True, eq=False)
class _Ask:
    """What a source was asked for, until both workers have told anew."""

    move: MovePair
    source: WorkerInfo
    destination: WorkerInfo
    at_s: float
    #: As many as the source said that it began; until then, as asked.
    number: int
    is_answered: bool = False
    source_told: bool = False
    destination_told: bool = False

    def expected(self, worker_id: WorkerId) -> Expected:
        share = self.number / self.move.max_requests
        is_source = worker_id == self.source.worker_id
        if self.source_told if is_source else self.destination_told:
            return NOTHING
        is_prompt = self.move.are_prompts
        # Prompts that move are nothing that leaves room behind, and no bound counts them.
        number = 0 if is_prompt else self.number
        sign = -1 if is_source else 1
        return Expected(
            moving_out=number if is_source else 0,
            moving_in=0 if is_source else number,
            arriving_blocks=0 if is_source else round(share * self.move.num_blocks),
            prompts=sign * self.number if is_prompt else 0,
            reading_s=sign * share * self.move.reading_s,
        )


class Rebalancer:
    """Use: `await run()` beside the rest of the coordinator, and tell it what is `heard` and who is `gone`."""

    def __init__(
        self,
        clock: Clock,
        network: Network,
        settings: RebalanceSettings,
        conductor: Conductor,
        *,
        standing: Callable[[], Standing],
        closed: Callable[[], frozenset[WorkerId]],
        keep_answers: Callable[[], frozenset[WorkerId]] = frozenset,
        bandwidth: Bandwidth | None = None,
        log: Callable[[str], None],
    ) -> None:
        """`closed`: who drains, or is about to; `keep_answers`: of whom only prompts are to leave."""
        self.figures = RebalanceFigures()
        self._clock = clock
        self._network = network
        self._settings = settings
        self._conductor = conductor
        self._standing = standing
        self._closed = closed
        self._keep_answers = keep_answers
        self._bandwidth = bandwidth
        self._log = log
        self._history = MoveHistory()
        self._asks: list[_Ask] = []
        self._looked_s = self._lines_since_s = -math.inf
        self._num_lines = 0
        #: Present while `run` runs.
        self._group: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Looks until cancelled."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                while True:
                    await self._clock.sleep(self._settings.interval_s)
                    self._look()
            finally:
                self._group = None

    def heard(self, worker_id: WorkerId, load: WorkerLoad, now_s: float) -> None:
        """A worker has told of its load, which the conductor knows."""
        for ask in self._asks:
            if now_s >= ask.at_s + SETTLED_AFTER_S:
                ask.source_told |= ask.source.worker_id == worker_id
                ask.destination_told |= ask.destination.worker_id == worker_id
        presses = load.preempted_answers > load.moving_out or (load.draining and load.open_requests > load.moving_out)
        if presses and self._group is not None and now_s - self._looked_s >= self._settings.interval_s / 2:
            _AT_ONCE.reached()
            self._look()

    def gone(self, worker_id: WorkerId) -> None:
        """Its life is over."""
        self._history.forget(worker_id)
        self._asks = [ask for ask in self._asks if worker_id not in (ask.source.worker_id, ask.destination.worker_id)]

    def _look(self) -> None:
        now_s = self._looked_s = self._clock.now_s()
        self._forget_settled(now_s)
        view = usage_of(
            self._conductor,
            self._standing(),
            self._closed(),
            self._expected(),
            now_s,
            keep_answers=self._keep_answers(),
        )
        found = pair(view, self._settings.rules, self._history, now_s)
        self.figures.withheld_total.update(found.not_moved)
        for move in found.moves:
            self._ask(move, view, now_s)

    def _forget_settled(self, now_s: float) -> None:
        self._asks = [
            ask
            for ask in self._asks
            if not (ask.is_answered and ask.source_told and ask.destination_told)
            and now_s - ask.at_s < _FORGOTTEN_AFTER_S
        ]

    def _expected(self) -> dict[WorkerId, Expected]:
        expected: dict[WorkerId, Expected] = {}
        for ask in self._asks:
            for worker_id in (ask.source.worker_id, ask.destination.worker_id):
                expected[worker_id] = expected.get(worker_id, NOTHING).plus(ask.expected(worker_id))
        return expected

    # --- asks -------------------------------------------------------------------------------------

    def _ask(self, move: MovePair, view: UsageView, now_s: float) -> None:
        fleet = self._conductor.fleet
        source, destination = (
            fleet.info_at(fleet.row_of(view.worker_ids[row])) for row in (move.source, move.destination)
        )
        ask = _Ask(move, source, destination, now_s, number=move.max_requests)
        self._asks.append(ask)
        self.figures.asked_total[move.purpose] += move.max_requests
        assert self._group is not None, "looked at without running"
        self._group.create_task(self._call(ask), name=f"move-{source.worker_id}-{destination.worker_id}")

    async def _call(self, ask: _Ask) -> None:
        move, source, destination = ask.move, ask.source, ask.destination
        bandwidth = None if self._bandwidth is None else self._bandwidth(source.worker_id, destination.worker_id)
        message = MigrateRequest(
            target=source.incarnation,
            destination=_peer(destination),
            max_requests=move.max_requests,
            waiting=move.waiting,
            first_in_line=move.purpose == "defragment",
            running=move.running,
            max_priority=move.max_priority,
            max_blocks=move.max_blocks,
            need_blocks=move.need_blocks,
            mode=move.mode,
            bandwidth_bytes_per_s=bandwidth,
            reason=f"{move.purpose}: {move.reason}",
        )
        try:
            reply = await self._network.channel(source.address).call(MIGRATE, message, timeout_s=CALL_TIMEOUT_S)
        except TandemError as error:
            # Those that it may have begun are in its next report.
            self._over(ask, 0)
            self.figures.failed_total[move.purpose] += move.max_requests
            self._tell(f"{source.worker_id} was asked to move requests to {destination.worker_id}: {error}")
        else:
            self._answered(ask, reply)

    def _answered(self, ask: _Ask, reply: MigrateReply) -> None:
        move, now_s = ask.move, self._clock.now_s()
        source_id, destination_id = ask.source.worker_id, ask.destination.worker_id
        number = min(len(reply.started), move.max_requests)
        self._over(ask, number)
        self.figures.begun_total[move.purpose] += number
        if number < move.max_requests:
            self.figures.refused_total[move.purpose] += move.max_requests - number
        # How many prompts fit was a guess.
        if not number or (number < move.max_requests and not move.are_prompts):
            self._history.refused(source_id, destination_id, now_s)
        if not number:
            _REFUSED.reached()
            self._tell(f"{source_id} moves nothing to {destination_id}: {reply.reason}")
            return
        self._history.moved(source_id, destination_id, now_s)
        self._tell(f"{source_id} moves {number} to {destination_id}, {move.purpose}: {move.reason}")

    def _over(self, ask: _Ask, number: int) -> None:
        ask.is_answered, ask.number = True, number
        if not number:
            self._history.refused(ask.source.worker_id, ask.destination.worker_id, self._clock.now_s())
            ask.source_told = ask.destination_told = True

    def _tell(self, line: str) -> None:
        now_s = self._clock.now_s()
        if now_s - self._lines_since_s >= 1.0:
            self._lines_since_s, self._num_lines = now_s, 0
        self._num_lines += 1
        if self._num_lines <= _LINES_PER_S:
            self._log(line)


def _peer(info: WorkerInfo) -> Peer:
    return Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address)
