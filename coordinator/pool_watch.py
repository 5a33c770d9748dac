"""What is remembered of each pool: requests, starts, who found nobody. No I/O; reads no clock."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec

from contracts.control_messages import FlipOperation
from contracts.errors import NotReady
from contracts.failpoints import RarePath
from coordinator.decision import Refused
from coordinator.holding import PoolHold, Room
from coordinator.policy.room_moves import OfferedWorker, plan_room
from coordinator.policy.scaling_terms import ScaleMemory
from coordinator.policy.start_places import ChosenStart
from coordinator.pool_history import Durations, PoolHistory
from coordinator.pool_views import (
    PoolSight,
    ScaledPool,
    answers_limit,
    being_changed,
    being_removed,
    being_started,
    needed_together,
    pool_view,
    present,
    startable,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.keep_alive import HeldModel
    from coldstart.placement_terms import InstanceState
    from contracts.control_messages import WorkerSlot
    from contracts.ids import WorkerId
    from contracts.messages import DispatchItem, Rejection, TtftTally
    from coordinator.conductor import Conductor
    from coordinator.decision import Chosen
    from coordinator.policy.room_moves import RoomPlan
    from coordinator.policy.scaling_terms import PoolView
    from coordinator.pool_views import ClusterSeen
    from coordinator.scaling_settings import AutoscaleSettings
    from coordinator.start_knowledge import StartKnowledge

#: A request that found nobody is waited for so long after it asked last: gateways ask again meanwhile.
_UNSERVED_S = 15.0
#: After a worker became ready, requests are not judged for so long: caches and clocks are cold.
WARM_UP_S = 10.0
#: A request that waits for a worker is told to come again no sooner.
SHORTEST_WAIT_S = 0.5
#: Of slots: nobody comes from there.
_NEVER_READY = frozenset({"given_up"})
#: Pauses of less than so many looks are not told from requests that overlap.
_BLIND_LOOKS = 2

_WAITS = RarePath("coordinator.waits_for_start", "a request that found nobody is told to wait for a start")


@dataclass(slots=True)
class Watched:
    """A pool, and what is remembered of it."""

    pool: ScaledPool
    history: PoolHistory
    start: Durations
    hold: PoolHold
    memory: ScaleMemory = field(default_factory=ScaleMemory)
    #: As of the last look: how many it is to have, are ready to stay, are coming; and what was decided, by its word.
    wanted: int = 0
    ready: int = 0
    coming: int = 0
    decisions_total: Counter[str] = field(default_factory=Counter[str])
    #: When requests found nobody.
    unserved_s: deque[float] = field(default_factory=lambda: deque[float](maxlen=256))
    #: What was said last, so that it is not said again.
    said: str = ""
    #: A request found nobody, and waits.
    is_awaited: bool = False
    #: It has wanted more workers than it had since then; None: it has enough.
    short_since_s: float | None = None


class PoolWatch:
    """Times of calls must not go backwards."""

    def __init__(
        self,
        settings: AutoscaleSettings,
        conductor: Conductor,
        now_s: float,
        room: Room | None = None,
        starts: StartKnowledge | None = None,
    ) -> None:
        self.room = room or Room()
        #: What machines tell of their weights; None: nobody does.
        self.starts = starts
        self.pools = {
            pool.name: Watched(
                pool,
                PoolHistory(pool.rules.window_s, now_s),
                Durations(settings.start_s),
                PoolHold(pool, _BLIND_LOOKS * settings.interval_s),
            )
            for pool in settings.pools
        }
        self.flip = Durations(settings.flip_s)
        #: By worker: its role, and since when.
        self.roles: dict[WorkerId, tuple[str, float]] = {}
        self._settings = settings
        self._conductor = conductor
        #: Lives whose start was noted, and flips.
        self._noted_starts: dict[WorkerId, int] = {}
        self._noted_flips: set[int] = set()
        #: By worker, as of the last look: the pool that it works for.
        self._pool_names: dict[WorkerId, str] = {}

    # --- what is heard of requests ----------------------------------------------------------------

    def decided(self, item: DispatchItem, decision: Chosen | Refused, now_s: float) -> bool:
        """A decision was made; its rows are those of the conductor's fleet at this moment. Whether it asks for a worker
        of a pool that has none, and none coming."""
        if item.was_accepted or (isinstance(decision, Refused) and decision.why == "too_long"):
            return False
        chosen = decision.best if isinstance(decision, Refused) else decision
        predicted = None if chosen is None else chosen.predicted
        work_s = 0.0 if predicted is None else predicted.prefill_s
        fleet = self._conductor.fleet
        rows: set[int] = set() if chosen is None else {chosen.prefill_row, chosen.decode_row}
        names = {self._name_of(fleet.info_at(row).worker_id) for row in rows}
        found_nobody = isinstance(decision, Refused) and decision.why in ("no_prefill", "no_decode")
        wakes = False
        for each in self.pools.values():
            if found_nobody:
                # It comes again and again until there is somebody.
                each.unserved_s.append(now_s)
                if not each.is_awaited:
                    each.is_awaited = True
                    each.hold.came(each.history.idle_s(now_s))
                each.history.busy(now_s)
                wakes |= each.pool.is_scaled and not (each.ready or each.coming)
            elif chosen is None or each.pool.name in names:
                # Who was refused everywhere would have gone anywhere.
                each.is_awaited = False
                each.hold.came(each.history.idle_s(now_s))
                each.history.arrived(now_s, work_s if each.pool.reads else 0.0)
        return wakes

    def judged(self, tally: TtftTally, now_s: float) -> None:
        """What became of requests, by TTFT: that is what reading pools are for."""
        for each in self.pools.values():
            if each.pool.reads:
                each.history.judged(now_s, tally.num_first_tokens, tally.num_late)

    def reworded(self, decision: Refused, rejection: Rejection, slots: Sequence[WorkerSlot]) -> Rejection:
        """Tells a request that found nobody to wait where somebody is being started for it."""
        if decision.why not in ("no_prefill", "no_decode") or self._settings.mode != "apply":
            return rejection
        waits_s: dict[str, float] = {}
        serving = self._serving_now()
        expected_s: Mapping[WorkerId, float] = {} if self.starts is None else self.starts.expected_s()
        for name, each in self.pools.items():
            is_asked = each.pool.reads if decision.why == "no_prefill" else each.pool.writes
            states = [slot.state for slot in slots if slot.pool == name]
            if is_asked and each.pool.is_scaled and name not in serving and set(states) - _NEVER_READY:
                lefts_s = [
                    expected_s.get(slot.worker_id, each.start.mean_s) - (slot.age_s or 0.0)
                    for slot in slots
                    if slot.pool == name and (slot.state in ("new", "starting") or slot.worker_id in expected_s)
                ]
                waits_s[name] = max(SHORTEST_WAIT_S, min(lefts_s, default=each.start.mean_s))
        if not waits_s:
            return rejection
        _WAITS.reached()
        wait_s = max(waits_s.values())
        return msgspec.structs.replace(
            rejection,
            code=NotReady.code,
            message=f"{', '.join(waits_s)}: no worker is up, one is being started, in about {wait_s:.1f} s",
            reason="waking",
            retry_after_s=wait_s,
        )

    def _serving_now(self) -> set[str]:
        """Pools with a worker that is there to stay. Not as of the last look: one that left since is not waited for."""
        fleet = self._conductor.fleet
        loads = zip(range(len(fleet)), fleet.loads, strict=True)
        stays = [fleet.info_at(row).worker_id for row, load in loads if load is None or not load.draining]
        return {self._name_of(worker_id) for worker_id in stays}

    def _name_of(self, worker_id: WorkerId) -> str:
        return self._pool_names.get(worker_id, worker_id.rpartition("-")[0])

    # --- what a look tells ---------------------------------------------------------------------

    def note(self, cluster: ClusterSeen, now_s: float) -> None:
        """What this look tells of durations, of who became ready, and of who is busy."""
        for slot in cluster.slots:
            each = self.pools.get(slot.pool)
            if each is None or slot.start_s is None or self._noted_starts.get(slot.worker_id) == slot.incarnation:
                continue
            self._noted_starts[slot.worker_id] = slot.incarnation
            each.start.note(slot.start_s)
            if self.starts is not None:
                self.starts.started(slot)
        if self.starts is not None:
            self.starts.forget_all_but(being_started(cluster))
            for node, budget_bytes in self.starts.budgets(now_s).items():
                if budget_bytes is not None:
                    self.room.at(node).budget_bytes = budget_bytes
            self.room.machines |= self.starts.machines(now_s)
        ended = {one.operation_id: one for one in cluster.operations if one.state == "done"}
        for operation_id, status in ended.items():
            operation = status.operation
            # To become mixed nothing has to leave: that says nothing of flips from pool to pool.
            is_flip = isinstance(operation, FlipOperation) and operation.role != "mixed"
            if is_flip and operation_id not in self._noted_flips:
                self.flip.note(status.age_s)
        self._noted_flips = set(ended)
        infos = {info.worker_id: info for info in cluster.infos}
        self._pool_names = {}
        for worker_id, info in infos.items():
            pool = cluster.pool_of(info, self._settings.pools)
            if pool is None:
                continue
            self._pool_names[worker_id] = pool.name
            history = self.pools[pool.name].history
            if self.roles.get(worker_id, ("", 0.0))[0] != info.role:
                self.roles[worker_id] = (info.role, now_s)
                history.warms_up(now_s + WARM_UP_S)
            if cluster.open_requests.get(worker_id, 0):
                history.busy(now_s)
        self.roles = {worker_id: role for worker_id, role in self.roles.items() if worker_id in infos}
        for each in self.pools.values():
            while each.unserved_s and each.unserved_s[0] < now_s - _UNSERVED_S:
                each.unserved_s.popleft()
            if each.unserved_s:
                each.history.warms_up(now_s + WARM_UP_S)
            if each.is_awaited:
                # Until it found somebody: then it has arrived. Or until it gave up.
                each.is_awaited = bool(each.unserved_s)
                each.history.busy(now_s)
        self._line_up(cluster, now_s)

    def _line_up(self, cluster: ClusterSeen, now_s: float) -> None:
        """Where requests find nobody: one worker of each pool that they cannot do without, wherever it could be."""
        there = {name: bool(present(each.pool, self._settings.pools, cluster)) for name, each in self.pools.items()}
        awaited = [
            each.pool
            for name, each in self.pools.items()
            if each.is_awaited and each.pool.is_scaled and not there[name]
        ]
        needed = needed_together([each.pool for name, each in self.pools.items() if there[name]], awaited)
        nodes = {} if self.starts is None else self.starts.nodes(now_s)
        places = {
            pool.name: {self.room.at(nodes.get(worker_id, "")).node for worker_id in startable(pool, cluster)}
            or {self.room.node}
            for pool in needed
        }
        for room in self.room.rooms():
            needs = {pool.name: pool.worker_bytes for pool in needed if room.node in places[pool.name]}
            room.line_up(" ".join(self.pools), needs, now_s)

    def view(self, each: Watched, cluster: ClusterSeen, now_s: float) -> PoolView:
        """The pool as scaling looks at it, as of the last `note`."""
        pool, fleet = each.pool, self._conductor.fleet
        infos = [fleet.info_at(row) for row in range(len(fleet))]
        rows = [row for row, info in enumerate(infos) if self._pool_names.get(info.worker_id) == pool.name]
        outlook = fleet.outlook()
        idle_s = each.history.idle_s(now_s)
        nodes = {} if self.starts is None else self.starts.nodes(now_s)
        there = present(pool, self._settings.pools, cluster)
        num_workers = len(there)
        expected_start_s = self._expected_start_s(pool, cluster, now_s)
        reload_s = each.start.mean_s if expected_start_s is None else expected_start_s
        held = each.hold.held(num_workers=num_workers, reload_s=reload_s, idle_s=idle_s, now_s=now_s)
        may_go = pool.rules.min_workers == 0 and num_workers > 0 and each.hold.is_idle(idle_s)
        counts = Counter(self.room.at(nodes.get(worker_id, "")).node for worker_id in there)
        for room in self.room.rooms():
            num_bytes = counts[room.node] * pool.worker_bytes
            # All of it goes, but only what is here makes room here.
            room.tell(pool.name, num_bytes, replace(held, num_bytes=num_bytes) if may_go and num_bytes else None)
        wanted_from = next(filter(None, (room.wanted_from(pool.name, now_s) for room in self.room.rooms())), None)
        sight = PoolSight(
            seen=each.history.seen(now_s),
            idle_s=idle_s,
            unserved_requests=sum(at_s >= now_s - _UNSERVED_S for at_s in each.unserved_s),
            start=each.start,
            flip=self.flip,
            answer_s=outlook.pace.answer_s if outlook.knows_writing else None,
            answers_limit=answers_limit(outlook, rows, infos, self._settings.tpot_s),
            expected_start_s=expected_start_s,
            expected_spread_s=0.0 if self.starts is None else self.starts.spread_s(pool.name),
            expected_s={} if self.starts is None else self.starts.expected_s(),
            hold=(wanted_from if may_go else None) or each.hold.decide(held, now_s),
            fits=self._fits(pool, cluster, nodes),
        )
        view = pool_view(pool, self._settings.pools, cluster, sight)
        self._offer(each, view, cluster, nodes, held if may_go else None, now_s)
        return view

    def next_starts(self, pool: ScaledPool, cluster: ClusterSeen, count: int, now_s: float) -> list[ChosenStart]:
        """Which empty slots are filled next, those first that would be ready soonest."""
        worker_ids = startable(pool, cluster)
        if self.starts is not None:
            worker_ids = self._with_room(pool, worker_ids, self.starts.nodes(now_s))
            return self.starts.next_starts(pool.name, worker_ids, count, now_s)
        return [ChosenStart(worker_id=one, node="", takes_s=None, reason="") for one in worker_ids[:count]]

    def rooms_for(self, pool: ScaledPool, cluster: ClusterSeen, now_s: float) -> list[Room]:
        """The memory of machines that have an empty slot of the pool, where it is ready soonest first."""
        if self.starts is None:
            return [self.room]
        worker_ids = startable(pool, cluster)
        ordered = self.starts.next_starts(pool.name, worker_ids, len(worker_ids), now_s)
        nodes = dict.fromkeys(self.room.at(start.node).node for start in ordered)
        return [self.room.at(node) for node in nodes]

    def plan_room(self, pool: ScaledPool) -> RoomPlan | None:
        """Whom to move away where there is no memory for a worker of the pool, and letting go of idle ones is not
        enough; None: that is no help, or too little is known."""
        if self.starts is None:
            return None
        machines = [
            replace(machine, free_bytes=self.room.at(node).free_bytes) for node, machine in self.room.machines.items()
        ]
        return plan_room(pool.name, list(self.room.offers.values()), machines)

    def _with_room(
        self, pool: ScaledPool, worker_ids: Sequence[WorkerId], nodes: Mapping[WorkerId, str]
    ) -> list[WorkerId]:
        """Of empty slots those whose machines have the memory, as many of each as fit."""
        found: list[WorkerId] = []
        taken: Counter[str] = Counter()
        for worker_id in worker_ids:
            room = self.room.at(nodes.get(worker_id, ""))
            fits = room.fits(pool.name, pool.worker_bytes)
            if fits is None or taken[room.node] < fits:
                taken[room.node] += 1
                found.append(worker_id)
        return found

    def _fits(self, pool: ScaledPool, cluster: ClusterSeen, nodes: Mapping[WorkerId, str]) -> int | None:
        """Workers that there is memory for where there are slots; None: nobody counts it there."""
        worker_ids = startable(pool, cluster)
        if len({self.room.at(nodes.get(worker_id, "")).node for worker_id in worker_ids}) > 1:
            return len(self._with_room(pool, worker_ids, nodes))
        room = self.room.at(nodes.get(worker_ids[0], "")) if worker_ids else self.room
        return room.fits(pool.name, pool.worker_bytes)

    def _offer(
        self,
        each: Watched,
        view: PoolView,
        cluster: ClusterSeen,
        nodes: Mapping[WorkerId, str],
        idle: HeldModel | None,
        now_s: float,
    ) -> None:
        """Tells other pools what this one has, and where else it could be. `idle`: it may be let go of."""
        if self.starts is None:
            return
        pool = each.pool
        changing, removed = being_changed(cluster), being_removed(cluster)
        stays = {worker.worker_id for worker in view.workers if not worker.is_leaving}
        workers: list[OfferedWorker] = []
        for worker_id in sorted(present(pool, self._settings.pools, cluster)):
            state: InstanceState = "idle" if idle is not None else "running"
            if worker_id in changing or worker_id not in stays or self._settings.mode != "apply":
                state = "fixed"
            loss = 0.0 if idle is None else each.hold.loss_s(idle, now_s)
            workers.append(
                OfferedWorker(
                    worker_id=worker_id,
                    node=nodes.get(worker_id, ""),
                    state=state,
                    eviction_s=loss,
                    is_leaving=worker_id in removed,
                )
            )
        offer = self.starts.offer(pool.name, pool.worker_bytes, tuple(workers), startable(pool, cluster), now_s)
        if offer is None:
            self.room.offers.pop(pool.name, None)
        else:
            self.room.offers[pool.name] = offer

    def _expected_start_s(self, pool: ScaledPool, cluster: ClusterSeen, now_s: float) -> float | None:
        if self.starts is None:
            return None
        worker_ids = startable(pool, cluster)
        # Where there is no room, by when there will be.
        worker_ids = self._with_room(pool, worker_ids, self.starts.nodes(now_s)) or worker_ids
        return self.starts.takes_s(pool.name, worker_ids, now_s)
