"""The watchdog: what a step may take, when too many blocks are in quarantine, and what a pause excuses."""

from __future__ import annotations

import pytest

from worker.watchdog import LONGEST_GAP_S, LOOK_INTERVAL_S, Watchdog, WatchdogLimits

LIMITS = WatchdogLimits(floor_s=3.0, factor=8.0, first_steps_s=60.0, enough_steps=3)
BLOCKS = 100


class Watch:
    """A watchdog and a clock; looks as often as the shell does."""

    def __init__(self) -> None:
        self.dog = Watchdog(LIMITS)
        self.now_s = 100.0
        self.quarantined = 0

    def look(self) -> str | None:
        return self.dog.look(self.now_s, quarantined_blocks=self.quarantined, total_blocks=BLOCKS)

    def wait(self, for_s: float) -> str | None:
        """Looks until there is a reason or the time is over."""
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.now_s = min(until_s, self.now_s + LOOK_INTERVAL_S)
            if (reason := self.look()) is not None:
                return reason
        return None

    def steps(self, num_tokens: int, duration_s: float, count: int = 3) -> None:
        for _ in range(count):
            self.dog.step_started(num_tokens, self.now_s)
            assert self.wait(duration_s) is None
            self.dog.step_ended(self.now_s)


@pytest.fixture
def watch() -> Watch:
    fresh = Watch()
    assert fresh.look() is None
    return fresh


def test_first_steps_may_compile(watch: Watch) -> None:
    watch.dog.step_started(1, watch.now_s)
    assert watch.wait(60.0) is None
    assert watch.wait(0.5) == "its engine is stuck: a step of 1 tokens has run for 60.2 s (60.0 s allowed)"


def test_quick_steps_make_three_seconds_long(watch: Watch) -> None:
    watch.steps(4, 0.03)
    watch.dog.step_started(4, watch.now_s)
    started_s = watch.now_s
    assert watch.wait(3.0) is None
    assert watch.wait(1.0) is not None
    assert watch.now_s - started_s <= 3.0 + LOOK_INTERVAL_S


@pytest.mark.parametrize(
    ("seen", "num_tokens", "bound_s"),
    [
        ([], 1, 60.0),
        ([(1, 0.03, 2)], 1, 60.0),  # not enough of them
        ([(1, 0.03, 3)], 1, 3.0),
        ([(1, 0.5, 3)], 4, 16.0),  # larger by two classes than any that is known: four times as long
        ([(1, 0.5, 3)], 512, 60.0),
        ([(512, 1.0, 3)], 1, 8.0),  # the next larger one that is known
        ([(512, 1.0, 3), (1, 0.03, 3)], 1, 3.0),
        ([(512, 1.0, 3), (1, 0.03, 3)], 300, 8.0),  # same size class
        ([(512, 1.0, 3), (1, 0.03, 3)], 1024, 16.0),
        ([(512, 1.0, 2), (512, 2.0, 1)], 512, 16.0),  # the slowest counts
        ([(512, 20.0, 3)], 512, 60.0),  # and no bound is longer than the first
    ],
)
def test_bounds_follow_what_steps_took(
    watch: Watch, seen: list[tuple[int, float, int]], num_tokens: int, bound_s: float
) -> None:
    for tokens, duration_s, count in seen:
        watch.steps(tokens, duration_s, count)
    assert watch.dog.bound_s(num_tokens) == pytest.approx(bound_s)


def test_slow_steps_of_long_ago_do_not_count(watch: Watch) -> None:
    watch.steps(8, 5.0, 1)
    watch.steps(8, 0.05, 31)
    assert watch.dog.bound_s(8) == pytest.approx(40.0)
    watch.steps(8, 0.05, 1)
    assert watch.dog.bound_s(8) == 3.0


def test_between_steps_nothing_is_overdue(watch: Watch) -> None:
    watch.steps(1, 0.03)
    assert watch.wait(100.0) is None
    assert watch.dog.step_age_s(watch.now_s) == 0.0


@pytest.mark.parametrize("at_s", [0.0, 2.0])
def test_a_pause_of_the_process_excuses_a_step(watch: Watch, at_s: float) -> None:
    watch.steps(1, 0.03)
    watch.dog.step_started(1, watch.now_s)
    watch.wait(at_s)
    watch.now_s += 3600
    assert watch.look() is None
    assert watch.wait(3.0 - at_s - 0.1) is None
    assert watch.wait(0.5) is not None


def test_a_step_that_began_after_the_pause_gains_nothing(watch: Watch) -> None:
    watch.steps(1, 0.03)
    watch.now_s += LONGEST_GAP_S + 10
    watch.dog.step_started(1, watch.now_s)
    assert watch.look() is None
    assert watch.dog.step_age_s(watch.now_s) == 0.0
    assert watch.wait(3.5) is not None


def test_a_crowded_quarantine_has_a_grace(watch: Watch) -> None:
    watch.quarantined = 26
    assert watch.wait(5.0) is None
    reason = watch.wait(1.0)
    assert reason == "26 of its 100 blocks have been in quarantine for 5.2 s: their pulls do not end"


def test_a_quarantine_that_empties_in_between_starts_anew(watch: Watch) -> None:
    watch.quarantined = 90
    assert watch.wait(4.9) is None
    watch.quarantined = 25
    assert watch.wait(0.5) is None
    watch.quarantined = 90
    assert watch.wait(5.0) is None


def test_a_pause_excuses_the_quarantine_too(watch: Watch) -> None:
    watch.quarantined = 50
    watch.wait(1.0)
    watch.now_s += 3600
    assert watch.look() is None
    assert watch.wait(3.0) is None
