"""The node agent: starts this machine's workers, keeps them running, and starts and ends them when it is asked to.

It has a slot for each worker that may run here; some may be empty. One task and one `Supervision` machine for each; a
worker's trouble is its own, a bug of the agent ends the body of its context. Leaving the context stops every worker
within `stop_timeout_s` and the time a kill takes, and leaves no process behind; nor does SIGKILL (`cluster.guard`).
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Self

from cluster.background import in_background
from cluster.guard import Guard
from cluster.keeper import REPORT_LOG_LINES, Keeper, WorkerPlan, WorkerStatus, is_for_cpu
from cluster.process_log import ProcessLog
from cluster.supervision import Supervision, SupervisionLimits
from cluster.template import Template
from cluster.uninterrupted import uninterrupted
from contracts.errors import NotFound

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Coroutine, Sequence
    from pathlib import Path
    from types import TracebackType

    from cluster.standby import StandbyPool
    from cluster.template import TemplatePlan
    from cluster.weights_service import WeightsService
    from contracts.clock import Clock
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import Role
    from contracts.weight_messages import NodeWeights

__all__ = ["NodeAgent", "WorkerPlan", "WorkerStatus"]

#: So many workers that start at once are there sooner by a template, which imports once what each would: a single one
#: would only wait for it.
MIN_FORKED = 2


class NodeAgent:
    """Use as an async context manager; `changed` is set whenever a worker's status may have changed."""

    def __init__(
        self,
        plans: Sequence[WorkerPlan],
        *,
        limits: SupervisionLimits,
        first_incarnation: Incarnation,
        log_dir: Path,
        clock: Clock,
        say: Callable[[str], None],
        standby: StandbyPool | None = None,
        template: TemplatePlan | None = None,
        weights: WeightsService | None = None,
    ) -> None:
        """`standby`: processes that may become workers; `template`: what they may be forked of; `weights`: what they
        get theirs from. The agent runs all three."""
        self._standby = standby
        self._template = None if template is None else _template(template, plans, clock)
        self._weights = weights
        if weights is not None:
            weights.foresee([plan.launch for plan in plans])
        self._say = say
        self.changed = asyncio.Event()
        #: The same, for whoever tells others of it.
        self.to_tell = asyncio.Event()
        #: Present between entering and leaving.
        self._guard: Guard | None = None
        self._keepers = [
            Keeper(
                plan,
                Supervision(limits, first_incarnation),
                ProcessLog(log_dir / f"{plan.launch.worker_id}.log", say),
                clock,
                self._note_change,
                say,
                standby=standby,
                template=self._template,
                on_spawn=None if weights is None else weights.expect,
            )
            for plan in plans
        ]
        #: Present between entering and leaving.
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._standing_by: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<NodeAgent {', '.join(f'{s.worker_id} {s.state.value}' for s in self.workers())}>"

    def _note_change(self) -> None:
        self.changed.set()
        self.to_tell.set()

    def workers(self) -> list[WorkerStatus]:
        return [keeper.status() for keeper in self._keepers]

    def ages_s(self) -> dict[WorkerId, float]:
        """Of the processes that there are."""
        ages_s = {keeper.worker_id: keeper.age_s() for keeper in self._keepers}
        return {worker_id: age_s for worker_id, age_s in ages_s.items() if age_s is not None}

    def weights(self, models: Container[str], measured_after: int) -> NodeWeights | None:
        """What there is of these models' weights, and what was measured after that load; None: the agent has none."""
        return None if self._weights is None else self._weights.report(models, measured_after)

    def log_tail(self, worker_id: WorkerId, num_lines: int = REPORT_LOG_LINES) -> list[str]:
        return self._keeper(worker_id).log.tail(num_lines)

    def start(self, worker_id: WorkerId, role: Role | None = None) -> None:
        """Fills a slot; of a worker that runs nothing changes. `role`: instead of that which it had last. Raises
        NotFound, and BadRequest for a store's role."""
        self._keeper(worker_id).start(role)

    def stop(self, worker_id: WorkerId) -> None:
        """Ends a worker, and does not start it again. Raises NotFound."""
        self._keeper(worker_id).stop()

    def restart(self, worker_id: WorkerId, life: Incarnation, python: str = "") -> None:
        """Ends this life of a worker, and begins the next one; nothing where it is another one already. `python`: the
        interpreter of the build that it and all later lives run. Raises NotFound, and BadRequest where that is none."""
        self._keeper(worker_id).restart(life, python)

    def _keeper(self, worker_id: WorkerId) -> Keeper:
        for keeper in self._keepers:
            if keeper.worker_id == worker_id:
                return keeper
        known = ", ".join(keeper.worker_id for keeper in self._keepers)
        raise NotFound(f"this node agent has no worker {worker_id}; it has {known}")

    def kill_all(self) -> None:
        """At once and without ceremony: for an impatient operator."""
        for keeper in self._keepers:
            keeper.kill()

    async def __aenter__(self) -> Self:
        self._guard = Guard()
        if self._weights is not None:
            self._weights.start(self._guard)
        # Before the workers: those that start at once wait for it.
        if self._template is not None:
            self._stand_by(self._template.run(self._guard), "template")
        if self._standby is not None:
            self._stand_by(self._standby.run(self._guard), "standby")
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._tasks = [
            self._group.create_task(keeper.run(self._guard), name=f"keep-{keeper.worker_id}")
            for keeper in self._keepers
        ]
        return self

    def _stand_by(self, work: Coroutine[object, object, None], name: str) -> None:
        without = "workers start as programs of their own"
        self._standing_by.append(in_background(work, name, self._say, without=without))

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        assert self._guard is not None, "made with the group"
        for keeper in self._keepers:
            keeper.close()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self.kill_all()
            for task in self._standing_by:
                task.cancel()
            await uninterrupted(_finished(self._standing_by))
            if self._weights is not None:
                await uninterrupted(self._weights.stop())
            if not isinstance(error, asyncio.CancelledError):
                # The body's own error leaves as it is, not as part of a group.
                kind = error = trace = None
            try:
                await self._group.__aexit__(kind, error, trace)
            finally:
                await uninterrupted(asyncio.to_thread(self._guard.close))


async def _finished(tasks: Sequence[asyncio.Task[None]]) -> None:
    """Whatever they end with: who was to stand by is missed by nobody."""
    if tasks:
        await asyncio.wait(tasks)


def _template(wanted: TemplatePlan, plans: Sequence[WorkerPlan], clock: Clock) -> Template | None:
    """Of the first worker's program; None where nobody, or only one, would be forked of it."""
    able = [plan for plan in plans if is_for_cpu(plan.launch)]
    if not able or (not wanted.always and sum(plan.starts for plan in able) < MIN_FORKED):
        return None
    return Template(able[0].command, able[0].environ, wanted.launch, wanted.log, clock)
