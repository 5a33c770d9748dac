"""The node agent with real processes: start, crash, giving up, stop, and nobody left behind."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from typing import TYPE_CHECKING

import psutil
import pytest
import uvloop

from cluster.guard import left_over
from cluster.node_agent import NodeAgent, WorkerStatus
from cluster.supervision import State, Supervision, SupervisionLimits
from contracts.errors import BadRequest, NotFound
from contracts.ids import Incarnation, WorkerId
from rpc import LiveClock
from tests.support.fake_agent import fake_plan
from tests.support.layout import ROOT
from tests.support.processes import is_gone, wait_gone

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from pathlib import Path

from cluster.node_agent import WorkerPlan

#: Long enough for a machine under load; nothing waits for it when all is well.
PATIENCE_S = 60.0

QUICK = SupervisionLimits(restart_delay_s=0.01, restart_delay_max_s=0.05, stop_timeout_s=10.0)


class Watched:
    """An agent and what it said."""

    def __init__(self, plans: list[WorkerPlan], log_dir: Path, limits: SupervisionLimits) -> None:
        self.said: list[str] = []
        self.agent = NodeAgent(
            plans,
            limits=limits,
            first_incarnation=Incarnation(100),
            log_dir=log_dir,
            clock=LiveClock(),
            say=self.said.append,
        )

    async def until(self, condition: Callable[[list[WorkerStatus]], bool]) -> list[WorkerStatus]:
        async with asyncio.timeout(PATIENCE_S):
            while not condition(self.agent.workers()):
                await self.agent.changed.wait()
                self.agent.changed.clear()
        return self.agent.workers()


def plans(folder: Path, *behaviours: str) -> list[WorkerPlan]:
    return [
        fake_plan(f"fake-{index}", behaviour, folder, parent_pid=psutil.Process().pid)
        for index, behaviour in enumerate(behaviours)
    ]


def all_ready(workers: list[WorkerStatus]) -> bool:
    return all(worker.state is State.READY for worker in workers)


def pid_of(worker: WorkerStatus) -> int:
    assert worker.pid is not None
    return worker.pid


def on_both_loops(test: Callable[[], Coroutine[None, None, None]]) -> None:
    """The live processes run on uvloop; asyncio's own loop must do as well."""
    asyncio.run(test())
    uvloop.run(test())


def test_workers_start_and_leave_when_the_agent_does(tmp_path: Path) -> None:
    async def run() -> None:
        watched = Watched(plans(tmp_path, "ready", "ready"), tmp_path, QUICK)
        async with watched.agent:
            workers = await watched.until(all_ready)
            pids = [pid_of(worker) for worker in workers]
            assert [worker.address for worker in workers] == [f"fake:{pid}" for pid in pids]
            assert len(set(pids)) == 2
        assert [worker.state for worker in watched.agent.workers()] == [State.STOPPED, State.STOPPED]
        assert all(is_gone(pid) for pid in pids)

    on_both_loops(run)


async def test_the_token_is_neither_an_argument_nor_in_the_environment(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "ready"), tmp_path, QUICK)
    async with watched.agent:
        (worker,) = await watched.until(all_ready)
        process = psutil.Process(pid_of(worker))
        assert "secret-token" not in " ".join(process.cmdline())
        assert "secret-token" not in " ".join(process.environ().values())


async def test_a_killed_worker_comes_back_with_a_larger_incarnation(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "ready", "ready"), tmp_path, QUICK)
    async with watched.agent:
        first, other = await watched.until(all_ready)
        psutil.Process(pid_of(first)).kill()
        again, same = await watched.until(
            lambda workers: all_ready(workers) and workers[0].incarnation > first.incarnation
        )
        assert again.pid != first.pid
        assert (same.pid, same.incarnation) == (other.pid, other.incarnation)
    assert any("fake-0: crashed: it was ended by SIGKILL; restarting" in line for line in watched.said)


