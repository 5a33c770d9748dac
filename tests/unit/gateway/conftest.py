"""A gateway core in front of a scripted cluster."""

from __future__ import annotations

import logging
import random
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
import pytest
import structlog

from contracts.ids import GatewayId
from gateway.core import GatewayCore
from gateway.limits import GatewayLimits
from gateway.server import GatewaySettings, create_app
from rpc import LiveClock, MemoryNetwork
from tests.support.fake_backend import FakeCluster, Script
from tests.unit.gateway.tokenizers_for_tests import chat_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from fastapi import FastAPI

    from contracts.messages import Role

#: Short enough for tests, long enough for a loaded machine where nothing is meant to expire. Every failure is
#: the client's to see: what is done about it is `test_core_replay`'s.
QUICK = GatewayLimits(
    gap_timeout_s=0.05,
    reopen_backoff_s=0.01,
    max_reopen_backoff_s=0.01,
    cancel_backoff_s=0.01,
    max_replays=0,
)
#: The same with replays, as they are by default.
REPLAYING = replace(
    QUICK,
    max_replays=GatewayLimits().max_replays,
    gap_timeout_s=GatewayLimits().gap_timeout_s,
    replay_backoff_s=0.01,
    max_replay_backoff_s=0.05,
)


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork(rng=random.Random(7))


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def roles() -> dict[str, Role]:
    return {"prefill-0": "prefill", "decode-0": "decode"}


@pytest.fixture
def limits() -> GatewayLimits:
    return QUICK


@pytest.fixture
async def cluster(network: MemoryNetwork, roles: dict[str, Role], script: Script) -> AsyncIterator[FakeCluster]:
    async with FakeCluster(network, roles, script) as cluster:
        yield cluster


@asynccontextmanager
async def run_core(
    network: MemoryNetwork, cluster: FakeCluster, limits: GatewayLimits, gateway_id: str = "gw"
) -> AsyncGenerator[GatewayCore]:
    process = network.process("127.0.0.1")
    silent = structlog.make_filtering_bound_logger(logging.CRITICAL)
    log = structlog.wrap_logger(structlog.ReturnLogger(), wrapper_class=silent)
    async with GatewayCore(process, LiveClock(), GatewayId(gateway_id), cluster.address, limits, log) as core:
        yield core
    await process.close()


@pytest.fixture
async def core(network: MemoryNetwork, cluster: FakeCluster, limits: GatewayLimits) -> AsyncIterator[GatewayCore]:
    async with run_core(network, cluster, limits) as core:
        yield core


@pytest.fixture
def settings() -> GatewaySettings:
    return GatewaySettings(served_model_names=("scripted", "alias"), max_model_len=200, port=0)


@pytest.fixture
def app(core: GatewayCore, settings: GatewaySettings) -> FastAPI:
    return create_app(core, chat_tokenizer(), settings, core.clock, rng=random.Random(1))


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Talks to the app without sockets; it reads whole bodies only."""
    transport = httpx.ASGITransport(app=app)
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client
