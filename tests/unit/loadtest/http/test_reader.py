"""What the answer reader writes into a record, event by event."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from loadtest.http.reader import AnswerReader
from loadtest.http.refusals import MAX_BODY_BYTES, MAX_DETAIL_CHARS
from loadtest.record import Outcome, RequestRecord

STREAM = {"content-type": "text/event-stream; charset=utf-8"}
DONE = b"data: [DONE]\n\n"


class Exchange:
    """A reader, and a clock that stands at 1.0 and is moved by hand."""

    def __init__(self, *, cancel_after_tokens: int | None = None, keep_text: bool = False) -> None:
        self.now_s = 1.0
        self.record = RequestRecord(
            index=0,
            item=0,
            turn=0,
            slo_class="default",
            prompt_tokens=8,
            output_tokens=4,
            cancel_after_tokens=cancel_after_tokens,
        )
        self.reader = AnswerReader(self.record, now_s=lambda: self.now_s, keep_text=keep_text)

    def stream(self, *bodies: bytes, complete: bool = True) -> RequestRecord:
        """A 200 at 1.0 s, then a body each second, then the end of the response."""
        self.reader.on_status(200, STREAM)
        for body in bodies:
            self.now_s += 1.0
            self.reader.on_body(body)
        self.now_s += 1.0
        if complete:
            self.reader.on_complete()
        return self.record

    def refuse(self, status: int, body: bytes, **headers: str) -> RequestRecord:
        self.reader.on_status(status, {name.replace("_", "-"): value for name, value in headers.items()})
        if body:
            self.reader.on_body(body)
        self.reader.on_complete()
        return self.record


def event(**fields: Any) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def text(words: str, finish: str | None = None, **fields: Any) -> bytes:
    return event(choices=[{"index": 0, "text": words, "logprobs": None, "finish_reason": finish, **fields}], usage=None)


def chat(finish: str | None = None, **delta: Any) -> bytes:
    return event(choices=[{"index": 0, "delta": delta, "finish_reason": finish}])


def usage(prompt: int, output: int, **details: int) -> bytes:
    return event(
        choices=[],
        usage={"prompt_tokens": prompt, "completion_tokens": output, "prompt_tokens_details": details or None},
    )


def test_a_chat_answer_with_everything() -> None:
    exchange = Exchange(keep_text=True)
    record = exchange.stream(
        chat(role="assistant", content=""),
        chat(content="Hello"),
        chat(content=" there"),
        chat(finish="length"),
        usage(8, 2, cached_tokens=4),
        DONE,
    )
    assert record.outcome is Outcome.FINISHED
    assert record.headers_s == 1.0
    # Neither the role, nor the finish_reason, nor usage is a token.
    assert list(record.chunk_s) == [3.0, 4.0]
    assert record.end_s == 7.0
    assert record.finish_reason == "length"
    assert (record.usage_prompt_tokens, record.usage_output_tokens, record.usage_cached_tokens) == (8, 2, 4)
    assert record.counted_output_tokens is None
    assert record.detail == ""
    assert exchange.reader.answer == ("Hello there", None, 2)


def test_a_completion_whose_last_token_comes_with_the_finish_reason() -> None:
    record = Exchange().stream(text(" a"), text(" b", "stop"), DONE)
    assert (record.outcome, list(record.chunk_s), record.finish_reason) == (Outcome.FINISHED, [2.0, 3.0], "stop")
    assert (record.usage_prompt_tokens, record.usage_output_tokens, record.usage_cached_tokens) == (None, None, None)


def test_all_events_of_one_read_have_the_time_of_the_read() -> None:
    record = Exchange().stream(text(" a") + text(" b") + text(" c", "stop") + DONE)
    assert list(record.chunk_s) == [2.0, 2.0, 2.0]


@pytest.mark.parametrize(
    "body",
    [
        chat(content="x"),
        chat(reasoning_content="x"),
        chat(reasoning="x"),
        chat(tool_calls=[{"index": 0, "function": {"arguments": "{"}}]),
        # Some servers repeat the role with every token.
        chat(role="assistant", content="x"),
        chat(finish="stop", content="x"),
        # Text is held back until it is whole characters, or no stop string.
        chat(content=""),
        chat(),
        text(""),
        text("", token_ids=[5]),
        text("", "length", token_ids=[5]),
        event(choices=[{"text": ""}, {"text": "x"}]),
    ],
)
def test_chunks_that_carry_tokens(body: bytes) -> None:
    assert list(Exchange().stream(body, DONE).chunk_s) == [2.0]


@pytest.mark.parametrize(
    "body",
    [
        chat(role="assistant", content=""),
        chat(role="assistant", content=None),
        chat(finish="stop"),
        chat(finish="stop", content=""),
        text("", "length"),
        text("", token_ids=[]),
        # The opening of a server that was asked for the prompt's ids.
        text("", prompt_token_ids=[1, 2]),
        usage(8, 0),
        event(choices=None),
        event(choices=[{"index": 0}]),
        event(id="x"),
        b": keep-alive\n\n",
    ],
)
def test_chunks_that_carry_none(body: bytes) -> None:
    record = Exchange().stream(body, DONE)
    assert list(record.chunk_s) == []
    assert record.outcome is Outcome.NO_OUTPUT
    assert record.counted_output_tokens is None


def test_tokens_are_counted_where_every_chunk_tells_its_ids() -> None:
    exchange = Exchange(keep_text=True)
    record = exchange.stream(
        text("", prompt_token_ids=[1, 2]), text(" a", token_ids=[7]), text(" b c", "length", token_ids=[8, 9]), DONE
    )
    assert record.counted_output_tokens == 3
    assert exchange.reader.answer == (" a b c", (7, 8, 9), None)


def test_tokens_are_not_counted_where_one_chunk_does_not_tell() -> None:
    exchange = Exchange(keep_text=True)
    record = exchange.stream(text(" a", token_ids=[7]), text(" b", "stop", token_ids=None), DONE)
    assert record.counted_output_tokens is None
    assert exchange.reader.answer == (" a b", None, None)


def test_text_is_kept_only_when_asked_for() -> None:
    exchange = Exchange()
    exchange.stream(text(" a", "stop", token_ids=[7]), DONE)
    assert exchange.reader.answer == ("", None, None)


def test_of_usage_in_every_chunk_the_last_counts() -> None:
    def told(words: str, output: int) -> bytes:
        return event(choices=[{"text": words}], usage={"prompt_tokens": 8, "completion_tokens": output})

    record = Exchange().stream(told(" a", 1), told(" b", 2), told(" c", 3), DONE)
    assert (record.usage_output_tokens, len(record.chunk_s)) == (3, 3)


def test_the_body_ends_after_finish_reason_without_done() -> None:
    record = Exchange().stream(text(" a", "stop"))
    assert (record.outcome, record.end_s) == (Outcome.FINISHED, 3.0)


def test_the_body_ends_without_finish_reason_and_done() -> None:
    record = Exchange().stream(text(" a"))
    assert (record.outcome, list(record.chunk_s), record.end_s) == (Outcome.TRUNCATED, [2.0], 3.0)
    assert "finish_reason" in record.detail


@pytest.mark.parametrize("outcome", [Outcome.RESET_MID_STREAM, Outcome.TIMEOUT, Outcome.INTERRUPTED])
def test_lost_in_mid_answer_even_after_finish_reason(outcome: Outcome) -> None:
    exchange = Exchange()
    exchange.stream(text(" a", "stop"), complete=False)
    exchange.reader.on_lost(outcome, "why")
    assert (exchange.record.outcome, exchange.record.detail) == (outcome, "why")
    assert exchange.reader.is_done


def test_after_done_nothing_changes_the_record() -> None:
    exchange = Exchange()
    record = exchange.stream(text(" a", "stop"), DONE + text(" b") + b"<html>\n", complete=False)
    exchange.reader.on_lost(Outcome.RESET_MID_STREAM, "why")
    exchange.reader.on_complete()
    assert (record.outcome, record.detail, list(record.chunk_s), record.end_s) == (Outcome.FINISHED, "", [2.0], 3.0)
    assert exchange.reader.is_whole


def test_an_error_event_after_200() -> None:
    exchange = Exchange()
    record = exchange.stream(text(" a"), event(error={"message": "worker lost", "type": "server_error"}), DONE)
    assert (record.outcome, record.detail, list(record.chunk_s)) == (Outcome.ERROR_EVENT, "worker lost", [2.0])
    assert record.end_s == 3.0
    assert exchange.reader.is_whole


def test_an_error_event_with_a_bare_sentence() -> None:
    assert Exchange().stream(event(error="no room\x1b[31m")).detail == "no room\\x1b[31m"


@pytest.mark.parametrize(
    "data",
    [
        b'{"choices": [{"te',
        b"[1, 2]",
        b"null",
        b"",
        b'{"choices": 5}',
        b'{"choices": [{"text": 5}]}',
        b'{"choices": [{"token_ids": ["a"]}]}',
        b'{"x": ' + b"[" * 100_000,
    ],
)
def test_data_that_is_not_the_json_it_should_be(data: bytes) -> None:
    exchange = Exchange()
    record = exchange.stream(text(" a"), b"data: " + data + b"\n\n", text(" b", "stop"), DONE)
    assert (record.outcome, list(record.chunk_s), record.end_s) == (Outcome.MALFORMED_JSON, [2.0], 3.0)
    assert data[:20].decode() in record.detail
    assert len(record.detail) <= MAX_DETAIL_CHARS
    assert exchange.reader.is_done
    assert not exchange.reader.is_whole


def test_a_line_that_is_no_event_stream_after_a_token_in_the_same_read() -> None:
    record = Exchange().stream(text(" a") + b"<html>\n", DONE)
    assert (record.outcome, list(record.chunk_s)) == (Outcome.MALFORMED_SSE, [2.0])
    assert "<html>" in record.detail


def test_an_answer_without_end_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.http.reader.MAX_ANSWER_BYTES", 1000)
    record = Exchange().stream(b":" + b"x" * 999 + b"\n")
    assert record.outcome is Outcome.MALFORMED_SSE
    assert "more than 1000 bytes" in record.detail


@pytest.mark.parametrize(("content_type", "shown"), [("text/html", "text/html"), (None, "missing")])
def test_a_200_that_is_no_event_stream(content_type: str | None, shown: str) -> None:
    headers = {} if content_type is None else {"content_type": content_type}
    record = Exchange().refuse(200, b"<html>Welcome</html>", **headers)
    assert record.outcome is Outcome.MALFORMED_SSE
    assert shown in record.detail
    assert "<html>Welcome" in record.detail


@pytest.mark.parametrize(
    ("status", "outcome"),
    [
        (429, Outcome.REJECTED),
        (400, Outcome.HTTP_4XX),
        (404, Outcome.HTTP_4XX),
        (500, Outcome.HTTP_5XX),
        (503, Outcome.HTTP_5XX),
        (201, Outcome.HTTP_OTHER),
        (302, Outcome.HTTP_OTHER),
    ],
)
def test_other_statuses(status: int, outcome: Outcome) -> None:
    record = Exchange().refuse(status, b'{"error": {"message": "too much", "type": "x"}}', location="/there")
    assert (record.outcome, record.status) == (outcome, status)
    assert record.detail == ("redirected to /there" if status == 302 else "too much")
    assert record.headers_s == record.end_s == 1.0


@pytest.mark.parametrize(
    ("status", "headers", "seconds"),
    [
        (429, {"retry_after": "7"}, 7.0),
        (503, {"retry_after": " 1.5 "}, 1.5),
        (429, {"retry_after": "Wed, 21 Oct 2026 07:28:10 GMT", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10.0),
        (429, {"retry_after": "Wed, 21 Oct 2026 07:28:10 -0000", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, 10.0),
        # It has passed.
        (429, {"retry_after": "Wed, 21 Oct 2026 07:28:00 GMT", "date": "Wed, 21 Oct 2026 07:28:09 GMT"}, 0.0),
        # Whose clock?
        (429, {"retry_after": "Wed, 21 Oct 2026 07:28:10 GMT"}, None),
        (429, {"retry_after": "soon", "date": "Wed, 21 Oct 2026 07:28:00 GMT"}, None),
        (429, {"retry_after": "-1"}, None),
        (429, {"retry_after": "1e999"}, None),
        (429, {}, None),
        (500, {"retry_after": "7"}, None),
    ],
)
def test_retry_after(status: int, headers: dict[str, str], seconds: float | None) -> None:
    assert Exchange().refuse(status, b"", **headers).retry_after_s == seconds


@pytest.mark.parametrize(
    ("body", "detail"),
    [
        (b"", ""),
        (b"plain\r\nwords\x1b[0m", "plain\\r\\nwords\\x1b[0m"),
        (b'{"detail": "x"}', '{"detail": "x"}'),
        (b'{"error": "x"}', "x"),
        (b'{"error": {"code": 5}}', '{"code":5}'),
        (b'{"error": {"message": 5}}', '{"message":5}'),
        (b"[" * 50_000, "[" * MAX_DETAIL_CHARS),
        (b"\xff" * 5, "�" * 5),
    ],
)
def test_what_is_shown_of_a_refusal(body: bytes, detail: str) -> None:
    assert Exchange().refuse(500, body).detail == detail


def test_a_refusal_without_end_is_cut() -> None:
    exchange = Exchange()
    exchange.reader.on_status(500, {})
    for _ in range(MAX_BODY_BYTES // 1000 + 1):
        assert not exchange.reader.is_done
        exchange.reader.on_body(b"x" * 1000)
    assert exchange.reader.is_done
    assert (exchange.record.outcome, exchange.record.detail) == (Outcome.HTTP_5XX, "x" * MAX_DETAIL_CHARS)


def test_a_refusal_that_breaks_off_is_still_one() -> None:
    exchange = Exchange()
    exchange.reader.on_status(429, {})
    exchange.reader.on_body(b"busy")
    exchange.reader.on_lost(Outcome.RESET_MID_STREAM, "reset")
    assert (exchange.record.outcome, exchange.record.detail) == (Outcome.REJECTED, "busy")


def test_a_refusal_that_is_interrupted_is_none() -> None:
    exchange = Exchange()
    exchange.reader.on_status(429, {})
    exchange.reader.on_lost(Outcome.INTERRUPTED)
    assert exchange.record.outcome is Outcome.INTERRUPTED


@pytest.mark.parametrize(
    ("bodies", "num_chunks"),
    [
        # One token a chunk, as far as anybody knows.
        ([text(" a"), text(" b"), text(" c"), text(" d")], 2),
        ([text(" a b", token_ids=[1, 2]), text(" c", token_ids=[3])], 1),
        ([text(" a", token_ids=[1]), text(" b c", token_ids=[2, 3])], 2),
        ([event(choices=[{"text": " a b"}], usage={"completion_tokens": 2}), text(" c")], 1),
        # In one read.
        ([text(" a") + text(" b") + text(" c") + text(" d", "stop") + DONE], 2),
    ],
)
def test_the_client_goes_away_after_as_many_tokens_as_planned(bodies: list[bytes], num_chunks: int) -> None:
    exchange = Exchange(cancel_after_tokens=2)
    exchange.reader.on_status(200, STREAM)
    for body in bodies:
        if not exchange.reader.is_done:
            exchange.reader.on_body(body)
    assert exchange.record.outcome is Outcome.CANCELLED
    assert len(exchange.record.chunk_s) == num_chunks
    assert not exchange.reader.is_whole


def test_an_answer_shorter_than_the_plan_to_go_away_is_finished() -> None:
    assert Exchange(cancel_after_tokens=3).stream(text(" a"), text(" b", "stop"), DONE).outcome is Outcome.FINISHED


@pytest.mark.parametrize("name", ["timeline", "timings"])
def test_the_servers_own_phases(name: str) -> None:
    told = {"queue_ms": 1.5, "prefill_ms": 20, "ttft_ms": None, "ok_ms": True, "request_id": "x", "replays": 0}
    record = Exchange().stream(text(" a", "stop"), event(choices=[], **{name: told}), DONE)
    assert record.server_phases_ms == {"queue": 1.5, "prefill": 20.0}


def test_how_often_other_workers_took_it() -> None:
    told = event(choices=[], timeline={"moves": 2, "replays": 0})
    record = Exchange().stream(text(" a", "stop"), told, DONE)
    assert (record.num_moves, record.num_replays) == (2, 0)


@pytest.mark.parametrize("number", [None, True, -1, 1.5, "2", 2**31])
def test_how_often_is_not_known_where_it_is_no_number(number: object) -> None:
    record = Exchange().stream(text(" a", "stop"), event(choices=[], timeline={"moves": number}), DONE)
    assert (record.outcome, record.num_moves, record.num_replays) == (Outcome.FINISHED, None, None)


def test_no_phases_are_none() -> None:
    assert Exchange().stream(text(" a", "stop"), event(choices=[], timeline={}), DONE).server_phases_ms is None


def test_sending_is_noted() -> None:
    exchange = Exchange()
    assert math.isnan(exchange.record.connect_s)
    exchange.reader.on_connected(0.25)
    exchange.reader.on_sent()
    exchange.reader.on_stale()
    record = exchange.record
    assert (record.connect_s, record.sent_s, record.num_stale_connections) == (0.25, 1.0, 1)


@pytest.mark.parametrize("number", ["-1", str(2**31), "1" + "0" * 20, "1" + "0" * 400])
@pytest.mark.parametrize(
    "body",
    [
        '{"choices": [], "usage": {"prompt_tokens": N}}',
        '{"choices": [], "usage": {"completion_tokens": N}}',
        '{"choices": [], "usage": {"prompt_tokens_details": {"cached_tokens": N}}}',
        '{"choices": [{"text": "a", "token_ids": [5, N]}]}',
    ],
)
def test_numbers_that_count_no_tokens(body: str, number: str) -> None:
    record = Exchange().stream(text(" a"), f"data: {body.replace('N', number)}\n\n".encode(), DONE)
    assert (record.outcome, len(record.chunk_s)) == (Outcome.MALFORMED_JSON, 1)
    assert (record.usage_prompt_tokens, record.usage_output_tokens, record.usage_cached_tokens) == (None, None, None)


def test_phases_of_no_length_in_time_are_left_out() -> None:
    record = Exchange().stream(text(" a", "stop"), event(choices=[], timings={"a_ms": 10**400, "b_ms": 2.5}), DONE)
    assert (record.outcome, record.server_phases_ms) == (Outcome.FINISHED, {"b": 2.5})