async def test_slots_are_filled_emptied_and_renewed_when_somebody_asks(tmp_path: Path) -> None:
    first, spare = plans(tmp_path, "ready", "ready")
    watched = Watched([first, replace(spare, starts=False, pool="decode")], tmp_path, QUICK)
    agent = watched.agent
    async with agent:
        one, two = await watched.until(lambda workers: workers[0].state is State.READY)
        assert (two.state, two.is_wanted, two.pool) == (State.NEW, False, "decode")
        agent.start(two.worker_id, "decode")
        _, two = await watched.until(all_ready)
        assert two.role == "decode"
        assert two.start_s is not None
        agent.restart(two.worker_id, Incarnation(two.incarnation - 1))
        agent.restart(two.worker_id, two.incarnation, python=sys.executable)
        _, again = await watched.until(lambda workers: all_ready(workers) and workers[1].incarnation > two.incarnation)
        assert (again.incarnation, again.role) == (two.incarnation + 1, "decode")
        assert not any("crashed" in line for line in watched.said)
        agent.stop(one.worker_id)
        one, _ = await watched.until(lambda workers: workers[0].state is State.STOPPED)
        assert not one.is_wanted
        agent.start(one.worker_id)
        await watched.until(all_ready)
        with pytest.raises(NotFound, match="this node agent has no worker x; it has fake-0, fake-1"):
            agent.stop(WorkerId("x"))
        with pytest.raises(BadRequest, match="/no/python cannot be run here"):
            agent.restart(again.worker_id, again.incarnation, python="/no/python")
        pids = [pid_of(worker) for worker in agent.workers()]
    assert all(is_gone(pid) for pid in pids)


async def test_an_agent_whose_slots_are_empty_leaves_at_once(tmp_path: Path) -> None:
    watched = Watched([replace(plan, starts=False) for plan in plans(tmp_path, "ready")], tmp_path, QUICK)
    async with watched.agent:
        assert [worker.is_wanted for worker in watched.agent.workers()] == [False]
    assert [worker.pid for worker in watched.agent.workers()] == [None]


async def test_a_worker_that_crashes_when_ready_is_restarted_again_and_again(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "crash"), tmp_path, QUICK)
    async with watched.agent:
        await watched.until(lambda workers: workers[0].incarnation >= 104)
        assert watched.agent.workers()[0].state is not State.GIVEN_UP


async def test_a_worker_that_dies_at_its_start_is_given_up_and_the_rest_serves(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "start-crash", "ready"), tmp_path, QUICK)
    async with watched.agent:
        lost, other = await watched.until(lambda workers: [w.state for w in workers] == [State.GIVEN_UP, State.READY])
        assert lost.problem == "it was ended by SIGSEGV"
        assert not is_gone(pid_of(other))
    report = "\n".join(watched.said)
    assert "fake-0: given up after 3 failed starts: it was ended by SIGSEGV" in report
    assert "fake-0 | log line of " in report


async def test_a_configuration_error_is_not_tried_again(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "bad-config"), tmp_path, QUICK)
    async with watched.agent:
        (lost,) = await watched.until(lambda workers: workers[0].state is State.GIVEN_UP)
    assert lost.incarnation == 100
    assert lost.problem == "architecture Unknown is not supported"


async def test_a_worker_without_progress_is_killed_and_counted(tmp_path: Path) -> None:
    limits = SupervisionLimits(start_timeout_s=0.5, restart_delay_s=0.01, start_attempts=1)
    watched = Watched(plans(tmp_path, "stuck"), tmp_path, limits)
    async with watched.agent:
        (lost,) = await watched.until(lambda workers: workers[0].state is State.GIVEN_UP)
    assert lost.problem is not None
    assert lost.problem.startswith("no progress for 0.5 s while ")


