"""The evaluator of a running cluster, by studies on the event heap: the split follows the work."""

from __future__ import annotations

from importlib.metadata import entry_points

import pytest

from contracts.latency_models import CostCurve, FittedLatency
from contracts.transfer_models import LinkTransfer
from coordinator.split_question import NO_TARGETS, NoSplit, PresentPool, SplitAnswer, SplitQuestion
from simulator.planning.present import better_split
from tests.support.long_tests import only_long
from workload.slo import SloClass


def question(
    prefill: int, decode: int, *, prompt_tokens: int, answer_tokens: float, tpot_ms: float = 13.0
) -> SplitQuestion:
    """Steps that only decode take 10 ms and little more, a prompt of 1,000 tokens 110 ms: chunks beside answers break
    the target of 13 ms."""
    return SplitQuestion(
        pools=(
            PresentPool(role="prefill", num_workers=prefill, max_batch_tokens=2048),
            PresentPool(role="decode", num_workers=decode, max_batch_tokens=512),
        ),
        max_sequences=16,
        block_tokens=16,
        num_blocks=4000,
        max_context_tokens=8192,
        kv_token_bytes=1000,
        latency=FittedLatency(
            prefill=CostCurve.line(0.01, 1e-4), pair_s=0.0, decode=CostCurve.line(0.01, 1e-4), context_token_s=0.0
        ),
        between_steps_s=0.0,
        transfer=LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=1e10),
        slos=(SloClass("chat", 1000, tpot_ms), NO_TARGETS),
        mix={"chat": 19, NO_TARGETS.name: 1},
        prompt_tokens=(prompt_tokens,),
        mean_answer_tokens=answer_tokens,
    )


def answer(asked: SplitQuestion) -> SplitAnswer:
    return better_split(asked, min_requests=100, min_span_s=0.0)


def test_long_prompts_want_readers_and_long_answers_writers() -> None:
    long_prompts = answer(question(1, 2, prompt_tokens=2000, answer_tokens=4))
    assert (long_prompts.best, long_prompts.present) == ("2 prefill + 1 decode", "1 prefill + 2 decode")
    assert long_prompts.gain > 0.5
    long_answers = answer(question(2, 1, prompt_tokens=600, answer_tokens=200))
    assert (long_answers.best, long_answers.present) == ("1 prefill + 2 decode", "2 prefill + 1 decode")
    assert long_answers.gain > 0.2


@only_long
def test_the_best_split_gains_nothing_over_itself() -> None:
    asked = question(2, 1, prompt_tokens=2000, answer_tokens=4)
    found = answer(asked)
    assert found.best == found.present == "2 prefill + 1 decode"
    assert abs(found.gain) < 0.05
    assert answer(asked) == found


def test_targets_that_nobody_meets_are_no_split() -> None:
    with pytest.raises(NoSplit, match="no split of the workers meets the targets"):
        answer(question(1, 1, prompt_tokens=100, answer_tokens=50, tpot_ms=5.0))


def test_it_is_the_evaluator_that_coordinators_find() -> None:
    (entry,) = entry_points(group="tandem.evaluators")
    assert entry.load() is better_split
