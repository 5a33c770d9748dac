"""Real processes that hang, get stuck or are killed: who ends them, who comes back, and that nothing stays held.

Nothing here looks at answers: what becomes of a request is the gateway's affair. The subject is processes, lives
and ledgers.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import sys
import time
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import httpx
import pytest

from cluster.local import allowed_cores, first_incarnation, worker_plans
from cluster.model_source import resolve_model
from cluster.node_agent import NodeAgent
from cluster.plan import Site
from cluster.supervision import State, SupervisionLimits
from contracts.config import ClusterConfig, PoolConfig, StoreConfig
from contracts.errors import TandemError
from contracts.messages import AUDIT, MEMBERS, Empty
from rpc import GrpcNetwork, LiveClock
from tests.support.cluster import ClusterProcess, started_cluster
from tests.support.commands import Command, tandem
from tests.support.layout import ROOT
from tests.support.long_tests import only_long
from tests.support.processes import wait_gone
from tests.support.stuck_worker import STUCK_FILE

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator
    from pathlib import Path

    from contracts.messages import AuditReply, Member

pytestmark = pytest.mark.slow

TOKEN = "liveness-test-token"
ENVIRON = {"TANDEM_CLUSTER_TOKEN": TOKEN}
CONFIG = ("--config", "configs/local.yaml", "--set", "transport=shm", "--set", "store.dram=null")
PROMPT = "Once upon a time there was a dog. " * 8
#: What a fault may take on a machine under load until everything is as before; worker starts dominate it.
RECOVERY_S = 90.0


async def eventually(holds: Callable[[], Awaitable[bool]], within_s: float = RECOVERY_S) -> None:
    """Asks again and again until it holds; what is waited for lies in other processes."""
    async with asyncio.timeout(within_s):
        while not await holds():  # noqa: ASYNC110 - no event of this process tells
            await asyncio.sleep(0.1)


@asynccontextmanager
async def streaming(base_url: str, count: int = 3) -> AsyncGenerator[None]:
    """Long answers being written for as long as the context lasts, whatever becomes of them."""
    begun = asyncio.Semaphore(0)

    async def read(client: httpx.AsyncClient) -> None:
        ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 1800, "ignore_eos": True, "stream": True}
        num_lines = 0
        with suppress(httpx.HTTPError):
            async with client.stream("POST", "/v1/completions", json=ask) as response:
                async for line in response.aiter_lines():
                    num_lines += line.startswith("data: ")
                    if num_lines == 5:
                        begun.release()

    async with httpx.AsyncClient(base_url=base_url, timeout=RECOVERY_S) as client:
        readers = [asyncio.create_task(read(client)) for _ in range(count)]
        try:
            async with asyncio.timeout(RECOVERY_S):
                for _ in readers:
                    await begun.acquire()
            yield
        finally:
            for reader in readers:
                reader.cancel()
            await asyncio.wait(readers)


async def completes(base_url: str) -> bool:
    """Whether a short request is answered."""
    ask = {"model": "demo", "prompt": PROMPT, "max_tokens": 4}
    with suppress(httpx.HTTPError):
        async with httpx.AsyncClient(base_url=base_url, timeout=RECOVERY_S) as client:
            return (await client.post("/v1/completions", json=ask)).status_code == 200
    return False


def holds_nothing(audit: AuditReply) -> bool:
    assert audit.problems == ()
    return audit.load.available_blocks == audit.total_blocks and (
        audit.open_requests,
        audit.holder_leases,
        audit.reader_leases,
    ) == (0, 0, 0)


# --- embedded: `tandem serve` -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    with started_cluster(config="configs/local.yaml", overrides={"transport": "shm"}) as running:
        running.wait_ready()
        yield running


@pytest.mark.parametrize("victim", ["decode-0", "prefill-0"])
async def test_a_frozen_worker_is_killed_and_restarted_and_the_other_holds_nothing_of_it(
    cluster: ClusterProcess, victim: str
) -> None:
    await eventually(lambda: completes(cluster.base_url))
    before = cluster.worker(victim)
    assert before.pid is not None
    async with streaming(cluster.base_url):
        os.kill(before.pid, signal.SIGSTOP)
        frozen_s = time.monotonic()
        await asyncio.to_thread(wait_gone, [before.pid], RECOVERY_S)
        killed_s = time.monotonic() - frozen_s
        assert killed_s >= 2.0, "a worker may well be silent for a moment"
        assert killed_s < 20.0, "3 s where the machine is idle"

    async def restarted() -> bool:
        now = cluster.worker(victim)
        return now.state == State.READY.value and now.incarnation > before.incarnation

    await eventually(restarted)
    assert f"{victim}: hangs: no sign of life for 3 s; killed" in cluster.output
    await eventually(lambda: completes(cluster.base_url))

    async def clean() -> bool:
        audits = await cluster.audit()
        return len(audits) == 2 and all(holds_nothing(audit) for audit in audits.values())

    await eventually(clean)


# --- each process alone -------------------------------------------------------------------------------


class Pieces:
    """A coordinator and a gateway of their own, and questions to whoever is a member."""

    def __init__(self, coordinator: str) -> None:
        self.coordinator = coordinator
        self._network = GrpcNetwork(token=TOKEN)

    async def close(self) -> None:
        await self._network.close()

    async def members(self) -> dict[str, Member]:
        """By worker id."""
        channel = self._network.channel(self.coordinator)
        reply = await channel.call(MEMBERS, Empty(), timeout_s=10)
        return {member.info.worker_id: member for member in reply.members}

    async def both_are_members(self) -> bool:
        return set(await self.members()) == {"prefill-0", "decode-0"}

    async def hold_nothing(self) -> bool:
        try:
            audits = [
                await self._network.channel(member.info.address).call(AUDIT, Empty(), timeout_s=10)
                for member in (await self.members()).values()
            ]
        except TandemError:
            return False  # one of them is on its way out
        return len(audits) == 2 and all(holds_nothing(audit) for audit in audits)


@contextmanager
def gateway_of(coordinator: str) -> Generator[tuple[Command, str]]:
    with tandem("gateway", *CONFIG, "--coordinator", coordinator, "--port", "0", **ENVIRON) as gateway:
        yield gateway, gateway.wait_for("gateway at ")


@contextmanager
def agent_of(coordinator: str, folder: Path) -> Generator[Command]:
    """Both workers are ready."""
    place = ("--coordinator", coordinator, "--runtime-dir", str(folder))
    with tandem("agent", *CONFIG, *place, **ENVIRON) as agent:
        for _ in range(2):
            while " ready at " not in agent.wait_for(""):
                pass
        yield agent


@asynccontextmanager
async def pieces_of(coordinator: str) -> AsyncGenerator[Pieces]:
    pieces = Pieces(coordinator)
    try:
        yield pieces
    finally:
        await pieces.close()


@pytest.fixture
def coordinator() -> Iterator[str]:
    with tandem("coordinator", *CONFIG, **ENVIRON) as process:
        yield process.wait_for("coordinator at ")


@only_long
async def test_a_killed_agent_takes_its_workers_along_and_the_next_one_brings_them_back(
    coordinator: str, tmp_path: Path
) -> None:
    async with pieces_of(coordinator) as pieces:
        with gateway_of(coordinator) as (gateway, base_url):
            with agent_of(coordinator, tmp_path) as agent:
                await eventually(lambda: completes(base_url))
                first = await pieces.members()
                async with streaming(base_url):
                    agent.process.kill()
                    await asyncio.to_thread(agent.process.wait)
                    # At once: nobody has to miss a heartbeat for it.
                    await asyncio.to_thread(wait_gone, [member.info.pid for member in first.values()], RECOVERY_S)

            async def given_up() -> bool:
                return await pieces.members() == {}

            await eventually(given_up)
            assert gateway.process.poll() is None
            with agent_of(coordinator, tmp_path):
                await eventually(lambda: completes(base_url))
                second = await pieces.members()
                for worker_id, member in second.items():
                    assert member.info.incarnation > first[worker_id].info.incarnation
                await eventually(pieces.hold_nothing)


async def test_a_killed_gateway_leaves_nothing_on_the_workers(coordinator: str, tmp_path: Path) -> None:
    async with pieces_of(coordinator) as pieces:
        with agent_of(coordinator, tmp_path):
            with gateway_of(coordinator) as (gateway, base_url):
                await eventually(pieces.both_are_members)
                async with streaming(base_url, count=6):
                    assert not await pieces.hold_nothing(), "else this shows nothing"
                    gateway.process.kill()
                    killed_s = time.monotonic()
                    await eventually(pieces.hold_nothing)
                    assert time.monotonic() - killed_s < 20.0, "3.5 s where the machine is idle"
            with gateway_of(coordinator) as (_, base_url):
                await eventually(lambda: completes(base_url))


async def test_who_wakes_after_it_was_given_up_is_fenced_and_comes_back_as_another_life(
    coordinator: str, tmp_path: Path
) -> None:
    """No agent kills it meanwhile, as where the machine's own agent was paused with it."""
    async with (
        pieces_of(coordinator) as pieces,
        agent_in_here(coordinator, tmp_path, SupervisionLimits(hang_timeout_s=600.0)) as (agent, said),
    ):
        await eventually(pieces.both_are_members)
        before = (await pieces.members())["decode-0"].info
        os.kill(before.pid, signal.SIGSTOP)

        async def given_up() -> bool:
            return "decode-0" not in await pieces.members()

        await eventually(given_up)
        os.kill(before.pid, signal.SIGCONT)
        await asyncio.to_thread(wait_gone, [before.pid], RECOVERY_S)
        await eventually(pieces.both_are_members)
        after = (await pieces.members())["decode-0"].info
        assert after.incarnation > before.incarnation
        (crash,) = [line for line in said if line.startswith("decode-0: crashed: ")]
        assert "was given up and is not taken up again" in crash
        assert agent.workers()[0].incarnation == (await pieces.members())["prefill-0"].info.incarnation


