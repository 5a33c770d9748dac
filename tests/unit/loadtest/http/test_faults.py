"""Servers that misbehave, over real sockets: each request ends once, with the right word for it."""

from __future__ import annotations

import asyncio
import gc
import math
import resource
import socket
from collections import Counter
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from loadtest.http.failures import outcome_of_connecting
from loadtest.record import Outcome
from loadtest.settings import Limits
from tests.support.raw_server import raw_server
from tests.unit.loadtest.http.asking import (
    DONE,
    END,
    FINISH,
    LIMITS,
    STREAM_HEAD,
    TOKEN,
    WHOLE,
    answer_of,
    ask,
    chunk,
    http_client,
)

if TYPE_CHECKING:
    from collections.abc import Generator

    from tests.support.raw_server import Peer, Serve


def says(*pieces: bytes, pause_s: float = 0.0, then: str = "close") -> Serve:
    """A server that reads a request and writes these pieces; then it closes, resets or waits for the client."""

    async def serve(peer: Peer, number: int) -> None:
        await peer.request()
        for piece in pieces:
            await peer.write(piece)
            await asyncio.sleep(pause_s)
        if then == "reset":
            peer.reset()
        elif then == "wait":
            await peer.gone()

    return serve


def free_port() -> int:
    """Nobody listens there."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


async def test_nobody_listens() -> None:
    async with http_client(f"http://127.0.0.1:{free_port()}") as client:
        record = await ask(client).ended()
        assert (record.outcome, client.num_connections) == (Outcome.REFUSED, 0)
    assert math.isnan(record.sent_s)
    assert record.detail


async def test_a_name_that_nobody_has_is_asked_for_anew_by_each_request() -> None:
    async with http_client("http://no-such-host.invalid") as client:
        both = [ask(client), ask(client)]
        assert [(await one.ended()).outcome for one in both] == [Outcome.CONNECT_FAILED] * 2
        assert (await ask(client).ended()).outcome is Outcome.CONNECT_FAILED


async def test_a_name_that_none_can_have() -> None:
    async with http_client("http://a..b") as client:
        record = await ask(client).ended()
    assert record.outcome is Outcome.CONNECT_FAILED
    assert "'a..b' is no name of a host" in record.detail


@contextmanager
def full_listener() -> Generator[str]:
    """The system takes connections up to its backlog, and nobody accepts them: the next one waits."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(4)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            for filler in fillers:
                filler.close()


async def test_a_server_that_never_accepts() -> None:
    with full_listener() as url:
        async with http_client(url, Limits(connect_s=0.1)) as client:
            record = await ask(client).ended()
    assert record.outcome is Outcome.CONNECT_TIMEOUT
    assert "0.1 s" in record.detail


@contextmanager
def circles() -> Generator[list[object]]:
    """What only the collector would free, of what came to be inside."""
    found: list[object] = []
    gc.collect()
    gc.disable()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        yield found
        gc.collect()
        found += gc.garbage
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


@pytest.mark.asyncio(loop_factories=["uvloop"])
@pytest.mark.parametrize("what", ["refused", "no name", "timed out", "reset"])
async def test_failures_leave_no_circles_behind(what: str) -> None:
    """The collector is off during a run: they would pile up. Transports of asyncio's own loop are circles."""
    with full_listener() as full:
        async with raw_server(says(then="reset")) as resetting:
            urls = {
                "refused": f"http://127.0.0.1:{free_port()}",
                "no name": "http://a..b",
                "timed out": full,
                "reset": resetting,
            }
            async with http_client(urls[what], Limits(connect_s=0.05 if what == "timed out" else 5.0)) as client:
                # What is made once.
                await asyncio.gather(*(ask(client).ended() for _ in range(2)))
                with circles() as left:
                    for _ in range(4):
                        records = await asyncio.gather(*(ask(client).ended() for _ in range(25)))
                        assert all(record.outcome.is_failure for record in records)
                        del records
                        await asyncio.sleep(0.01)
    # By chance a few, of whatever else there is in this process.
    assert len(left) < 50, Counter(map(type, left)).most_common(8)


async def test_this_machine_has_no_file_left() -> None:
    async with raw_server(says(WHOLE)) as url, http_client(url) as client:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        with socket.socket() as highest:
            resource.setrlimit(resource.RLIMIT_NOFILE, (highest.fileno(), hard))
        try:
            record = await ask(client).ended()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert record.outcome is Outcome.CLIENT_LIMIT
        assert (await ask(client).ended()).outcome is Outcome.FINISHED


