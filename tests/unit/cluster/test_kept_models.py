"""A bug in what serves one model: that model is refused for a moment, the others are served, and it comes back."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest

import engine
from cluster import kept
from cluster.local import LocalCell, _kept_coordinator  # pyright: ignore[reportPrivateUsage]
from cluster.parent_log import structured
from cluster.process_log import ProcessLog
from cluster.services import FrontedModel, base_url, gateway_service
from contracts.config_loader import load_config
from contracts.errors import TandemError
from contracts.messages import MEMBERS, Empty
from coordinator.holding import Room
from coordinator.shell import CoordinatorShell
from gateway.core import GatewayCore
from gateway.server import GatewaySettings, bind
from rpc import GrpcNetwork, LiveClock, MemoryNetwork
from tests.support.fake_backend import FakeCluster

if TYPE_CHECKING:
    from contracts.messages import MembersReply

DEMO = Path(engine.__file__).parent / "demo"
SETTINGS = GatewaySettings(served_model_names=("day",), max_model_len=200, port=0, health_cache_s=0)
PATIENCE_S = 20.0


@pytest.fixture(autouse=True)
def long_delay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long enough to see it, on a busy machine too."""
    monkeypatch.setattr(kept, "RESTART_DELAY_S", 3.0)


async def test_a_gateway_core_that_fails_costs_its_model_a_moment_and_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = set[str]()
    cluster_of = GatewayCore.cluster

    async def cluster(self: GatewayCore) -> MembersReply:
        if self.gateway_id in failing:
            raise ZeroDivisionError("a bug")
        return await cluster_of(self)

    monkeypatch.setattr(GatewayCore, "cluster", cluster)
    said = list[str]()
    network = MemoryNetwork(rng=random.Random(1))
    cores = list[str]()
    begin = GatewayCore.__aenter__

    async def begun(self: GatewayCore) -> GatewayCore:
        cores.append(self.gateway_id)
        return await begin(self)

    monkeypatch.setattr(GatewayCore, "__aenter__", begun)
    async with AsyncExitStack() as stack:
        models = list[FrontedModel]()
        for name in ("day", "night"):
            backend = await stack.enter_async_context(FakeCluster(network))
            settings = replace(SETTINGS, served_model_names=(name,))
            models.append(FrontedModel(settings=settings, folder=DEMO, coordinator_address=backend.address, name=name))
        sock = stack.enter_context(closing(bind(SETTINGS)))
        log = structured(ProcessLog(tmp_path / "tandem.log", said.append), said.append)
        await stack.enter_async_context(gateway_service(models, network, LiveClock(), sock, log))
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=base_url(sock), timeout=PATIENCE_S))

        async def ask(model: str) -> httpx.Response:
            return await client.post("/v1/completions", json={"model": model, "prompt": "hello", "max_tokens": 4})

        async def until(model: str, status: int) -> httpx.Response:
            async with asyncio.timeout(PATIENCE_S):
                while (answer := await ask(model)).status_code != status:  # noqa: ASYNC110 - as a client sees it
                    await asyncio.sleep(0.02)
            return answer

        assert [(await ask(name)).status_code for name in ("day", "night")] == [200, 200]
        failing.add(cores[1])
        # Those that come while it ends are refused too, before the reason is known.
        refused = await until("night", 503)
        async with asyncio.timeout(PATIENCE_S):
            while "the gateway of night has failed" not in refused.text:
                refused = await until("night", 503)
        assert "the gateway of night has failed: ZeroDivisionError('a bug')" in refused.text
        assert refused.headers["retry-after"] == "1"
        assert (await ask("day")).status_code == 200
        health = (await client.get("/health")).json()["models"]
        assert (health["day"]["state"], health["night"]["state"]) == ("awake", "unavailable")
        # The next life has another name: the bug was of the last one.
        await until("night", 200)
        assert (await client.get("/health")).json()["models"]["night"]["state"] == "awake"
        assert cores[2] == f"{cores[1]}-2"
        assert len(cores) == 3
        assert (await client.get("/metrics")).status_code == 200


async def test_a_coordinator_that_fails_comes_back_at_its_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bug = asyncio.Event()
    sweep = CoordinatorShell._sweep  # pyright: ignore[reportPrivateUsage]

    async def sweeping(self: CoordinatorShell) -> None:
        async with asyncio.TaskGroup() as group:
            lasting = group.create_task(sweep(self))
            await bug.wait()
            bug.clear()
            lasting.cancel()
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(CoordinatorShell, "_sweep", sweeping)
    said = list[str]()
    config = load_config(None, {}, {}).config
    cell = LocalCell("night", "night", config, DEMO)
    network = GrpcNetwork(token="secret")
    log = ProcessLog(tmp_path / "tandem.log", said.append)
    async with _kept_coordinator(cell, network, LiveClock(), log, Room(), said.append) as address:
        channel = network.channel(address)

        async def answers() -> bool:
            try:
                return (await channel.call(MEMBERS, Empty(), timeout_s=1.0)).members == ()
            except TandemError:
                return False

        assert await answers()
        bug.set()
        async with asyncio.timeout(PATIENCE_S):
            while not said:  # noqa: ASYNC110 - as a client sees it
                await asyncio.sleep(0.01)
            assert said == ["the coordinator of night has failed: ZeroDivisionError('a bug')"]
            assert not await answers()
            while not await answers():  # noqa: ASYNC110 - as a client sees it
                await asyncio.sleep(0.05)
    await network.close()
    assert "ZeroDivisionError" in (tmp_path / "tandem.log").read_text()
