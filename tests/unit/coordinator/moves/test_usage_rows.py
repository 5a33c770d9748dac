"""What workers tell, as rows of virtual usage."""

from __future__ import annotations

import pytest

from contracts.ids import WorkerId
from contracts.messages import PriorityUse, WorkerLoad
from coordinator.membership import ALL_UP, Standing
from coordinator.usage_rows import Expected, usage_of, use_of
from tests.support.conductors import conductor_of, info_of

_LOAD = WorkerLoad(
    free_blocks=300,
    cached_blocks=100,
    owned_blocks=550,
    offered_blocks=50,
    waiting_offers=2,
    head_demand_blocks=30,
    queued_demand_blocks=70,
    priorities=(PriorityUse(0, 3, 400), PriorityUse(1, 1, 150)),
    moving_out=1,
)


def test_a_worker_is_what_it_told_and_what_was_asked_of_it_since() -> None:
    use = use_of(
        info_of("d0"),
        _LOAD,
        expected=Expected(moving_out=1, moving_in=2, arriving_blocks=40, prompts=3, reading_s=1.5),
        queue_s=2.0,
    )
    assert (use.total_blocks, use.available_blocks, use.arriving_blocks) == (1000, 400, 40)
    assert (use.moving_out, use.moving_in) == (2, 2)
    assert (use.head_blocks, use.queued_blocks) == (30, 70)
    assert use.priorities == _LOAD.priorities
    assert (use.waiting_prompts, use.queue_s) == (3, 3.5)
    assert (use.reads, use.writes, use.is_draining) == (False, True, False)


@pytest.mark.parametrize(
    ("load", "moves"),
    [
        (WorkerLoad(head_demand_blocks=3, waiting_offers=1), False),
        (WorkerLoad(head_demand_blocks=3, waiting_prompts=1), True),
        # Preempted answers come before offers.
        (WorkerLoad(head_demand_blocks=3, waiting_offers=1, preempted_answers=1), True),
        (WorkerLoad(head_demand_blocks=3, waiting_offers=1, waiting_prompts=1), False),
    ],
    ids=["offer", "prompt", "preempted", "unknown which"],
)
def test_the_first_in_line_moves_unless_another_worker_holds_it_for_this_one(load: WorkerLoad, moves: bool) -> None:
    assert use_of(info_of("m0"), load).head_moves is moves


@pytest.mark.parametrize("name", ["p0", "d0", "m0"])
def test_whatever_a_worker_tells_a_column_holds_it(name: str) -> None:
    use = use_of(info_of(name), WorkerLoad(free_blocks=2**62, preempted_answers=-5, waiting_prompts=-3))
    assert use.available_blocks == 2**40
    assert (use.preempted_answers, use.waiting_prompts) == (0, 0)


def test_whose_answers_stay_while_it_drains_is_told() -> None:
    conductor = conductor_of(["d0", "m0", "m1"])
    for name in ("d0", "m0", "m1"):
        conductor.report(WorkerId(name), _LOAD, 1.0)
    closed = frozenset({WorkerId("d0"), WorkerId("m1")})
    view = usage_of(conductor, ALL_UP, closed, {}, 2.0, keep_answers={WorkerId("m1")})
    assert view.is_draining.tolist() == [True, False, True]
    assert view.keeps_answers.tolist() == [False, False, True]


def test_the_fleet_is_who_told_of_itself_in_order_of_ids() -> None:
    conductor = conductor_of(["p0", "d0", "d1", "d2", "m0", "s0"])
    conductor.add(info_of("d3"), 1.0)
    for name in ("p0", "d0", "d1", "d2", "m0", "s0"):
        conductor.report(WorkerId(name), _LOAD, 1.0)
    standing = Standing(suspects=frozenset({WorkerId("d1")}), unheard=frozenset({WorkerId("d2")}))
    view = usage_of(conductor, standing, frozenset({WorkerId("d0")}), {WorkerId("m0"): Expected(moving_in=1)}, 2.0)
    # Nothing is known of d3, and stores have no requests.
    assert view.worker_ids == ("d0", "d1", "d2", "m0", "p0")
    assert view.is_up.tolist() == [True, False, False, True, True]
    assert view.is_draining.tolist() == [True, False, False, False, False]
    assert not view.keeps_answers.any()
    assert view.writes.tolist() == [True, True, True, True, False]
    assert view.reads.tolist() == [False, False, False, True, True]
    assert view.moving_in.tolist() == [0, 0, 0, 1, 0]
    assert len(set(view.kv_class.tolist())) == 1


def test_a_queue_is_as_long_as_it_is_expected_to_take() -> None:
    conductor = conductor_of(["p0", "p1"])
    for name, tokens in (("p0", 4096), ("p1", 0)):
        conductor.report(WorkerId(name), WorkerLoad(pending_prompt_tokens=tokens, waiting_prompts=4), 1.0)
    view = usage_of(conductor, ALL_UP, frozenset(), {}, 2.0)
    # A token takes 1/1024 s.
    assert view.queue_s.tolist() == [pytest.approx(3.0), 0.0]
    assert view.waiting_prompts.tolist() == [4, 4]
