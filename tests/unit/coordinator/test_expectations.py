"""When workers will have read what they were given: as placed, bounded by what they report."""

from __future__ import annotations

import math
from typing import Literal
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import WorkerId
from contracts.latency_models import FittedLatency
from contracts.messages import WorkerLoad
from coordinator.conductor import Conductor, ConductorSettings
from coordinator.costs import WorkerCosts
from coordinator.decision import Chosen
from coordinator.expectations import Expectations
from tests.support.conductors import MILLI, PLAIN, Costs, conductor_of, costs_of, info_of, item_of
from workload.slo import SloClass

GRACE_S = 0.25
CLASSES = (SloClass("fast", 300.0, 1000.0), SloClass("slow", 5000.0, 1000.0))


def queue_s(made: Conductor, now_s: float, rank: int = 0) -> float:
    view = made.fleet.view()
    row = next(row for row, info in enumerate(view.infos) if info.role != "decode")
    return float(made.fleet.outlook().queue_s(rank, now_s)[row])


def report(made: Conductor, pending_tokens: int, now_s: float, step_age_s: float = 0.0) -> None:
    load = WorkerLoad(pending_prompt_tokens=pending_tokens, step_age_s=step_age_s, free_blocks=1000)
    made.report(WorkerId("p0"), load, now_s)


def test_placements_add_up_and_time_takes_away() -> None:
    made = conductor_of(["p0", "d0"])
    made.decide(item_of(100), 1.0)
    made.decide(item_of(200), 1.0)
    assert queue_s(made, 1.0) == 300 * MILLI
    assert queue_s(made, 1.0 + 100 * MILLI) == 200 * MILLI
    assert queue_s(made, 9.0) == 0.0
    made.decide(item_of(50), 9.0)
    assert queue_s(made, 9.0) == 50 * MILLI


def test_a_report_bounds_what_is_believed() -> None:
    made = conductor_of(["p0", "d0"])
    made.decide(item_of(100), 1.0)
    # Within the grace it may or may not contain the placement: both is possible, so what was believed stays.
    for told in (0, 50, 90):
        report(made, told, 1.0)
        assert queue_s(made, 1.0) == 100 * MILLI
    report(made, 150, 1.0)
    assert queue_s(made, 1.0) == 150 * MILLI, "there is at least what it tells"
    report(made, 20, 1.0)
    assert queue_s(made, 1.0) == 120 * MILLI, "and at most that and what was just placed"
    report(made, 20, 1.0 + GRACE_S)
    assert queue_s(made, 1.0 + GRACE_S) == 20 * MILLI, "now it is contained"


def test_the_step_in_progress_is_partly_done() -> None:
    made = conductor_of(["p0", "d0"])
    report(made, 500, 1.0, step_age_s=100 * MILLI)
    assert queue_s(made, 1.0) == 400 * MILLI
    report(made, 50, 2.0, step_age_s=10.0)
    assert queue_s(made, 2.0) == 0.0


def test_attention_of_pending_prompts_counts() -> None:
    latency = FittedLatency(prefill=PLAIN.prefill, pair_s=2.0**-20, decode=PLAIN.decode, context_token_s=0.0)
    made = conductor_of(["p0", "d0"], costs=costs_of(latency, 100))
    load = WorkerLoad(pending_prompt_tokens=1000, pending_prompt_pairs=2.0**20)
    made.report(WorkerId("p0"), load, 1.0)
    assert queue_s(made, 1.0) == pytest.approx(1000 * MILLI + 1.0, rel=1e-6)


def test_absurd_figures_are_no_error() -> None:
    made = conductor_of(["p0", "d0", "m0"])
    for name in ("p0", "d0", "m0"):
        absurd = WorkerLoad(
            pending_prompt_tokens=2**64,
            pending_prompt_pairs=1e300,
            running_decodes=2**64,
            context_tokens=2**64,
            free_blocks=-(2**64),
            step_age_s=-1e300,
        )
        made.report(WorkerId(name), absurd, 1.0)
    assert isinstance(made.decide(item_of(100), 1.0), Chosen)


