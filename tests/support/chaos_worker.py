"""A worker that can be meddled with from outside: `python -m tests.support.chaos_worker`.

All of it is the real worker. Before each step its engine's thread looks for a file named after the process, in the
folder that `CHAOS_FOLDER` names: see `Brake`. A restarted worker is another process, and runs free.

With `CHAOS_SPOIL` set, what gloo moves between workers passes proxies (one in each worker) that flip bits: see
`Spoiler`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from tests.support.proxy import Damage, Proxy

if TYPE_CHECKING:
    from collections.abc import Generator

    from engine.plan import StepPlan, StepResult
    from engine.runner import Runner

FOLDER = "CHAOS_FOLDER"
SPOIL = "CHAOS_SPOIL"
STUCK = "stuck"
_LOOK_INTERVAL_S = 0.02
_DIVERT_TIMEOUT_S = 5.0


class Brake:
    """The test's hand on the engines of worker processes; `folder` is what `CHAOS_FOLDER` names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def slow(self, pid: int, seconds: float) -> None:
        """Every step takes so much longer."""
        self._write(pid, str(seconds))

    def stick(self, pid: int) -> None:
        """The next step does not end; everything but the engine's thread goes on."""
        self._write(pid, STUCK)

    def release(self) -> None:
        """All run free again, from the middle of a stuck step too."""
        for path in self._folder.iterdir():
            path.unlink()

    def _write(self, pid: int, text: str) -> None:
        new = self._folder / f"{pid}.new"
        new.write_text(text)
        new.replace(self._folder / str(pid))


class Spoiler:
    """The test's hand on the KV between workers that run with `CHAOS_SPOIL`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, flips_per_mib: float) -> None:
        """From within a tenth of a second on, in all workers."""
        new = self._folder / "spoil.new"
        new.write_text(str(flips_per_mib))
        new.replace(self._folder / "spoil")

    def num_flips(self) -> int:
        """So far, in all lives of all workers, as of a tenth of a second ago."""
        return sum(int(path.read_text() or "0") for path in self._folder.glob("flips-*"))


@contextmanager
def _spoiling(folder: Path) -> Generator[None]:
    """Gloo listens on 127.0.0.2, and tells its peers to call a proxy on 127.0.0.1: it calls lesser addresses only."""
    from kvtransfer import collective
    from kvtransfer.collective_address import read_address, rewrite_address

    proxies: list[Proxy] = []

    def count() -> None:
        (folder / f"flips-{os.getpid()}").write_text(str(sum(each.done.total() for each in proxies)))

    async def follow() -> None:
        while True:
            with contextlib.suppress(FileNotFoundError, ValueError):
                damage = Damage(flips_per_mib=float((folder / "spoil").read_text()), spares_below=4096)
                for each in proxies:
                    each.damage = damage
            count()
            await asyncio.sleep(0.1)

    async def divert(host: str, port: int) -> int:
        between = Proxy(host, port, random.Random(f"{os.getpid()} {len(proxies)}"))
        await between.start()
        proxies.append(between)
        return between.port

    class Diverted(collective.CollectiveTransport):
        def __init__(self, **options: Any) -> None:
            # Not before: of a process with threads no worker can be forked.
            loop = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="proxies", daemon=True).start()
            asyncio.run_coroutine_threadsafe(follow(), loop)

            def advertise(blob: bytes) -> bytes:
                bound = read_address(blob)
                host = ".".join(str(part) for part in bound.host)
                port = asyncio.run_coroutine_threadsafe(divert(host, bound.port), loop).result(_DIVERT_TIMEOUT_S)
                return rewrite_address(blob, "127.0.0.1", port)

            options |= {"interface": "127.0.0.2", "advertise": advertise}
            super().__init__(**options)

    with mock.patch.object(collective, "CollectiveTransport", Diverted):
        yield


def _obey(path: Path) -> None:
    """Returns when the step may run."""
    while True:
        try:
            order = path.read_text()
        except FileNotFoundError:
            return
        if order != STUCK:
            time.sleep(float(order))
            return
        time.sleep(_LOOK_INTERVAL_S)


def main() -> int:
    from cluster.worker_main import main as worker
    from engine.runner import Runner as RealRunner

    folder = Path(os.environ[FOLDER])
    run = RealRunner.run

    def meddled(runner: Runner, plan: StepPlan) -> StepResult:
        # Of this process, which may have been forked of the one that came by here first.
        _obey(folder / str(os.getpid()))
        return run(runner, plan)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(RealRunner, "run", meddled))
        if os.environ.get(SPOIL):
            stack.enter_context(_spoiling(folder))
        return worker()


if __name__ == "__main__":
    sys.exit(main())
