"""The scripted server keeps its schedule, says the truth about it, and does each fault as its name says."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import httptools
import pytest

from tests.support.scripted_server import Behaviour, Fault, FaultRule, ScriptedServer, serving, serving_process
from tests.support.scripted_server.asks import token_ids
from tests.support.scripted_server.script import REFUSABLE, FaultChooser

if TYPE_CHECKING:
    from collections.abc import Callable

QUICK = Behaviour(ttft_ms=4, itl_ms=1)
STREAM: dict[str, Any] = {"prompt": "one two three", "max_tokens": 4, "stream": True}
USAGE: dict[str, Any] = {"stream_options": {"include_usage": True}}


@dataclass
class Answer:
    raw: bytes
    was_reset: bool
    is_whole: bool
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def events(self) -> list[Any]:
        """The events' JSON; [DONE] as text."""
        lines = [line for line in self.body.decode().splitlines() if line.startswith("data: ")]
        return [text if (text := line[6:]) == "[DONE]" else json.loads(text) for line in lines]

    @property
    def text(self) -> str:
        choices = [choice for event in self.events if event != "[DONE]" for choice in event.get("choices", [])]
        return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)

    @property
    def usage(self) -> Any:
        return [event["usage"] for event in self.events if event != "[DONE]" and "usage" in event]

    @property
    def finish_reasons(self) -> list[str]:
        choices = [choice for event in self.events if event != "[DONE]" for choice in event.get("choices", [])]
        return [choice["finish_reason"] for choice in choices if choice.get("finish_reason")]


class _Reading:
    """Collects one response through httptools."""

    def __init__(self) -> None:
        self.is_whole = False
        self.headers: dict[str, str] = {}
        self.body = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        self.is_whole = True


async def connect(server: ScriptedServer) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    url = urlsplit(server.base_url)
    return await asyncio.open_connection(url.hostname, url.port)


def encode(path: str, document: dict[str, Any] | None, *, headers: str = "") -> bytes:
    body = b"" if document is None else json.dumps(document).encode()
    method = "GET" if document is None else "POST"
    return f"{method} {path} HTTP/1.1\r\nhost: x\r\n{headers}content-length: {len(body)}\r\n\r\n".encode() + body


async def read_answer(reader: asyncio.StreamReader) -> Answer:
    """Up to the end of the response, or of the connection."""
    reading, raw, was_reset, status = _Reading(), b"", False, 0
    parser = httptools.HttpResponseParser(reading)
    async with asyncio.timeout(20):
        while not reading.is_whole:
            try:
                data = await reader.read(1 << 16)
            except ConnectionResetError:
                was_reset = True
                break
            if not data:
                break
            raw += data
            try:
                parser.feed_data(data)
                status = parser.get_status_code()
            except httptools.HttpParserError:
                break
    return Answer(raw, was_reset, reading.is_whole, status, reading.headers, reading.body)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - the server has no events for tests
            await asyncio.sleep(0.001)


async def _to_the_end(reader: asyncio.StreamReader) -> None:
    while await reader.read(1 << 16):
        pass


async def ask(
    server: ScriptedServer, document: dict[str, Any] | None, path: str = "/v1/completions", *, headers: str = ""
) -> Answer:
    reader, writer = await connect(server)
    try:
        writer.write(encode(path, document, headers=headers))
        return await read_answer(reader)
    finally:
        writer.close()


async def ask_with(fault: Fault, **fields: Any) -> Answer:
    async with serving(QUICK) as server:
        return await ask(server, {**STREAM, **USAGE, "script": fault, **fields})


# --- answers ---


async def test_a_completion_is_streamed_token_by_token() -> None:
    async with serving(QUICK) as server:
        answer = await ask(server, {**STREAM, **USAGE}, headers="x-request-id: mine\r\n")
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(answer.text.split()) == 4
    assert answer.finish_reasons == ["length"]
    assert answer.usage == [{"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}]
    assert answer.events[-1] == "[DONE]"
    assert [entry.request_id for entry in server.log.entries] == ["mine"]


async def test_a_chat_opens_with_a_role_and_counts_the_words_of_all_messages() -> None:
    messages = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, chat_overhead_tokens=5)) as server:
        answer = await ask(
            server, {"messages": messages, "max_tokens": 2, "stream": True, **USAGE}, "/v1/chat/completions"
        )
    assert answer.events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert len(answer.text.split()) == 2
    assert answer.usage[0]["prompt_tokens"] == 3 + 5


