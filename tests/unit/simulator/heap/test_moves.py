"""Answers and prompts that move between the workers of a study."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from contracts.transfer_models import LinkTransfer
from engine.compose import StepBudget
from simulator.heap.request import AnswerStage, PromptStage
from simulator.heap.results import Outcome
from simulator.heap.study import simulate
from tests.support.affine_latency import AffineLatency
from tests.support.heap_studies import audit, colocated, disaggregated, study
from workload.request import WorkloadRequest

if TYPE_CHECKING:
    from collections.abc import Callable

    from simulator.heap.request import Request
    from simulator.heap.results import StudyResult
    from simulator.heap.spec import StudySpec
    from simulator.heap.study import Controls
    from simulator.heap.worker import Worker

#: Every step takes a second.
SECOND = AffineLatency(base_s=1.0)
UNEVEN = AffineLatency(base_s=0.010_100_3, token_s=1.03e-4, pair_s=1.07e-7, context_token_s=1.7e-5, sequence_s=3.1e-4)
#: 16,000 bytes a block: four blocks a second.
SLOW_LINK = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=64_000.0)
BUDGET = StepBudget(max_tokens=64, max_sequences=8)


def pair_of(num_blocks: int = 1000, *, latency: AffineLatency = SECOND) -> StudySpec:
    spec = study(colocated(latency, count=2, num_blocks=num_blocks, budget=BUDGET), transfer=SLOW_LINK)
    return replace(spec, conductor=replace(spec.conductor, policy="round_robin"))


def at(time_s: float, act: Callable[[Controls], object]) -> Callable[[Controls], None]:
    def script(controls: Controls) -> None:
        def now(_: None) -> None:
            act(controls)

        controls.heap.at(time_s, now, None)

    return script


def anybody(worker: Worker) -> Request:
    """One of those that run there, or wait."""
    answers = worker.answers
    return next(iter((*answers.running(), *answers.preempted(), *worker.prompts.waiting())))


def move_one(source: str, target: str) -> Callable[[Controls], object]:
    def act(controls: Controls) -> bool:
        return controls.moves.move_answer(anybody(controls.workers[source]), controls.workers[target])

    return act


def test_an_answer_moves_while_it_is_written() -> None:
    """100 tokens fill 6 blocks and a part; two pulls of final blocks beside four steps, a third behind the last."""
    result = simulate(pair_of(), [WorkloadRequest(0.0, 100, 20)], script=at(5.5, move_one("m-0", "m-1")))
    columns = result.requests
    assert result.moves.answers == 1
    # Read in two steps; at 5.5 it has 104 tokens, and 6 blocks of 103 are final: pulled by 7.0. The rest is asked for
    # while the step to 8.0 runs, which writes the 106th; one block is left, pulled by 8.25. From there on elsewhere.
    assert result.move_pause_s.max == pytest.approx(0.25)
    assert columns.finished_s == pytest.approx([8.25 + (20 - 7)])
    assert result.moved_bytes == 7 * 16_000
    first, second = result.workers
    assert (first.decode_tokens, second.decode_tokens) == (6, 13)
    # What it may still write was set aside.
    assert second.peak_blocks == 7 + 1
    assert (columns.prefill_worker.tolist(), columns.decode_worker.tolist()) == ([0], [1])
    audit(result)


def test_messages_and_steps_of_both_sides_count_as_pause() -> None:
    """The other answer's step is waited for at the destination, and the commit's messages before."""
    spec = replace(pair_of(), message_s=0.01)
    requests = [WorkloadRequest(0.0, 100, 20), WorkloadRequest(2.4, 10, 60)]
    result = simulate(spec, requests, script=at(5.5, move_one("m-0", "m-1")))
    # Stopped at the end of a step; told, the rest pulled, confirmed and granted.
    assert result.move_pause_s.max == pytest.approx(0.01 + 0.25 + 0.04)
    # Then the step of the destination under way has to end: its gap to the next token is longer than two steps apart.
    assert result.itl_s.max > 1.0 + result.move_pause_s.max
    audit(result)


def test_a_full_destination_refuses() -> None:
    requests = [WorkloadRequest(0.0, 100, 20), WorkloadRequest(0.0, 140, 8)]
    result = simulate(pair_of(10), requests, script=at(5.5, move_one("m-0", "m-1")))
    assert (result.moves.answers, result.moves.refused) == (0, 1)
    assert result.workers[0].decode_tokens == 19
    audit(result)


def test_an_answer_that_ends_on_its_way_stays() -> None:
    result = simulate(pair_of(), [WorkloadRequest(0.0, 100, 5)], script=at(5.5, move_one("m-0", "m-1")))
    assert (result.moves.answers, result.moves.overtaken) == (0, 1)
    assert (result.requests.outcome == Outcome.FINISHED).all()
    audit(result)


def test_an_answer_that_outgrows_what_was_set_aside_takes_more_or_comes_back() -> None:
    """On a link that takes as long for a block as the answer does to fill one."""
    slow = LinkTransfer(latency_s=0.0, bandwidth_bytes_s=1_000.0)
    spec = replace(pair_of(60), transfer=slow, request_timeout_s=6000.0)
    answer = WorkloadRequest(0.0, 100, 600)
    roomy = simulate(spec, [answer], script=at(5.5, move_one("m-0", "m-1")))
    assert (roomy.moves.answers, roomy.moves.overtaken) == (1, 0)
    audit(roomy)
    # Another answer has taken the blocks meanwhile.
    requests = [answer, WorkloadRequest(0.0, 1, 380)]
    full = simulate(replace(spec, groups=pair_of(48).groups), requests, script=at(5.5, move_one("m-0", "m-1")))
    assert (full.moves.answers, full.moves.overtaken) == (0, 1)
    assert (full.requests.outcome == Outcome.FINISHED).all()
    audit(full)


def test_a_waiting_prompt_moves_as_tokens_and_keeps_its_place_in_time() -> None:
    requests = [WorkloadRequest(0.0, 140, 8), WorkloadRequest(0.0, 16, 2), WorkloadRequest(0.1, 140, 8)]

    def act(controls: Controls) -> None:
        request = anybody(controls.workers["m-0"])
        assert request.prompt_stage is not PromptStage.WAITING
        (waiting,) = controls.workers["m-0"].prompts.waiting()
        assert controls.moves.move_prompt(waiting, controls.workers["m-1"])
        assert not controls.moves.move_prompt(waiting, controls.workers["m-0"]), "it waits nowhere now"

    result = simulate(pair_of(10), requests, script=at(5.5, act))
    assert result.moves.prompts == 1
    assert result.requests.decode_worker.tolist() == [0, 1, 1]
    assert result.requests.started_s[2] == pytest.approx(5.5)
    audit(result)


def test_a_preempted_answer_goes_on_where_there_is_room_or_stays() -> None:
    def act(controls: Controls) -> None:
        (preempted,) = controls.workers["m-0"].answers.preempted()
        assert controls.moves.move_preempted(preempted, controls.workers["m-1"])
        assert preempted.answer_stage is AnswerStage.MOVING

    def run(others_output: int) -> StudyResult:
        # Two answers of 17 blocks in a pool of 30: the newer is preempted when both have 15.
        requests = [
            WorkloadRequest(0.0, 16, 250),
            WorkloadRequest(0.0, 16, others_output),
            WorkloadRequest(0.1, 16, 250),
            WorkloadRequest(0.1, 1, 1),
        ]
        return simulate(pair_of(30), requests, script=at(232.5, act))

    moved = run(50)
    assert (moved.moves.preempted, moved.moves.refused) == (1, 0)
    assert moved.requests.decode_worker.tolist()[2] == 1
    audit(moved)
    stayed = run(250)
    assert (stayed.moves.preempted, stayed.moves.refused) == (0, 1)
    assert stayed.requests.decode_worker.tolist()[2] == 0
    audit(stayed)


@pytest.mark.parametrize("timeout_s", [5.6, 6.2, 7.4, 8.1, 8.6])
def test_what_is_given_up_in_the_midst_of_a_move_leaves_nothing(timeout_s: float) -> None:
    """While its KV is pulled, asked for, stopped, committed, and after."""
    spec = replace(pair_of(), message_s=0.03, request_timeout_s=timeout_s)
    result = simulate(spec, [WorkloadRequest(0.0, 100, 20)], script=at(5.5, move_one("m-0", "m-1")))
    assert result.requests.outcome.tolist() == [Outcome.TIMED_OUT]
    audit(result)


def test_an_answer_moves_between_decode_workers() -> None:
    spec = study(disaggregated(SECOND, num_decode=2), transfer=SLOW_LINK)
    result = simulate(spec, [WorkloadRequest(0.0, 100, 20)], script=at(8.5, move_one("d-0", "d-1")))
    assert result.moves.answers == 1
    assert result.requests.decode_worker == 2
    assert result.transfer_bytes == 7 * 16_000
    audit(result)


@settings(max_examples=60, deadline=None)
@given(
    prompts=st.lists(st.tuples(st.integers(1, 300), st.integers(1, 200)), min_size=1, max_size=12),
    moves=st.lists(st.tuples(st.floats(0.0, 8.0), st.integers(0, 2), st.integers(0, 2)), max_size=40),
    num_blocks=st.integers(20, 60),
    timeout_s=st.sampled_from([600.0, 2.0]),
    is_split=st.booleans(),
)
def test_whatever_moves_when_every_request_ends_once(
    prompts: list[tuple[int, int]],
    moves: list[tuple[float, int, int]],
    num_blocks: int,
    timeout_s: float,
    is_split: bool,
) -> None:
    """Blocks conserve, every worker ends empty (the study checks both), every token is written once."""
    if is_split:
        groups = disaggregated(UNEVEN, num_decode=3, num_blocks=num_blocks, budget=BUDGET)
    else:
        groups = colocated(UNEVEN, count=3, num_blocks=num_blocks, budget=BUDGET)
    spec = replace(study(groups, transfer=SLOW_LINK), message_s=0.001, request_timeout_s=timeout_s)
    spec = replace(spec, transfer=LinkTransfer(latency_s=1e-3, bandwidth_bytes_s=1e6))

    def script(controls: Controls) -> None:
        workers = [worker for worker in controls.workers.values() if worker.writes]

        def act(news: tuple[int, int]) -> None:
            source, target = workers[news[0]], workers[news[1]]
            source.sync()
            for request in list(source.answers.running())[:2]:
                controls.moves.move_answer(request, target)
            for request in list(source.answers.preempted())[:1]:
                controls.moves.move_preempted(request, target)
            for request in source.prompts.waiting()[:1]:
                controls.moves.move_prompt(request, target)

        for time_s, source, target in moves:
            controls.heap.at(time_s, act, (source, target))

    requests = [WorkloadRequest(0.05 * index, *tokens) for index, tokens in enumerate(prompts)]
    result = simulate(spec, requests, script=script)
    audit(result)
    again = simulate(spec, requests, script=script)
    np.testing.assert_array_equal(result.requests.finished_s, again.requests.finished_s)
    assert result.moves == again.moves
