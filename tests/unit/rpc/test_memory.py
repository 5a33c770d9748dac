"""What only the in-memory network has: delays, losses, lives and deaths, all on virtual time."""

from __future__ import annotations

import asyncio
import contextvars
import random
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import DeadlineExceeded, WorkerUnavailable
from contracts.messages import Method, StreamMethod
from rpc import CallContext, MemoryNetwork
from rpc.codec import CHECKSUM_BYTES
from rpc.memory import BROKEN_AFTER_S, STREAM_WINDOW, Message
from simulator import run

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from rpc.memory import MemoryProcess
    from simulator import Program

T = TypeVar("T")


class Number(msgspec.Struct, frozen=True):
    value: int


ECHO = Method("test/Echo", Number, Number)
COUNT = StreamMethod("test/Count", Number, Number)


def play(main: Coroutine[Any, Any, T]) -> T:
    async def program(program: Program) -> T:
        return await main

    return run(program, seed=0)


def make_network(latency_s: Callable[[Message], float | None]) -> MemoryNetwork:
    return MemoryNetwork(rng=random.Random(1), latency_s=lambda message, _: latency_s(message))


async def echo(number: Number, context: CallContext) -> Number:
    return number


async def count(number: Number, context: CallContext) -> AsyncIterator[Number]:
    for value in range(number.value):
        yield Number(value)


async def serve(process: MemoryProcess, bind: str = "127.0.0.1:0") -> str:
    server = process.server(bind)
    server.register(ECHO, echo)
    server.register_stream(COUNT, count)
    return await server.start()


def now_s() -> float:
    return asyncio.get_running_loop().time()


def test_a_call_takes_the_delays_of_its_two_messages() -> None:
    async def main() -> tuple[int, float]:
        delays = {"request": 0.25, "reply": 0.5}
        network = make_network(lambda message: delays[message.kind])
        reply = await network.channel(await serve(network)).call(ECHO, Number(5), timeout_s=1)
        return reply.value, now_s()

    assert play(main()) == (5, 0.75)


def test_a_delay_may_depend_on_everything_about_the_message() -> None:
    seen: list[Message] = []

    def look(message: Message) -> float:
        seen.append(message)
        return 0.0

    async def main() -> None:
        network = make_network(look)
        address = await serve(network.process("there"), "there:0")
        await network.process("here").channel(address).call(ECHO, Number(5), timeout_s=1)

    play(main())
    num_bytes = len(b"\x81\xa5value\x05") + CHECKSUM_BYTES
    assert seen == [
        Message(source="here", target="there", method="test/Echo", kind="request", num_bytes=num_bytes),
        Message(source="there", target="here", method="test/Echo", kind="reply", num_bytes=num_bytes),
    ]


@given(delays_s=st.lists(st.sampled_from([0.0, 0.1, 0.2]), min_size=1, max_size=200))
def test_bodies_keep_their_order_under_any_delays(delays_s: list[float]) -> None:
    async def main() -> list[int]:
        remaining = iter(delays_s)
        network = make_network(lambda _: next(remaining, 0.0))
        channel = network.channel(await serve(network))
        return [body.value async for body in channel.stream(COUNT, Number(150), idle_timeout_s=100)]

    assert play(main()) == list(range(150))


def test_a_handler_is_at_most_a_window_ahead() -> None:
    asked_for = 0

    async def pour(number: Number, context: CallContext) -> AsyncIterator[Number]:
        nonlocal asked_for
        while True:
            asked_for += 1
            yield number

    async def main() -> None:
        network = make_network(lambda _: 0.001)
        server = network.server("127.0.0.1:0")
        server.register_stream(COUNT, pour)
        channel = network.channel(await server.start())
        async with aclosing(channel.stream(COUNT, Number(0), idle_timeout_s=1)) as bodies:
            for read in range(1, 200):
                await anext(bodies)
                await asyncio.sleep(0.1)
                # One more waits for its place in the window.
                assert asked_for == read + STREAM_WINDOW + 1
            await server.stop(0)

    play(main())


def test_a_lost_request_runs_into_the_deadline() -> None:
    async def main() -> float:
        network = make_network(lambda _: None)
        channel = network.channel(await serve(network))
        with pytest.raises(DeadlineExceeded):
            await channel.call(ECHO, Number(1), timeout_s=0.5)
        return now_s()

    assert play(main()) == 0.5


