"""How devices of a node are freed at the least cost to others: a knapsack over its instances (ServerlessLLM, OSDI'24).

Each instance stays, is let go of if it is idle, or moves to another node. A move costs its load there, in line behind
what is loaded there already, and going on: `a * (t_in + t_out) + b` with t_out = elapsed / time of a token. Moves
change the target for the next ones: the *moved* model's devices are taken there, its load is in line. So a state of the
programme carries what is left on each target. States that are in no way better than another are dropped, which loses
nothing; only where too many are left, the costliest go, and the plan is marked as not exact.

Instances are gone through from small to large, so that in a line at a target small loads come first. Where a target
lacks devices, its idle instances make room, those that are missed least first.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from coldstart.estimate import QUEUED_TIERS
from coldstart.placement_terms import Instance, Move

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.placement_terms import ClusterView, ModelTerms, NodeView

#: Of states with equally many devices freed.
MAX_STATES = 32


class FreeingPlan(NamedTuple):
    cost_s: float
    #: Idle instances of the node to let go of.
    evict: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    is_exact: bool = True


class Room(NamedTuple):
    """What is left on a target."""

    free_devices: int
    #: Of its idle instances, in the order in which they go.
    num_evicted: int
    #: In line, by tier of `QUEUED_TIERS`.
    queue_s: tuple[float, ...]


class Settled(NamedTuple):
    room: Room
    move: Move
    #: Of the move and of what it evicts.
    cost_s: float


class _State(NamedTuple):
    cost_s: float
    moves: tuple[Move, ...]
    evict: tuple[str, ...]
    #: By target, in the order of `targets`.
    rooms: tuple[Room, ...]


class _Prospect(NamedTuple):
    #: Of a load there, and of what it evicts.
    cost_s: float
    node_id: str
    load_s: float
    node: NodeView


def load_s(node: NodeView, model: str, terms: ModelTerms, queue_s: Sequence[float] | None = None) -> float:
    """Until the model is ready on that node if devices are free; infinite where it cannot be had.

    `queue_s`: what is in line by tier of `QUEUED_TIERS`, if it is not what the node tells.
    """
    tier = node.tier_of(model)
    bytes_per_s = node.bytes_per_s.get(tier, 0.0)
    if bytes_per_s <= 0:
        return math.inf
    waits_s = 0.0
    if tier in QUEUED_TIERS:
        waits_s = node.queue_s.get(tier, 0.0) if queue_s is None else queue_s[QUEUED_TIERS.index(tier)]
    return waits_s + terms.num_bytes / bytes_per_s + terms.init_s


def resume_s(instance: Instance, terms: ModelTerms) -> float:
    """Until a request that was moved goes on, once its model is there: its tokens are read again."""
    written_tokens = instance.elapsed_s / terms.token_s
    return terms.resume_s_per_token * (instance.prompt_tokens + written_tokens) + terms.resume_s


def idle_instances(node: NodeView) -> list[Instance]:
    """Those that are missed least first."""
    idle = [one for one in node.instances if one.state == "idle"]
    return sorted(idle, key=lambda one: (one.eviction_s, one.instance_id))


def untouched(node: NodeView) -> Room:
    return Room(node.free_devices, 0, tuple(node.queue_s.get(tier, 0.0) for tier in QUEUED_TIERS))


def settle(
    instance: Instance, node: NodeView, room: Room, idle: Sequence[Instance], models: Mapping[str, ModelTerms]
) -> Settled | None:
    """The instance moved to that node, of which so much is left; None where it does not fit or cannot be loaded."""
    terms = models[instance.model]
    seconds = load_s(node, instance.model, terms, room.queue_s)
    if not node.takes_starts or math.isinf(seconds):
        return None
    free, count, eviction_s = room.free_devices, room.num_evicted, 0.0
    while free < terms.num_devices:
        if count == len(idle):
            return None
        free += models[idle[count].model].num_devices
        eviction_s += idle[count].eviction_s
        count += 1
    tier = node.tier_of(instance.model)
    queue_s = room.queue_s
    if tier in QUEUED_TIERS:
        place = QUEUED_TIERS.index(tier)
        queue_s = (*queue_s[:place], seconds - terms.init_s, *queue_s[place + 1 :])
    evicted = tuple(one.instance_id for one in idle[room.num_evicted : count])
    again_s = resume_s(instance, terms)
    move = Move(
        instance_id=instance.instance_id,
        model=instance.model,
        target=node.node_id,
        tier=tier,
        load_s=seconds,
        resume_s=again_s,
        evict=evicted,
    )
    return Settled(Room(free - terms.num_devices, count, queue_s), move, seconds + again_s + eviction_s)


class Prospects:
    """Where models could go if nobody else went there: reckoned once for all questions about one view."""

    def __init__(self, view: ClusterView) -> None:
        self.view = view
        self._idle = {node.node_id: idle_instances(node) for node in view.nodes}
        self._found: dict[str, list[_Prospect]] = {}
        self._soonest: dict[str, list[tuple[float, str]]] = {}

    def idle(self, node: NodeView) -> list[Instance]:
        return self._idle[node.node_id]

    def of(self, model: str, source: NodeView | None) -> list[_Prospect]:
        """Nodes but this one that could take an instance of the model, the best first."""
        found = self._found.get(model)
        if found is None:
            blank = Instance(instance_id="", model=model, state="running")
            again_s = resume_s(blank, self.view.models[model])
            found = list[_Prospect]()
            for node in self.view.nodes:
                settled = settle(blank, node, untouched(node), self.idle(node), self.view.models)
                if settled is not None:
                    found.append(_Prospect(settled.cost_s - again_s, node.node_id, settled.move.load_s, node))
            found.sort(key=lambda one: one[:2])
            self._found[model] = found
        return [one for one in found if one.node is not source]

    def at_least_s(self, source: NodeView, num_devices: int, *, migrate: bool = True) -> float:
        """No way to free so many devices of the node costs less; infinite where there is none.

        As if no two moves were in each other's way, and nothing had to make room.
        """
        models = self.view.models
        least: list[float] = [0.0, *([math.inf] * num_devices)]
        for item in source.instances:
            if item.state == "idle":
                cost_s = item.eviction_s
            elif item.state == "running" and migrate:
                cost_s = self._least_load_s(item.model, source) + resume_s(item, models[item.model])
            else:
                continue
            freed = models[item.model].num_devices
            for level in range(num_devices, 0, -1):
                least[level] = min(least[level], least[max(0, level - freed)] + cost_s)
        return least[num_devices]

    def _least_load_s(self, model: str, source: NodeView) -> float:
        """At the best other node."""
        two = self._soonest.get(model)
        if two is None:
            two = sorted((one.load_s, one.node_id) for one in self.of(model, None))[:2]
            self._soonest[model] = two
        return next((seconds for seconds, node_id in two if node_id != source.node_id), math.inf)


def cheapest(
    prospects: Prospects,
    source: NodeView,
    num_devices: int,
    *,
    migrate: bool = True,
    below_s: float = math.inf,
) -> FreeingPlan | None:
    """The cheapest way to free so many more devices of the node, if one costs less than `below_s`.

    Of ways that cost the same, the one with the fewest moves.
    """
    view = prospects.view
    items = [one for one in source.instances if one.state == "idle" or (one.state == "running" and migrate)]
    items.sort(key=lambda one: (view.models[one.model].num_bytes, one.instance_id))
    if sum(view.models[one.model].num_devices for one in items) < num_devices:
        return None
    targets, wanted = _targets(prospects, source, [one for one in items if one.state == "running"], num_devices)
    idle = [prospects.idle(node) for node in targets]
    levels: list[list[_State]] = [[] for _ in range(num_devices + 1)]
    levels[0].append(_State(0.0, (), (), tuple(untouched(node) for node in targets)))
    is_exact = True
    for item in items:
        freed = view.models[item.model].num_devices
        grown = [list(states) for states in levels]
        # Many states are alike at a target.
        known: dict[tuple[int, Room], Settled | None] = {}
        for level, states in enumerate(levels[:-1]):
            into = grown[min(level + freed, num_devices)]
            for state in states:
                if item.state == "idle":
                    into.append(
                        state._replace(cost_s=state.cost_s + item.eviction_s, evict=(*state.evict, item.instance_id))
                    )
                    continue
                for place in wanted[item.instance_id]:
                    room = state.rooms[place]
                    if (place, room) not in known:
                        known[place, room] = settle(item, targets[place], room, idle[place], view.models)
                    settled = known[place, room]
                    if settled is not None and state.cost_s + settled.cost_s < below_s:
                        rooms = (*state.rooms[:place], settled.room, *state.rooms[place + 1 :])
                        moves = (*state.moves, settled.move)
                        into.append(_State(state.cost_s + settled.cost_s, moves, state.evict, rooms))
        levels = [_undominated(states, below_s) for states in grown]
        # At the last level nothing more is placed: the best is enough.
        levels[-1] = levels[-1][:1]
        is_exact = is_exact and all(len(states) <= MAX_STATES for states in levels)
        levels = [states[:MAX_STATES] for states in levels]
    if not levels[-1]:
        return None
    best = levels[-1][0]
    return FreeingPlan(best.cost_s, best.evict, best.moves, is_exact)


def _targets(
    prospects: Prospects, source: NodeView, running: Sequence[Instance], num_devices: int
) -> tuple[list[NodeView], dict[str, list[int]]]:
    """Nodes that are worth looking at, and for each instance which of them.

    A plan has n moves at most: one for each device, and none in vain. The n best targets of each instance are enough:
    the others take at most n - 1 of them, and a target that nobody takes is as good as it looks now. One that others
    have made room at already may be better than that by its evictions: it is looked at where it could then be better
    than the n-th.
    """
    count = min(len(running), num_devices)
    best: dict[str, list[_Prospect]] = {}
    for one in running:
        if one.model not in best:
            found = prospects.of(one.model, source)
            last_s = found[count - 1].cost_s if len(found) >= count else math.inf
            best[one.model] = [some for rank, some in enumerate(found) if rank < count or some.load_s < last_s]
    nodes = {some.node_id: some.node for found in best.values() for some in found}
    ids = sorted(nodes)
    places = {node_id: place for place, node_id in enumerate(ids)}
    wanted = {one.instance_id: [places[some.node_id] for some in best[one.model]] for one in running}
    return [nodes[node_id] for node_id in ids], wanted


def _undominated(states: list[_State], below_s: float) -> list[_State]:
    """Without those that cost too much, or that another one is as good as in every respect; the cheapest first.

    One more than `MAX_STATES` tells that there are too many.
    """
    states.sort(key=lambda one: (one.cost_s, len(one.moves)))
    kept: list[_State] = []
    for state in states:
        if state.cost_s >= below_s or len(kept) > MAX_STATES:
            break
        if not any(_as_good(other.rooms, state.rooms) for other in kept):
            kept.append(state)
    return kept


def _as_good(these: tuple[Room, ...], those: tuple[Room, ...]) -> bool:
    """Whether whatever can be placed in those rooms can be placed in these for no more."""
    for one, other in zip(these, those, strict=True):
        if one.num_evicted != other.num_evicted or one.free_devices < other.free_devices:
            return False
        if any(here > there for here, there in zip(one.queue_s, other.queue_s, strict=True)):
            return False
    return True
