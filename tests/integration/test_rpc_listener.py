"""A call that gRPC itself cannot read must not make a process deaf."""

from __future__ import annotations

import asyncio
import gc
import struct
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from contracts.errors import TandemError, WorkerUnavailable
from contracts.messages import Method
from rpc import CallContext, GrpcNetwork
from rpc.grpc_listener import GrpcListener

PATIENCE_S = 30.0


class Ping(msgspec.Struct, frozen=True, kw_only=True):
    number: int = 0


PING = Method("test/Ping", Ping, Ping)


async def _answer(ping: Ping, context: CallContext) -> Ping:
    return ping


def _frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
    return struct.pack(">I", len(body))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + body


def _text(value: bytes) -> bytes:
    return bytes([len(value)]) + value


def call_of(path: bytes) -> bytes:
    """HTTP/2 (RFC 9113): preface, settings, one call. Headers (RFC 7541): `POST`, `http`, then literals."""
    headers = b"\x83\x86" + b"\x04" + _text(path) + b"\x01" + _text(b"x")
    for name, value in ((b"content-type", b"application/grpc"), (b"te", b"trailers")):
        headers += b"\x00" + _text(name) + _text(value)
    settings, begin, end = _frame(4, 0, 0, b""), _frame(1, 4, 1, headers), _frame(0, 1, 1, bytes(5))
    return b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + settings + begin + end


async def send(address: str, raw: bytes) -> None:
    """And waits until the other side says something, or hangs up."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.wait_for(asyncio.open_connection(host, int(port)), PATIENCE_S)
    writer.write(raw)
    await writer.drain()
    try:
        await asyncio.wait_for(reader.read(), 1.0)
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.close()


async def until_answered(network: GrpcNetwork, address: str) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await network.channel(address).call(PING, Ping(number=7), timeout_s=5.0) == Ping(number=7)
            except TandemError:
                await asyncio.sleep(0.05)
            else:
                return


@pytest.mark.parametrize("token", [None, "secret"])
async def test_it_listens_again_after_a_path_that_is_no_text(token: str | None) -> None:
    said = list[str]()
    unheard = list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unheard.append(context))
    network = GrpcNetwork(token=token, log=said.append)
    servers = [network.server("127.0.0.1:0") for _ in range(2)]
    try:
        for server in servers:
            server.register(PING, _answer)
        harmed, other = [await server.start() for server in servers]
        await until_answered(network, harmed)
        await send(harmed, call_of(b"/tandem/test/Ping"))
        assert said == [], "refused or answered, as any call"
        for times in range(1, 4):
            await send(harmed, call_of(b"/tand\xe5m/test/Ping"))
            await until_answered(network, harmed)
            assert len(said) <= times
            gc.collect()
            await asyncio.sleep(0.05)
            gc.collect()
        assert said
        assert unheard == [], "asyncio would print these with their tracebacks"
        assert all(harmed in line and "listening anew" in line for line in said)
        assert await network.channel(other).call(PING, Ping(number=1), timeout_s=5.0) == Ping(number=1)
    finally:
        for server in servers:
            await server.stop(0.0)
    for address in (harmed, other):
        with pytest.raises(WorkerUnavailable):
            await network.channel(address).call(PING, Ping(), timeout_s=1.0)
    await network.close()
    assert all(task is asyncio.current_task() or task.done() for task in asyncio.all_tasks())


async def test_it_tries_until_it_can_listen_again() -> None:
    said = list[str]()
    network = GrpcNetwork(log=said.append)
    server = network.server("127.0.0.1:0")
    server.register(PING, _answer)
    address = await server.start()
    replace, num_tries = GrpcListener.replace, 0

    async def replace_at_the_third_try(listener: GrpcListener) -> None:
        nonlocal num_tries
        num_tries += 1
        if num_tries < 3:
            raise RuntimeError("the port is taken")
        await replace(listener)

    try:
        with patch.object(GrpcListener, "replace", replace_at_the_third_try):
            await send(address, call_of(b"/tand\xe5m/test/Ping"))
            await until_answered(network, address)
    finally:
        await server.stop(0.0)
        await network.close()
    assert num_tries == 3
    assert sum("the port is taken" in line for line in said) == 2
