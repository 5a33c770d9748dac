"""A program that uses all that could make two runs differ. As a script it prints the digest of its trace."""

from __future__ import annotations

import asyncio
import sys
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import TandemError, WorkerUnavailable
from contracts.messages import Method, StreamMethod
from rpc import CallContext, MemoryNetwork
from simulator import Program, VirtualClock, run

if TYPE_CHECKING:
    import random
    from collections.abc import AsyncIterator, Sequence

    from rpc import Channel


class Number(msgspec.Struct, frozen=True):
    value: int


DOUBLE = Method("small/Double", Number, Number)
COUNT = StreamMethod("small/Count", Number, Number)


async def main(program: Program) -> str:
    """Clients in a task group call two servers; one server crashes; leftovers are cancelled as sets."""
    network = MemoryNetwork(rng=program.rng("latency"))
    addresses = [await _serve(network, program, name) for name in ("left", "right")]
    channels = [network.channel(address) for address in addresses]
    with suppress(ExceptionGroup):
        async with asyncio.TaskGroup() as group:
            for number in range(12):
                rng = program.rng(f"client {number}")
                group.create_task(_client(program, channels, rng, number))
            group.create_task(_crash_later(network, addresses[0]))
    await _cancel_a_set(program)
    return program.trace.digest()


async def _serve(network: MemoryNetwork, program: Program, name: str) -> str:
    clock, rng = VirtualClock(), program.rng(name)

    async def double(number: Number, context: CallContext) -> Number:
        await clock.sleep(rng.expovariate(100))
        return Number(2 * number.value)

    async def count(number: Number, context: CallContext) -> AsyncIterator[Number]:
        try:
            for value in range(number.value):
                yield Number(value)
                await clock.sleep(rng.expovariate(100))
        finally:
            program.trace.add(f"{name}: stream of {number.value} ends")

    server = network.server(f"{name}:0")
    server.register(DOUBLE, double)
    server.register_stream(COUNT, count)
    return await server.start()


async def _client(program: Program, channels: Sequence[Channel], rng: random.Random, number: int) -> None:
    try:
        for _ in range(20):
            await _one_call(program, rng.choice(channels), rng, number)
    except asyncio.CancelledError:
        program.trace.add(f"client {number} is cancelled")
        raise


async def _one_call(program: Program, channel: Channel, rng: random.Random, number: int) -> None:
    try:
        if rng.random() < 0.5:
            reply = await channel.call(DOUBLE, Number(rng.randrange(100)), timeout_s=rng.uniform(0.001, 0.1))
            program.trace.add(f"client {number} got {reply.value}")
            return
        async with aclosing(channel.stream(COUNT, Number(5), idle_timeout_s=0.02)) as bodies:
            async for body in bodies:
                program.trace.add(f"client {number} counts {body.value}")
    except WorkerUnavailable as error:
        program.trace.add(f"client {number} gives up: {error}")
        raise
    except TandemError as error:
        program.trace.add(f"client {number}: {error}")


async def _crash_later(network: MemoryNetwork, address: str) -> None:
    await asyncio.sleep(0.15)
    network.crash(address)


async def _cancel_a_set(program: Program) -> None:
    async def wait(number: int) -> None:
        try:
            await asyncio.sleep(10 + number % 3)
        except asyncio.CancelledError:
            program.trace.add(f"waiter {number} is cancelled")

    loop = asyncio.get_running_loop()
    _, pending = await asyncio.wait({loop.create_task(wait(number)) for number in range(50)}, timeout=11.5)
    for task in pending:
        task.cancel()
    await asyncio.wait(pending)


if __name__ == "__main__":
    print(run(main, seed=int(sys.argv[1])))
