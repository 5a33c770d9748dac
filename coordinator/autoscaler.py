"""The shell of `coordinator.policy.scaling` and `coordinator.policy.lending`: looks every few seconds, and begins
operations. It keeps what the policies remember and what was seen of requests; all else workers and agents tell.
"""

from __future__ import annotations

import asyncio
import math
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Self

from contracts.control_messages import FlipOperation, MoveOperation, RemoveOperation, StartOperation
from contracts.errors import TandemError
from contracts.failpoints import RarePath
from contracts.ids import WorkerId
from contracts.messages import PoolFigures
from contracts.scale_messages import SCALING, PoolScaling, ScalingReply
from coordinator.operation_terms import title
from coordinator.policy.lending import LendMemory, lend
from coordinator.policy.scaling import by_cost_of_leaving, can_spare, decide
from coordinator.policy.scaling_demand import coming
from coordinator.policy.scaling_terms import SpareWorker
from coordinator.pool_views import ClusterSeen, lend_workers
from coordinator.pool_watch import PoolWatch

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    from contracts.clock import Clock
    from contracts.control_messages import Operation
    from contracts.messages import DispatchItem, Empty, Rejection, TtftTally
    from coordinator.conductor import Conductor
    from coordinator.decision import Chosen, Refused
    from coordinator.holding import Room
    from coordinator.policy.lending import LendDecision
    from coordinator.policy.scaling_terms import PoolView, ScaleDecision, ScaleMemory
    from coordinator.policy.start_places import ChosenStart
    from coordinator.policy.virtual_usage import UsageView
    from coordinator.pool_history import Durations
    from coordinator.pool_views import ScaledPool
    from coordinator.pool_watch import Watched
    from coordinator.scaling_settings import AutoscaleSettings, Mode, Operator
    from coordinator.start_knowledge import StartKnowledge
    from rpc import CallContext, Server

#: A pool that has nobody is looked at for a request at once, but not more often.
_WAKE_INTERVAL_S = 0.5
#: Why nothing is done, where somebody could do something about it.
_WORTH_SAYING = frozenset({"at_maximum", "nothing_to_start", "no_room"})
#: Done or proposed ones that are told.
_MAX_TOLD = 32

_WOKEN = RarePath("coordinator.pool_woken", "a worker is started for a request that found nobody")
_PREWARMED = RarePath("coordinator.pool_prewarmed", "a worker is started before the request that is expected")
_TO_ZERO = RarePath("coordinator.pool_to_zero", "an idle pool is left without its last worker")
_LENT = RarePath("coordinator.worker_lent", "a worker is lent to the other phase")
_RETURNED = RarePath("coordinator.worker_given_back", "a lent worker goes home")
_REFUSED = RarePath("coordinator.scaling_refused", "an operation that scaling wants cannot be begun")