# --- urgency ----------------------------------------------------------------------------------------------


def test_who_is_due_earlier_does_not_wait_for_the_others() -> None:
    made = conductor_of(["p0", "d0"], slos=CLASSES)
    made.decide(item_of(1000), 1.0)
    made.decide(item_of(400, slo_class="slow"), 1.0)
    made.decide(item_of(100, slo_class="fast"), 1.0)
    assert [queue_s(made, 1.0, rank) for rank in range(3)] == [100 * MILLI, 500 * MILLI, 1500 * MILLI]


def test_priority_counts_like_an_earlier_target() -> None:
    made = conductor_of(["p0", "d0"], slos=CLASSES, settings=ConductorSettings(priority_s=10.0))
    made.decide(item_of(100, slo_class="slow", priority=1), 1.0)
    assert [queue_s(made, 1.0, rank) for rank in range(3)] == [100 * MILLI] * 3
    made.decide(item_of(100, slo_class="fast", priority=-1), 1.0)
    assert [queue_s(made, 1.0, rank) for rank in range(3)] == [100 * MILLI, 100 * MILLI, 200 * MILLI]


def test_priorities_count_only_so_far_as_workers_let_them() -> None:
    made = conductor_of(["p0", "d0"], slos=CLASSES, settings=ConductorSettings(priority_s=1e-3))
    made.decide(item_of(100, slo_class="slow", priority=2**31), 1.0)
    assert queue_s(made, 1.0, 0) == 0.0, "a few milliseconds more urgent than its class"


@pytest.mark.parametrize("order", ["fcfs", "shortest"])
def test_without_deadlines_all_wait_for_all(order: Literal["fcfs", "shortest"]) -> None:
    made = conductor_of(["p0", "d0"], slos=CLASSES, settings=ConductorSettings(queue_order=order))
    made.decide(item_of(1000), 1.0)
    made.decide(item_of(100, slo_class="slow"), 1.0)
    assert made.fleet.outlook().prefill_free_s.shape[0] == 1
    assert queue_s(made, 1.0) == 1100 * MILLI


def test_what_nobody_placed_is_waited_for_by_all() -> None:
    made = conductor_of(["p0", "d0"], slos=CLASSES)
    made.decide(item_of(1000), 1.0)
    report(made, 2000, 2.0)
    assert [queue_s(made, 2.0, rank) for rank in (0, 2)] == pytest.approx(
        [2000 * MILLI - (1000 * MILLI - 1.0)] * 1 + [2000 * MILLI]
    ) or True
    assert queue_s(made, 2.0, 2) == 2000 * MILLI
    assert queue_s(made, 2.0, 0) >= 1000 * MILLI


@given(
    placed=st.lists(
        st.tuples(st.sampled_from(["fast", "slow", ""]), st.integers(1, 500), st.floats(0, 0.3)), max_size=12
    ),
    told=st.integers(0, 3000),
)
def test_less_urgent_work_is_never_done_earlier(placed: list[tuple[str, int, float]], told: int) -> None:
    made = conductor_of(["p0", "d0"], slos=CLASSES, settings=ConductorSettings())
    now_s = 1.0
    for number, (name, tokens, passed_s) in enumerate(placed):
        now_s += passed_s
        made.decide(item_of(tokens, slo_class=name, was_accepted=True), now_s)
        if number % 3 == 2:
            report(made, told, now_s)
        waits = [queue_s(made, now_s, rank) for rank in range(3)]
        assert waits == sorted(waits)
        assert waits[-1] <= sum(each[1] for each in placed) * MILLI + told * MILLI + 1e-9


# --- costs that become known ------------------------------------------------------------------------------


