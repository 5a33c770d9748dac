"""Two models behind one front: who answers, what is refused before anybody looks, and what is told of both."""

from __future__ import annotations

import random
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from contracts.errors import ConfigError
from gateway.front import ServedModel, create_front, state_of
from gateway.health import HealthReport
from gateway.server import GatewaySettings
from rpc import MemoryNetwork
from tests.support.fake_backend import FakeCluster, Script
from tests.unit.gateway.conftest import QUICK, run_core
from tests.unit.gateway.tokenizers_for_tests import EOS, chat_tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from contracts.messages import Role
    from contracts.requests import GenerateRequest

ROLES: dict[str, Role] = {"prefill-0": "prefill", "decode-0": "decode"}
BASE = GatewaySettings(served_model_names=("m",), max_model_len=200, port=0, health_cache_s=0, max_body_bytes=4096)
SETTINGS = {
    "one": replace(BASE, served_model_names=("one", "uno"), api_keys=("key",)),
    "two": replace(BASE, served_model_names=("two",), api_keys=("key",), max_model_len=100, may_sleep=True),
}


def _always(reply: list[int], request: GenerateRequest) -> list[int]:
    return reply


@pytest.fixture
async def client() -> AsyncIterator[httpx.AsyncClient]:
    """Each model says its name."""
    async with AsyncExitStack() as stack:
        models: list[ServedModel] = []
        for number, (name, settings) in enumerate(SETTINGS.items()):
            network = MemoryNetwork(rng=random.Random(number))
            reply = chat_tokenizer().encode(name + EOS, add_special_tokens=False)
            script = Script()
            script.reply = partial(_always, reply)
            roles = ROLES if name == "one" else {}
            cluster = await stack.enter_async_context(FakeCluster(network, roles, script))
            core = await stack.enter_async_context(run_core(network, cluster, QUICK, gateway_id=f"gw-{name}"))
            models.append(ServedModel(core=core, tokenizer=chat_tokenizer(), settings=settings))
        app = create_front(models, models[0].core.clock)
        transport = httpx.ASGITransport(app=app)
        async with app.router.lifespan_context(app):
            headers = {"authorization": "Bearer key"}
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway", headers=headers) as made:
                yield made


async def test_the_model_in_the_body_answers(client: httpx.AsyncClient) -> None:
    for name in ("one", "uno"):
        answer = await client.post("/v1/completions", json={"model": name, "prompt": "hello", "max_tokens": 20})
        assert answer.status_code == 200, answer.text
        assert (answer.json()["model"], answer.json()["choices"][0]["text"]) == (name, "one")
    limits = {
        name: (await client.post("/tokenize", json={"model": name, "prompt": "hello"})).json()["max_model_len"]
        for name in ("one", "two")
    }
    assert limits == {"one": 200, "two": 100}
    messages = [{"role": "user", "content": "hello"}]
    async with client.stream(
        "POST", "/v1/chat/completions", json={"model": "one", "messages": messages, "stream": True}
    ) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        assert "data: [DONE]" in (await stream.aread()).decode()


async def test_whoever_is_not_served_here_is_refused_as_ever(client: httpx.AsyncClient) -> None:
    unknown = await client.post("/v1/completions", json={"model": "three", "prompt": "hello"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["message"] == "the model 'three' is not served here"
    assert (await client.get("/v1/models/three")).status_code == 404
    unnamed = await client.post("/v1/completions", json={"prompt": "hello"})
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
    for body in (b"{", b"[]", b'{"model": 3, "prompt": "hello"}'):
        broken = await client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
        assert broken.status_code == 400, body


async def test_limits_and_keys_come_before_the_body_is_looked_at(client: httpx.AsyncClient) -> None:
    taken = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal taken
        while True:
            taken += 1
            yield b'{"model": "one", ' + b" " * 1000

    json_type = {"content-type": "application/json"}
    too_much = await client.post("/v1/completions", content=endless(), headers=json_type)
    assert too_much.status_code == 413
    assert taken <= 6
    taken = 0
    nobody = await client.post("/v1/completions", content=endless(), headers={**json_type, "authorization": "Bearer x"})
    assert (nobody.status_code, taken) == (401, 0)
    form = await client.post("/v1/completions", content=b"model=one", headers={"content-type": "text/plain"})
    assert form.status_code == 415


async def test_what_is_told_of_all(client: httpx.AsyncClient) -> None:
    listed = (await client.get("/v1/models")).json()["data"]
    assert [(entry["id"], entry["state"]) for entry in listed] == [
        ("one", "awake"),
        ("uno", "awake"),
        ("two", "asleep"),
    ]
    health = await client.get("/health", headers={"authorization": ""})
    assert (health.status_code, health.json()["status"]) == (200, "ok")
    assert {name: one["state"] for name, one in health.json()["models"].items()} == {"one": "awake", "two": "asleep"}
    answer = await client.post("/v1/completions", json={"model": "one", "prompt": "hello", "max_tokens": 20})
    timeline = await client.get(f"/v1/requests/{answer.json()['id']}/timeline")
    assert timeline.json()["outcome"] == "stop"
    assert (await client.get("/v1/requests/nothing/timeline")).status_code == 404


async def test_metrics_are_one_valid_page(client: httpx.AsyncClient) -> None:
    await client.post("/v1/completions", json={"model": "one", "prompt": "hello", "max_tokens": 20})
    text = (await client.get("/metrics")).text
    families = list(text_string_to_metric_families(text))
    names = [family.name for family in families]
    assert len(names) == len(set(names))
    assert all("model" in sample.labels for family in families for sample in family.samples)
    success = next(family for family in families if family.name == "tandem_request_success")
    counts = {sample.labels["model"]: sample.value for sample in success.samples if sample.name.endswith("_total")}
    assert counts == {"one": 1.0}
    running = next(family for family in families if family.name == "tandem_num_requests_running")
    assert {sample.labels["model"] for sample in running.samples} == {"one", "two"}


def test_a_model_without_workers_sleeps_only_where_it_may_and_is_heard_of() -> None:
    gone = HealthReport(ok=False, reason="no worker")
    assert state_of(HealthReport(ok=True, reason="serving"), may_sleep=True) == "awake"
    assert state_of(gone, may_sleep=True) == "asleep"
    assert state_of(gone, may_sleep=False) == "unavailable"
    assert state_of(replace(gone, is_heard=False), may_sleep=True) == "unavailable"


async def test_two_of_one_name_are_refused() -> None:
    network = MemoryNetwork(rng=random.Random(1))
    async with FakeCluster(network, ROLES, Script()) as cluster, run_core(network, cluster, QUICK) as core:
        same = ServedModel(core=core, tokenizer=chat_tokenizer(), settings=BASE)
        with pytest.raises(ConfigError, match="two models are served as 'm'"):
            create_front([same, same], core.clock)
