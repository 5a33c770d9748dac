"""The client against servers that behave, each in its own way: bodies, connections, times."""

from __future__ import annotations

import asyncio
import gc
import shutil
import socket
import ssl
import subprocess
import time
import weakref
from typing import TYPE_CHECKING, Any

import pytest

from contracts.errors import ConfigError
from loadtest.http import client as client_module
from loadtest.http.client import HttpClient
from loadtest.http.failures import RequestFailed
from loadtest.http.sending import STALE_AFTER_IDLE_S, STALE_WITHIN_S
from loadtest.record import Outcome
from tests.support.raw_server import raw_server
from tests.unit.loadtest.http.asking import (
    DONE,
    END,
    FINISH,
    LIMITS,
    STREAM_HEAD,
    TOKEN,
    WHOLE,
    Asked,
    answer_of,
    ask,
    chunk,
    http_client,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.raw_server import Peer, Serve

ANSWER = TOKEN + TOKEN + FINISH + DONE
PLAIN_HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=utf-8\r\n"


def answers(*responses: bytes, pause_s: float = 0.0, then: str = "wait") -> Serve:
    """A server that answers each request of a connection with these pieces."""

    async def serve(peer: Peer, number: int) -> None:
        while True:
            await peer.request()
            for piece in responses:
                await peer.write(piece)
                await asyncio.sleep(pause_s)
            if then == "close":
                return

    return serve


@pytest.mark.parametrize(
    ("response", "then"),
    [
        (WHOLE, "wait"),
        (PLAIN_HEAD + b"content-length: %d\r\n\r\n" % len(ANSWER) + ANSWER, "wait"),
        (PLAIN_HEAD + b"\r\n" + ANSWER, "close"),
        (PLAIN_HEAD.replace(b"1.1", b"1.0") + b"\r\n" + ANSWER, "close"),
        # Ends with the connection, and without [DONE].
        (PLAIN_HEAD + b"\r\n" + TOKEN + TOKEN + FINISH, "close"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + WHOLE, "wait"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\nretry-after: 3\r\n\r\n" + WHOLE, "wait"),
        (STREAM_HEAD + chunk(TOKEN + TOKEN) + chunk(FINISH + DONE) + END, "wait"),
        (STREAM_HEAD + b"".join(chunk(bytes([byte])) for byte in ANSWER) + END, "wait"),
        (STREAM_HEAD + chunk(ANSWER) + b"0\r\nx-trailer: y\r\n\r\n", "wait"),
        (STREAM_HEAD + chunk(ANSWER.replace(b"\n", b"\r\n")) + END, "wait"),
    ],
)
@pytest.mark.parametrize("is_cut", [False, True])
async def test_bodies_of_every_form(response: bytes, then: str, is_cut: bool) -> None:
    pieces = [bytes([byte]) for byte in response] if is_cut else [response]
    record = await answer_of(answers(*pieces, then=then))
    assert (record.outcome, record.detail, record.status) == (Outcome.FINISHED, "", 200)
    assert (len(record.chunk_s), record.finish_reason, record.retry_after_s) == (2, "length", None)


async def test_the_request_as_the_server_sees_it() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def serve(peer: Peer, number: int) -> None:
        seen.append(await peer.request())
        await peer.write(WHOLE)
        await peer.gone()

    async with raw_server(serve) as url, http_client(f"{url}/behind/") as client:
        await ask(client, b'{"prompt": [1, 2]}').ended()
    [(head, body)] = seen
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /behind/v1/completions HTTP/1.1"
    assert f"host: {url.removeprefix('http://')}" in lines
    assert {"content-type: application/json", "content-length: 18", "x-extra: yes"} < set(lines)
    assert body == b'{"prompt": [1, 2]}'


async def test_times_ascend_and_are_those_of_the_arrivals() -> None:
    sent_s: list[float] = []

    async def serve(peer: Peer, number: int) -> None:
        await peer.request()
        for piece in (STREAM_HEAD, chunk(TOKEN), chunk(TOKEN), chunk(FINISH), chunk(DONE) + END):
            await asyncio.sleep(0.02)
            sent_s.append(time.perf_counter())
            await peer.write(piece)
        await peer.gone()

    begin_s = time.perf_counter()
    record = await answer_of(serve)
    times = [begin_s, begin_s + record.connect_s, record.sent_s, record.headers_s, *record.chunk_s, record.end_s]
    assert times == sorted(times)
    for seen_s, written_s in zip((record.headers_s, *record.chunk_s), sent_s, strict=False):
        assert seen_s >= written_s
    assert record.end_s >= sent_s[-1]


async def test_a_large_request_is_sent_whole() -> None:
    sizes: list[int] = []

    async def serve(peer: Peer, number: int) -> None:
        while True:
            _, body = await peer.request()
            sizes.append(len(body))
            await peer.write(WHOLE)

    async with raw_server(serve) as url, http_client(url) as client:
        for _ in range(2):
            assert (await ask(client, b"x" * 10_000_000).ended()).outcome is Outcome.FINISHED
    assert sizes == [10_000_000] * 2


# --- connections ------------------------------------------------------------------------------------


async def test_a_connection_is_kept_and_used_again() -> None:
    async with raw_server(answers(WHOLE)) as url, http_client(url) as client:
        first = await ask(client).ended()
        second = await ask(client).ended()
        assert (client.num_connections, client.num_open) == (1, 1)
    assert first.connect_s > 0
    # NaN: none was opened.
    assert second.connect_s != second.connect_s
    assert second.num_stale_connections == 0


async def test_a_connection_is_kept_when_the_body_ends_later_than_the_answer() -> None:
    async with (
        raw_server(answers(STREAM_HEAD + chunk(TOKEN) + chunk(DONE), END, pause_s=0.05)) as url,
        http_client(url) as client,
    ):
        record = await ask(client).ended()
        assert record.outcome is Outcome.FINISHED
        await asyncio.sleep(0.1)
        assert (await ask(client).ended()).outcome is Outcome.FINISHED
        assert client.num_connections == 1


async def test_a_connection_is_not_kept_when_the_body_does_not_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loadtest.http.connection.DRAIN_S", 0.05)
    async with raw_server(answers(STREAM_HEAD + chunk(TOKEN) + chunk(DONE))) as url, http_client(url) as client:
        assert (await ask(client).ended()).outcome is Outcome.FINISHED
        assert client.num_open == 1
        await asyncio.sleep(0.2)
        assert client.num_open == 0


@pytest.mark.parametrize(
    "response",
    [
        WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1),
        WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0", 1),
        # Bytes that nobody asked for.
        WHOLE + WHOLE,
        WHOLE + b"garbage",
    ],
)
async def test_a_connection_is_not_kept_when_it_cannot_be(response: bytes) -> None:
    async with raw_server(answers(response)) as url, http_client(url) as client:
        for _ in range(2):
            assert (await ask(client).ended()).outcome is Outcome.FINISHED
        assert client.num_connections == 2


async def test_bytes_on_a_kept_connection_close_it() -> None:
    async with (
        raw_server(answers(WHOLE, b"HTTP/1.1 408 Request Timeout\r\n\r\n", pause_s=0.05)) as url,
        http_client(url) as client,
    ):
        await ask(client).ended()
        await asyncio.sleep(0.1)
        assert client.num_open == 0
        record = await ask(client).ended()
        assert (record.outcome, client.num_connections) == (Outcome.FINISHED, 2)


async def test_the_youngest_kept_connection_is_used_first() -> None:
    numbers: list[int] = []

    async def serve(peer: Peer, number: int) -> None:
        while True:
            await peer.request()
            numbers.append(number)
            # So that both are busy at a time.
            await asyncio.sleep(0.05 * (number + 1))
            await peer.write(WHOLE)

    async with raw_server(serve) as url, http_client(url) as client:
        for one in [ask(client), ask(client)]:
            await one.ended()
        await ask(client).ended()
        await ask(client).ended()
    assert sorted(numbers[:2]) == [0, 1]
    assert numbers[2:] == [1, 1]


async def test_a_kept_connection_that_was_closed_meanwhile_costs_nothing() -> None:
    async with raw_server(answers(WHOLE, then="close")) as url, http_client(url) as client:
        await ask(client).ended()
        await asyncio.sleep(0.05)
        assert client.num_open == 0
        record = await ask(client).ended()
    assert (record.outcome, record.num_stale_connections) == (Outcome.FINISHED, 0)


async def test_a_kept_connection_that_is_being_closed_is_not_used() -> None:
    async with raw_server(answers(WHOLE)) as url, http_client(url) as client:
        await ask(client).ended()
        connection = client.take_kept()
        assert connection is not None
        client.on_idle(connection)
        connection.abort()
        record = await ask(client).ended()
    assert (record.outcome, record.num_stale_connections) == (Outcome.FINISHED, 0)


def closes_on_second_request(first_again: bytes = b"", *, after_s: float = 0.0) -> Serve:
    """A server whose first connection breaks when it is used again, after these bytes and this time."""

    async def serve(peer: Peer, number: int) -> None:
        await peer.request()
        await peer.write(WHOLE)
        await peer.request()
        if number:
            await peer.write(WHOLE)
            await peer.gone()
        if first_again:
            await peer.write(first_again)
        await asyncio.sleep(after_s)
        peer.reset()

    return serve


class SkippingClock:
    """Time may be skipped, so that a connection seems idle for long."""

    def __init__(self) -> None:
        self.skipped_s = 0.0

    def __call__(self) -> float:
        return time.perf_counter() + self.skipped_s


async def asked_again(serve: Serve, *, idle_s: float) -> tuple[Asked, int]:
    """A request on a connection that was idle for so long, and how many connections were opened in all."""
    clock = SkippingClock()
    async with raw_server(serve) as url, http_client(url, now_s=clock) as client:
        await ask(client).ended()
        clock.skipped_s = idle_s
        again = ask(client)
        await again.ended()
        return again, client.num_connections


async def test_a_kept_connection_that_breaks_is_replaced_once_and_counted() -> None:
    again, num_connections = await asked_again(closes_on_second_request(), idle_s=STALE_AFTER_IDLE_S)
    record = again.record
    assert (record.outcome, record.num_stale_connections, again.num_ends) == (Outcome.FINISHED, 1, 1)
    assert record.connect_s > 0
    assert num_connections == 2


@pytest.mark.parametrize(
    ("serve", "idle_s"),
    [
        # The server has had the request: it sent something, it was in the middle of others, or it took its time.
        (closes_on_second_request(b"HTTP/1.1 200", after_s=0.02), 60.0),
        (closes_on_second_request(), 0.0),
        (closes_on_second_request(after_s=3 * STALE_WITHIN_S), 60.0),
    ],
)
async def test_a_connection_that_takes_a_request_with_it_is_not_replaced(serve: Serve, idle_s: float) -> None:
    again, num_connections = await asked_again(serve, idle_s=idle_s)
    assert again.record.outcome is Outcome.RESET_BEFORE_ANSWER
    assert (again.record.num_stale_connections, num_connections) == (0, 1)


async def test_a_server_that_breaks_every_connection_is_asked_twice_at_most() -> None:
    async def serve(peer: Peer, number: int) -> None:
        await peer.request()
        if not number:
            await peer.write(WHOLE)
            await peer.request()
        peer.reset()

    again, num_connections = await asked_again(serve, idle_s=60.0)
    record = again.record
    assert (record.outcome, record.num_stale_connections) == (Outcome.RESET_BEFORE_ANSWER, 1)
    assert num_connections == 2


async def test_many_at_once() -> None:
    async with (
        raw_server(answers(STREAM_HEAD + chunk(TOKEN), chunk(FINISH) + chunk(DONE) + END, pause_s=0.01)) as url,
        http_client(url) as client,
    ):
        for _ in range(2):
            asked = [ask(client) for _ in range(50)]
            assert {(await one.ended()).outcome for one in asked} == {Outcome.FINISHED}
            assert [one.num_ends for one in asked] == [1] * 50
        assert client.num_connections == 50


async def test_on_a_kept_connection_the_request_is_on_the_wire_when_send_returns() -> None:
    loop = asyncio.get_running_loop()
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with http_client(f"http://127.0.0.1:{listener.getsockname()[1]}") as client:
            first = ask(client)
            peer, _ = await loop.sock_accept(listener)
            with peer:
                peer.setblocking(False)
                await loop.sock_recv(peer, 1 << 16)
                await loop.sock_sendall(peer, WHOLE)
                await first.ended()
                ask(client)
                # The event loop has had no turn in between.
                assert peer.recv(1 << 16).startswith(b"POST ")


async def test_small_requests_are_not_held_back() -> None:
    async with raw_server(answers(WHOLE)) as url, http_client(url) as client:
        await ask(client).ended()
        connection = client.take_kept()
        assert connection is not None
        own = connection._transport.get_extra_info("socket")  # type: ignore[union-attr]
        assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        connection.abort()


@pytest.mark.asyncio(loop_factories=["asyncio"])
async def test_a_name_with_several_addresses_is_tried_in_order_and_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on uvloop, whose methods cannot be replaced."""
    num_asked = 0

    async def getaddrinfo(host: str, port: int, **_: object) -> list[tuple[object, ...]]:
        nonlocal num_asked
        num_asked += 1
        assert host == "two.invalid"
        # Nobody listens at the first.
        return [(0, 0, 0, "", (address, port)) for address in ("127.0.0.9", "127.0.0.1")]

    tried: list[str] = []

    async def create_connection(factory: object, address: str, *args: object, **more: object) -> object:
        tried.append(address)
        return await connect(factory, address, *args, **more)

    loop: Any = asyncio.get_running_loop()
    connect = loop.create_connection
    monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(loop, "create_connection", create_connection)
    async with (
        raw_server(answers(WHOLE.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n", 1))) as url,
        http_client(f"http://two.invalid:{url.rpartition(':')[2]}") as client,
    ):
        both = [ask(client), ask(client)]
        assert [(await one.ended()).outcome for one in both] == [Outcome.FINISHED] * 2
        assert (await ask(client).ended()).outcome is Outcome.FINISHED
    assert num_asked == 1
    # The one that worked comes first from then on.
    assert tried == ["127.0.0.9", "127.0.0.9", "127.0.0.1", "127.0.0.1", "127.0.0.1"]


async def test_without_collector_nothing_is_left_of_a_request() -> None:
    async with raw_server(answers(WHOLE)) as url, http_client(url) as client:
        await ask(client).ended()
        gc.collect()
        gc.disable()
        try:
            asked = ask(client)
            await asked.ended()
            left = weakref.ref(asked)
            del asked
            assert left() is None
        finally:
            gc.enable()


# --- TLS --------------------------------------------------------------------------------------------


@pytest.fixture
def own_certificate(tmp_path: Path) -> ssl.SSLContext:
    """A server's side of TLS, signed by itself."""
    if shutil.which("openssl") is None:
        pytest.skip("makes a certificate with the openssl command")
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"),
            *("-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2"),
            *("-keyout", str(key), "-out", str(certificate)),
        ],
        check=True,
        capture_output=True,
        timeout=10,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    return context


