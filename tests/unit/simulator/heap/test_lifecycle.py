"""Workers of a study that come, drain, change their roles and go."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from contracts.errors import InvariantBroken
from coordinator.policy.move_terms import MoveRules
from engine.compose import StepBudget
from simulator.heap.lifecycle import Phase
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import audit, colocated, disaggregated, study
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from contracts.messages import Role
    from simulator.heap.study import Controls

#: Every step takes a tenth of a second.
TENTH = AffineLatency(base_s=0.1)
BUDGET = StepBudget(max_tokens=64, max_sequences=8)
REQUESTS = [WorkloadRequest(0.5 * index, 40, 60) for index in range(40)]


def test_a_worker_that_drains_gets_nothing_and_costs_nothing_when_it_is_empty() -> None:
    spec = study(colocated(TENTH, count=2, budget=BUDGET))
    seen: list[tuple[float, Phase]] = []

    def script(controls: Controls) -> None:
        lifecycle = controls.lifecycle

        def look(_: None) -> None:
            seen.append((controls.heap.now_s, lifecycle.members["m-0"].phase))

        controls.heap.at(8.25, lambda _: lifecycle.stop("m-0"), None)
        for time_s in (8.3, 20.0):
            controls.heap.at(time_s, look, None)

    result = simulate(spec, REQUESTS, script=script)
    columns = result.requests
    later = columns.arrival_s > 8.25
    assert (columns.decode_worker[later] == 1).all()
    assert (columns.decode_worker[~later] == 0).any()
    assert [phase for _, phase in seen] == [Phase.DRAINING, Phase.ABSENT]
    # Its last answer takes 6.1 s from 8.0 at the latest.
    assert result.duration_s + 8.25 < result.worker_s < result.duration_s + 8.0 + 6.5
    assert (columns.outcome == Outcome.FINISHED).all()
    audit(result)


def test_with_moves_a_drain_ends_sooner_and_nobody_fails() -> None:
    spec = replace(study(colocated(TENTH, count=2, budget=BUDGET)), heartbeat_interval_s=0.1)

    def script(controls: Controls) -> None:
        controls.heap.at(8.25, lambda _: controls.lifecycle.stop("m-0"), None)

    stays = simulate(spec, REQUESTS, script=script)
    moves = simulate(replace(spec, moves=MoveRules()), REQUESTS, script=script)
    assert moves.moves.answers > 0
    assert moves.worker_s < stays.worker_s - 2.0
    assert (moves.requests.outcome == Outcome.FINISHED).all()
    audit(moves)


def test_a_worker_is_placed_on_when_its_start_is_over() -> None:
    (group,) = colocated(TENTH, count=2, budget=BUDGET)
    spec = study((replace(group, initial=1),))

    def script(controls: Controls) -> None:
        controls.heap.at(4.0, lambda _: controls.lifecycle.start("m-1", 3.0), None)

    result = simulate(spec, REQUESTS, script=script)
    columns = result.requests
    assert (columns.decode_worker[columns.arrival_s < 7.0] == 0).all()
    assert (columns.decode_worker[columns.arrival_s > 7.0] == 1).any()
    assert result.worker_s == pytest.approx(2 * result.duration_s - 4.0)
    audit(result)


def test_a_worker_that_wrote_reads() -> None:
    spec = study(disaggregated(TENTH, num_decode=2, budget=BUDGET))

    def script(controls: Controls) -> None:
        controls.heap.at(4.0, lambda _: controls.lifecycle.flip("d-0", "prefill", 0.5), None)

    result = simulate(replace(spec, moves=MoveRules()), REQUESTS, script=script)
    columns = result.requests
    assert result.workers[0].role == "prefill"
    # In order of ids: d-0, d-1, p-0 in the fleet; rows of the result are those of the groups.
    names = [worker.worker_id for worker in result.workers]
    flipped = names.index("d-0")
    assert (columns.prefill_worker == flipped).any()
    assert not (columns.decode_worker[columns.arrival_s > 4.0] == flipped).any()
    assert (columns.outcome == Outcome.FINISHED).all()
    audit(result)


def test_only_an_empty_worker_changes_its_role() -> None:
    def script(controls: Controls) -> None:
        controls.heap.at(4.0, lambda _: controls.workers["d-0"].set_role("prefill"), None)

    with pytest.raises(InvariantBroken, match="d-0"):
        simulate(study(disaggregated(TENTH, budget=BUDGET)), REQUESTS, script=script)


@pytest.mark.parametrize(("name", "back"), [("d-0", "decode"), ("p-0", "prefill")])
def test_a_worker_does_both_with_its_work_in_it_and_then_one_again(name: str, back: Role) -> None:
    spec = replace(study(disaggregated(TENTH, num_prefill=2, num_decode=2, budget=BUDGET)), moves=MoveRules())
    seen: list[tuple[Phase, Role, int]] = []

    def script(controls: Controls) -> None:
        lifecycle, worker = controls.lifecycle, controls.workers[name]

        def look(_: None) -> None:
            worker.sync()
            seen.append((lifecycle.members[name].phase, worker.role, worker.answers.num_running))

        controls.heap.at(6.05, lambda _: lifecycle.flip(name, "mixed", 0.5), None)
        controls.heap.at(14.05, lambda _: lifecycle.flip(name, back, 0.5), None)
        for time_s in (6.05, 14.05, 16.0, 24.0):
            controls.heap.at(time_s, look, None)

    result = simulate(spec, REQUESTS, script=script)
    columns = result.requests
    row = [worker.worker_id for worker in result.workers].index(name)
    assert (columns.outcome == Outcome.FINISHED).all()
    assert ((columns.prefill_worker == row) & (columns.decode_worker == row)).any(), "it did both for some"
    assert seen[0][:2] == (Phase.READY, "mixed"), "at once"
    assert seen[1][:2] == (Phase.DRAINING, "mixed")
    assert seen[-1][:2] == (Phase.READY, back)
    if back == "decode":
        assert seen[0][2] > 0, "it wrote when it began to read, too"
        # It has few prompts to read, and keeps its answers.
        assert seen[2][:2] == (Phase.READY, "decode")
        assert seen[2][2] > 0
    audit(result)


def test_a_prompt_larger_than_the_budget_of_a_mixed_worker_is_written_there_once_it_is_one() -> None:
    """It waited to be handed over; a worker that writes, too, would never begin it under that budget."""
    requests = [WorkloadRequest(0.0, 600, 60), WorkloadRequest(0.1, 600, 60), WorkloadRequest(0.2, 20, 60)]
    spec = study(disaggregated(TENTH, num_blocks=64, budget=BUDGET))

    def script(controls: Controls) -> None:
        controls.heap.at(0.55, lambda _: controls.lifecycle.flip("p-0", "mixed", 0.5), None)

    result = simulate(spec, requests, script=script)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    audit(result)


def test_only_who_has_left_the_other_role_gives_it_up() -> None:
    def script(controls: Controls) -> None:
        controls.heap.at(4.0, lambda _: controls.lifecycle.flip("d-0", "mixed", 0.5), None)
        controls.heap.at(4.1, lambda _: controls.workers["d-0"].unmix("prefill"), None)

    with pytest.raises(InvariantBroken, match="becomes a prefill worker before it can be one"):
        simulate(study(disaggregated(TENTH, budget=BUDGET)), REQUESTS, script=script)
