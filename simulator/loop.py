"""An asyncio event loop on virtual time: it never waits, it jumps to the next timer.

What runs on it is deterministic: one thread, no selector, no real clock, and tasks and futures whose hashes
are their ordinals, so that the sets inside `asyncio.wait` and `asyncio.TaskGroup` iterate the same way in
every run. A program that can never go on ends with `StuckProgram`; one that never ends, with `LimitReached`.

Parts of a program can be frozen, as SIGSTOP freezes a process: what was scheduled in a context where `HOST` names
a frozen host runs, in order, when the host is thawed.
"""

from __future__ import annotations

import asyncio
import gc
import heapq
import itertools
import threading
from collections import deque
from contextvars import ContextVar, copy_context
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, TypeVarTuple

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator
    from contextvars import Context
    from types import FrameType

#: The simulated process that a task belongs to; inherited by what it starts. Only named ones can be frozen.
HOST: ContextVar[str | None] = ContextVar("HOST", default=None)

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

#: What a program may still use after a limit or a dead end, to be cancelled in order.
_CLEAN_UP_S = 60.0
_CLEAN_UP_TURNS = 100_000

#: Turns of the loop at one instant that no sane program needs: it spins.
SPIN_TURNS = 200_000

#: Turns between two collections of cyclic garbage, where the program has switched automatic ones off.
_COLLECT_TURNS = 100_000

#: Turns between two looks at what they are limited by.
_CHECK_TURNS = 1000

#: So many cancelled timers may always wait for their time.
_FEW_TIMERS = 100


class SimulationError(Exception):
    """The simulated program, not the simulator, is at fault."""


class StuckProgram(SimulationError):
    """Nothing is ready and nothing is scheduled. The message says where each task waits."""


class LimitReached(SimulationError):
    """The program used up its virtual time or its turns, or spins at one instant."""


class ThreadsRefused(SimulationError):
    """A program on virtual time asked for a thread, or a thread called in: neither can be repeated."""


class _OrdinalFuture(asyncio.Future[T]):
    """A future whose hash is its place in the order in which futures and tasks were first hashed."""

    _ordinal: int

    def __hash__(self) -> int:
        try:
            return self._ordinal
        except AttributeError:
            loop = self.get_loop()
            assert isinstance(loop, VirtualLoop)
            self._ordinal = loop.next_ordinal()
            return self._ordinal


class _OrdinalTask(asyncio.Task[T]):
    """A task whose hash is its place in the order of creation."""

    def __init__(
        self,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        ordinal: int,
        *,
        loop: asyncio.AbstractEventLoop,
        context: Context | None,
    ) -> None:
        # First: the constructor of the base class already puts the task into a set.
        self.ordinal = ordinal
        super().__init__(coroutine, loop=loop, name=f"task-{ordinal}", context=context)

    def __hash__(self) -> int:
        return self.ordinal


class _Entry(asyncio.TimerHandle):
    """A scheduled callback, of a timer or not. Its context says whose it is, see `HOST`.

    The constructor of the base class takes several times as long, mostly to ask for the debug mode.
    """

    __slots__ = ("in_heap",)

    def __init__(
        self,
        when_s: float,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        loop: VirtualLoop,
        context: Context | None,
    ) -> None:
        self._when = when_s
        self._callback: Callable[..., object] | None = callback
        self._args = args
        self._loop = loop
        self._context = copy_context() if context is None else context
        self._cancelled = False
        self._repr = None
        self._source_traceback = None
        #: Whether it waits for its time.
        self.in_heap = False

    @property
    def host(self) -> str | None:
        return self._context.get(HOST)

    def cancel(self) -> None:
        if not self._cancelled:
            self._cancelled = True
            self._callback, self._args = None, ()
            if self.in_heap:
                self._loop.timer_cancelled()


