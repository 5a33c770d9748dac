"""Branches of a study: what they find, and that none outlives it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.errors import Internal
from coordinator.policy.settings import AdmissionRule, ConductorSettings
from simulator.heap.study import simulate
from simulator.study.branches import Trial, simulate_with_branches
from simulator.study.metrics import request_latencies
from tests.support.branching import SLO, SPEC, arrivals, endless

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from workload.request import WorkloadRequest


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Every process that this one forks."""
    pids: list[int] = []
    fork = os.fork

    def noted() -> int:
        if pid := fork():
            pids.append(pid)
        return pid

    monkeypatch.setattr(os, "fork", noted)
    return pids


def assert_gone(pids: list[int]) -> None:
    """Waited for, too."""
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("max_branches", [1, 3])
def test_each_meets_what_it_meets_where_it_alone_is_there(children: list[int], max_branches: int) -> None:
    requests = arrivals(40)
    tried, left_out = [3, 4, 21, 39], frozenset({4, 10, 21})
    trials = [Trial(index=index, patience_s=1e9) for index in tried]
    said: list[tuple[float, int]] = []
    trunk, fates = simulate_with_branches(
        SPEC,
        requests,
        trials,
        (SLO,),
        passed_over=left_out,
        max_branches=max_branches,
        progress=lambda virtual_s, num_ended: said.append((virtual_s, num_ended)),
    )
    assert len(children) == 4
    assert_gone(children)
    kept = [each for index, each in enumerate(requests) if index not in left_out]
    alone = simulate(SPEC, kept)
    assert trunk.requests.finished_s.tolist() == alone.requests.finished_s.tolist()
    # No branch has told how far it was.
    assert [virtual_s for virtual_s, _ in said] == alone.time_line.at_s.tolist()
    assert [fate.index for fate in fates] == tried
    for fate in fates:
        with_it = [index for index in range(40) if index not in left_out or index == fate.index]
        latencies = request_latencies(simulate(SPEC, [requests[index] for index in with_it]), (SLO,))
        row = with_it.index(fate.index)
        assert (fate.ttft_s, fate.tpot_s, fate.met) == (
            latencies.ttft_s[row],
            latencies.tpot_s[row],
            latencies.met[row],
        )


def test_whoever_the_policy_refuses_is_let_in_by_its_branch() -> None:
    """Whatever its trunk has let in as well; and rows count what comes."""
    admission = ConductorSettings(admission=AdmissionRule(form="current"))
    refusing = replace(SPEC, conductor=admission, slos=(replace(SLO, ttft_ms=1.0),), forced=frozenset({2}))
    requests = arrivals(6)
    trunk, fates = simulate_with_branches(
        refusing, requests, [Trial(index=4, patience_s=0.0)], refusing.slos, passed_over=frozenset({0})
    )
    assert [index for index, outcome in enumerate(trunk.requests.outcome) if not outcome] == [2]
    (fate,) = fates
    assert 0 < fate.ttft_s < 10
    assert not fate.met


def test_only_so_many_come_as_its_patience_allows() -> None:
    requests = arrivals(40)

    def found(patience_s: float) -> float:
        trials = [Trial(index=5, patience_s=patience_s)]
        trunk, (fate,) = simulate_with_branches(SPEC, requests, trials, (SLO,), to_the_end=False)
        assert len(trunk.requests.arrival_s) == 5
        return fate.tpot_s

    assert found(0.0) < found(1e9)


def test_a_branch_that_fails_says_why_and_the_others_end(children: list[int]) -> None:
    broken = arrivals(50)
    broken[7] = broken[7]._replace(output_tokens=0)
    trials = [Trial(index=index, patience_s=1e9) for index in (2, 7)]
    with pytest.raises(Internal, match=r"(?s)let in request 7 failed: .*a request needs prompt and output tokens"):
        simulate_with_branches(SPEC, broken, trials, (SLO,), passed_over=frozenset({7}), max_branches=4)
    assert len(children) == 2
    assert_gone(children)


def test_a_branch_that_is_killed_is_told(children: list[int]) -> None:
    trunk = os.getpid()

    def requests() -> Iterator[WorkloadRequest]:
        for index, each in enumerate(endless()):
            if os.getpid() != trunk:
                os.kill(os.getpid(), signal.SIGKILL)
            if index == 6:
                return
            yield each

    with pytest.raises(Internal, match="let in request 3 died: wait status 9"):
        simulate_with_branches(SPEC, requests(), [Trial(index=3, patience_s=1e9)], (SLO,), max_branches=2)
    assert_gone(children)


def test_branches_end_with_a_trunk_that_fails(children: list[int]) -> None:
    trunk = os.getpid()

    def requests() -> Iterator[WorkloadRequest]:
        for index, each in enumerate(endless()):
            if index == 5 and os.getpid() == trunk:
                raise ValueError("no more of it")
            yield each

    trials = [Trial(index=index, patience_s=1e12) for index in (1, 2, 3)]
    with pytest.raises(ValueError, match="no more of it"):
        simulate_with_branches(SPEC, requests(), trials, (SLO,), max_branches=3)
    assert len(children) == 3
    assert_gone(children)


def _kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


def _interrupt(pid: int) -> None:
    os.kill(pid, signal.SIGINT)


def _press_ctrl_c(pid: int) -> None:
    os.killpg(pid, signal.SIGINT)


@pytest.mark.parametrize("stop", [_kill, _interrupt, _press_ctrl_c])
def test_branches_end_with_a_process_that_is_stopped(stop: Callable[[int], None]) -> None:
    """They hold its output: that ends when the last of them has."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.branching"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "two branches\n"
        stop(process.pid)
        said, errors = process.communicate(timeout=60)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == (-signal.SIGKILL if stop is _kill else -signal.SIGINT)
    assert said == ""
    assert errors.count("Traceback") == (0 if stop is _kill else 1)
