"""The app on a real socket: the openai client, disconnects at every stage, slow clients, start and stop."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import openai
import pytest

from contracts.errors import ConfigError
from gateway.limits import GatewayLimits
from gateway.server import GatewaySettings, bind, create_app, serve
from tests.unit.gateway import tokenizers_for_tests as small

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

    from fastapi import FastAPI

    from gateway.core import GatewayCore
    from tests.support.fake_backend import FakeCluster, Script, Stage

USER = [{"role": "user", "content": "hello"}]
SETTINGS = GatewaySettings(served_model_names=("scripted",), max_model_len=1000, port=0, graceful_stop_s=1.0)


@pytest.fixture
def settings() -> GatewaySettings:
    return SETTINGS


@dataclass
class Served:
    port: int
    task: asyncio.Task[None]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"


@asynccontextmanager
async def serving(app: FastAPI, settings: GatewaySettings) -> AsyncGenerator[Served]:
    sock = bind(settings)
    task = asyncio.create_task(serve(app, settings, sock))
    try:
        yield Served(sock.getsockname()[1], task)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


@pytest.fixture
async def served(app: FastAPI, settings: GatewaySettings) -> AsyncIterator[Served]:
    async with serving(app, settings) as served:
        yield served


@pytest.fixture
async def client(served: Served) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
        yield client


def says(script: Script, text: str) -> None:
    reply = small.chat_tokenizer().encode(text + small.EOS, add_special_tokens=False)
    script.reply = lambda _: reply


class RawClient:
    """HTTP by hand, to leave in the middle of it."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def post(self, path: str, body: bytes, *, num_bytes: int | None = None) -> None:
        """`num_bytes`: the length announced, where it is not the body's."""
        length = len(body) if num_bytes is None else num_bytes
        self.writer.write(f"POST {path} {HEAD}content-length: {length}\r\n\r\n".encode() + body)
        await self.writer.drain()

    async def head(self) -> str:
        return (await self.reader.readuntil(b"\r\n\r\n")).decode()

    async def leave(self) -> None:
        self.writer.transport.abort()
        with contextlib.suppress(ConnectionError):
            await self.writer.wait_closed()


HEAD = "HTTP/1.1\r\nhost: g\r\ncontent-type: application/json\r\n"


@asynccontextmanager
async def connect(served: Served, *, limit: int = 2**20) -> AsyncGenerator[RawClient]:
    """`limit`: bytes that are taken from the socket ahead of reading."""
    sock = socket.create_connection(("127.0.0.1", served.port))
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, min(limit, 2**16))
    client = RawClient(*await asyncio.open_connection(sock=sock, limit=limit))
    try:
        yield client
    finally:
        await client.leave()


def chat(**fields: Any) -> bytes:
    return json.dumps({"messages": USER, **fields}).encode()


async def test_the_openai_client_streams_a_chat(client: openai.AsyncOpenAI, script: Script) -> None:
    says(script, "Hello there, né 😀")
    stream = await client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "hello"}],
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
    )
    chunks = [chunk async for chunk in stream]
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    assert "".join(choice.delta.content or "" for choice in choices) == "Hello there, né 😀"
    assert choices[-1].finish_reason == "stop"
    usage = chunks[-1].usage
    assert usage is not None
    logprobs = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert len(logprobs) == usage.completion_tokens


async def test_the_openai_client_reads_whole_answers(client: openai.AsyncOpenAI, script: Script) -> None:
    says(script, "Hello there")
    answer = await client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "hello"}], n=2
    )
    assert [choice.message.content for choice in answer.choices] == ["Hello there"] * 2
    completion = await client.completions.create(model="scripted", prompt="x", logprobs=1)
    assert completion.choices[0].text == "Hello there"
    assert [model.id async for model in client.models.list()] == ["scripted"]


