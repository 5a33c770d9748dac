"""Resets, repeated requests and overtaking on the in-memory network, on virtual time."""

from __future__ import annotations

import asyncio
import contextvars
import random
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import pytest

from contracts.errors import DeadlineExceeded, WorkerUnavailable
from contracts.messages import Method, StreamMethod
from rpc import CallContext, MemoryNetwork
from rpc.memory import Fate, Message
from simulator import VirtualLoop, run
from simulator.loop import HOST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Coroutine

    from rpc.memory import MemoryProcess
    from simulator import Program

T = TypeVar("T")


class Number(msgspec.Struct, frozen=True):
    value: int


SLEEP = Method("test/Sleep", Number, Number)
COUNT = StreamMethod("test/Count", Number, Number)

DELAY_S = 0.01


def play(main: Coroutine[Any, Any, T]) -> T:
    async def program(program: Program) -> T:
        return await main

    return run(program, seed=0)


def now_s() -> float:
    return round(asyncio.get_running_loop().time(), 9)


class Sleepers:
    """A server that sleeps as many seconds as it is told, or counts once a second, and says what happened when."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, float]] = []

    async def sleep(self, number: Number, context: CallContext) -> Number:
        self.events.append(("begins", number.value, now_s()))
        how = "is cancelled"
        try:
            await asyncio.sleep(number.value)
            how = "ends"
        finally:
            self.events.append((how, number.value, now_s()))
        return Number(len(self.events))

    async def count(self, number: Number, context: CallContext) -> AsyncIterator[Number]:
        self.events.append(("begins", number.value, now_s()))
        try:
            for value in range(number.value):
                yield Number(value)
                await asyncio.sleep(1.0)
        finally:
            self.events.append(("closes", number.value, now_s()))

    async def serve(self, process: MemoryProcess, bind: str) -> str:
        server = process.server(bind)
        server.register(SLEEP, self.sleep)
        server.register_stream(COUNT, self.count)
        return await server.start()


def make_network(fate: Callable[[Message], Fate | float | None]) -> MemoryNetwork:
    return MemoryNetwork(rng=random.Random(1), latency_s=lambda message, _: fate(message))


class Switch:
    """The fate of the next message of a kind; all else takes `DELAY_S`."""

    def __init__(self) -> None:
        self._next: dict[str, Fate | None] = {}

    def set(self, kind: str, fate: Fate | None) -> None:
        self._next[kind] = fate

    def __call__(self, message: Message) -> Fate | float | None:
        return self._next.pop(message.kind, DELAY_S)


RESET = Fate(outcome="reset")


async def failure(awaited: Coroutine[Any, Any, object]) -> tuple[str, float]:
    with pytest.raises(WorkerUnavailable) as caught:
        await awaited
    return str(caught.value), now_s()


def test_a_fate_s_delay_is_a_delay() -> None:
    async def main() -> float:
        network = make_network(lambda message: Fate(delay_s=0.25 if message.kind == "request" else 0.5))
        await network.channel(await Sleepers().serve(network, "there:0")).call(SLEEP, Number(0), timeout_s=1)
        return now_s()

    assert play(main()) == 0.75


def test_a_reset_ends_every_call_of_its_connection_at_once_at_both_ends() -> None:
    async def main() -> None:
        switch, sleepers = Switch(), Sleepers()
        network = make_network(switch)
        address = await sleepers.serve(network.process("there"), "there:1")
        caller, other = network.process("here"), network.process("elsewhere")
        calls = [
            asyncio.ensure_future(failure(process.channel(address).call(SLEEP, Number(value), timeout_s=100)))
            for process, value in ((caller, 5), (caller, 6))
        ]
        untouched = asyncio.ensure_future(other.channel(address).call(SLEEP, Number(7), timeout_s=100))
        await asyncio.sleep(1.0)
        switch.set("request", RESET)
        calls.append(asyncio.ensure_future(failure(caller.channel(address).call(SLEEP, Number(8), timeout_s=100))))
        assert await asyncio.gather(*calls) == [("test/Sleep at there:1: the connection was reset", 1.0)] * 3
        await asyncio.sleep(0)
        begun = [("begins", value, DELAY_S) for value in (5, 6, 7)]
        assert sleepers.events == [*begun, ("is cancelled", 5, 1.0), ("is cancelled", 6, 1.0)]
        await untouched
        # The next call opens a connection anew.
        await caller.channel(address).call(SLEEP, Number(0), timeout_s=1)

    play(main())


def test_a_reset_takes_what_is_under_way_along_and_leaves_what_has_arrived() -> None:
    async def main() -> tuple[list[int], float]:
        switch, sleepers = Switch(), Sleepers()
        network = make_network(lambda message: switch(message) if message.kind == "request" else 0.6)
        address = await sleepers.serve(network.process("there"), "there:1")
        channel = network.channel(address)
        read: list[int] = []

        async def listen() -> None:
            async for body in channel.stream(COUNT, Number(100), idle_timeout_s=100):
                read.append(body.value)

        listening = asyncio.ensure_future(failure(listen()))
        # Body 0 arrives at 0.61, body 1 at 1.61, body 2 is sent at 2.01 and would arrive at 2.61.
        await asyncio.sleep(2.2)
        switch.set("request", RESET)
        with suppress(WorkerUnavailable):
            await channel.call(SLEEP, Number(0), timeout_s=1)
        _, ended_s = await listening
        await asyncio.sleep(5.0)
        assert sleepers.events == [("begins", 100, DELAY_S), ("closes", 100, 2.2)]
        return read, ended_s

    assert play(main()) == ([0, 1], 2.2)


@pytest.mark.parametrize("kind", ["reply", "hang_up"])
def test_a_reset_by_any_message_ends_the_handler_and_the_call(kind: str) -> None:
    async def main() -> None:
        switch, sleepers = Switch(), Sleepers()
        switch.set(kind, RESET)
        network = make_network(switch)
        address = await sleepers.serve(network, "there:1")
        call = network.channel(address).call(SLEEP, Number(2), timeout_s=1.0 if kind == "hang_up" else 9.0)
        with pytest.raises(DeadlineExceeded if kind == "hang_up" else WorkerUnavailable):
            await call
        await asyncio.sleep(5.0)
        # The handler heard of the hanging up through the reset itself: without a delay.
        assert sleepers.events[1] == (("is cancelled", 2, 1.0) if kind == "hang_up" else ("ends", 2, 2.0 + DELAY_S))

    play(main())


def test_a_repeated_request_is_served_twice_and_the_first_reply_is_the_call_s() -> None:
    async def main() -> None:
        switch, sleepers = Switch(), Sleepers()
        switch.set("request", Fate(delay_s=DELAY_S, repeat_after_s=1.0))
        network = make_network(switch)
        channel = network.channel(await sleepers.serve(network, "there:1"))
        reply = await channel.call(SLEEP, Number(2), timeout_s=10)
        assert (reply.value, now_s()) == (3, 2 + 2 * DELAY_S)
        # Who was asked next is not confused by the second reply.
        assert (await channel.call(SLEEP, Number(3), timeout_s=10)).value == 6
        first, second = [("begins", 2, DELAY_S), ("ends", 2, 2 + DELAY_S)], [("begins", 2, 1 + DELAY_S)]
        assert sleepers.events[:4] == [first[0], second[0], first[1], ("begins", 3, 2 + 3 * DELAY_S)]
        assert sleepers.events[4] == ("ends", 2, 3 + DELAY_S)

    play(main())


def test_where_the_first_reply_is_lost_the_second_counts() -> None:
    async def main() -> float:
        switch = Switch()
        switch.set("request", Fate(delay_s=DELAY_S, repeat_after_s=0.5))
        switch.set("reply", None)
        network = make_network(switch)
        channel = network.channel(await Sleepers().serve(network, "there:1"))
        await channel.call(SLEEP, Number(1), timeout_s=10)
        return now_s()

    assert play(main()) == 1.5 + 2 * DELAY_S


def test_a_repeated_request_that_nobody_waits_for_runs_to_its_own_deadline() -> None:
    async def main() -> list[tuple[str, int, float]]:
        switch, sleepers = Switch(), Sleepers()
        switch.set("request", Fate(repeat_after_s=3.0))
        network = make_network(switch)
        channel = network.channel(await sleepers.serve(network, "there:1"))
        with pytest.raises(DeadlineExceeded):
            await channel.call(SLEEP, Number(50), timeout_s=2.0)
        await asyncio.sleep(10.0)
        return sleepers.events

    ended = [("is cancelled", 50, 2.0), ("begins", 50, 3.0), ("is cancelled", 50, 5.0)]
    assert play(main()) == [("begins", 50, 0.0), *ended]


def test_streams_and_replies_are_never_repeated() -> None:
    async def main() -> list[int]:
        network = make_network(lambda message: Fate(delay_s=DELAY_S, repeat_after_s=0.001))
        sleepers = Sleepers()
        channel = network.channel(await sleepers.serve(network, "there:1"))
        values = [body.value async for body in channel.stream(COUNT, Number(3), idle_timeout_s=10)]
        assert [event for event, _, _ in sleepers.events] == ["begins", "closes"]
        return values

    assert play(main()) == [0, 1, 2]


def test_calls_overtake_each_other() -> None:
    async def main() -> list[int]:
        delays = iter([0.5, 0.1])
        network = make_network(lambda message: next(delays) if message.kind == "request" else 0.0)
        sleepers = Sleepers()
        channel = network.channel(await sleepers.serve(network, "there:1"))
        await asyncio.gather(*(channel.call(SLEEP, Number(value), timeout_s=10) for value in (0, 1)))
        return [value for event, value, _ in sleepers.events if event == "begins"]

    assert play(main()) == [1, 0]


def test_what_a_process_sent_before_it_froze_arrives() -> None:
    async def main() -> None:
        network = make_network(lambda _: 1.0)
        sleepers = Sleepers()
        channel = network.channel(await sleepers.serve(network, "there:1"))
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        context = contextvars.copy_context()
        context.run(HOST.set, "caller")
        calling = loop.create_task(channel.call(SLEEP, Number(0), timeout_s=100), context=context)
        await asyncio.sleep(0.5)
        loop.freeze("caller")
        await asyncio.sleep(5.0)
        assert sleepers.events == [("begins", 0, 1.0), ("ends", 0, 1.0)]
        assert not calling.done()
        loop.thaw("caller")
        await calling

    play(main())
