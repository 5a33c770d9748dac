"""Two models at one address: each answers with its own weights, one of them asleep until a burst comes to it."""

from __future__ import annotations

import asyncio
import json
import re
from statistics import median
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from tests.support.cluster import running_cluster
from tests.support.commands import tandem
from tests.support.oracle import NUM_NEW, Oracle, make_oracle, write_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.cluster import ClusterProcess

#: What anything may take here; nothing waits for it when all is well.
PATIENCE_S = 100.0
NUM_BURST = 20
PHASES = ("waking_ms", "gateway_ms", "queue_ms", "prefill_ms", "ttft_ms")

pytestmark = pytest.mark.timeout(400)


def models(day: Oracle, night: Oracle) -> str:
    """`night` is asleep from the start, and again soon after its last request."""
    sleeps = {"to_zero_after_s": 2, "cooldown_s": 2, "window_s": 2}
    pool = {"name": "all", "role": "mixed", "kv_blocks": 512}
    return json.dumps(
        [
            {"name": "day", "model": str(day.model_dir), "pools": [pool]},
            {
                "name": "night",
                "model": str(night.model_dir),
                "pools": [{**pool, "workers": {"min": 0, "max": 1}, "scale": sleeps}],
            },
        ]
    )


async def complete(client: httpx.AsyncClient, model: str, prompt: list[int]) -> dict[str, Any]:
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": NUM_NEW,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
        "include_timeline": True,
    }
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    assert answer["model"] == model
    assert answer["timeline"]["prefill_worker"] == f"{model}-all-0"
    return answer


def tokens(answer: dict[str, Any]) -> list[int]:
    found: list[int] = answer["choices"][0]["token_ids"]
    return found


async def states(client: httpx.AsyncClient) -> dict[str, str]:
    return {entry["id"]: entry["state"] for entry in (await client.get("/v1/models")).json()["data"]}


def command(cluster: ClusterProcess, *arguments: str) -> str:
    with tandem(*arguments, "--state-file", str(cluster.state_file)) as asked:
        status, output = asked.wait()
    assert status == 0, output
    return output


async def operations(cluster: ClusterProcess, model: str) -> list[dict[str, Any]]:
    told = await asyncio.to_thread(command, cluster, "operations", "--model", model, "--json")
    statuses: list[dict[str, Any]] = json.loads(told)
    return statuses


def print_phases(timelines: list[dict[str, Any]]) -> None:
    print(f"\ntime to first token of {len(timelines)} requests to a sleeping model, ms (median, most):")
    for phase in PHASES:
        values = [timeline[phase] for timeline in timelines]
        print(f"  {phase:<12}{median(values):10.1f}{max(values):10.1f}")


@pytest.mark.slow
async def test_each_model_answers_and_one_sleeps_meanwhile(tmp_path: Path) -> None:
    day, night = (make_oracle(name, tmp_path) for name in ("llama", "qwen3"))
    for oracle in (day, night):
        write_tokenizer(oracle.model_dir)
    overrides = {"models": models(day, night), "dtype": "float32", "coordinator.autoscale.interval_s": "0.5"}
    async with (
        running_cluster(model=None, overrides=overrides) as cluster,
        httpx.AsyncClient(base_url=cluster.base_url, timeout=PATIENCE_S) as client,
    ):
        assert await states(client) == {"day": "awake", "night": "asleep"}
        assert [cell.name for cell in cluster.state.cells] == ["day", "night"]
        # Who sleeps is not ill.
        audit = await asyncio.to_thread(command, cluster, "doctor")
        assert re.search(r"^note +coordinator \S+ +0 workers; they can be started$", audit, re.MULTILINE), audit

        prompts = [night.prompts[index % len(night.prompts)] for index in range(NUM_BURST)]
        burst = [complete(client, "night", prompt) for prompt in prompts]
        others = [complete(client, "day", prompt) for prompt in day.prompts]
        answers = await asyncio.gather(*others, *burst)
        by_day, by_night = answers[: len(others)], answers[len(others) :]
        day.check([tokens(answer) for answer in by_day])
        for begin in range(0, NUM_BURST - len(night.prompts) + 1, len(night.prompts)):
            night.check([tokens(answer) for answer in by_night[begin : begin + len(night.prompts)]])
        timelines = [answer["timeline"] for answer in by_night]
        print_phases(timelines)
        for timeline in timelines:
            assert 0 < timeline["waking_ms"] <= timeline["gateway_ms"] < timeline["ttft_ms"], timeline
        assert all(answer["timeline"]["waking_ms"] == 0 for answer in by_day)

        unknown = await client.post("/v1/completions", json={"model": "noon", "prompt": "t1"})
        assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "not_found")
        unnamed = await client.post("/v1/completions", json={"prompt": "t1"})
        assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")

        async with asyncio.timeout(PATIENCE_S):
            while (await states(client))["night"] != "asleep":
                assert tokens(await complete(client, "day", day.prompts[0])) == tokens(by_day[0])
        assert (await client.get("/health")).json()["models"]["night"]["state"] == "asleep"
        text = (await client.get("/metrics")).text
        assert f'tandem_request_success_total{{finished_reason="length",model="night"}} {NUM_BURST}.0' in text

        told = await asyncio.to_thread(command, cluster, "autoscale", "--model", "night")
        assert "pool night-all: starts 1" in told
        assert "pool night-all: removes night-all-0" in told
        # Asleep is who serves nothing; on a busy machine its process may still be leaving, and the stop be under way.
        async with asyncio.timeout(PATIENCE_S):
            while any(one["state"] == "running" for one in await operations(cluster, "night")):  # noqa: ASYNC110 - no event
                await asyncio.sleep(0.2)
        # Which coordinator is meant follows from the worker's name.
        started = await asyncio.to_thread(command, cluster, "start", "night-all-0")
        assert "done after" in started
        assert tokens(await complete(client, "night", night.prompts[0])) == tokens(by_night[0])
        rows = json.loads(await asyncio.to_thread(command, cluster, "workers", "--json"))
        assert [row["worker_id"] for row in rows] == ["day-all-0", "night-all-0"]