async def test_the_openai_client_knows_our_errors(client: openai.AsyncOpenAI, script: Script) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        await client.completions.create(model="none", prompt="x")
    assert (missing.value.code, missing.value.param) == ("not_found", "model")
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
        await client.completions.create(model="scripted", prompt="x", max_tokens=0)
    script.rejection = ("no_capacity", "full", 1.5)
    with pytest.raises(openai.RateLimitError) as full:
        await client.completions.create(model="scripted", prompt="x")
    assert full.value.response.headers["retry-after-ms"] == "1500"


async def test_the_openai_client_raises_when_a_stream_fails(
    client: openai.AsyncOpenAI, script: Script, cluster: FakeCluster
) -> None:
    says(script, "one two three")
    cluster.gates.close(3)
    stream = await client.completions.create(model="scripted", prompt="x", stream=True)
    await cluster.gates.reached(3)
    cluster.workers["decode-0"].kill()
    with pytest.raises(openai.APIError, match="decode worker decode-0 was lost after") as lost:
        [chunk async for chunk in stream]
    assert lost.value.code == "worker_unavailable"


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("stage", ["dispatch", "prefill", 0, 1, 4])
async def test_a_client_that_leaves_is_cancelled_at_once_at_every_stage(
    served: Served, core: GatewayCore, cluster: FakeCluster, stage: Stage, stream: bool
) -> None:
    cluster.gates.close(stage)
    if stage == "prefill":
        cluster.gates.close(0)
    async with connect(served) as raw:
        await raw.post("/v1/chat/completions", chat(stream=stream, max_tokens=500))
        await cluster.gates.reached(stage)
    async with asyncio.timeout(5):
        if stage == "prefill":
            # Cancel must not overtake Prefill, so it waits for the worker's answer.
            cluster.gates.open("prefill")
        await core.wait_idle()
        if stage != "dispatch":
            for worker in cluster.workers.values():
                await worker.wait_cancelled()
    assert not cluster.workers["prefill-0"].num_answering


async def test_a_10_mb_body_is_refused_while_it_is_sent(served: Served) -> None:
    async with connect(served) as raw:
        await raw.post("/v1/completions", b"", num_bytes=10_000_000)
        assert (await raw.head()).startswith("HTTP/1.1 413 ")


@pytest.mark.parametrize("settings", [replace(SETTINGS, max_body_bytes=100_000)])
async def test_an_unannounced_long_body_is_refused_before_its_end(served: Served) -> None:
    chunk = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
    async with connect(served) as raw:
        raw.writer.write(f"POST /tokenize {HEAD}transfer-encoding: chunked\r\n\r\n".encode() + chunk * 4)
        assert (await raw.head()).startswith("HTTP/1.1 413 ")


@pytest.mark.parametrize("settings", [replace(SETTINGS, body_timeout_s=0.05)])
async def test_a_body_that_does_not_come_is_refused(served: Served) -> None:
    async with connect(served) as raw:
        await raw.post("/tokenize", b"{", num_bytes=100)
        assert (await raw.head()).startswith("HTTP/1.1 400 ")


async def test_a_client_that_leaves_within_its_body(served: Served, cluster: FakeCluster) -> None:
    async with connect(served) as raw:
        await raw.post("/v1/completions", b'{"prompt"', num_bytes=100)
    async with connect(served) as raw:
        await raw.post("/v1/completions", b'{"prompt": "x"}')
        assert (await raw.head()).startswith("HTTP/1.1 200 ")
    assert len(cluster.dispatches) == 1


@pytest.mark.parametrize("settings", [replace(SETTINGS, keep_alive_s=0.02)])
async def test_a_silent_stream_is_kept_alive(served: Served, cluster: FakeCluster) -> None:
    cluster.gates.close(0)
    async with connect(served) as raw:
        await raw.post("/v1/chat/completions", chat(stream=True, max_tokens=2))
        assert (await raw.head()).startswith("HTTP/1.1 200 ")
        assert b": keep-alive\n" in await raw.reader.readuntil(b"keep-alive\n")
        cluster.gates.open(0)
        assert b'"finish_reason":"length"' in await raw.reader.readuntil(b"[DONE]")


