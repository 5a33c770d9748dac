"""How many workers a pool's load needs, as a real number: now, and once a worker that is begun now would be ready.

Each of these is counted in workers, and the largest is the demand:

- *memory* (Llumnix, OSDI 2024, section 4.4, solved for the number of workers): the mean freeness of n workers with load
  spread evenly is F = (n * M - V) / B, so that F >= low needs n = (V + low * B) / M. All that waits counts in V, not
  only the head of the line: queued work is demand.
- *time*: the reading of prompts that comes in, over the share of a worker's time at which waiting stays within bounds
  (of a queue with service time s, waiting is about s * rho / (1 - rho): rho = d / (d + s) for a delay of d), plus the
  answers that are written over those that one worker writes within their TPOT.
- *queue*: what would still be waiting when a new worker could be ready, and what comes from then on, worked off within
  `recover_s` down to the delay that is allowed. What the present workers will have done by then asks for nobody: a
  burst that is shorter than a start is not answered with a start.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.policy.scaling_terms import Look, PoolView, ScaleRules

#: Of a worker's time, for reading prompts: less is waste, more is a queue whenever two come at once.
_LEAST_BUSY, _MOST_BUSY = 0.5, 0.9
#: A rise is foreseen to go on to so much of what is there at most.
_MOST_GROWTH = 2.0
#: Parts of the window that must each be above the one before: a step is no growth.
_GROWTH_PARTS = 4
#: A change of arrivals counts beyond so many standard deviations of a Poisson count.
_NOISE = 2.0
#: A start that takes so many times its estimate is not waited for.
_OVERDUE = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    #: Workers for the load as it is, the queue left out.
    now: float
    #: Workers for what there will be.
    later: float
    #: In words.
    text: str


def coming(view: PoolView) -> int:
    """Workers that start, and have not taken far longer than starts take."""
    return sum(one.age_s <= _OVERDUE * max(one.takes_s, view.start_s, 1.0) for one in view.starting)


def demand(view: PoolView, rules: ScaleRules, horizon_s: float, looks: Sequence[Look] = ()) -> Demand:
    """`horizon_s`: until a worker that is begun now would be ready; `looks`: those before this one, for growth."""
    shift = _shift(view)
    memory = _memory(view, rules)
    busy = _busy_share(view, rules)
    work_rate = view.work_rate * shift
    answers = sum(worker.answers + worker.waiting_requests for worker in view.workers)
    writing = answers / view.answers_limit if view.answers_limit else 0.0
    reading = work_rate / busy
    now = max(memory, reading + writing)
    # Answers end as they would; of those that come there are fewer.
    left = 1.0
    if shift < 1.0 and view.answer_s is not None:
        left = shift + (1.0 - shift) * math.exp(-horizon_s / max(view.answer_s, 1e-3))
    growth = growth_per_s([*looks_within(looks, rules)], rules.window_s)
    level = max(memory * left, reading + writing * left) + growth * horizon_s
    queue, waiting_s = _queue(view, rules, work_rate, horizon_s)
    unserved = 1.0 if view.unserved_requests else 0.0
    later = max(min(level, _MOST_GROWTH * now), queue, unserved)
    parts = [
        f"memory {memory:.2f}",
        f"reading {reading:.2f} ({work_rate:.2f} worker-s/s at {busy:.0%})",
        *([f"writing {writing:.2f}"] if writing else []),
        *([f"queue {queue:.2f} ({waiting_s:.1f} worker-s will wait)"] if waiting_s > 0 else []),
        *([f"growing {growth * 60.0:.2f} a minute"] if growth * 60.0 >= 0.005 else []),
        *([f"arrivals x{shift:.2f}"] if shift != 1.0 else []),
        *([f"{view.unserved_requests} requests found nobody"] if unserved else []),
    ]
    return Demand(now=now, later=later, text=", ".join(parts))


def growth_per_s(looks: Sequence[Look], window_s: float) -> float:
    """Workers a second by which demand rises throughout the window; 0 for less than a window, for a step, or a fall."""
    if len(looks) < 2 * _GROWTH_PARTS or looks[-1].at_s - looks[0].at_s < 0.75 * window_s:
        return 0.0
    size = len(looks) / _GROWTH_PARTS
    parts = [looks[round(i * size) : round((i + 1) * size)] for i in range(_GROWTH_PARTS)]
    means = [sum(look.now for look in part) / len(part) for part in parts]
    times = [sum(look.at_s for look in part) / len(part) for part in parts]
    rises = [
        (after - before) / (end - begin)
        for before, after, begin, end in zip(means, means[1:], times, times[1:], strict=False)
        if end > begin
    ]
    return max(0.0, min(rises, default=0.0))


def looks_within(looks: Sequence[Look], rules: ScaleRules) -> list[Look]:
    """Those of the last window."""
    return [look for look in looks if look.at_s >= looks[-1].at_s - rules.window_s]


def _memory(view: PoolView, rules: ScaleRules) -> float:
    """(V + low * B) / M."""
    size = view.memory_tokens
    if size <= 0:
        return 0.0
    answers = sum(worker.answers + worker.waiting_requests for worker in view.workers)
    return (view.demand_tokens + rules.freeness_low * answers) / size


def _busy_share(view: PoolView, rules: ScaleRules) -> float:
    """Of a worker's time that reading may take."""
    service_s = view.work_rate * rules.window_s / view.arrivals if view.arrivals else 0.0
    share = rules.queue_delay_s / (rules.queue_delay_s + service_s)
    return min(max(share, _LEAST_BUSY), _MOST_BUSY)


def _queue(view: PoolView, rules: ScaleRules, work_rate: float, horizon_s: float) -> tuple[float, float]:
    """Workers for what will wait at the horizon, and how much that is, in worker-seconds."""
    waiting_s = sum(worker.queue_delay_s for worker in view.workers)
    if not waiting_s:
        return 0.0, 0.0
    done_s = len(view.serving) * horizon_s
    for one in view.starting:
        # Whoever comes before the horizon works from then on.
        done_s += max(0.0, horizon_s - max(0.0, one.takes_s - one.age_s)) if one.takes_s > 0 else horizon_s
    left_s = max(0.0, waiting_s + work_rate * horizon_s - done_s)
    within_s = max(rules.recover_s, horizon_s)
    return (left_s + work_rate * within_s) / (within_s + rules.queue_delay_s), left_s


def _shift(view: PoolView) -> float:
    """Requests that come lately over those of the window; 1 where chance explains the difference."""
    expected = view.arrivals * view.recent_share
    if abs(view.recent_arrivals - expected) <= _NOISE * math.sqrt(max(expected, 1.0)):
        return 1.0
    return view.recent_arrivals / max(expected, 1.0)
