"""A cluster whose processes are started one by one, each of which a test may end: no node agent brings it back.

with scattered(config, tmp_path) as processes:
    processes.start_coordinator()
    processes.start_worker("prefill")
    gateway = processes.start_gateway()
    processes.wait_serving(gateway)
"""

from __future__ import annotations

import os
import secrets
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import httpx
import yaml

from cluster.launch import Ready, decode_status
from contracts.messages import AUDIT, MEMBERS, Empty
from rpc import GrpcNetwork
from tests.support.cluster import TANDEM
from tests.support.layout import ROOT

if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Generator, Mapping, Sequence
    from pathlib import Path

    from contracts.messages import AuditReply, Member

#: Loading, on a machine under load; a healthy start takes seconds.
START_TIMEOUT_S = 60.0
_LOOK_INTERVAL_S = 0.05


@dataclass(slots=True)
class Part:
    """One process, and where it writes."""

    name: str
    process: subprocess.Popen[bytes]
    output: Path
    #: Where it listens: an rpc address, or the gateway's base URL.
    address: str = ""

    def wait_for(self, find: Callable[[str], str | None]) -> str:
        """The first thing that `find` finds in a line of its output. Raises AssertionError with all of it."""
        until_s = time.monotonic() + START_TIMEOUT_S
        while True:
            ended = self.process.poll()
            text = self.output.read_text(errors="replace")
            # The last line may be half written.
            for line in text.splitlines(keepends=True):
                if line.endswith("\n") and (found := find(line)) is not None:
                    return found
            assert ended is None, f"{self.name} ended with status {ended}:\n{text}"
            assert time.monotonic() < until_s, f"{self.name}: not ready within {START_TIMEOUT_S:g} s:\n{text}"
            time.sleep(_LOOK_INTERVAL_S)

    def kill(self) -> None:
        """Returns when it is gone."""
        self.process.kill()
        self.process.wait(START_TIMEOUT_S)

    def send_signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)


class Processes:
    def __init__(self, config: Mapping[str, Any], folder: Path, program: Sequence[str] = TANDEM) -> None:
        self._folder = folder
        self._program = program
        self._config = folder / "cluster.yaml"
        self._config.write_text(yaml.safe_dump(dict(config)))
        self._token = secrets.token_urlsafe(16)
        self._parts: list[Part] = []
        #: Where gateways and workers look for the coordinator; a test may put something in between.
        self.coordinator_address = ""
        #: What the commands of processes that are started next are put behind.
        self.launcher: tuple[str, ...] = ()

    @property
    def token(self) -> str:
        """For calls to them."""
        return self._token

    def start_coordinator(self, bind: str = "127.0.0.1:0", *, settings: Mapping[str, str] | None = None) -> Part:
        """`settings`: keys of the configuration that this life has differently."""
        part = self._start("coordinator", "coordinator", "--bind", bind, *_set(settings))
        part.address = self.coordinator_address = part.wait_for(_after("coordinator at "))
        return part

    def start_gateway(self, *, settings: Mapping[str, str] | None = None) -> Part:
        """`settings`: as with the coordinator."""
        where = ("--coordinator", self.coordinator_address, "--port", "0")
        part = self._start("gateway", "gateway", *where, *_set(settings))
        part.address = part.wait_for(_after("gateway at "))
        return part

    def start_worker(self, pool: str, index: int = 0, bind: str = "127.0.0.1:0", *, wait: bool = True) -> Part:
        """One life of worker `index` of `pool`. `wait`: until it is ready."""
        part = self._start(
            f"{pool}-{index}",
            *("worker", "--coordinator", self.coordinator_address, "--pool", pool, "--index", str(index)),
            *("--runtime-dir", str(self._folder / "run"), "--bind", bind),
        )
        if wait:
            self.wait_ready(part)
        return part

    def start_agent(self, name: str, settings: Mapping[str, str]) -> Part:
        """A node agent, with the workers of all pools. `settings`: as with the coordinator. Nothing is waited for."""
        return self._start(
            name,
            *("agent", "--coordinator", self.coordinator_address, "--bind", "127.0.0.1:0"),
            *("--runtime-dir", str(self._folder / name), *_set(settings)),
        )

    def wait_ready(self, worker: Part) -> None:
        worker.address = worker.wait_for(_ready_address)

    def wait_serving(self, gateway: Part) -> None:
        """Until the gateway calls the cluster healthy."""
        until_s = time.monotonic() + START_TIMEOUT_S
        while httpx.get(f"{gateway.address}/health", timeout=START_TIMEOUT_S).status_code != 200:
            assert time.monotonic() < until_s, "the gateway never called the cluster healthy"
            time.sleep(_LOOK_INTERVAL_S)

    async def audit(self, workers: Sequence[Part], timeout_s: float = 10.0) -> dict[str, AuditReply]:
        network = GrpcNetwork(token=self._token)
        try:
            return {
                worker.name: await network.channel(worker.address).call(AUDIT, Empty(), timeout_s=timeout_s)
                for worker in workers
            }
        finally:
            await network.close()

    async def members(self) -> tuple[Member, ...]:
        """As the coordinator sees them."""
        network = GrpcNetwork(token=self._token)
        try:
            channel = network.channel(self.coordinator_address)
            return (await channel.call(MEMBERS, Empty(), timeout_s=10.0)).members
        finally:
            await network.close()

    def output(self) -> str:
        """What all of them wrote, for messages and for finding tracebacks."""
        return "\n".join(f"== {part.name}\n{part.output.read_text(errors='replace')}" for part in self._parts)

    def close(self) -> None:
        """Kills what is left, the stopped too."""
        for part in self._parts:
            part.process.kill()
        for part in self._parts:
            part.process.wait(START_TIMEOUT_S)

    def _start(self, name: str, *arguments: str) -> Part:
        output = self._folder / f"{len(self._parts)}-{name}.txt"
        with output.open("wb") as sink:
            process = subprocess.Popen(
                [*self.launcher, *self._program, *arguments, "--config", str(self._config)],
                cwd=ROOT,
                env={**os.environ, "TANDEM_CLUSTER_TOKEN": self._token, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT,
            )
        part = Part(name, process, output)
        self._parts.append(part)
        return part


def _set(settings: Mapping[str, str] | None) -> list[str]:
    return [word for key, value in (settings or {}).items() for word in ("--set", f"{key}={value}")]


def _after(start: str) -> Callable[[str], str | None]:
    return lambda line: line.removeprefix(start).strip() if line.startswith(start) else None


def _ready_address(line: str) -> str | None:
    status = decode_status(line.encode())
    return status.address if isinstance(status, Ready) else None


@contextmanager
def scattered(config: Mapping[str, Any], folder: Path, program: Sequence[str] = TANDEM) -> Generator[Processes]:
    """Nothing started yet. `config` is a cluster file; what they write stays in `folder`. All are gone after it.
    `program` stands for `tandem`."""
    processes = Processes(config, folder, program)
    try:
        yield processes
    finally:
        processes.close()
