"""Starts of many models on few devices: the production placement over modelled servers and requests.

Each instance serves one request at a time, as in the published evaluation, so concurrent requests for one model need
several. What a placement decides is carried out in full: loads wait in line at their tier, a move loads at its target,
reads the tokens again while its request goes on, and lets go of its devices then; a stopped request goes back in line
with its old place, and reads its tokens again when its model is there. Bandwidths and initialisation are learned from
the study's own loads; at first half of what the hardware does is believed. An idle instance is kept for as long as its
load took (as published), unless its devices are wanted.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from coldstart import keep_alive
from coldstart.estimate import LoadHistory
from coldstart.keep_alive import HeldModel, IdleTimes, KeepRules
from coldstart.placement import next_start, policy
from coldstart.placement_baselines import locality_only, nearest_stopping, random_place, shepherd
from coldstart.placement_terms import ClusterView, ModelTerms, PlacementRules, WaitingStart
from simulator.coldstart.load import Request, model_names, requests
from simulator.coldstart.machine import Live, Machine
from simulator.heap.events import EventHeap

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from coldstart.estimate import MeasuredLoad, Tier
    from coldstart.placement_terms import Move, Place, StartDecision
    from simulator.coldstart.spec import StudySpec


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    #: All of them, in order of arrival.
    requests: tuple[Request, ...]
    #: Of those after the warm-up.
    start_up_s: NDArray[np.float64]
    paused_s: NDArray[np.float64]
    num_moves: int
    num_preemptions: int
    #: Starts by where they loaded from; `device`: there was an idle instance.
    starts: dict[Tier, int]
    #: Of the devices' time until the last answer.
    used_share: float
    #: Of loads: estimated when they were decided, less what they took, in seconds.
    estimate_errors_s: NDArray[np.float64]


def simulate(spec: StudySpec) -> StudyResult:
    """The same spec gives the same result."""
    return _Study(spec).run()


class _Study:
    def __init__(self, spec: StudySpec) -> None:
        self._spec = spec
        self._cluster = spec.cluster
        self._heap = EventHeap()
        self._models = model_names(spec)
        self._terms = {
            name: ModelTerms(
                num_bytes=model.num_bytes,
                num_devices=model.num_devices,
                init_s=self._cluster.init_s,
                resume_s_per_token=model.prompt_token_s,
                resume_s=self._cluster.resume_s,
                token_s=model.token_s,
            )
            for name, model in self._models.items()
        }
        self._rng = random.Random(f"coldstart noise {spec.load.seed}")
        self._machines = {
            name: Machine(name, self._cluster, self._models, self._heap, self._rng)
            for name in (f"node-{number:02}" for number in range(self._cluster.num_nodes))
        }
        self._history = LoadHistory({tier: value / 2 for tier, value in self._cluster.bytes_per_s.items()})
        self._place = _policy(spec)
        self._rules = PlacementRules()
        self._times = IdleTimes(bin_s=0.25)
        self._waiting: list[Request] = []
        self._requests = requests(spec)
        self._num_instances = 0
        self._num_moves = 0
        self._starts: dict[Tier, int] = {"device": 0, "dram": 0, "ssd": 0, "remote": 0}
        self._errors_s: list[float] = []
        self._busy_s = 0.0

    def run(self) -> StudyResult:
        self._fill_disks()
        for request in self._requests:
            self._heap.at(request.arrived_s, self._arrive, request)
        self._heap.run()
        if self._waiting or any(one.finished_s is None for one in self._requests):
            raise RuntimeError(f"{len(self._waiting)} requests were never placed")
        counted = self._requests[round(self._spec.load.warm_up * len(self._requests)) :]
        devices = self._cluster.num_nodes * self._cluster.devices_per_node
        return StudyResult(
            requests=tuple(self._requests),
            start_up_s=np.array([one.start_up_s for one in counted]),
            paused_s=np.array([one.paused_s for one in counted]),
            num_moves=self._num_moves,
            num_preemptions=sum(one.num_preemptions for one in self._requests),
            starts=self._starts,
            used_share=self._busy_s / (devices * max(one.finished_s or 0.0 for one in self._requests)),
            estimate_errors_s=np.array(self._errors_s),
        )

    def _fill_disks(self) -> None:
        """As published: copies of all models, one each and round robin over the disks, until these are full."""
        machines = list(self._machines.values())
        for copy in range(len(machines)):
            for number, (name, model) in enumerate(self._models.items()):
                machine = machines[(number + copy) % len(machines)]
                if machine.has_room("ssd", model.num_bytes):
                    machine.store("ssd", name)

    # --- deciding -----------------------------------------------------------------------------------------

    def _arrive(self, request: Request) -> None:
        self._waiting.append(request)
        self._look()

    def _look(self) -> None:
        while self._waiting:
            awaited = {one.model for one in self._waiting}
            eviction_s = partial(self._eviction_s, awaited)
            nodes = tuple(machine.view(self._history, eviction_s) for machine in self._machines.values())
            view = ClusterView(nodes=nodes, models=self._terms)
            waiting = [
                WaitingStart(start_id=f"{one.number:08}", model=one.model, arrived_s=one.arrived_s)
                for one in self._waiting
            ]
            found = next_start(view, waiting, self._place, self._heap.now_s, self._rules)
            if found is None:
                return
            start, decision = found
            request = next(one for one in self._waiting if one.number == int(start.start_id))
            self._waiting.remove(request)
            self._carry_out(request, decision)

    def _carry_out(self, request: Request, decision: StartDecision) -> None:
        machine = self._machines[str(decision.node_id)]
        assert decision.tier is not None
        self._starts[decision.tier] += 1
        if decision.kind == "reuse":
            self._begin(machine.instances[str(decision.instance_id)], request)
            return
        self._evict(machine, decision.evict)
        for name in decision.stop:
            self._stop(machine.instances[name])
        live = self._new(machine, request.model, request)
        missing = self._models[request.model].num_devices - machine.free_devices
        machine.free_devices = max(0, -missing)
        if missing <= 0:
            self._load(live, decision.load_s)
            return
        live.state = "waiting"
        left = len(decision.moves)

        def got(num_devices: int) -> None:
            nonlocal missing, left
            missing -= num_devices
            left -= 1
            if left == 0:
                machine.free_devices -= missing
                self._load(live, None)

        for move in decision.moves:
            self._move(machine, move, got)

    def _eviction_s(self, awaited: set[str], live: Live) -> float:
        if live.model in awaited:
            return live.reload_s
        return keep_alive.loss_s(self._held(live), _keep_rules(live), self._times, self._heap.now_s)

    def _held(self, live: Live) -> HeldModel:
        return HeldModel(
            model=live.model,
            num_bytes=self._models[live.model].num_bytes,
            reload_s=live.reload_s,
            idle_since_s=live.idle_since_s,
        )

    def _evict(self, machine: Machine, names: tuple[str, ...]) -> None:
        for name in names:
            self._let_go(machine.instances[name])

    # --- instances ----------------------------------------------------------------------------------------

    def _new(self, machine: Machine, model: str, request: Request | None) -> Live:
        self._num_instances += 1
        live = Live(f"{model}/{self._num_instances:06}", model, machine, "loading", request)
        live.asked_s = self._heap.now_s
        machine.instances[live.instance_id] = live
        return live

    def _load(self, live: Live, expected_s: float | None) -> None:
        """`expected_s`: if the load begins as it was decided."""
        live.state = "loading"
        asked_s = self._heap.now_s

        def loaded(measured: MeasuredLoad) -> None:
            live.reload_s = measured.seconds
            self._initialise(live, measured, lambda: ready())

        def ready() -> None:
            if expected_s is not None:
                self._errors_s.append(expected_s - (self._heap.now_s - asked_s))
            assert live.request is not None
            self._begin(live, live.request)

        live.node.load(live.model, loaded)

    def _initialise(self, live: Live, measured: MeasuredLoad, ready: Callable[[], None]) -> None:
        self._history.observe(measured)
        seconds = self._cluster.init_s * self._rng.lognormvariate(0.0, self._cluster.load_sigma)

        def done(_: None) -> None:
            self._history.observe_init(live.model, seconds)
            ready()

        self._heap.after(seconds, done, None)

    def _begin(self, live: Live, request: Request) -> None:
        """The model is there, and the request reads its prompt, or all its tokens again."""
        now_s = self._heap.now_s
        if live.state == "idle":
            self._times.observe(live.model, now_s - live.idle_since_s)
        read_s = self._models[live.model].prompt_token_s * (request.prompt_tokens + request.written_tokens)
        if request.begun_s is None:
            request.begun_s = now_s
        if request.stopped_s is not None:
            request.paused_s += now_s - request.stopped_s + read_s
            request.stopped_s = None
        self._go_on(live, request, read_s)

    def _go_on(self, live: Live, request: Request, delay_s: float) -> None:
        live.state = "running"
        live.request = request
        live.since_s = self._heap.now_s + delay_s
        live.plan += 1
        left_s = (request.output_tokens - request.written_tokens) * self._models[live.model].token_s
        self._heap.at(live.since_s + left_s, partial(self._finish, live.plan), live)

    def _finish(self, plan: int, live: Live) -> None:
        if live.plan != plan or live.request is None:
            self._heap.overtaken()
            return
        live.request.finished_s = self._heap.now_s
        live.request = None
        self._busy_s += self._models[live.model].num_devices * (self._heap.now_s - live.asked_s)
        live.asked_s = self._heap.now_s
        if live.state == "leaving":
            # Its move finds that there is nothing left to move.
            assert live.left is not None
            live.left()
        else:
            self._rest(live)
        self._look()

    def _rest(self, live: Live) -> None:
        live.state = "idle"
        live.plan += 1
        live.idle_since_s = live.asked_s = self._heap.now_s
        look = keep_alive.window(self._held(live), _keep_rules(live), self._times)
        self._heap.after(look.until_s, partial(self._expire, live.plan), live)

    def _expire(self, plan: int, live: Live) -> None:
        if live.state != "idle" or live.plan != plan:
            self._heap.overtaken()
            return
        self._let_go(live)
        self._look()

    def _let_go(self, live: Live) -> None:
        self._remove(live)
        live.node.free_devices += self._models[live.model].num_devices

    def _remove(self, live: Live) -> None:
        live.state = "gone"
        live.plan += 1
        del live.node.instances[live.instance_id]

    # --- making room --------------------------------------------------------------------------------------

    def _stop(self, live: Live) -> None:
        request = self._leave(live)
        live.node.free_devices += self._models[live.model].num_devices
        request.stopped_s = self._heap.now_s
        request.num_preemptions += 1
        self._waiting.append(request)

    def _move(self, machine: Machine, move: Move, got: Callable[[int], None]) -> None:
        live, target = machine.instances[move.instance_id], self._machines[move.target]
        num_devices = self._models[live.model].num_devices
        self._evict(target, move.evict)
        target.free_devices -= num_devices
        assert target.free_devices >= 0, "a move was decided for devices that are not free"
        there = self._new(target, live.model, None)
        live.state = "leaving"

        def finished() -> None:
            self._remove(live)
            got(num_devices)

        live.left = finished

        def loaded(measured: MeasuredLoad) -> None:
            there.reload_s = measured.seconds
            self._initialise(there, measured, read)

        def read() -> None:
            request = live.request
            if live.state != "leaving" or request is None:
                self._rest(there)
                self._look()
                return
            tokens = request.prompt_tokens + request.written_tokens + self._written(live)
            again_s = self._models[live.model].prompt_token_s * tokens + self._cluster.resume_s
            self._heap.after(again_s, switch, None)

        def switch(_: None) -> None:
            if live.state != "leaving" or live.request is None:
                self._rest(there)
                self._look()
                return
            request = self._leave(live)
            gap_s = self._models[live.model].prompt_token_s * self._cluster.gap_tokens + self._cluster.resume_s
            request.paused_s += gap_s
            request.num_moves += 1
            self._num_moves += 1
            self._go_on(there, request, gap_s)
            got(num_devices)

        target.load(live.model, loaded)

    def _leave(self, live: Live) -> Request:
        request = live.request
        assert request is not None
        request.written_tokens += self._written(live)
        self._busy_s += self._models[live.model].num_devices * (self._heap.now_s - live.asked_s)
        self._remove(live)
        return request

    def _written(self, live: Live) -> float:
        """Tokens since it began there."""
        return max(0.0, (self._heap.now_s - live.since_s) / self._models[live.model].token_s)


def _keep_rules(live: Live) -> KeepRules:
    """Of instances on devices, as published: as long as they took to load."""
    return KeepRules(way="fixed", fixed_s=live.reload_s)


def _policy(spec: StudySpec) -> Place:
    match spec.placement:
        case "ours":
            return policy()
        case "random":
            return random_place(random.Random(f"coldstart place {spec.load.seed}"))
        case "locality_only":
            return locality_only
        case "shepherd":
            return shepherd
        case "nearest_stopping":
            return nearest_stopping
