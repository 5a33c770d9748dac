"""One slot of a node agent: a worker or store that runs there or could, and the shell around its `Supervision`."""

from __future__ import annotations

import asyncio
import shutil
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from cluster.child import Child
from cluster.launch import Serves, WorkerLaunch
from cluster.supervision import (
    TICK_S,
    DeadlineReached,
    Exited,
    Instruction,
    Kill,
    Report,
    RestartWanted,
    Spawn,
    Start,
    State,
    StopWanted,
    Supervision,
    Terminate,
    Told,
)
from cluster.uninterrupted import uninterrupted
from contracts.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cluster.guard import Guard
    from cluster.launch import Launch, Loading, Status
    from cluster.process_log import ProcessLog
    from cluster.standby import StandbyPool
    from cluster.supervision import Event
    from cluster.template import Template
    from contracts.clock import Clock
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import MemberRole, Role

#: Events of one worker that wait to be handled; a child that floods its status pipe is held up by it.
MAX_WAITING_EVENTS = 64

#: After its kill, a process gets this long to be gone, and its watcher to say so, when an agent ends in disorder.
WATCHER_GRACE_S = 5.0

#: Log lines shown with the report of a worker that was given up.
REPORT_LOG_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerPlan:
    """What the agent starts. `launch.incarnation` is replaced at each start."""

    launch: Launch
    command: tuple[str, ...]
    environ: Mapping[str, str]
    #: Of the configuration; "" for a store.
    pool: str = ""
    #: Whether it runs from the start; else it waits to be asked for.
    starts: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerStatus:
    """One worker as the agent sees it now."""

    worker_id: WorkerId
    role: MemberRole
    state: State
    incarnation: Incarnation
    pid: int | None
    address: str | None
    loading: Loading | None
    problem: str | None
    pool: str = ""
    #: As `contracts.control_messages.WorkerSlot`.
    start_s: float | None = None
    weights_wait_s: float | None = None
    weights_due_s: float = 0.0
    model: str = ""
    #: It runs, or should; not: its slot is empty, or about to be.
    is_wanted: bool = True


def is_for_cpu(launch: Launch) -> bool:
    """Whether it is a worker that may be forked: a device's context cannot be."""
    return isinstance(launch, WorkerLaunch) and launch.device != "cuda"


