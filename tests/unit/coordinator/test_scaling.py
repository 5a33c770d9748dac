"""How many workers a pool gets: tables of single looks, and what holds for all."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.policy.scaling import by_cost_of_leaving, can_spare, decide
from coordinator.policy.scaling_demand import coming, demand, growth_per_s
from coordinator.policy.scaling_terms import (
    Look,
    PoolView,
    PoolWorker,
    ScaleMemory,
    ScaleRules,
    SpareWorker,
    StartingWorker,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from coordinator.policy.scaling_terms import ScaleDecision

RULES = ScaleRules(min_workers=1, max_workers=8, settle_s=0.0, window_s=60.0, cooldown_up_s=10.0, cooldown_down_s=30.0)
#: Long enough ago that nothing has to be waited for.
RESTED = ScaleMemory(first_look_s=-1e6, up_s=-1e6, down_s=-1e6)
MEMORY_TOKENS = 10_000.0


def writers(*used_tokens: float, answers: int = 10, queued_tokens: float = 0.0) -> tuple[PoolWorker, ...]:
    return tuple(
        PoolWorker(
            worker_id=f"w-{i}",
            memory_tokens=MEMORY_TOKENS,
            used_tokens=used,
            answers=answers if used else 0,
            queued_tokens=queued_tokens,
        )
        for i, used in enumerate(used_tokens)
    )


def readers(*delays_s: float) -> tuple[PoolWorker, ...]:
    return tuple(
        PoolWorker(worker_id=f"r-{i}", memory_tokens=MEMORY_TOKENS, queue_delay_s=delay_s)
        for i, delay_s in enumerate(delays_s)
    )


def look(view: PoolView, rules: ScaleRules = RULES, memory: ScaleMemory = RESTED, now_s: float = 0.0) -> ScaleDecision:
    return decide(view, rules, now_s, memory)[0]


def pool(workers: Sequence[PoolWorker] = (), **figures: object) -> PoolView:
    return replace(PoolView(pool="p", num_startable=8, start_s=5.0), workers=tuple(workers), **figures)  # type: ignore[arg-type]


# --- what calls for more -----------------------------------------------------------------------------


def test_memory_asks_for_as_many_workers_as_keep_the_mean_freeness_at_the_lower_end() -> None:
    # 19,800 tokens of 20 answers that shall be able to grow by 10 each: 20,000 tokens, two workers exactly.
    decision = look(pool(writers(9_900.0, 9_900.0)))
    assert (decision.kind, decision.why) == ("keep", "steady")
    more = look(pool(writers(9_900.0, 9_901.0)))
    assert (more.kind, more.why, more.num_starts, more.wanted) == ("up", "demand", 1, 3)


def test_what_waits_for_memory_counts_as_if_it_were_there() -> None:
    assert look(pool(writers(5_000.0, queued_tokens=4_800.0))).num_starts == 0
    assert look(pool(writers(5_000.0, queued_tokens=30_000.0))).num_starts == 3


def test_workers_that_start_count_as_capacity() -> None:
    view = pool(writers(9_990.0), starting=(StartingWorker(worker_id="s", age_s=1.0, takes_s=5.0),))
    assert look(view).kind == "keep"
    # One that should have been ready long ago does not; the limit counts it all the same.
    late = pool(writers(9_990.0), starting=(StartingWorker(worker_id="s", age_s=60.0, takes_s=5.0),))
    assert look(late).num_starts == 1
    assert look(late, replace(RULES, max_workers=2)).why == "at_maximum"


def test_a_queue_that_the_present_workers_end_before_a_start_would_asks_for_nobody() -> None:
    burst = pool(readers(40.0, 40.0), start_s=40.0)
    assert look(burst).kind == "keep"
    assert look(replace(burst, start_s=1.0)).kind == "up"


def test_a_queue_that_stays_is_worked_off_within_the_time_allowed() -> None:
    # 60 s wait, a start takes 6 s, within 15 s more down to 1 s: (60 - 6) / 16 = 3.4 workers.
    decision = look(pool(readers(60.0), start_s=6.0))
    assert (decision.wanted, decision.num_starts) == (4, 3)


def test_prompts_that_come_in_ask_for_workers_before_there_is_a_queue() -> None:
    # Half a second of reading each, 2 a second: one worker is busy all the time; with a delay of 1 s allowed it may be
    # busy for two thirds.
    view = pool(readers(0.0), arrivals=120, recent_arrivals=30, work_rate=1.0)
    decision = look(view)
    assert decision.wanted == 2
    assert "reading 1.50" in decision.reason


def test_one_writes_no_more_answers_than_meet_their_target() -> None:
    view = pool(writers(1_000.0, answers=30), answers_limit=8.0)
    assert look(view).wanted == 4


def test_starts_are_limited_by_step_by_maximum_and_by_what_can_be_started() -> None:
    view = pool(writers(60_000.0))
    assert look(view, replace(RULES, max_step_up=2)).num_starts == 2
    assert look(view, replace(RULES, max_workers=3, max_step_up=8)).num_starts == 2
    assert look(replace(view, num_startable=1)).num_starts == 1
    nothing = look(replace(view, num_startable=0))
    assert (nothing.kind, nothing.why) == ("keep", "nothing_to_start")
    assert look(view, replace(RULES, max_workers=1)).why == "at_maximum"


def test_a_pool_below_its_least_is_filled_at_once() -> None:
    rules = replace(RULES, min_workers=2, cooldown_up_s=1e9)
    decision, memory = decide(pool(writers(100.0)), rules, 0.0, RESTED)
    assert (decision.why, decision.num_starts, memory.up_s) == ("minimum", 1, 0.0)


def test_load_must_last_before_it_is_answered() -> None:
    rules = replace(RULES, settle_s=3.0)
    high, low = pool(writers(15_000.0)), pool(writers(1_000.0))
    first, _ = decide(high, rules, 0.0, ScaleMemory())
    assert (first.kind, first.why) == ("keep", "settling")
    _, memory = decide(low, rules, 0.0, RESTED)
    once, memory = decide(high, rules, 2.0, memory)
    assert (once.kind, once.why) == ("keep", "settling")
    again, memory = decide(high, rules, 4.0, memory)
    assert again.why == "settling"
    settled, _ = decide(high, rules, 6.0, memory)
    assert settled.kind == "up"


def test_more_comes_no_sooner_after_a_change_than_the_rules_say() -> None:
    decision = look(pool(writers(15_000.0)), memory=replace(RESTED, down_s=-4.0))
    assert (decision.kind, decision.why) == ("keep", "cooldown")
    assert "4.0 s after the last change (10 s apart)" in decision.reason


def test_a_worker_that_is_lost_is_replaced_at_once_if_its_load_needs_one() -> None:
    staying, dying = writers(8_000.0, 8_000.0)
    dying = replace(dying, is_leaving=True, is_lost=True)
    recent = replace(RESTED, up_s=-1.0)
    decision = look(pool((staying, dying)), memory=recent)
    assert (decision.kind, decision.num_starts) == ("up", 1)
    idle = look(pool((staying, replace(dying, used_tokens=0.0, answers=0))), memory=recent)
    assert idle.kind == "keep"


def test_demand_that_rises_throughout_is_met_when_it_comes() -> None:
    rules = replace(RULES, settle_s=1.0)

    def reasons(start_s: float) -> list[str]:
        memory, found = RESTED, list[str]()
        for i in range(31):
            view = pool(writers(2_000.0 + 200.0 * i), start_s=start_s)
            decision, memory = decide(view, rules, 2.0 * i, memory)
            found += [decision.reason] if decision.kind == "up" else []
        return found

    # At the end 8,000 of 10,000 tokens, and 100 more each second: full in 19 s.
    assert reasons(5.0) == []
    assert "growing 0.60 a minute" in reasons(30.0)[0]


@pytest.mark.parametrize("step_at", range(1, 39))
def test_a_step_is_no_growth(step_at: int) -> None:
    looks = [Look(float(i) * 1.5, 1.0 if i < step_at else 5.0, 1.0) for i in range(40)]
    assert growth_per_s(looks, 60.0) == 0.0


def test_what_comes_no_more_is_not_started_for() -> None:
    full = pool(writers(12_000.0), arrivals=400, recent_arrivals=100, answer_s=5.0, start_s=30.0)
    assert look(full).kind == "up"
    assert look(replace(full, recent_arrivals=0)).kind == "keep"
    # Answers that take long are still there.
    assert look(replace(full, recent_arrivals=0, answer_s=600.0)).kind == "up"


# --- flips ---------------------------------------------------------------------------------------------

SPARE = SpareWorker(worker_id="d-1", pool="decode", flip_s=2.0)


def test_a_flip_goes_before_a_start_that_takes_longer() -> None:
    view = pool(writers(25_000.0), spares=(SPARE,), start_s=20.0)
    decision = look(view)
    assert (decision.flips, decision.num_starts) == ((SPARE,), 1)
    assert look(view, replace(RULES, flip=False)).flips == ()
    assert look(replace(view, start_s=1.0)).flips == ()


def test_a_flip_that_takes_longer_than_a_start_is_for_where_none_can_be_started() -> None:
    view = pool(writers(15_000.0), spares=(SPARE,), start_s=1.0, num_startable=0)
    assert look(view).flips == (SPARE,)


def test_a_flip_answers_a_burst_for_which_a_start_would_come_too_late() -> None:
    burst = pool(readers(20.0), start_s=30.0)
    assert look(burst).kind == "keep"
    with_spare = look(replace(burst, spares=(SPARE,)))
    assert (with_spare.flips, with_spare.num_starts) == ((SPARE,), 0)


# --- attainment ----------------------------------------------------------------------------------------


def test_missed_targets_bring_one_worker_and_no_further_one_unless_it_helped() -> None:
    view = pool(writers(6_000.0), attainment=0.5, num_judged=100)
    first, memory = decide(view, RULES, 0.0, RESTED)
    assert (first.why, first.num_starts) == ("attainment", 1)
    both = replace(view, workers=writers(4_000.0, 4_000.0))
    # Judged requests of the window were served by one.
    soon, memory = decide(both, RULES, 30.0, memory)
    assert soon.kind == "keep"
    did_not_help, _ = decide(both, RULES, 100.0, memory)
    assert did_not_help.kind == "keep"
    helped, _ = decide(replace(both, attainment=0.7), RULES, 100.0, memory)
    assert (helped.why, helped.num_starts) == ("attainment", 1)


def test_attainment_of_few_requests_or_of_an_idle_pool_says_nothing() -> None:
    view = pool(writers(6_000.0), attainment=0.0, num_judged=5)
    assert look(view).kind == "keep"
    assert look(pool(writers(500.0), attainment=0.0, num_judged=500)).kind == "keep"


# --- fewer ---------------------------------------------------------------------------------------------


def test_the_pool_shrinks_by_one_where_those_left_would_do() -> None:
    quiet = ScaleMemory(looks=(Look(-60.0, 0.4, 0.4),), first_look_s=-1e6)
    view = pool(writers(2_000.0, 1_000.0, 1_000.0))
    decision = look(view, memory=quiet)
    assert (decision.kind, decision.why, decision.remove) == ("down", "free", ("w-1",))
    busy_before = replace(quiet, looks=(Look(-50.0, 2.5, 2.5),))
    assert look(view, memory=busy_before).kind == "keep"
    recent = replace(quiet, up_s=-20.0)
    assert look(view, memory=recent).why == "cooldown"
    assert look(replace(view, starting=(StartingWorker(worker_id="s", age_s=0.0, takes_s=1.0),))).kind == "keep"
    leaving = (*view.workers, replace(view.workers[0], worker_id="x", is_leaving=True))
    assert look(replace(view, workers=leaving), memory=quiet).kind == "keep"


def test_the_pool_does_not_shrink_within_the_band_of_freeness() -> None:
    # Two workers with 4,000 of 20,000 tokens and 40 answers: freeness 400.
    view = pool(writers(2_000.0, 2_000.0, answers=20))
    assert look(view, replace(RULES, freeness_high=399.0)).kind == "down"
    assert look(view, replace(RULES, freeness_high=400.0)).kind == "keep"


def test_the_last_worker_stays_unless_the_pool_may_be_empty_and_nothing_came() -> None:
    idle = pool(writers(0.0), idle_s=120.0)
    assert look(idle).kind == "keep"
    to_zero = replace(RULES, min_workers=0, to_zero_after_s=100.0)
    assert look(idle, replace(RULES, min_workers=0)).kind == "keep"
    assert look(replace(idle, idle_s=99.0), to_zero).kind == "keep"
    decision = look(idle, to_zero)
    assert (decision.why, decision.remove, decision.wanted) == ("idle", ("w-0",), 0)


def test_an_empty_pool_wakes_for_the_first_request_whatever_the_cooldown() -> None:
    rules = replace(RULES, min_workers=0, to_zero_after_s=10.0)
    empty = pool()
    assert look(empty, rules).kind == "keep"
    decision = look(replace(empty, unserved_requests=1), rules, replace(RESTED, down_s=-0.5))
    assert (decision.why, decision.num_starts) == ("wake", 1)
    waking = replace(empty, unserved_requests=5, starting=(StartingWorker(worker_id="s", age_s=1.0, takes_s=5.0),))
    assert look(waking, rules).kind == "keep"


def test_a_pool_above_its_limit_shrinks_whatever_its_load() -> None:
    decision = look(pool(writers(6_000.0, 5_000.0)), replace(RULES, max_workers=1))
    assert (decision.why, decision.remove) == ("maximum", ("w-1",))


def test_whoever_has_fewest_requests_and_is_freest_leaves_first() -> None:
    few, free, fuller = (
        PoolWorker(worker_id="b", memory_tokens=1.0, answers=1, used_tokens=0.9),
        PoolWorker(worker_id="c", memory_tokens=1.0, answers=2, used_tokens=0.1),
        PoolWorker(worker_id="a", memory_tokens=1.0, answers=2, used_tokens=0.2),
    )
    assert by_cost_of_leaving([fuller, free, few]) == [few, free, fuller]


def test_a_pool_spares_only_what_its_demand_of_the_window_leaves() -> None:
    view = pool(writers(1_000.0, 1_000.0))
    assert can_spare(view, RULES, ScaleMemory(looks=(Look(0.0, 0.5, 0.9),)))
    assert not can_spare(view, RULES, ScaleMemory(looks=(Look(0.0, 0.5, 0.95),)))
    assert not can_spare(view, replace(RULES, min_workers=2), ScaleMemory(looks=(Look(0.0, 0.5, 0.9),)))


# --- rules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_workers": 2, "max_workers": 1},
        {"max_workers": 0, "min_workers": 0},
        {"target_attainment": 0.0},
        {"queue_delay_s": 0.0},
        {"freeness_low": 60.0},
        {"cooldown_up_s": -1.0},
        {"max_step_up": 0},
        {"window_s": 0.0},
        {"to_zero_after_s": 5.0},
    ],
)
def test_rules_that_cannot_be_kept_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ScaleRules(**wrong)  # type: ignore[arg-type]


# --- whatever comes ------------------------------------------------------------------------------------

workers = st.builds(
    PoolWorker,
    worker_id=st.uuids().map(str),
    memory_tokens=st.floats(1e3, 1e5),
    used_tokens=st.floats(0, 2e5),
    queued_tokens=st.floats(0, 1e5),
    answers=st.integers(0, 100),
    waiting_requests=st.integers(0, 100),
    queue_delay_s=st.floats(0, 100),
    is_leaving=st.booleans(),
    is_lost=st.booleans(),
)
starters = st.builds(StartingWorker, worker_id=st.uuids().map(str), age_s=st.floats(0, 300), takes_s=st.floats(0, 60))
spares = st.builds(SpareWorker, worker_id=st.uuids().map(str), pool=st.just("o"), flip_s=st.floats(0, 60))
views = st.builds(
    PoolView,
    pool=st.just("p"),
    workers=st.lists(workers, max_size=6).map(tuple),
    starting=st.lists(starters, max_size=3).map(tuple),
    num_startable=st.integers(0, 8),
    start_s=st.floats(0, 120),
    start_spread_s=st.floats(0, 10),
    spares=st.lists(spares, max_size=3).map(lambda them: tuple(sorted(them, key=lambda one: one.flip_s))),
    arrivals=st.integers(0, 1000),
    recent_arrivals=st.integers(0, 1000),
    work_rate=st.floats(0, 20),
    answer_s=st.none() | st.floats(0, 100),
    answers_limit=st.none() | st.floats(0.5, 100),
    attainment=st.none() | st.floats(0, 1),
    num_judged=st.integers(0, 200),
    unserved_requests=st.integers(0, 3),
    idle_s=st.floats(0, 1000),
)


def _limited(rules: ScaleRules, least: int, span: int) -> ScaleRules:
    return replace(rules, min_workers=least, max_workers=max(1, least + span))


rules = st.builds(
    _limited,
    st.builds(
        ScaleRules,
        settle_s=st.sampled_from([0.0, 3.0]),
        cooldown_up_s=st.sampled_from([0.0, 10.0]),
        cooldown_down_s=st.sampled_from([0.0, 20.0]),
        window_s=st.sampled_from([1.0, 15.0]),
        max_step_up=st.integers(1, 4),
        max_step_down=st.integers(1, 3),
    ),
    st.integers(0, 3),
    st.integers(0, 6),
)


@given(st.lists(st.tuples(st.floats(0.1, 30.0), views), min_size=1, max_size=12), rules)
def test_no_decision_leaves_the_limits_or_turns_within_a_cooldown(
    looks: list[tuple[float, PoolView]], rules: ScaleRules
) -> None:
    memory, now_s = ScaleMemory(), 0.0
    up_s = down_s = -math.inf
    for passed_s, view in looks:
        now_s += passed_s
        decision, memory = decide(view, rules, now_s, memory)
        serving, starting = len(view.serving), len(view.starting)
        added = decision.num_starts + len(decision.flips)
        assert decision.reason
        assert decision.num_starts <= view.num_startable
        assert added <= rules.max_step_up
        assert len(decision.remove) <= rules.max_step_down
        assert not (added and decision.remove)
        assert (decision.kind == "keep") == (not added and not decision.remove)
        if added:
            assert serving + starting + added <= rules.max_workers
            is_urgent = serving < max(1, rules.min_workers) or any(worker.is_lost for worker in view.workers)
            assert is_urgent or now_s - max(up_s, down_s) >= rules.cooldown_up_s
            up_s = now_s
            if decision.why == "demand":
                # No more than all looks since the last change asked for, however often it looks.
                assert coming(view) + len(view.serving) + added <= math.ceil(memory.looks[-1].later)
        if decision.remove:
            assert serving - len(decision.remove) >= rules.min_workers
            assert set(decision.remove) <= {worker.worker_id for worker in view.serving}
            assert now_s - max(up_s, down_s) >= rules.cooldown_down_s
            down_s = now_s


@given(views, st.floats(1.0, 5.0))
def test_more_load_never_asks_for_fewer(view: PoolView, factor: float) -> None:
    heavier = replace(
        view,
        work_rate=view.work_rate * factor,
        workers=tuple(
            replace(
                worker,
                used_tokens=worker.used_tokens * factor,
                queued_tokens=worker.queued_tokens * factor,
                answers=math.ceil(worker.answers * factor),
                queue_delay_s=worker.queue_delay_s * factor,
            )
            for worker in view.workers
        ),
    )
    before, after = (demand(each, RULES, view.start_s) for each in (view, heavier))
    assert after.now >= before.now - 1e-9
    assert after.later >= before.later - 1e-9


@given(
    used_tokens=st.floats(0, 6e4),
    answers=st.integers(0, 200),
    work_rate=st.floats(0, 5),
    begin=st.integers(1, 8),
)
def test_constant_load_ends_in_a_fixed_point(used_tokens: float, answers: int, work_rate: float, begin: int) -> None:
    """What is decided is done at once; load is spread evenly."""
    memory, num_workers, now_s = ScaleMemory(), begin, 0.0
    changes: list[str] = []
    view = pool()
    for _ in range(300):
        now_s += 5.0
        view = pool(
            [
                PoolWorker(
                    worker_id=f"w-{i}",
                    memory_tokens=MEMORY_TOKENS,
                    used_tokens=used_tokens / num_workers,
                    answers=answers // num_workers + (i < answers % num_workers),
                )
                for i in range(num_workers)
            ],
            arrivals=600,
            recent_arrivals=150,
            work_rate=work_rate,
        )
        decision, memory = decide(view, RULES, now_s, memory)
        num_workers += decision.num_starts - len(decision.remove)
        if decision.kind != "keep":
            changes.append(decision.kind)
    # It goes one way, and ends.
    assert changes == ["up"] * len(changes) or changes == ["down"] * len(changes)
    assert len(changes) <= 8
    last, _ = decide(view, RULES, now_s + 5.0, memory)
    assert last.kind == "keep"