class VirtualLoop(asyncio.BaseEventLoop):
    """`time()` starts at 0 and counts virtual seconds. Timers of the same instant run in the order they were set.

    `limit_s` bounds the virtual time, `limit_turns` the turns of the loop (one turn runs everything that was
    ready when it began).
    """

    #: Kept by the base class.
    _closed: bool
    _stopping: bool

    def __init__(self, *, limit_s: float, limit_turns: int) -> None:
        super().__init__()
        self._now_s = 0.0
        self._limit_s = limit_s
        self._limit_turns = limit_turns
        self._turns = 0
        #: `_turns` when time last moved.
        self._turns_at_jump = 0
        self._ordinals = itertools.count(1)
        self._timer_ordinals = itertools.count()
        self._thread = threading.get_ident()
        #: Callbacks to run, in order; also what the base class clears on closing.
        self._ready: deque[_Entry] = deque()
        #: A heap of timers: when, an ordinal, and what to run. Also what the base class clears.
        self._scheduled: list[tuple[float, int, _Entry]] = []
        #: How many of `_scheduled` are cancelled.
        self._num_cancelled = 0
        #: By frozen host: what would have run, in order.
        self._held: dict[str | None, list[_Entry]] = {}
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    @property
    def turns(self) -> int:
        return self._turns

    def next_ordinal(self) -> int:
        return next(self._ordinals)

    # --- turns ------------------------------------------------------------------------------------

    def _run_once(self) -> None:
        """One turn; what the base class calls until it is stopped."""
        self._turns += 1
        if self._turns % _CHECK_TURNS == 0:
            self._check_turns()
        ready, scheduled = self._ready, self._scheduled
        if not ready and not self._stopping:
            self._jump()
        while scheduled and scheduled[0][0] <= self._now_s:
            ready.append(self._pop_timer())
        for _ in range(len(ready)):
            entry = ready.popleft()
            if entry._cancelled or (self._held and self._hold(entry)):
                continue
            entry._run()

    def _jump(self) -> None:
        """Moves time to the next timer that was not cancelled."""
        scheduled = self._scheduled
        while scheduled and scheduled[0][2]._cancelled:
            self._pop_timer()
        if not scheduled:
            self._give_up(StuckProgram, "nothing is ready and nothing is scheduled")
        if scheduled[0][0] > self._now_s:
            self._now_s = scheduled[0][0]
            self._turns_at_jump = self._turns
        if self._now_s > self._limit_s:
            self._give_up(LimitReached, f"the program runs past its limit of {self._limit_s:g} virtual seconds")

    def _check_turns(self) -> None:
        if self._turns % _COLLECT_TURNS == 0:
            gc.collect(0)
        if self._turns > self._limit_turns:
            self._give_up(LimitReached, f"the program took more than {self._limit_turns} turns of the loop")
        if self._turns - self._turns_at_jump > SPIN_TURNS:
            self._give_up(LimitReached, f"the program spins: {SPIN_TURNS} turns of the loop at one instant")

    def _give_up(self, kind: type[SimulationError], why: str) -> NoReturn:
        report = describe_tasks(self)
        error = kind(f"{why}, at {self._now_s:.6f} s after {self._turns} turns\n{report}")
        self._limit_s = self._now_s + _CLEAN_UP_S
        self._limit_turns = self._turns + _CLEAN_UP_TURNS
        self._turns_at_jump = self._turns
        raise error

    # --- scheduling -------------------------------------------------------------------------------

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        entry = _Entry(self._now_s, callback, args, self, context)
        self._ready.append(entry)
        return entry

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        if self._closed:
            raise RuntimeError("Event loop is closed")
        entry = _Entry(when, callback, args, self, context)
        entry.in_heap = True
        heapq.heappush(self._scheduled, (when, next(self._timer_ordinals), entry))
        return entry

    def _pop_timer(self) -> _Entry:
        """The next timer, cancelled or not."""
        entry = heapq.heappop(self._scheduled)[2]
        entry.in_heap = False
        self._num_cancelled -= entry._cancelled
        return entry

    def timer_cancelled(self) -> None:
        """For its entries: long timers that are set and cancelled all the time must not pile up."""
        self._num_cancelled += 1
        if self._num_cancelled > _FEW_TIMERS and self._num_cancelled * 2 > len(self._scheduled):
            self._scheduled[:] = [timer for timer in self._scheduled if not timer[2].cancelled()]
            heapq.heapify(self._scheduled)
            self._num_cancelled = 0

    def create_future(self) -> asyncio.Future[Any]:
        return _OrdinalFuture(loop=self)

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        return _OrdinalTask(coroutine, next(self._ordinals), loop=loop, context=context)

    def call_soon_threadsafe(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        """Like `call_soon`, from the loop's own thread only: asyncio itself calls it there."""
        if threading.get_ident() != self._thread:
            name = threading.current_thread().name
            raise ThreadsRefused(f"thread {name!r} calls into a loop on virtual time")
        return self.call_soon(callback, *args, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> NoReturn:  # type: ignore[override]
        raise ThreadsRefused(f"{func!r} was to run in a thread beside a loop on virtual time")

    # --- freezing ---------------------------------------------------------------------------------

    def freeze(self, host: str) -> None:
        """Nothing of this host runs until `thaw`. Repeats change nothing."""
        self._held.setdefault(host, [])

    def thaw(self, host: str) -> None:
        """What came due meanwhile runs now; timers that would have come due at different times run together."""
        self._ready.extend(self._held.pop(host, ()))

    def _hold(self, entry: _Entry) -> bool:
        """Whether it is a frozen host's, and was put aside."""
        held = self._held.get(entry.host)
        if held is None:
            return False
        held.append(entry)
        return True


def describe_tasks(loop: asyncio.AbstractEventLoop) -> str:
    """One line per pending task, oldest first: its name, then from the outside in where it waits."""
    tasks = sorted(asyncio.all_tasks(loop), key=hash)
    return "\n".join(f"  {task.get_name()} waits in {_waits_in(task.get_coro())}" for task in tasks)


def _waits_in(awaited: object) -> str:
    places: list[str] = []
    while awaited is not None:
        frame, inner = _suspended(awaited)
        if frame is not None:
            code = frame.f_code
            places.append(f"{code.co_qualname} ({code.co_filename}:{frame.f_lineno})")
        awaited = inner
    return " > ".join(places) or "nothing known"


def _suspended(awaited: object) -> tuple[FrameType | None, object]:
    """The frame of a coroutine, generator or async generator, and what it awaits in turn."""
    for prefix, inner in (("cr", "cr_await"), ("gi", "gi_yieldfrom"), ("ag", "ag_await")):
        if hasattr(awaited, f"{prefix}_frame"):
            return getattr(awaited, f"{prefix}_frame"), getattr(awaited, inner)
    return None, None
