"""For how long pools keep their last worker while nobody asks: what `coldstart.keep_alive` decides by, and its answer
in the words of scaling. No I/O; reads no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldstart.keep_alive import HeldModel, IdleTimes, KeepRules, loss_s, make_room, window
from coordinator.policy.scaling_terms import Hold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from coordinator.policy.room_moves import Machine, PoolOffer, RoomPlan, WorkerMove
    from coordinator.pool_views import ScaledPool


#: A model that waits for memory is first in line for so long: about as long as its requests wait.
LONGEST_FIRST_S = 120.0
#: What a coordinator said that looks no more.
_BELIEVED_S = 15.0


class PoolHold:
    """Of one pool."""

    def __init__(self, pool: ScaledPool, resolution_s: float) -> None:
        """`resolution_s`: pauses no longer than this are none; when the last request ended is not known better."""
        self._pool = pool
        self._resolution_s = resolution_s
        self._times = IdleTimes(pool.rules.keep_bin_s)

    def came(self, idle_s: float) -> None:
        """A request came so long after the end of the last one."""
        if idle_s > self._resolution_s:
            self._times.observe(self._pool.name, idle_s)

    def held(self, *, num_workers: int, reload_s: float, idle_s: float, now_s: float) -> HeldModel:
        return HeldModel(
            model=self._pool.name,
            num_bytes=max(num_workers, 1) * self._pool.worker_bytes,
            reload_s=reload_s,
            idle_since_s=now_s - idle_s,
            is_held=num_workers > 0,
        )

    def decide(self, held: HeldModel, now_s: float) -> Hold | None:
        """None: the pool's rules have nothing to do with it."""
        rules = self._pool.rules.keep
        if rules is None:
            return None
        look = window(held, rules, self._times)
        idle_s = now_s - held.idle_since_s
        words = f"{rules.way}: {look.reason}"
        if held.is_held:
            is_over = look.until_s <= look.warm_s or not look.warm_s <= idle_s < look.until_s
            return Hold("release" if is_over and idle_s > self._resolution_s else "keep", words)
        # Only one that was let go of in order to be warmed comes back unasked.
        is_soon = 0.0 < look.warm_s <= idle_s < look.until_s
        return Hold("warm" if is_soon else "release", words)

    def loss_s(self, held: HeldModel, now_s: float) -> float:
        """What letting go of it now is expected to cost later."""
        return loss_s(held, self._pool.rules.keep or KeepRules(way="lru"), self._times, now_s)

    def is_idle(self, idle_s: float) -> bool:
        return idle_s > self._resolution_s


@dataclass(slots=True)
class _Tenant:
    num_bytes: int = 0
    #: None: it is busy, or must stay.
    held: HeldModel | None = None


@dataclass(slots=True, kw_only=True)
class _Waking:
    """A model that is asked for and has nobody."""

    #: By pool that has no worker: what one takes.
    needs: dict[str, int]
    #: When it came, or was sent to the end of the line; and how long that is believed.
    since_s: float
    until_s: float

    @property
    def num_bytes(self) -> int:
        return sum(self.needs.values())


