"""The bytes of answers: server-sent events in the shapes of the OpenAI API, and whole JSON responses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from tests.support.scripted_server.asks import Ask

#: Answers are these words over and over; the id of each is its place here.
WORDS = ("the", "river", "runs", "under", "seven", "old", "bridges", "and", "past", "a", "quiet", "mill")
DONE = b"data: [DONE]\n\n"
LAST_CHUNK = b"0\r\n\r\n"
_CREATED = 1_700_000_000
_REASONS = {
    200: "OK", 400: "Bad Request", 404: "Not Found",
    429: "Too Many Requests", 500: "Internal Server Error", 503: "Service Unavailable",
}  # fmt: skip


def chunk(data: bytes) -> bytes:
    """`data` as one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def stream_head(request_id: str) -> bytes:
    return (
        "HTTP/1.1 200 OK\r\nserver: scripted\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
        f"transfer-encoding: chunked\r\nx-request-id: {request_id}\r\n\r\n"
    ).encode()


def response(
    status: int, body: bytes, *, content_type: str = "application/json", headers: dict[str, str] | None = None
) -> bytes:
    """A whole response with its length."""
    extra = "".join(f"{name}: {value}\r\n" for name, value in (headers or {}).items())
    head = (
        f"HTTP/1.1 {status} {_REASONS[status]}\r\nserver: scripted\r\ncontent-type: {content_type}\r\n"
        f"content-length: {len(body)}\r\n{extra}\r\n"
    )
    return head.encode() + body


def json_response(status: int, document: object, *, headers: dict[str, str] | None = None) -> bytes:
    return response(status, orjson.dumps(document), headers=headers)


def error_object(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def event(document: object) -> bytes:
    return b"data: " + orjson.dumps(document) + b"\n\n"


def words(first: int, count: int) -> str:
    """Tokens `first` to `first + count` of every answer, each with a space before it."""
    return "".join(f" {WORDS[index % len(WORDS)]}" for index in range(first, first + count))


class Answer:
    """The events of one request, put together from prepared text: there are to be many thousands a second."""

    def __init__(self, ask: Ask, model: str) -> None:
        self._ask = ask
        self._kind = "chat.completion.chunk" if ask.is_chat else "text_completion"
        self._head = (
            f'data: {{"id":"{ask.id}","object":"{self._kind}","created":{_CREATED},"model":"{model}",'
            '"choices":[{"index":0,'
        )

    def opening(self) -> bytes:
        """A chat's first event, which has a role and no token."""
        return f'{self._head}"delta":{{"role":"assistant","content":""}},"finish_reason":null}}]}}\n\n'.encode()

    def tokens(self, first: int, count: int, *, with_usage: bool) -> bytes:
        text = words(first, count)
        content = f'"delta":{{"content":"{text}"}}' if self._ask.is_chat else f'"text":"{text}"'
        ids = ""
        if self._ask.wants_token_ids:
            ids = f',"token_ids":{[index % len(WORDS) for index in range(first, first + count)]}'
        usage = f',"usage":{self._usage_text(first + count)}' if with_usage else ""
        return f'{self._head}{content}{ids},"logprobs":null,"finish_reason":null}}]{usage}}}\n\n'.encode()

    def finish(self) -> bytes:
        content = '"delta":{}' if self._ask.is_chat else '"text":""'
        return f'{self._head}{content},"logprobs":null,"finish_reason":"{self._ask.finish_reason}"}}]}}\n\n'.encode()

    def usage(self, output_tokens: int) -> bytes:
        head = self._head.partition('"choices"')[0]
        return f'{head}"choices":[],"usage":{self._usage_text(output_tokens)}}}\n\n'.encode()

    def whole(self, model: str) -> bytes:
        """The response to a request that is no stream."""
        ask = self._ask
        text = words(0, ask.output_tokens)
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": ask.finish_reason}
        choice |= {"message": {"role": "assistant", "content": text}} if ask.is_chat else {"text": text}
        if ask.wants_token_ids:
            choice["token_ids"] = [index % len(WORDS) for index in range(ask.output_tokens)]
        document = {
            "id": ask.id,
            "object": "chat.completion" if ask.is_chat else "text_completion",
            "created": _CREATED,
            "model": model,
            "choices": [choice],
            "usage": orjson.loads(self._usage_text(ask.output_tokens)),
        }
        return json_response(200, document)

    def _usage_text(self, output_tokens: int) -> str:
        prompt_tokens = self._ask.prompt_tokens
        return (
            f'{{"prompt_tokens":{prompt_tokens},"total_tokens":{prompt_tokens + output_tokens},'
            f'"completion_tokens":{output_tokens}}}'
        )