@pytest.mark.parametrize("lost", ["request", "body"])
def test_both_ends_notice_a_broken_connection(lost: str) -> None:
    async def main() -> float:
        ended_at: list[float] = []

        async def hang(number: Number, context: CallContext) -> AsyncIterator[Number]:
            try:
                yield number
                await asyncio.Event().wait()
            finally:
                ended_at.append(now_s())

        network = make_network(lambda message: None if message.kind == lost else 0.0)
        server = network.server("127.0.0.1:0")
        server.register_stream(COUNT, hang)
        channel = network.channel(await server.start())
        with pytest.raises(WorkerUnavailable, match="no sign of life for 3 s"):
            await anext(channel.stream(COUNT, Number(1), idle_timeout_s=100))
        noticed_s = now_s()
        await asyncio.sleep(1)
        assert ended_at == ([noticed_s] if lost == "body" else [])
        return noticed_s

    assert play(main()) == BROKEN_AFTER_S


def test_what_a_crashed_server_sent_before_still_arrives() -> None:
    async def main() -> list[int]:
        network = make_network(lambda _: 1.0)
        address = await serve(network)
        received: list[int] = []

        async def read() -> None:
            async for body in network.channel(address).stream(COUNT, Number(1000), idle_timeout_s=100):
                received.append(body.value)

        reading = asyncio.ensure_future(read())
        await asyncio.sleep(1.5)
        network.crash(address)
        with pytest.raises(WorkerUnavailable, match="the server was killed"):
            await reading
        return received

    assert play(main()) == list(range(STREAM_WINDOW))


def test_a_crashed_address_is_refused_until_a_server_listens_there_again() -> None:
    async def main() -> int:
        network = make_network(lambda _: 0.01)
        address = await serve(network, "host:7")
        network.crash(address)
        network.crash(address)
        with pytest.raises(WorkerUnavailable, match="connection refused"):
            await network.channel(address).call(ECHO, Number(1), timeout_s=1)
        assert await serve(network, "host:7") == address
        return (await network.channel(address).call(ECHO, Number(2), timeout_s=1)).value

    assert play(main()) == 2


def test_nothing_leaves_a_killed_process() -> None:
    async def main() -> None:
        network = make_network(lambda _: 0.01)
        served: list[int] = []
        cancelled: list[int] = []

        async def note(number: Number, context: CallContext) -> Number:
            served.append(number.value)
            try:
                await asyncio.sleep(1)
            except asyncio.CancelledError:
                cancelled.append(number.value)
                raise
            return number

        server = network.server("127.0.0.1:0")
        server.register(ECHO, note)
        address = await server.start()
        victim = network.process("victim")

        async def program() -> None:
            try:
                await victim.channel(address).call(ECHO, Number(1), timeout_s=10)
            finally:
                with suppress(WorkerUnavailable):
                    await victim.channel(address).call(ECHO, Number(2), timeout_s=10)

        running = asyncio.ensure_future(program())
        await asyncio.sleep(0.5)
        victim.kill()
        with pytest.raises(WorkerUnavailable, match="the calling program was killed"):
            await running
        await asyncio.sleep(0.5)
        assert (served, cancelled) == ([1], [1])

    play(main())


def test_a_killed_process_takes_its_servers_along_and_the_next_life_starts_clean() -> None:
    async def main() -> int:
        network = make_network(lambda _: 0.01)
        first_life = network.process("worker")
        address = await serve(first_life, "worker:7")
        await network.channel(address).call(ECHO, Number(1), timeout_s=1)
        first_life.kill()
        with pytest.raises(WorkerUnavailable, match="refused"):
            await network.channel(address).call(ECHO, Number(1), timeout_s=1)
        await serve(network.process("worker"), "worker:7")
        return (await network.channel(address).call(ECHO, Number(3), timeout_s=1)).value

    assert play(main()) == 3


def test_no_context_variable_crosses_the_network() -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")

    async def main() -> list[str]:
        seen: list[str] = []

        async def look(number: Number, context: CallContext) -> Number:
            seen.append(variable.get())
            return number

        network = make_network(lambda _: 0.01)
        server = network.server("127.0.0.1:0")
        server.register(ECHO, look)
        variable.set("of the caller")
        await network.channel(await server.start()).call(ECHO, Number(1), timeout_s=1)
        return seen

    assert play(main()) == ["none"]