async def test_prompts_are_token_ids_too_and_answers_show_theirs_when_asked() -> None:
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, tokens_per_chunk=3)) as server:
        answer = await ask(server, {**STREAM, "prompt": [5, 6], "max_tokens": 7, "return_token_ids": True} | USAGE)
    ids = [event["choices"][0]["token_ids"] for event in answer.events[:3]]
    assert [len(each) for each in ids] == [3, 3, 1]
    assert answer.usage[0] == {"prompt_tokens": 2, "completion_tokens": 7, "total_tokens": 9}
    assert list(server.log.entries[0].chunk_tokens) == [3, 3, 1]


async def test_a_request_that_is_no_stream_gets_one_object_after_the_whole_time() -> None:
    async with serving(QUICK) as server:
        answer = await ask(server, {"prompt": "a b", "max_tokens": 3})
    document = json.loads(answer.body)
    assert len(document["choices"][0]["text"].split()) == document["usage"]["completion_tokens"] == 3
    entry = server.log.entries[0]
    assert entry.chunk_s[0] >= entry.arrival_s + 0.006


@pytest.mark.parametrize(
    ("fields", "tokens", "reason"),
    [
        ({"max_tokens": 9}, 3, "stop"),
        ({"max_tokens": 9, "min_tokens": 5}, 5, "stop"),
        ({"max_tokens": 9, "ignore_eos": True}, 9, "length"),
        ({"max_tokens": 2}, 2, "length"),
    ],
)
async def test_answers_end_where_they_should(fields: dict[str, Any], tokens: int, reason: str) -> None:
    async with serving(Behaviour(ttft_ms=1, itl_ms=0.1, natural_tokens=3)) as server:
        answer = await ask(server, {**STREAM, **USAGE, **fields})
    assert (answer.usage[0]["completion_tokens"], answer.finish_reasons) == (tokens, [reason])


async def test_pages_beside_generation() -> None:
    async with serving(QUICK) as server:
        models = await ask(server, None, "/v1/models")
        health = await ask(server, None, "/health")
        tokenized = await ask(server, {"prompt": "old mill old"}, "/tokenize")
        metrics = await ask(server, None, "/metrics")
        nothing = await ask(server, None, "/v2")
    assert json.loads(models.body)["data"][0]["id"] == "scripted"
    assert health.status == 200
    assert json.loads(tokenized.body)["tokens"] == token_ids("old mill old")
    assert 'vllm:num_requests_running{model_name="scripted"} 0.0' in metrics.body.decode()
    assert nothing.status == 404


@pytest.mark.parametrize(
    ("fields", "status", "words"),
    [
        ({"model": "other"}, 404, "'other' does not exist"),
        ({"prompt": ""}, 400, "prompt is empty"),
        ({"prompt": [1, -2]}, 400, "token ids"),
        ({"prompt": [[1], [2]]}, 400, "token ids"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 200_000}, 400, "131072 is the most"),
        ({"n": 2}, 400, "n=1"),
        ({"stream_options": True}, 400, "must be an object"),
        ({"script": "nonsense"}, 400, "names no fault"),
    ],
)
async def test_what_is_wrong_with_a_request_is_said(fields: dict[str, Any], status: int, words: str) -> None:
    async with serving(QUICK) as server:
        answer = await ask(server, {**STREAM, **fields})
    assert answer.status == status
    assert words in json.loads(answer.body)["error"]["message"]


@pytest.mark.parametrize("name", REFUSABLE)
async def test_fields_that_are_refused_are_named(name: str) -> None:
    fields: dict[str, Any] = {"prompt": [1]} if name == "prompt_ids" else {name: {}}
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, refused_fields=frozenset({name}))) as server:
        refused = await ask(server, {**STREAM, **fields})
        taken = await ask(server, STREAM)
    assert refused.status == 400
    assert ("prompt" if name == "prompt_ids" else name) in json.loads(refused.body)["error"]["message"]
    assert taken.status == 200


# --- the schedule ---


async def test_chunks_keep_an_absolute_schedule() -> None:
    """Never early; and late only where the machine was busy, which most chunks and the last ones are not."""
    behaviour = Behaviour(ttft_ms=30, itl_ms=2.5)
    async with serving(behaviour) as server:
        await asyncio.gather(*(ask(server, {**STREAM, "max_tokens": 40}) for _ in range(5)))
    late_s = [
        [chunk_s - entry.arrival_s - (0.030 + 0.0025 * index) for index, chunk_s in enumerate(entry.chunk_s)]
        for entry in server.log.entries
    ]
    assert [len(each) for each in late_s] == [40] * 5
    assert min(map(min, late_s)) > -1e-6
    assert median(value for each in late_s for value in each) < 0.002
    assert min(min(each[-10:]) for each in late_s) < 0.002


