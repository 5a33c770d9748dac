"""The live engine: a runner on a thread of its own, awaited from the event loop.

All torch work of a process happens on this one thread, because OpenMP keeps a team of threads per calling
thread, and two teams on the same cores fight. A step crosses to the thread through a queue and comes back
through the loop: some 40 us in all, where an executor's locks and futures would double that.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from queue import SimpleQueue
from typing import TYPE_CHECKING, TypeVar, cast

import torch
from msgspec.structs import replace

from contracts.errors import DeadlineExceeded, Internal, TandemError, WorkerUnavailable
from engine.ops import select_ops
from engine.runner import EngineOptions, Runner, load_runner

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Buffer

    from contracts.clock import Clock
    from contracts.layout import KvIdentity
    from engine.canary import Canary
    from engine.kv_pool import KvPool
    from engine.model_config import ModelConfig
    from engine.plan import StepPlan, StepResult
    from engine.weights import FusedWeights

ResultT = TypeVar("ResultT")

#: Bound on the last step when an engine is closed.
_CLOSE_TIMEOUT_S = 10.0


class EngineThread:
    """Runs jobs one after the other, in order, on one daemon thread in torch's inference mode."""

    def __init__(self, num_threads: int | None) -> None:
        """`num_threads`: size of the team that torch's operators use on this thread; None: torch's choice."""
        self._num_threads = num_threads
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], ResultT]) -> asyncio.Future[ResultT]:
        """A future on the running loop. Cancelling it does not stop the work.

        Errors of the work reach the awaiter: those of `contracts.errors` as they are, others as Internal.
        Raises WorkerUnavailable once closed.
        """
        if self._closed:
            raise WorkerUnavailable("the engine is closed")
        loop = asyncio.get_running_loop()
        future: asyncio.Future[ResultT] = loop.create_future()

        def job() -> None:
            result: ResultT | None = None
            error: TandemError | None = None
            try:
                result = work()
            except TandemError as raised:
                error = raised
            except BaseException as raised:
                # Even what would end a program (SystemExit, KeyboardInterrupt): this thread goes on, and the
                # awaiter must hear of it.
                error = Internal(f"engine step failed: {type(raised).__name__}: {raised}")
                error.__cause__ = raised
            # Where the loop is closed nobody waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, future, result, error)

        self._jobs.put(job)
        return future

    async def close(self) -> None:
        """Refuses new jobs and returns when those submitted are done and the thread has ended. Idempotent.

        Raises DeadlineExceeded when a job does not end; the thread then dies with the process.
        """
        if self._closed:
            return
        last = self.submit(_nothing)
        self._closed = True
        self._jobs.put(None)
        try:
            await asyncio.wait_for(last, _CLOSE_TIMEOUT_S)
        except TimeoutError:
            raise DeadlineExceeded(f"the engine's step did not end within {_CLOSE_TIMEOUT_S} s") from None
        self._thread.join()

    def _run(self) -> None:
        if self._num_threads is not None:
            torch.set_num_threads(self._num_threads)
        with torch.inference_mode():
            while (job := self._jobs.get()) is not None:
                job()


def _nothing() -> None:
    pass


def _settle(future: asyncio.Future[ResultT], result: ResultT | None, error: TandemError | None) -> None:
    if future.done():
        return
    if error is not None:
        future.set_exception(error)
    else:
        future.set_result(cast("ResultT", result))


class LiveEngine:
    """Implements `engine.plan.Engine` with a model. Made by `load_engine`; for one event loop."""

    def __init__(self, runner: Runner, thread: EngineThread, clock: Clock, description: str) -> None:
        self._runner = runner
        self._thread = thread
        self._clock = clock
        self._description = description

    @property
    def identity(self) -> KvIdentity:
        return self._runner.identity

    @property
    def num_blocks(self) -> int:
        return self._runner.pool.num_blocks

    @property
    def max_context_tokens(self) -> int:
        return self._runner.max_context_tokens

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self._runner.config.eos_token_ids

    @property
    def vocab_size(self) -> int:
        return self._runner.config.vocab_size

    @property
    def description(self) -> str:
        return self._description

    @property
    def config(self) -> ModelConfig:
        return self._runner.config

    @property
    def pool(self) -> KvPool:
        """The memory that steps read and write; not to be touched by torch operators outside of steps."""
        return self._runner.pool

    async def step(self, plan: StepPlan) -> StepResult:
        """As `Engine.step`. Raises BadRequest, InvariantBroken or Internal; the engine stays usable.

        `duration_s` leaves out the way to the thread and back.
        """

        def work() -> StepResult:
            start_s = self._clock.now_s()
            result = self._runner.run(plan)
            return replace(result, duration_s=self._clock.now_s() - start_s)

        return await self._thread.submit(work)

    async def quiesce(self) -> None:
        await self._thread.submit(_nothing)

    async def close(self) -> None:
        """As `EngineThread.close`; steps are refused with WorkerUnavailable from now on."""
        await self._thread.close()


async def load_engine(
    model_dir: Path,
    options: EngineOptions,
    *,
    clock: Clock,
    num_threads: int | None = None,
    pool_buffer_factory: Callable[[int, int], Buffer] | None = None,
    progress: Callable[[int, int], None] | None = None,
    log: Callable[[str], None] = lambda _: None,
    weights: FusedWeights | None = None,
    canary: Canary | None = None,
) -> LiveEngine:
    """Loads a model folder on a new engine thread; the event loop stays free meanwhile. `weights`, `canary`: as
    `load_runner`.

    `pool_buffer_factory(num_blocks, block_bytes)`, `progress(bytes read, bytes in all)` and `log(line)` are
    called in the engine's thread. Raises ConfigError naming file, tensor or option.
    """
    thread = EngineThread(num_threads)

    def load() -> tuple[Runner, str]:
        runner = load_runner(
            model_dir,
            options,
            select_ops(options.device, log=log),
            pool_buffer_factory=pool_buffer_factory,
            progress=progress,
            weights=weights,
            canary=canary,
        )
        return runner, _describe(runner, torch.get_num_threads())

    try:
        runner, description = await thread.submit(load)
    except BaseException:
        await thread.close()
        raise
    return LiveEngine(runner, thread, clock, description)


def _describe(runner: Runner, num_threads: int) -> str:
    layout = runner.pool.layout
    return (
        f"{runner.ops_name}, {layout.dtype}, {num_threads} thread(s), "
        f"{runner.pool.num_blocks} blocks of {layout.block_tokens} tokens"
    )
