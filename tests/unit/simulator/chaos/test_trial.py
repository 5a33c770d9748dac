"""One trial and its verdict: what a failing one tells, and how the command ends."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import pytest

from contracts.ids import RequestId
from kvtransfer.transport import PullResult
from prefill import PrefillQueue
from simulator import chaos
from simulator.chaos import __main__ as command
from simulator.chaos import draw, play, try_seed
from simulator.chaos.campaign import explain
from simulator.chaos.scenario import Weather
from tests.support.planted_bugs import planted

if TYPE_CHECKING:
    from simulator.chaos import Verdict

#: Finds the planted bug at once.
SEED = 1
BUG = "lose-heartbeat-timer"


@pytest.fixture(scope="module")
def failing() -> Verdict:
    with planted(BUG):
        return try_seed(SEED)


def test_a_failing_trial_tells_what_was_wrong_and_fails_the_same_way_again(failing: Verdict) -> None:
    assert failing.problems
    text = explain(failing)
    assert text.startswith(f"seed {SEED}: {failing.scenario}")
    assert all(f"  ! {problem}" in text for problem in failing.problems[:20])
    assert failing.log_tail.splitlines()[-1] in text
    assert f"python -m simulator.chaos --seed {SEED}" in text
    with planted(BUG):
        assert try_seed(SEED) == failing


def test_the_log_has_fixed_columns_of_time_and_host_and_begins_with_the_scenario() -> None:
    lines: list[str] = []
    verdict = try_seed(SEED, sink=lines.append)
    assert verdict.scenario in lines[0]
    times = [float(line[:15]) for line in lines]
    assert times == sorted(times)
    assert all(line[15] == " " and line[16] != " " for line in lines)
    assert any(" client " in line and " asks " in line for line in lines)
    assert any(" fault " in line and " begins: " in line for line in lines)
    assert "\n".join(lines).endswith(verdict.log_tail.rstrip("\n"))
