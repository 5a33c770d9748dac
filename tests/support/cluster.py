"""A real cluster for tests: `tandem serve` as a subprocess on a free port, killed as a whole at the end.

    async with running_cluster(model=folder, overrides={"pools.decode.workers": "2"}) as cluster:
        async with httpx.AsyncClient(base_url=cluster.base_url) as client: ...

Also usable from fixtures of any scope: nothing in it belongs to an event loop.
"""

from __future__ import annotations

import asyncio
import collections
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Self

import psutil

from cluster.state_file import ClusterState, read_state
from contracts.messages import AUDIT, Empty
from rpc import GrpcNetwork
from tests.support.layout import ROOT
from tests.support.processes import wait_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Container, Generator, Mapping, Sequence

    from cluster.state_file import WorkerState
    from contracts.messages import AuditReply

#: Loading on a machine under load, with kernels to build; a healthy start takes seconds.
START_TIMEOUT_S = 100.0

STOP_TIMEOUT_S = 30.0

TANDEM = (sys.executable, "-c", "from cluster.cli import main; main()")

#: Of each worker, where a test does not say. Its pages are made when it starts: half a gigabyte takes longer than the
#: rest of it.
KV_MEMORY = "64MiB"

#: Output kept for the message of a failing test.
MAX_OUTPUT_LINES = 400


