"""The loop of a worker: what it learns of its steps, and how targets of answers cut the prompts beside them."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest

from contracts.errors import Internal
from contracts.ids import BlockId
from contracts.latency_models import CostCurve, FittedLatency
from engine.chunk_budget import MIN_CHUNK_TOKENS, TARGET_SHARE
from engine.compose import Candidate, StepBudget
from engine.live_latency import REFIT_STEPS, WARM_UP_STEPS
from engine.plan import SequenceStep, StepPlan, StepResult, work_of
from tests.support.roles import Facts, HandClock
from worker.step_loop import StepLoop
from worker.watchdog import Watchdog, WatchdogLimits

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from engine.plan import Sampled

TRUTH = FittedLatency(
    prefill=CostCurve.line(5e-3, 0.1e-3), pair_s=1e-9, decode=CostCurve.line(5e-3, 0.1e-3), context_token_s=1e-9
)
CONTEXT = 100
ENOUGH_STEPS = WARM_UP_STEPS + 20 * REFIT_STEPS


@dataclass
class TimedEngine(Facts):
    """Steps take what the truth says, on the hand clock; some fail."""

    clock: HandClock = field(default_factory=HandClock)
    works: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    fails: bool = False

    async def step(self, plan: StepPlan) -> StepResult:
        work = work_of(plan)
        self.works.append((work.num_decodes, work.prefill_tokens))
        self.clock.time_s += TRUTH.step_s(work)
        await asyncio.sleep(0)
        if self.fails:
            raise Internal("on purpose")
        return StepResult()

    async def quiesce(self) -> None:
        return


@dataclass
class Endless:
    """A source with so many answers that never end, and a prompt that never does; each step's chunk is another."""

    num_decodes: int
    tpot_target_s: float | None
    chunks: list[int]
    failed: int = 0

    def candidates(self, now_s: float) -> tuple[list[Candidate], list[Candidate]]:
        decodes = [
            Candidate(
                sequence_id=1 + each,
                num_tokens=1,
                arrival=each,
                started=True,
                num_computed=CONTEXT - 1,
                tpot_target_s=self.tpot_target_s,
            )
            for each in range(self.num_decodes)
        ]
        chunks: list[Candidate] = []
        if self.chunks:
            self.chunks.append(self.chunks.pop(0))
            chunks = [Candidate(sequence_id=0, num_tokens=self.chunks[-1], arrival=0)] if self.chunks[-1] else []
        return decodes, chunks

    def build(self, sequence_id: int, num_tokens: int, now_s: float) -> SequenceStep:
        start = CONTEXT - 1 if sequence_id else 0
        tokens = [1] * num_tokens
        return SequenceStep(sequence_id=sequence_id, token_ids=tokens, start=start, block_ids=[BlockId(0)], sample=None)

    def apply(self, sequence_id: int, num_tokens: int, sampled: Sampled | None, now_s: float) -> None:
        return

    def fail(self, sequence_id: int, error: TandemError) -> None:
        self.failed += 1


async def _run(
    source: Endless, *, steps: int, tpot_chunks: bool = True, fails: bool = False
) -> tuple[StepLoop, TimedEngine]:
    engine = TimedEngine(fails=fails)
    enough = asyncio.Event()

    def after_step() -> None:
        if loop.steps_total >= steps:
            enough.set()

    loop = StepLoop(
        engine=engine,
        sources=(source,),
        budget=StepBudget(max_tokens=512, max_sequences=64),
        clock=engine.clock,
        watchdog=Watchdog(WatchdogLimits()),
        after_step=after_step,
        log=lambda line: None,
        tpot_chunks=tpot_chunks,
    )
    task = asyncio.create_task(loop.run())
    await enough.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    return loop, engine


async def test_it_learns_what_its_steps_take() -> None:
    loop, engine = await _run(Endless(8, None, [0, 300, 40]), steps=ENOUGH_STEPS)
    assert set(engine.works) == {(8, 0), (8, 300), (8, 40)}
    model = loop.latency.as_latency_model()
    assert model is not None
    plan = StepPlan(tuple(Endless(0, None, []).build(each, 1 if each else 200, 0.0) for each in range(9)))
    assert model.step_s(work_of(plan)) == pytest.approx(TRUTH.step_s(work_of(plan)), rel=0.05)


async def test_targets_cut_the_prompts_beside_answers_once_steps_are_known() -> None:
    target_s = 0.03
    _, engine = await _run(Endless(8, target_s, [0, 1000, 40, 200]), steps=2 * ENOUGH_STEPS)
    assert (8, 504) in engine.works[:20], "nothing is known at first"
    late = engine.works[ENOUGH_STEPS:]
    largest = max(tokens for _, tokens in late)
    allowed_s = target_s * TARGET_SHARE
    assert 5e-3 + (largest + 8) * 0.1e-3 == pytest.approx(allowed_s, rel=0.1)
    assert largest % 16 == 0


async def test_prompts_go_on_though_answers_are_late_anyway() -> None:
    _, engine = await _run(Endless(8, 0.001, [0, 1000, 40, 200]), steps=ENOUGH_STEPS)
    assert engine.works[-4:].count((8, MIN_CHUNK_TOKENS)) == 3


async def test_targets_may_be_ignored() -> None:
    _, engine = await _run(Endless(8, 0.001, [0, 1000]), steps=ENOUGH_STEPS, tpot_chunks=False)
    assert set(engine.works) == {(8, 0), (8, 504)}


async def test_failed_steps_teach_nothing() -> None:
    source = Endless(8, None, [0, 300])
    loop, _ = await _run(source, steps=ENOUGH_STEPS, fails=True)
    assert loop.failed_steps_total == loop.steps_total
    assert source.failed > ENOUGH_STEPS
    assert loop.latency.as_latency_model() is None
