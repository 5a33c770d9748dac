"""Operators at work on a cluster of real processes under load: no request fails, and no token is another one."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts.control_messages import OPERATIONS, OperationsRequest
from contracts.errors import TandemError
from contracts.messages import MEMBERS, Empty
from rpc import GrpcNetwork
from tests.support.cluster import ClusterProcess, started_cluster
from tests.support.commands import Command, tandem
from tests.support.long_tests import only_long
from tests.support.processes import wait_gone

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Generator, Iterator, Sequence
    from pathlib import Path

    import msgspec

    from contracts.control_messages import OperationsReply
    from contracts.messages import Member

CONFIG = ("--config", "configs/2p2d.yaml", "--set", "store.dram=null")
TOKEN = "operations-test"
ENVIRON = {"TANDEM_CLUSTER_TOKEN": TOKEN, "TANDEM_GATEWAY__PORT": "0"}
PROMPTS = tuple(f"Once upon a time there were {number} dogs and a small cat. " * 3 for number in range(6))
MAX_TOKENS = 60
#: What anything may take here; nothing waits for it when all is well.
PATIENCE_S = 200.0
#: Workers start and end many times here, each with an import of torch.
pytestmark = pytest.mark.timeout(400)

WORKERS = {"prefill-pair-0", "prefill-pair-1", "decode-pair-0", "decode-pair-1"}


class Load:
    """Clients that ask again and again, and compare each answer with the one that was given in peace."""

    def __init__(self, base_url: str, *, num_clients: int = 2) -> None:
        self._client = httpx.AsyncClient(base_url=base_url, timeout=60)
        self._num_clients = num_clients
        self._expected: dict[str, str] = {}
        self._asking: list[asyncio.Task[None]] = []
        self._over = False
        self.answers = 0
        self.problems: list[str] = []

    async def begin(self) -> None:
        for prompt in PROMPTS:
            text, problem = await self._ask(prompt)
            assert problem is None, problem
            self._expected[prompt] = text
        self._asking = [asyncio.create_task(self._keep_asking(number)) for number in range(self._num_clients)]

    async def more(self, count: int = 4) -> None:
        """Returns when so many more answers have come."""
        wanted = self.answers + count
        async with asyncio.timeout(PATIENCE_S):
            while self.answers < wanted and not self.problems:  # noqa: ASYNC110 - several tasks count
                await asyncio.sleep(0.05)

    async def end(self) -> None:
        self._over = True
        for task in self._asking:
            await task
        await self._client.aclose()
        assert self.problems == []
        assert self.answers > self._num_clients

    async def _keep_asking(self, number: int) -> None:
        while not self._over:
            prompt = PROMPTS[number % len(PROMPTS)]
            number += 1
            text, problem = await self._ask(prompt)
            if problem is None and text != self._expected[prompt]:
                problem = f"another answer: {text!r}"
            if problem is not None:
                self.problems.append(problem)
                return
            self.answers += 1

    async def _ask(self, prompt: str) -> tuple[str, str | None]:
        body = {"prompt": prompt, "max_tokens": MAX_TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        text, finish = "", None
        try:
            async with self._client.stream("POST", "/v1/completions", json={"model": "demo", **body}) as response:
                if response.status_code != 200:
                    return "", f"status {response.status_code}: {(await response.aread()).decode()}"
                async for line in response.aiter_lines():
                    if not line.startswith("data: {"):
                        continue
                    event: dict[str, Any] = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return text, f"after {len(text)} characters: {event}"
                    text += event["choices"][0]["text"]
                    finish = event["choices"][0]["finish_reason"] or finish
        except httpx.HTTPError as error:
            return text, f"{type(error).__name__} after {len(text)} characters"
        return text, None if finish == "length" else f"it ended with {finish}"


@asynccontextmanager
async def loaded(base_url: str) -> AsyncGenerator[Load]:
    load = Load(base_url)
    await load.begin()
    await load.more()
    yield load
    await load.more()
    await load.end()


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    with started_cluster(config="configs/2p2d.yaml") as running:
        running.wait_ready()
        yield running


async def command(*arguments: str, state_file: Path) -> tuple[int, str]:
    """Runs `tandem` to its end: exit status and output."""

    def work() -> tuple[int, str]:
        with tandem(*arguments, "--state-file", str(state_file)) as process:
            output, _ = process.process.communicate(timeout=PATIENCE_S)
            return process.process.returncode, output

    return await asyncio.to_thread(work)


async def members(address: str, token: str) -> dict[str, Member]:
    return {each.info.worker_id: each for each in (await _asked(address, token, MEMBERS, Empty())).members}


async def operations(address: str, token: str) -> OperationsReply:
    reply: OperationsReply = await _asked(address, token, OPERATIONS, OperationsRequest())
    return reply


async def _asked(address: str, token: str, method: Any, body: msgspec.Struct) -> Any:
    network = GrpcNetwork(token=token)
    try:
        return await network.channel(address).call(method, body, timeout_s=5.0)
    finally:
        await network.close()


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not await holds():  # noqa: ASYNC110 - no event of this process tells
            await asyncio.sleep(0.1)


async def counted(base_url: str, family: str) -> float:
    """The sum of a counter over its labels, as the gateway tells it."""
    async with httpx.AsyncClient(base_url=base_url) as client:
        text = (await client.get("/metrics")).text
    assert f"# TYPE {family.removesuffix('_total')}" in text
    found = [line for line in text.splitlines() if line.startswith((f"{family} ", f"{family}{{"))]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


async def members_of(cluster: ClusterProcess) -> dict[str, Member]:
    state = cluster.state
    return await members(state.coordinator_address, state.cluster_token)


async def test_a_decode_worker_is_flipped_and_back_under_load(cluster: ClusterProcess) -> None:
    async with loaded(cluster.base_url) as load:
        before = (await members_of(cluster))["decode-pair-1"].info
        for role in ("prefill", "decode"):
            status, output = await command("flip", "decode-pair-1", role, state_file=cluster.state_file)
            assert (status, load.problems) == (0, []), output
            after = (await members_of(cluster))["decode-pair-1"].info
            assert (after.role, after.incarnation, after.pid) == (role, before.incarnation, before.pid)
            await load.more()

            async def is_told(role: str = role) -> bool:
                return cluster.worker("decode-pair-1").role == role

            await eventually(is_told)


async def test_a_decode_worker_becomes_mixed_with_its_streams_and_back(cluster: ClusterProcess) -> None:
    async with loaded(cluster.base_url) as load:
        state, name = cluster.state, "decode-pair-1"
        before = (await members_of(cluster))[name].info

        async def writes() -> bool:
            return (await members_of(cluster))[name].load.running_decodes > 0

        await eventually(writes)
        families = ("tandem_requests_moved_total", "tandem_request_replays_total")
        counts = [await counted(cluster.base_url, family) for family in families]
        status, output = await command("flip", name, "mixed", state_file=cluster.state_file)
        assert (status, load.problems) == (0, []), output
        assert "it is a mixed worker now; nothing had to leave" in output
        assert "drains" not in output
        assert [await counted(cluster.base_url, family) for family in families] == counts
        await load.more()
        status, output = await command("flip", name, "decode", state_file=cluster.state_file)
        assert (status, load.problems) == (0, []), output
        assert "it is a decode worker now; its answers stayed" in output
        after = (await members_of(cluster))[name].info
        assert (after.role, after.incarnation, after.pid) == (before.role, before.incarnation, before.pid)
        found = (await operations(state.coordinator_address, state.cluster_token)).operations[-2:]
        assert [one.text for one in found] == [
            "it is a mixed worker now; nothing had to leave",
            "it is a decode worker now; its answers stayed",
        ]


@only_long
async def test_a_drained_worker_is_empty_and_what_cannot_be_is_refused(cluster: ClusterProcess) -> None:
    async with loaded(cluster.base_url) as load:
        status, output = await command("drain", "prefill-pair-0", "--within", "60s", state_file=cluster.state_file)
        assert status == 0, output
        found = (await members_of(cluster))["prefill-pair-0"].load
        assert (found.draining, found.open_requests, found.open_leases) == (True, 0, 0)
        status, output = await command("drain", "prefill-pair-1", state_file=cluster.state_file)
        assert status == 1
        assert "without prefill-pair-1 nobody could serve requests: the others are 2 decode" in output
        status, output = await command("workers", state_file=cluster.state_file)
        assert status == 0
        (line,) = [line for line in output.splitlines() if line.startswith("prefill-pair-0 ")]
        assert " drained " in line
        await load.more()
        status, output = await command("drain", "prefill-pair-0", "--undo", state_file=cluster.state_file)
        assert status == 0, output
    assert not (await members_of(cluster))["prefill-pair-0"].load.draining


async def test_a_rolling_restart_under_load_fails_no_request(cluster: ClusterProcess) -> None:
    before = await members_of(cluster)
    async with loaded(cluster.base_url) as load:
        restarting = asyncio.create_task(command("restart", "--rolling", state_file=cluster.state_file))
        status, output = await restarting
        assert (status, load.problems) == (0, []), output
        assert "4 restarted" in output
        after = await members_of(cluster)
        assert after.keys() == before.keys()
        assert all(after[name].info.incarnation > before[name].info.incarnation for name in before)
        assert {worker.state for worker in cluster.state.workers} == {"ready"}


@only_long
async def test_a_worker_is_stopped_and_started_and_the_state_file_tells_it(cluster: ClusterProcess) -> None:
    async with loaded(cluster.base_url) as load:
        status, output = await command("stop", "decode-pair-0", state_file=cluster.state_file)
        assert status == 0, output
        assert "decode-pair-0" not in {worker.worker_id for worker in cluster.state.workers}
        await load.more()
        status, output = await command("start", "decode-pair-0", state_file=cluster.state_file)
        assert status == 0, output
        assert cluster.worker("decode-pair-0").pid is not None


@pytest.mark.parametrize("victim", ["decode-pair-0", pytest.param("prefill-pair-1", marks=only_long)])
async def test_a_worker_that_gets_sigterm_leaves_within_ten_seconds_and_no_request_fails(
    cluster: ClusterProcess, victim: str
) -> None:
    async with loaded(cluster.base_url):
        before = (await members_of(cluster))[victim].info
        os.kill(before.pid, signal.SIGTERM)
        begun_s = time.monotonic()
        await asyncio.to_thread(wait_gone, [before.pid], PATIENCE_S)
        assert time.monotonic() - begun_s < 10.0

        async def is_back() -> bool:
            found = (await members_of(cluster)).get(victim)
            return found is not None and found.info.incarnation > before.incarnation

        await eventually(is_back)
    assert not (await members_of(cluster))[victim].load.draining


@only_long
async def test_an_interrupted_command_leaves_its_operation_running(cluster: ClusterProcess) -> None:
    flags = ("--state-file", str(cluster.state_file))

    def interrupt() -> tuple[int, str]:
        with tandem("restart", "prefill-pair-0", "decode-pair-0", *flags) as process:
            process.wait_for("operation ")
            process.process.send_signal(signal.SIGINT)
            return process.wait()

    status, output = await asyncio.to_thread(interrupt)
    assert status == 130, output
    assert "goes on; `tandem operations` shows it" in output
    state = cluster.state

    async def is_over() -> bool:
        found = (await operations(state.coordinator_address, state.cluster_token)).operations[-1]
        assert found.state in ("running", "done"), found
        return found.state == "done"

    await eventually(is_over)


@only_long
async def test_another_build_that_does_not_start_ends_a_rolling_restart_at_its_first_worker(
    cluster: ClusterProcess, tmp_path: Path
) -> None:
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    async with loaded(cluster.base_url) as load:
        flags = ("--python", str(broken))
        status, output = await command(
            "restart", "decode-pair-0", "decode-pair-1", *flags, state_file=cluster.state_file
        )
        assert status == 1, output
        assert "decode-pair-0: given up: it exited with code 7" in output
        assert load.problems == []
        status, output = await command(
            "restart", "decode-pair-0", "--python", sys.executable, state_file=cluster.state_file
        )
        assert status == 0, output


# --- each part on its own ---------------------------------------------------------------------------


class Parts:
    """A coordinator, a gateway and a node agent, each a process."""

    def __init__(self, coordinator: str, coordinator_process: Command, base_url: str, agent: Command) -> None:
        self.coordinator = coordinator
        self.coordinator_process = coordinator_process
        self.base_url = base_url
        self.agent = agent

    async def restarted(self, *names: str) -> int:
        """Begins that; the operation's number."""
        found = await self.tandem("restart", *names, "--no-wait")
        return int(found.split()[1].rstrip(":"))

    async def tandem(self, *arguments: str) -> str:
        def work() -> str:
            with tandem(*arguments, "--coordinator", self.coordinator, **ENVIRON) as process:
                status, output = process.wait()
                assert status == 0, output
                return output

        return await asyncio.to_thread(work)

    async def until_all_take_requests(self, names: Sequence[str] = tuple(WORKERS)) -> None:
        async def all_do() -> bool:
            try:
                found = await members(self.coordinator, TOKEN)
            except TandemError:
                return False
            return set(names) <= {name for name, each in found.items() if not each.load.draining}

        await eventually(all_do)


