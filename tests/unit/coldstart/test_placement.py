"""Placement: the published example, a table of plans, the programme against trying everything."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.making_room import Prospects, cheapest, idle_instances, load_s, settle, untouched
from coldstart.placement import next_start, place, policy
from coldstart.placement_baselines import locality_only, nearest_stopping, random_place, shepherd
from coldstart.placement_terms import (
    ClusterView,
    Instance,
    InstanceState,
    ModelTerms,
    NodeView,
    PlacementRules,
    WaitingStart,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coldstart.estimate import Tier

GB = 10**9
SPEEDS: dict[Tier, float] = {"dram": 20.0 * GB, "ssd": 5.0 * GB, "remote": 1.0 * GB}


def terms(gb: float = 10.0, devices: int = 1) -> ModelTerms:
    return ModelTerms(
        num_bytes=round(gb * GB), num_devices=devices, resume_s_per_token=0.001, resume_s=0.1, token_s=0.05
    )


def node(
    name: str,
    free: int,
    tiers: dict[str, Tier] | None = None,
    instances: Sequence[Instance] = (),
    *,
    ssd_queue_s: float = 0.0,
) -> NodeView:
    return NodeView(
        node_id=name,
        free_devices=free,
        tiers=tiers or {},
        bytes_per_s=SPEEDS,
        queue_s={"ssd": ssd_queue_s},
        instances=tuple(instances),
    )


def running(model: str, name: str = "", *, elapsed_s: float = 5.0, state: InstanceState = "running") -> Instance:
    return Instance(instance_id=name or f"{model}-1", model=model, state=state, prompt_tokens=100, elapsed_s=elapsed_s)


def view(*nodes: NodeView, **models: ModelTerms) -> ClusterView:
    named = {name: terms() for name in "abcd"}
    return ClusterView(nodes=nodes, models={**named, **models})


# --- the published example ----------------------------------------------------------------------------

#: OSDI'24, the comparison of locality-aware policies: server 1 has A in DRAM and B on its SSD, and its device is free;
#: server 2 has B in DRAM, and its device runs A. Now B is to start.
EXAMPLE = view(
    node("server-1", 1, {"a": "dram", "b": "ssd"}),
    node("server-2", 0, {"a": "ssd", "b": "dram"}, [running("a", elapsed_s=5.0)]),
)


def test_published_example() -> None:
    migrated = place(EXAMPLE, "b")
    assert (migrated.kind, migrated.node_id, migrated.tier) == ("start", "server-2", "dram")
    (move,) = migrated.moves
    assert (move.instance_id, move.target, move.tier) == ("a-1", "server-1", "dram")
    # A goes on with its 100 tokens and the 100 it wrote in 5 s: 0.001 * 200 + 0.1.
    assert move.resume_s == pytest.approx(0.3)
    assert migrated.ready_s == pytest.approx(0.5 + 0.3 + 0.5)
    assert "a-1 (a) moves to server-1" in migrated.reason

    # Who goes where a device is free loads from the SSD; who waits for locality waits for A's end.
    available = place(EXAMPLE, "b", PlacementRules(migrate=False))
    assert (available.node_id, available.tier, available.load_s) == ("server-1", "ssd", 2.0)
    waits = locality_only(EXAMPLE, "b")
    assert (waits.kind, waits.node_id) == ("wait", "server-2")
    # Who preempts starts B at once, and A stands still while it is loaded and read again.
    preempted = shepherd(EXAMPLE, "b")
    assert (preempted.node_id, preempted.stop, preempted.moves) == ("server-2", ("a-1",), ())
    assert preempted.ready_s == pytest.approx(0.5)
    assert preempted.ready_s < migrated.ready_s < available.ready_s


def test_nobody_moves_where_that_costs_more_than_the_slower_tier() -> None:
    """After 1,000 s A has so many tokens that B had better come from the SSD."""
    long = replace(EXAMPLE.nodes[1], instances=(running("a", elapsed_s=1000.0),))
    found = place(replace(EXAMPLE, nodes=(EXAMPLE.nodes[0], long)), "b")
    assert (found.node_id, found.moves) == ("server-1", ())


def test_a_move_must_gain_what_the_rules_ask_for() -> None:
    gain_s = 2.0 - (0.5 + 0.5 + 0.3)
    assert place(EXAMPLE, "b", PlacementRules(min_gain_s=gain_s - 0.01)).moves
    assert not place(EXAMPLE, "b", PlacementRules(min_gain_s=gain_s + 0.01)).moves


# --- a table ------------------------------------------------------------------------------------------

PLANS = {
    "nearest tier": (view(node("n1", 1, {"a": "ssd"}), node("n2", 1, {"a": "dram"})), "n2", "dram", 0.5),
    "a line is longer than a slower tier": (
        view(node("n1", 1, {"a": "ssd"}, ssd_queue_s=9.0), node("n2", 1)),
        "n2",
        "remote",
        10.0,
    ),
    "a line at the disk is none for copies from memory": (
        view(node("n1", 1, {"a": "dram"}, ssd_queue_s=9.0), node("n2", 1, {"a": "ssd"})),
        "n1",
        "dram",
        0.5,
    ),
    "on no node": (view(node("n1", 0), node("n2", 1)), "n2", "remote", 10.0),
    "equal: by id": (view(node("n1", 1, {"a": "ssd"}), node("n2", 1, {"a": "ssd"})), "n1", "ssd", 2.0),
    "too few devices": (
        view(node("n1", 1, {"a": "dram"}), node("n2", 2, {"a": "ssd"}), a=terms(devices=2)),
        "n2",
        "ssd",
        2.0,
    ),
}


@pytest.mark.parametrize(("cluster", "node_id", "tier", "seconds"), PLANS.values(), ids=PLANS.keys())
def test_plans(cluster: ClusterView, node_id: str, tier: Tier, seconds: float) -> None:
    found = place(cluster, "a")
    assert (found.kind, found.node_id, found.tier) == ("start", node_id, tier)
    assert found.load_s == pytest.approx(seconds)
    assert not found.moves
    assert not found.evict


def test_an_idle_instance_of_the_model_is_taken_first() -> None:
    found = place(view(node("n1", 4, {"a": "dram"}), node("n2", 0, {}, [running("a", state="idle")])), "a")
    assert (found.kind, found.node_id, found.instance_id, found.ready_s) == ("reuse", "n2", "a-1", 0.0)


def test_idle_instances_go_that_are_missed_least() -> None:
    idle = [
        replace(running("b", "b-1", state="idle"), eviction_s=0.4),
        replace(running("c", "c-1", state="idle"), eviction_s=0.1),
    ]
    found = place(view(node("n1", 0, {"a": "dram"}, idle), node("n2", 1)), "a")
    assert (found.node_id, found.evict, found.moves) == ("n1", ("c-1",), ())
    assert found.cost_s == pytest.approx(0.5 + 0.1)


def test_a_move_is_charged_with_the_moved_models_devices() -> None:
    """The incoming model needs two; the one that leaves needs one, and that is what its target must have."""
    source = node("n1", 1, {"a": "dram"}, [running("b")])
    target = node("n2", 1, {"b": "dram"})
    found = place(view(source, target, a=terms(devices=2)), "a")
    assert [(move.instance_id, move.target) for move in found.moves] == [("b-1", "n2")]
    large = place(view(source, target, a=terms(devices=2), b=terms(devices=2)), "a")
    assert large.kind == "wait"


def test_two_that_move_to_one_disk_wait_for_each_other() -> None:
    source = node("n1", 0, {"a": "dram"}, [running("b"), running("c")])
    cluster = view(source, node("n2", 2, {"b": "ssd", "c": "ssd"}), a=terms(devices=2))
    plan = cheapest(Prospects(cluster), source, 2)
    assert plan is not None
    assert [move.load_s for move in plan.moves] == pytest.approx([2.0, 4.0])


def test_what_loads_or_moves_is_left_alone_and_draining_nodes_get_nothing() -> None:
    busy = node("n1", 0, {"a": "dram"}, [running("b", state="fixed")])
    away = replace(node("n2", 4, {"a": "dram", "b": "dram"}), takes_starts=False)
    found = place(view(busy, away), "a")
    assert found.kind == "wait"
    assert "a needs 1 devices of a node: 0 are free at most" in found.reason


def test_nothing_is_loaded_from_where_no_bandwidth_is_known() -> None:
    blind = replace(node("n1", 1), bytes_per_s={})
    assert place(view(blind), "a").reason == "no node knows where to load a from"
    assert place(view(blind, node("n2", 1)), "a").node_id == "n2"


# --- against trying everything ------------------------------------------------------------------------

_tiers: st.SearchStrategy[Tier] = st.sampled_from(["dram", "ssd", "remote"])
_seconds = st.sampled_from([0.0, 0.3, 1.0, 2.5])


@st.composite
def clusters(draw: st.DrawFn) -> ClusterView:
    models = {name: terms(draw(st.sampled_from([2.0, 10.0, 30.0])), draw(st.integers(1, 3))) for name in "abcde"}
    nodes: list[NodeView] = []
    for place_ in range(draw(st.integers(1, 4))):
        instances = [
            Instance(
                instance_id=f"{place_}-{number}",
                model=draw(st.sampled_from("bcde")),
                state=draw(st.sampled_from(["running", "running", "idle", "fixed"])),
                prompt_tokens=draw(st.sampled_from([10, 900])),
                elapsed_s=draw(st.sampled_from([0.0, 40.0])),
                eviction_s=draw(_seconds),
            )
            for number in range(draw(st.integers(0, 4 if place_ == 0 else 2)))
        ]
        nodes.append(
            NodeView(
                node_id=f"n{place_}",
                free_devices=draw(st.integers(0, 4)),
                tiers={name: draw(_tiers) for name in models},
                bytes_per_s=SPEEDS,
                queue_s={"ssd": draw(_seconds), "remote": draw(_seconds)},
                instances=tuple(instances),
            )
        )
    return ClusterView(nodes=tuple(nodes), models=models)


def by_trying_everything(cluster: ClusterView, source: NodeView, num_devices: int) -> float:
    """The least cost over every choice for every instance, carried out in the same order."""
    models = cluster.models
    items = [one for one in source.instances if one.state != "fixed"]
    items.sort(key=lambda one: (models[one.model].num_bytes, one.instance_id))
    others = [one for one in cluster.nodes if one is not source]
    best_s = math.inf
    ways = [("keep", "evict") if one.state == "idle" else ("keep", *range(len(others))) for one in items]
    for chosen in itertools.product(*ways):
        rooms = [untouched(one) for one in others]
        freed, cost_s = 0, 0.0
        for item, way in zip(items, chosen, strict=True):
            if way == "keep":
                continue
            freed += models[item.model].num_devices
            if way == "evict":
                cost_s += item.eviction_s
                continue
            target = others[int(way)]
            settled = settle(item, target, rooms[int(way)], idle_instances(target), models)
            if settled is None:
                break
            rooms[int(way)] = settled.room
            cost_s += settled.cost_s
        else:
            if freed >= num_devices:
                best_s = min(best_s, cost_s)
    return best_s


@settings(max_examples=300, deadline=None)
@given(cluster=clusters(), num_devices=st.integers(1, 4))
def test_the_programme_finds_what_trying_everything_finds(cluster: ClusterView, num_devices: int) -> None:
    source = cluster.nodes[0]
    plan = cheapest(Prospects(cluster), source, num_devices)
    least_s = by_trying_everything(cluster, source, num_devices)
    if plan is None:
        assert least_s == math.inf
        return
    assert plan.is_exact
    assert plan.cost_s == pytest.approx(least_s)
    assert Prospects(cluster).at_least_s(source, num_devices) <= plan.cost_s + 1e-9
    _check(cluster, source, num_devices, plan.evict, [(one.instance_id, one.target) for one in plan.moves])


def _check(
    cluster: ClusterView, source: NodeView, num_devices: int, evict: Sequence[str], moves: Sequence[tuple[str, str]]
) -> None:
    """The plan frees enough, moves only what runs, and takes from targets what they have."""
    here = {one.instance_id: one for one in source.instances}
    gone = [*evict, *(name for name, _ in moves)]
    assert len(gone) == len(set(gone))
    assert sum(cluster.models[here[name].model].num_devices for name in gone) >= num_devices
    assert all(here[name].state == "idle" for name in evict)
    assert all(here[name].state == "running" for name, _ in moves)
    for target in cluster.nodes:
        taken = sum(cluster.models[here[name].model].num_devices for name, where in moves if where == target.node_id)
        idle = sum(cluster.models[one.model].num_devices for one in target.instances if one.state == "idle")
        assert taken <= target.free_devices + idle


@settings(max_examples=150, deadline=None)
@given(cluster=clusters())
def test_no_node_is_better_than_the_one_chosen(cluster: ClusterView) -> None:
    found = place(cluster, "a")
    costs_s: dict[str, float] = {}
    for one in cluster.nodes:
        lacks = cluster.models["a"].num_devices - one.free_devices
        plan_s = 0.0 if lacks <= 0 else by_trying_everything(cluster, one, lacks)
        costs_s[one.node_id] = load_s(one, "a", cluster.models["a"]) + plan_s
    least_s = min(costs_s.values())
    assert (found.kind == "wait") == math.isinf(least_s)
    if found.kind == "start":
        assert found.cost_s == pytest.approx(least_s)
        assert costs_s[str(found.node_id)] == pytest.approx(least_s)


def test_many_equal_ways_are_bounded_and_it_is_told() -> None:
    """Twelve instances, twelve targets with lines of different lengths: far more states than are kept."""
    rng = random.Random(1)
    models = {f"m{number}": terms(rng.uniform(5.0, 30.0)) for number in range(12)}
    source = node("s", 0, {}, [running(name) for name in models])
    targets = [
        node(f"t{number:02}", 3, dict.fromkeys(models, "ssd"), ssd_queue_s=rng.uniform(0, 2)) for number in range(12)
    ]
    plan = cheapest(Prospects(ClusterView(nodes=(source, *targets), models=models)), source, 12)
    assert plan is not None
    assert len(plan.moves) == 12
    assert not plan.is_exact


# --- lines and baselines ------------------------------------------------------------------------------


def test_starts_go_in_order_of_arrival() -> None:
    waiting = [
        WaitingStart(start_id="y", model="b", arrived_s=2.0),
        WaitingStart(start_id="x", model="a", arrived_s=1.0),
    ]
    found = next_start(view(node("n1", 1)), waiting, policy(), 2.0, PlacementRules())
    assert found is not None
    assert found[0].start_id == "x"


def test_a_start_that_needs_much_is_overtaken_for_a_while_only() -> None:
    cluster = view(node("n1", 1), a=terms(devices=4))
    waiting = [
        WaitingStart(start_id="x", model="a", arrived_s=1.0),
        WaitingStart(start_id="y", model="b", arrived_s=2.0),
    ]
    rules = PlacementRules(overtake_s=5.0)
    soon = next_start(cluster, waiting, policy(), 3.0, rules)
    assert soon is not None
    assert soon[0].start_id == "y"
    assert next_start(cluster, waiting, policy(), 7.0, rules) is None
    # Who takes no devices still goes on.
    warm = view(node("n1", 1, {}, [running("b", state="idle")]), a=terms(devices=4))
    late = next_start(warm, waiting, policy(), 7.0, rules)
    assert late is not None
    assert late[1].kind == "reuse"


def test_random_takes_any_node_with_room_by_its_generator() -> None:
    cluster = view(node("n1", 1, {"a": "dram"}), node("n2", 1), node("n3", 0), node("n4", 1, {"a": "ssd"}))
    drawn = [random_place(random.Random(seed))(cluster, "a").node_id for seed in range(30)]
    assert set(drawn) == {"n1", "n2", "n4"}
    assert random_place(random.Random(3))(cluster, "a") == random_place(random.Random(3))(cluster, "a")
    assert random_place(random.Random(3))(view(node("n3", 0)), "a").kind == "wait"


def test_stopping_for_nearness_takes_the_youngest_and_nobody_where_all_is_taken() -> None:
    crowd = [running("c", elapsed_s=9.0), running("d", elapsed_s=2.0), running("b", state="fixed")]
    nearest = node("n1", 0, {"a": "dram"}, crowd)
    found = nearest_stopping(view(nearest, node("n2", 1, {"a": "ssd"})), "a")
    assert (found.node_id, found.stop, found.evict) == ("n1", ("d-1",), ())
    assert nearest_stopping(view(nearest, node("n2", 0, {"a": "ssd"})), "a").kind == "wait"
    near = nearest_stopping(view(nearest, node("n2", 1, {"a": "dram"})), "a")
    assert (near.node_id, near.stop) == ("n2", ())


def test_ids_of_nodes_are_in_order() -> None:
    with pytest.raises(ValueError, match="order of their ids"):
        view(node("n2", 1), node("n1", 1))
