"""The coordinator's shell, on virtual time: what a worker hears of the others, and what a bug in its upkeep does."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import StaleIncarnation
from contracts.ids import Incarnation, WorkerId
from contracts.messages import (
    HEARTBEAT,
    REGISTER,
    HeartbeatReply,
    HeartbeatRequest,
    WorkerInfo,
    WorkerLife,
    WorkerLoad,
)
from coordinator import CoordinatorShell
from rpc import MemoryNetwork
from simulator import Program, VirtualClock, run
from simulator.engine import modelled_identity

if TYPE_CHECKING:
    from collections.abc import Callable

INFO = WorkerInfo(
    worker_id=WorkerId("w0"),
    incarnation=Incarnation(1),
    role="mixed",
    address="w0:1",
    model="m",
    identity=modelled_identity(),
    total_blocks=8,
    max_context_tokens=64,
)


class Office:
    """A coordinator that listens, and calls to it."""

    def __init__(self) -> None:
        self.network = MemoryNetwork(rng=random.Random(1), host="c")
        self.said: list[str] = []
        self.shell = CoordinatorShell(VirtualClock(), log=self.said.append)
        server = self.network.server("c:1")
        self.shell.register_on(server)
        self.start = server.start

    async def register(self, name: str) -> None:
        info = msgspec.structs.replace(INFO, worker_id=WorkerId(name))
        await self.network.channel("c:1").call(REGISTER, info, timeout_s=1)

    async def beat(self, name: str) -> HeartbeatReply:
        beat = HeartbeatRequest(worker_id=WorkerId(name), incarnation=Incarnation(1), load=WorkerLoad())
        return await self.network.channel("c:1").call(HEARTBEAT, beat, timeout_s=1)


def test_a_heartbeat_is_answered_with_who_is_gone() -> None:
    async def main(program: Program) -> None:
        office = Office()
        await office.start()
        async with office.shell:
            await office.register("w0")
            await office.register("w1")
            assert await office.beat("w0") == HeartbeatReply(known=True)
            for _ in range(7):
                await asyncio.sleep(0.5)
                await office.beat("w0")
            assert await office.beat("w0") == HeartbeatReply(
                known=True, gone=(WorkerLife(WorkerId("w1"), Incarnation(1)),)
            )
            assert [line for line in office.said if "lost" in line] == [
                "worker lost: w1 incarnation 1: no heartbeat for 3.0 s"
            ]
            with pytest.raises(StaleIncarnation, match="was given up"):
                await office.beat("w1")

    run(main, seed=1)


def test_a_bug_in_its_upkeep_ends_the_body(monkeypatch: pytest.MonkeyPatch) -> None:
    """A coordinator that notices no deaths any more is worse than none."""

    async def serve(office: Office, broken: Callable[[float], list[str]]) -> None:
        async with office.shell:
            await asyncio.sleep(5)
            monkeypatch.setattr(office.shell.membership, "expire", broken)
            await asyncio.sleep(60)
            raise AssertionError("its body goes on")

    def broken(now_s: float) -> list[str]:
        raise ZeroDivisionError("a bug")

    async def main(program: Program) -> None:
        with pytest.raises(ExceptionGroup) as caught:
            await serve(Office(), broken)
        assert caught.group_contains(ZeroDivisionError)

    run(main, seed=1)
