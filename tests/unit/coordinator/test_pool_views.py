"""From what workers and agents tell to pools."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec

from contracts.control_messages import (
    DrainOperation,
    FlipOperation,
    MoveOperation,
    OperationStatus,
    RemoveOperation,
    RestartOperation,
    StartOperation,
    WorkerSlot,
)
from contracts.ids import Incarnation, WorkerId
from contracts.messages import PriorityUse, WorkerLoad
from coordinator.policy.scaling_terms import PoolView, ScaleRules
from coordinator.policy.virtual_usage import usage_view
from coordinator.pool_history import Durations, Seen
from coordinator.pool_views import (
    ClusterSeen,
    PoolSight,
    ScaledPool,
    answers_limit,
    being_removed,
    lend_workers,
    pool_view,
    present,
    startable,
)
from coordinator.usage_rows import use_of
from tests.support.conductors import MILLI, conductor_of, info_of, item_of

if TYPE_CHECKING:
    from contracts.control_messages import Operation, OperationState, SlotState
    from contracts.messages import MemberRole, Role

POOLS = (
    ScaledPool(name="reading", role="prefill", rules=ScaleRules(max_workers=4)),
    ScaledPool(name="writing", role="decode", rules=ScaleRules(max_workers=4)),
)
READING, WRITING = POOLS
SIGHT = PoolSight(
    seen=Seen(),
    idle_s=0.0,
    unserved_requests=0,
    start=Durations(7.0),
    flip=Durations(2.0),
    answer_s=None,
    answers_limit=None,
)


def slot(name: str, role: MemberRole, state: SlotState = "ready", age_s: float | None = 30.0) -> WorkerSlot:
    pool = name.rpartition("-")[0]
    return WorkerSlot(
        worker_id=WorkerId(name), pool=pool, role=role, state=state, incarnation=Incarnation(1), age_s=age_s
    )


def operation(what: Operation, state: OperationState = "running", age_s: float = 1.0) -> OperationStatus:
    return OperationStatus(operation_id=1, operation=what, state=state, text="", age_s=age_s)


def cluster(
    workers: dict[str, tuple[Role, WorkerLoad]],
    *operations: OperationStatus,
    slots: tuple[WorkerSlot, ...] = (),
    silent: tuple[str, ...] = (),
) -> ClusterSeen:
    """`silent` ones have not told of their load yet."""
    infos = tuple(info_of(name, role=role, blocks=100) for name, (role, _) in workers.items())
    return ClusterSeen(
        infos=infos,
        usage=usage_view(
            [use_of(info, workers[info.worker_id][1], queue_s=1.5) for info in infos if info.worker_id not in silent]
        ),
        open_requests={WorkerId(name): load.open_requests for name, (_, load) in workers.items()},
        slots=slots,
        operations=operations,
    )


def seen(pool: ScaledPool, those: ClusterSeen) -> PoolView:
    return pool_view(pool, POOLS, those, SIGHT)


IDLE = WorkerLoad(free_blocks=100)
BUSY = WorkerLoad(
    free_blocks=40,
    owned_blocks=60,
    open_requests=5,
    waiting_prompts=1,
    preempted_answers=1,
    head_demand_blocks=5,
    queued_demand_blocks=20,
    priorities=(PriorityUse(0, 3, 60),),
)


def test_answers_and_all_that_waits_for_memory_count_in_a_writing_pool() -> None:
    (worker,) = seen(WRITING, cluster({"writing-0": ("decode", BUSY)})).workers
    assert (worker.memory_tokens, worker.used_tokens, worker.queued_tokens) == (1600.0, 960.0, 320.0)
    assert (worker.answers, worker.waiting_requests, worker.queue_delay_s) == (3, 2, 0.0)


def test_memory_asks_for_no_reader_but_the_queue_does() -> None:
    (worker,) = seen(READING, cluster({"reading-0": ("prefill", BUSY)})).workers
    assert (worker.used_tokens, worker.queued_tokens, worker.queue_delay_s) == (0.0, 0.0, 1.5)


def test_a_worker_counts_where_it_works() -> None:
    those = cluster(
        {"reading-0": ("prefill", IDLE), "writing-0": ("decode", IDLE), "writing-1": ("prefill", IDLE)},
        slots=(slot("reading-0", "prefill"), slot("writing-0", "decode"), slot("writing-1", "decode")),
    )
    assert [worker.worker_id for worker in seen(READING, those).workers] == ["reading-0", "writing-1"]
    assert [worker.worker_id for worker in seen(WRITING, those).workers] == ["writing-0"]
    # Lent as mixed it stays in its own.
    lent = cluster({"writing-1": ("mixed", IDLE)}, slots=(slot("writing-1", "decode"),))
    assert [worker.worker_id for worker in seen(WRITING, lent).workers] == ["writing-1"]


def test_who_leaves_is_no_capacity_and_who_has_nothing_left_is_gone() -> None:
    leaving = replace_load(BUSY, draining=True)
    those = cluster({"writing-0": ("decode", leaving), "writing-1": ("decode", replace_load(IDLE, draining=True))})
    view = seen(WRITING, those)
    assert [(worker.worker_id, worker.is_leaving, worker.is_lost) for worker in view.workers] == [
        ("writing-0", True, False)
    ]
    assert view.serving == ()
    notice = operation(DrainOperation(worker_id=WorkerId("writing-0"), within_s=30.0))
    (lost,) = seen(WRITING, replace(those, operations=(notice,))).workers
    assert lost.is_lost
    (asked_for,) = seen(
        WRITING, replace(those, operations=(operation(RemoveOperation(worker_id=WorkerId("writing-0"))),))
    ).workers
    assert not asked_for.is_lost


def test_an_estimate_of_the_next_start_counts_before_the_mean_of_those_that_were_seen() -> None:
    slots = (slot("writing-0", "decode", "starting", 1.0), slot("writing-1", "decode", "starting", 1.0))
    those = cluster({}, slots=slots)
    view = seen(WRITING, those)
    assert (view.start_s, view.start_spread_s) == (7.0, 0.0)
    known = replace(SIGHT, expected_start_s=2.0, expected_spread_s=0.5, expected_s={WorkerId("writing-1"): 3.0})
    view = pool_view(WRITING, POOLS, those, known)
    assert (view.start_s, view.start_spread_s) == (2.0, 0.5)
    assert {one.worker_id: one.takes_s for one in view.starting} == {"writing-0": 7.0, "writing-1": 3.0}


def test_who_takes_anothers_place_is_no_more_capacity() -> None:
    """Neither while it comes nor when both are there; the one that goes counts until the other one is there."""
    move = operation(MoveOperation(worker_id=WorkerId("writing-0"), to=WorkerId("writing-1")))
    slots = (
        slot("writing-0", "decode"),
        slot("writing-1", "decode", "starting", 1.0),
        slot("writing-2", "decode", "absent"),
    )
    coming = cluster({"writing-0": ("decode", BUSY)}, move, slots=slots)
    view = seen(WRITING, coming)
    assert ([worker.worker_id for worker in view.serving], view.starting) == (["writing-0"], ())
    assert startable(WRITING, replace(coming, slots=(*slots[:1], slot("writing-1", "decode", "absent"), slots[2]))) == [
        "writing-2"
    ]
    both = cluster({"writing-0": ("decode", BUSY), "writing-1": ("decode", IDLE)}, move, slots=slots)
    assert [worker.worker_id for worker in seen(WRITING, both).serving] == ["writing-1"]
    # Memory is taken by both.
    assert present(WRITING, POOLS, coming) == present(WRITING, POOLS, both) == {"writing-0", "writing-1"}
    assert being_removed(both) == {"writing-0"}


def test_what_will_be_capacity() -> None:
    workers: dict[str, tuple[Role, WorkerLoad]] = {
        "writing-0": ("decode", IDLE),
        "writing-1": ("decode", replace_load(BUSY, draining=True)),
        "writing-5": ("decode", IDLE),
        "reading-0": ("prefill", replace_load(BUSY, draining=True)),
    }
    those = cluster(
        workers,
        operation(RestartOperation(worker_ids=(WorkerId("writing-0"), WorkerId("writing-1")))),
        operation(FlipOperation(worker_id=WorkerId("reading-0"), role="decode"), age_s=1.5),
        operation(StartOperation(worker_id=WorkerId("writing-4"))),
        operation(StartOperation(worker_id=WorkerId("writing-6")), "failed"),
        slots=(
            slot("writing-0", "decode"),
            slot("writing-1", "decode"),
            slot("writing-2", "decode", "starting", 3.0),
            slot("writing-3", "decode", "restarting", None),
            slot("writing-4", "decode", "absent", None),
            slot("writing-6", "decode", "stopped", None),
            slot("writing-7", "decode", "given_up", None),
            slot("reading-0", "prefill"),
        ),
        silent=("writing-5",),
    )
    view = seen(WRITING, those)
    assert {one.worker_id: (one.age_s, one.takes_s) for one in view.starting} == {
        "writing-1": (0.0, 7.0),
        "writing-2": (3.0, 7.0),
        "writing-3": (0.0, 7.0),
        "writing-4": (1.0, 7.0),
        "writing-5": (7.0, 7.0),
        "reading-0": (1.5, 2.0),
    }
    assert (view.num_startable, startable(WRITING, those)) == (1, ["writing-6"])


def test_slots_are_started_in_order_of_their_numbers() -> None:
    slots = tuple(slot(f"writing-{n}", "decode", "absent", None) for n in (10, 2, 1))
    assert startable(WRITING, cluster({}, slots=slots)) == ["writing-1", "writing-2", "writing-10"]


def test_lending_sees_the_roles_that_workers_are_taking() -> None:
    those = cluster(
        {
            "reading-0": ("prefill", BUSY),
            "writing-0": ("decode", replace_load(BUSY, draining=True)),
            "writing-1": ("decode", replace_load(BUSY, draining=True)),
        },
        operation(FlipOperation(worker_id=WorkerId("writing-0"), role="mixed")),
    )
    found = {worker.worker_id: worker for worker in lend_workers(POOLS, those, {WorkerId("writing-0"): 12.0})}
    # Who drains for good takes no part.
    assert set(found) == {"reading-0", "writing-0"}
    changing = found["writing-0"]
    assert (changing.home, changing.role, changing.is_changing, changing.since_s) == ("decode", "mixed", True, 12.0)
    assert (changing.memory_tokens, changing.used_tokens, changing.answers) == (1600.0, 1280.0, 4)
    assert (found["reading-0"].queue_delay_s, found["reading-0"].prompts) == (1.5, 1)


def test_no_more_answers_at_once_than_meet_the_target() -> None:
    """A step takes 10 ms and 1 for each answer."""
    conductor = conductor_of(["d0"])
    conductor.fleet.book(item_of(), 0, 0, 0.0)
    outlook, infos = conductor.fleet.outlook(), [conductor.fleet.info_at(0)]
    assert answers_limit(outlook, [0], infos, 20.5 * MILLI) == 10.0
    assert answers_limit(outlook, [0], infos, 1.0 * MILLI) == 1.0
    assert answers_limit(outlook, [0], infos, None) is None
    assert answers_limit(outlook, [], infos, 20.5 * MILLI) is None


def replace_load(load: WorkerLoad, *, draining: bool) -> WorkerLoad:
    return msgspec.structs.replace(load, draining=draining)