@dataclass(slots=True)
class Room:
    """Memory that the workers of all models take together, and who has to make room. Where a model wakes that does not
    fit, idle ones are let go of, the one first that was used longest ago. One for all coordinators of a process.

    A model whose pools only serve together gets memory for a worker of each, or for none: two models of which each had
    half would wait for each other. Models get it in the order in which they were asked for; whoever has stood first
    for `LONGEST_FIRST_S` and cannot have it (others are busy) goes to the end of the line.
    """

    #: None: nobody counts.
    budget_bytes: int | None = None
    #: Whose memory it is; empty: that of all machines which nobody tells apart.
    node: str = ""
    #: By pool, what it has and where else it could be; and the moves that others need of it, each until a time.
    offers: dict[str, PoolOffer] = field(default_factory=dict[str, "PoolOffer"])
    #: By name, what any of the coordinators knows of loads there.
    machines: dict[str, Machine] = field(default_factory=dict[str, "Machine"])
    _moves: dict[str, tuple[WorkerMove, str, float]] = field(default_factory=dict[str, "tuple[WorkerMove, str, float]"])
    #: Of other machines.
    _others: dict[str, Room] = field(default_factory=dict[str, "Room"])
    _tenants: dict[str, _Tenant] = field(default_factory=dict[str, _Tenant])
    #: By pool: for whom, and until when.
    _asked: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])
    #: By model, in line.
    _waking: dict[str, _Waking] = field(default_factory=dict[str, _Waking])

    def line_up(self, model: str, needs: Mapping[str, int], now_s: float) -> None:
        """What a model lacks to serve at all, by pool; empty: nothing, or nobody asks for it. Told at every look: what
        is not said again is forgotten after a while."""
        self._waking = {name: each for name, each in self._waking.items() if now_s < each.until_s}
        known = self._waking.get(model)
        if not needs:
            self._waking.pop(model, None)
            return
        since_s = now_s if known is None else known.since_s
        if known is not None and now_s - since_s >= LONGEST_FIRST_S and next(iter(self._waking)) == model:
            since_s = now_s
            del self._waking[model]
        self._waking[model] = _Waking(needs=dict(needs), since_s=since_s, until_s=now_s + _BELIEVED_S)

    def at(self, node: str) -> Room:
        """The memory of that machine."""
        if node in ("", self.node):
            return self
        return self._others.setdefault(node, Room(node=node))

    def rooms(self) -> tuple[Room, ...]:
        """Of all machines."""
        return self, *self._others.values()

    @property
    def free_bytes(self) -> int | None:
        """None: nobody counts."""
        if self.budget_bytes is None:
            return None
        return self.budget_bytes - sum(tenant.num_bytes for tenant in self._tenants.values())

    def want(self, plan: RoomPlan, pool: str, now_s: float, *, lasts_s: float = 15.0) -> None:
        """Has pools let go and workers move, so that a worker of `pool` has room."""
        for room in self.rooms():
            for other in plan.release:
                # What a pool was asked for is forgotten where it has nothing.
                if other in room._tenants and room._tenants[other].num_bytes:
                    room._asked[other] = (f"room for {pool}: {plan.reason}", now_s + lasts_s)
        for move in plan.moves:
            self._moves[move.pool] = (move, f"room for {pool} on {plan.node}: {plan.reason}", now_s + lasts_s)

    def move_of(self, pool: str, now_s: float) -> tuple[WorkerMove, str] | None:
        """The move that this pool is to make, and why; told once."""
        found = self._moves.pop(pool, None)
        return None if found is None or found[2] < now_s else found[:2]

    def tell(self, pool: str, num_bytes: int, held: HeldModel | None) -> None:
        """What a pool's workers take, those that come included; `held` where all of it could be let go of."""
        self._tenants[pool] = _Tenant(num_bytes, held)
        if not num_bytes:
            self._asked.pop(pool, None)

    def fits(self, pool: str, worker_bytes: int) -> int | None:
        """How many workers of this size the pool may start; None: any number."""
        if self.budget_bytes is None or not worker_bytes:
            return None
        free_bytes = self.budget_bytes - sum(tenant.num_bytes for tenant in self._tenants.values())
        for each in self._waking.values():
            if pool in each.needs:
                others_bytes = each.num_bytes - each.needs[pool]
                return max(0, free_bytes - others_bytes) // worker_bytes
            if each.num_bytes <= self.budget_bytes:
                # One that never can is waited for by nobody.
                free_bytes -= each.num_bytes
        return max(0, free_bytes) // worker_bytes

    def ask(self, pool: str, num_bytes: int, now_s: float, *, lasts_s: float = 15.0) -> tuple[str, ...]:
        """Has idle models make room for the pool, and for those that it only serves together with; returns whose,
        nobody where all of them would not be enough. What was asked for is forgotten after a while: who needed it may
        be gone."""
        if self.budget_bytes is None:
            return ()
        num_bytes = max(num_bytes, *(each.num_bytes for each in self._waking.values() if pool in each.needs), 0)
        missing = num_bytes - (self.budget_bytes - sum(tenant.num_bytes for tenant in self._tenants.values()))
        others = [one.held for name, one in self._tenants.items() if one.held is not None and name != pool]
        if missing <= 0:
            return ()
        found = make_room(others, missing, KeepRules(way="lru"), IdleTimes(), now_s)
        for decision in found or ():
            self._asked[decision.model] = (f"room for {pool}: {decision.reason}", now_s + lasts_s)
        return tuple(decision.model for decision in found or ())

    def wanted_from(self, pool: str, now_s: float) -> Hold | None:
        """Whether a pool is to go, and for whom."""
        reason, until_s = self._asked.get(pool, ("", -math.inf))
        return Hold("release", reason, is_urgent=True) if now_s < until_s else None
