"""What placement is measured against. An idle instance of the model is taken first by all of them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from coldstart.making_room import FreeingPlan, Prospects, cheapest
from coldstart.placement import by_load, place, reuse
from coldstart.placement_terms import StartDecision

if TYPE_CHECKING:
    import random

    from coldstart.placement_terms import ClusterView, NodeView, Place


def random_place(rng: random.Random) -> Place:
    """Any node that has the devices, as schedulers of serverless platforms do that know nothing of checkpoints."""

    def choose(view: ClusterView, model: str) -> StartDecision:
        reused = reuse(view, model)
        if reused is not None:
            return reused
        fitting = [
            (seconds, node, plan)
            for seconds, node in sorted(by_load(view, model), key=lambda one: one[1].node_id)
            if (plan := _without_moves(view, node, model)) is not None
        ]
        if not fitting:
            return StartDecision(kind="wait", reason=f"no node has devices for {model}")
        seconds, node, plan = rng.choice(fitting)
        return _start(node, model, seconds, plan, f"{model} at {node.node_id}, one of {len(fitting)} with room")

    return choose


def locality_only(view: ClusterView, model: str) -> StartDecision:
    """Where the model is ready soonest once devices are free, and nowhere else: it waits for them."""
    reused = reuse(view, model)
    if reused is not None:
        return reused
    ranked = by_load(view, model)
    if not ranked:
        return StartDecision(kind="wait", reason=f"no node knows where to load {model} from")
    seconds, node = ranked[0]
    plan = _without_moves(view, node, model)
    if plan is None:
        words = f"{model} is nearest at {node.node_id} ({node.tier_of(model)}), which has no devices for it"
        return StartDecision(kind="wait", node_id=node.node_id, reason=words)
    return _start(node, model, seconds, plan, f"{model} is nearest at {node.node_id} ({node.tier_of(model)})")


def shepherd(view: ClusterView, model: str) -> StartDecision:
    """The choice of `place`, but whoever would move is stopped, and starts again: Shepherd (NSDI'23) in the form in
    which ServerlessLLM (OSDI'24) compares with it, with the same estimates, so in principle on the same devices."""
    decision = place(view, model)
    if not decision.moves:
        return decision
    stopped = tuple(move.instance_id for move in decision.moves)
    return replace(decision, moves=(), stop=stopped, reason=f"{decision.reason} (stopped, not moved)")


def nearest_stopping(view: ClusterView, model: str) -> StartDecision:
    """Stops without asking what that costs: where a node without devices is nearer than those that have some, the
    requests that have run for the shortest time there. Nobody is stopped where no devices are free: all are equal."""
    reused = reuse(view, model)
    if reused is not None:
        return reused
    need = view.models[model].num_devices
    better: tuple[NodeView, float, tuple[str, ...]] | None = None
    for seconds, node in by_load(view, model):
        plan = _without_moves(view, node, model)
        if plan is None:
            if better is None:
                stopped = _youngest(view, node, need - node.free_devices)
                better = None if stopped is None else (node, seconds, stopped)
            continue
        if better is None or better[1] >= seconds:
            return _start(node, model, seconds, plan, f"{model} at {node.node_id} ({node.tier_of(model)})")
        at, nearer_s, stopped = better
        words = f"{model} at {at.node_id} ({at.tier_of(model)}), where {', '.join(stopped)} stop"
        idle = {one.instance_id for one in at.instances if one.state == "idle"}
        evicted = tuple(name for name in stopped if name in idle)
        found = _start(at, model, nearer_s, FreeingPlan(0.0, evicted), words)
        return replace(found, stop=tuple(name for name in stopped if name not in idle))
    return StartDecision(kind="wait", reason=f"no node has devices for {model}")


def _youngest(view: ClusterView, node: NodeView, num_devices: int) -> tuple[str, ...] | None:
    """Idle instances, then running ones from the youngest on, that hold so many devices; None where there are fewer."""
    able = [one for one in node.instances if one.state != "fixed"]
    able.sort(key=lambda one: (one.state != "idle", one.elapsed_s, one.instance_id))
    chosen: list[str] = []
    for one in able:
        if num_devices <= 0:
            break
        chosen.append(one.instance_id)
        num_devices -= view.models[one.model].num_devices
    return tuple(chosen) if num_devices <= 0 else None


def _without_moves(view: ClusterView, node: NodeView, model: str) -> FreeingPlan | None:
    lacks = view.models[model].num_devices - node.free_devices
    return FreeingPlan(0.0) if lacks <= 0 else cheapest(Prospects(view), node, lacks, migrate=False)


def _start(node: NodeView, model: str, seconds: float, plan: FreeingPlan, reason: str) -> StartDecision:
    return StartDecision(
        kind="start",
        node_id=node.node_id,
        tier=node.tier_of(model),
        evict=plan.evict,
        load_s=seconds,
        cost_s=seconds + plan.cost_s,
        reason=reason,
    )
