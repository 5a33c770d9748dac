"""On which machine a wanted worker is started: where it is ready soonest, by what node agents tell. Pure.

`coldstart.placement` decides, from a view that is made here: each machine with the pool's empty slots as its devices,
the tier in which it has the model, the bandwidths that its loads showed, and what stands in line there. Memory that all
models share is the business of `coordinator.holding`; nobody is moved away.

A machine has one line for its disk, whatever tier a load takes its bytes from. Who wants a model whose load is in that
line already waits for this load, and not for another one behind it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from coldstart.estimate import TIERS
from coldstart.placement import by_load, place
from coldstart.placement_terms import ClusterView, ModelTerms, NodeView, PlacementRules

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coldstart.estimate import LoadHistory, Tier
    from contracts.ids import WorkerId
    from contracts.weight_messages import NodeWeights, WeightTier

#: Other machines that a reason names.
_MAX_OTHERS = 3
#: Of the time that a load goes on beside imports: it takes a disk and a processor all the same, so that of two starts
#: which are ready at once the one that has to load less is chosen.
_HIDDEN_SHARE = 0.01
#: Slots are empty: there is nobody who would have to be moved.
_RULES: Final = PlacementRules(migrate=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class StartSite:
    """A machine that could start workers of a pool."""

    node: str
    #: Its empty slots, in the order in which they are taken.
    worker_ids: tuple[WorkerId, ...]
    #: None: it does not tell.
    weights: NodeWeights | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ChosenStart:
    worker_id: WorkerId
    node: str
    #: From now until it is ready, wait in line and initialisation included; None: not known.
    takes_s: float | None
    #: Where its weights come from, and what the other machines would take; in words.
    reason: str


def choose(
    sites: Sequence[StartSite],
    model: str,
    history: LoadHistory,
    count: int,
    *,
    init_s: float = 0.0,
    overlap_s: float = 0.0,
) -> list[ChosenStart]:
    """So many workers of a model, or as many as there are slots: those first that are ready soonest.

    `model`: empty where agents do not tell. `init_s`: what a start takes beside its load; `overlap_s`: of that, the
    part that goes on while weights come. Machines of which too little is known come last, in the order of `sites`.
    """
    left = {site.node: list(site.worker_ids) for site in sites}
    chosen: list[ChosenStart] = []
    while len(chosen) < count and any(left.values()):
        view = view_of(sites, left, model, history, init_s, overlap_s)
        node, takes_s = "", None
        reason = f"nobody tells of {model}" if model else ""
        if view is not None:
            decision = place(view, model, _RULES)
            reason = decision.reason
            if decision.kind == "start" and decision.node_id is not None:
                node, takes_s = decision.node_id, decision.load_s
                reason += _others(view, model, node)
        if not node:
            node = next(name for name, worker_ids in left.items() if worker_ids)
            reason = f"in order: {reason}" if reason else ""
        chosen.append(ChosenStart(worker_id=left[node].pop(0), node=node, takes_s=takes_s, reason=reason))
    return chosen


def view_of(
    sites: Sequence[StartSite],
    left: Mapping[str, Sequence[WorkerId]],
    model: str,
    history: LoadHistory,
    init_s: float,
    overlap_s: float = 0.0,
) -> ClusterView | None:
    """Of the machines that tell of the model; None: none does. `left`: by machine, the slots that are still empty."""
    known = {site.node: held for site in sites if site.weights is not None and (held := site.weights.of(model))}
    if not known:
        return None
    num_bytes = max(held.num_bytes for held in known.values())
    nodes: list[NodeView] = []
    for site in sorted(sites, key=lambda one: one.node):
        held = known.get(site.node)
        if held is None or site.weights is None:
            continue
        speeds: dict[Tier, float] = {tier: history.path(site.node, tier).bytes_per_s for tier in TIERS}
        queue_s = _wait_s(site.weights, model, held.tier, held.num_bytes, speeds)
        if speeds[held.tier] > 0:
            # Terms know neither that an original is not as long as what is made of it, nor that a process can import
            # what it needs while its weights come: the wait is what is left to make the sum right.
            load_s = queue_s + held.num_bytes / speeds[held.tier]
            hidden_s = min(load_s, overlap_s)
            queue_s = load_s - (1.0 - _HIDDEN_SHARE) * hidden_s - num_bytes / speeds[held.tier]
        nodes.append(
            NodeView(
                node_id=site.node,
                free_devices=len(left[site.node]),
                tiers={model: held.tier},
                bytes_per_s=speeds,
                queue_s={held.tier: queue_s},
            )
        )
    terms = ModelTerms(
        num_bytes=num_bytes, num_devices=1, init_s=init_s, resume_s_per_token=0.0, resume_s=0.0, token_s=1.0
    )
    return ClusterView(nodes=tuple(nodes), models={model: terms})


def line_s(weights: NodeWeights, speeds: Mapping[Tier, float]) -> float:
    """Until all that is in line at a machine's disk is loaded."""
    return sum(_seconds(max(0, one.num_bytes - one.done_bytes), speeds[one.tier]) for one in weights.in_line)


def _wait_s(weights: NodeWeights, model: str, tier: WeightTier, num_bytes: int, speeds: Mapping[Tier, float]) -> float:
    """Until a load of the model begins that is asked for now. Where its own is in line already: as if a whole one ended
    when that one will."""
    waits_s = 0.0
    for one in weights.in_line:
        left_bytes = max(0, one.num_bytes - one.done_bytes)
        if model in one.models:
            return waits_s - _seconds(num_bytes - left_bytes, speeds[tier])
        waits_s += _seconds(left_bytes, speeds[one.tier])
    return waits_s


def _seconds(num_bytes: int, bytes_per_s: float) -> float:
    if not num_bytes:
        return 0.0
    return num_bytes / bytes_per_s if bytes_per_s > 0 else math.inf


def _others(view: ClusterView, model: str, node: str) -> str:
    """What the other machines would take, those that are soonest first."""
    tiers = {one.node_id: one.tier_of(model) for one in view.nodes}
    free = {one.node_id for one in view.nodes if one.free_devices}
    found = [(seconds, one.node_id) for seconds, one in by_load(view, model) if one.node_id != node]
    words = [
        f"{name} {seconds:.2f} s from {tiers[name]}{'' if name in free else ', no slot'}"
        for seconds, name in found[:_MAX_OTHERS]
    ]
    return f"; {'; '.join(words)}" if words else ""
