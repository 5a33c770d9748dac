"""Room for a worker on one of several machines where idle ones are not enough: who moves away, and where to. Pure.

`coldstart.placement` decides, from a view in which memory is what devices are elsewhere: counted in units of an eighth
of the worker that needs room, rounded so that a plan never needs more than there is.

Answers move with their worker by live migration while the other one already runs, so that a move costs the load at its
target and nothing that is proportional to what was written.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from coldstart.placement import place
from coldstart.placement_terms import ClusterView, Instance, ModelTerms, NodeView, PlacementRules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.estimate import Tier
    from coldstart.placement_terms import InstanceState
    from contracts.ids import WorkerId

_UNITS = 8
#: Of a machine without a limit.
_ENDLESS: Final = 1 << 20
#: Nothing is loaded from here: how a view says that a pool has no slot on a machine.
_NOWHERE: Final[Tier] = "device"


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferedWorker:
    worker_id: WorkerId
    node: str
    #: `idle`: its pool may be empty, and nobody asks; `running`: it may move; `fixed`: it comes, leaves, or stays.
    state: InstanceState
    #: As `coldstart.keep_alive.loss_s`.
    eviction_s: float = 0.0
    #: Its memory will be free without anybody's doing.
    is_leaving: bool = False


@dataclass(frozen=True, slots=True)
class EmptySlot:
    worker_id: WorkerId
    #: Where its machine has the weights.
    tier: Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolOffer:
    """What a pool has, and where else it could be."""

    pool: str
    #: Weights and KV of one worker, and the weights alone.
    worker_bytes: int
    weight_bytes: int
    #: What a start takes beside its weights.
    init_s: float
    workers: tuple[OfferedWorker, ...] = ()
    #: By machine.
    slots: Mapping[str, EmptySlot] = field(default_factory=dict[str, EmptySlot])


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    node: str
    #: For workers; None: nobody counts it.
    free_bytes: int | None
    bytes_per_s: Mapping[Tier, float]
    #: What stands in line at its disk.
    queue_s: float = 0.0


@dataclass(frozen=True, slots=True)
class WorkerMove:
    pool: str
    worker_id: WorkerId
    to: WorkerId


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomPlan:
    #: Where room is made.
    node: str
    #: Pools to let go of, and workers that move.
    release: tuple[str, ...]
    moves: tuple[WorkerMove, ...]
    reason: str


def plan_room(pool: str, offers: Sequence[PoolOffer], machines: Sequence[Machine]) -> RoomPlan | None:
    """How to make room for one more worker of the pool at the least cost to all; None: there is no way, or nothing has
    to go. Only machines that somebody knows how to load from are looked at."""
    by_pool = {offer.pool: offer for offer in offers}
    wanted = by_pool.get(pool)
    if wanted is None or wanted.worker_bytes <= 0 or not wanted.slots:
        return None
    if any(_will_fit(wanted, machine, offers) for machine in machines if machine.node in wanted.slots):
        return None
    unit_bytes = math.ceil(wanted.worker_bytes / _UNITS)
    models = {
        offer.pool: ModelTerms(
            num_bytes=offer.weight_bytes,
            num_devices=math.ceil(offer.worker_bytes / unit_bytes),
            init_s=offer.init_s,
            resume_s_per_token=0.0,
            resume_s=0.0,
            token_s=1.0,
        )
        for offer in offers
        if offer.worker_bytes > 0 and offer.weight_bytes > 0
    }
    if pool not in models:
        return None
    nodes = tuple(
        _node_view(machine, pool, [by_pool[name] for name in models], unit_bytes)
        for machine in sorted(machines, key=lambda one: one.node)
    )
    decision = place(ClusterView(nodes=nodes, models=models), pool, PlacementRules())
    if decision.kind != "start" or decision.node_id is None or not (decision.evict or decision.moves):
        return None
    owners = {worker.worker_id: offer.pool for offer in offers for worker in offer.workers}
    # One of a pool at a time: whoever looks next plans for the others, from where they are then.
    first = {move.model: move for move in reversed(decision.moves)}
    moves = [
        WorkerMove(pool, _named(move.instance_id, owners), by_pool[pool].slots[move.target].worker_id)
        for pool, move in sorted(first.items())
        # Those whose targets have to be cleared follow when they are.
        if not move.evict
    ]
    free_bytes = {machine.node: machine.free_bytes for machine in machines}
    for name, move in first.items():
        target = free_bytes[move.target]
        if target is not None and not move.evict and target < by_pool[name].worker_bytes:
            # Who leaves there has not left yet.
            return None
    evicted = [*decision.evict, *(name for move in decision.moves for name in move.evict)]
    return RoomPlan(
        node=decision.node_id,
        release=tuple(sorted({owners[_named(name, owners)] for name in evicted})),
        moves=tuple(moves),
        reason=decision.reason,
    )


def _will_fit(wanted: PoolOffer, machine: Machine, offers: Sequence[PoolOffer]) -> bool:
    """Whether there is room, or will be when those have gone that leave."""
    soon = _free_soon(machine, offers)
    return soon is None or soon >= wanted.worker_bytes


def _free_soon(machine: Machine, offers: Sequence[PoolOffer]) -> int | None:
    """When those have gone that leave."""
    if machine.free_bytes is None:
        return None
    return machine.free_bytes + sum(
        offer.worker_bytes
        for offer in offers
        for worker in offer.workers
        if worker.is_leaving and worker.node == machine.node
    )


def _named(instance_id: str, owners: Mapping[WorkerId, str]) -> WorkerId:
    return next(worker_id for worker_id in owners if worker_id == instance_id)


def _node_view(machine: Machine, pool: str, offers: Sequence[PoolOffer], unit_bytes: int) -> NodeView:
    free = _free_soon(machine, offers)
    tiers: dict[str, Tier] = {
        offer.pool: slot.tier if (slot := offer.slots.get(machine.node)) is not None else _NOWHERE for offer in offers
    }
    instances = tuple(
        Instance(
            instance_id=worker.worker_id,
            model=offer.pool,
            # Who needs room does not make it.
            state="fixed" if offer.pool == pool else worker.state,
            eviction_s=worker.eviction_s,
        )
        for offer in offers
        for worker in offer.workers
        if worker.node == machine.node
    )
    return NodeView(
        node_id=machine.node,
        free_devices=_ENDLESS if free is None else max(0, free) // unit_bytes,
        tiers=tiers,
        bytes_per_s={tier: speed for tier, speed in machine.bytes_per_s.items() if tier != _NOWHERE},
        queue_s=dict.fromkeys(("ssd", "remote"), machine.queue_s),
        instances=instances,
    )
