"""The probe finds out what a server takes, by asking a real one over a socket."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import asynccontextmanager
from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest

from contracts.errors import ConfigError
from loadtest.http.client import HttpClient
from loadtest.probe import ProbeResult, ServedModel, find_model, probe
from loadtest.prompts.bodies import BodyFields, Overhead
from loadtest.prompts.server_words import from_server
from loadtest.prompts.tokens import Vocabulary
from loadtest.settings import Endpoint, Limits, PromptForm, Target
from tests.support.layout import ROOT
from tests.support.raw_server import raw_server
from tests.support.scripted_server import Behaviour, Fault, FaultRule, serving

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.support.raw_server import Peer

QUICK = Behaviour(ttft_ms=0.5, itl_ms=0.1, natural_tokens=5)
ALL = BodyFields(return_token_ids=True)
REFUSED = ("ignore_eos", "stream_options", "return_token_ids", "prompt_ids")


@asynccontextmanager
async def client_of(behaviour: Behaviour) -> AsyncGenerator[tuple[HttpClient, str]]:
    async with serving(behaviour) as server:
        client = HttpClient(server.base_url, limits=Limits(connect_s=2, total_s=5), now_s=time.perf_counter)
        try:
            yield client, server.base_url
        finally:
            await client.close()


async def probed(
    behaviour: Behaviour,
    *,
    endpoint: Endpoint = "completions",
    form: PromptForm | None = None,
    fields: BodyFields = ALL,
    vocabulary: Vocabulary | None = None,
    has_text: bool = False,
    deadline_s: float = 5.0,
) -> ProbeResult:
    async with client_of(behaviour) as (client, base_url):
        model = await find_model(client, None, base_url=base_url)
        target = Target(name="a", base_url=base_url, model=model.name, endpoint=endpoint)
        return await probe(
            client,
            target,
            vocabulary or await from_server(client, model.name),
            form=form,
            fields=fields,
            has_chats=True,
            has_text=has_text,
            now_s=time.perf_counter,
            deadline_s=deadline_s,
        )


# --- what the server takes ----------------------------------------------------------------------------


async def test_a_server_that_takes_everything() -> None:
    result = await probed(QUICK)
    assert result == ProbeResult(
        form="ids",
        fields=ALL,
        overhead=Overhead(),
        notes=(),
    )


@pytest.mark.parametrize("refused", REFUSED)
async def test_what_is_refused_is_left_out_and_nothing_else(refused: str) -> None:
    result = await probed(replace(QUICK, refused_fields=frozenset({refused})))
    assert result.fields == BodyFields(
        ignore_eos=refused != "ignore_eos",
        include_usage=refused != "stream_options",
        return_token_ids=refused != "return_token_ids",
    )
    assert result.form == ("text" if refused == "prompt_ids" else "ids")
    assert "the server refuses " in result.notes[0]


async def test_a_server_that_takes_nothing_is_asked_plainly() -> None:
    result = await probed(replace(QUICK, refused_fields=frozenset(REFUSED)))
    assert result.form == "text"
    assert result.fields == BodyFields(ignore_eos=False, include_usage=False, return_token_ids=False)
    assert [note.partition(":")[0] for note in result.notes] == [
        "the server refuses prompts as token ids",
        "the server refuses stream_options",
        "the server refuses ignore_eos",
        "the server refuses return_token_ids",
        "the server reports no usage",
    ]


async def test_what_is_not_wanted_is_not_tried() -> None:
    wanted = BodyFields(ignore_eos=False, include_usage=True)
    result = await probed(replace(QUICK, refused_fields=frozenset({"ignore_eos"})), form="text", fields=wanted)
    assert (result.form, result.fields, result.notes) == ("text", wanted, ())


async def test_a_form_that_the_user_wants_is_not_given_up() -> None:
    with pytest.raises(ConfigError, match="/v1/completions: http_4xx: "):
        await probed(replace(QUICK, refused_fields=frozenset({"prompt_ids"})), form="ids")


async def test_text_of_the_workload_is_ids_only_to_a_tokenizer() -> None:
    """The server's words have ids, but what the chats say is of other words."""
    assert (await probed(QUICK, has_text=True)).form == "text"
    knowing = Vocabulary.from_file(ROOT / "engine" / "demo")
    assert (await probed(QUICK, has_text=True, vocabulary=knowing)).form == "ids"
    with pytest.raises(ConfigError, match="text as token ids needs the model's tokenizer"):
        await probed(QUICK, has_text=True, form="ids")


