"""The two clusters of the fault matrix, each with its judge and ways to wait: one with a node agent, one without."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from cluster.supervision import State
from contracts.errors import TandemError
from tests.support.chaos_asking import Asker, asking, clean, until, until_audit

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from benchmarks.chaos_reference import Auditor
    from cluster.state_file import WorkerState
    from contracts.messages import AuditReply
    from tests.support.chaos_processes import Part, Processes
    from tests.support.chaos_worker import Brake
    from tests.support.cluster import ClusterProcess

#: Of a braked prefill worker.
SLOW_STEP_S = 0.25


class Served:
    """A cluster of two and two with a node agent, the brake on its engines, and a judge."""

    def __init__(self, cluster: ClusterProcess, brake: Brake, auditor: Auditor) -> None:
        self.cluster = cluster
        self.brake = brake
        self._auditor = auditor

    @asynccontextmanager
    async def asker(self) -> AsyncGenerator[Asker]:
        """For one test: begins and ends with everything up and clean."""
        await self.until_calm()
        try:
            async with asking(self.cluster.base_url, self._auditor) as asker:
                yield asker
        finally:
            self.brake.release()
        await self.until_calm()

    async def until_calm(self) -> None:
        await until(self.all_ready, "every worker is ready")
        await until_audit(self.audit, self._calm, "every ledger is clean")

    def all_ready(self) -> bool:
        return all(worker.state == State.READY.value for worker in self.cluster.state.workers)

    async def audit(self) -> Mapping[str, AuditReply]:
        """Of those that answer: some of them may have just been killed."""
        try:
            return await self.cluster.audit(2.0)
        except TandemError:
            return {}

    def _calm(self, audits: Mapping[str, AuditReply]) -> bool:
        return len(audits) == len(self.cluster.state.workers) and clean(audits)

    def workers(self, role: str) -> list[WorkerState]:
        return [worker for worker in self.cluster.state.workers if worker.role == role]

    async def busiest(self, role: str) -> WorkerState:
        audits = await self.cluster.audit()
        return max(self.workers(role), key=lambda worker: audits[worker.worker_id].open_requests)

    def slow(self, role: str, seconds: float = SLOW_STEP_S) -> None:
        for pid in self.pids(role):
            self.brake.slow(pid, seconds)

    def pids(self, role: str) -> list[int]:
        return [worker.pid for worker in self.workers(role) if worker.pid is not None]


class Scattered:
    """One prefill and two decode workers, a coordinator and a gateway, each started alone."""

    def __init__(self, processes: Processes, auditor: Auditor) -> None:
        self.processes = processes
        self.auditor = auditor
        processes.start_coordinator()
        self.workers = [
            processes.start_worker("prefill", wait=False),
            processes.start_worker("decode", 0, wait=False),
            processes.start_worker("decode", 1, wait=False),
        ]
        for worker in self.workers:
            processes.wait_ready(worker)
        self.gateway = processes.start_gateway()
        processes.wait_serving(self.gateway)

    @asynccontextmanager
    async def asker(self) -> AsyncGenerator[Asker]:
        async with asking(self.gateway.address, self.auditor) as asker:
            yield asker

    async def audit(self) -> Mapping[str, AuditReply]:
        """Of those that live and answer."""
        try:
            return await self.processes.audit([one for one in self.workers if one.process.poll() is None], 2.0)
        except TandemError:
            return {}

    async def until_clean(self) -> None:
        """All that live are idle, with nothing in their books."""
        await until_audit(
            self.audit,
            lambda audits: len(audits) == sum(one.process.poll() is None for one in self.workers) and clean(audits),
            "every ledger is clean",
        )

    def revive(self) -> None:
        """Starts the decode workers that have ended anew, on the address they had."""
        for index, worker in enumerate(self.workers[1:]):
            if worker.process.poll() is not None:
                self.workers[1 + index] = self.processes.start_worker("decode", index, worker.address)

    async def busiest_decode(self) -> Part:
        audits = await self.audit()
        return max(self.workers[1:], key=lambda worker: audits[worker.name].open_requests)
