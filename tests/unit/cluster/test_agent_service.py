"""The node agent as the coordinator knows it: what it tells, and what it does when it is asked."""

from __future__ import annotations

import asyncio
import os
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import psutil
import pytest

from cluster.agent_service import agent_service
from cluster.node_agent import NodeAgent
from cluster.plan import Site, worker_environ
from cluster.process_log import ProcessLog
from cluster.supervision import SupervisionLimits
from cluster.weights_service import WeightsService
from contracts.control_messages import (
    AGENT_BEAT,
    RESTART_WORKER,
    START_WORKER,
    STOP_WORKER,
    AgentBeat,
    AgentBeatReply,
    RestartWorkerRequest,
    StartWorkerRequest,
    StopWorkerRequest,
    WorkerSlot,
)
from contracts.errors import NotFound, StaleIncarnation
from contracts.ids import Incarnation, WorkerId
from rpc import GrpcNetwork, LiveClock
from tests.support.converted_folders import CHUNK_BYTES, converted_folder
from tests.support.fake_agent import fake_plan

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from pathlib import Path

    from contracts.weight_messages import NodeWeights
    from rpc import CallContext, Channel

PATIENCE_S = 60.0
LIFE = Incarnation(7)


class Coordinator:
    """Hears of one agent, seldom unless something changes."""

    def __init__(self) -> None:
        self.beat: AgentBeat | None = None
        self.interval_s = PATIENCE_S
        #: Number of the last measured load that it says it knows.
        self.measured = 0
        self._news = asyncio.Event()

    async def on_beat(self, beat: AgentBeat, context: CallContext) -> AgentBeatReply:
        self.beat = beat
        self._news.set()
        return AgentBeatReply(interval_s=self.interval_s, measured=self.measured)

    async def until(self, holds: Callable[[tuple[WorkerSlot, ...]], bool]) -> tuple[WorkerSlot, ...]:
        return (await self._until(lambda beat: holds(beat.slots))).slots

    async def until_weights(self, holds: Callable[[NodeWeights], bool]) -> NodeWeights:
        weights = (await self._until(lambda beat: beat.weights is not None and holds(beat.weights))).weights
        assert weights is not None
        return weights

    async def _until(self, holds: Callable[[AgentBeat], bool]) -> AgentBeat:
        async with asyncio.timeout(PATIENCE_S):
            while self.beat is None or not holds(self.beat):
                self._news.clear()
                await self._news.wait()
        return self.beat


@asynccontextmanager
async def served(folder: Path) -> AsyncGenerator[tuple[Coordinator, Channel]]:
    """An agent with one worker that runs and one that could, and the way to it."""
    pid = psutil.Process().pid
    plans = [replace(fake_plan(f"w{index}", "ready", folder, parent_pid=pid), starts=index == 0) for index in range(2)]
    network = GrpcNetwork(token="t")
    coordinator = Coordinator()
    server = network.server("127.0.0.1:0")
    server.register(AGENT_BEAT, coordinator.on_beat)
    address = await server.start()
    site = Site(
        model_dir="",
        model_name="m",
        coordinator_address=address,
        cluster_token="t",
        runtime_dir=str(folder),
        bind="127.0.0.1:0",
        parent_pid=pid,
        allowed_cores=(0,),
        node="here",
    )
    limits = SupervisionLimits(stop_timeout_s=10.0)
    agent = NodeAgent(
        plans, limits=limits, first_incarnation=Incarnation(100), log_dir=folder, clock=LiveClock(), say=lambda _: None
    )
    try:
        async with agent, agent_service(agent, site, network, "127.0.0.1:0", LIFE, lambda _: None):
            await coordinator.until(lambda slots: slots[0].state == "ready")
            assert coordinator.beat is not None
            assert (coordinator.beat.node, coordinator.beat.incarnation) == ("here", LIFE)
            yield coordinator, network.channel(coordinator.beat.address)
    finally:
        await server.stop(0.1)
        await network.close()


