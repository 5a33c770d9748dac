"""A whole cluster as a child process: `tandem serve` with a configuration of one's own, gone when the block ends.

For measurements that must not share a process with what they measure.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.state_file import read_state
from contracts.errors import WorkerUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cluster.state_file import ClusterState
    from contracts.config import ClusterConfig

#: Between a signal to stop and SIGKILL: the cluster's own bounds are shorter.
STOP_TIMEOUT_S = 20.0

_LOOK_INTERVAL_S = 0.1
#: Of its output, in an error.
_MAX_TOLD_CHARS = 2000

#: Dies with the process named by its first argument, even where that is killed.
_PROGRAM = """
import os, sys
from cluster.lifeline import die_with_parent
die_with_parent(int(sys.argv.pop(1)))
from cluster.cli import main
main()
"""


@contextlib.asynccontextmanager
async def child_cluster(config: ClusterConfig) -> AsyncGenerator[ClusterState]:
    """Serves `config` on the cores that this thread may use, and yields what the cluster tells of itself once it is
    ready; its own start deadlines bound that. No `TANDEM_` variable has a say.

    The configuration goes through a file, so that it must hold no secret. Raises WorkerUnavailable, with the end of
    the cluster's output, when it does not come up.
    """
    with tempfile.TemporaryDirectory(prefix="tandem-child-") as scratch:
        folder = Path(scratch)
        (folder / "cluster.yaml").write_text(config.model_dump_json(), encoding="utf-8")
        state, output = folder / "state.json", folder / "output.txt"
        with output.open("wb") as sink:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", _PROGRAM, str(os.getpid()), "serve"),
                *("--config", str(folder / "cluster.yaml"), "--state-file", str(state)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=sink,
                stderr=asyncio.subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if not name.startswith("TANDEM_")},
                start_new_session=True,
            )
        try:
            yield await _ready(process, state, output)
        finally:
            await _stop(process)


async def _ready(process: asyncio.subprocess.Process, state: Path, output: Path) -> ClusterState:
    while True:
        if process.returncode is not None:
            raise WorkerUnavailable(f"a cluster to measure ended with {process.returncode}:\n{_end_of(output)}")
        found = _state_of(state)
        if found is not None and found.ready:
            return found
        await asyncio.sleep(_LOOK_INTERVAL_S)


def _state_of(file: Path) -> ClusterState | None:
    """None: nothing was told yet."""
    return read_state(file) if file.exists() else None


def _end_of(output: Path) -> str:
    return output.read_text(encoding="utf-8", errors="replace")[-_MAX_TOLD_CHARS:]


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()
