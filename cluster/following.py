"""Follows the workers of a cluster on this machine, and tells what becomes of them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import msgspec

from cluster.progress import ProgressLines, is_ready, settled, why_hopeless
from cluster.state_file import WorkerState, write_state

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cluster.node_agent import NodeAgent, WorkerStatus
    from cluster.state_file import ClusterState
    from contracts.clock import Clock


class LocalCluster:
    """Follows the workers: prints progress, keeps the state files current, knows when all is ready."""

    def __init__(
        self,
        agent: NodeAgent,
        state: ClusterState,
        state_files: list[Path],
        clock: Clock,
        say: Callable[[str], None],
    ) -> None:
        self._agent = agent
        self._state = state
        self._state_files = state_files
        self._clock = clock
        self._say = say
        self._progress = ProgressLines()
        #: Models that cannot be served any more, beside others that can.
        self._lost: set[str] = set()
        #: Set once every worker is ready or given up and the ready ones can serve.
        self.ready = asyncio.Event()
        #: Set once the workers that are not given up could not serve any model; `problem` says why.
        self.hopeless = asyncio.Event()
        self.problem: str | None = None

    def __repr__(self) -> str:
        return f"<LocalCluster at {self.base_url}, {self._agent!r}>"

    @property
    def base_url(self) -> str:
        return self._state.base_url

    @property
    def model_name(self) -> str:
        """The first one's."""
        return self._state.model_name

    @property
    def model_names(self) -> list[str]:
        """Those that are asleep are marked."""
        if not self._state.cells:
            return [self.model_name]
        wanted = {worker.worker_id for worker in self._agent.workers() if worker.is_wanted and worker.role != "store"}
        return [
            cell.model_name if wanted & set(cell.worker_ids) else f"{cell.model_name} (asleep)"
            for cell in self._state.cells
        ]

    @property
    def has_trouble(self) -> bool:
        """Whether somebody will want to read the logs."""
        return any(worker.problem is not None for worker in self._agent.workers())

    def kill(self) -> None:
        self._agent.kill_all()

    async def watch(self) -> None:
        try:
            while True:
                self._follow()
                await self._agent.changed.wait()
                self._agent.changed.clear()
        except Exception as error:
            self.problem = f"a bug in following the workers: {error!r}"
            self.hopeless.set()
            raise

    def _follow(self) -> None:
        workers = self._agent.workers()
        for line in self._progress.update(workers, self._clock.now_s()):
            self._say(line)
        self.problem = self._why_hopeless(workers)
        if self.problem is not None:
            self.hopeless.set()
        elif all(settled(own) for own in self._by_model(workers).values()):
            self.ready.set()
        self._write_state()

    def _why_hopeless(self, workers: Sequence[WorkerStatus]) -> str | None:
        """Nothing as long as one model can be served, or is asleep; the others' trouble is said once."""
        found = {name: why_hopeless(own) for name, own in self._by_model(workers).items()}
        problems = {name: problem for name, problem in found.items() if problem is not None}
        if len(problems) == len(found):
            return "; ".join(f"{name}: {problem}" for name, problem in problems.items() if name) or problems.get("")
        for name in problems.keys() - self._lost:
            self._say(f"{name}: {problems[name]}")
        self._lost = set(problems)
        return None

    def _by_model(self, workers: Sequence[WorkerStatus]) -> dict[str, list[WorkerStatus]]:
        """ "" is the name of the only one."""
        cells = {cell.model_name: set(cell.worker_ids) for cell in self._state.cells}
        if not cells:
            return {"": list(workers)}
        return {name: [worker for worker in workers if worker.worker_id in own] for name, own in cells.items()}

    def _write_state(self) -> None:
        statuses = self._agent.workers()
        workers = tuple(
            WorkerState(
                worker_id=worker.worker_id,
                role=worker.role,
                state=worker.state.value,
                incarnation=worker.incarnation,
                pid=worker.pid,
                address=worker.address,
                problem=worker.problem,
            )
            for worker in statuses
            if worker.is_wanted or worker.pid is not None
        )
        # A model that is lost is not waited for, beside others.
        ready = all(is_ready(own) for name, own in self._by_model(statuses).items() if name not in self._lost)
        self._state = msgspec.structs.replace(self._state, workers=workers, ready=ready)
        for path in self._state_files:
            try:
                write_state(path, self._state)
            except OSError as error:
                self._say(f"cannot write the state file {path}: {error.strerror}")