@pytest.fixture
def parts(tmp_path: Path) -> Generator[Parts]:
    with tandem("coordinator", *CONFIG, **ENVIRON) as process:
        coordinator = process.wait_for("coordinator at ")
        place = ("--coordinator", coordinator, "--runtime-dir", str(tmp_path))
        with (
            tandem("gateway", *CONFIG, "--coordinator", coordinator, **ENVIRON) as gateway,
            tandem("agent", *CONFIG, *place, **ENVIRON) as agent,
        ):
            base_url = gateway.wait_for("gateway at ")
            for _ in WORKERS:
                while " ready at " not in agent.wait_for(""):
                    pass
            yield Parts(coordinator, process, base_url, agent)


async def test_a_coordinator_that_is_killed_during_a_restart_leaves_nobody_draining(parts: Parts) -> None:
    await parts.until_all_take_requests()
    with ExitStack() as stack:
        async with loaded(parts.base_url) as load:
            await parts.restarted("decode-pair-0", "decode-pair-1")
            await load.more(2)
            parts.coordinator_process.process.kill()
            bind = ("--bind", parts.coordinator)
            stack.enter_context(tandem("coordinator", *CONFIG, *bind, **ENVIRON)).wait_for("coordinator at ")
            await parts.until_all_take_requests()
            assert (await operations(parts.coordinator, TOKEN)).operations == ()


@only_long
async def test_an_agent_that_is_killed_during_a_restart_fails_it_and_the_coordinator_serves_on(
    parts: Parts, tmp_path: Path
) -> None:
    await parts.until_all_take_requests()
    await parts.restarted("decode-pair-0")
    parts.agent.process.kill()
    await asyncio.to_thread(parts.agent.process.wait)

    async def is_told() -> bool:
        (found,) = (await operations(parts.coordinator, TOKEN)).operations
        return found.state == "failed" or "its node agent is not heard" in found.text

    await eventually(is_told)
    assert (await operations(parts.coordinator, TOKEN)).slots == ()
    with tandem("agent", *CONFIG, "--coordinator", parts.coordinator, "--runtime-dir", str(tmp_path), **ENVIRON):
        await parts.until_all_take_requests()
        async with loaded(parts.base_url):
            pass
