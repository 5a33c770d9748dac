"""Real processes that die, and clients that go away: clear errors, clean books, no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import signal
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.cluster import ClusterProcess, started_cluster
from tests.support.layout import ROOT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

PROMPT = "Once upon a time there was a dog. " * 8
#: What a fault may take until everything is as before.
RECOVERY_S = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterProcess]:
    with started_cluster(config="configs/local.yaml") as running:
        running.wait_ready()
        yield running


def body(max_tokens: int, **more: Any) -> dict[str, Any]:
    return {
        "model": "demo",
        "prompt": PROMPT,
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
        **more,
    }


async def stream(client: httpx.AsyncClient, max_tokens: int) -> AsyncIterator[dict[str, Any]]:
    async with client.stream("POST", "/v1/completions", json=body(max_tokens, stream=True)) as response:
        assert response.status_code == 200
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Asks again and again until it holds; what is waited for lies in other processes."""
    async with asyncio.timeout(RECOVERY_S):
        while not await holds():  # noqa: ASYNC110 - no event of this process tells
            await asyncio.sleep(0.2)


async def until_serving(client: httpx.AsyncClient) -> None:
    async def healthy() -> bool:
        return (await client.get("/health")).status_code == 200

    await eventually(healthy)


async def assert_clean(cluster: ClusterProcess) -> None:
    """Soon after the last request ended, no worker holds anything."""

    async def clean() -> bool:
        audits = await cluster.audit()
        assert all(audit.problems == () for audit in audits.values()), audits
        return all(
            audit.load.available_blocks == audit.total_blocks
            and (audit.open_requests, audit.holder_leases, audit.reader_leases) == (0, 0, 0)
            for audit in audits.values()
        )

    await eventually(clean)


@pytest.mark.slow
async def test_200_random_cancels_leave_every_ledger_clean(cluster: ClusterProcess) -> None:
    rng = random.Random(7)

    async def leave_early(client: httpx.AsyncClient) -> None:
        patience_s = rng.choice([0.0, rng.uniform(0, 0.05), rng.uniform(0, 0.6)])
        await asyncio.sleep(rng.uniform(0, 6))

        async def read() -> None:
            async for _ in stream(client, rng.randint(1, 400)):
                pass

        reading = asyncio.create_task(read())
        await asyncio.wait([reading], timeout=patience_s)
        reading.cancel()
        await asyncio.wait([reading])

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60, limits=limits) as client:
        async with asyncio.TaskGroup() as tasks:
            for _ in range(200):
                tasks.create_task(leave_early(client))
        await assert_clean(cluster)
        response = await client.post("/v1/completions", json=body(5))
        assert response.status_code == 200, response.text


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["prefill", "decode"])
async def test_the_only_worker_of_a_role_is_killed_and_the_answer_goes_on(cluster: ClusterProcess, victim: str) -> None:
    """There is nobody to take over: the request waits for the next life of the worker that was killed."""
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=60) as client:
        await until_serving(client)
        undisturbed = [event async for event in stream(client, 600)]
        state = next(worker for worker in cluster.state.workers if worker.role == victim)
        assert state.pid is not None
        events: list[dict[str, Any]] = []
        if victim == "prefill":
            os.kill(state.pid, signal.SIGKILL)
        async for event in stream(client, 600):
            if victim == "decode" and len(events) == 3:
                os.kill(state.pid, signal.SIGKILL)
            assert "error" not in event, event
            events.append(event)
        assert text(events) == text(undisturbed)
        assert [reason for event in events if (reason := event["choices"][0]["finish_reason"])] == ["length"]
        await until_serving(client)
        assert cluster.worker(state.worker_id).incarnation > state.incarnation
    await assert_clean(cluster)


def text(events: list[dict[str, Any]]) -> str:
    return "".join(event["choices"][0]["text"] for event in events)


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        ("missing", "no such folder"),
        ("architecture", "GPT2LMHeadModel"),
        ("truncated", "model.safetensors"),
        ("no-config", "config.json"),
    ],
)
@pytest.mark.slow
def test_a_model_that_cannot_be_served(tmp_path: Path, damage: str, expected: str) -> None:
    folder = damaged_demo(tmp_path, damage)
    with started_cluster(model=folder, config="configs/colocated.yaml") as cluster:
        assert cluster.wait_ended() != 0
        assert expected in cluster.output, cluster.output
        assert "Traceback" not in cluster.output


def damaged_demo(tmp_path: Path, damage: str) -> Path:
    """A copy of the demo model with one thing wrong."""
    folder = tmp_path / "model"
    if damage == "missing":
        return folder
    shutil.copytree(ROOT / "engine" / "demo", folder)
    if damage == "architecture":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"architectures": ["GPT2LMHeadModel"]}))
    elif damage == "truncated":
        weights = folder / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    else:
        (folder / "config.json").unlink()
    return folder