class Autoscaler:
    """Use: `register_on(server)`, and `async with autoscaler:` for as long as it should look."""

    def __init__(
        self,
        clock: Clock,
        settings: AutoscaleSettings,
        conductor: Conductor,
        operator: Operator,
        *,
        usage: Callable[[], UsageView],
        log: Callable[[str], None],
        room: Room | None = None,
        starts: StartKnowledge | None = None,
    ) -> None:
        """`usage`: what workers tell now, as `coordinator.usage_rows.usage_of` makes it. `room`: memory that is shared
        with other models' workers. `starts`: what node agents tell of weights; None: workers are started in order."""
        self._clock = clock
        self._settings = settings
        self._conductor = conductor
        self._operator = operator
        self._usage = usage
        self._log = log
        self.watch = PoolWatch(settings, conductor, clock.now_s(), room, starts)
        self._lend_memory = LendMemory()
        self._told: deque[tuple[float, str]] = deque(maxlen=_MAX_TOLD)
        #: When a request last made it look. Other looks do not count: a request that comes just after one would wait.
        self._woken_s = -math.inf
        self._task: asyncio.Task[None] | None = None
        self._group: asyncio.TaskGroup | None = None

    @property
    def figures(self) -> tuple[PoolFigures, ...]:
        """Of the pools that follow the load."""
        return tuple(
            PoolFigures(name, each.wanted, each.ready, each.coming, dict(each.decisions_total))
            for name, each in self.watch.pools.items()
            if each.pool.is_scaled
        )

    def register_on(self, server: Server) -> None:
        server.register(SCALING, self._on_scaling)

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        if self._settings.is_on:
            self._task = self._group.create_task(self._run(), name="autoscaler-looks")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        if self._task is not None:
            self._task.cancel()
        if not isinstance(error, asyncio.CancelledError):
            # The body's own error leaves as it is, not as part of a group.
            kind = error = trace = None
        await self._group.__aexit__(kind, error, trace)

    # --- what is heard of requests ----------------------------------------------------------------

    def decided(self, item: DispatchItem, decision: Chosen | Refused, now_s: float) -> None:
        """A decision was made; its rows are those of the conductor's fleet at this moment."""
        is_asked = self.watch.decided(item, decision, now_s)
        if is_asked and self._task is not None and now_s - self._woken_s >= _WAKE_INTERVAL_S:
            self._woken_s = now_s
            self.look()

    def judged(self, tally: TtftTally, now_s: float) -> None:
        """What became of requests."""
        self.watch.judged(tally, now_s)

    def reworded(self, decision: Refused, rejection: Rejection) -> Rejection:
        """Tells a request that found nobody to wait where somebody is being started for it."""
        return self.watch.reworded(decision, rejection, self._operator.slots())

    # --- looks ------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            await self._clock.sleep(self._settings.interval_s)
            self.look()

    def look(self) -> None:
        """Decides about each pool, and begins what was decided."""
        now_s = self._clock.now_s()
        cluster = self._cluster(now_s)
        self.watch.note(cluster, now_s)
        decided = [] if self._settings.mode == "off" else self._decide(cluster, now_s)
        for each, view, decision, memory in decided:
            each.memory = memory
            each.wanted, each.ready, each.coming = decision.wanted, len(view.serving), coming(view)
            each.decisions_total[decision.why] += 1
            if decision.wanted <= decision.present:
                each.short_since_s = None
            elif each.short_since_s is None:
                each.short_since_s = now_s
        # Those that have wanted for longest are the first in line at a disk, and for memory.
        for each, _, decision, _ in sorted(decided, key=lambda one: one[0].short_since_s or now_s):
            self._carry_out(each, decision, cluster, now_s)
            self._move_away(each, now_s)
        if self._settings.lend_mode != "off":
            found, self._lend_memory = self._lending(cluster, now_s)
            self._carry_out_lending(found, now_s)

    def _cluster(self, now_s: float) -> ClusterSeen:
        # First: who looks at the members may find that some are gone, and these leave the fleet.
        usage = self._usage()
        fleet = self._conductor.fleet
        rows = range(len(fleet))
        shares = fleet.outlook().reading_share(now_s).tolist()
        infos = tuple(fleet.info_at(row) for row in rows)
        return ClusterSeen(
            infos=tuple(info for info in infos if info.role != "store"),
            usage=usage,
            open_requests={
                info.worker_id: load.open_requests
                for info, load in zip(infos, fleet.loads, strict=True)
                if load is not None
            },
            reading_shares={infos[row].worker_id: shares[row] for row in rows},
            slots=self._operator.slots(),
            operations=self._operator.statuses(),
        )

    # --- scaling ----------------------------------------------------------------------------------

    def _decide(self, cluster: ClusterSeen, now_s: float) -> list[tuple[Watched, PoolView, ScaleDecision, ScaleMemory]]:
        """About each pool that scales; nothing is done or remembered."""
        scaled = [each for each in self.watch.pools.values() if each.pool.is_scaled]
        views = {each.pool.name: self.watch.view(each, cluster, now_s) for each in scaled}
        memories = {each.pool.name: each.memory for each in scaled}
        found: list[tuple[Watched, PoolView, ScaleDecision, ScaleMemory]] = []
        for each in scaled:
            name = each.pool.name
            view = replace(views[name], spares=self._spares(each.pool, views, memories, now_s))
            decision, memories[name] = decide(view, each.pool.rules, now_s, memories[name])
            for spare in decision.flips:
                memories[spare.pool] = replace(memories[spare.pool], down_s=now_s)
            found.append((each, view, decision, memories[name]))
        # A pool that was looked at before another one took from it.
        return [(each, view, decision, memories[each.pool.name]) for each, view, decision, _ in found]

    def _spares(
        self, pool: ScaledPool, views: Mapping[str, PoolView], memories: Mapping[str, ScaleMemory], now_s: float
    ) -> tuple[SpareWorker, ...]:
        """One of each other pool that can do without it and did not change just now."""
        spares: list[SpareWorker] = []
        for name, view in views.items():
            other, memory = self.watch.pools[name].pool, memories[name]
            if other.role == pool.role or view.starting or len(view.serving) < len(view.workers):
                continue
            grown_s, shrunk_s = now_s - max(memory.up_s, memory.first_look_s), now_s - memory.down_s
            # To give one away is to shrink, for a reason: it need not wait as long after having shrunk.
            is_rested = grown_s >= other.rules.cooldown_down_s and shrunk_s >= other.rules.cooldown_up_s
            if is_rested and can_spare(view, other.rules, memory):
                flip_s = self.watch.flip.mean_s + self.watch.flip.spread_s
                spares.append(
                    SpareWorker(worker_id=by_cost_of_leaving(view.serving)[0].worker_id, pool=name, flip_s=flip_s)
                )
        return tuple(spares)

    def _carry_out(self, each: Watched, decision: ScaleDecision, cluster: ClusterSeen, now_s: float) -> None:
        pool = each.pool
        if decision.kind == "keep":
            blocked = f"pool {pool.name}: {decision.why}" if decision.why in _WORTH_SAYING else ""
            if blocked and blocked != each.said:
                self._log(f"{blocked}: {decision.reason}")
            each.said = blocked
            # To be there before anybody asks is no reason to send others away.
            is_needed = decision.why == "no_room" and (each.is_awaited or decision.present > 0)
            if is_needed and self._settings.mode == "apply":
                self._make_room(pool, cluster, now_s)
            return
        each.said = ""
        starts = self.watch.next_starts(pool, cluster, decision.num_starts, now_s) if decision.num_starts else []
        places = "".join(f"; {_words(start)}" for start in starts if start.reason)
        self._tell(f"pool {pool.name}: {decision.reason}{places}", self._settings.mode, now_s)
        if self._settings.mode != "apply":
            return
        if decision.why == "wake":
            _WOKEN.reached()
        elif decision.why == "prewarm":
            _PREWARMED.reached()
        elif decision.why == "idle" and decision.wanted == 0:
            _TO_ZERO.reached()
        for spare in decision.flips:
            self._begin(FlipOperation(worker_id=WorkerId(spare.worker_id), role=pool.role))
        roles = {slot.worker_id: slot.role for slot in cluster.slots}
        for start in starts:
            # Its last life may have ended in another pool's role, with which it would begin.
            role = None if roles[start.worker_id] == pool.role else pool.role
            if self._begin(StartOperation(worker_id=start.worker_id, role=role)) and self.watch.starts is not None:
                self.watch.starts.expect(start, now_s)
        for victim in decision.remove:
            # An idle pool may leave the cluster without anybody: that is what was asked for.
            self._begin(RemoveOperation(worker_id=WorkerId(victim), force=decision.why == "idle"))

    def _make_room(self, pool: ScaledPool, cluster: ClusterSeen, now_s: float) -> None:
        """Idle pools go, where the worker would be ready soonest; where they are not enough, busy ones move away."""
        if any(room.ask(pool.name, pool.worker_bytes, now_s) for room in self.watch.rooms_for(pool, cluster, now_s)):
            return
        plan = self.watch.plan_room(pool)
        if plan is not None:
            self._tell(f"pool {pool.name}: room is made on {plan.node}: {plan.reason}", self._settings.mode, now_s)
            self.watch.room.want(plan, pool.name, now_s)

    def _move_away(self, each: Watched, now_s: float) -> None:
        """Where another pool needs the memory of one of these workers."""
        found = self.watch.room.move_of(each.pool.name, now_s)
        if found is None or self._settings.mode != "apply":
            return
        move, reason = found
        if self._begin(MoveOperation(worker_id=move.worker_id, to=move.to)):
            self._tell(f"pool {each.pool.name}: {move.worker_id} moves to {move.to}: {reason}", "apply", now_s)
            # What it had to offer is old; the next look offers anew.
            self.watch.room.offers.pop(each.pool.name, None)

    # --- lending ----------------------------------------------------------------------------------

    def _lending(self, cluster: ClusterSeen, now_s: float) -> tuple[LendDecision, LendMemory]:
        since_s = {worker_id: at_s for worker_id, (_, at_s) in self.watch.roles.items()}
        workers = lend_workers(self._settings.pools, cluster, since_s)
        return lend(workers, self._settings.lend_rules, now_s, self._lend_memory)

    def _carry_out_lending(self, decision: LendDecision, now_s: float) -> None:
        if decision.kind == "keep":
            return
        self._tell(decision.reason, self._settings.lend_mode, now_s)
        if self._settings.lend_mode == "apply":
            (_LENT if decision.kind == "lend" else _RETURNED).reached()
            self._begin(FlipOperation(worker_id=WorkerId(decision.worker_id), role=decision.role))

    # --- inside -----------------------------------------------------------------------------------

    def _begin(self, operation: Operation) -> bool:
        """Whether it could be begun."""
        try:
            self._operator.begin(operation, by="autoscaler")
        except TandemError as error:
            _REFUSED.reached()
            self._log(f"scaling cannot {title(operation)}: {error.message}")
            return False
        return True

    def _tell(self, text: str, mode: Mode, now_s: float) -> None:
        text = text if mode == "apply" else f"proposed: {text}"
        self._told.append((now_s, text))
        self._log(text)

    async def _on_scaling(self, ask: Empty, context: CallContext) -> ScalingReply:
        """What it would do now; nothing changes."""
        now_s, settings = self._clock.now_s(), self._settings
        cluster = self._cluster(now_s)
        if self._task is None:
            # Nobody looks: what it would be like if this were the first time.
            self.watch.note(cluster, now_s)
        return ScalingReply(
            mode=settings.mode,
            pools=tuple(
                told(each.pool, view, decision, each.start, self.watch.next_starts(each.pool, cluster, 1, now_s))
                for each, view, decision, _ in self._decide(cluster, now_s)
            ),
            nodes=() if self.watch.starts is None else self.watch.starts.told(now_s),
            lend_mode=settings.lend_mode,
            lending="" if settings.lend_mode == "off" else self._lending(cluster, now_s)[0].reason,
            done=tuple((now_s - at_s, text) for at_s, text in self._told),
        )


def told(
    pool: ScaledPool,
    view: PoolView,
    decision: ScaleDecision,
    start: Durations,
    next_starts: Sequence[ChosenStart] = (),
) -> PoolScaling:
    """A decision as a message. `next_starts`: the first of them is told."""
    return PoolScaling(
        pool=pool.name,
        role=pool.role,
        min_workers=pool.rules.min_workers,
        max_workers=pool.rules.max_workers,
        ready=len(view.serving),
        coming=coming(view),
        leaving=len(view.workers) - len(view.serving),
        wanted=decision.wanted,
        kind=decision.kind,
        why=decision.why,
        reason=decision.reason,
        num_starts=decision.num_starts,
        flips=tuple(spare.worker_id for spare in decision.flips),
        remove=decision.remove,
        start_s=start.mean_s,
        start_spread_s=start.spread_s,
        starts_seen=start.count,
        expected_start_s=next_starts[0].takes_s if next_starts else None,
        next_start=_words(next_starts[0]) if next_starts else "",
    )


def _words(start: ChosenStart) -> str:
    return f"{start.worker_id}: {start.reason}" if start.reason else start.worker_id
