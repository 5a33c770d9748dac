"""What heals before a client notices is a bug all the same: the auditor of the chaos trials sees it.

Each test breaks a production class in one place for the time of a trial, in a way that replays or restarts make good.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from contracts.errors import TransferAborted
from coordinator.fleet import Fleet
from decode import DecodeBatch
from prefill import PrefillQueue
from simulator.chaos import draw, try_seed
from simulator.chaos.scenario import CALM_IN, SURVIVABLE_IN, Weather
from worker.watchdog import Watchdog

if TYPE_CHECKING:
    from contracts.messages import HandoffReply, HandoffRequest, PrefillRequest, WorkerLoad

CALM_SEED = next(seed for seed in range(CALM_IN, 1000, CALM_IN) if draw(seed).cluster.elastic is None)
SURVIVABLE_SEED = SURVIVABLE_IN // 2
#: Three workers of each role.
WIDE = next(seed for seed in range(1, 1000) if len((it := draw(seed).cluster).roles) == 6 and it.elastic is None)


@pytest.fixture(autouse=True)
def _seeds_are_what_they_are_called() -> None:
    assert draw(CALM_SEED).weather is Weather.CALM
    assert draw(SURVIVABLE_SEED).weather is Weather.SURVIVABLE


def test_a_handler_that_breaks_is_told_though_a_replay_heals_it(monkeypatch: pytest.MonkeyPatch) -> None:
    submit = PrefillQueue.submit
    asked: list[PrefillRequest] = []

    def breaks_once(queue: PrefillQueue, ask: PrefillRequest, now_s: float) -> None:
        asked.append(ask)
        if len(asked) == 3:
            raise KeyError("a bug")
        submit(queue, ask, now_s)

    monkeypatch.setattr(PrefillQueue, "submit", breaks_once)
    verdict = try_seed(SURVIVABLE_SEED)
    assert set(verdict.outcomes) <= {"finished", "cancelled"}
    assert len(verdict.problems) == 1
    assert "the handler failed" in verdict.problems[0]
    assert "KeyError: 'a bug'" in verdict.problems[0]


def test_a_handoff_that_fails_without_a_fault_is_told_though_a_replay_heals_it(monkeypatch: pytest.MonkeyPatch) -> None:
    offer = DecodeBatch.offer
    asked: list[HandoffRequest] = []

    def fails_once(batch: DecodeBatch, ask: HandoffRequest, now_s: float) -> HandoffReply:
        asked.append(ask)
        if len(asked) == 3:
            raise TransferAborted("a bug")
        return offer(batch, ask, now_s)

    monkeypatch.setattr(DecodeBatch, "offer", fails_once)
    verdict = try_seed(CALM_SEED)
    assert set(verdict.outcomes) <= {"finished", "cancelled"}
    assert verdict.problems == ("1 requests were taken up again without a fault: transfer_aborted",)


def test_a_life_that_ends_without_a_fault_is_told_though_the_next_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    look = Watchdog.look
    looks: list[float] = []

    def despairs_once(watchdog: Watchdog, now_s: float, *, quarantined_blocks: int, total_blocks: int) -> str | None:
        looks.append(now_s)
        if len(looks) == 20:
            return "a bug"
        return look(watchdog, now_s, quarantined_blocks=quarantined_blocks, total_blocks=total_blocks)

    monkeypatch.setattr(Watchdog, "look", despairs_once)
    problems = try_seed(CALM_SEED).problems
    assert any("ended its life without a fault: a bug" in problem for problem in problems), problems


def test_load_that_the_coordinator_never_forgets_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps_all(fleet: Fleet, row: int, load: WorkerLoad, now_s: float) -> None:
        return None

    monkeypatch.setattr(Fleet, "report", keeps_all)
    problems = try_seed(CALM_SEED).problems
    assert any("the coordinator counts" in problem for problem in problems), problems


def test_every_worker_is_asked_after_recovery() -> None:
    lines: list[str] = []
    num_asks = len(draw(WIDE).asks)
    assert not try_seed(WIDE, sink=lines.append).problems
    first = next(index for index, line in enumerate(lines) if f"asks       request {num_asks}:" in line)
    messages = [line.split()[3:6] for line in lines[first:] if " > " in line]
    called = {target for target, method, kind in messages if method in ("Prefill", "Handoff") and kind == "request"}
    assert called == set(draw(WIDE).cluster.roles)
