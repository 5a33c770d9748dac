"""What both lease services share: one machine, its clock, and the tasks that its instructions start."""

from __future__ import annotations

import asyncio
import math
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

from contracts.errors import InvariantBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from types import TracebackType

    from contracts.clock import Clock

#: Ticks may be late by this much. Shorter waits can round to none, and the loop would spin.
SHORTEST_WAIT_S = 0.001

Event = TypeVar("Event")
Event_contra = TypeVar("Event_contra", contravariant=True)
Instruction = TypeVar("Instruction")


class Machine(Protocol[Event_contra, Instruction]):
    @property
    def idle(self) -> bool: ...

    def handle(self, event: Event_contra, now_s: float) -> list[Instruction]: ...

    def next_due_s(self) -> float | None: ...


class MachineShell(Generic[Event, Instruction]):
    """Feeds a machine, performs its instructions, and ticks it when it is due. Holds no state of its own.

    An async context manager: the tasks live inside it. It ends with what `stop` feeds the machine, and gives
    that `close_grace_s` to reach peers and transports. A machine that finds state which cannot be, or a callback
    that raises, ends the service, whichever event led there: the body is cancelled, and leaving raises the error.
    """

    def __init__(
        self,
        machine: Machine[Event, Instruction],
        *,
        clock: Clock,
        perform: Callable[[Instruction], None],
        tick: Event,
        stop: Callable[[], None],
        close_grace_s: float,
    ) -> None:
        self._machine = machine
        self._clock = clock
        self._perform = perform
        self._tick = tick
        self._stop = stop
        self._close_grace_s = close_grace_s
        #: Present between entering and leaving.
        self._group: asyncio.TaskGroup | None = None
        #: Tasks of the group that have not ended, in the order started.
        self._tasks: dict[asyncio.Task[None], None] = {}
        #: Until when the clock task sleeps; set `_sooner` where the machine is due before.
        self._asleep_until_s = math.inf
        self._sooner = asyncio.Event()
        #: Set by every event.
        self._fed = asyncio.Event()
        #: Callbacks into other rooms; run one after the other, outside of `Machine.handle`.
        self._notices: deque[Callable[[], None]] = deque()
        self._notifying = False
        #: What ends the service.
        self._error: Exception | None = None
        self._broken = asyncio.Event()

    @property
    def running(self) -> bool:
        return self._group is not None

    def feed(self, event: Event) -> list[Instruction]:
        """Applies an event and performs what it leads to; returns the instructions for their answers."""
        try:
            instructions = self._machine.handle(event, self._clock.now_s())
        except InvariantBroken as error:
            self._break(error)
            raise
        for instruction in instructions:
            self._perform(instruction)
        self._fed.set()
        due_s = self._machine.next_due_s()
        if due_s is not None and due_s < self._asleep_until_s:
            self._sooner.set()
        self._run_notices()
        return instructions

    def notify(self, notice: Callable[[], None]) -> None:
        """Queues a callback. It runs within the outermost `feed`, whatever becomes of others, and may feed again."""
        self._notices.append(notice)

    def spawn(self, work: Coroutine[object, object, None], name: str) -> None:
        if self._group is None:
            work.close()
            raise InvariantBroken(f"{name}: the service is not running")
        try:
            task = self._group.create_task(work, name=name)
        except RuntimeError:
            # A bug ends the group: like its other tasks this one is cancelled, only before it begins.
            work.close()
            return
        self._tasks[task] = None
        task.add_done_callback(self._tasks.pop)

    async def __aenter__(self) -> Self:
        self._group = asyncio.TaskGroup()
        await self._group.__aenter__()
        self.spawn(self._keep_time(), f"{self._machine!r} clock")
        self.spawn(self._end_when_broken(), f"{self._machine!r} end")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        group = self._group
        assert group is not None, "left without having been entered"
        try:
            self._stop()
            await self._settle()
        finally:
            self._group = None
            for task in list(self._tasks):
                task.cancel()
            if isinstance(error, asyncio.CancelledError):
                await group.__aexit__(kind, error, trace)
            else:
                # The body's own error leaves as it is, not as part of a group.
                await group.__aexit__(None, None, None)
        if self._error is not None:
            # It came too late for the group.
            raise self._error

    async def _settle(self) -> None:
        """Waits until the machine is idle, within the grace."""
        try:
            async with asyncio.timeout(self._close_grace_s):
                while not self._machine.idle:
                    self._fed.clear()
                    await self._fed.wait()
        except TimeoutError:
            return

    async def _keep_time(self) -> None:
        """Ticks the machine whenever it is due; sleeps for good while nothing is."""
        while True:
            due_s = self._machine.next_due_s()
            now_s = self._clock.now_s()
            if due_s is not None and due_s <= now_s:
                self.feed(self._tick)
                continue
            self._asleep_until_s = math.inf if due_s is None else due_s
            self._sooner.clear()
            try:
                async with asyncio.timeout(None if due_s is None else max(due_s - now_s, SHORTEST_WAIT_S)):
                    await self._sooner.wait()
            except TimeoutError:
                continue

    def _run_notices(self) -> None:
        if self._notifying:
            return
        self._notifying = True
        try:
            while self._notices:
                notice = self._notices.popleft()
                try:
                    notice()
                except Exception as error:
                    # Who fed has done nothing wrong, and the notices behind this one are owed all the same.
                    self._break(error)
        finally:
            self._notifying = False

    def _break(self, error: Exception) -> None:
        """Ends the service with this error; the first one counts."""
        if self._group is None:
            raise error
        if self._error is None:
            self._error = error
            self._broken.set()

    async def _end_when_broken(self) -> None:
        await self._broken.wait()
        assert self._error is not None, "set together"
        raise self._error
