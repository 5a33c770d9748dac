"""What holding idle models costs and saves: one memory, many models, a day or two of requests.

The production policies decide; nothing else is modelled but loads and answers of a fixed length. A model that answers
is held in any case, so only idle time is counted.
"""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal

from coldstart.keep_alive import HeldModel, IdleTimes, KeepRules, decide, make_room
from simulator.heap.events import EventHeap
from workload.arrivals import Constant, Diurnal, Gamma, Poisson

if TYPE_CHECKING:
    from collections.abc import Iterator

    from workload.arrivals import Arrivals

#: `gamma`: each model has bursts. `azure`: a third of the models is called by timers, the others by people, some of
#: them by day only, some in bursts; rates over orders of magnitude (after "Serverless in the Wild", ATC'20, section 3).
Traffic = Literal["gamma", "azure"]

_TIMERS_S = (300.0, 600.0, 900.0, 1800.0, 3600.0, 7200.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldingSpec:
    rules: KeepRules
    traffic: Traffic = "gamma"
    #: Of each model, in order.
    sizes_bytes: tuple[int, ...] = tuple([13_400_000_000] * 32 + [26_000_000_000] * 16 + [60_000_000_000] * 8)
    #: For all of them; None: as much as wanted.
    capacity_bytes: int | None = None
    #: From where models are loaded that are not held.
    bytes_per_s: float = 1.25e9
    answer_s: float = 10.0
    duration_s: float = 48 * 3600.0
    #: What is learned before is not counted.
    warm_up_s: float = 24 * 3600.0
    #: Mean over the models of the time between two requests, more or less.
    mean_gap_s: float = 1200.0
    cv: float = 8.0
    seed: int = 1


@dataclass(slots=True)
class HoldingResult:
    num_requests: int = 0
    num_cold: int = 0
    #: Until the model was there, all requests together.
    waited_s: float = 0.0
    #: Idle and held, warmed ones included.
    idle_gb_hours: float = 0.0
    num_warmed: int = 0
    #: Times a model had to be loaded although nothing idle was left to let go of.
    num_over: int = 0

    @property
    def cold_share(self) -> float:
        return self.num_cold / max(1, self.num_requests)


@dataclass(slots=True, eq=False)
class _Model:
    name: str
    num_bytes: int
    reload_s: float
    is_held: bool = False
    ready_s: float = 0.0
    running: int = 0
    idle_since_s: float = 0.0
    held_since_s: float = 0.0
    was_used: bool = False
    #: Grows whenever what was planned for it no longer holds.
    plan: int = 0


def simulate_holding(spec: HoldingSpec) -> HoldingResult:
    """The same spec gives the same result."""
    return _Holding(spec).run()


class _Holding:
    def __init__(self, spec: HoldingSpec) -> None:
        self._spec = spec
        self._heap = EventHeap()
        self._times = IdleTimes()
        self._models = {
            f"m{number:02}": _Model(f"m{number:02}", num_bytes, num_bytes / spec.bytes_per_s)
            for number, num_bytes in enumerate(spec.sizes_bytes)
        }
        self._result = HoldingResult()

    def run(self) -> HoldingResult:
        for at_s, name in itertools.takewhile(lambda one: one[0] < self._spec.duration_s, _traffic(self._spec)):
            self._heap.at(at_s, self._arrive, self._models[name])
        self._heap.at(self._spec.duration_s, self._close, None)
        self._heap.run()
        return self._result

    def _close(self, _: None) -> None:
        for model in self._models.values():
            self._count_idle(model)
            model.plan += 1

    def _arrive(self, model: _Model) -> None:
        now_s = self._heap.now_s
        counts = now_s >= self._spec.warm_up_s
        if not model.running:
            if model.was_used:
                self._times.observe(model.name, now_s - model.idle_since_s)
            self._count_idle(model)
            model.plan += 1
        if not model.is_held:
            self._result.num_cold += counts
            self._hold(model)
        model.was_used = True
        model.running += 1
        waits_s = max(0.0, model.ready_s - now_s)
        self._result.num_requests += counts
        self._result.waited_s += waits_s * counts
        self._heap.after(waits_s + self._spec.answer_s, self._finish, model)

    def _finish(self, model: _Model) -> None:
        model.running -= 1
        if not model.running and self._heap.now_s < self._spec.duration_s:
            model.idle_since_s = model.held_since_s = self._heap.now_s
            self._look(model.plan, model)

    def _look(self, plan: int, model: _Model) -> None:
        """Asks the policy about an idle model, and again when it says so."""
        if plan != model.plan or model.running:
            self._heap.overtaken()
            return
        now_s = self._heap.now_s
        decision = decide(self._held(model), self._spec.rules, self._times, now_s)
        if decision.kind == "release" and model.is_held:
            self._release(model)
        elif decision.kind == "warm" and not model.is_held:
            self._hold(model)
            self._result.num_warmed += now_s >= self._spec.warm_up_s
        if now_s < decision.next_s < self._spec.duration_s:
            self._heap.at(decision.next_s, partial(self._look, plan), model)

    def _hold(self, model: _Model) -> None:
        now_s, spec = self._heap.now_s, self._spec
        if spec.capacity_bytes is not None:
            used = sum(one.num_bytes for one in self._models.values() if one.is_held)
            over = used + model.num_bytes - spec.capacity_bytes
            idle = [self._held(one) for one in self._models.values() if one.is_held and not one.running]
            gone = make_room(idle, over, spec.rules, self._times, now_s) if over > 0 else []
            self._result.num_over += gone is None
            for one in gone or ():
                self._release(self._models[one.model])
        model.is_held = True
        model.held_since_s = now_s
        model.ready_s = now_s + model.reload_s

    def _release(self, model: _Model) -> None:
        self._count_idle(model)
        model.is_held = False

    def _count_idle(self, model: _Model) -> None:
        """What it was held for nothing since it was counted last."""
        if model.is_held and not model.running:
            since_s = max(model.held_since_s, self._spec.warm_up_s)
            idle_s = max(0.0, self._heap.now_s - since_s)
            self._result.idle_gb_hours += model.num_bytes / 1e9 * idle_s / 3600.0
            model.held_since_s = self._heap.now_s

    def _held(self, model: _Model) -> HeldModel:
        return HeldModel(
            model=model.name,
            num_bytes=model.num_bytes,
            reload_s=model.reload_s,
            idle_since_s=model.idle_since_s,
            is_held=model.is_held,
        )


def _traffic(spec: HoldingSpec) -> Iterator[tuple[float, str]]:
    rng = random.Random(f"holding {spec.traffic} {spec.seed}")
    names = [f"m{number:02}" for number in range(len(spec.sizes_bytes))]
    streams = [_stream(name, _arrivals(spec, rng), rng.random() * 3600.0, rng.random()) for name in names]
    return heapq.merge(*streams)


def _stream(name: str, arrivals: Arrivals, first_s: float, seed: float) -> Iterator[tuple[float, str]]:
    for at_s in arrivals.times(random.Random(seed)):
        yield first_s + at_s, name


def _arrivals(spec: HoldingSpec, rng: random.Random) -> Arrivals:
    rate_rps = rng.lognormvariate(0.0, 1.5) / spec.mean_gap_s
    if spec.traffic == "gamma":
        return Gamma(rate_rps, spec.cv)
    kind = rng.random()
    if kind < 0.33:
        return Constant(1.0 / rng.choice(_TIMERS_S))
    if kind < 0.6:
        return Poisson(rate_rps)
    return Diurnal(rate_rps, 0.9) if kind < 0.8 else Gamma(rate_rps, 4.0)
