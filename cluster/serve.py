"""`tandem serve`: a local cluster until somebody stops it.

The first Ctrl-C or SIGTERM stops everything in order; a second one kills the workers and leaves at once.
Exit status: 0 stopped on request, 1 the workers cannot serve (any more), 2 a configuration that cannot work,
130 impatience.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING

import uvloop

from cluster.local import LocalCell, local_cluster
from cluster.progress import curl_line
from contracts.cells import cells_of
from rpc import LiveClock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from cluster.following import LocalCluster
    from contracts.config import ClusterConfig

EXIT_OK = 0
EXIT_LOST = 1
EXIT_CONFIG = 2
EXIT_IMPATIENT = 130


def say(line: str) -> None:
    """One line for people. A terminal that is gone, or a full disk behind it, must not end a cluster."""
    with contextlib.suppress(OSError):
        print(line, flush=True)


class StopSignals:
    """`wanted` is set by the first SIGINT or SIGTERM; the second one calls `kill` and ends this process."""

    def __init__(self) -> None:
        self.wanted = asyncio.Event()
        self._kill: Callable[[], None] = lambda: None

    def install(self, kill: Callable[[], None]) -> None:
        self._kill = kill

    def __enter__(self) -> StopSignals:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if not self.wanted.is_set():
            self.wanted.set()
            say("stopping (once more to kill)")
            return
        self._kill()
        os._exit(EXIT_IMPATIENT)


def run_cluster(
    config: ClusterConfig,
    *,
    state_file: Path | None,
    body: Callable[[LocalCluster, asyncio.Event], Awaitable[int]],
) -> int:
    """Starts a cluster, awaits `body(cluster, stop_wanted)` once it is ready, stops it; the exit status.

    Raises ConfigError before anything was started.
    """
    cells = [LocalCell.resolved(cell, say) for cell in cells_of(config)]

    async def live() -> int:
        with StopSignals() as signals:
            async with local_cluster(config, cells, state_file=state_file, say=say) as cluster:
                signals.install(cluster.kill)
                status = await _until_ready(cluster, signals.wanted)
                return await body(cluster, signals.wanted) if status is None else status

    return uvloop.run(live())


async def _until_ready(cluster: LocalCluster, stop_wanted: asyncio.Event) -> int | None:
    """None: ready. Else the exit status. Bounded by the workers' own start deadlines."""
    clock = LiveClock()
    started_s = clock.now_s()
    await first_of(cluster.ready, cluster.hopeless, stop_wanted)
    if stop_wanted.is_set():
        return EXIT_OK
    if cluster.hopeless.is_set():
        print(f"tandem: {cluster.problem}", file=sys.stderr, flush=True)
        return EXIT_LOST
    say(f"ready in {clock.now_s() - started_s:.1f} s: {', '.join(cluster.model_names)} at {cluster.base_url}")
    return None


async def serve_until_stopped(cluster: LocalCluster, stop_wanted: asyncio.Event, *, with_key: bool) -> int:
    say("")
    say("  " + curl_line(cluster.base_url, cluster.model_name, with_key=with_key))
    say("")
    say("Ctrl-C stops everything.")
    await first_of(stop_wanted, cluster.hopeless)
    if stop_wanted.is_set():
        return EXIT_OK
    print(f"tandem: {cluster.problem}", file=sys.stderr, flush=True)
    return EXIT_LOST


async def first_of(*events: asyncio.Event) -> None:
    """Returns when one of the events is set."""
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
