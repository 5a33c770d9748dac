"""The engine's thread: order, errors, cancellation, closing."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import torch

from contracts.errors import BadRequest, ConfigError, Internal, WorkerUnavailable
from contracts.ids import BlockId
from engine.executor import EngineThread, LiveEngine, load_engine
from engine.plan import SequenceStep, StepPlan
from engine.runner import EngineOptions
from tests.unit.engine.driver import greedy_sample

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from tests.support.oracle import Oracle


class _CountingClock:
    """A second passes with every look."""

    def __init__(self) -> None:
        self._now_s = 0.0

    def now_s(self) -> float:
        self._now_s += 1.0
        return self._now_s

    def wall_s(self) -> float:
        return 0.0

    async def sleep(self, delay_s: float) -> None:
        await asyncio.sleep(delay_s)


@asynccontextmanager
async def _engine(model_dir: Path) -> AsyncGenerator[LiveEngine]:
    options = EngineOptions(num_blocks=50, block_tokens=16)
    engine = await load_engine(model_dir, options, clock=_CountingClock(), num_threads=1)
    try:
        yield engine
    finally:
        await engine.close()


@asynccontextmanager
async def _thread() -> AsyncGenerator[EngineThread]:
    thread = EngineThread(num_threads=1)
    try:
        yield thread
    finally:
        await thread.close()


def _plan(prompt: list[int], blocks: int = 50) -> StepPlan:
    step = SequenceStep(
        sequence_id=8,
        token_ids=prompt,
        start=0,
        block_ids=[BlockId(block) for block in range(blocks)],
        sample=greedy_sample(prompt, len(prompt)),
    )
    return StepPlan((step,))


async def test_steps_of_a_loaded_model(oracles: Callable[[str], Oracle]) -> None:
    oracle = oracles("llama")
    async with _engine(oracle.model_dir) as engine:
        for prompt, expected in zip(oracle.prompts[:4], oracle.outputs, strict=False):
            result = await engine.step(_plan(prompt))
            assert result.sampled[8].token_id == expected[0]
            assert result.duration_s == 1.0
        assert engine.num_blocks == 50
        assert engine.max_context_tokens == 800
        assert engine.eos_token_ids == ()
        assert engine.identity.layout.block_tokens == 16
        assert engine.pool.num_blocks == 50
        assert "float32, 1 thread(s), 50 blocks of 16 tokens" in engine.description


async def test_progress_and_log_are_told(oracles: Callable[[str], Oracle]) -> None:
    told, lines = list[tuple[int, int]](), list[str]()

    def tell(done: int, total: int) -> None:
        told.append((done, total))

    engine = await load_engine(
        oracles("llama").model_dir,
        EngineOptions(num_blocks=1),
        clock=_CountingClock(),
        progress=tell,
        log=lines.append,
    )
    await engine.close()
    assert told[-1][0] == told[-1][1] > 0
    assert len(lines) == 1


async def test_a_failed_load_leaves_no_thread(tmp_path: Path) -> None:
    before = threading.active_count()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        await load_engine(tmp_path, EngineOptions(num_blocks=1), clock=_CountingClock())
    assert threading.active_count() == before


async def test_a_failed_step_leaves_the_engine_usable(oracles: Callable[[str], Oracle]) -> None:
    oracle = oracles("llama")
    async with _engine(oracle.model_dir) as engine:
        with pytest.raises(BadRequest):
            await engine.step(_plan([100_000]))
        result = await engine.step(_plan(oracle.prompts[2]))
        assert result.sampled[8].token_id == oracle.outputs[2][0]


async def test_foreign_errors_become_internal() -> None:
    async with _thread() as thread:
        with pytest.raises(Internal, match="ZeroDivisionError") as caught:
            await thread.submit(lambda: 1 // 0)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert await thread.submit(lambda: 5) == 5


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt(), MemoryError("no more"), GeneratorExit()])
async def test_what_would_end_a_program_reaches_the_awaiter_and_the_thread_goes_on(error: BaseException) -> None:
    def work() -> None:
        raise error

    async with _thread() as thread:
        with pytest.raises(Internal, match=type(error).__name__):
            await asyncio.wait_for(thread.submit(work), 30)
        assert await thread.submit(lambda: 5) == 5


async def test_jobs_run_in_order_on_one_thread_in_inference_mode() -> None:
    order = list[int]()
    async with _thread() as thread:
        futures = [thread.submit(partial(order.append, each)) for each in range(50)]
        await asyncio.gather(*futures)
        names = {await thread.submit(lambda: threading.current_thread().name) for _ in range(3)}
        assert await thread.submit(torch.is_inference_mode_enabled)
        assert await thread.submit(torch.get_num_threads) == 1
    assert order == list(range(50))
    assert names == {"engine"}


async def test_quiesce_waits_for_a_cancelled_step() -> None:
    """Cancelling the await does not stop the work; the loop stays free meanwhile."""
    entered, release, finished = threading.Event(), threading.Event(), list[bool]()

    def work() -> None:
        entered.set()
        release.wait(30)
        finished.append(True)

    async with _thread() as thread:
        step = thread.submit(work)
        await asyncio.to_thread(entered.wait, 30)
        step.cancel()
        quiet = thread.submit(lambda: list(finished))
        assert not quiet.done()
        release.set()
        assert await quiet == [True]
        assert step.cancelled()


async def test_close_is_final_and_repeatable() -> None:
    thread = EngineThread(num_threads=None)
    last = thread.submit(lambda: 3)
    await thread.close()
    await thread.close()
    assert await last == 3
    with pytest.raises(WorkerUnavailable, match="closed"):
        thread.submit(lambda: 4)