@pytest.mark.parametrize("verify", [True, False])
async def test_tls(own_certificate: ssl.SSLContext, verify: bool) -> None:
    context = own_certificate
    async with raw_server(answers(WHOLE), tls=context) as url, http_client(url, verify=verify) as client:
        for _ in range(2):
            record = await ask(client).ended()
            assert record.outcome is (Outcome.CONNECT_FAILED if verify else Outcome.FINISHED), record.detail
        assert client.num_connections == (0 if verify else 1)


# --- whole responses --------------------------------------------------------------------------------


async def test_get_and_post() -> None:
    async def serve(peer: Peer, number: int) -> None:
        while True:
            head, body = await peer.request()
            content = head.partition(b" HTTP")[0] + b" " + body
            await peer.write(b"HTTP/1.1 201 Made\r\nX-A: b\r\ncontent-length: %d\r\n\r\n%b" % (len(content), content))

    async with raw_server(serve) as url, http_client(url) as client:
        status, headers, body = await client.get("/v1/models")
        assert (status, headers["x-a"], body) == (201, "b", b"GET /v1/models ")
        assert (await client.post("/tokenize", b"{}"))[2] == b"POST /tokenize {}"
        assert client.num_connections == 1


async def test_a_whole_response_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client_module, "WHOLE_TIMEOUT_S", 0.1)
    monkeypatch.setattr(client_module, "MAX_BODY_BYTES", 100)

    async def serve(peer: Peer, number: int) -> None:
        head, _ = await peer.request()
        if head.startswith(b"GET /reset"):
            peer.reset()
        elif head.startswith(b"GET /long"):
            await peer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n" + b"x" * 500)
        await peer.gone()

    async with raw_server(serve) as url, http_client(url) as client:
        for path, outcome in (
            ("/reset", Outcome.RESET_BEFORE_ANSWER),
            ("/long", Outcome.MALFORMED_HTTP),
            ("/never", Outcome.TIMEOUT),
        ):
            with pytest.raises(RequestFailed) as caught:
                await client.get(path)
            assert caught.value.outcome is outcome
        await asyncio.sleep(0.02)
        assert client.num_open == 0


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", ""])
async def test_a_base_url_that_is_none(url: str) -> None:
    with pytest.raises(ConfigError, match="http"):
        HttpClient(url, limits=LIMITS, now_s=time.perf_counter)
