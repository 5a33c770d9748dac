"""The planner's own process: it answers, and whatever becomes of it is a reason in words."""

from __future__ import annotations

import asyncio
import os

import msgspec
import psutil
import pytest

from cluster.planner_child import ChildPlanner
from contracts.latency_models import CostCurve, FittedLatency
from contracts.transfer_models import LinkTransfer
from coordinator.split_question import NoSplit, PresentPool, SplitQuestion
from workload.slo import SloClass

#: Nobody meets its targets, which is soon found.
HOPELESS = SplitQuestion(
    pools=(
        PresentPool(role="prefill", num_workers=1, max_batch_tokens=512),
        PresentPool(role="decode", num_workers=1, max_batch_tokens=512),
    ),
    max_sequences=16,
    block_tokens=16,
    num_blocks=1000,
    max_context_tokens=2048,
    kv_token_bytes=1000,
    latency=FittedLatency(
        prefill=CostCurve.line(0.01, 1e-4), pair_s=0.0, decode=CostCurve.line(0.01, 1e-4), context_token_s=0.0
    ),
    between_steps_s=0.0,
    transfer=LinkTransfer(latency_s=1e-4, bandwidth_bytes_s=float("inf")),
    slos=(SloClass("chat", 1.0, 1.0),),
    mix={"chat": 1},
    prompt_tokens=(100,),
    mean_answer_tokens=10.0,
)
#: Takes far longer than a test.
ENDLESS = msgspec.structs.replace(
    HOPELESS,
    slos=(SloClass("chat", 5000.0, 500.0),),
    pools=(
        PresentPool(role="prefill", num_workers=60, max_batch_tokens=512),
        PresentPool(role="decode", num_workers=60, max_batch_tokens=512),
    ),
)


def planners() -> list[psutil.Process]:
    children = psutil.Process().children()
    return [child for child in children if "cluster.planner_child" in " ".join(child.cmdline())]


async def test_it_asks_the_installed_evaluator_at_the_lowest_priority() -> None:
    asking = asyncio.create_task(ChildPlanner()(ENDLESS))
    while not any(child.nice() == 19 for child in planners()):
        await asyncio.sleep(0.02)
        assert not asking.done()
    assert os.nice(0) < 19
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert planners() == [], "nothing remains of it"
    with pytest.raises(NoSplit, match="no split of the workers meets the targets at any rate"):
        await ChildPlanner()(HOPELESS)


async def test_one_that_takes_too_long_is_ended() -> None:
    with pytest.raises(NoSplit, match=r"the planner took longer than 0\.2 s"):
        await ChildPlanner(deadline_s=0.2)(ENDLESS)
    assert planners() == []


async def test_without_an_evaluator_it_says_so() -> None:
    with pytest.raises(NoSplit, match=r"no planner is installed \(entry points tandem\.nothing\)"):
        await ChildPlanner(group="tandem.nothing")(HOPELESS)


async def test_one_that_breaks_is_told_by_its_last_line() -> None:
    # A command is no evaluator: it fails when it is called with a question.
    with pytest.raises(NoSplit, match=r"the planner ended with code 1: \w+Error: "):
        await ChildPlanner(group="tandem.commands")(HOPELESS)