@pytest.mark.parametrize(
    ("error", "outcome"),
    [
        (OSError(99, "Cannot assign requested address"), Outcome.CLIENT_LIMIT),
        (OSError(105, "No buffer space available"), Outcome.CLIENT_LIMIT),
        (TimeoutError(110, "Connection timed out"), Outcome.CONNECT_TIMEOUT),
        (OSError(113, "No route to host"), Outcome.CONNECT_FAILED),
        (ConnectionResetError(104, "in a TLS handshake"), Outcome.CONNECT_FAILED),
    ],
)
def test_kinds_of_errors_in_connecting(error: OSError, outcome: Outcome) -> None:
    assert outcome_of_connecting(error) is outcome


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("head", [b"", b"HTTP/1.1 200 O", b"HTTP/1.1 100 Continue\r\n\r\n"])
async def test_the_connection_breaks_before_the_status(head: bytes, then: str) -> None:
    record = await answer_of(says(head, pause_s=0.02, then=then))
    assert (record.outcome, record.status) == (Outcome.RESET_BEFORE_ANSWER, None)
    assert record.detail
    assert record.num_stale_connections == 0
    assert not math.isnan(record.sent_s)
    assert not math.isnan(record.connect_s)


@pytest.mark.parametrize("then", ["close", "reset"])
@pytest.mark.parametrize("body", [chunk(TOKEN), chunk(TOKEN)[:-2], chunk(TOKEN) + chunk(FINISH)])
async def test_the_connection_breaks_in_mid_answer(body: bytes, then: str) -> None:
    record = await answer_of(says(STREAM_HEAD, body, pause_s=0.02, then=then))
    # The bytes of an event that came count, whole chunk or not.
    assert (record.outcome, record.status, len(record.chunk_s)) == (Outcome.RESET_MID_STREAM, 200, 1)
    assert record.detail


async def test_a_body_that_ends_with_the_connection_does_not_end_with_its_reset() -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
    record = await answer_of(says(head, TOKEN + FINISH, pause_s=0.02, then="reset"))
    assert (record.outcome, len(record.chunk_s)) == (Outcome.RESET_MID_STREAM, 1)


@pytest.mark.parametrize("then", ["close", "reset", "wait"])
async def test_done_is_the_end_whatever_follows(then: str) -> None:
    record = await answer_of(says(STREAM_HEAD, chunk(TOKEN), chunk(DONE), pause_s=0.02, then=then))
    assert (record.outcome, record.detail) == (Outcome.FINISHED, "")


async def test_a_body_that_ends_properly_without_an_end_of_the_answer() -> None:
    record = await answer_of(says(STREAM_HEAD + chunk(TOKEN) + END, then="wait"))
    assert (record.outcome, len(record.chunk_s)) == (Outcome.TRUNCATED, 1)


@pytest.mark.parametrize("head", [b"", STREAM_HEAD])
async def test_no_token_within_the_limit(head: bytes) -> None:
    record = await answer_of(says(head, then="wait"), limits=Limits(first_token_s=0.1, total_s=5.0))
    assert (record.outcome, len(record.chunk_s)) == (Outcome.FIRST_TOKEN_TIMEOUT, 0)
    assert 0.09 <= record.end_s - record.sent_s < 1.0
    assert "0.1 s" in record.detail


@pytest.mark.parametrize("first_token_s", [None, 0.1, 9.0])
async def test_not_ended_within_the_limit(first_token_s: float | None) -> None:
    record = await answer_of(
        says(STREAM_HEAD, chunk(TOKEN), then="wait"), limits=Limits(first_token_s=first_token_s, total_s=0.2)
    )
    assert (record.outcome, len(record.chunk_s)) == (Outcome.TIMEOUT, 1)
    assert 0.19 <= record.end_s - record.sent_s < 1.0
    assert "0.2 s" in record.detail


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00\x01\x02\x03\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n",
        b"HTTP/1.1 abc OK\r\n\r\n",
        STREAM_HEAD + b"xyz\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\n" + b"x-long: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\n" + b"x-many: y\r\n" * 10_000,
    ],
)
async def test_bytes_that_are_no_http(garbage: bytes) -> None:
    record = await answer_of(says(garbage, then="wait"))
    assert record.outcome is Outcome.MALFORMED_HTTP
    assert record.detail


