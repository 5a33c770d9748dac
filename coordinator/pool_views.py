"""From what workers and node agents tell to the pools that scaling and lending look at. Pure.

A worker belongs to its own pool while it has that pool's role, or is lent as mixed; with another role it belongs to the
first pool of that role. A worker that is being restarted, started or flipped into a pool is capacity that will come.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from contracts.control_messages import (
    DrainOperation,
    FlipOperation,
    MoveOperation,
    RemoveOperation,
    RestartOperation,
    StartOperation,
)
from coordinator.policy.lending import LendWorker
from coordinator.policy.scaling_terms import PoolView, PoolWorker, SpareWorker, StartingWorker
from coordinator.policy.virtual_usage import UsageRules, wanted_blocks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from contracts.control_messages import OperationStatus, WorkerSlot
    from contracts.ids import WorkerId
    from contracts.messages import Role, WorkerInfo
    from coordinator.policy.outlook import Outlook
    from coordinator.policy.scaling_terms import Hold, ScaleRules
    from coordinator.policy.virtual_usage import UsageView
    from coordinator.pool_history import Durations, Seen

#: A slot's worker is not there yet, and will be.
_COMING = frozenset({"new", "starting", "restarting", "ready"})
#: It has a process, or is about to.
_THERE = frozenset({"new", "starting", "restarting", "ready", "ending"})
_STARTABLE = frozenset({"absent", "stopped"})


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaledPool:
    """A pool as configured."""

    name: str
    role: Role
    rules: ScaleRules
    #: What one worker takes, weights and KV; 0: not known.
    worker_bytes: int = 0

    @property
    def is_scaled(self) -> bool:
        return self.rules.min_workers < self.rules.max_workers

    @property
    def reads(self) -> bool:
        return self.role != "decode"

    @property
    def writes(self) -> bool:
        return self.role != "prefill"


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSeen:
    """Everybody, as of one time."""

    infos: tuple[WorkerInfo, ...] = ()
    #: Of those that told of their load.
    usage: UsageView
    #: Requests open at a worker.
    open_requests: Mapping[WorkerId, int] = field(default_factory=dict["WorkerId", int])
    #: Of its time, what a worker read lately.
    reading_shares: Mapping[WorkerId, float] = field(default_factory=dict["WorkerId", float])
    slots: tuple[WorkerSlot, ...] = ()
    #: Those that run, and the last that ended.
    operations: tuple[OperationStatus, ...] = ()

    def home_of(self, info: WorkerInfo, pools: Sequence[ScaledPool]) -> ScaledPool | None:
        """The pool that it was started for."""
        slot = next((slot.pool for slot in self.slots if slot.worker_id == info.worker_id), None)
        name = slot or info.worker_id.rpartition("-")[0]
        return next((pool for pool in pools if pool.name == name), None)

    def pool_of(self, info: WorkerInfo, pools: Sequence[ScaledPool]) -> ScaledPool | None:
        """The pool that it works for."""
        home = self.home_of(info, pools)
        alike = [pool for pool in pools if pool.role == info.role]
        if home is not None and (home.role == info.role or (info.role == "mixed" and not alike)):
            return home
        return next(iter(alike), None)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolSight:
    """What is known of one pool beside its workers."""

    seen: Seen
    idle_s: float
    unserved_requests: int
    start: Durations
    flip: Durations
    answer_s: float | None
    answers_limit: float | None
    #: Of the next start, by where its weights lie, and how far such estimates are off; None: too little is known.
    expected_start_s: float | None = None
    expected_spread_s: float = 0.0
    #: Of starts that were begun: what they take in all.
    expected_s: Mapping[WorkerId, float] = field(default_factory=dict["WorkerId", float])
    spares: tuple[SpareWorker, ...] = ()
    hold: Hold | None = None
    fits: int | None = None

    @property
    def start_s(self) -> float:
        """From the begin of a start to its end: as estimated, else the mean of those that were seen."""
        return self.start.mean_s if self.expected_start_s is None else self.expected_start_s

    @property
    def start_spread_s(self) -> float:
        return self.start.spread_s if self.expected_start_s is None else self.expected_spread_s

    def takes_s(self, worker_id: WorkerId) -> float:
        """Of a start that was begun."""
        return self.expected_s.get(worker_id, self.start.mean_s)


def pool_view(pool: ScaledPool, pools: Sequence[ScaledPool], cluster: ClusterSeen, sight: PoolSight) -> PoolView:
    workers = pool_workers(pool, pools, cluster)
    return PoolView(
        pool=pool.name,
        workers=workers,
        starting=_starting(pool, pools, cluster, workers, sight),
        num_startable=len(startable(pool, cluster)),
        start_s=sight.start_s,
        start_spread_s=sight.start_spread_s,
        spares=sight.spares,
        arrivals=sight.seen.arrivals,
        recent_arrivals=sight.seen.recent_arrivals,
        recent_share=sight.seen.recent_share,
        work_rate=sight.seen.work_rate if pool.reads else 0.0,
        answer_s=sight.answer_s if pool.writes else None,
        answers_limit=sight.answers_limit if pool.writes else None,
        attainment=sight.seen.attainment if pool.reads else None,
        num_judged=sight.seen.num_judged if pool.reads else 0,
        unserved_requests=sight.unserved_requests,
        idle_s=sight.idle_s,
        hold=sight.hold,
        fits=sight.fits,
    )


def needed_together(present: Sequence[ScaledPool], absent: Sequence[ScaledPool]) -> list[ScaledPool]:
    """Of pools without a worker the fewest that can finish requests with those that have some; none where these can, or
    where it cannot be done."""
    reads, writes = any(pool.reads for pool in present), any(pool.writes for pool in present)
    if reads and writes:
        return []
    whole = next((pool for pool in absent if pool.reads and pool.writes), None)
    reader = next((pool for pool in absent if pool.reads), None)
    writer = next((pool for pool in absent if pool.writes), None)
    if not (reads or writes) and whole is not None:
        return [whole]
    lacking = [pool for has, pool in ((reads, reader), (writes, writer)) if not has]
    return [pool for pool in lacking if pool is not None] if None not in lacking else []


def present(pool: ScaledPool, pools: Sequence[ScaledPool], cluster: ClusterSeen) -> set[WorkerId]:
    """Workers of the pool that take memory, or will: also those that leave, until they are gone."""
    slots = {slot.worker_id for slot in cluster.slots if slot.pool == pool.name and slot.state in _THERE}
    infos = {info.worker_id for info in cluster.infos if cluster.home_of(info, pools) is pool}
    starting = _asked_to_start(cluster)
    own = {slot.worker_id for slot in cluster.slots if slot.pool == pool.name}
    return slots | infos | (starting & own)


def pool_workers(pool: ScaledPool, pools: Sequence[ScaledPool], cluster: ClusterSeen) -> tuple[PoolWorker, ...]:
    """Those that told of their load. One that drains and has nothing left is none any more."""
    usage, infos = cluster.usage, {info.worker_id: info for info in cluster.infos}
    used_blocks = wanted_blocks(usage, UsageRules(queued="all")) - usage.queued_blocks
    lost, moving = _lost(cluster.operations), _moving(cluster.operations)
    workers: list[PoolWorker] = []
    for row, worker_id in enumerate(usage.worker_ids):
        info = infos.get(worker_id)
        # The one that takes its place is there.
        is_replaced = moving.get(worker_id) in infos
        is_leaving = bool(usage.is_draining[row]) or is_replaced
        if info is None or cluster.pool_of(info, pools) is not pool:
            continue
        if is_leaving and not cluster.open_requests.get(worker_id, 0):
            continue
        block_tokens = int(usage.block_tokens[row])
        # Prompts are read one after the other, and what was read waits for writers: its memory asks for no reader.
        writes = block_tokens if bool(usage.writes[row]) else 0
        workers.append(
            PoolWorker(
                worker_id=worker_id,
                memory_tokens=float(usage.total_blocks[row] * block_tokens),
                used_tokens=float(used_blocks[row] * writes),
                queued_tokens=float(usage.queued_blocks[row] * writes),
                answers=int(usage.answers[row].sum()),
                waiting_requests=int(usage.preempted_answers[row] + usage.waiting_prompts[row]),
                queue_delay_s=float(usage.queue_s[row]) if bool(usage.reads[row]) else 0.0,
                is_leaving=is_leaving,
                is_lost=is_leaving and worker_id in lost,
            )
        )
    return tuple(workers)


def startable(pool: ScaledPool, cluster: ClusterSeen) -> list[WorkerId]:
    """Slots that could be started, in order of their numbers, whatever role their last lives ended with."""
    held = being_changed(cluster)
    present = {info.worker_id for info in cluster.infos}
    found = [
        slot.worker_id
        for slot in cluster.slots
        if slot.pool == pool.name and slot.state in _STARTABLE and slot.worker_id not in held | present
    ]
    return sorted(found, key=_by_number)


def being_changed(cluster: ClusterSeen) -> set[WorkerId]:
    """Those that an operation has."""
    running = [status.operation for status in cluster.operations if status.state == "running"]
    return {worker_id for operation in running for worker_id in _workers_of(operation)}


def being_removed(cluster: ClusterSeen) -> set[WorkerId]:
    """Those whose processes end, or will when they are drained."""
    running = [status.operation for status in cluster.operations if status.state == "running"]
    asked = {one.worker_id for one in running if isinstance(one, RemoveOperation | MoveOperation)}
    return asked | {slot.worker_id for slot in cluster.slots if slot.state == "ending"}


def being_started(cluster: ClusterSeen) -> set[WorkerId]:
    """Those that an operation starts, or whose processes are not ready yet."""
    return _asked_to_start(cluster) | {slot.worker_id for slot in cluster.slots if slot.state in _COMING - {"ready"}}


def _asked_to_start(cluster: ClusterSeen) -> set[WorkerId]:
    running = [status.operation for status in cluster.operations if status.state == "running"]
    started = {one.worker_id for one in running if isinstance(one, StartOperation)}
    return started | {one.to for one in running if isinstance(one, MoveOperation)}


def lend_workers(
    pools: Sequence[ScaledPool], cluster: ClusterSeen, since_s: Mapping[WorkerId, float]
) -> list[LendWorker]:
    """The workers of pools that read or write. `since_s`: when a worker was first seen in the role that it has."""
    usage, infos = cluster.usage, {info.worker_id: info for info in cluster.infos}
    used_blocks = wanted_blocks(usage, UsageRules(queued="all"))
    flips: dict[WorkerId, Role] = {
        status.operation.worker_id: status.operation.role
        for status in cluster.operations
        if status.state == "running" and isinstance(status.operation, FlipOperation)
    }
    found: list[LendWorker] = []
    for row, worker_id in enumerate(usage.worker_ids):
        info = infos.get(worker_id)
        home = None if info is None else cluster.home_of(info, pools)
        if info is None or info.role == "store" or home is None or home.role == "mixed":
            continue
        is_flipping = worker_id in flips
        if bool(usage.is_draining[row]) and not is_flipping:
            continue
        tokens = float(usage.block_tokens[row]) if bool(usage.writes[row]) else 0.0
        reads = bool(usage.reads[row])
        found.append(
            LendWorker(
                worker_id=worker_id,
                home=home.role,
                role=flips.get(worker_id, info.role),
                since_s=since_s.get(worker_id, 0.0),
                queue_delay_s=float(usage.queue_s[row]) if reads else 0.0,
                reading_share=cluster.reading_shares.get(worker_id, 0.0) if reads else 0.0,
                memory_tokens=float(usage.total_blocks[row] * usage.block_tokens[row]),
                used_tokens=float(used_blocks[row]) * tokens,
                prompts=int(usage.waiting_prompts[row]) if reads else 0,
                answers=int(usage.answers[row].sum() + usage.preempted_answers[row]),
                is_changing=is_flipping,
            )
        )
    return found


def answers_limit(
    outlook: Outlook, rows: Sequence[int], infos: Sequence[WorkerInfo], tpot_s: float | None
) -> float | None:
    """Answers that a worker of these rows writes at once so that each token takes at most `tpot_s`, at the mean context
    of late; no more than its steps hold. None: neither is known."""
    limits: list[float] = []
    for row in rows:
        seats = infos[row].max_sequences
        limit = float(seats) if seats > 0 else None
        if tpot_s is not None and outlook.knows_writing:
            kind = int(outlook.write_kind[row])
            base_s, context_s = outlook.tables.decode_base_s[kind], outlook.tables.decode_context_s[kind]
            sizes = np.arange(len(base_s))
            context = outlook.pace.prompt_tokens + 0.5 * outlook.pace.answer_tokens
            within = np.flatnonzero(base_s + context_s * (context * sizes) <= tpot_s)
            meets = float(max(within[-1] if within.size else 1, 1))
            limit = meets if limit is None else min(limit, meets)
        if limit is not None:
            limits.append(limit)
    return sum(limits) / len(limits) if limits else None


def _starting(
    pool: ScaledPool,
    pools: Sequence[ScaledPool],
    cluster: ClusterSeen,
    workers: Sequence[PoolWorker],
    sight: PoolSight,
) -> tuple[StartingWorker, ...]:
    # Who comes to take another one's place is no more capacity.
    serving = {worker.worker_id for worker in workers if not worker.is_leaving} | {
        *_moving(cluster.operations).values()
    }
    told = set(cluster.usage.worker_ids)
    found: dict[WorkerId, StartingWorker] = {}

    def add(worker_id: WorkerId, age_s: float, takes_s: float) -> None:
        if worker_id not in serving:
            found[worker_id] = StartingWorker(worker_id=worker_id, age_s=age_s, takes_s=takes_s)

    for slot in cluster.slots:
        if slot.pool == pool.name and slot.role == pool.role and slot.state in _COMING and slot.worker_id not in told:
            add(slot.worker_id, slot.age_s or 0.0, sight.takes_s(slot.worker_id))
    for info in cluster.infos:
        # It is registered, and tells of its load in a moment.
        if info.worker_id not in told and cluster.pool_of(info, pools) is pool:
            add(info.worker_id, sight.start.mean_s, sight.start.mean_s)
    own = dict.fromkeys(slot.worker_id for slot in cluster.slots if slot.pool == pool.name)
    for status in cluster.operations:
        match status:
            case _ if status.state != "running":
                continue
            case _ if isinstance(status.operation, FlipOperation):
                if status.operation.role == pool.role:
                    add(status.operation.worker_id, status.age_s, sight.flip.mean_s)
            case _ if isinstance(status.operation, RestartOperation):
                for worker_id in status.operation.worker_ids or own:
                    if worker_id in own:
                        add(worker_id, 0.0, sight.start.mean_s)
            case _ if isinstance(status.operation, StartOperation):
                if status.operation.worker_id in own and status.operation.worker_id not in found:
                    add(status.operation.worker_id, status.age_s, sight.takes_s(status.operation.worker_id))
            case _:
                pass
    return tuple(found.values())


def _workers_of(operation: object) -> tuple[WorkerId, ...]:
    if isinstance(operation, RestartOperation):
        return operation.worker_ids
    if isinstance(operation, MoveOperation):
        return operation.to, operation.worker_id
    worker_id: WorkerId | None = getattr(operation, "worker_id", None)
    return () if worker_id is None else (worker_id,)


def _moving(operations: Sequence[OperationStatus]) -> dict[WorkerId, WorkerId]:
    """Those that move, and which worker takes their place."""
    running = [status.operation for status in operations if status.state == "running"]
    return {one.worker_id: one.to for one in running if isinstance(one, MoveOperation)}


def _lost(operations: Sequence[OperationStatus]) -> set[WorkerId]:
    """Those that somebody said will die."""
    return {
        status.operation.worker_id
        for status in operations
        if isinstance(status.operation, DrainOperation)
        and status.operation.within_s is not None
        and status.state in ("running", "done")
    }


def _by_number(worker_id: WorkerId) -> tuple[str, int, str]:
    name, _, number = worker_id.rpartition("-")
    return (name, int(number) if number.isdigit() else 0, worker_id)
