"""Processes that stand by become workers; those that die, are not warm, or are of another program do not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cluster.launch import StandbyLaunch
from cluster.node_agent import NodeAgent
from cluster.process_log import ProcessLog
from cluster.standby import StandbyPool
from cluster.supervision import State, SupervisionLimits
from contracts.ids import Incarnation, WorkerId
from rpc import LiveClock
from tests.support.fake_agent import fake_plan
from tests.support.processes import is_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from cluster.node_agent import WorkerPlan

PATIENCE_S = 60.0
FAKE = (sys.executable, "-m", "tests.support.fake_worker")


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - other processes have no event here
            await asyncio.sleep(0.02)


class Site:
    def __init__(self, folder: Path, plans: list[WorkerPlan], size: int, behaviour: str) -> None:
        environ = {**os.environ, "FAKE_BEHAVIOUR": "ready", "FAKE_STANDBY": behaviour}
        plans = [replace(plan, environ={**environ, "OMP_NUM_THREADS": "3"}) for plan in plans]
        self.said = list[str]()
        clock = LiveClock()
        self.log = ProcessLog(folder / "standby.log", self.said.append)
        self.pool = StandbyPool(
            size,
            FAKE,
            environ,
            StandbyLaunch(parent_pid=os.getpid(), device="cpu"),
            self.log,
            clock,
            refill_after_s=0.0,
        )
        self.agent = NodeAgent(
            plans,
            limits=SupervisionLimits(),
            first_incarnation=Incarnation(1),
            log_dir=folder,
            clock=clock,
            say=self.said.append,
            standby=self.pool,
        )

    def pids(self) -> set[int]:
        return {each.child.pid for each in self.pool._standing}  # pyright: ignore[reportPrivateUsage]

    async def started(self, worker_id: str) -> int:
        self.agent.start(WorkerId(worker_id))
        await until(lambda: self.state(worker_id) is State.READY)
        (pid,) = (each.pid for each in self.agent.workers() if each.worker_id == worker_id)
        assert pid is not None
        return pid

    def state(self, worker_id: str) -> State:
        (state,) = (each.state for each in self.agent.workers() if each.worker_id == worker_id)
        return state


@asynccontextmanager
async def site(folder: Path, *, size: int = 1, behaviour: str = "", num_workers: int = 3) -> AsyncGenerator[Site]:
    plans = [
        replace(fake_plan(f"fake-{index}", "ready", folder, parent_pid=os.getpid()), starts=False)
        for index in range(num_workers)
    ]
    one = Site(folder, plans, size, behaviour)
    async with one.agent:
        yield one
        left = one.pids()
    for pid in left:
        assert is_gone(pid)


async def test_a_worker_begins_as_a_process_that_stood_by_and_that_is_replaced(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        await until(lambda: one.pool.num_warm == 1)
        (first,) = one.pids()
        assert await one.started("fake-0") == first
        await until(lambda: one.pool.num_warm == 1)
        (second,) = one.pids()
        assert second != first
        assert await one.started("fake-1") == second
        os.kill(first, signal.SIGKILL)
        # Its next life, too, is one that stands by, or a process of its own where none is warm yet.
        await until(lambda: one.state("fake-0") is State.READY and one.agent.workers()[0].pid != first)
        assert all(pid is not None and not is_gone(pid) for pid in (each.pid for each in one.agent.workers()[:2]))


async def test_a_worker_does_not_wait_for_one_that_is_not_warm(tmp_path: Path) -> None:
    async with site(tmp_path, behaviour="slow") as one:
        await until(lambda: bool(one.pids()))
        (standing,) = one.pids()
        assert await one.started("fake-0") != standing
        assert one.pids() == {standing}


async def test_one_that_died_is_not_taken(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        await until(lambda: one.pool.num_warm == 1)
        (standing,) = one.pids()
        os.kill(standing, signal.SIGKILL)
        await until(lambda: is_gone(standing))
        assert await one.started("fake-0") != standing


async def test_those_that_die_while_they_warm_up_are_not_started_again_and_again(tmp_path: Path) -> None:
    async with site(tmp_path, behaviour="crash") as one:
        await until(lambda: "a process that stood by has ended" in one.log.tail())
        await asyncio.sleep(1.0)
        assert one.log.tail() == ["a process that stood by has ended"]
        await one.started("fake-0")


async def test_only_what_would_be_started_in_the_same_way_is_taken(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        await until(lambda: one.pool.num_warm == 1)
        environ = {**os.environ, "FAKE_BEHAVIOUR": "ready", "FAKE_STANDBY": ""}
        assert one.pool.take(("python-of-another-build", *FAKE[1:]), environ) is None
        assert one.pool.take(FAKE, {**environ, "OMP_WAIT_POLICY": "ACTIVE"}) is None
        assert one.pool.num_warm == 1


async def test_two_stand_by_where_two_are_wanted_and_all_end_with_the_agent(tmp_path: Path) -> None:
    async with site(tmp_path, size=2) as one:
        await until(lambda: one.pool.num_warm == 2)
        assert len(one.pids()) == 2