async def test_what_changes_is_told_at_once_and_what_is_asked_is_done(tmp_path: Path) -> None:
    async with served(tmp_path) as (coordinator, channel):
        w0, w1 = WorkerId("w0"), WorkerId("w1")
        ready, absent = await coordinator.until(lambda slots: True)
        assert (absent.state, absent.age_s, absent.start_s) == ("absent", None, None)
        assert ready.start_s is not None
        assert ready.age_s is not None
        for _ in range(2):
            ask = StartWorkerRequest(target=LIFE, worker_id=w1, role="prefill")
            await channel.call(START_WORKER, ask, timeout_s=5.0)
        _, started = await coordinator.until(lambda slots: slots[1].state == "ready")
        assert started.role == "prefill"
        life = ready.incarnation
        await channel.call(RESTART_WORKER, RestartWorkerRequest(target=LIFE, worker_id=w0, life=life), timeout_s=5.0)
        await coordinator.until(lambda slots: slots[0].state == "ready" and slots[0].incarnation == life + 1)
        await channel.call(
            STOP_WORKER, StopWorkerRequest(target=LIFE, worker_id=w1, reason="enough of it"), timeout_s=5.0
        )
        await coordinator.until(lambda slots: slots[1].state == "stopped")


async def test_another_life_of_the_agent_and_unknown_workers_are_refused(tmp_path: Path) -> None:
    async with served(tmp_path) as (_, channel):
        stale = StartWorkerRequest(target=Incarnation(6), worker_id=WorkerId("w1"))
        with pytest.raises(StaleIncarnation, match="this is life 7 of the node agent, not 6"):
            await channel.call(START_WORKER, stale, timeout_s=5.0)
        unknown = StopWorkerRequest(target=LIFE, worker_id=WorkerId("w9"), reason="")
        with pytest.raises(NotFound, match="this node agent has no worker w9"):
            await channel.call(STOP_WORKER, unknown, timeout_s=5.0)


async def test_weights_are_told_with_each_measured_load_once_and_again_to_a_coordinator_that_knows_none(
    tmp_path: Path,
) -> None:
    for name, data in converted_folder(1, num_chunks=40).items():
        (tmp_path / name).write_bytes(data)
    pid = psutil.Process().pid
    log = ProcessLog(tmp_path / "weights.log", lambda _: None)
    weights = WeightsService(1 << 20, None, worker_environ(os.environ, threads=1), pid, LiveClock(), log)
    plan = fake_plan("w0", "ready", tmp_path, parent_pid=pid)
    launch = msgspec.structs.replace(plan.launch, model_dir=str(tmp_path), weights=weights.door)
    network = GrpcNetwork(token="t")
    coordinator = Coordinator()
    coordinator.interval_s = 0.05
    server = network.server("127.0.0.1:0")
    server.register(AGENT_BEAT, coordinator.on_beat)
    site = Site(
        model_dir=str(tmp_path),
        model_name="none",
        coordinator_address=await server.start(),
        cluster_token="t",
        runtime_dir=str(tmp_path),
        bind="127.0.0.1:0",
        parent_pid=pid,
        allowed_cores=(0,),
    )
    agent = NodeAgent(
        [replace(plan, launch=launch)],
        limits=SupervisionLimits(stop_timeout_s=10.0),
        first_incarnation=Incarnation(100),
        log_dir=tmp_path,
        clock=LiveClock(),
        say=lambda _: None,
        weights=weights,
    )
    try:
        async with agent, agent_service(agent, site, network, "127.0.0.1:0", LIFE, lambda _: None):
            told = await coordinator.until_weights(lambda one: bool(one.measured))
            (load,) = told.measured
            assert (load.number, load.tier, load.num_bytes) == (1, "ssd", 40 * CHUNK_BYTES)
            assert load.seconds > 0
            told = await coordinator.until_weights(lambda one: [held.tier for held in one.held] == ["dram"])
            assert told.held[0].model == "none"
            assert told.held[0].num_bytes >= 40 * CHUNK_BYTES
            coordinator.measured = 1
            await coordinator.until_weights(lambda one: not one.measured)
            # Its next life has heard of nothing.
            coordinator.measured = 0
            await coordinator.until_weights(lambda one: one.measured == (load,))
    finally:
        await server.stop(0.1)
        await network.close()
