"""Who makes room for a worker, and where they go."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest

from contracts.ids import WorkerId
from coordinator.policy.room_moves import EmptySlot, Machine, OfferedWorker, PoolOffer, RoomPlan, WorkerMove, plan_room

if TYPE_CHECKING:
    from coldstart.estimate import Tier
    from coldstart.placement_terms import InstanceState

GB = 10**9
SPEEDS: dict[Tier, float] = {"dram": math.inf, "ssd": 1.0 * GB, "remote": 0.1 * GB}


def machine(node: str, free_bytes: int | None = 0, queue_s: float = 0.0) -> Machine:
    return Machine(node=node, free_bytes=free_bytes, bytes_per_s=SPEEDS, queue_s=queue_s)


def offer(pool: str, *workers: OfferedWorker, num_bytes: int = 2 * GB, **slots: Tier) -> PoolOffer:
    """`slots`: by machine, the tier of its weights there."""
    return PoolOffer(
        pool=pool,
        worker_bytes=num_bytes,
        weight_bytes=num_bytes // 2,
        init_s=1.0,
        workers=workers,
        slots={node: EmptySlot(WorkerId(f"{pool}-{node}"), tier) for node, tier in slots.items()},
    )


def worker(
    name: str, node: str, state: InstanceState = "running", *, eviction_s: float = 0.0, leaving: bool = False
) -> OfferedWorker:
    return OfferedWorker(worker_id=WorkerId(name), node=node, state=state, eviction_s=eviction_s, is_leaving=leaving)


def moves(plan: RoomPlan | None) -> tuple[WorkerMove, ...]:
    assert plan is not None
    return plan.moves


def test_a_busy_worker_moves_to_where_it_is_ready_soonest() -> None:
    offers = [
        offer("new", a="dram"),
        offer("old", worker("old-0", "a"), b="ssd", c="dram", d="dram"),
    ]
    machines = [machine("a"), machine("b", 9 * GB), machine("c", 1 * GB), machine("d", None)]
    plan = plan_room("new", offers, machines)
    # c has the weights, but no room for a worker.
    assert moves(plan) == (WorkerMove("old", WorkerId("old-0"), WorkerId("old-d")),)
    assert plan is not None
    assert (plan.node, plan.release) == ("a", ())
    assert plan.reason.startswith("new from dram of a in 1.00 s; old-0 (old) moves to d: 1.00 s from dram")


def test_an_idle_one_goes_where_that_costs_less_than_a_move() -> None:
    def pools(loss_s: float) -> list[PoolOffer]:
        return [
            offer("new", a="dram"),
            offer("busy", worker("busy-0", "a"), b="ssd"),
            offer("idle", worker("idle-0", "a", "idle", eviction_s=loss_s)),
        ]

    machines = [machine("a"), machine("b", 9 * GB)]
    cheap = plan_room("new", pools(1.5), machines)
    assert cheap is not None
    assert (cheap.release, cheap.moves) == (("idle",), ())
    dear = plan_room("new", pools(2.5), machines)
    assert dear is not None
    assert (dear.release, len(dear.moves)) == ((), 1)


def test_of_several_the_small_ones_that_are_enough() -> None:
    offers = [
        offer("new", num_bytes=2 * GB, a="dram"),
        offer("huge", worker("huge-0", "a"), num_bytes=64 * GB, b="ssd"),
        offer("tiny", worker("tiny-0", "a"), num_bytes=GB, b="ssd"),
        offer("mini", worker("mini-0", "a"), num_bytes=GB, b="ssd"),
    ]
    plan = plan_room("new", offers, [machine("a"), machine("b", None)])
    assert [move.pool for move in moves(plan)] == ["mini", "tiny"]


@pytest.mark.parametrize(
    "offers",
    [
        # Nobody may move; has a slot elsewhere; has room there; is known to load there.
        [offer("new", a="dram"), offer("old", worker("old-0", "a", "fixed"), b="dram")],
        [offer("new", a="dram"), offer("old", worker("old-0", "a"))],
        [offer("new", a="dram"), offer("old", worker("old-0", "a"), a="dram")],
        [offer("new", a="dram"), offer("old", worker("old-0", "a"), unheard="dram")],
        # The own workers stay; without a slot nothing helps; and without an offer.
        [offer("new", worker("new-0", "a"), a="dram", b="dram", num_bytes=5 * GB)],
        [offer("new"), offer("old", worker("old-0", "a"), b="dram")],
        [offer("old", worker("old-0", "a"), b="dram")],
    ],
)
def test_where_there_is_no_way_nobody_goes(offers: list[PoolOffer]) -> None:
    assert plan_room("new", offers, [machine("a"), machine("b", 3 * GB)]) is None


def test_who_leaves_anyway_is_waited_for_and_nobody_goes_where_there_is_room() -> None:
    busy = offer("old", worker("old-0", "a"), b="dram")
    machines = [machine("a", 0), machine("b", 9 * GB)]
    leaving = offer("gone", worker("gone-0", "a", "fixed", leaving=True))
    assert plan_room("new", [offer("new", a="dram"), busy], machines) is not None
    assert plan_room("new", [offer("new", a="dram"), busy, leaving], machines) is None
    assert plan_room("new", [offer("new", a="dram", b="remote"), busy], machines) is None


def test_of_one_pool_one_worker_moves_at_a_time() -> None:
    machines = [machine("a"), machine("b", None)]
    both = offer("old", worker("old-0", "a"), worker("old-1", "a"), num_bytes=GB, b="dram")
    plan = plan_room("new", [offer("new", a="dram"), both], machines)
    assert moves(plan) == (WorkerMove("old", WorkerId("old-0"), WorkerId("old-b")),)
    begun = offer("old", worker("old-0", "a", "fixed", leaving=True), worker("old-1", "a"), num_bytes=GB, b="dram")
    plan = plan_room("new", [offer("new", a="dram"), begun], [machine("a", GB // 2), machine("b", None)])
    assert [move.worker_id for move in moves(plan)] == ["old-1"]
