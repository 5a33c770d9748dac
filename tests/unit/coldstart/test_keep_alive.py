"""Keep-alive: windows from idle times, what is worth holding, who goes first."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.keep_alive import HeldModel, IdleTimes, KeepRules, Way, decide, loss_s, make_room, window

GIB = 2**30
FIXED, LRU, HISTOGRAM = KeepRules(way="fixed"), KeepRules(way="lru"), KeepRules(way="histogram")
COST = KeepRules(way="cost_aware")


def held(
    model: str = "m", *, gib: float = 16.0, reload_s: float = 10.0, since_s: float = 0.0, is_held: bool = True
) -> HeldModel:
    return HeldModel(model=model, num_bytes=round(gib * GIB), reload_s=reload_s, idle_since_s=since_s, is_held=is_held)


def seen(**idle_s: list[float]) -> IdleTimes:
    times = IdleTimes()
    for model, some in idle_s.items():
        for one in some:
            times.observe(model, one)
    return times


# --- windows ------------------------------------------------------------------------------------------


def test_fixed_holds_for_a_time_and_lru_for_ever() -> None:
    times = IdleTimes()
    assert decide(held(), FIXED, times, 599.0).kind == "keep"
    assert decide(held(), FIXED, times, 599.0).next_s == 600.0
    assert decide(held(), FIXED, times, 600.0).kind == "release"
    assert decide(held(), LRU, times, 1e9).kind == "keep"


@pytest.mark.parametrize("rules", [HISTOGRAM, COST], ids=["histogram", "cost_aware"])
def test_what_is_called_by_a_timer_is_let_go_of_and_warmed_in_time(rules: KeepRules) -> None:
    """Two hours less what an answer takes."""
    times = seen(m=[7150.0] * 30)
    look = window(held(), rules, times)
    assert 0 < look.warm_s <= 7150.0 - 10.0
    assert look.warm_s > 7150.0 / 2
    assert look.until_s > 7150.0
    assert decide(held(), rules, times, 1.0).kind == "release"
    assert decide(held(), rules, times, 1.0).next_s == look.warm_s
    assert decide(held(is_held=False), rules, times, look.warm_s).kind == "warm"
    assert decide(held(), rules, times, 7149.0).kind == "keep"
    assert decide(held(), rules, times, look.until_s).kind == "release"


@given(since_s=st.floats(0, 1e6), idle_s=st.floats(700.0, 14_000.0), way=st.sampled_from(["histogram", "cost_aware"]))
def test_who_asks_again_when_told_to_gets_another_answer(since_s: float, idle_s: float, way: Way) -> None:
    """No rounding makes it the same one at the same time."""
    times = seen(m=[idle_s] * 30)
    first = decide(held(since_s=since_s), KeepRules(way=way), times, since_s)
    if first.next_s == math.inf:
        return
    second = decide(held(since_s=since_s, is_held=False), KeepRules(way=way), times, first.next_s)
    assert second.kind == "warm" if first.kind == "release" else second.kind == "release"
    assert second.next_s > first.next_s


def test_short_idle_times_are_held_through() -> None:
    times = seen(m=[20.0] * 40)
    for rules in (HISTOGRAM, COST):
        look = window(held(), rules, times)
        assert look.warm_s == 0.0
        assert 60.0 <= look.until_s <= 120.0


def test_histogram_says_nothing_from_few_or_long_or_shapeless_times() -> None:
    whole_s = IdleTimes().range_s
    few = window(held(), HISTOGRAM, seen(m=[50.0] * 7))
    long = window(held(), HISTOGRAM, seen(m=[1e5] * 20 + [50.0] * 10))
    flat = window(held(), HISTOGRAM, seen(m=[60.0 * minute + 1 for minute in range(240)]))
    assert [(one.warm_s, one.until_s) for one in (few, long, flat)] == [(0.0, whole_s)] * 3
    assert "7 idle times say nothing" in few.reason
    assert "20 of 30" in long.reason
    assert "no shape" in flat.reason


def test_cost_decides_by_bytes_and_by_reload() -> None:
    """Asked for every hour or so, without a memory: a small one is worth holding, a large and fast one is not."""
    times = seen(m=[-3600.0 * math.log1p(-(place + 0.5) / 200) for place in range(200)])
    small = window(held(gib=4.0, reload_s=30.0), COST, times)
    assert small.warm_s == 0.0
    assert small.until_s >= 7000.0
    nothing = window(held(gib=64.0, reload_s=3.0), COST, times)
    assert nothing.until_s == 0.0
    assert nothing.warm_s == 0.0
    assert decide(held(gib=64.0, reload_s=3.0), COST, times, 0.0).kind == "release"


@given(
    idle_s=st.lists(st.floats(0, 20_000), min_size=1, max_size=60),
    prices=st.tuples(st.floats(1e-6, 1e-2), st.floats(1e-6, 1e-2)),
    gib=st.floats(0.5, 100),
)
def test_a_higher_price_never_holds_more(idle_s: list[float], prices: tuple[float, float], gib: float) -> None:
    times = seen(m=idle_s)

    def held_s(price: float) -> float:
        look = window(held(gib=gib), KeepRules(way="cost_aware", wait_s_per_gib_s=price), times)
        assert look.until_s >= look.warm_s >= 0
        return look.until_s - look.warm_s

    # Warming begins before its bin, by what a load takes: that is no time of holding.
    assert held_s(max(prices)) <= held_s(min(prices)) + 10.0


@given(idle_s=st.lists(st.floats(0, 14_000), min_size=8, max_size=60), price=st.floats(1e-6, 1e-3))
def test_no_span_of_bins_saves_more_than_the_one_held(idle_s: list[float], price: float) -> None:
    """Reckoned time by time: holding from the start until any bin's end, against what was decided."""
    times = IdleTimes()
    for one in idle_s:
        times.observe("m", one)
    rules = KeepRules(way="cost_aware", wait_s_per_gib_s=price, borrowed_times=0.0)
    look = window(held(), rules, times)
    # In the middle of its bin, as the policy has it.
    middles_s = [(one // times.bin_s + 0.5) * times.bin_s for one in idle_s]

    def saved_s(until_s: float) -> float:
        reloads_s = 10.0 * sum(one < until_s for one in middles_s)
        return reloads_s - price * 16.0 * sum(min(one, until_s) for one in middles_s)

    best_s = max(saved_s(times.bin_s * count) for count in range(times.num_bins + 1))
    if look.warm_s == 0.0:
        assert saved_s(look.until_s) == pytest.approx(best_s, abs=1e-6)
    else:
        assert "away for" in look.reason


def test_new_models_borrow_from_the_others_and_then_stand_for_themselves() -> None:
    times = seen(other=[30.0] * 50)
    assert window(held("new"), COST, times).until_s == 60.0
    for _ in range(40):
        times.observe("new", 10_000.0)
    assert window(held("new"), COST, times).until_s != 60.0
    times.forget(["new"])
    assert times.counts("new").sum() == 0


def test_with_nothing_seen_it_is_held_for_what_a_reload_costs() -> None:
    assert window(held(), COST, IdleTimes()).until_s == pytest.approx(10.0 / (16 * 1e-4))


# --- pressure -----------------------------------------------------------------------------------------


def test_the_one_used_longest_ago_goes_first_unless_costs_are_known() -> None:
    times = seen(often=[90.0] * 50, rare=[7000.0] * 50)
    models = [held("often", since_s=0.0), held("rare", since_s=50.0)]
    assert [one.model for one in make_room(models, GIB, LRU, times, 80.0) or ()] == ["often"]
    assert [one.model for one in make_room(models, GIB, COST, times, 80.0) or ()] == ["rare"]


def test_none_goes_in_vain_and_not_enough_is_told() -> None:
    models = [held("a", gib=1.0), held("b", gib=2.0, since_s=1.0), held("c", gib=8.0, since_s=2.0)]
    times = IdleTimes()
    assert [one.model for one in make_room(models, 8 * GIB, LRU, times, 9.0) or ()] == ["c"]
    assert [one.model for one in make_room(models, 3 * GIB, LRU, times, 9.0) or ()] == ["a", "b"]
    assert make_room(models, 12 * GIB, LRU, times, 9.0) is None
    assert make_room([], 0, LRU, times, 9.0) == []
    assert make_room([held(is_held=False)], 1, LRU, times, 9.0) is None


def test_loss_falls_once_the_usual_time_has_passed() -> None:
    times = seen(m=[90.0] * 45 + [9000.0] * 5)
    hold = KeepRules(way="fixed", fixed_s=600.0)
    early, late = loss_s(held(), hold, times, 10.0), loss_s(held(), hold, times, 300.0)
    assert early == pytest.approx(9.0)
    assert late == 0.0
    assert loss_s(held(), hold, times, 700.0) == 0.0
    assert loss_s(held(), hold, IdleTimes(), 10.0) == 10.0


def test_memory_of_idle_times_is_bounded() -> None:
    times = IdleTimes()
    for place in range(5000):
        times.observe("m", 10.0 * place)
    assert times.counts("m").nbytes <= 2048
    assert times.counts("m").sum() == 5000
    with pytest.raises(ValueError, match="negative"):
        times.observe("m", -1.0)