async def test_who_comes_when_all_places_are_taken_waits_for_the_first_that_leaves() -> None:
    """Two places, 10 ms each: the third and fourth start when the first and second end."""
    async with serving(Behaviour(ttft_ms=10, itl_ms=1, max_running=2)) as server:
        asking = asyncio.gather(*(ask(server, {**STREAM, "max_tokens": 1}) for _ in range(4)))
        await until(lambda: server.log.num_requests == 4)
        assert (server.num_running, server.num_waiting) == (2, 2)
        await asking
        assert (server.num_running, server.num_waiting) == (0, 0)
    first, second, third, fourth = server.log.entries
    assert third.start_s == pytest.approx(first.start_s + 0.010)
    assert fourth.start_s == pytest.approx(second.start_s + 0.010)


async def test_a_client_that_leaves_gives_its_place_away() -> None:
    async with serving(Behaviour(ttft_ms=10_000, max_running=1)) as server:
        _, writer = await connect(server)
        _, waiting = await connect(server)
        writer.write(encode("/v1/completions", STREAM))
        await until(lambda: server.num_running == 1)
        waiting.write(encode("/v1/completions", STREAM))
        await until(lambda: server.num_waiting == 1)
        first, second = server.log.entries
        writer.close()
        await until(lambda: server.num_waiting == 0)
        assert first.left_s > first.arrival_s
        assert second.start_s >= first.left_s
        waiting.close()


async def test_the_log_is_served_and_forgets_the_oldest() -> None:
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, max_log_entries=2)) as server:
        for _ in range(3):
            await ask(server, STREAM)
        served = json.loads((await ask(server, None, "/script/log")).body)
    assert (served["num_requests"], served["num_forgotten"], served["num_connections"]) == (3, 1, 4)
    assert [entry["number"] for entry in served["requests"]] == [1, 2]
    entry = served["requests"][0]
    assert entry["arrival_s"] == entry["start_s"] <= entry["headers_s"] < entry["chunk_s"][0] < entry["end_s"]
    assert (entry["left_s"], entry["fault"]) == (None, None)


def test_as_a_process_it_says_where_it_listens_and_dies_with_the_block() -> None:
    with serving_process("--ttft-ms", "1", "--fault", "html@0") as base_url:
        port = urlsplit(base_url).port

        async def first() -> bytes:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(encode("/v1/completions", STREAM))
            answer = await read_answer(reader)
            writer.close()
            return answer.body

        assert asyncio.run(first()).startswith(b"<html>")
    with pytest.raises(ConnectionRefusedError):
        asyncio.run(first())


# --- faults ---


@pytest.mark.parametrize("fault", [Fault.RESET_BEFORE_STATUS, Fault.RESET_MID_STREAM])
async def test_resets_are_resets(fault: Fault) -> None:
    answer = await ask_with(fault)
    assert answer.was_reset
    assert not answer.is_whole
    assert (answer.status == 200) == (fault is Fault.RESET_MID_STREAM)
    assert len(answer.text.split()) == (2 if fault is Fault.RESET_MID_STREAM else 0)


@pytest.mark.parametrize(
    ("fault", "status", "words"),
    [
        (Fault.UNAVAILABLE, 503, "no worker"),
        (Fault.SERVER_ERROR, 500, "engine"),
        (Fault.NOT_FOUND, 404, "no such page"),
        (Fault.HTML, 200, "<html>"),
    ],
)
async def test_answers_that_are_no_stream(fault: Fault, status: int, words: str) -> None:
    answer = await ask_with(fault)
    assert answer.is_whole
    assert answer.status == status
    assert words in answer.body.decode()
    assert "event-stream" not in answer.headers["content-type"]


async def test_rejections_say_when_to_come_again() -> None:
    seconds, date = await ask_with(Fault.REJECT_SECONDS), await ask_with(Fault.REJECT_DATE)
    assert seconds.status == date.status == 429
    assert seconds.headers["retry-after"] == "1"
    assert date.headers["retry-after"].endswith(" GMT")
    assert date.headers["retry-after"] != date.headers["date"]


@pytest.mark.parametrize("fault", [Fault.NEVER_ANSWERS, Fault.STALLS])
async def test_hangs_last_until_the_client_leaves(fault: Fault) -> None:
    async with serving(QUICK) as server:
        reader, writer = await connect(server)
        writer.write(encode("/v1/completions", {**STREAM, "script": fault}))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(_to_the_end(reader), 0.05)
        assert server.num_running == 1
        assert len(server.log.entries[0].chunk_s) == (0 if fault is Fault.NEVER_ANSWERS else 2)
        writer.close()
        await until(lambda: server.num_running == 0)


