"""A real coordinator process with light workers: what it answers over rpc, and how soon it knows all after a kill."""

from __future__ import annotations

import asyncio
import os
import secrets
import sys
import time
from collections import Counter
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import psutil

from benchmarks.dispatch_traffic import Traffic
from benchmarks.dispatch_workers import READY
from contracts.errors import TandemError
from contracts.ids import GatewayId
from contracts.messages import DISPATCH, MEMBERS, DispatchRequest, Empty, Placement
from rpc import GrpcNetwork

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from contracts.messages import CoordinatorFigures, DispatchItem, MembersReply

BATCH = 64
#: Asks of one gateway that are under way at once.
UNDER_WAY = 2
TIMEOUT_S = 10.0
START_TIMEOUT_S = 120.0
RECOVERY_LIMIT_S = 60.0
#: Between two looks at what a new coordinator knows.
LOOK_S = 0.02

_LISTENS = "coordinator at "


class CoordinatorProcess:
    """`tandem coordinator`, which can be killed and started again on the same address."""

    def __init__(self, token: str) -> None:
        self._environ = {**os.environ, "TANDEM_CLUSTER_TOKEN": token, "PYTHONUNBUFFERED": "1"}
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None
        self.address = ""

    async def start(self) -> Self:
        """Returns once it listens."""
        process = self._process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "cluster", "coordinator", "--bind", self.address or "127.0.0.1:0",
            env=self._environ, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        assert process.stdout is not None, "a pipe was asked for"
        seen: list[str] = []
        async with asyncio.timeout(START_TIMEOUT_S):
            while raw := await process.stdout.readline():
                line = raw.decode()
                seen.append(line)
                if line.startswith(_LISTENS):
                    self.address = line.removeprefix(_LISTENS).strip()
                    self._reader = asyncio.create_task(_drain(process.stdout))
                    return self
        raise RuntimeError(f"the coordinator ended before it listened:\n{''.join(seen)}")

    def cpu_s(self) -> float:
        """Used since its start."""
        assert self._process is not None, "not started"
        times = psutil.Process(self._process.pid).cpu_times()
        return times.user + times.system

    async def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            if self._process.returncode is None:
                self._process.kill()
            await self._process.wait()
        if self._reader is not None:
            await self._reader


async def _drain(stream: asyncio.StreamReader) -> None:
    while await stream.readline():
        pass


@asynccontextmanager
async def coordinator_process(token: str) -> AsyncGenerator[CoordinatorProcess]:
    made = CoordinatorProcess(token)
    try:
        yield await made.start()
    finally:
        await made.kill()


