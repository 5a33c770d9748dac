"""The one loop of a worker: gather candidates, compose a batch, await the engine, hand out the results."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import Internal, InvariantBroken, TandemError
from contracts.failpoints import Failpoint
from engine.chunk_budget import mixed_budget
from engine.compose import compose
from engine.live_latency import LiveLatency
from engine.plan import StepPlan, work_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.clock import Clock
    from engine.compose import Candidate, Grant, StepBudget
    from engine.plan import Engine, StepResult
    from engine.source import StepSource
    from worker.watchdog import Watchdog

_SMALLER_STEP = Failpoint("worker.smaller_step", "a step leaves one sequence to the next")


class StepLoop:
    """Runs at its own pace: whatever arrives while a step computes is seen by the next one.

    A step that raises ends the sequences it held with an error; the loop goes on with the others. Only a state
    that cannot be (InvariantBroken) ends the loop too, and with it the worker.

    What steps take is learned as they end, each with what surrounds it here (`latency`). With that, prompts beside
    answers are cut so that the answers keep their targets.
    """

    def __init__(
        self,
        *,
        engine: Engine,
        sources: Sequence[StepSource],
        budget: StepBudget,
        clock: Clock,
        watchdog: Watchdog,
        after_step: Callable[[], None],
        log: Callable[[str], None],
        tpot_chunks: bool = True,
    ) -> None:
        """`tpot_chunks`: whether targets of answers cut the prompts beside them."""
        self._engine = engine
        self._sources = sources
        self._budget = budget
        self._clock = clock
        self._watchdog = watchdog
        self._after_step = after_step
        self._log = log
        self._tpot_chunks = tpot_chunks
        self._work = asyncio.Event()
        self.latency = LiveLatency()
        self.steps_total = 0
        self.failed_steps_total = 0

    def wake(self) -> None:
        """Something changed that may make work possible."""
        self._work.set()

    async def run(self) -> None:
        while True:
            self._work.clear()
            owners: dict[int, StepSource] = {}
            began_s = self._clock.now_s()
            grants = self._gather(owners, began_s)
            # Admission and preemption may have spoken (failures); what they said must not wait for a step.
            self._after_step()
            if not grants:
                await self._work.wait()
                continue
            await self._step(grants, owners, began_s)

    def _gather(self, owners: dict[int, StepSource], now_s: float) -> Sequence[Grant]:
        decodes: list[Candidate] = []
        chunks: list[Candidate] = []
        for source in self._sources:
            more_decodes, more_chunks = source.candidates(now_s)
            for candidate in more_decodes:
                owners[candidate.sequence_id] = source
            for candidate in more_chunks:
                owners[candidate.sequence_id] = source
            decodes += more_decodes
            chunks += more_chunks
        budget = self._budget
        if self._tpot_chunks:
            budget = mixed_budget(decodes, chunks, budget, self.latency.as_latency_model())
        grants = compose(decodes, chunks, budget)
        # Never none: nothing else would wake the loop for what is left.
        return grants[:-1] if len(grants) > 1 and _SMALLER_STEP.fires() else grants

    async def _step(self, grants: Sequence[Grant], owners: dict[int, StepSource], began_s: float) -> None:
        started_s = self._clock.now_s()
        plan = StepPlan(
            tuple(owners[grant.sequence_id].build(grant.sequence_id, grant.num_tokens, started_s) for grant in grants)
        )
        self._watchdog.step_started(plan.num_tokens, started_s)
        done = False
        try:
            result = await self._engine.step(plan)
        except InvariantBroken as error:
            await self._fail(grants, owners, error)
            self._after_step()
            raise
        except Exception as error:
            await self._fail(grants, owners, error)
        else:
            self._apply(grants, owners, result)
            done = True
        finally:
            self._watchdog.step_ended(self._clock.now_s())
        self.steps_total += 1
        self._after_step()
        if done:
            self.latency.observe(work_of(plan), self._clock.now_s() - began_s)

    def _apply(self, grants: Sequence[Grant], owners: dict[int, StepSource], result: StepResult) -> None:
        now_s = self._clock.now_s()
        for grant in grants:
            sampled = result.sampled.get(grant.sequence_id)
            owners[grant.sequence_id].apply(grant.sequence_id, grant.num_tokens, sampled, now_s)

    async def _fail(self, grants: Sequence[Grant], owners: dict[int, StepSource], error: Exception) -> None:
        await self._engine.quiesce()
        self.failed_steps_total += 1
        self._log(f"engine step of {len(grants)} sequences failed: {type(error).__name__}: {error}")
        seen = error if isinstance(error, TandemError) else Internal(f"engine step failed: {error}")
        for grant in grants:
            owners[grant.sequence_id].fail(grant.sequence_id, seen)