async def test_streams_that_go_wrong_in_the_middle() -> None:
    truncated = await ask_with(Fault.TRUNCATED)
    assert truncated.is_whole
    assert not truncated.finish_reasons
    assert "[DONE]" not in truncated.events
    sse = await ask_with(Fault.MALFORMED_SSE)
    assert b"\n<b>502 Bad Gateway</b>\n" in sse.body
    broken = await ask_with(Fault.MALFORMED_JSON)
    with pytest.raises(json.JSONDecodeError):
        _ = broken.events
    error = await ask_with(Fault.ERROR_EVENT)
    assert error.status == 200
    assert error.events[-2]["error"]["message"] == "the engine has died"
    assert all(len(answer.text.split()) == 2 for answer in (truncated, sse))


async def test_answers_that_lack_something() -> None:
    assert (await ask_with(Fault.NO_USAGE)).usage == []
    no_done = await ask_with(Fault.NO_DONE)
    assert no_done.is_whole
    assert no_done.finish_reasons == ["length"]
    assert "[DONE]" not in no_done.events
    cut = await ask_with(Fault.NO_LAST_CHUNK)
    assert not cut.is_whole
    assert not cut.was_reset
    assert cut.events[-1] == "[DONE]"
    empty = await ask_with(Fault.EMPTY_ANSWER)
    assert (empty.text, empty.finish_reasons, empty.usage[0]["completion_tokens"]) == ("", ["length"], 0)
    malformed = await ask_with(Fault.MALFORMED_HTTP)
    assert malformed.raw.startswith(b"SIP/2.0")


@pytest.mark.parametrize(
    "fault",
    [Fault.SLOW_HEADERS, Fault.COMMENTS, Fault.CRLF, Fault.USAGE_IN_EVERY_CHUNK, Fault.BYTE_BY_BYTE],
)
async def test_odd_answers_are_whole(fault: Fault) -> None:
    answer = await ask_with(fault)
    plain = await ask_with(Fault.NO_USAGE)
    assert answer.is_whole
    assert (answer.text, answer.finish_reasons, answer.events[-1]) == (plain.text, ["length"], "[DONE]")
    assert answer.usage[-1]["completion_tokens"] == 4
    assert (b"\n: keep-alive\n" in b"\n" + answer.body) == (fault is Fault.COMMENTS)
    assert (b"]\r\n\r\n" in answer.body) == (fault is Fault.CRLF)
    assert len(answer.usage) == (5 if fault is Fault.USAGE_IN_EVERY_CHUNK else 1)


async def test_connections_are_broken_at_accept_by_their_number() -> None:
    rule = FaultRule.parse("close_at_accept@1")
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, faults=(rule,))) as server:
        first, second, third = [await ask(server, STREAM) for _ in range(3)]
    assert (first.status, second.status, third.status) == (200, 0, 200)
    assert second.was_reset
    assert server.log.num_requests == 2


async def test_idle_connections_are_closed_and_used_ones_kept() -> None:
    async with serving(Behaviour(ttft_ms=1, itl_ms=1, idle_close_ms=30)) as server:
        reader, writer = await connect(server)
        for _ in range(2):
            writer.write(encode("/v1/completions", STREAM))
            assert (await read_answer(reader)).is_whole
        async with asyncio.timeout(5):
            assert await reader.read() == b""
        writer.close()
        assert server.log.num_connections == 1
        assert server.num_open_connections == 0


async def test_who_sends_the_next_request_too_early_is_cut_off() -> None:
    async with serving(Behaviour(ttft_ms=10_000)) as server:
        reader, writer = await connect(server)
        writer.write(encode("/v1/completions", STREAM))
        await until(lambda: server.num_running == 1)
        writer.write(encode("/v1/completions", STREAM))
        answer = await read_answer(reader)
        assert not answer.is_whole
        writer.close()


# --- the choice ---


def test_rules_are_read() -> None:
    assert FaultRule.parse("html@0,3-5") == FaultRule(Fault.HTML, numbers=frozenset({0, 3, 4, 5}))
    assert FaultRule.parse("html=0.25") == FaultRule(Fault.HTML, share=0.25)
    for text in ("html", "nonsense=0.1", "html=2", "html@a"):
        with pytest.raises(ValueError, match=r"fault|share|invalid"):
            FaultRule.parse(text)


def test_shares_are_met_and_a_seed_repeats_itself() -> None:
    rules = (
        FaultRule(Fault.HTML, share=0.2),
        FaultRule(Fault.STALLS, share=0.1),
        FaultRule(Fault.CRLF, frozenset({7})),
    )
    drawn = [
        [chooser.choose(number) for number in range(5000)] for chooser in (FaultChooser(rules, 3) for _ in range(2))
    ]
    assert drawn[0] == drawn[1]
    assert drawn[0][7] is Fault.CRLF
    assert drawn[0].count(Fault.HTML) == pytest.approx(1000, abs=120)
    assert drawn[0].count(Fault.STALLS) == pytest.approx(500, abs=90)
