"""What is written for a request, and when: the schedule of a whole answer, or of a fault, as a pure function."""

from __future__ import annotations

from email.utils import formatdate
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

from tests.support.scripted_server.answers import (
    DONE,
    LAST_CHUNK,
    Answer,
    chunk,
    error_object,
    event,
    json_response,
    response,
    stream_head,
)
from tests.support.scripted_server.script import Fault

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.scripted_server.asks import Ask
    from tests.support.scripted_server.script import Behaviour


class After(Enum):
    """What follows a write."""

    MORE = 0
    #: The response is whole; the connection takes the next request.
    END = 1
    CLOSE = 2
    RESET = 3
    #: Nothing, for as long as the client waits.
    HANG = 4


class Move(NamedTuple):
    """One write. `at_s` counts from the start of service."""

    at_s: float
    data: bytes
    num_tokens: int = 0
    after: After = After.MORE


def plan(ask: Ask, behaviour: Behaviour, *, wall_s: float) -> Iterator[Move]:
    """The writes in order; the last one says how it ends. `wall_s` is the time of day, for dates in headers."""
    if (refusal := _no_answer(ask, behaviour, wall_s)) is not None:
        yield refusal
    elif not ask.is_stream:
        num_chunks = -(-ask.output_tokens // behaviour.tokens_per_chunk)
        at_s = (behaviour.ttft_ms + (num_chunks - 1) * behaviour.itl_ms) / 1e3
        yield Move(at_s, Answer(ask, behaviour.model).whole(behaviour.model), ask.output_tokens, After.END)
    elif ask.fault is Fault.BYTE_BY_BYTE:
        for move in _stream(ask, behaviour):
            yield from _bytewise(move)
    else:
        yield from _stream(ask, behaviour)


def _no_answer(ask: Ask, behaviour: Behaviour, wall_s: float) -> Move | None:
    """The one write of a fault that is no event stream; None where there is a stream."""
    match ask.fault:
        case Fault.RESET_BEFORE_STATUS | Fault.CLOSE_AT_ACCEPT:
            return Move(0.0, b"", after=After.RESET)
        case Fault.NEVER_ANSWERS:
            return Move(0.0, b"", after=After.HANG)
        case Fault.MALFORMED_HTTP:
            return Move(0.0, b"SIP/2.0 what now\r\n\r\n", after=After.CLOSE)
        case Fault.REJECT_SECONDS:
            return _rejection({"retry-after": str(behaviour.retry_after_s)})
        case Fault.REJECT_DATE:
            until = formatdate(wall_s + behaviour.retry_after_s, usegmt=True)
            return _rejection({"date": formatdate(wall_s, usegmt=True), "retry-after": until})
        case Fault.UNAVAILABLE:
            return _failure(503, "no worker is ready", "overloaded_error")
        case Fault.SERVER_ERROR:
            return _failure(500, "the engine has died", "internal_error")
        case Fault.NOT_FOUND:
            return Move(0.0, response(404, b"no such page", content_type="text/plain"), after=After.END)
        case Fault.HTML:
            page = response(200, b"<html><body>Welcome</body></html>", content_type="text/html")
            return Move(0.0, page, after=After.END)
        case _:
            return None


def _rejection(headers: dict[str, str]) -> Move:
    return Move(
        0.0,
        json_response(429, error_object("too many requests", "rate_limit_error"), headers=headers),
        after=After.END,
    )


def _failure(status: int, message: str, kind: str) -> Move:
    return Move(0.0, json_response(status, error_object(message, kind)), after=After.END)


def _stream(ask: Ask, behaviour: Behaviour) -> Iterator[Move]:
    answer, fault = Answer(ask, behaviour.model), ask.fault
    framed = _framed_crlf if fault is Fault.CRLF else chunk
    head = stream_head(ask.id)
    if fault is Fault.SLOW_HEADERS:
        lines = head.splitlines(keepends=True)
        for index, line in enumerate(lines):
            yield Move(behaviour.ttft_ms / 1e3 * index / len(lines), line)
        head = b""
    yield Move(0.0, head + (framed(answer.opening()) if ask.is_chat else b""))
    total = 0 if fault is Fault.EMPTY_ANSWER else ask.output_tokens
    breaks_at = max(1, total // 2) if fault in _MID_STREAM else None
    every_usage = ask.wants_continuous_usage or fault is Fault.USAGE_IN_EVERY_CHUNK
    first, at_s = 0, behaviour.ttft_ms / 1e3
    while first < total:
        count = min(behaviour.tokens_per_chunk, total - first)
        data = framed(answer.tokens(first, count, with_usage=every_usage))
        if fault is Fault.COMMENTS:
            data = chunk(b": keep-alive\n\n") + data
        first += count
        if breaks_at is not None and first >= breaks_at:
            yield Move(at_s, data, count)
            # An event of its own later, so that the tokens before it are read first.
            yield _break(fault, at_s + behaviour.itl_ms / 1e3)
            return
        if first == total:
            yield Move(at_s, data + _end(ask, answer, total), count, _after_end(fault))
            return
        yield Move(at_s, data, count)
        at_s += behaviour.itl_ms / 1e3
    yield Move(at_s, _end(ask, answer, total), after=_after_end(fault))


_MID_STREAM = frozenset(
    {
        Fault.RESET_MID_STREAM,
        Fault.STALLS,
        Fault.TRUNCATED,
        Fault.MALFORMED_SSE,
        Fault.MALFORMED_JSON,
        Fault.ERROR_EVENT,
    }
)


def _break(fault: Fault | None, at_s: float) -> Move:
    match fault:
        case Fault.RESET_MID_STREAM:
            return Move(at_s, b"", after=After.RESET)
        case Fault.STALLS:
            return Move(at_s, b"", after=After.HANG)
        case Fault.MALFORMED_SSE:
            return Move(at_s, chunk(b"<b>502 Bad Gateway</b>\n\n") + LAST_CHUNK, after=After.END)
        case Fault.MALFORMED_JSON:
            return Move(at_s, chunk(b'data: {"id":"cmpl-0","cho\n\n') + LAST_CHUNK, after=After.END)
        case Fault.ERROR_EVENT:
            error = event(error_object("the engine has died", "internal_error"))
            return Move(at_s, chunk(error) + chunk(DONE) + LAST_CHUNK, after=After.END)
        case _:
            return Move(at_s, LAST_CHUNK, after=After.END)


def _end(ask: Ask, answer: Answer, num_tokens: int) -> bytes:
    """What comes with the last tokens: servers have it all ready at once."""
    framed = _framed_crlf if ask.fault is Fault.CRLF else chunk
    data = framed(answer.finish())
    if ask.wants_usage and ask.fault is not Fault.NO_USAGE:
        data += framed(answer.usage(num_tokens))
    if ask.fault is not Fault.NO_DONE:
        data += framed(DONE)
    return data if ask.fault is Fault.NO_LAST_CHUNK else data + LAST_CHUNK


def _after_end(fault: Fault | None) -> After:
    return After.CLOSE if fault is Fault.NO_LAST_CHUNK else After.END


def _framed_crlf(data: bytes) -> bytes:
    return chunk(data.replace(b"\n", b"\r\n"))


def _bytewise(move: Move) -> Iterator[Move]:
    """The tokens count with the last byte."""
    *firsts, last = (move.data[index : index + 1] for index in range(len(move.data)))
    for byte in firsts:
        yield Move(move.at_s, byte)
    yield Move(move.at_s, last, move.num_tokens, move.after)
