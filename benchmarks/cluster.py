"""Starts a real cluster for a benchmark: `tandem serve` as a child process, gone when the block ends."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from cluster.state_file import read_state

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from cluster.state_file import ClusterState

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


@contextlib.asynccontextmanager
async def running(config: Mapping[str, Any]) -> AsyncGenerator[str]:
    """Serves `config` (a cluster file as a mapping) and yields the gateway's base URL.

    Raises RuntimeError with the end of the cluster's output when it does not come up.
    """
    async with running_state(config) as state:
        yield state.base_url


@contextlib.asynccontextmanager
async def running_state(config: Mapping[str, Any]) -> AsyncGenerator[ClusterState]:
    """As `running`, but yields what the cluster tells about itself, its token included."""
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as scratch:
        folder = Path(scratch)
        (folder / "cluster.yaml").write_text(yaml.safe_dump(dict(config)))
        state = folder / "state.json"
        output = folder / "output.txt"
        with output.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "cluster", "serve",
                "--config", str(folder / "cluster.yaml"), "--state-file", str(state),
                stdout=sink, stderr=asyncio.subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        try:
            yield await _ready(process, state, output)
        finally:
            await _stop(process)


async def _ready(process: asyncio.subprocess.Process, state: Path, output: Path) -> ClusterState:
    async with asyncio.timeout(START_TIMEOUT_S):
        while (found := _ready_state(state)) is None:
            if process.returncode is not None:
                tail = output.read_text()[-4000:]  # noqa: ASYNC240 - the end of the run, nothing else waits
                raise RuntimeError(f"the cluster ended with {process.returncode}:\n{tail}")
            await asyncio.sleep(0.1)
    return found


def _ready_state(state: Path) -> ClusterState | None:
    """What the cluster wrote once it was ready; None before."""
    if not state.exists():
        return None
    found = read_state(state)
    return found if found.ready else None


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
