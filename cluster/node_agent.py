"""The node agent: starts this machine's workers and keeps them running.

One task and one `Supervision` machine for each worker; a worker's trouble is its own, a bug of the agent ends the
body of its context. Leaving the context stops every worker within `stop_timeout_s` and the time a kill takes, and
leaves no process behind; nor does SIGKILL (`cluster.guard`).
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import msgspec

from cluster.child import Child
from cluster.guard import Guard
from cluster.process_log import ProcessLog
from cluster.supervision import (
    TICK_S,
    DeadlineReached,
    Exited,
    Instruction,
    Kill,
    Report,
    Spawn,
    Start,
    State,
    StopWanted,
    Supervision,
    SupervisionLimits,
    Terminate,
    Told,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from cluster.launch import Loading, Status, WorkerLaunch
    from cluster.supervision import Event
    from contracts.clock import Clock
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import Role

#: Events of one worker that wait to be handled; a child that floods its status pipe is held up by it.
MAX_WAITING_EVENTS = 64

#: After its kill, a process gets this long to be gone, and its watcher to say so, when an agent ends in disorder.
WATCHER_GRACE_S = 5.0

#: Log lines shown with the report of a worker that was given up.
REPORT_LOG_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What the agent starts. `launch.incarnation` is replaced at each start."""

    launch: WorkerLaunch
    command: tuple[str, ...]
    environ: Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as the agent sees it now."""

    worker_id: WorkerId
    role: Role
    state: State
    incarnation: Incarnation
    pid: int | None
    address: str | None
    loading: Loading | None
    problem: str | None


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
    ) -> None:
        self.changed = asyncio.Event()
        #: Present between entering and leaving.
        self._guard: Guard | None = None
        self._keepers = [
            _Keeper(
                plan,
                Supervision(limits, first_incarnation),
                ProcessLog(log_dir / f"{plan.launch.worker_id}.log", say),
                clock,
                self.changed,
                say,
            )
            for plan in plans
        ]
        #: Present between entering and leaving.
        self._group: asyncio.TaskGroup | None = None
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"<NodeAgent {', '.join(f'{s.worker_id} {s.state.value}' for s in self.workers())}>"

    def workers(self) -> list[WorkerStatus]:
        return [keeper.status() for keeper in self._keepers]

    def log_tail(self, worker_id: WorkerId, num_lines: int = REPORT_LOG_LINES) -> list[str]:
        keeper = next(keeper for keeper in self._keepers if keeper.worker_id == worker_id)
        return keeper.log.tail(num_lines)

    def kill_all(self) -> None:
        """At once and without ceremony: for an impatient operator."""
        for keeper in self._keepers:
            keeper.kill()

    async def __aenter__(self) -> Self:
        self._guard = Guard()
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self._tasks = [
            self._group.create_task(keeper.run(self._guard), name=f"keep-{keeper.worker_id}")
            for keeper in self._keepers
        ]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._group is not None, "left without having been entered"
        assert self._guard is not None, "made with the group"
        for keeper in self._keepers:
            keeper.stop()
        try:
            if self._tasks:
                await asyncio.wait(self._tasks)
        finally:
            self.kill_all()
            if not isinstance(error, asyncio.CancelledError):
                # The body's own error leaves as it is, not as part of a group.
                kind = error = trace = None
            try:
                await self._group.__aexit__(kind, error, trace)
            finally:
                await _uninterrupted(asyncio.to_thread(self._guard.close))


class _Keeper:
    """The shell around one `Supervision`."""

    def __init__(
        self,
        plan: WorkerPlan,
        machine: Supervision,
        log: ProcessLog,
        clock: Clock,
        changed: asyncio.Event,
        say: Callable[[str], None],
    ) -> None:
        self._plan = plan
        self._machine = machine
        self._clock = clock
        self._changed = changed
        self._say = say
        self.log = log
        self._events: asyncio.Queue[Event] = asyncio.Queue(MAX_WAITING_EVENTS)
        #: The present life; None exactly while no process of this worker runs.
        self._child: Child | None = None
        #: Reads the present life's pipes and waits for its end.
        self._watch: asyncio.Task[None] | None = None
        self._stop_wanted = asyncio.Event()

    @property
    def worker_id(self) -> WorkerId:
        return self._plan.launch.worker_id

    def status(self) -> WorkerStatus:
        machine = self._machine
        return WorkerStatus(
            worker_id=self.worker_id,
            role=self._plan.launch.role,
            state=machine.state,
            incarnation=machine.incarnation,
            pid=None if self._child is None else self._child.pid,
            address=machine.address,
            loading=machine.loading,
            problem=machine.problem,
        )

    def stop(self) -> None:
        self._stop_wanted.set()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    async def run(self, guard: Guard) -> None:
        """Returns when the worker is stopped or given up."""
        stopping = asyncio.create_task(self._pass_on_stop(), name=f"stop-{self.worker_id}")
        event: Event = Start()
        told: WorkerStatus | None = None
        try:
            while True:
                for instruction in self._machine.handle(event, self._clock.now_s()):
                    await self._carry_out(instruction, guard)
                # Signs of life and looks at the clock are many, and mostly news to nobody.
                if (status := self.status()) != told:
                    told = status
                    self._changed.set()
                if self._machine.ended:
                    return
                event = await self._next_event()
        finally:
            stopping.cancel()
            self.kill()
            await _uninterrupted(self._see_everybody_out(stopping))

    async def _see_everybody_out(self, stopping: asyncio.Task[None]) -> None:
        """Waits for the tasks of this keeper. Nobody handles events any more, so those that wait to be queued are
        let in and dropped; a process that survives its own kill (it hangs in the kernel) is left to it."""
        waiting = {stopping, *([self._watch] if self._watch else [])}
        until_s = self._clock.now_s() + WATCHER_GRACE_S
        while waiting and self._clock.now_s() < until_s:
            while not self._events.empty():
                self._events.get_nowait()
            _, waiting = await asyncio.wait(waiting, timeout=0.05)
        for task in waiting:
            task.cancel()

    async def _pass_on_stop(self) -> None:
        await self._stop_wanted.wait()
        await self._events.put(StopWanted())

    async def _next_event(self) -> Event:
        deadline_s = self._machine.deadline_s
        if deadline_s is None:
            return await self._events.get()
        wait_s = min(max(0.0, deadline_s - self._clock.now_s()), TICK_S)
        with contextlib.suppress(TimeoutError):
            return await asyncio.wait_for(self._events.get(), wait_s)
        return DeadlineReached()

    async def _carry_out(self, instruction: Instruction, guard: Guard) -> None:
        match instruction:
            case Spawn(incarnation):
                await self._spawn(incarnation, guard)
            case Terminate():
                if self._child is not None:
                    self._child.terminate()
            case Kill():
                self.kill()
            case Report(text, with_log):
                self._say(f"{self.worker_id}: {text}")
                for line in self.log.tail(REPORT_LOG_LINES) if with_log else ():
                    self._say(f"{self.worker_id} | {line}")

    async def _spawn(self, incarnation: Incarnation, guard: Guard) -> None:
        launch = msgspec.structs.replace(self._plan.launch, incarnation=incarnation)
        try:
            self._child = Child(self._plan.command, self._plan.environ, launch, guard)
        except OSError as error:
            await self._events.put(Exited(f"{self._plan.command[0]} cannot be run: {error.strerror}"))
            return
        self._watch = asyncio.create_task(self._see_out(self._child), name=f"watch-{self.worker_id}")

    async def _see_out(self, child: Child) -> None:
        how = "its watcher was stopped"
        try:
            how = await child.ended(self._told, self.log)
        except* OSError as error:
            how = f"its output could not be read: {error.exceptions[0]}"
        except* Exception as error:
            # Whatever it was, the process is dead, and its keeper waits to hear of it.
            how = f"its watcher failed: {error.exceptions[0]!r}"
        finally:
            self._child = None
        await self._events.put(Exited(how))

    async def _told(self, status: Status) -> None:
        await self._events.put(Told(status))


async def _uninterrupted(work: Coroutine[Any, Any, None]) -> None:
    """Awaits a bounded piece of work to its end, whoever cancels meanwhile; that is passed on afterwards."""
    task = asyncio.create_task(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    task.result()
