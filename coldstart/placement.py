"""Which node starts a model now: where it costs least, others' loss included (ServerlessLLM, OSDI'24, section 6).

For each node the cost is the time until the model is ready there, and, where devices are missing, the cheapest way to
free them (`coldstart.making_room`): idle instances are let go of, running ones move to other nodes. An idle instance of
the model itself is taken first. The least cost wins; of equal ones a node with free devices, then the smaller node id.
Where no node can make room the start waits, and is asked about again when devices are let go of.

Not copied from the released scheduler: a fixed PCIe bandwidth; bandwidths of the page cache; skipping models that are
on no node; lines in the order of models instead of arrival; taking the incoming model's devices at a move's target.

The same view and question always give the same decision. Baselines are in `coldstart.placement_baselines`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from coldstart.making_room import FreeingPlan, Prospects, cheapest, load_s
from coldstart.placement_terms import (
    ClusterView,
    Instance,
    InstanceState,
    ModelTerms,
    Move,
    NodeView,
    Place,
    PlacementRules,
    StartDecision,
    WaitingStart,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "ClusterView",
    "Instance",
    "InstanceState",
    "ModelTerms",
    "Move",
    "NodeView",
    "Place",
    "PlacementRules",
    "StartDecision",
    "WaitingStart",
    "next_start",
    "place",
    "policy",
]


class Option(NamedTuple):
    node: NodeView
    load_s: float
    plan: FreeingPlan

    @property
    def cost_s(self) -> float:
        return self.load_s + self.plan.cost_s


def place(view: ClusterView, model: str, rules: PlacementRules | None = None) -> StartDecision:
    """Where to start the model, which must be among `view.models`."""
    rules = rules or PlacementRules()
    reused = reuse(view, model)
    if reused is not None:
        return reused
    ranked = by_load(view, model)
    prospects = Prospects(view)
    still = _best(prospects, model, ranked, migrate=False, below_s=math.inf)
    best = still
    if rules.migrate:
        below_s = math.inf if still is None else still.cost_s - rules.min_gain_s
        best = _best(prospects, model, ranked, migrate=True, below_s=below_s) or still
    if best is None:
        return _wait(view, model, ranked)
    node, plan = best.node, best.plan
    return StartDecision(
        kind="start",
        node_id=node.node_id,
        tier=node.tier_of(model),
        evict=plan.evict,
        moves=plan.moves,
        load_s=best.load_s,
        cost_s=best.cost_s,
        is_exact=plan.is_exact,
        reason=_words(model, best, still),
    )


def policy(rules: PlacementRules | None = None) -> Place:
    """`place` with these rules."""
    return lambda view, model: place(view, model, rules)


def next_start(
    view: ClusterView, waiting: Sequence[WaitingStart], how: Place, now_s: float, rules: PlacementRules
) -> tuple[WaitingStart, StartDecision] | None:
    """The first in order of arrival that gets a place, or None. Carry it out, and ask again with a new view.

    Behind a start that has waited for longer than `rules.overtake_s`, only those go on that take no devices.
    """
    decided: dict[str, StartDecision | None] = {}
    is_closed = False
    for start in sorted(waiting, key=lambda one: (one.arrived_s, one.start_id)):
        if start.model not in decided:
            # Behind a closed line nothing else counts, and there may be many.
            decided[start.model] = reuse(view, start.model) if is_closed else how(view, start.model)
        decision = decided[start.model]
        if decision is not None and (decision.kind == "reuse" or (decision.kind == "start" and not is_closed)):
            return start, decision
        is_closed = is_closed or now_s - start.arrived_s > rules.overtake_s
    return None


def reuse(view: ClusterView, model: str) -> StartDecision | None:
    """An idle instance of the model, where there is one."""
    for node in view.nodes:
        idle = [one.instance_id for one in node.instances if one.state == "idle" and one.model == model]
        if idle:
            return StartDecision(
                kind="reuse",
                node_id=node.node_id,
                instance_id=min(idle),
                tier="device",
                load_s=0.0,
                cost_s=0.0,
                reason=f"{model} is ready at {node.node_id} ({min(idle)})",
            )
    return None


def by_load(view: ClusterView, model: str) -> list[tuple[float, NodeView]]:
    """Nodes that could load the model, the soonest ready first, whatever runs on their devices."""
    terms = view.models[model]
    found = [(load_s(node, model, terms), node) for node in view.nodes if node.takes_starts]
    return sorted((one for one in found if one[0] < math.inf), key=lambda one: (one[0], one[1].node_id))


def _best(
    prospects: Prospects,
    model: str,
    ranked: Sequence[tuple[float, NodeView]],
    *,
    migrate: bool,
    below_s: float,
) -> Option | None:
    """The cheapest option that costs less than that; those first that could be, so that most need no closer look."""
    need = prospects.view.models[model].num_devices
    hopes: list[tuple[float, int, str, float, NodeView]] = []
    for seconds, node in ranked:
        if seconds < below_s:
            lacks = max(0, need - node.free_devices)
            least_s = prospects.at_least_s(node, lacks, migrate=migrate) if lacks else 0.0
            hopes.append((seconds + least_s, lacks, node.node_id, seconds, node))
    hopes.sort(key=lambda one: one[:3])
    best: Option | None = None
    for least_s, lacks, _, seconds, node in hopes:
        if least_s >= below_s:
            break
        plan: FreeingPlan | None = FreeingPlan(0.0)
        if lacks:
            plan = cheapest(prospects, node, lacks, migrate=migrate, below_s=below_s - seconds)
        if plan is not None and seconds + plan.cost_s < below_s:
            best = Option(node, seconds, plan)
            below_s = best.cost_s
    return best


def _wait(view: ClusterView, model: str, ranked: Sequence[tuple[float, NodeView]]) -> StartDecision:
    need = view.models[model].num_devices
    if not ranked:
        reason = f"no node knows where to load {model} from"
    else:
        most = max(node.free_devices for _, node in ranked)
        reason = f"{model} needs {need} devices of a node: {most} are free at most, and none can be made free"
    return StartDecision(kind="wait", reason=reason)


def _words(model: str, best: Option, still: Option | None) -> str:
    node, plan = best.node, best.plan
    words = f"{model} from {node.tier_of(model)} of {node.node_id} in {best.load_s:.2f} s"
    if plan.evict:
        words += f", without idle {', '.join(plan.evict)}"
    for move in plan.moves:
        words += (
            f"; {move.instance_id} ({move.model}) moves to {move.target}: {move.load_s:.2f} s from {move.tier}, "
            f"{move.resume_s:.2f} s to go on"
        )
    if plan.moves:
        words += f"; {best.cost_s:.2f} s in all"
        if still is not None:
            words += f", {still.cost_s:.2f} s at {still.node.node_id} without moves"
    return words
