"""What must be refused: each with a small error object that names the fault, before a worker hears of it."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from contracts.errors import ConfigError, NoCapacity, WorkerUnavailable
from gateway.limits import GatewayLimits
from gateway.server import GatewaySettings, create_app
from tests.unit.gateway import tokenizers_for_tests as small

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from gateway.core import GatewayCore
    from tests.support.fake_backend import FakeCluster, Script

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
USER = [{"role": "user", "content": "hello"}]
JSON = {"content-type": "application/json"}
SETTINGS = GatewaySettings(served_model_names=("scripted",), max_model_len=200, port=0)


def check_error(response: httpx.Response, status: int, *, code: str | None = None) -> dict[str, Any]:
    """The error object; checks what holds for every one."""
    assert response.status_code == status, response.text
    assert len(response.content) <= 4096
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-request-id"]
    content = response.json()
    assert list(content) == ["error"]
    error: dict[str, Any] = content["error"]
    assert list(error) == ["message", "type", "param", "code"]
    assert error["message"]
    assert code in (None, error["code"])
    return error


WRONG_FIELDS: list[tuple[str, Any]] = [
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_tokens", "5"),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("max_tokens", 1e12),
    ("n", 0),
    ("n", 129),
    ("n", 10**30),
    ("temperature", -0.1),
    ("temperature", 3),
    ("temperature", "hot"),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_k", -2),
    ("min_p", 2),
    ("min_tokens", -1),
    ("min_tokens", 20),
    ("seed", 2**63),
    ("stop", ""),
    ("stop", ["a"] * 17),
    ("stop", "x" * 257),
    ("stop", [1]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", [10**6]),
    ("stop_token_ids", [1] * 129),
    ("logit_bias", {"1": 101}),
    ("logit_bias", {"one": 1}),
    ("logit_bias", {"1000000": 1}),
    ("logit_bias", {str(index): 1 for index in range(1025)}),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0),
    ("stream", "yes"),
    ("stream_options", 1),
    ("model", 3),
    ("logprobs", 21),
    ("suffix", "x"),
    ("best_of", 3),
    ("prompt", ""),
    ("prompt", []),
    ("prompt", [""]),
    ("prompt", [[]]),
    ("prompt", ["a", 1]),
    ("prompt", ["a", [1]]),
    ("prompt", [10**6]),
    ("prompt", [-1]),
    ("prompt", [1.5]),
    ("prompt", {"text": "a"}),
    ("prompt", None),
]


@pytest.mark.parametrize(("field", "value"), WRONG_FIELDS)
async def test_a_wrong_field_is_named(client: httpx.AsyncClient, field: str, value: object) -> None:
    response = await client.post(TEXT, json={"prompt": "x", field: value})
    error = check_error(response, 400)
    assert field in (error["param"] or "") or field in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("messages", None),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"content": "x"}]),
        ("messages", [{"role": "wizard", "content": "x"}]),
        ("messages", [{"role": "user", "content": 7}]),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": [{"type": "text"}]}]),
        ("top_logprobs", 2),
        ("top_logprobs", 99),
        ("logprobs", 3),
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("max_completion_tokens", 0),
        ("chat_template_kwargs", {"messages": []}),
    ],
)
async def test_a_wrong_chat_field_is_named(client: httpx.AsyncClient, field: str, value: object) -> None:
    error = check_error(await client.post(CHAT, json={"messages": USER, field: value}), 400)
    assert field in (error["param"] or "") or field in error["message"]


async def test_an_image_is_refused_clearly(client: httpx.AsyncClient) -> None:
    content = [{"type": "text", "text": "what is this?"}, {"type": "image_url", "image_url": {"url": "x"}}]
    body = {"messages": [{"role": "user", "content": content}]}
    error = check_error(await client.post(CHAT, json=body), 400)
    assert error["message"] == ("messages[0].content[1]: parts of type 'image_url' are not supported, only text")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'"x"',
        b'{"prompt": NaN}',
        b'{"prompt": "x", "temperature": Infinity}',
        b'{"prompt": "x", "temperature": 1e999}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\xed\xa0\x80"}',
        b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b'{"prompt": "x", "n": ' + b"9" * 10_000 + b"}",
        b'{"prompt": "x", "stop": [' + b'"a",' * 100_000 + b'"a"]}',
    ],
)
async def test_what_is_no_request(client: httpx.AsyncClient, body: bytes) -> None:
    check_error(await client.post(TEXT, content=body, headers=JSON), 400)


@pytest.mark.parametrize("path", [CHAT, TEXT])
async def test_errors_do_not_repeat_what_was_sent(client: httpx.AsyncClient, path: str) -> None:
    huge = "\x01" * 100_000
    body = {"model": huge, "prompt": "x", "messages": USER}
    check_error(await client.post(path, json=body), 404, code="not_found")
    body = {"prompt": "x", "messages": [{"role": huge, "content": "x"}], "stop_token_ids": huge}
    check_error(await client.post(path, json=body), 400)


async def test_a_prompt_longer_than_the_context(client: httpx.AsyncClient) -> None:
    error = check_error(await client.post(TEXT, json={"prompt": [5] * 300}), 400, code="context_length_exceeded")
    assert "200" in error["message"]
    assert "300" in error["message"]
    response = await client.post(TEXT, json={"prompt": [5] * 150, "max_tokens": 51})
    error = check_error(response, 400, code="context_length_exceeded")
    assert "150 and max_tokens asks for 51" in error["message"]
    check_error(await client.post(TEXT, json={"prompt": [5] * 200}), 400, code="context_length_exceeded")
    assert (await client.post(TEXT, json={"prompt": [5] * 199})).json()["usage"]["completion_tokens"] == 1


async def test_an_absurdly_long_text_is_refused_without_tokenising(client: httpx.AsyncClient) -> None:
    error = check_error(await client.post(TEXT, json={"prompt": "a" * 5_000_000}), 400, code="context_length_exceeded")
    assert "at least" in error["message"]


async def test_bodies_over_the_limit_are_not_read(client: httpx.AsyncClient) -> None:
    read = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal read
        while True:
            read += 1
            yield b" " * 65_536

    response = await client.post(TEXT, content=endless(), headers=JSON)
    check_error(response, 413, code="payload_too_large")
    assert read <= 8 * 1024 * 1024 // 65_536 + 2
    response = await client.post(TEXT, content=b"x", headers={**JSON, "content-length": str(10**7)})
    check_error(response, 413, code="payload_too_large")
    assert response.headers["connection"] == "close"


@pytest.mark.parametrize("content_type", ["text/plain", "", "application/x-www-form-urlencoded", "x" * 9000])
async def test_other_content_types(client: httpx.AsyncClient, content_type: str) -> None:
    response = await client.post(TEXT, content=b"{}", headers={"content-type": content_type})
    check_error(response, 415, code="unsupported_media_type")


async def test_unknown_paths_and_methods(client: httpx.AsyncClient) -> None:
    check_error(await client.get("/v1/nothing"), 404, code="not_found")
    response = await client.get(CHAT)
    check_error(response, 405, code="method_not_allowed")
    assert response.headers["allow"] == "POST"
    check_error(await client.get("/v1/requests/none/timeline"), 404, code="not_found")


@pytest.mark.parametrize("settings", [replace(SETTINGS, max_sequences=4, max_total_tokens=100)])
async def test_answers_of_one_request_are_bounded(client: httpx.AsyncClient, cluster: FakeCluster) -> None:
    error = check_error(await client.post(TEXT, json={"prompt": ["a", "b", "c"], "n": 2}), 400)
    assert "6 answers in one request, the limit is 4" in error["message"]
    error = check_error(await client.post(TEXT, json={"prompt": "a", "n": 4, "max_tokens": 26}), 400)
    assert "104 output tokens" in error["message"]
    assert not cluster.dispatches


@pytest.mark.parametrize("settings", [replace(SETTINGS, strict_fields=True)])
async def test_strict_fields_name_the_nearest(client: httpx.AsyncClient) -> None:
    error = check_error(await client.post(TEXT, json={"prompt": "a", "temprature": 1}), 400)
    assert error["message"] == "unknown field 'temprature' (did you mean 'temperature'?)"
    assert error["param"] == "temprature"
    error = check_error(await client.post(TEXT, json={"prompt": "a", "z" * 9000: 1}), 400)
    assert "did you mean" not in error["message"]
    assert (await client.post(TEXT, json={"prompt": "a", "user": "b"})).status_code == 200


@pytest.mark.parametrize("settings", [replace(SETTINGS, api_keys=("first", "sécret"))])
async def test_keys(client: httpx.AsyncClient) -> None:
    for path in ("/health", "/live", "/ready"):
        assert (await client.get(path)).status_code == 200
    for path in ("/v1/models", "/metrics", "/version", "/openapi.json", "/nothing", "/health/"):
        response = await client.get(path)
        check_error(response, 401, code="unauthorized")
        assert response.headers["www-authenticate"] == "Bearer"
    for wrong in ("Bearer", "Bearer x", "Bearer firs", "Basic first", "first", "Bearer first second"):
        check_error(await client.get("/v1/models", headers={"authorization": wrong}), 401)
    for right in ("first", "sécret"):
        headers = {b"authorization": f"Bearer {right}".encode()}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200
    # The check is on the path that is routed, not on one that a Host header could have a part in.
    check_error(await client.get("/v1/models", headers={"host": "gateway/health?"}), 401)


async def test_overload_says_when_to_come_back(client: httpx.AsyncClient, script: Script) -> None:
    script.rejection = ("no_capacity", "17 requests wait", 0.25)
    for stream in (True, False):
        response = await client.post(TEXT, json={"prompt": "a", "stream": stream})
        error = check_error(response, 429, code="no_capacity")
        assert (error["type"], error["message"]) == ("rate_limit_error", "17 requests wait")
        assert (response.headers["retry-after"], response.headers["retry-after-ms"]) == ("1", "250")
        assert response.headers["x-tandem-reason"] == "no_capacity"
    script.rejection = ("not_ready", "no decode worker", 2.0)
    response = await client.post(TEXT, json={"prompt": "a"})
    check_error(response, 503, code="not_ready")
    assert response.headers["retry-after"] == "2"


@pytest.mark.parametrize("limits", [GatewayLimits(max_open_requests=3)])
async def test_of_one_request_all_answers_start_or_none(
    client: httpx.AsyncClient, core: GatewayCore, cluster: FakeCluster
) -> None:
    check_error(await client.post(TEXT, json={"prompt": "a", "n": 4}), 429, code="no_capacity")
    await core.wait_idle()
    assert (await client.post(TEXT, json={"prompt": "a", "n": 3})).status_code == 200
    assert len(cluster.workers["prefill-0"].accepted) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_worker_that_refuses(client: httpx.AsyncClient, script: Script, stream: bool) -> None:
    script.prefill_error = NoCapacity("12 wait", retry_after_s=3.0)
    response = await client.post(TEXT, json={"prompt": "a", "stream": stream})
    error = check_error(response, 429)
    assert error["message"] == "prefill worker prefill-0 is full: 12 wait"
    assert response.headers["retry-after"] == "3"
    script.prefill_error = WorkerUnavailable("127.0.0.1:40001: connection reset")
    error = check_error(await client.post(TEXT, json={"prompt": "a", "stream": stream}), 503)
    assert "127.0.0.1" not in error["message"]


async def test_a_failure_after_the_first_byte_is_an_event(
    client: httpx.AsyncClient, cluster: FakeCluster, script: Script
) -> None:
    """Shown by a decode worker that dies while it is held; the openai client raises on this shape."""
    reply = small.chat_tokenizer().encode("one two three", add_special_tokens=False)

    def dies(request: object) -> list[int]:
        cluster.workers["decode-0"].kill()
        return reply

    script.reply = dies
    response = await client.post(CHAT, json={"messages": USER, "stream": True, "n": 2})
    if response.status_code == 503:
        check_error(response, 503, code="worker_unavailable")
        return
    *_, last, done, rest = response.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("worker_unavailable", "service_unavailable_error")
    assert "decode worker decode-0 was lost" in error["message"]
    assert '"finish_reason":"' not in response.text


async def test_a_bug_is_an_error_object_too(core: GatewayCore, client: httpx.AsyncClient) -> None:
    app = create_app(core, small.chat_tokenizer(), SETTINGS, core.clock)

    async def broken() -> None:
        raise ZeroDivisionError("a secret of the inside")

    app.add_api_route("/broken", broken, methods=["GET"])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://g") as other:
        error = check_error(await other.get("/broken"), 500, code="internal")
    assert "secret" not in error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("host", "0.0.0.0"),
        ("host", "192.168.1.1"),
        ("host", "example.org"),
        ("served_model_names", ()),
        ("served_model_names", ("",)),
        ("port", 70_000),
        ("api_keys", ("",)),
        ("max_model_len", 0),
        ("max_body_bytes", 0),
    ],
)
def test_settings_that_cannot_work_name_the_field(field: str, value: object) -> None:
    changes: dict[str, Any] = {field: value}
    with pytest.raises(ConfigError, match=field):
        replace(SETTINGS, **changes)


def test_listening_beyond_this_machine_needs_keys_or_a_decision() -> None:
    assert replace(SETTINGS, host="0.0.0.0", api_keys=("key",)).host == "0.0.0.0"
    assert replace(SETTINGS, host="::", allow_unauthenticated=True).host == "::"
    assert replace(SETTINGS, host="localhost").host == "localhost"
    assert replace(SETTINGS, host="::1").host == "::1"