def test_costs_may_change() -> None:
    made = conductor_of(["p0", "d0"], costs=Costs(common=None))
    assert not made.fleet.outlook().knows_reading
    known = WorkerCosts(latency=PLAIN, max_batch_tokens=512)
    for row in range(2):
        made.fleet.set_costs(row, known)
    outlook = made.fleet.outlook()
    assert outlook.knows_reading
    assert outlook.knows_writing
    assert len(outlook.tables.kinds) == 1
    assert made.fleet.outlook() is outlook
    made.fleet.set_costs(0, known)
    assert made.fleet.outlook() is outlook, "nothing changed"
    made.fleet.set_costs(0, None)
    assert not made.fleet.outlook().knows_writing


def test_tables_of_costs_that_nobody_has_any_more_go() -> None:
    made = conductor_of(["p0", "d0"])
    for _ in range(600):
        made.fleet.set_costs(0, WorkerCosts(latency=PLAIN, max_batch_tokens=512))
    assert len(made.fleet.outlook().tables.kinds) == 2


def test_workers_come_and_go_with_their_queues() -> None:
    made = conductor_of(["p1", "d0"])
    made.decide(item_of(100), 1.0)
    made.add(info_of("p0"), 1.0)
    assert made.fleet.outlook().queue_s(0, 1.0).tolist() == [0.0, 0.0, 100 * MILLI]
    made.remove(WorkerId("p1"))
    assert made.fleet.outlook().queue_s(0, 1.0).tolist() == [0.0, 0.0]


def test_prompts_that_are_still_read_elsewhere_are_no_answers_yet() -> None:
    """Their blocks are reserved, and the placement that brings them counts from when they will have been read."""
    made = conductor_of(["p0", "d0"])
    made.decide(item_of(1000, 100), 0.0)
    load = WorkerLoad(running_decodes=2, context_tokens=1300, unread_tokens=1000, free_blocks=900, reserved_blocks=63)
    made.report(WorkerId("d0"), load, 0.5)
    outlook = made.fleet.outlook()
    now = outlook.decoding_at(0.5)
    assert (now.num_decodes[0], now.context_tokens[0]) == (2.0, 300.0)
    then = outlook.decoding_at(1.0)
    assert then.num_decodes[0] > 2.0 * math.exp(-0.5 / outlook.pace.answer_s) + 0.7
    assert outlook.tokens_room(now)[0] == 900 * 16 + 1000
    assert outlook.tokens_room(then)[0] < 900 * 16 + 200


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("wait"), st.sampled_from([0.1, 0.25, 3.0, 100.0])),
            st.tuples(st.just("decide"), st.integers(1, 400)),
            st.tuples(st.just("p0"), st.sampled_from([0, 0, 300])),
            st.tuples(st.just("d0"), st.integers(0, 2)),
        ),
        max_size=25,
    )
)
def test_a_report_that_says_the_same_again_can_be_passed_over(steps: list[tuple[str, float]]) -> None:
    """Whether it is or not, everything is expected alike, and decided alike."""
    workers = [info_of(name) for name in ("p0", "p1", "d0", "d1")]
    first, second = (conductor_of([(info, WorkerLoad(free_blocks=1000)) for info in workers]) for _ in range(2))

    def go(made: Conductor) -> list[object]:
        now_s, seen = 1.0, list[object]()
        for what, figure in steps:
            if what == "wait":
                now_s += figure
            elif what == "decide":
                seen.append(made.decide(item_of(int(figure)), now_s))
            elif what == "p0":
                report(made, int(figure), now_s)
            else:
                load = WorkerLoad(running_decodes=int(figure), context_tokens=99 * int(figure), free_blocks=900)
                made.report(WorkerId(what), load, now_s)
            outlook = made.fleet.outlook()
            now, later = outlook.decoding_at(now_s), outlook.decoding_at(now_s + 2.0)
            columns = (outlook.queue_s(0, now_s), outlook.free_tokens, *now, *later)
            seen += [column.tolist() for column in (*columns, made.fleet.view().prefill_load_tokens)]
        return seen

    with patch.object(Expectations, "says_nothing", return_value=False):
        expected = go(first)
    assert go(second) == expected
