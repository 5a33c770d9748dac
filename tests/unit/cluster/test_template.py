"""Workers forked of one warm process: the agent's own children, and as good as those of a program of their own."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest

from cluster.launch import TemplateLaunch
from cluster.node_agent import NodeAgent
from cluster.process_log import ProcessLog
from cluster.supervision import State, SupervisionLimits
from cluster.template import TemplatePlan
from cluster.template_process import TEMPLATE_FLAG
from contracts.ids import Incarnation, WorkerId
from rpc import LiveClock
from tests.support.fake_agent import fake_plan
from tests.support.processes import is_gone, wait_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from cluster.node_agent import WorkerPlan, WorkerStatus
    from cluster.template import Template

PATIENCE_S = 60.0


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not holds():  # noqa: ASYNC110 - other processes have no event here
            await asyncio.sleep(0.02)


class Site:
    def __init__(self, folder: Path, plans: list[WorkerPlan], *, always: bool) -> None:
        self.said = list[str]()
        self.log = ProcessLog(folder / "standby.log", self.said.append)
        self.agent = NodeAgent(
            plans,
            limits=SupervisionLimits(restart_delay_s=0.01),
            first_incarnation=Incarnation(1),
            log_dir=folder,
            clock=LiveClock(),
            say=self.said.append,
            template=TemplatePlan(
                launch=TemplateLaunch(parent_pid=os.getpid(), device="cpu"), log=self.log, always=always
            ),
        )

    @property
    def template(self) -> Template | None:
        return self.agent._template  # pyright: ignore[reportPrivateUsage]

    @property
    def template_pid(self) -> int | None:
        return None if self.template is None else self.template.pid

    def worker(self, name: str) -> WorkerStatus:
        return next(each for each in self.agent.workers() if each.worker_id == name)

    async def ready(self, *names: str) -> list[psutil.Process]:
        await until(lambda: all(self.worker(name).state is State.READY for name in names))
        return [psutil.Process(self.worker(name).pid) for name in names]

    async def lived_on(self, name: str, before: psutil.Process) -> psutil.Process:
        """Its next life."""
        await until(lambda: self.worker(name).state is State.READY and self.worker(name).pid != before.pid)
        return psutil.Process(self.worker(name).pid)


@asynccontextmanager
async def site(
    folder: Path,
    *,
    behaviour: str = "ready",
    num_workers: int = 2,
    warm_up: str = "",
    starts: bool = True,
    always: bool = False,
) -> AsyncGenerator[Site]:
    plans = [fake_plan(f"fake-{index}", behaviour, folder, parent_pid=os.getpid()) for index in range(num_workers)]
    environ = {**os.environ, "FAKE_BEHAVIOUR": behaviour, "FAKE_STANDBY": warm_up, "OMP_NUM_THREADS": "3"}
    one = Site(folder, [replace(plan, environ=environ, starts=starts) for plan in plans], always=always)
    async with one.agent:
        yield one
        left = [one.template_pid, *(each.pid for each in one.agent.workers())]
    for pid in left:
        assert pid is None or is_gone(pid)
    assert not [child for child in psutil.Process().children() if "tests.support.fake_worker" in child.cmdline()]


async def test_workers_that_start_at_once_are_forks_and_children_of_the_agent(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        processes = await one.ready("fake-0", "fake-1")
        (template_pid,) = {one.template_pid}
        assert template_pid is not None
        assert one.log.tail() == [f"workers are forked of process {template_pid}"]
        assert TEMPLATE_FLAG in psutil.Process(template_pid).cmdline()
        for process in processes:
            assert process.pid != template_pid
            assert process.ppid() == os.getpid()
            # Of the template it has its memory, and nothing that anybody could take it for.
            assert TEMPLATE_FLAG not in process.cmdline()
            assert "tests.support.fake_worker" in process.cmdline()
            assert os.getpgid(process.pid) == os.getsid(process.pid) == process.pid
            ours = {os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}
            assert all(end.startswith("pipe:") for end in ours)
            assert len(ours) == 3
        assert f"log line of {processes[0].pid}" in one.agent.log_tail(WorkerId("fake-0"))
        assert f"log line of {processes[1].pid}" in one.agent.log_tail(WorkerId("fake-1"))


async def test_a_fork_has_the_environment_of_its_own_start(tmp_path: Path) -> None:
    async with site(tmp_path, behaviour="environ") as one:
        await one.ready("fake-0")
        assert "OMP_NUM_THREADS=3" in one.agent.log_tail(WorkerId("fake-0"))


async def test_a_fork_that_is_killed_is_seen_and_lives_again_as_another(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        first, other = await one.ready("fake-0", "fake-1")
        first.kill()
        second = await one.lived_on("fake-0", first)
        assert TEMPLATE_FLAG not in second.cmdline()
        assert second.ppid() == os.getpid()
        # Reaped, not left as a zombie of the agent.
        assert not psutil.pid_exists(first.pid)
        assert one.worker("fake-1").pid == other.pid
        assert any("it was ended by SIGKILL" in line for line in one.said)


@pytest.mark.parametrize("behaviour", ["stubborn", "parent"])
async def test_whatever_a_fork_does_nothing_of_it_outlives_its_agent(tmp_path: Path, behaviour: str) -> None:
    async with site(tmp_path, behaviour=behaviour) as one:
        processes = await one.ready("fake-0", "fake-1")
        family = [child.pid for process in processes for child in process.children(recursive=True)]
        assert bool(family) == (behaviour == "parent")
        one.agent.kill_all()
    wait_gone([*family, *(process.pid for process in processes)], PATIENCE_S)


async def test_without_a_template_workers_begin_as_programs_and_a_template_that_died_is_replaced(
    tmp_path: Path,
) -> None:
    async with site(tmp_path) as one:
        first, other = await one.ready("fake-0", "fake-1")
        template_pid = one.template_pid
        assert template_pid is not None
        os.kill(template_pid, signal.SIGKILL)
        await until(lambda: one.template_pid is None)
        # Nothing of it goes with it.
        assert first.is_running()
        assert other.is_running()
        first.kill()
        await one.lived_on("fake-0", first)
        await until(lambda: one.template_pid not in (None, template_pid))
        assert any(line.startswith("the template is gone") for line in one.log.tail())


async def test_a_template_that_hangs_when_it_is_asked_is_ended_and_costs_a_worker_nothing(tmp_path: Path) -> None:
    async with site(tmp_path) as one:
        first, _ = await one.ready("fake-0", "fake-1")
        template_pid = one.template_pid
        assert template_pid is not None
        os.kill(template_pid, signal.SIGSTOP)
        first.kill()
        await one.lived_on("fake-0", first)
        assert is_gone(template_pid)
        assert "nothing is forked: the template does not answer" in one.log.tail()


@pytest.mark.parametrize("warm_up", ["crash", "threads"])
async def test_a_template_that_cannot_be_one_holds_nobody_up(tmp_path: Path, warm_up: str) -> None:
    async with site(tmp_path, warm_up=warm_up) as one:
        await one.ready("fake-0", "fake-1")
        assert one.template_pid is None
        reason = "it was ended by SIGKILL" if warm_up == "crash" else "it exited with code 0"
        assert f"the template is gone: {reason}" in one.log.tail()
        if warm_up == "threads":
            assert any("there are 2, and nothing can be forked" in line for line in one.log.tail())


async def test_a_worker_that_is_stopped_while_it_waits_for_its_template_never_begins(tmp_path: Path) -> None:
    async with site(tmp_path, warm_up="slow") as one:
        await until(lambda: one.worker("fake-0").state is State.STARTING)
        one.agent.stop(WorkerId("fake-0"))
        await until(lambda: one.worker("fake-0").state is State.STOPPED)
        assert one.worker("fake-0").pid is None
        assert one.worker("fake-1").state is State.STARTING
        # And leaving while the other still waits takes no longer.


async def test_a_single_worker_is_a_program_of_its_own_unless_a_template_always_stands_by(tmp_path: Path) -> None:
    async with site(tmp_path, num_workers=1) as one:
        await one.ready("fake-0")
        assert one.template is None
    async with site(tmp_path, num_workers=1, always=True, starts=False) as one:
        await until(lambda: one.template_pid is not None)
        one.agent.start(WorkerId("fake-0"))
        (process,) = await one.ready("fake-0")
        assert one.log.tail()[-1] == f"workers are forked of process {one.template_pid}"
        assert process.create_time() > psutil.Process(one.template_pid).create_time()


async def test_after_a_restart_that_was_asked_for_the_program_is_read_anew(tmp_path: Path) -> None:
    """Somebody may have put another one there."""
    async with site(tmp_path) as one:
        first, _ = await one.ready("fake-0", "fake-1")
        template_pid = one.template_pid
        assert template_pid is not None
        one.agent.restart(WorkerId("fake-0"), one.worker("fake-0").incarnation)
        await one.lived_on("fake-0", first)
        assert is_gone(template_pid)


def test_nothing_is_left_of_an_agent_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.support.fake_agent", "--template", str(tmp_path), "parent", "parent"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as agent:
        assert agent.stdout is not None
        assert agent.stdout.readline().startswith("[")
        family = [child.pid for child in psutil.Process(agent.pid).children(recursive=True)]
        # Guard, template, two workers and what each of them started.
        assert len(family) == 6
        agent.kill()
    wait_gone(family, PATIENCE_S)