@only_long
async def test_a_worker_with_a_stuck_engine_ends_itself_and_comes_back(coordinator: str, tmp_path: Path) -> None:
    stuck_file = tmp_path / "stuck"
    stuck_worker = "tests.support.stuck_worker"
    with gateway_of(coordinator) as (_, base_url):
        async with (
            pieces_of(coordinator) as pieces,
            agent_in_here(coordinator, tmp_path, SupervisionLimits(), module=stuck_worker, stuck_file=stuck_file) as (
                _,
                said,
            ),
        ):
            for victim in ("decode-0", "prefill-0"):
                # Steps of the usual sizes become known.
                for _ in range(4):
                    await eventually(lambda: completes(base_url))
                before = (await pieces.members())[victim].info
                async with streaming(base_url):
                    stuck_file.write_text(str(before.pid))
                    stuck_s = time.monotonic()
                    # One more prompt, for the victim that only reads them.
                    asking = asyncio.create_task(completes(base_url))
                    await asyncio.to_thread(wait_gone, [before.pid], RECOVERY_S)
                    assert time.monotonic() - stuck_s < 30.0, "3 s and its last words where the machine is idle"
                await eventually(pieces.both_are_members)
                assert (await pieces.members())[victim].info.incarnation > before.incarnation
                (crash,) = [line for line in said if line.startswith(f"{victim}: crashed: ")]
                assert re.search(r"its engine is stuck: a step of \d+ tokens has run for [0-9.]+ s", crash)
                await asking
            await eventually(lambda: completes(base_url))
            await eventually(pieces.hold_nothing)