async def test_bytes_that_are_no_http_after_a_token_in_the_same_read() -> None:
    record = await answer_of(says(STREAM_HEAD + chunk(TOKEN) + b"xyz\r\n", then="wait"))
    assert (record.outcome, len(record.chunk_s)) == (Outcome.MALFORMED_HTTP, 1)


@pytest.mark.parametrize(
    ("event", "outcome"),
    [
        (b"<html>\n", Outcome.MALFORMED_SSE),
        (b"data: {\n\n", Outcome.MALFORMED_JSON),
        (b'data: {"error":{"message":"x"}}\n\n', Outcome.ERROR_EVENT),
    ],
)
async def test_an_event_that_is_none(event: bytes, outcome: Outcome) -> None:
    record = await answer_of(says(STREAM_HEAD, chunk(TOKEN), chunk(event), pause_s=0.02, then="wait"))
    assert (record.outcome, len(record.chunk_s)) == (outcome, 1)


async def test_a_refusal_with_retry_after() -> None:
    body = b'{"error":{"message":"busy"}}'
    head = b"HTTP/1.1 429 Too Many Requests\r\nRetry-After: 3\r\nContent-Length: %d\r\n\r\n" % len(body)
    record = await answer_of(says(head + body, then="wait"))
    assert (record.outcome, record.status, record.retry_after_s, record.detail) == (Outcome.REJECTED, 429, 3.0, "busy")


async def test_a_refusal_whose_body_never_ends_is_cut_off() -> None:
    head = b"HTTP/1.1 500 Oops\r\ncontent-length: 1000000\r\n\r\n"
    record = await answer_of(says(head + b"x" * 100_000, then="wait"))
    assert record.outcome is Outcome.HTTP_5XX


async def test_a_refusal_whose_body_stays_away() -> None:
    head = b"HTTP/1.1 500 Oops\r\ncontent-length: 10\r\n\r\n"
    record = await answer_of(says(head, then="wait"), limits=Limits(total_s=0.1))
    assert (record.outcome, record.status) == (Outcome.HTTP_5XX, 500)


async def test_the_client_goes_away_in_mid_answer_and_the_server_sees_it() -> None:
    gone = asyncio.Event()

    async def serve(peer: Peer, number: int) -> None:
        await peer.request()
        await peer.write(STREAM_HEAD)
        for _ in range(3):
            await peer.write(chunk(TOKEN))
            await asyncio.sleep(0.02)
        try:
            await peer.gone()
        finally:
            gone.set()

    async with raw_server(serve) as url, http_client(url) as client:
        record = await ask(client, cancel_after_tokens=2).ended()
        async with asyncio.timeout(1):
            await gone.wait()
    assert (record.outcome, len(record.chunk_s)) == (Outcome.CANCELLED, 2)


@pytest.mark.parametrize("moment", ["connecting", "waiting", "streaming"])
async def test_a_request_is_interrupted(moment: str) -> None:
    async with (
        raw_server(says(STREAM_HEAD + chunk(TOKEN) if moment == "streaming" else b"", then="wait")) as url,
        http_client(url) as client,
    ):
        asked = ask(client)
        if moment != "connecting":
            await asyncio.sleep(0.05)
        asked.sending.cancel(Outcome.INTERRUPTED)
        assert asked.num_ends == 1
        asked.sending.cancel(Outcome.TIMEOUT)
        await asyncio.sleep(0.05)
        assert (asked.num_ends, asked.record.outcome) == (1, Outcome.INTERRUPTED)
        assert len(asked.record.chunk_s) == (moment == "streaming")
        assert math.isnan(asked.record.sent_s) == (moment == "connecting")
        assert client.num_open == 0


async def test_closing_the_client_interrupts_what_is_on_its_way() -> None:
    async with (
        raw_server(says(then="wait")) as url,
        http_client(url, LIMITS) as client,
    ):
        asked = [ask(client) for _ in range(3)]
        await asyncio.sleep(0.05)
        asked.append(ask(client))
    assert [one.record.outcome for one in asked] == [Outcome.INTERRUPTED] * 4
    assert [one.num_ends for one in asked] == [1] * 4
