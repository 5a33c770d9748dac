"""One contract for both networks: what `rpc.api` promises, on gRPC over loopback and in memory."""

from __future__ import annotations

import asyncio
import functools
import importlib
import random
import signal
import sys
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

import grpc
import msgspec
import pytest
from grpc import aio

from contracts.errors import (
    ERROR_BY_CODE,
    BadRequest,
    ConfigError,
    DeadlineExceeded,
    Internal,
    InvariantBroken,
    NoCapacity,
    NotFound,
    PayloadTooLarge,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from contracts.messages import Method, StreamMethod
from rpc import CallContext, Channel, GrpcNetwork, MemoryNetwork, Network, Server
from rpc.codec import CHECKSUM_BYTES, seal

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

T = TypeVar("T")

ROOT = Path(__file__).parents[2]

#: For waits that end long before in a correct program.
PATIENCE_S = 60.0


class Note(msgspec.Struct, frozen=True, kw_only=True):
    text: str = ""
    number: int = 0
    raw: bytes = b""


class NumberedText(msgspec.Struct, frozen=True, kw_only=True):
    """What a peer of another version might take `Note` for."""

    text: int


ECHO = Method("test/Echo", Note, Note)
HANG = Method("test/Hang", Note, Note)
COUNT = StreamMethod("test/Count", Note, Note)

#: A server process: echoes, hangs, and counts up to the number asked for and then hangs.
CHILD = """
import asyncio, sys
from contracts.messages import Method, StreamMethod
from rpc import GrpcNetwork
from tests.integration.test_rpc_contract import COUNT, ECHO, HANG, Note

async def echo(note, context):
    return note

async def hang(note, context):
    await asyncio.Event().wait()

async def count(note, context):
    for number in range(note.number):
        yield Note(number=number)
    await asyncio.Event().wait()

async def main():
    server = GrpcNetwork().server("127.0.0.1:0")
    server.register(ECHO, echo)
    server.register(HANG, hang)
    server.register_stream(COUNT, count)
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


async def echo(note: Note, context: CallContext) -> Note:
    return note


class MakeNetwork(Protocol):
    def __call__(self, *, max_body_bytes: int = ..., max_open_calls: int = ...) -> Network: ...


@dataclass
class Rig:
    """A network under test and what was made with it."""

    make_network: MakeNetwork
    network: Network
    logged: list[str]
    servers: list[Server] = field(default_factory=lambda: list[Server]())

    async def serve(self, *handlers: tuple[Method[Any, Any], Callable[..., Awaitable[Any]]]) -> Channel:
        server = self.server(self.network)
        for method, handler in handlers:
            server.register(method, handler)
        return self.network.channel(await server.start())

    async def serve_stream(self, handler: Callable[..., AsyncIterator[Note]]) -> Channel:
        server = self.server(self.network)
        server.register(ECHO, echo)
        server.register_stream(COUNT, handler)
        return self.network.channel(await server.start())

    def server(self, network: Network, bind: str = "127.0.0.1:0") -> Server:
        server = network.server(bind)
        self.servers.append(server)
        return server


@pytest.fixture(params=["grpc", "memory"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    logged: list[str] = []
    make: MakeNetwork
    if request.param == "grpc":
        make = functools.partial(GrpcNetwork, log=logged.append)
    else:
        make = functools.partial(MemoryNetwork, rng=random.Random(7), log=logged.append)
    rig = Rig(make, make(), logged)
    yield rig
    await rig.network.close()
    for server in rig.servers:
        await server.stop(0)


async def soon(awaitable: Awaitable[T]) -> T:
    return await asyncio.wait_for(awaitable, PATIENCE_S)


async def _collect(bodies: AsyncIterator[Note], numbers: list[int]) -> None:
    async for body in bodies:
        numbers.append(body.number)


async def test_a_unary_call_carries_both_bodies(rig: Rig) -> None:
    async def shout(note: Note, context: CallContext) -> Note:
        return Note(text=note.text.upper(), number=note.number + 1, raw=note.raw[::-1])

    channel = await rig.serve((ECHO, shout))
    reply = await channel.call(ECHO, Note(text="grün", number=2**62, raw=b"\x00\xff"), timeout_s=PATIENCE_S)
    assert reply == Note(text="GRÜN", number=2**62 + 1, raw=b"\xff\x00")


async def test_a_handler_learns_peer_method_and_time_left(rig: Rig) -> None:
    seen: list[CallContext] = []
    left: list[float] = []

    async def note_context(note: Note, context: CallContext) -> Note:
        seen.append(context)
        left.append(context.remaining_s())
        return note

    channel = await rig.serve((ECHO, note_context))
    await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
    assert seen[0].method == "test/Echo"
    assert "127.0.0.1" in seen[0].peer
    assert 0 < left[0] <= PATIENCE_S


ERRORS = [*(kind for kind in ERROR_BY_CODE.values() if kind is not TandemError), Internal]


@pytest.mark.parametrize("kind", ERRORS)
async def test_a_handlers_error_arrives_as_the_same_error(rig: Rig, kind: type[TandemError]) -> None:
    thrown = kind(f"no: {kind.code} at »here«", param="prompt", retry_after_s=1.5)

    async def refuse(note: Note, context: CallContext) -> Note:
        raise thrown

    channel = await rig.serve((ECHO, refuse))
    with pytest.raises(type(thrown)) as caught:
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
    assert type(caught.value) is type(thrown)
    assert caught.value.message == thrown.message
    assert (caught.value.param, caught.value.retry_after_s) == ("prompt", 1.5)
    assert rig.logged == []


async def test_a_very_long_error_message_arrives_cut(rig: Rig) -> None:
    async def refuse(note: Note, context: CallContext) -> Note:
        raise BadRequest("ü" * 100_000)

    channel = await rig.serve((ECHO, refuse))
    with pytest.raises(BadRequest, match=r"^ü{1000,}…$"):
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)


async def test_any_other_exception_is_internal_and_logged(rig: Rig) -> None:
    async def break_down(note: Note, context: CallContext) -> Note:
        raise ZeroDivisionError("secret detail")

    channel = await rig.serve((ECHO, break_down))
    with pytest.raises(Internal, match="test/Echo: the handler raised ZeroDivisionError"):
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
    (text,) = rig.logged
    assert "Traceback" in text
    assert "secret detail" in text
    assert "break_down" in text


async def test_something_cancelled_inside_a_handler_is_internal(rig: Rig) -> None:
    async def await_the_cancelled(note: Note, context: CallContext) -> Note:
        cancelled = asyncio.get_running_loop().create_future()
        cancelled.cancel()
        await cancelled
        return note

    channel = await rig.serve((ECHO, await_the_cancelled))
    with pytest.raises(Internal, match="CancelledError"):
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)


@dataclass
class Hanging:
    """A handler that waits for ever, and says how it went."""

    started: asyncio.Event = field(default_factory=asyncio.Event)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)

    async def __call__(self, note: Note, context: CallContext) -> Note:
        self.started.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return note

    async def stream(self, note: Note, context: CallContext) -> AsyncIterator[Note]:
        yield Note(number=1)
        yield await self(note, context)


async def test_a_deadline_ends_the_call_and_cancels_the_handler(rig: Rig) -> None:
    handler = Hanging()
    channel = await rig.serve((HANG, handler))
    with pytest.raises(DeadlineExceeded, match=r"test/Hang at 127\.0\.0\.1:\d+: no reply within 0\.3 s"):
        await channel.call(HANG, Note(), timeout_s=0.3)
    if handler.started.is_set():
        await soon(handler.cancelled.wait())


async def test_a_call_without_time_left_is_not_made(rig: Rig) -> None:
    handler = Hanging()
    channel = await rig.serve((HANG, handler))
    with pytest.raises(DeadlineExceeded, match="no time left"):
        await channel.call(HANG, Note(), timeout_s=-0.5)
    assert not handler.started.is_set()


async def test_cancelling_a_call_cancels_the_handler(rig: Rig) -> None:
    handler = Hanging()
    channel = await rig.serve((HANG, handler))
    call = asyncio.create_task(channel.call(HANG, Note(), timeout_s=PATIENCE_S))
    await soon(handler.started.wait())
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    await soon(handler.cancelled.wait())
    assert rig.logged == []


async def test_a_stream_keeps_order_and_ends(rig: Rig) -> None:
    async def count(note: Note, context: CallContext) -> AsyncIterator[Note]:
        for number in range(note.number):
            yield Note(number=number)

    channel = await rig.serve_stream(count)
    bodies = channel.stream(COUNT, Note(number=1000), idle_timeout_s=PATIENCE_S)
    assert [body.number async for body in bodies] == list(range(1000))


async def test_an_empty_stream_ends(rig: Rig) -> None:
    async def nothing(note: Note, context: CallContext) -> AsyncIterator[Note]:
        if note.number:
            yield note

    channel = await rig.serve_stream(nothing)
    assert [body async for body in channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S)] == []


async def test_a_streams_error_comes_after_its_bodies(rig: Rig) -> None:
    async def fail_late(note: Note, context: CallContext) -> AsyncIterator[Note]:
        for number in range(20):
            yield Note(number=number)
        raise NoCapacity("full after twenty", retry_after_s=2.0)

    channel = await rig.serve_stream(fail_late)
    numbers: list[int] = []
    with pytest.raises(NoCapacity, match="full after twenty"):
        await _collect(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S), numbers)
    assert numbers == list(range(20))


@pytest.mark.parametrize("bodies_read", [0, 1, 3])
async def test_closing_a_stream_ends_its_handler(rig: Rig, bodies_read: int) -> None:
    ended = asyncio.Event()

    async def for_ever(note: Note, context: CallContext) -> AsyncIterator[Note]:
        try:
            while True:
                yield note
                await asyncio.sleep(0)
        finally:
            ended.set()

    channel = await rig.serve_stream(for_ever)
    async with aclosing(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S)) as bodies:
        for _ in range(bodies_read):
            await anext(bodies)
    if bodies_read:
        await soon(ended.wait())
    assert rig.logged == []


async def test_cancelling_a_streams_reader_ends_its_handler(rig: Rig) -> None:
    handler = Hanging()
    channel = await rig.serve_stream(handler.stream)

    async def read() -> None:
        async with aclosing(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S)) as bodies:
            async for _ in bodies:
                pass

    reader = asyncio.create_task(read())
    await soon(handler.started.wait())
    reader.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reader
    await soon(handler.cancelled.wait())


async def test_a_silent_stream_ends_at_its_idle_timeout(rig: Rig) -> None:
    handler = Hanging()
    channel = await rig.serve_stream(handler.stream)
    numbers: list[int] = []
    with pytest.raises(DeadlineExceeded, match=r"test/Count at 127\.0\.0\.1:\d+: no body within 1 s"):
        await _collect(channel.stream(COUNT, Note(), idle_timeout_s=1.0), numbers)
    assert numbers == [1]
    await soon(handler.cancelled.wait())


async def test_a_slow_reader_holds_the_handler_back(rig: Rig) -> None:
    produced = 0

    async def pour(note: Note, context: CallContext) -> AsyncIterator[Note]:
        nonlocal produced
        while True:
            produced += 1
            yield Note(raw=bytes(64 * 1024))

    channel = await rig.serve_stream(pour)
    async with aclosing(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S)) as bodies:
        await anext(bodies)
        before = -1
        while produced != before:
            before = produced
            for _ in range(50):
                await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
            assert produced < 5000, "the handler runs on though nobody reads"


async def test_two_hundred_calls_at_once(rig: Rig) -> None:
    all_here = asyncio.Event()
    waiting = 0

    async def wait_for_all(note: Note, context: CallContext) -> Note:
        nonlocal waiting
        waiting += 1
        if waiting == 200:
            all_here.set()
        await all_here.wait()
        return note

    channel = await rig.serve((ECHO, wait_for_all))
    replies = await asyncio.gather(*(channel.call(ECHO, Note(number=n), timeout_s=PATIENCE_S) for n in range(200)))
    assert [reply.number for reply in replies] == list(range(200))


async def test_a_server_at_its_limit_of_open_calls_refuses(rig: Rig) -> None:
    network = rig.make_network(max_open_calls=2)
    handlers = [Hanging(), Hanging()]

    async def hang(note: Note, context: CallContext) -> Note:
        return await handlers[note.number](note, context)

    server = rig.server(network)
    server.register(HANG, hang)
    channel = network.channel(await server.start())
    calls: list[asyncio.Task[Note]] = []
    for number, handler in enumerate(handlers):
        call = channel.call(HANG, Note(number=number), timeout_s=PATIENCE_S)
        calls.append(asyncio.create_task(call))
        await soon(handler.started.wait())
    with pytest.raises(NoCapacity, match="2 calls are open"):
        await channel.call(HANG, Note(), timeout_s=PATIENCE_S)
    for handler in handlers:
        handler.go_on.set()
    await asyncio.gather(*calls)
    await network.close()


async def test_an_unknown_method_is_not_found(rig: Rig) -> None:
    channel = await rig.serve((ECHO, echo))
    with pytest.raises(NotFound, match=r"test/Hang at 127\.0\.0\.1:[1-9]"):
        await channel.call(HANG, Note(), timeout_s=PATIENCE_S)
    with pytest.raises(NotFound, match="test/Count"):
        await anext(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S))


async def test_a_method_is_registered_once(rig: Rig) -> None:
    server = rig.server(rig.network)
    server.register(ECHO, echo)
    with pytest.raises(InvariantBroken, match="test/Echo is registered twice"):
        server.register(ECHO, echo)


async def test_a_request_of_the_wrong_type_is_a_bad_request(rig: Rig) -> None:
    channel = await rig.serve((ECHO, echo))
    other = Method("test/Echo", NumberedText, Note)
    with pytest.raises(BadRequest, match=r"test/Echo.*Expected `str`, got `int`.*\$\.text"):
        await channel.call(other, NumberedText(text=3), timeout_s=PATIENCE_S)


async def test_a_reply_of_the_wrong_type_is_internal(rig: Rig) -> None:
    channel = await rig.serve((ECHO, echo))
    other = Method("test/Echo", Note, NumberedText)
    with pytest.raises(Internal, match=r"reply of test/Echo at .*\$\.text"):
        await channel.call(other, Note(text="three"), timeout_s=PATIENCE_S)


async def test_bodies_over_the_limit_are_refused_both_ways(rig: Rig) -> None:
    async def inflate(note: Note, context: CallContext) -> Note:
        return Note(raw=bytes(note.number))

    network = rig.make_network(max_body_bytes=10_000)
    server = rig.server(network)
    server.register(ECHO, inflate)
    channel = network.channel(await server.start())
    with pytest.raises(PayloadTooLarge, match=r"request of test/Echo.*the limit is 10000"):
        await channel.call(ECHO, Note(raw=bytes(10_001)), timeout_s=PATIENCE_S)
    with pytest.raises(PayloadTooLarge, match=r"reply of test/Echo.*the limit is 10000"):
        await channel.call(ECHO, Note(number=10_001), timeout_s=PATIENCE_S)
    assert len((await channel.call(ECHO, Note(number=9_000), timeout_s=PATIENCE_S)).raw) == 9_000
    await network.close()


async def test_a_large_body_passes(rig: Rig) -> None:
    channel = await rig.serve((ECHO, echo))
    raw = random.Random(0).randbytes(8 * 1024 * 1024)
    assert (await channel.call(ECHO, Note(raw=raw), timeout_s=PATIENCE_S)).raw == raw


async def test_stop_lets_open_calls_end(rig: Rig) -> None:
    handler = Hanging()
    channel = await rig.serve((HANG, handler))
    call = asyncio.create_task(channel.call(HANG, Note(text="late"), timeout_s=PATIENCE_S))
    await soon(handler.started.wait())
    stopping = asyncio.create_task(rig.servers[0].stop(PATIENCE_S))
    handler.go_on.set()
    assert (await call).text == "late"
    await soon(stopping)
    with pytest.raises(WorkerUnavailable):
        await channel.call(HANG, Note(), timeout_s=PATIENCE_S)


async def test_stop_cancels_what_outlives_the_grace(rig: Rig) -> None:
    handler, streaming = Hanging(), Hanging()
    server = rig.server(rig.network)
    server.register(HANG, handler)
    server.register_stream(COUNT, streaming.stream)
    channel = rig.network.channel(await server.start())
    call = asyncio.create_task(channel.call(HANG, Note(), timeout_s=PATIENCE_S))
    stream = channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S)
    assert (await anext(stream)).number == 1
    await soon(asyncio.gather(handler.started.wait(), streaming.started.wait()))
    await soon(server.stop(0.05))
    with pytest.raises(WorkerUnavailable, match="test/Hang"):
        await call
    with pytest.raises(WorkerUnavailable, match="test/Count"):
        await anext(stream)
    await soon(asyncio.gather(handler.cancelled.wait(), streaming.cancelled.wait()))


async def test_stop_may_be_repeated_and_come_before_start(rig: Rig) -> None:
    await rig.server(rig.network).stop(0)
    await rig.serve((ECHO, echo))
    for _ in range(2):
        await rig.servers[-1].stop(0)


async def test_nobody_there_is_worker_unavailable(rig: Rig) -> None:
    await rig.serve((ECHO, echo))
    address = await rig.server(rig.network).start()
    await rig.servers[-1].stop(0)
    channel = rig.network.channel(address)
    with pytest.raises(WorkerUnavailable, match=f"test/Echo at {address}"):
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
    with pytest.raises(WorkerUnavailable, match=f"test/Count at {address}"):
        await anext(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S))


async def test_an_address_in_use_is_a_config_error(rig: Rig) -> None:
    address = await rig.server(rig.network).start()
    with pytest.raises(ConfigError, match=f"cannot listen on {address}"):
        await rig.server(rig.network, address).start()


async def _eventually_echoes(channel: Channel) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert (await channel.call(ECHO, Note(number=5), timeout_s=5)).number == 5
            except WorkerUnavailable:
                await asyncio.sleep(0.02)
            else:
                return


@pytest.mark.parametrize("drop", [True, False])
async def test_a_restarted_server_is_reached_again(rig: Rig, drop: bool) -> None:
    first = rig.server(rig.network)
    first.register(ECHO, echo)
    address = await first.start()
    await _eventually_echoes(rig.network.channel(address))
    await first.stop(0)
    with pytest.raises(WorkerUnavailable):
        await rig.network.channel(address).call(ECHO, Note(), timeout_s=PATIENCE_S)
    second = rig.server(rig.network, address)
    second.register(ECHO, echo)
    assert await second.start() == address
    if drop:
        await rig.network.drop(address)
    await _eventually_echoes(rig.network.channel(address))


async def test_channels_are_pooled_until_dropped(rig: Rig) -> None:
    channel = rig.network.channel("127.0.0.1:1")
    assert rig.network.channel("127.0.0.1:1") is channel
    await rig.network.drop("127.0.0.1:1")
    await rig.network.drop("127.0.0.1:1")
    assert rig.network.channel("127.0.0.1:1") is not channel
    with pytest.raises(WorkerUnavailable, match="the channel is closed"):
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
    with pytest.raises(WorkerUnavailable, match="the channel is closed"):
        await anext(channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S))


async def test_dropping_a_channel_fails_its_calls(rig: Rig) -> None:
    handler, streaming = Hanging(), Hanging()
    server = rig.server(rig.network)
    server.register(HANG, handler)
    server.register_stream(COUNT, streaming.stream)
    address = await server.start()
    channel = rig.network.channel(address)
    call = asyncio.create_task(channel.call(HANG, Note(), timeout_s=PATIENCE_S))
    bodies = channel.stream(COUNT, Note(), idle_timeout_s=PATIENCE_S)
    assert (await anext(bodies)).number == 1
    reading = asyncio.ensure_future(anext(bodies))
    await soon(asyncio.gather(handler.started.wait(), streaming.started.wait()))
    await rig.network.drop(address)
    with pytest.raises(WorkerUnavailable, match="the channel was closed"):
        await call
    with pytest.raises(WorkerUnavailable, match="the channel was closed"):
        await reading
    await soon(asyncio.gather(handler.cancelled.wait(), streaming.cancelled.wait()))


async def test_a_closed_network_makes_no_calls(rig: Rig) -> None:
    address = await rig.server(rig.network).start()
    channel = rig.network.channel(address)
    await rig.network.close()
    with pytest.raises(WorkerUnavailable):
        await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)
    with pytest.raises(WorkerUnavailable, match="closed"):
        rig.network.channel(address)


# --- a killed server --------------------------------------------------------------------------------


@dataclass
class Victim:
    address: str
    kill: Callable[[], None]


@asynccontextmanager
async def _child_process(signal_number: int) -> AsyncGenerator[Victim, None]:
    child = await asyncio.create_subprocess_exec(sys.executable, "-c", CHILD, cwd=ROOT, stdout=asyncio.subprocess.PIPE)
    assert child.stdout is not None
    try:
        address = (await soon(child.stdout.readline())).decode().strip()
        yield Victim(address, lambda: child.send_signal(signal_number))
    finally:
        if child.returncode is None:
            child.kill()
        await soon(child.wait())


@asynccontextmanager
async def _memory_victim(rig: Rig) -> AsyncGenerator[Victim, None]:
    network = rig.network
    assert isinstance(network, MemoryNetwork)
    handler = Hanging()
    server = rig.server(network)
    server.register(ECHO, echo)
    server.register(HANG, handler)
    server.register_stream(COUNT, handler.stream)
    address = await server.start()
    yield Victim(address, lambda: network.crash(address))


async def test_a_killed_server_fails_calls_and_streams_at_once(rig: Rig) -> None:
    in_memory = isinstance(rig.network, MemoryNetwork)
    async with _memory_victim(rig) if in_memory else _child_process(signal.SIGKILL) as victim:
        channel = rig.network.channel(victim.address)
        await _eventually_echoes(channel)
        call = asyncio.create_task(channel.call(HANG, Note(), timeout_s=PATIENCE_S))
        bodies = channel.stream(COUNT, Note(number=1), idle_timeout_s=PATIENCE_S)
        await anext(bodies)
        victim.kill()
        with pytest.raises(WorkerUnavailable, match=f"test/Count at {victim.address}"):
            await anext(bodies)
        with pytest.raises(WorkerUnavailable, match=f"test/Hang at {victim.address}"):
            await call
        with pytest.raises(WorkerUnavailable, match=f"test/Echo at {victim.address}"):
            await channel.call(ECHO, Note(), timeout_s=PATIENCE_S)


async def test_a_frozen_process_is_noticed_by_keepalive() -> None:
    network = GrpcNetwork()
    async with _child_process(signal.SIGSTOP) as victim:
        channel = network.channel(victim.address)
        bodies = channel.stream(COUNT, Note(number=1), idle_timeout_s=PATIENCE_S)
        await anext(bodies)
        victim.kill()
        with pytest.raises(WorkerUnavailable, match="test/Count"):
            await anext(bodies)
    await network.close()


# --- gRPC alone -------------------------------------------------------------------------------------


@asynccontextmanager
async def _echo_server(network: GrpcNetwork) -> AsyncGenerator[str, None]:
    server = network.server("127.0.0.1:0")
    server.register(ECHO, echo)
    yield await server.start()
    await server.stop(0)
    await network.close()


@pytest.mark.parametrize(("token", "said"), [(None, "no cluster token"), ("guess", "wrong cluster token")])
async def test_a_call_without_the_token_is_refused_before_its_body_is_parsed(token: str | None, said: str) -> None:
    stranger = GrpcNetwork(token=token)
    nonsense = Method("test/Echo", NumberedText, Note)
    async with _echo_server(GrpcNetwork(token="s3cret")) as address:
        for method in (ECHO, HANG):
            with pytest.raises(Unauthorized, match=said):
                await stranger.channel(address).call(method, Note(), timeout_s=PATIENCE_S)
        with pytest.raises(Unauthorized, match=said):
            await stranger.channel(address).call(nonsense, NumberedText(text=1), timeout_s=PATIENCE_S)
        with pytest.raises(Unauthorized, match=said):
            await anext(stranger.channel(address).stream(COUNT, Note(), idle_timeout_s=PATIENCE_S))
    await stranger.close()


async def test_a_call_with_the_token_is_served() -> None:
    network = GrpcNetwork(token="s3cret")
    async with _echo_server(network) as address:
        reply = await network.channel(address).call(ECHO, Note(number=1), timeout_s=PATIENCE_S)
        assert reply.number == 1


@pytest.mark.parametrize("bind", ["0.0.0.0:0", "[::]:0", "192.0.2.1:0", "example.org:0"])
async def test_only_loopback_is_served_without_a_token(bind: str) -> None:
    with pytest.raises(ConfigError, match="without a cluster token"):
        GrpcNetwork().server(bind)


@pytest.mark.parametrize("bind", ["", "127.0.0.1", "127.0.0.1:", ":0", "127.0.0.1:x", "127.0.0.1:70000"])
async def test_a_malformed_address_is_a_config_error(bind: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        GrpcNetwork().server(bind)


async def test_a_server_with_a_smaller_limit_refuses_the_body() -> None:
    generous = GrpcNetwork()
    async with _echo_server(GrpcNetwork(max_body_bytes=1000)) as address:
        for size in (2_000, 200_000):
            with pytest.raises(PayloadTooLarge, match="test/Echo"):
                await generous.channel(address).call(ECHO, Note(raw=bytes(size)), timeout_s=PATIENCE_S)
    await generous.close()


async def test_bodies_on_the_wire_are_plain_messagepack_maps() -> None:
    msgpack = importlib.import_module("msgpack")  # a package without types
    packb: Callable[[object], bytes] = msgpack.packb
    unpackb: Callable[[bytes], object] = msgpack.unpackb
    async with (
        _echo_server(GrpcNetwork()) as address,
        aio.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel,
    ):
        call: aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/tandem/test/Echo")
        body = {"text": "hi", "number": 7, "raw": b"\x01", "from_a_later_version": [1, 2]}
        assert unpackb((await call(seal(packb(body)), timeout=PATIENCE_S))[:-CHECKSUM_BYTES]) == {
            "text": "hi",
            "number": 7,
            "raw": b"\x01",
        }
        with pytest.raises(aio.AioRpcError) as caught:
            await call(seal(b"\xc1"), timeout=PATIENCE_S)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        trailing = dict(cast("tuple[tuple[str, bytes], ...]", caught.value.trailing_metadata()))
        error = cast("dict[str, object]", unpackb(trailing["tandem-error-bin"]))
        assert error["code"] == "bad_request"
        assert "test/Echo" in str(error["message"])
