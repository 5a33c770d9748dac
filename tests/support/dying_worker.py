"""A worker that dies in a chosen state of a move: `python -m tests.support.dying_worker`, and `tandem` whose workers
are such: `python -m tests.support.dying_worker tandem serve …`.

All of it is the real worker. When a move comes into the state that the file named by `DYING_FILE` holds ("source
paused", "destination claiming"), the worker takes the file away and kills itself, before it has carried out anything
that follows from that state, or so many milliseconds later as the file says behind it ("source paused 2").
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cluster.node_agent import WorkerPlan

DYING_FILE = "DYING_FILE"
PROGRAM = (sys.executable, "-m", "tests.support.dying_worker", "tandem")


class Fate:
    """The test's hand on the file; `path` is what `DYING_FILE` names."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def wish(self, side: str, state: str, after_ms: float) -> None:
        """Whoever first comes into this state dies."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{side} {state} {after_ms:g}")
        new.replace(self._path)

    @property
    def is_fulfilled(self) -> bool:
        return not self._path.exists()

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _look(side: str, state: str) -> None:
    """A move is in this state from now on."""
    path = Path(os.environ[DYING_FILE])
    try:
        wished, _, after_ms = path.read_text().rpartition(" ")
        if wished != f"{side} {state}":
            return
        # Taken by whoever is the first.
        path.unlink()
    except FileNotFoundError:
        return
    if float(after_ms) > 0:
        asyncio.get_running_loop().call_later(float(after_ms) / 1e3, _die)
    else:
        _die()


def _watch(side: str, kind: Any) -> None:
    begin: Callable[..., None] = kind.__init__
    handle: Callable[..., Any] = kind.handle

    def begin_or_die(machine: Any, *arguments: Any, **options: Any) -> None:
        begin(machine, *arguments, **options)
        _look(side, machine.state.value)

    def handle_or_die(machine: Any, event: Any, now_s: float) -> Any:
        before = machine.state
        instructions = handle(machine, event, now_s)
        if machine.state is not before:
            _look(side, machine.state.value)
        return instructions

    kind.__init__, kind.handle = begin_or_die, handle_or_die


def _work() -> int:
    from cluster.worker_main import main
    from decode.moves.destination import DestinationMove
    from decode.moves.source import SourceMove

    _watch("source", SourceMove)
    _watch("destination", DestinationMove)
    return main()


def _serve() -> None:
    import cluster.local
    from cluster.cli import main
    from cluster.node_agent import NodeAgent

    command = (sys.executable, "-m", "tests.support.dying_worker")

    class Agent(NodeAgent):
        def __init__(self, plans: Sequence[WorkerPlan], **limits: Any) -> None:
            super().__init__([replace(plan, command=command) for plan in plans], **limits)

    with mock.patch.object(cluster.local, "NodeAgent", Agent):
        del sys.argv[1]
        main()


if __name__ == "__main__":
    if sys.argv[1:2] == ["tandem"]:
        _serve()
    else:
        sys.exit(_work())
