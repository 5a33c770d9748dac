"""Many trials add up, and a child process that dies, hangs or talks nonsense is told. The children are real
processes; they only do not play."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import msgspec
import pytest

from simulator.chaos import Verdict, campaign
from simulator.chaos.campaign import MAX_FAILURES, Campaign, explain, run_campaign

if TYPE_CHECKING:
    from pathlib import Path

HELD = Verdict(
    seed=1,
    scenario="calm; p0:prefill d0:decode",
    problems=(),
    digest="d" * 64,
    log_tail="first\nsecond\nthird",
    outcomes={"finished": 3, "cancelled": 1},
    counts={"kvtransfer.offer_waits": 2},
    virtual_s=9.0,
)


def failed(seed: int) -> Verdict:
    return Verdict(
        seed=seed,
        scenario="rough; p0:prefill d0:decode",
        problems=("request 3: token 1 is 5, not 7",),
        digest="e" * 64,
        log_tail="\n".join(f"line {number}" for number in range(100)),
        outcomes={"finished": 2},
        counts={"kvtransfer.offer_waits": 1, "gateway.replayed": 4},
        virtual_s=1.5,
    )


def test_verdicts_add_up() -> None:
    total = Campaign()
    total.add(HELD)
    assert total.held
    total.add(failed(2))
    assert (total.num_trials, total.num_failed, total.held) == (2, 1, False)
    assert total.outcomes == {"finished": 5, "cancelled": 1}
    assert total.counts == {"kvtransfer.offer_waits": 3, "gateway.replayed": 4}
    assert total.virtual_s == pytest.approx(10.5)
    never = total.never_reached()
    assert "kvtransfer.offer_waits" not in never
    assert "kvtransfer.quarantined" in never


def test_failures_are_counted_all_and_kept_up_to_a_limit() -> None:
    total = Campaign()
    for seed in range(MAX_FAILURES + 5):
        total.add(failed(seed))
    assert (total.num_failed, len(total.failures)) == (MAX_FAILURES + 5, MAX_FAILURES)


def test_a_failure_is_told_with_its_seed_the_end_of_its_log_and_how_to_repeat_it() -> None:
    text = explain(failed(42), log_lines=3)
    assert text.startswith("seed 42: rough; p0:prefill d0:decode\n")
    assert "  ! request 3: token 1 is 5, not 7\n" in text
    assert "line 96" not in text
    assert "    line 97\n    line 98\n    line 99\n" in text
    assert text.endswith("  repeat it: python -m simulator.chaos --seed 42")


def test_two_children_play_all_seeds() -> None:
    told: list[int] = []
    total = asyncio.run(run_campaign(1, 3, num_processes=2, on_verdict=lambda verdict: told.append(verdict.seed)))
    assert total.held, total.broken
    assert (total.num_trials, sorted(told)) == (3, [1, 2, 3])


def play_with(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str) -> Campaign:
    """Two trials in one child, which runs `script` instead."""
    child = tmp_path / "child"
    child.write_text(f"#!/bin/sh\n{script}\n")
    child.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(child))
    return asyncio.run(run_campaign(5, 2, num_processes=1))


def test_a_child_that_dies_is_told_and_what_it_had_said_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = msgspec.json.encode(HELD).decode()
    total = play_with(monkeypatch, tmp_path, f"cat <<'END'\n{line}\nEND\nkill -9 $$")
    assert total.broken == ["the process of seeds 5, +1, ...: it ended after 1 of 2 trials"]
    assert (total.num_trials, total.held) == (1, False)


def test_a_child_that_hangs_is_told_and_killed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(campaign, "SILENCE_LIMIT_S", 0.3)
    total = play_with(monkeypatch, tmp_path, "exec sleep 1000")
    assert total.broken == ["the process of seeds 5, +1, ...: it was silent for 0.3 s after 0 of 2 trials"]


def test_a_child_that_talks_nonsense_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (sentence,) = play_with(monkeypatch, tmp_path, "echo hello").broken
    assert "what it said after 0 of 2 trials is no verdict" in sentence
