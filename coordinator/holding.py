"""For how long pools keep their last worker while nobody asks: what `coldstart.keep_alive` decides by, and its answer
in the words of scaling. No I/O; reads no clock."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldstart.keep_alive import HeldModel, IdleTimes, KeepRules, make_room, window
from coordinator.policy.scaling_terms import Hold

if TYPE_CHECKING:
    from coordinator.pool_views import ScaledPool


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

    def is_idle(self, idle_s: float) -> bool:
        return idle_s > self._resolution_s


@dataclass(slots=True)
class _Tenant:
    num_bytes: int = 0
    #: None: it is busy, or must stay.
    held: HeldModel | None = None


@dataclass(slots=True)
class Room:
    """Memory that the workers of all models take together, and who has to make room. Where a model wakes that does not
    fit, idle ones are let go of, the one first that was used longest ago. One for all coordinators of a process."""

    #: None: nobody counts.
    budget_bytes: int | None = None
    _tenants: dict[str, _Tenant] = field(default_factory=dict[str, _Tenant])
    #: By pool: for whom, and until when.
    _asked: dict[str, tuple[str, float]] = field(default_factory=dict[str, tuple[str, float]])

    def tell(self, pool: str, num_bytes: int, held: HeldModel | None) -> None:
        """What a pool's workers take, those that come included; `held` where all of it could be let go of."""
        self._tenants[pool] = _Tenant(num_bytes, held)
        if not num_bytes:
            self._asked.pop(pool, None)

    def fits(self, worker_bytes: int) -> int | None:
        """How many workers of this size; None: any number."""
        if self.budget_bytes is None or not worker_bytes:
            return None
        taken = sum(tenant.num_bytes for tenant in self._tenants.values())
        return max(0, self.budget_bytes - taken) // worker_bytes

    def ask(self, pool: str, num_bytes: int, now_s: float, *, lasts_s: float = 15.0) -> tuple[str, ...]:
        """Has idle models make room; returns whose, nobody where all of them would not be enough. What was asked for
        is forgotten after a while: who needed it may be gone."""
        if self.budget_bytes is None:
            return ()
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
