"""Which plans there are."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.planner.plans import Parallelism
from coordinator.planner.space import Machines, colocated_plans, parallelisms, split_plans
from tests.unit.coordinator.planner.formula import kind


def fits_all(_: Parallelism) -> None:
    return None


def test_parallelism_divides_heads_and_layers_and_stays_within_a_node() -> None:
    machines = Machines(num_devices=16, num_nodes=2)
    found, dropped = parallelisms(machines, num_heads=12, num_layers=40, max_pipeline=4, fits=fits_all)
    assert not dropped
    # 8 does not divide 12 heads, 3 not 40 layers; 6 x 4 are more devices than there are.
    expected = {(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4), (3, 1), (3, 2), (3, 4), (4, 1), (4, 2), (4, 4)}
    assert {(each.tensor, each.pipeline) for each in found} == {*expected, (6, 1), (6, 2)}


def test_what_does_not_fit_the_memory_is_dropped_with_its_reason() -> None:
    found, dropped = parallelisms(
        Machines(num_devices=4),
        num_heads=4,
        num_layers=4,
        max_pipeline=2,
        fits=lambda parallel: "too little memory" if parallel.num_devices < 4 else None,
    )
    assert found == [Parallelism(2, 2), Parallelism(4, 1)]
    assert [(each.what, each.why) for each in dropped] == [
        ("TP 1", "too little memory"),
        ("TP 1 PP 2", "too little memory"),
        ("TP 2", "too little memory"),
    ]


def test_devices_divide_among_nodes() -> None:
    with pytest.raises(ValueError, match="9 devices do not divide among 2 nodes"):
        Machines(num_devices=9, num_nodes=2)
    with pytest.raises(ValueError, match="1 devices do not divide among 2 nodes"):
        Machines(num_devices=1, num_nodes=2)


@given(
    nodes=st.integers(1, 3),
    node_devices=st.integers(1, 6),
    tensors=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    pipelines=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    fast=st.booleans(),
)
def test_plans_have_a_place_and_those_without_room_for_more_are_among_all(
    nodes: int, node_devices: int, tensors: tuple[int, int], pipelines: tuple[int, int], fast: bool
) -> None:
    machines = Machines(num_devices=nodes * node_devices, num_nodes=nodes, fast_fabric=fast)
    kinds = {
        "prefill": [kind(tensors[0], pipelines[0])],
        "decode": [kind(tensors[1], pipelines[1])],
        "mixed": [kind(tensors[0], pipelines[0])],
    }
    every = list(split_plans(machines, kinds, all_counts=True))  # type: ignore[arg-type]
    widest = list(split_plans(machines, kinds, all_counts=False))  # type: ignore[arg-type]
    assert set(widest) <= set(every)
    assert len(set(every)) == len(every)
    assert bool(widest) == bool(every)
    counts = {(plan.copies, *(pool.num_workers for pool in plan.pools)) for plan in every}
    for plan in every:
        assert plan.num_devices <= machines.num_devices
        assert all(pool.kind.parallel.tensor <= node_devices for pool in plan.pools)
        if fast:
            assert plan.copies == 1
    if fast:
        for plan in widest:
            readers, writers = (pool.num_workers for pool in plan.pools)
            assert (1, readers + 1, writers) not in counts
            assert (1, readers, writers + 1) not in counts
    colocated = list(colocated_plans(machines, kinds["mixed"], all_counts=True))
    most = node_devices // tensors[0] * nodes // pipelines[0]
    assert [plan.pools[0].num_workers for plan in colocated] == list(range(1, most + 1))


def test_on_a_slow_fabric_stages_of_the_same_layers_share_a_node() -> None:
    machines = Machines(num_devices=16, num_nodes=2, fast_fabric=False)
    pairs = list(
        split_plans(machines, {"prefill": [kind(4), kind(2, 2)], "decode": [kind(2, 2), kind(4)]}, all_counts=False)
    )
    told = {str(plan) for plan in pairs}
    # Of one stage: one pair fills a node. Of two stages: a node holds two segments of 2 + 2, or one of more.
    assert "2 x (1 prefill (TP 4) + 1 decode (TP 4))" in told
    assert "2 x (1 prefill (TP 2 PP 2) + 1 decode (TP 2 PP 2))" in told
    assert "1 prefill (TP 2 PP 2) + 2 decode (TP 2 PP 2)" in told
    assert not any("TP 4) + 1 decode (TP 2 PP 2)" in each for each in told), "stages must be equal in number"


def test_devices_that_fit_by_number_may_not_fit_by_place() -> None:
    # Three devices on each of two nodes: a second worker of two has no node where a first one of three stands.
    machines = Machines(num_devices=6, num_nodes=2)
    splits = split_plans(machines, {"prefill": [kind(3)], "decode": [kind(2)]}, all_counts=True)
    assert [str(plan) for plan in splits] == ["1 prefill (TP 3) + 1 decode (TP 2)"]


def test_every_count_of_a_split_is_there() -> None:
    splits = split_plans(Machines(num_devices=4), {"prefill": [kind(1)], "decode": [kind(1)]}, all_counts=True)
    counts = {tuple(pool.num_workers for pool in plan.pools) for plan in splits}
    assert counts == {(a, b) for a, b in product(range(1, 4), repeat=2) if a + b <= 4}