async def test_a_worker_that_will_not_leave_is_killed(tmp_path: Path) -> None:
    limits = SupervisionLimits(stop_timeout_s=0.2)
    watched = Watched(plans(tmp_path, "stubborn"), tmp_path, limits)
    async with watched.agent:
        (worker,) = await watched.until(all_ready)
    assert is_gone(pid_of(worker))


@pytest.mark.parametrize("behaviour", ["frozen", "mute"])
def test_a_ready_worker_that_falls_silent_is_killed_and_restarted(tmp_path: Path, behaviour: str) -> None:
    """A stopped process heeds no signal but SIGKILL; one that only says nothing is treated alike."""

    async def run() -> None:
        limits = SupervisionLimits(hang_timeout_s=0.5, restart_delay_s=0.01, restart_delay_max_s=0.05)
        watched = Watched(plans(tmp_path, behaviour), tmp_path, limits)
        async with watched.agent:
            (first,) = await watched.until(all_ready)
            await watched.until(lambda workers: workers[0].incarnation >= 101)
            assert is_gone(pid_of(first))
        assert "fake-0: hangs: no sign of life for 0.5 s; killed" in watched.said

    on_both_loops(run)


async def test_signs_of_life_keep_a_worker_and_are_no_news(tmp_path: Path) -> None:
    limits = SupervisionLimits(hang_timeout_s=1.5)
    watched = Watched(plans(tmp_path, "ready"), tmp_path, limits)
    async with watched.agent:
        (worker,) = await watched.until(all_ready)
        watched.agent.changed.clear()
        await asyncio.sleep(3.0)
        assert not watched.agent.changed.is_set()
        assert watched.agent.workers() == [worker]


async def test_an_agent_that_was_stopped_itself_kills_nobody(tmp_path: Path) -> None:
    """As when the whole machine sleeps: here the agent's loop stands still for longer than the silence allowed, and
    so do its workers."""
    limits = SupervisionLimits(hang_timeout_s=1.0)
    watched = Watched(plans(tmp_path, "ready", "ready"), tmp_path, limits)
    async with watched.agent:
        workers = await watched.until(all_ready)
        for worker in workers:
            psutil.Process(pid_of(worker)).suspend()
        time.sleep(3.0)  # noqa: ASYNC251 - the loop is to stand still
        for worker in workers:
            psutil.Process(pid_of(worker)).resume()
        await asyncio.sleep(2.0)
        assert [worker.incarnation for worker in watched.agent.workers()] == [100, 100], watched.said


async def test_a_cancelled_agent_waits_for_no_watcher_and_leaves_nobody(tmp_path: Path) -> None:
    """Its keepers end in disorder while their workers flood them with events that nobody takes any more."""
    watched = Watched(plans(tmp_path, "flood", "stubborn"), tmp_path, QUICK)

    async def serve() -> None:
        async with watched.agent:
            await asyncio.Event().wait()

    serving = asyncio.create_task(serve())
    workers = await watched.until(all_ready)
    pids = [pid_of(worker) for worker in workers]
    serving.cancel()
    await asyncio.sleep(0.1)
    serving.cancel()
    await asyncio.wait([serving], timeout=PATIENCE_S)
    assert serving.cancelled()
    wait_gone(pids, PATIENCE_S)


