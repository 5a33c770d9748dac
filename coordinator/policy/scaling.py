"""How many workers a pool should have, and how it gets there. Pure; the same live and in studies.

The goal is computed from demand (`coordinator.policy.scaling_demand`), never "one more at each look": workers that
start already count as capacity that will come, so that a burst is answered once. What is added is what will be needed
when it could be ready; a flip of a worker that another pool can spare is ready sooner or later than a start, and is
asked for what will be needed by then. Whatever comes sooner goes first.

The pool shrinks one step at a time, only where demand was low for a whole window, the mean freeness is above the band
of the rules, and those that would be left stay in it (Llumnix, OSDI 2024, section 4.4.3: the victim has the fewest
running answers). Demand that needs n workers is met by n and left alone by n: constant load ends in a fixed point.

Attainment is a check on all that: where too many miss their targets although demand says that there are enough, one
worker is added and the effect awaited. If it did not help, the cause is not the number of workers, and no more come.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

from coordinator.policy.scaling_demand import coming, demand, looks_within
from coordinator.policy.scaling_terms import Look, PoolView, ScaleDecision, ScaleMemory, ScaleRules

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.policy.scaling_demand import Demand
    from coordinator.policy.scaling_terms import PoolWorker, SpareWorker, Why

__all__ = ["PoolView", "ScaleDecision", "ScaleMemory", "ScaleRules", "decide"]

#: Of looks that are kept; more in a window than that tell no more.
_MAX_LOOKS = 1024
#: Of its workers, a pool that needs fewer than this misses its targets for other reasons than their number.
_LEAST_USED = 0.3
#: Attainment that a worker must bring to have helped.
_HELP = 0.02
_EPSILON = 1e-6


def decide(view: PoolView, rules: ScaleRules, now_s: float, memory: ScaleMemory) -> tuple[ScaleDecision, ScaleMemory]:
    """What to do with the pool now, and what to remember for the next look, assuming that it is done.

    Starts, flips and removals keep the number of workers that stay or come within the rules' limits; a pool that is
    below the least is brought to it at once. Nothing is begun that goes both ways within a cooldown.
    """
    soonest_flip_s = view.spares[0].flip_s if rules.flip and view.spares else math.inf
    start_s = view.start_s + view.start_spread_s
    by_start = demand(view, rules, start_s, memory.looks)
    by_flip = demand(view, rules, min(soonest_flip_s, start_s), memory.looks)
    looks = (*memory.looks, Look(now_s, by_start.now, max(by_start.later, by_flip.later)))[-_MAX_LOOKS:]
    memory = replace(
        memory,
        looks=tuple(looks_within(looks, rules)),
        first_look_s=min(memory.first_look_s, now_s),
        pushed_at=None if _is_attained(view, rules) else memory.pushed_at,
    )
    grown = _up(view, rules, now_s, memory, by_start, by_flip)
    if isinstance(grown, ScaleDecision):
        if grown.kind == "up":
            pushed = view.attainment if grown.why == "attainment" else memory.pushed_at
            memory = replace(memory, up_s=now_s, pushed_at=pushed)
        return grown, memory
    shrunk = _down(view, rules, now_s, memory, by_start, grown)
    if shrunk.kind == "down":
        memory = replace(memory, down_s=now_s)
    return shrunk, memory


def can_spare(view: PoolView, rules: ScaleRules, memory: ScaleMemory, count: int = 1) -> bool:
    """Whether the pool would do with so many workers fewer: for the highest demand of the window and a margin, within
    the band of freeness and the delay that is allowed, and with at least `min_workers`, and one."""
    left = len(view.serving) - count
    if left < max(rules.min_workers, 1) or not memory.looks:
        return False
    most = max(max(look.now, look.later) for look in memory.looks)
    if sum(worker.queue_delay_s for worker in view.workers) > rules.queue_delay_s * left:
        return False
    return most * (1.0 + rules.margin) <= left and view.freeness_with(left) >= rules.freeness_low


def by_cost_of_leaving(workers: Sequence[PoolWorker]) -> list[PoolWorker]:
    """Those first that have the fewest requests, and among them the freest."""
    return sorted(
        workers,
        key=lambda one: (one.answers + one.waiting_requests, one.queue_delay_s, one.used_tokens, one.worker_id),
    )


def _up(
    view: PoolView, rules: ScaleRules, now_s: float, memory: ScaleMemory, by_start: Demand, by_flip: Demand
) -> ScaleDecision | int:
    """More workers, or why not although they are needed; where none are needed, how many are."""
    serving, starting = len(view.serving), coming(view)
    present = serving + starting
    counted = f"{serving} ready, {starting} coming" + (f", {_num_leaving(view)} leaving" if _num_leaving(view) else "")
    why: Why = "demand"
    asked, settled = _whole(memory.looks[-1].later), _settled(memory, rules)
    needed, soon = (min(_whole(one.later), settled) for one in (by_start, by_flip))
    if max(needed, soon) <= present and _pushes(view, rules, now_s, memory, by_start, present):
        needed = soon = present + 1
        why = "attainment"
    if max(present, needed) < rules.min_workers:
        needed = soon = rules.min_workers
        why = "minimum"
    if not present and view.unserved_requests:
        needed, soon, why = max(needed, 1), max(soon, 1), "wake"
    elif not present and view.hold is not None and view.hold.kind == "warm":
        needed, soon, why = max(needed, 1), max(soon, 1), "prewarm"
    elif not present and not rules.min_workers and _is_let_go(view, rules):
        # What the load of late asks for was weighed when the last one went.
        return 0
    wanted = min(max(needed, rules.min_workers), rules.max_workers)
    soon = min(soon, rules.max_workers)
    text = f"{counted}; {by_start.text}" + (f"; attainment {view.attainment:.0%}" if why == "attainment" else "")
    if why == "prewarm" and view.hold is not None:
        text = f"idle for {view.idle_s:.0f} s ({view.hold.reason}): {text}"
    if max(wanted, soon) <= present:
        if present <= rules.max_workers < max(needed, settled):
            words = f"needs {max(needed, settled)}, {rules.max_workers} at most: {text}"
            return _keep(view, "at_maximum", wanted, present, words)
        if settled <= present < min(asked, rules.max_workers):
            return _keep(view, "settling", present, present, f"needs {asked} if it lasts {rules.settle_s:g} s: {text}")
        return wanted
    is_urgent = present < max(rules.min_workers, 1) or any(worker.is_lost for worker in view.workers)
    waited_s = now_s - max(memory.up_s, memory.down_s)
    if not is_urgent and waited_s < rules.cooldown_up_s:
        words = f"needs {max(wanted, soon)}, {waited_s:.1f} s after the last change ({rules.cooldown_up_s:g} s apart)"
        return _keep(view, "cooldown", wanted, present, f"{words}: {text}")
    return _more(view, rules, why, wanted, soon, present, text)


def _more(
    view: PoolView, rules: ScaleRules, why: Why, wanted: int, soon: int, present: int, text: str
) -> ScaleDecision:
    """Flips and starts, those first that are ready first. `soon`: what will be needed when a flip would be done."""
    # Whoever is late in starting may come yet.
    room = min(rules.max_step_up, rules.max_workers - len(view.serving) - len(view.starting))
    start_s = view.start_s + view.start_spread_s
    spares = view.spares if rules.flip else ()
    faster = [spare for spare in spares if spare.flip_s < start_s]
    flips: list[SpareWorker] = faster[: max(0, min(soon - present, room))]
    num_startable = view.num_startable if view.fits is None else min(view.num_startable, view.fits)
    num_starts = max(0, min(wanted - present - len(flips), room - len(flips), num_startable))
    slower = [spare for spare in spares if spare.flip_s >= start_s]
    flips += slower[: max(0, min(wanted - present - len(flips) - num_starts, room - len(flips) - num_starts))]
    if not flips and not num_starts:
        if room <= 0:
            reason = f"needs {wanted}, and with those that are late in starting it has {rules.max_workers}: {text}"
            return _keep(view, "at_maximum", wanted, present, reason)
        if soon > present >= wanted:
            reason = f"would be needed now, and no more when it could be ready: {text}"
            return _keep(view, "steady", present, present, reason)
        if num_startable < view.num_startable:
            reason = f"needs {wanted}, and there is no memory for another worker: {text}"
            return _keep(view, "no_room", wanted, present, reason)
        reason = f"needs {wanted}, and no worker can be started, none flipped: {text}"
        return _keep(view, "nothing_to_start", wanted, present, reason)
    done = [
        *([f"flips {_names(flips)} ({flips[0].flip_s:.1f} s)"] if flips else []),
        *(
            [f"starts {num_starts} ({view.start_s:.1f} s, give or take {view.start_spread_s:.1f})"]
            if num_starts
            else []
        ),
    ]
    return ScaleDecision(
        pool=view.pool,
        kind="up",
        why=why,
        wanted=max(wanted, present + len(flips) + num_starts),
        present=present,
        num_starts=num_starts,
        flips=tuple(flips),
        reason=f"{' and '.join(done)} to have {present + len(flips) + num_starts} of {max(wanted, soon)}: {text}",
    )


def _down(
    view: PoolView, rules: ScaleRules, now_s: float, memory: ScaleMemory, needs: Demand, needed: int
) -> ScaleDecision:
    """Fewer workers, or why not."""
    serving, starting = len(view.serving), coming(view)
    present = serving + starting
    state = f"{serving} ready, {starting} coming, freeness {_number(view.freeness)}; {needs.text}"
    if view.hold is not None:
        state = f"{state}; {view.hold.reason}"

    def keep(why: Why, words: str) -> ScaleDecision:
        return _keep(view, why, max(needed, min(present, rules.max_workers)), present, f"{words}: {state}")

    above = serving + len(view.starting) - rules.max_workers
    least = max(rules.min_workers, 1)
    is_idle = _is_let_go(view, rules)
    if is_idle:
        least = 0
    if not serving or (serving <= least and above <= 0):
        return keep("starting" if starting else "steady", f"needs {needed}")
    waited_s = now_s - max(memory.up_s, memory.down_s, memory.first_look_s)
    is_urgent = is_idle and view.hold is not None and view.hold.is_urgent
    if waited_s < rules.cooldown_down_s and not is_urgent:
        return keep("cooldown", f"{waited_s:.1f} s after the last change ({rules.cooldown_down_s:g} s before fewer)")
    if view.starting or _num_leaving(view):
        return keep("starting", "workers come or leave")
    if above > 0:
        count = min(above, rules.max_step_down)
        return _fewer(view, "maximum", count, present, f"at most {rules.max_workers}: {state}")
    if is_idle:
        count = min(serving, rules.max_step_down)
        return _fewer(view, "idle", count, present, f"nothing came for {view.idle_s:.0f} s: {state}")
    if now_s - memory.first_look_s < rules.window_s:
        return keep("settling", f"not seen for {rules.window_s:g} s yet")
    most = max(max(look.now, look.later) for look in memory.looks)
    if _misses(view, rules) and most > _LEAST_USED * serving:
        return keep("steady", f"attainment {view.attainment:.0%} is below {rules.target_attainment:.0%}")
    if view.freeness <= rules.freeness_high:
        return keep("steady", f"freeness is at most {rules.freeness_high:g}")
    left = serving
    while serving - left < min(rules.max_step_down, serving - least) and can_spare(
        view, rules, memory, serving - left + 1
    ):
        left -= 1
    if left == serving:
        return keep("steady", f"{serving - 1} would not do for {most:.2f}, the most within {rules.window_s:g} s")
    words = f"{left} do for {most:.2f}, the most within {rules.window_s:g} s, freeness then"
    return _fewer(view, "free", serving - left, present, f"{words} {_number(view.freeness_with(left))}: {state}")


def _is_let_go(view: PoolView, rules: ScaleRules) -> bool:
    """Nobody asks, and has not for so long that nobody needs to stay."""
    is_over = rules.to_zero_after_s is not None and view.idle_s >= rules.to_zero_after_s
    is_released = view.hold is not None and view.hold.kind == "release"
    return (is_over or is_released) and not view.unserved_requests


def _fewer(view: PoolView, why: Why, count: int, present: int, text: str) -> ScaleDecision:
    """Those leave that have the fewest answers, and among them the freest."""
    victims = by_cost_of_leaving(view.serving)[:count]
    names = ", ".join(f"{one.worker_id} ({one.answers} answers, {one.waiting_requests} waiting)" for one in victims)
    return ScaleDecision(
        pool=view.pool,
        kind="down",
        why=why,
        wanted=present - count,
        present=present,
        remove=tuple(victim.worker_id for victim in victims),
        reason=f"removes {names}: {text}",
    )


def _keep(view: PoolView, why: Why, wanted: int, present: int, reason: str) -> ScaleDecision:
    return ScaleDecision(pool=view.pool, kind="keep", why=why, wanted=wanted, present=present, reason=reason)


def _is_attained(view: PoolView, rules: ScaleRules) -> bool:
    judged = view.attainment is not None and view.num_judged >= rules.min_judged
    return judged and not _misses(view, rules)


def _misses(view: PoolView, rules: ScaleRules) -> bool:
    if view.attainment is None or view.num_judged < rules.min_judged:
        return False
    return view.attainment < rules.target_attainment


def _pushes(view: PoolView, rules: ScaleRules, now_s: float, memory: ScaleMemory, needs: Demand, present: int) -> bool:
    """Whether attainment calls for a worker that demand does not: once, unless it helps; never while some come."""
    if not _misses(view, rules) or view.starting or needs.now < _LEAST_USED * present or not present:
        return False
    if now_s - max(memory.up_s, memory.first_look_s) < view.start_s + rules.window_s:
        # What was judged was served by fewer, or while they came.
        return False
    attainment = view.attainment or 0.0
    return memory.pushed_at is None or attainment >= memory.pushed_at + _HELP


def _settled(memory: ScaleMemory, rules: ScaleRules) -> int:
    """What was asked for throughout the last `settle_s`; nothing before the pool was seen for so long."""
    looks, last_s = memory.looks, memory.looks[-1].at_s
    if last_s - memory.first_look_s < rules.settle_s:
        return 0
    count = sum(look.at_s > last_s - rules.settle_s for look in looks)
    # The one before those tells what was asked for when the time began.
    return min(_whole(look.later) for look in looks[-max(count + (rules.settle_s > 0), 1) :])


def _num_leaving(view: PoolView) -> int:
    return len(view.workers) - len(view.serving)


def _whole(workers: float) -> int:
    return math.ceil(workers - _EPSILON)


def _names(spares: Sequence[SpareWorker]) -> str:
    return ", ".join(f"{spare.worker_id} of {spare.pool}" for spare in spares)


def _number(freeness: float) -> str:
    return "unlimited" if freeness == math.inf else f"{freeness:.1f}"