async def test_usage_that_does_not_come_is_noted() -> None:
    result = await probed(replace(QUICK, faults=(FaultRule(Fault.NO_USAGE, share=1.0),)))
    assert any("reports no usage" in note for note in result.notes)
    assert result.overhead == Overhead()


# --- lengths ------------------------------------------------------------------------------------------


async def test_what_a_chat_template_adds_is_measured() -> None:
    """This server adds its tokens once, however many messages there are."""
    result = await probed(replace(QUICK, chat_overhead_tokens=7), endpoint="chat")
    assert (result.form, result.overhead) == ("text", Overhead(prompt_tokens=7))
    assert result.notes == ()


async def test_words_that_are_several_tokens_are_noticed() -> None:
    guessed = replace(Vocabulary.assumed(), words=("new york",) * 20, openers=("new york",))
    result = await probed(QUICK, vocabulary=guessed)
    assert result.form == "text"
    assert result.notes == (
        "prompts are only about as long as asked: the server counts 64 and 192 tokens for 32 and 96 (common words)",
    )


async def test_words_of_the_server_are_its_tokens() -> None:
    async with client_of(QUICK) as (client, _):
        vocabulary = await from_server(client, "scripted")
    assert len(vocabulary.words) > 1000
    assert set(vocabulary.openers) <= set(vocabulary.words)
    assert min(vocabulary.ids) >= 1000, "as this server numbers them"


# --- no answer ----------------------------------------------------------------------------------------


async def test_the_models_of_a_server() -> None:
    async with client_of(QUICK) as (client, base_url):
        assert await find_model(client, None, base_url=base_url) == ServedModel("scripted", QUICK.max_model_len)
        assert (await find_model(client, "scripted", base_url=base_url)).name == "scripted"
        with pytest.raises(ConfigError, match=f"{base_url} serves scripted, not gpt"):
            await find_model(client, "gpt", base_url=base_url)


async def test_nobody_listens() -> None:
    async with serving(QUICK) as server:
        base_url = server.base_url
    client = HttpClient(base_url, limits=Limits(connect_s=2), now_s=time.perf_counter)
    with pytest.raises(ConfigError, match=rf"GET {base_url}/v1/models: refused"):
        await find_model(client, None, base_url=base_url)
    with pytest.raises(ConfigError, match="/tokenize cannot be asked: refused"):
        await from_server(client, "scripted")
    await client.close()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (Fault.RESET_BEFORE_STATUS, "reset_before_answer"),
        (Fault.HTML, "malformed_sse: content-type text/html"),
        (Fault.UNAVAILABLE, "http_5xx"),
        (Fault.NOT_FOUND, "http_4xx"),
        (Fault.REJECT_SECONDS, "rejected"),
        (Fault.ERROR_EVENT, "error_event"),
        (Fault.TRUNCATED, "truncated"),
    ],
)
async def test_a_server_that_does_not_answer_is_an_error_that_says_how(fault: Fault, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"POST http://127.0.0.1:\d+/v1/completions: {said}"):
        await probed(replace(QUICK, retry_after_s=3600, faults=(FaultRule(fault, share=1.0),)))


