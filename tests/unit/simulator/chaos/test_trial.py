"""One trial and its verdict: what a failing one tells, and how the command ends."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import pytest

from gateway.cancels import CancelQueue
from simulator.chaos import __main__ as command
from simulator.chaos import draw, play, trial, try_seed
from simulator.chaos.campaign import explain
from simulator.chaos.faults import Fault
from simulator.chaos.scenario import CALM_IN
from tests.support.layout import ROOT
from tests.support.planted_bugs import find, planted

if TYPE_CHECKING:
    from contracts.messages import Peer, RequestKey
    from simulator.chaos import Verdict
    from simulator.cluster import SimulatedCluster

SEED = 1
#: Shows at once.
BUG = "lose-heartbeat-timer"


@pytest.fixture(scope="module")
def failing() -> Verdict:
    found = find(BUG, range(1, 11))
    assert found is not None
    return found


def test_a_failing_trial_tells_what_was_wrong_and_fails_the_same_way_again(failing: Verdict) -> None:
    assert failing.problems
    text = explain(failing)
    assert text.startswith(f"seed {failing.seed}: {failing.scenario}")
    assert all(f"  ! {problem}" in text for problem in failing.problems[:20])
    assert failing.log_tail.splitlines()[-1] in text
    assert f"python -m simulator.chaos --seed {failing.seed}" in text
    with planted(BUG):
        assert try_seed(failing.seed) == failing


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


@dataclass(frozen=True, slots=True, kw_only=True)
class NeverOver(Fault):
    what: ClassVar[str] = "wait for what never comes"

    async def strike(self, cluster: SimulatedCluster) -> None:
        await asyncio.Event().wait()


def test_a_trial_that_does_not_end_tells_who_waits_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "LIMIT_S", 90.0)
    scenario = replace(draw(SEED), faults=(NeverOver(at_s=1.0, for_s=0.0),))
    (problem,) = play(scenario).problems
    assert "LimitReached" in problem
    assert "fault 0" in problem
    assert "NeverOver" in problem or "strike" in problem


def test_a_task_of_production_code_that_fails_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    async def burst(self: Fault, cluster: SimulatedCluster) -> None:
        raise RuntimeError("in the midst of it")

    monkeypatch.setattr(NeverOver, "strike", burst)
    verdict = play(replace(draw(SEED), faults=(NeverOver(at_s=1.0, for_s=0.0),)))
    assert any("RuntimeError: in the midst of it" in problem for problem in verdict.problems)


def test_a_gateway_that_never_sends_a_cancel_is_told_though_no_client_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgets(queue: CancelQueue, peer: Peer, key: RequestKey, reason: str) -> None:
        return None

    # What a stopped worker may forget is not judged where pools breathe; and there must be something to forget.
    seed = next(
        seed
        for seed in range(CALM_IN, 1000, CALM_IN)
        if (scenario := draw(seed)).cluster.elastic is None
        and sum(ask.cancel_after is not None for ask in scenario.asks) > 8
    )
    sound = try_seed(seed)
    assert sound.problems == ()
    monkeypatch.setattr(CancelQueue, "add", forgets)
    verdict = try_seed(seed)
    assert verdict.outcomes == sound.outcomes
    assert verdict.problems
    assert all(" s after it was forgotten" in problem for problem in verdict.problems)


# --- the command ----------------------------------------------------------------------------------------


def test_one_seed_that_holds_exits_with_0_and_prints_its_log() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "simulator.chaos", "--seed", str(SEED)],
        cwd=ROOT,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    verdict = try_seed(SEED)
    assert verdict.log_tail in finished.stdout
    assert f"digest {verdict.digest}, " in finished.stdout
    assert finished.stdout.endswith("it held\n")


def test_one_seed_that_fails_exits_with_1_and_says_why(
    failing: Verdict, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--seed", str(failing.seed)])
    with planted(BUG):
        assert command.main() == 1
    printed = capsys.readouterr().out
    assert all(f"  ! {problem}\n" in printed for problem in failing.problems)
    assert printed.endswith(f"{len(failing.problems)} problems\n")


def test_many_seeds_that_hold_exit_with_0_and_tell_what_was_reached(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["chaos", "--seeds", "2", "--first", "7", "--processes", "1"])
    assert command.main() == 0
    printed = capsys.readouterr().out
    assert printed.startswith("2 trials in ")
    assert "  kvtransfer." in printed
    assert "     never  " in printed
    assert printed.endswith("all held\n")