async def test_a_bug_of_the_agent_ends_its_body(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A keeper that fails is not a worker that is left to itself."""
    watched = Watched(plans(tmp_path, "ready", "ready"), tmp_path, QUICK)

    def broken(self: Supervision, event: object, now_s: float) -> list[object]:
        raise ZeroDivisionError("a bug")

    async def serve() -> None:
        async with watched.agent:
            workers.extend(await watched.until(all_ready))
            monkeypatch.setattr(Supervision, "handle", broken)
            await asyncio.Event().wait()

    workers: list[WorkerStatus] = []
    with pytest.raises(ExceptionGroup) as caught:
        async with asyncio.timeout(PATIENCE_S):
            await serve()
    assert caught.group_contains(ZeroDivisionError)
    wait_gone([pid_of(worker) for worker in workers], PATIENCE_S)


def test_what_a_crashed_worker_started_goes_with_it(tmp_path: Path) -> None:
    async def run() -> None:
        watched = Watched(plans(tmp_path, "family"), tmp_path, QUICK)
        async with watched.agent:
            await watched.until(lambda workers: workers[0].incarnation >= 102)
        log = (tmp_path / "fake-0.log").read_text()
        grandchildren = [int(line.split()[1]) for line in log.splitlines() if line.startswith("grandchild")]
        assert len(grandchildren) >= 2
        wait_gone(grandchildren, PATIENCE_S)

    on_both_loops(run)


async def test_output_that_is_no_status_goes_to_the_log(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "noisy"), tmp_path, QUICK)
    async with watched.agent:
        await watched.until(all_ready)
    log = (tmp_path / "fake-0.log").read_text()
    assert "a library prints here\n" in log
    assert log.count("x") == 50_000


async def test_a_log_that_cannot_be_written_costs_lines_only(tmp_path: Path) -> None:
    (tmp_path / "fake-0.log").mkdir()
    watched = Watched(plans(tmp_path, "noisy"), tmp_path, QUICK)
    async with watched.agent:
        (worker,) = await watched.until(all_ready)
    complaints = [line for line in watched.said if line.startswith("cannot write")]
    assert len(complaints) == 1
    assert "fake-0.log: Is a directory" in complaints[0]
    assert any("log line of" in line for line in watched.agent.log_tail(worker.worker_id))


async def test_a_program_that_does_not_exist_is_a_failed_start(tmp_path: Path) -> None:
    (plan,) = plans(tmp_path, "ready")
    missing = type(plan)(launch=plan.launch, command=("/no/such/program",), environ=plan.environ)
    watched = Watched([missing], tmp_path, QUICK)
    async with watched.agent:
        (lost,) = await watched.until(lambda workers: workers[0].state is State.GIVEN_UP)
    assert lost.problem == "/no/such/program cannot be run: No such file or directory"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("behaviour", ["stubborn", "parent", "frozen"])
def test_nobody_outlives_a_killed_agent(tmp_path: Path, number: signal.Signals, behaviour: str) -> None:
    """Neither workers, even frozen ones, nor what they started, nor the agent's guard."""
    command = [sys.executable, "-m", "tests.support.fake_agent", str(tmp_path), behaviour, "ready"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as parent:
        assert parent.stdout is not None
        pids: list[int] = json.loads(parent.stdout.readline())
        children = [child.pid for child in psutil.Process(parent.pid).children()]
        assert len(children) == 3, "two workers and the guard"
        log = (tmp_path / "fake-0.log").read_text()
        pids += [int(line.split()[1]) for line in log.splitlines() if line.startswith("grandchild")]
        assert len(pids) == 2 + (behaviour == "parent")
        assert not any(is_gone(pid) for pid in pids)
        parent.send_signal(number)
        parent.wait(PATIENCE_S)
    wait_gone([*pids, *children], PATIENCE_S)


def test_the_guard_forgets_what_is_gone() -> None:
    assert left_over([b"+10\n", b"+11\n", b"-10\n", b"+12\n"]) == {11, 12}


async def guard_of_this_process() -> psutil.Process:
    """Waits until it is what it was started as: between fork and exec a child has its parent's command line."""
    async with asyncio.timeout(10.0):
        while True:
            for child in psutil.Process().children():
                if "cluster.guard" in child.cmdline():
                    return child
            await asyncio.sleep(0.01)


async def test_without_its_guard_an_agent_goes_on(tmp_path: Path) -> None:
    watched = Watched(plans(tmp_path, "crash"), tmp_path, QUICK)
    async with watched.agent:
        (await guard_of_this_process()).kill()
        await watched.until(lambda workers: workers[0].incarnation >= 103)