@pytest.mark.parametrize("settings", [replace(SETTINGS, max_model_len=9000, write_timeout_s=0.05)])
@pytest.mark.parametrize("limits", [GatewayLimits(max_buffered_tokens=200)])
async def test_a_client_that_reads_nothing_is_cut_off(
    served: Served, core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    """20 logprobs with each token make its 8,000 tokens more than sockets hold."""
    script.tokens_per_frame = 100
    async with connect(served, limit=1024) as raw:
        body = chat(stream=True, max_tokens=8000, logprobs=True, top_logprobs=20)
        await raw.post("/v1/chat/completions", body)
        await cluster.workers["decode-0"].wait_cancelled()
        await core.wait_idle()
        async with connect(served) as other:
            await other.post("/v1/completions", b'{"prompt": "x"}')
            assert (await other.head()).startswith("HTTP/1.1 200 ")


@pytest.mark.parametrize("settings", [replace(SETTINGS, write_timeout_s=0.02)])
async def test_a_connection_that_stays_full_is_given_up(
    app: FastAPI, core: GatewayCore, cluster: FakeCluster, script: Script
) -> None:
    says(script, "one two three four")
    forever = asyncio.Event()
    body = chat(stream=True, max_tokens=500)
    requests = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Any:
        if not requests:
            await forever.wait()
        return requests.pop()

    async def send(message: Any) -> None:
        if message["type"] == "http.response.body":
            await forever.wait()

    path = "/v1/chat/completions"
    headers = [(b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
    cluster.gates.close(3)
    await app(scope, receive, send)
    await core.wait_idle()
    await cluster.workers["decode-0"].wait_cancelled()


async def test_hostile_heads(served: Served) -> None:
    for head in (
        b"GET / HTTP/1.1\r\nhost: g\r\nx: " + b"y" * 200_000 + b"\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /../../etc/passwd HTTP/1.1\r\nhost: g\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: -5\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nhost: g\r\ncontent-length: 99999999999999999999\r\n\r\n",
    ):
        async with connect(served) as raw:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                raw.writer.write(head)
                assert (await raw.head()).split()[1].startswith("4")


def test_a_port_in_use_is_named() -> None:
    with contextlib.closing(bind(SETTINGS)) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port}: Address already in use"):
            bind(replace(SETTINGS, port=port))


def test_an_address_of_another_machine_is_named() -> None:
    settings = replace(SETTINGS, host="192.0.2.1", allow_unauthenticated=True)
    with pytest.raises(ConfigError, match=r"cannot listen on 192\.0\.2\.1:0"):
        bind(settings)


async def test_stopping_lets_an_answer_end(app: FastAPI, cluster: FakeCluster, settings: GatewaySettings) -> None:
    cluster.gates.close(2)
    async with serving(app, settings) as served, connect(served) as raw:
        await raw.post("/v1/chat/completions", chat(stream=True, max_tokens=4))
        await cluster.gates.reached(2)
        served.task.cancel()
        cluster.gates.open(2)
        assert b'"finish_reason":"length"' in await raw.reader.readuntil(b"[DONE]")
        await raw.leave()
        with pytest.raises(asyncio.CancelledError):
            await served.task


async def test_two_gateways_in_one_process(core: GatewayCore, settings: GatewaySettings) -> None:
    """Nothing is global: each has its own metrics, keys and port."""
    apps = [create_app(core, small.chat_tokenizer(), settings, core.clock) for _ in range(2)]
    async with serving(apps[0], settings) as one, serving(apps[1], settings) as two:
        for served in (one, two):
            async with openai.AsyncOpenAI(base_url=served.url, api_key="any", max_retries=0) as client:
                answer = await client.completions.create(model="scripted", prompt="x", max_tokens=2)
                assert answer.usage is not None
                assert answer.usage.completion_tokens == 2
