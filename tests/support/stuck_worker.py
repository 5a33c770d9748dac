"""A real worker whose engine can be made to hang: `python -m tests.support.stuck_worker`, for a node agent.

While the file named by STUCK_FILE holds this process's id, its next engine step does not end. The engine's thread
then waits as it would in a kernel that hangs: it holds no lock of the interpreter, and heeds nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

from cluster import worker_main

if TYPE_CHECKING:
    from collections.abc import Callable

    from cluster.launch import WorkerLaunch
    from coldstart.handing import HandedWeights
    from contracts.clock import Clock
    from engine.executor import LiveEngine
    from engine.plan import StepPlan, StepResult
    from engine.runner import Runner

STUCK_FILE = "STUCK_FILE"

_load = worker_main._load  # pyright: ignore[reportPrivateUsage]


async def _load_to_be_stuck(
    launch: WorkerLaunch, make_pool: Callable[[int, int], memoryview], clock: Clock, handed: HandedWeights | None
) -> LiveEngine:
    engine = await _load(launch, make_pool, clock, handed)
    # Known only now: torch must not be imported before the worker has taken its cores.
    from engine.runner import Runner

    run = Runner.run

    def run_or_hang(self: Runner, plan: StepPlan) -> StepResult:
        if _is_wanted():
            threading.Event().wait()
        return run(self, plan)

    Runner.run = run_or_hang  # type: ignore[method-assign]
    return engine


def _is_wanted() -> bool:
    try:
        return Path(os.environ[STUCK_FILE]).read_text() == str(os.getpid())
    except FileNotFoundError:
        return False


if __name__ == "__main__":
    worker_main._load = _load_to_be_stuck  # pyright: ignore[reportPrivateUsage]
    sys.exit(worker_main.main())