@pytest.mark.parametrize(
    ("retry_after", "num_asked"),
    [(b"", 1), (b"retry-after: 3600\r\n", 1), (b"retry-after: 0.1\r\n", 4)],
)
async def test_a_server_that_is_busy_is_asked_again_only_when_it_says_so(retry_after: bytes, num_asked: int) -> None:
    asked_s: list[float] = []

    async def serve(peer: Peer, number: int) -> None:
        while True:
            await peer.request()
            asked_s.append(time.perf_counter())
            await peer.write(b"HTTP/1.1 429 Too Many Requests\r\n%bcontent-length: 0\r\n\r\n" % retry_after)

    async with raw_server(serve) as base_url:
        client = HttpClient(base_url, limits=Limits(connect_s=2, total_s=5), now_s=time.perf_counter)
        with pytest.raises(ConfigError, match="rejected"):
            await probe(
                client,
                Target(name="busy", base_url=base_url, model="busy", endpoint="completions"),
                Vocabulary.assumed(),
                form=None,
                fields=BodyFields(),
                has_chats=False,
                has_text=False,
                now_s=time.perf_counter,
            )
        await client.close()
    assert len(asked_s) == num_asked
    assert all(later - earlier >= 0.1 for earlier, later in pairwise(asked_s))


async def test_a_server_that_never_answers_is_not_waited_for() -> None:
    with pytest.raises(ConfigError, match=r"timeout: no whole answer within 0\.2 s"):
        await probed(replace(QUICK, faults=(FaultRule(Fault.NEVER_ANSWERS, share=1.0),)), deadline_s=0.2)


# --- odd servers --------------------------------------------------------------------------------------


def odd_answer(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """No list of models, no system role, `max_completion_tokens`, and answers as long as it likes. Its template adds
    3 tokens to a prompt and 2 to each message."""
    if path != "/v1/chat/completions":
        return 404, {"error": {"message": "not here"}}
    if "max_tokens" in body:
        return 400, {"error": {"message": "max_tokens is not supported, use max_completion_tokens"}}
    if any(message["role"] == "system" for message in body["messages"]):
        return 400, {"error": {"message": "system role not supported"}}
    prompt_tokens = 3 + sum(2 + len(message["content"].split()) for message in body["messages"])
    return 200, {
        "choices": [{"delta": {"content": "a"}, "finish_reason": "stop"}],
        "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": 1},
    }


async def answer_oddly(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = next((int(line[15:]) for line in head.split("\r\n") if line.startswith("content-length:")), 0)
    body = await reader.readexactly(length)
    status, content = odd_answer(head.split()[1], json.loads(body or b"{}"))
    kind, text = ("text/event-stream", f"data: {json.dumps(content)}\n\ndata: [DONE]\n\n")
    if status != 200:
        kind, text = "application/json", json.dumps(content)
    writer.write(f"HTTP/1.1 {status} .\r\ncontent-type: {kind}\r\nconnection: close\r\n\r\n{text}".encode())
    writer.close()
    await writer.wait_closed()


async def test_an_odd_server_is_asked_as_it_wants_to_be() -> None:
    async with await asyncio.start_server(answer_oddly, "127.0.0.1", 0) as server:
        base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = HttpClient(base_url, limits=Limits(connect_s=2, total_s=5), now_s=time.perf_counter)
        with pytest.raises(ConfigError, match=r"/v1/models: status 404: not here"):
            await find_model(client, None, base_url=base_url)
        model = await find_model(client, "odd", base_url=base_url)
        assert model == ServedModel("odd", None)
        with pytest.raises(ConfigError, match="/tokenize answers with status 404"):
            await from_server(client, "odd")
        result = await probe(
            client,
            Target(name="odd", base_url=base_url, model="odd", endpoint="chat"),
            Vocabulary.assumed(),
            form=None,
            fields=BodyFields(),
            has_chats=True,
            has_text=False,
            now_s=time.perf_counter,
        )
        await client.close()
    assert result.fields == BodyFields(max_tokens_name="max_completion_tokens")
    assert result.overhead == Overhead(prompt_tokens=5, turn_tokens=4, system_tokens=None)
    assert result.notes == (
        "ignore_eos is without effect: 1 tokens answered, asked 16",
        "the server refuses system messages, they go into the first user's: system role not supported",
    )