class Keeper:
    """The shell around one `Supervision`."""

    def __init__(
        self,
        plan: WorkerPlan,
        machine: Supervision,
        log: ProcessLog,
        clock: Clock,
        on_change: Callable[[], None],
        say: Callable[[str], None],
        *,
        standby: StandbyPool | None = None,
        template: Template | None = None,
        on_spawn: Callable[[Launch], None] | None = None,
    ) -> None:
        """`on_spawn` is called before each life begins."""
        self._plan = plan
        self._standby = standby
        self._template = template
        self._on_spawn = on_spawn
        self._machine = machine
        self._clock = clock
        self._on_change = on_change
        self._say = say
        self.log = log
        #: What the process writes; it is held up where nobody reads.
        self._events: asyncio.Queue[Event] = asyncio.Queue(MAX_WAITING_EVENTS)
        #: What others want, which goes first. A worker has few of them at a time: they come from people and policies.
        self._wishes: deque[Event] = deque([Start()] if plan.starts else ())
        #: Of either.
        self._has_news = asyncio.Event()
        #: The present life; None exactly while no process of this worker runs.
        self._child: Child | None = None
        #: The present life, while a template makes it.
        self._making: asyncio.Task[Child | None] | None = None
        #: The next life is to run the program as it is by then: somebody may have put another one there.
        self._is_anew = False
        #: Reads the present life's pipes and waits for its end.
        self._watch: asyncio.Task[None] | None = None
        self._is_wanted = plan.starts
        self._closing = False

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
            pool=self._plan.pool,
            start_s=machine.start_s,
            weights_wait_s=machine.weights_wait_s,
            weights_due_s=machine.weights_due_s,
            model=self._plan.launch.model_name,
            is_wanted=self._is_wanted,
        )

    def age_s(self) -> float | None:
        """Of the present process."""
        return self._machine.age_s(self._clock.now_s())

    def start(self, role: Role | None) -> None:
        if role is not None and not self._is_wanted:
            self._take_role(role)
        self._is_wanted = True
        self._wish(Start())

    def stop(self) -> None:
        self._is_wanted = False
        self._wish(StopWanted())

    def restart(self, life: Incarnation, python: str) -> None:
        if life != self._machine.incarnation:
            return
        if python:
            if shutil.which(python) is None:
                raise BadRequest(f"{python} cannot be run here", param="python")
            self._plan = replace(self._plan, command=(python, *self._plan.command[1:]))
        self._is_anew = True
        self._is_wanted = True
        self._wish(RestartWanted(life, is_other_build=bool(python)))

    def close(self) -> None:
        """Ends the worker, and `run`."""
        self._closing = True
        self._wish(StopWanted())

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()
        elif self._making is not None:
            self._making.cancel()

    def _wish(self, event: Event) -> None:
        self._wishes.append(event)
        self._has_news.set()

    def _take_role(self, role: Role) -> None:
        launch = self._plan.launch
        if not isinstance(launch, WorkerLaunch):
            raise BadRequest(f"{self.worker_id} is a store, and cannot be a {role} worker", param="role")
        self._plan = replace(self._plan, launch=msgspec.structs.replace(launch, role=role))

    async def run(self, guard: Guard) -> None:
        """Returns when the worker has ended after `close`."""
        told: WorkerStatus | None = None
        try:
            while True:
                # Signs of life and looks at the clock are many, and mostly news to nobody.
                if (status := self.status()) != told:
                    told = status
                    self._on_change()
                if self._closing and not self._wishes and self._machine.is_idle:
                    return
                for instruction in self._machine.handle(await self._next_event(), self._clock.now_s()):
                    await self._carry_out(instruction, guard)
        finally:
            self.kill()
            await uninterrupted(self._see_everybody_out())

    async def _see_everybody_out(self) -> None:
        """Waits for the watcher. Nobody handles events any more, so those that wait to be queued are let in and
        dropped; a process that survives its own kill (it hangs in the kernel) is left to it."""
        waiting = {self._watch} if self._watch else set[asyncio.Task[None]]()
        until_s = self._clock.now_s() + WATCHER_GRACE_S
        while waiting and self._clock.now_s() < until_s:
            while not self._events.empty():
                self._events.get_nowait()
            _, waiting = await asyncio.wait(waiting, timeout=0.05)
        for task in waiting:
            task.cancel()

    async def _next_event(self) -> Event:
        """What others want, or the process wrote, or a look at the clock where one is due before there is any."""
        deadline_s = self._machine.deadline_s
        while not self._wishes and self._events.empty():
            self._has_news.clear()
            if deadline_s is None:
                await self._has_news.wait()
                continue
            wait_s = min(max(0.0, deadline_s - self._clock.now_s()), TICK_S)
            try:
                async with asyncio.timeout(wait_s):
                    await self._has_news.wait()
            except TimeoutError:
                return DeadlineReached()
        return self._wishes.popleft() if self._wishes else self._events.get_nowait()

    async def _carry_out(self, instruction: Instruction, guard: Guard) -> None:
        match instruction:
            case Spawn(incarnation):
                self._spawn(incarnation, guard)
            case Terminate():
                if self._child is not None:
                    self._child.terminate()
                elif self._making is not None:
                    self._making.cancel()
            case Kill():
                self.kill()
            case Report(text, with_log):
                self._say(f"{self.worker_id}: {text}")
                for line in self.log.tail(REPORT_LOG_LINES) if with_log else ():
                    self._say(f"{self.worker_id} | {line}")

    def _spawn(self, incarnation: Incarnation, guard: Guard) -> None:
        launch = msgspec.structs.replace(self._plan.launch, incarnation=incarnation)
        if self._on_spawn is not None:
            self._on_spawn(launch)
        is_anew, self._is_anew = self._is_anew, False
        if self._template is not None and is_anew:
            self._template.renew()
        name = f"watch-{self.worker_id}"
        if self._template is not None and not is_anew and is_for_cpu(launch):
            self._watch = asyncio.create_task(self._live_forked(self._template, launch, guard), name=name)
        elif (child := self._started(launch, guard, may_be_warm=not is_anew)) is not None:
            self._watch = asyncio.create_task(self._see_out(child), name=name)

    def _started(self, launch: Launch, guard: Guard, *, may_be_warm: bool) -> Child | None:
        """By a process that stood by, or one of its own; None where its program cannot be run."""
        try:
            standby = self._take_standby(launch) if may_be_warm else None
            self._child = standby or Child(self._plan.command, self._plan.environ, launch, guard)
        except OSError as error:
            self._wish(Exited(f"{self._plan.command[0]} cannot be run: {error.strerror}"))
        return self._child

    def _take_standby(self, launch: Launch) -> Child | None:
        """A process that has imported all it needs becomes this worker."""
        child = None if self._standby is None else self._standby.take(self._plan.command, self._plan.environ)
        if child is not None:
            child.give(launch)
        return child

    async def _live_forked(self, template: Template, launch: Launch, guard: Guard) -> None:
        """A life that the template makes, if it can. Whoever ends it before cancels the making."""
        self._making = making = asyncio.create_task(
            template.fork(self._plan.command, self._plan.environ, launch, guard), name=f"make-{self.worker_id}"
        )
        try:
            await asyncio.wait([making])
        finally:
            making.cancel()
            self._making = None
        if making.cancelled():
            await self._put(Exited("it was ended before it had begun"))
            return
        if (error := making.exception()) is not None:
            self.log.write(f"its template failed: {error!r}".encode())
        else:
            self._child = making.result()
        child = self._child or self._started(launch, guard, may_be_warm=True)
        if child is not None:
            await self._see_out(child)

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
        await self._put(Exited(how))

    async def _told(self, status: Status) -> None:
        if isinstance(status, Serves):
            self._take_role(status.role)
        await self._put(Told(status))

    async def _put(self, event: Event) -> None:
        await self._events.put(event)
        self._has_news.set()
