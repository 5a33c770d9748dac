"""Start-up estimates: bandwidths are learned from loads, the page cache is seen through, lines go by arrival."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.estimate import (
    TIER_CODES,
    TIERS,
    Bandwidth,
    LoadHistory,
    MeasuredLoad,
    QueuedLoad,
    Tier,
    queue_s,
)

GB = 10**9


def load(
    gb_per_s: float, tier: Tier = "ssd", node: str = "a", *, gb: float = 10.0, direct: bool = True
) -> MeasuredLoad:
    return MeasuredLoad(node_id=node, tier=tier, num_bytes=round(gb * GB), seconds=gb / gb_per_s, is_direct=direct)


def learned(*loads: MeasuredLoad, told: dict[Tier, float] | None = None) -> LoadHistory:
    history = LoadHistory(told)
    for one in loads:
        history.observe(one)
    return history


def queued(name: str, gb: float, arrived_s: float, *, done_gb: float = 0.0, tier: Tier = "ssd") -> QueuedLoad:
    return QueuedLoad(
        load_id=name, tier=tier, num_bytes=round(gb * GB), done_bytes=round(done_gb * GB), arrived_s=arrived_s
    )


# --- bandwidths ---------------------------------------------------------------------------------------


@given(
    true=st.floats(0.1, 50.0),
    noise=st.lists(st.floats(0.9, 1.1), min_size=20, max_size=60),
    before=st.lists(st.floats(0.1, 50.0), max_size=30),
    stalls=st.sets(st.integers(0, 19), max_size=3),
)
def test_converges_on_what_the_disk_does_whatever_it_did_before(
    true: float, noise: list[float], before: list[float], stalls: set[int]
) -> None:
    """Some loads that stalled make no difference."""
    recent = [factor * (0.05 if place in stalls else 1.0) for place, factor in enumerate(noise)]
    history = learned(*(load(one) for one in before), *(load(true * factor) for factor in recent))
    assert history.bandwidth("a", "ssd").bytes_per_s == pytest.approx(true * GB, rel=0.11)


def test_a_changed_disk_is_noticed_within_a_dozen_loads() -> None:
    history = learned(*(load(10.0) for _ in range(32)), *(load(2.0) for _ in range(7)))
    assert history.bandwidth("a", "ssd").bytes_per_s == pytest.approx(2.0 * GB)


def test_small_loads_count_less_than_large_ones() -> None:
    """A few megabytes take mostly what is not transfer."""
    history = learned(*(load(10.0) for _ in range(3)), *(load(0.2, gb=0.004) for _ in range(20)))
    assert history.bandwidth("a", "ssd").bytes_per_s == pytest.approx(10.0 * GB)


def test_page_cache_is_told_from_the_disk() -> None:
    cached = load(20.0, direct=False)
    history = learned(load(3.0), *[cached] * 20)
    assert history.bandwidth("a", "ssd") == Bandwidth(3.0 * GB, "measured", 1)
    assert history.is_cached(cached)
    assert not history.is_cached(load(3.3, direct=False))
    assert not history.is_cached(load(20.0))


def test_without_direct_io_the_slow_loads_count_and_never_more_than_was_told() -> None:
    buffered = [load(speed, direct=False) for speed in (2.0, 2.1, *([20.0] * 4))]
    assert learned(*buffered).bandwidth("a", "ssd").bytes_per_s < 2.5 * GB
    all_cached = [load(20.0, direct=False)] * 5
    history = learned(*all_cached, told={"ssd": 4.0 * GB})
    assert history.bandwidth("a", "ssd") == Bandwidth(4.0 * GB, "buffered", 5)
    assert history.is_cached(all_cached[0])


def test_unmeasured_tiers_are_taken_from_other_nodes_then_as_told_then_unknown() -> None:
    history = learned(load(3.0, node="a"), load(5.0, node="b"), load(7.0, node="c"), told={"remote": 1.0 * GB})
    assert history.bandwidth("d", "ssd") == Bandwidth(5.0 * GB, "fleet", 3)
    assert history.bandwidth("d", "remote") == Bandwidth(1.0 * GB, "told")
    assert history.bandwidth("d", "dram") == Bandwidth(0.0, "unknown")


def test_a_path_is_as_fast_as_its_slowest_part() -> None:
    history = learned(load(2.0, "dram"), load(6.0, "ssd"), told={"remote": 9.0 * GB})
    assert history.path("a", "remote").bytes_per_s == 2.0 * GB
    assert history.path("a", "ssd").bytes_per_s == 2.0 * GB


def test_a_load_that_passed_a_tier_overrules_what_was_told_of_it() -> None:
    history = learned(load(8.0, "ssd"), told={"dram": 5.0 * GB, "remote": 9.0 * GB})
    assert history.path("a", "ssd").bytes_per_s == 8.0 * GB
    assert history.path("a", "remote").bytes_per_s == 5.0 * GB


def test_no_bandwidth_is_written_down() -> None:
    """Without measurements nothing is known, and a start takes for ever."""
    table = LoadHistory().table(["a"])
    tiers = np.array([TIER_CODES["dram"]])
    assert table.start_s(1, tiers, np.zeros(1), 0.0)[0] == math.inf


# --- times --------------------------------------------------------------------------------------------


def test_start_is_line_and_load_and_initialisation_but_for_what_is_ready() -> None:
    history = learned(load(20.0, "dram"), load(5.0, "ssd"), load(1.0, "remote"))
    history.observe_init("m", 1.5)
    nodes = ["a"] * len(TIERS)
    table = history.table(nodes)
    seconds = table.start_s(10 * GB, np.arange(len(TIERS)), np.array([9.0, 0.0, 3.0, 4.0]), history.init_s("m"))
    assert seconds.tolist() == pytest.approx([0.0, 2.0, 6.5, 15.5])


@given(
    speeds=st.lists(st.floats(0.1, 40.0), min_size=1, max_size=6),
    num_bytes=st.tuples(st.integers(1, 10**11), st.integers(1, 10**11)),
    line_s=st.tuples(st.floats(0, 100), st.floats(0, 100)),
    init_s=st.floats(0, 10),
)
def test_more_bytes_and_longer_lines_never_take_less_time(
    speeds: list[float], num_bytes: tuple[int, int], line_s: tuple[float, float], init_s: float
) -> None:
    history = learned(*(load(speed, node=f"n{place}") for place, speed in enumerate(speeds)))
    table = history.table([f"n{place}" for place in range(len(speeds))])
    tiers = np.full(len(speeds), TIER_CODES["ssd"])

    def start_s(size: int, line: float) -> list[float]:
        seconds: list[float] = table.start_s(size, tiers, np.full(len(speeds), line), init_s).tolist()
        return seconds

    least = start_s(min(num_bytes), min(line_s))
    most = start_s(max(num_bytes), max(line_s))
    assert all(low <= high for low, high in zip(least, most, strict=True))


def test_lines_go_by_arrival_and_count_what_is_left() -> None:
    """Not by a place within each model's own line, as the released scheduler has it."""
    loads = [
        queued("late", 8.0, 5.0),
        queued("under-way", 10.0, 1.0, done_gb=6.0),
        queued("early", 2.0, 2.0),
        queued("elsewhere", 50.0, 0.0, tier="remote"),
    ]
    assert queue_s(loads, "ssd", 2.0 * GB) == pytest.approx(7.0)
    assert queue_s(loads, "ssd", 2.0 * GB, before=(5.0, "late")) == pytest.approx(3.0)
    assert queue_s(loads, "ssd", 2.0 * GB, before=(2.0, "early")) == pytest.approx(2.0)
    assert queue_s(loads, "dram", 2.0 * GB) == 0.0
    assert queue_s(loads, "remote", 0.0) == math.inf
    assert queue_s([], "remote", 0.0) == 0.0


