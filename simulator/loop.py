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
import itertools
import threading
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


class SimulationError(Exception):
    """The simulated program, not the simulator, is at fault."""


class StuckProgram(SimulationError):
    """Nothing is ready and nothing is scheduled. The message says where each task waits."""


class LimitReached(SimulationError):
    """The program used up its virtual time or its turns, or spins at one instant."""


class ThreadsRefused(SimulationError):
    """A program on virtual time asked for a thread, or a thread called in: neither can be repeated."""


class _OrdinalFuture(asyncio.Future[T]):
    """A future whose hash is its place in the order of creation."""

    def __init__(self, ordinal: int, *, loop: asyncio.AbstractEventLoop) -> None:
        self._ordinal = ordinal
        super().__init__(loop=loop)

    def __hash__(self) -> int:
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


class _Gate:
    """A scheduled callback of a host: held while the host is frozen."""

    __slots__ = ("_args", "_callback", "_held", "_host", "context", "handle")

    def __init__(
        self,
        held: dict[str, list[_Gate]],
        host: str,
        callback: Callable[..., object],
        args: tuple[Any, ...],
        context: Context,
    ) -> None:
        self._held = held
        self._host = host
        self._callback = callback
        self._args = args
        self.context = context
        #: What the scheduler was given, who may cancel it while it is held.
        self.handle: asyncio.Handle

    def __call__(self) -> None:
        if self._host in self._held:
            self._held[self._host].append(self)
        elif not self.handle.cancelled():
            self._callback(*self._args)


class VirtualLoop(asyncio.BaseEventLoop):
    """`time()` starts at 0 and counts virtual seconds.

    `limit_s` bounds the virtual time, `limit_turns` the turns of the loop (one turn runs everything that was
    ready when it began).
    """

    def __init__(self, *, limit_s: float, limit_turns: int) -> None:
        super().__init__()
        self._now_s = 0.0
        self._limit_s = limit_s
        self._limit_turns = limit_turns
        self._turns = 0
        #: `_turns` when time last moved.
        self._turns_at_jump = 0
        self._ordinals = itertools.count(1)
        self._thread = threading.get_ident()
        #: By frozen host: what would have run, in order.
        self._held: dict[str, list[_Gate]] = {}
        # The base class asks it for I/O once a turn, saying how long it may wait at most.
        self._selector = _NeverWaits(self)
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    @property
    def turns(self) -> int:
        return self._turns

    def turn(self, wait_s: float | None) -> None:
        """Ends one turn. `wait_s`: until the next timer; 0: something is ready; None: neither."""
        self._turns += 1
        if self._turns % _COLLECT_TURNS == 0:
            gc.collect(0)
        if wait_s is None:
            self._give_up(StuckProgram, "nothing is ready and nothing is scheduled")
        if wait_s > 0:
            self._now_s += wait_s
            self._turns_at_jump = self._turns
        if self._now_s > self._limit_s:
            self._give_up(LimitReached, f"the program runs past its limit of {self._limit_s:g} virtual seconds")
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

    def _make_task(
        self,
        loop: asyncio.AbstractEventLoop,
        coroutine: Coroutine[Any, Any, T] | Generator[Any, None, T],
        *,
        context: Context | None = None,
    ) -> asyncio.Task[T]:
        return _OrdinalTask(coroutine, next(self._ordinals), loop=loop, context=context)

    # --- freezing ---------------------------------------------------------------------------------

    def freeze(self, host: str) -> None:
        """Nothing of this host runs until `thaw`. Repeats change nothing."""
        self._held.setdefault(host, [])

    def thaw(self, host: str) -> None:
        """What came due meanwhile runs now; timers that would have come due at different times run together."""
        for gate in self._held.pop(host, ()):
            super().call_soon(gate, context=gate.context)

    def call_soon(
        self, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.Handle:
        host = HOST.get() if context is None else context.get(HOST)
        if host is None:
            return super().call_soon(callback, *args, context=context)
        gate = _Gate(self._held, host, callback, args, context or copy_context())
        gate.handle = super().call_soon(gate, context=gate.context)
        return gate.handle

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        host = HOST.get() if context is None else context.get(HOST)
        if host is None:
            return super().call_at(when, callback, *args, context=context)
        gate = _Gate(self._held, host, callback, args, context or copy_context())
        gate.handle = handle = super().call_at(when, gate, context=gate.context)
        return handle

    def create_future(self) -> asyncio.Future[Any]:
        return _OrdinalFuture(next(self._ordinals), loop=self)

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

    # The two hooks of the base class that exist for real I/O.

    def _process_events(self, event_list: object) -> None:
        pass

    def _write_to_self(self) -> None:
        pass


class _NeverWaits:
    """What the base class takes for its selector."""

    def __init__(self, loop: VirtualLoop) -> None:
        self._loop = loop

    def select(self, timeout: float | None) -> tuple[()]:
        self._loop.turn(timeout)
        return ()


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
