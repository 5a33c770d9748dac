"""Starts a real cluster for a benchmark: `tandem serve` as a child process, gone when the block ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0


@contextlib.asynccontextmanager
async def running(config: Mapping[str, Any]) -> AsyncGenerator[str]:
    """Serves `config` (a cluster file as a mapping) and yields the gateway's base URL.

    Raises RuntimeError with the end of the cluster's output when it does not come up.
    """
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


async def _ready(process: asyncio.subprocess.Process, state: Path, output: Path) -> str:
    async with asyncio.timeout(START_TIMEOUT_S):
        while (base_url := _base_url(state)) is None:
            if process.returncode is not None:
                tail = output.read_text()[-4000:]  # noqa: ASYNC240 - the end of the run, nothing else waits
                raise RuntimeError(f"the cluster ended with {process.returncode}:\n{tail}")
            await asyncio.sleep(0.1)
    return base_url


def _base_url(state: Path) -> str | None:
    """What the cluster wrote once it was ready; None before."""
    if not state.exists():
        return None
    document: dict[str, Any] = json.loads(state.read_text())
    return str(document["base_url"]) if document["ready"] else None


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