class ClusterProcess:
    """A `tandem serve` process and what it started. Make it with `started`, leave it with `close`."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._lines: collections.deque[str] = collections.deque(maxlen=MAX_OUTPUT_LINES)
        #: Set when it said that it is ready, or when it ended.
        self._settled = threading.Event()
        self._ready = False
        self._reader = threading.Thread(target=self._read, name="cluster-output", daemon=True)
        self._reader.start()

    @classmethod
    def start(cls, arguments: list[str], environ: Mapping[str, str], program: Sequence[str] = TANDEM) -> Self:
        """`arguments` follow `tandem serve`; port and state file are set here. `program` stands for `tandem`."""
        folder = Path(tempfile.mkdtemp(prefix="tandem-test-"))
        process = subprocess.Popen(
            [*program, "serve", *arguments, "--port", "0", "--state-file", str(folder / "state.json")],
            cwd=ROOT,
            env={**os.environ, **environ},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        return cls(process, folder)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.append(line)
            if line.startswith("ready in "):
                self._ready = True
                self._settled.set()
        self._settled.set()

    @property
    def output(self) -> str:
        return "".join(self._lines)

    def wait_ready(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Raises AssertionError with its output when it ended or the time is over."""
        assert self._settled.wait(timeout_s), f"not ready within {timeout_s:g} s:\n{self.output}"
        assert self._ready, f"ended with status {self._process.wait(STOP_TIMEOUT_S)}:\n{self.output}"

    def wait_ended(self, timeout_s: float = START_TIMEOUT_S) -> int:
        """Its exit status."""
        status = self._process.wait(timeout_s)
        self._reader.join(STOP_TIMEOUT_S)
        return status

    # --- what it tells about itself ---------------------------------------------------------------

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def state_file(self) -> Path:
        return self._folder / "state.json"

    @property
    def state(self) -> ClusterState:
        """As of now: pids and incarnations change when workers restart."""
        return read_state(self.state_file)

    @property
    def base_url(self) -> str:
        return self.state.base_url

    def worker(self, worker_id: str) -> WorkerState:
        return next(worker for worker in self.state.workers if worker.worker_id == worker_id)

    def worker_pids(self) -> list[int]:
        return [worker.pid for worker in self.state.workers if worker.pid is not None]

    async def audit(self, timeout_s: float = 10.0, only: Container[str] | None = None) -> dict[str, AuditReply]:
        """Each ready worker's books, by worker id; `only` names those to ask. Raises what a call raises."""
        state = self.state
        network = GrpcNetwork(token=state.cluster_token)
        try:
            return {
                worker.worker_id: await network.channel(worker.address).call(AUDIT, Empty(), timeout_s=timeout_s)
                for worker in state.workers
                if worker.address is not None and (only is None or worker.worker_id in only)
            }
        finally:
            await network.close()

    def tree(self) -> list[psutil.Process]:
        """This process and everything below it, as of now; nothing once it is gone."""
        try:
            top = psutil.Process(self.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def num_descriptors(self) -> int:
        """Open file descriptors of the process that holds coordinator, gateway and node agent."""
        return psutil.Process(self.pid).num_fds()

    # --- ending it --------------------------------------------------------------------------------

    def send_signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int:
        """As Ctrl-C does; the exit status."""
        self._process.send_signal(signal.SIGINT)
        return self.wait_ended(timeout_s)

    def close(self) -> None:
        """Kills what is left of the whole tree, whatever happened."""
        tree, state = self._tree(), self._known_state()
        for process in tree:
            _unless_gone(process.kill)
        wait_gone([process.pid for process in tree], STOP_TIMEOUT_S)
        self._process.wait(STOP_TIMEOUT_S)
        self._reader.join(STOP_TIMEOUT_S)
        if self._process.stdout is not None:
            self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
        if state is not None:
            # A killed parent had no time to do it.
            shutil.rmtree(state.runtime_dir, ignore_errors=True)

    def _tree(self) -> list[psutil.Process]:
        """This process and everything below it; workers of a dead parent are found by the state file."""
        found: list[psutil.Process] = []
        state = self._known_state()
        workers = [worker.pid for worker in state.workers if worker.pid is not None] if state else []
        for pid in (self.pid, *workers):
            try:
                process = psutil.Process(pid)
                found += [process, *process.children(recursive=True)]
            except psutil.NoSuchProcess:
                continue
        return [process for process in found if _is_ours(process)]

    def _known_state(self) -> ClusterState | None:
        return self.state if (self._folder / "state.json").exists() else None


def _unless_gone(act: Callable[[], object]) -> None:
    try:
        act()
    except psutil.NoSuchProcess:
        return


def _is_ours(process: psutil.Process) -> bool:
    """A pid may have been taken over by a stranger."""
    try:
        return (
            any("cluster" in word or "tests.support.chaos" in word for word in process.cmdline())
            or process.ppid() == os.getpid()
        )
    except (psutil.NoSuchProcess, psutil.AccessDenied):
        return False


def serve_arguments(model: str | Path | None, config: str | Path | None, overrides: Mapping[str, str]) -> list[str]:
    """`overrides`: keys of the configuration tree, such as "pools.decode.workers". There is no store unless one is
    asked for: most tests count processes, blocks and bytes of the others. Workers of the shipped files have small KV
    pools unless something is said of those. `model` None: `models` says it."""
    arguments = [] if model is None else ["--model", str(model)]
    if config is not None:
        arguments += ["--config", str(config)]
    given = {"store.dram": "null"}
    if (config is None or str(config).startswith("configs/")) and not any(".kv_" in key for key in overrides):
        given["pools.*.kv_memory"] = KV_MEMORY
    for key, value in {**given, **overrides}.items():
        arguments += ["--set", f"{key}={value}"]
    return arguments


@contextmanager
def started_cluster(
    *,
    model: str | Path | None = "demo",
    config: str | Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = TANDEM,
) -> Generator[ClusterProcess]:
    """Started and perhaps not ready yet: for starts that fail."""
    process = ClusterProcess.start(serve_arguments(model, config, overrides or {}), environ or {}, program)
    try:
        yield process
    finally:
        process.close()


@asynccontextmanager
async def running_cluster(
    *,
    model: str | Path | None = "demo",
    config: str | Path | None = None,
    overrides: Mapping[str, str] | None = None,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = TANDEM,
) -> AsyncGenerator[ClusterProcess]:
    """Ready to answer. The event loop stays free while it starts."""
    with started_cluster(model=model, config=config, overrides=overrides, environ=environ, program=program) as cluster:
        await asyncio.to_thread(cluster.wait_ready)
        yield cluster
