"""One modelled server: devices, a DRAM and an SSD tier that forget the least recently used, and lines of loads."""

from __future__ import annotations

from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from coldstart.estimate import QUEUED_TIERS, MeasuredLoad, QueuedLoad
from coldstart.estimate import queue_s as line_s
from coldstart.placement_terms import Instance, NodeView

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Mapping

    from coldstart.estimate import LoadHistory, Tier
    from simulator.coldstart.load import Request
    from simulator.coldstart.spec import ClusterSpec, ModelSpec
    from simulator.heap.events import EventHeap

#: `waiting`: for devices that others leave. `leaving`: its request goes to another instance.
LiveState = Literal["waiting", "loading", "running", "leaving", "idle", "gone"]


@dataclass(slots=True, eq=False)
class Live:
    """A model on devices."""

    instance_id: str
    model: str
    node: Machine
    state: LiveState
    request: Request | None = None
    #: The request wrote its first token, or went on, then.
    since_s: float = 0.0
    #: Grows whenever what was planned for it no longer holds.
    plan: int = 0
    idle_since_s: float = 0.0
    #: What a load of it takes from where it came from.
    reload_s: float = 0.0
    #: Its devices are taken since then.
    asked_s: float = 0.0
    #: While it is `leaving`: called when its request ended before it left.
    left: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class _Load:
    load_id: str
    model: str
    tier: Tier
    num_bytes: int
    asked_s: float
    seconds: float
    done: Callable[[], None]
    begun_s: float | None = None


@dataclass(slots=True, eq=False)
class _Tier:
    """Models in it, the one used longest ago first."""

    capacity_bytes: int
    sizes: OrderedDict[str, int] = field(default_factory=OrderedDict[str, int])
    used_bytes: int = 0

    def put(self, model: str, num_bytes: int) -> list[str]:
        """Makes it the last used; returns those that had to go."""
        if model in self.sizes:
            self.sizes.move_to_end(model)
            return []
        gone: list[str] = []
        if num_bytes > self.capacity_bytes:
            return gone
        while self.used_bytes + num_bytes > self.capacity_bytes:
            name, size = self.sizes.popitem(last=False)
            self.used_bytes -= size
            gone.append(name)
        self.sizes[model] = num_bytes
        self.used_bytes += num_bytes
        return gone


class Machine:
    def __init__(
        self, node_id: str, spec: ClusterSpec, models: Mapping[str, ModelSpec], heap: EventHeap, rng: random.Random
    ) -> None:
        self.node_id = node_id
        self.free_devices = spec.devices_per_node
        self.instances: dict[str, Live] = {}
        self._spec = spec
        self._models = models
        self._heap = heap
        self._rng = rng
        self._tiers: dict[Tier, _Tier] = {"dram": _Tier(spec.dram_bytes), "ssd": _Tier(spec.ssd_bytes)}
        self._nearest: dict[str, Tier] = {}
        self._lines: dict[Tier, deque[_Load]] = {tier: deque() for tier in QUEUED_TIERS}
        self._num_loads = 0

    # --- tiers ------------------------------------------------------------------------------------------

    def store(self, tier: Tier, model: str) -> None:
        """Has the model there from now on; others may have to go."""
        gone = self._tiers[tier].put(model, self._models[model].num_bytes)
        for name in (model, *gone):
            nearest: Tier | None = next((one for one in ("dram", "ssd") if name in self._tiers[one].sizes), None)
            if nearest is None:
                self._nearest.pop(name, None)
            else:
                self._nearest[name] = nearest

    def has_room(self, tier: Tier, num_bytes: int) -> bool:
        return self._tiers[tier].used_bytes + num_bytes <= self._tiers[tier].capacity_bytes

    def used_bytes(self, tier: Tier) -> int:
        return self._tiers[tier].used_bytes

    # --- loads ------------------------------------------------------------------------------------------

    def load(self, model: str, done: Callable[[MeasuredLoad], None]) -> None:
        """Loads it from the nearest tier, in line; the whole checkpoint is in all nearer tiers then."""
        tier = self._nearest.get(model, "remote")
        num_bytes = self._models[model].num_bytes
        seconds = num_bytes / self._spec.bytes_per_s[tier] * self._rng.lognormvariate(0.0, self._spec.load_sigma)
        measured = MeasuredLoad(node_id=self.node_id, tier=tier, num_bytes=num_bytes, seconds=seconds, is_direct=True)

        def end() -> None:
            for place in ("ssd", "dram") if tier == "remote" else ("dram",):
                self.store(place, model)
            done(measured)

        self._num_loads += 1
        one = _Load(f"{self.node_id}-{self._num_loads}", model, tier, num_bytes, self._heap.now_s, seconds, end)
        if tier not in QUEUED_TIERS:
            self._heap.after(seconds, lambda _: end(), None)
            return
        self._lines[tier].append(one)
        if len(self._lines[tier]) == 1:
            self._begin(one)

    def _begin(self, one: _Load) -> None:
        one.begun_s = self._heap.now_s
        self._heap.after(one.seconds, self._end, one)

    def _end(self, one: _Load) -> None:
        line = self._lines[one.tier]
        line.popleft()
        if line:
            self._begin(line[0])
        one.done()

    # --- what placement sees ------------------------------------------------------------------------------

    def view(self, history: LoadHistory, eviction_s: Callable[[Live], float]) -> NodeView:
        """`eviction_s`: what letting go of an idle instance is expected to cost."""
        now_s = self._heap.now_s
        speeds: dict[Tier, float] = {
            tier: history.path(self.node_id, tier).bytes_per_s for tier in ("dram", *QUEUED_TIERS)
        }
        lines: dict[Tier, float] = {
            tier: line_s((self._queued(one, now_s) for one in line), tier, speeds[tier])
            for tier, line in self._lines.items()
        }
        return NodeView(
            node_id=self.node_id,
            free_devices=self.free_devices,
            tiers=self._nearest,
            bytes_per_s=speeds,
            queue_s=lines,
            instances=tuple(_instance(one, now_s, eviction_s) for one in self.instances.values()),
        )

    @staticmethod
    def _queued(one: _Load, now_s: float) -> QueuedLoad:
        share = 0.0 if one.begun_s is None else min(1.0, (now_s - one.begun_s) / one.seconds)
        return QueuedLoad(
            load_id=one.load_id,
            tier=one.tier,
            num_bytes=one.num_bytes,
            done_bytes=int(share * one.num_bytes),
            arrived_s=one.asked_s,
        )


def _instance(one: Live, now_s: float, eviction_s: Callable[[Live], float]) -> Instance:
    if one.state == "running":
        assert one.request is not None
        # A request that went on elsewhere is as old as its answer: its tokens are known there.
        elapsed_s = now_s - one.since_s
        return Instance(
            instance_id=one.instance_id,
            model=one.model,
            state="running",
            prompt_tokens=one.request.prompt_tokens + round(one.request.written_tokens),
            elapsed_s=max(0.0, elapsed_s),
        )
    if one.state == "idle":
        return Instance(instance_id=one.instance_id, model=one.model, state="idle", eviction_s=eviction_s(one))
    return Instance(instance_id=one.instance_id, model=one.model, state="fixed")