def test_an_agent_whose_workers_are_all_given_up_ends(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(ROOT / "engine" / "demo", model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    place = ("--coordinator", "127.0.0.1:1", "--runtime-dir", str(tmp_path / "run"), "--model", str(model))
    with tandem("agent", *CONFIG, *place, **ENVIRON) as agent:
        status, output = agent.wait()
    assert status == 1, output
    assert output.count("given up after 1 failed start") == 2, output
    assert output.endswith("tandem: every worker was given up\n"), output


@asynccontextmanager
async def agent_in_here(
    coordinator: str,
    folder: Path,
    limits: SupervisionLimits,
    *,
    module: str = "cluster.worker_main",
    stuck_file: Path | None = None,
) -> AsyncGenerator[tuple[NodeAgent, list[str]]]:
    """An agent in this process with one worker of each role, both ready, and what it says."""
    config = ClusterConfig(
        transport="shm",
        store=StoreConfig(dram=None),
        pools=(
            PoolConfig(name="prefill", role="prefill", kv_blocks=1024),
            PoolConfig(name="decode", role="decode", kv_blocks=1024),
        ),
    )
    source = resolve_model("demo", print)
    site = Site(
        model_dir=str(source.folder),
        model_name=source.name,
        coordinator_address=coordinator,
        cluster_token=TOKEN,
        runtime_dir=str(folder),
        bind="127.0.0.1:0",
        parent_pid=os.getpid(),
        allowed_cores=allowed_cores(),
    )
    clock = LiveClock()
    said: list[str] = []
    plans = [
        replace(
            plan,
            command=(sys.executable, "-m", module),
            environ={**plan.environ, STUCK_FILE: str(stuck_file)},
        )
        for plan in worker_plans(config, site)
    ]
    agent = NodeAgent(
        plans,
        limits=limits,
        first_incarnation=first_incarnation(clock),
        log_dir=folder,
        clock=clock,
        say=said.append,
    )
    async with agent:
        async with asyncio.timeout(RECOVERY_S):
            while any(worker.state is not State.READY for worker in agent.workers()):
                await agent.changed.wait()
                agent.changed.clear()
        yield agent, said
