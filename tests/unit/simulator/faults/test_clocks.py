"""Clocks that stand elsewhere, drift and jump."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator import Program, run
from simulator.clock import WALL_ORIGIN_S
from simulator.faults.clocks import MAX_DRIFT, MachineClock, ProcessClock


def test_a_clock_that_gains_runs_ahead_and_wakes_its_sleepers_early() -> None:
    async def main(program: Program) -> None:
        fast = ProcessClock(MachineClock(drift=200e-6), offset_s=50.0)
        assert fast.now_s() == 50.0
        await fast.sleep(1000.0)
        assert asyncio.get_running_loop().time() == pytest.approx(1000.0 / 1.0002)
        assert fast.now_s() == pytest.approx(1050.0)
        assert fast.wall_s() == pytest.approx(WALL_ORIGIN_S + 1000.0)

    run(main, seed=1)


@given(
    drift=st.floats(-MAX_DRIFT, MAX_DRIFT),
    offset_s=st.floats(0.0, 1e5),
    delays_s=st.lists(st.floats(1e-6, 1000.0), min_size=1, max_size=20),
)
def test_no_sleeper_wakes_before_its_own_deadline(drift: float, offset_s: float, delays_s: list[float]) -> None:
    """One that woke a rounding error early would sleep again, at the same instant, for ever."""

    async def main(program: Program) -> None:
        clock = ProcessClock(MachineClock(drift=drift), offset_s=offset_s)
        for delay_s in delays_s:
            deadline_s = clock.now_s() + delay_s
            await clock.sleep(delay_s)
            assert deadline_s <= clock.now_s() <= deadline_s + 1e-6

    run(main, seed=1, limit_s=30_000.0)


def test_a_jump_sets_the_wall_clock_of_all_its_processes_and_no_other() -> None:
    async def main(program: Program) -> None:
        machine, elsewhere = MachineClock(), MachineClock()
        clocks = [ProcessClock(machine, offset_s=offset_s) for offset_s in (0.0, 7.0)]
        other = ProcessClock(elsewhere, offset_s=0.0)
        await asyncio.sleep(3.0)
        machine.jump_wall(-3600.0)
        assert [clock.wall_s() for clock in (*clocks, other)] == [
            WALL_ORIGIN_S + 3.0 - 3600.0,
            WALL_ORIGIN_S + 3.0 - 3600.0,
            WALL_ORIGIN_S + 3.0,
        ]
        assert [clock.now_s() for clock in clocks] == [3.0, 10.0]

    run(main, seed=1)


@pytest.mark.parametrize("drift", [0.001, -0.001, float("nan")])
def test_a_clock_that_no_time_keeping_could_correct_is_refused(drift: float) -> None:
    with pytest.raises(ValueError, match="drift"):
        MachineClock(drift=drift)
