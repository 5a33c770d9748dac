"""Runs one program on virtual time, from one seed, leaving a trace by which two runs are compared."""

from __future__ import annotations

import asyncio
import gc
import hashlib
import random
import traceback
from collections import deque
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from simulator.loop import SimulationError, VirtualLoop

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Generator

T = TypeVar("T")

#: Two virtual hours: far more than any scenario, far less than a forgotten timer's year.
DEFAULT_LIMIT_S = 7200.0

DEFAULT_LIMIT_TURNS = 20_000_000

#: Last lines of a trace that are kept for people; the digest covers all.
KEPT_LINES = 1000


class Trace:
    """What happened, in order, with virtual times."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sink: Callable[[str], None] | None = None) -> None:
        """`sink` is given every line as it is written."""
        self._loop = loop
        self._sink = sink
        self._hash = hashlib.sha256()
        self._last_lines: deque[str] = deque(maxlen=KEPT_LINES)
        self.num_lines = 0

    def add(self, text: str) -> None:
        line = f"{self._loop.time():15.9f} {text}"
        self._hash.update(line.encode())
        self._hash.update(b"\n")
        self._last_lines.append(line)
        self.num_lines += 1
        if self._sink is not None:
            self._sink(line)

    def digest(self) -> str:
        """SHA-256 of all lines so far: equal for equal runs."""
        return self._hash.hexdigest()

    def tail(self) -> str:
        """The last lines, for people."""
        return "\n".join(self._last_lines)


class Program:
    """What a simulated program is given: its seed's randomness and its trace."""

    def __init__(self, seed: int, loop: asyncio.AbstractEventLoop, sink: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.trace = Trace(loop, sink)

    def rng(self, name: str) -> random.Random:
        """A random stream of its own for `name`: equal for equal (seed, name), and independent of what other
        streams were used for, so that one more draw somewhere does not change everything else."""
        return random.Random(f"{self.seed}/{name}")


def run(
    main: Callable[[Program], Coroutine[Any, Any, T]],
    *,
    seed: int,
    limit_s: float = DEFAULT_LIMIT_S,
    limit_turns: int = DEFAULT_LIMIT_TURNS,
    sink: Callable[[str], None] | None = None,
) -> T:
    """Runs `main` to its end on a new `VirtualLoop`, cancels what it left running, and returns its result. `sink` is
    given every line of the program's trace.

    Raises what `main` raises, with the seed in a note; StuckProgram and LimitReached; SimulationError when
    `main` ended well but a task or callback failed with nobody to hear of it.
    """
    loop = VirtualLoop(limit_s=limit_s, limit_turns=limit_turns)
    unheard: list[str] = []
    loop.set_exception_handler(lambda _, context: unheard.append(_describe(context)))
    with _collecting_by_turns():
        try:
            with asyncio.Runner(loop_factory=lambda: loop) as runner:
                result = runner.run(main(Program(seed, loop, sink)))
        except Exception as error:
            error.add_note("\n".join([f"seed {seed}, at {loop.time():.6f} virtual seconds", *unheard]))
            raise
    if unheard:
        raise SimulationError(f"seed {seed}: nobody heard of these failures:\n" + "\n".join(unheard))
    return result


def _describe(context: dict[str, Any]) -> str:
    error = context.get("exception")
    lines = traceback.format_exception(error) if isinstance(error, BaseException) else []
    return f"  {context.get('message')}: {error!r}\n{''.join(lines)}".rstrip()


@contextmanager
def _collecting_by_turns() -> Generator[None, None, None]:
    """Leaves the collection of cyclic garbage to the loop, which does it every so many turns: when it runs by
    itself depends on what ran before in this process, and it may finalise generators and tasks in the midst
    of the program."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
        # A failed task in a cycle is heard of only now.
        gc.collect(0)
    finally:
        if was_enabled:
            gc.enable()