@asynccontextmanager
async def light_workers(coordinator: str, token: str, num_workers: int, num_blocks: int) -> AsyncGenerator[int]:
    """In a process of their own; yields how many distinct blocks they hold."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.dispatch_workers", "--coordinator", coordinator,
        "--workers", str(num_workers), "--blocks", str(num_blocks),
        env={**os.environ, "TANDEM_CLUSTER_TOKEN": token}, stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert process.stdout is not None, "a pipe was asked for"
        async with asyncio.timeout(START_TIMEOUT_S):
            line = (await process.stdout.readline()).decode()
        if not line.startswith(READY):
            raise RuntimeError("the workers ended before they were registered")
        yield int(line.removeprefix(READY))
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def until_known(network: GrpcNetwork, address: str, num_workers: int, num_blocks: int) -> CoordinatorFigures:
    """Returns once the coordinator knows all workers and all their blocks. Raises RuntimeError that says what it knew
    when the time was over."""
    until_s = time.perf_counter() + RECOVERY_LIMIT_S
    while True:
        reply = await members(network, address)
        known = (0, 0)
        if reply is not None and reply.coordinator is not None:
            known = (len(reply.members), reply.coordinator.directory_blocks)
            if known == (num_workers, num_blocks):
                return reply.coordinator
        if time.perf_counter() > until_s:
            raise RuntimeError(
                f"{known} workers and blocks are known after {RECOVERY_LIMIT_S:g} s of {num_workers, num_blocks}"
            )
        await asyncio.sleep(LOOK_S)


async def members(network: GrpcNetwork, address: str) -> MembersReply | None:
    """None where nobody answers."""
    try:
        return await network.channel(address).call(MEMBERS, Empty(), timeout_s=TIMEOUT_S)
    except TandemError:
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    num_workers: int
    num_blocks: int
    requests_per_s: float
    #: Of one call with a full batch.
    call_s: list[float]
    outcomes: Counter[str]
    #: Of requests that found a worker with part of their prompt.
    hit_share: float
    #: Of the coordinator's process, for each request, with everything else that it did meanwhile.
    cpu_s: float
    #: What the coordinator says of its own decisions, words included; mean, by the wall clock.
    decision_s: float
    #: From a killed coordinator's successor listening to it knowing all workers, and all their blocks as well.
    recovery_s: float


async def serve(num_workers: int, num_blocks: int, for_s: float, seed: int = 1) -> Served:
    """Asks in full batches while the workers beat; then kills the coordinator and starts another."""
    token = secrets.token_hex(16)
    network = GrpcNetwork(token=token)
    items = Traffic(num_blocks, seed).items(64 * BATCH)
    try:
        async with (
            coordinator_process(token) as coordinator,
            light_workers(coordinator.address, token, num_workers, num_blocks) as num_held,
        ):
            await until_known(network, coordinator.address, num_workers, num_held)
            await _ask(network, coordinator.address, items, 1.0)
            cpu_s = -coordinator.cpu_s()
            asked = await _ask(network, coordinator.address, items, for_s)
            cpu_s += coordinator.cpu_s()
            reply = await members(network, coordinator.address)
            await coordinator.kill()
            await coordinator.start()
            started_s = time.perf_counter()
            await until_known(network, coordinator.address, num_workers, num_held)
            recovery_s = time.perf_counter() - started_s
    finally:
        await network.close()
    figures = None if reply is None else reply.coordinator
    if figures is None:
        raise RuntimeError("the coordinator did not tell its figures")
    return Served(
        num_workers=num_workers,
        num_blocks=num_held,
        requests_per_s=asked.count / asked.took_s,
        call_s=asked.call_s,
        outcomes=asked.outcomes,
        hit_share=asked.num_hits / asked.count,
        cpu_s=cpu_s / asked.count,
        decision_s=figures.decisions_s / max(1, figures.decisions_within[-1]),
        recovery_s=recovery_s,
    )


@dataclass(slots=True)
class _Asked:
    count: int
    num_hits: int
    took_s: float
    call_s: list[float]
    outcomes: Counter[str]


async def _ask(network: GrpcNetwork, address: str, items: list[DispatchItem], for_s: float) -> _Asked:
    """Full batches, several under way, until the time is over."""
    asked = _Asked(0, 0, 0.0, [], Counter())
    batches = [tuple(items[start : start + BATCH]) for start in range(0, len(items), BATCH)]
    asks = [DispatchRequest(gateway_id=GatewayId("benchmark"), items=batch) for batch in batches]
    channel = network.channel(address)
    started_s = time.perf_counter()

    async def keep_asking(first: int) -> None:
        number = first
        while time.perf_counter() - started_s < for_s:
            begun_s = time.perf_counter()
            reply = await channel.call(DISPATCH, asks[number % len(asks)], timeout_s=TIMEOUT_S)
            asked.call_s.append(time.perf_counter() - begun_s)
            asked.count += len(reply.verdicts)
            for verdict in reply.verdicts:
                if isinstance(verdict, Placement):
                    asked.outcomes["placement"] += 1
                    asked.num_hits += verdict.prefix is not None
                else:
                    asked.outcomes[verdict.reason] += 1
            number += UNDER_WAY

    await asyncio.gather(*(keep_asking(first) for first in range(UNDER_WAY)))
    asked.took_s = time.perf_counter() - started_s
    return asked