@given(sizes=st.lists(st.floats(0.0, 50.0), max_size=8), more=st.floats(0.1, 50.0), speed=st.floats(0.1, 20.0))
def test_a_longer_line_takes_longer_and_later_loads_do_not_delay_earlier_ones(
    sizes: list[float], more: float, speed: float
) -> None:
    loads = [queued(f"l{place}", size, float(place)) for place, size in enumerate(sizes)]
    later = [*loads, queued("x", more, float(len(sizes)))]
    assert queue_s(later, "ssd", speed * GB) > queue_s(loads, "ssd", speed * GB)
    for one in loads:
        before = one.arrived_s, one.load_id
        assert queue_s(later, "ssd", speed * GB, before) == queue_s(loads, "ssd", speed * GB, before)


def test_initialisation_is_learned_for_each_model_and_lent_to_others() -> None:
    history = LoadHistory(told_init_s=4.0)
    assert history.init_s("m") == 4.0
    for seconds in (1.0, 1.2, 30.0):
        history.observe_init("m", seconds)
    history.observe_init("n", 3.2)
    assert history.init_s("m") == 1.2
    assert history.init_s("unseen") == pytest.approx(2.2)


@pytest.mark.parametrize(("num_bytes", "seconds", "tier"), [(0, 1.0, "ssd"), (1, 0.0, "ssd"), (1, 1.0, "device")])
def test_what_is_no_load_is_refused(num_bytes: int, seconds: float, tier: Tier) -> None:
    with pytest.raises(ValueError, match=r"loaded|load has"):
        MeasuredLoad(node_id="a", tier=tier, num_bytes=num_bytes, seconds=seconds, is_direct=True)
