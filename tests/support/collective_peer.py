"""One process's side of the collective transport, for tests: `python -m tests.support.collective_peer ROLE ...`.

    hold ADDRESS BLOCKS BYTES INCARNATION [INTERFACE]   fills a pool with `content`, prints its endpoint in hex
    read ADDRESS BLOCKS BYTES ENDPOINT [INTERFACE]      obeys lines of standard input, answering each with one:

        pull N        pulls blocks 0 to N-1 into the same of its own; answers "begun" once bytes have landed, and
                      when it is over with "ok" or the error's class
        pulls N       the same over and over; answers "begun" after the first, and no more
        fill VALUE    overwrites its whole pool with this byte
        filled N      how many of its pool's bytes from block N on are what it was last filled with
        right N       how many of its first N blocks hold the holder's content

Both live until their standard input ends.
"""

from __future__ import annotations

import asyncio
import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np

from contracts.ids import BlockId, Incarnation
from kvtransfer.collective import CollectiveTransport
from rpc import GrpcNetwork, LiveClock
from tests.support.pools import register_pool

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from numpy.typing import NDArray

TOKEN = "of the collective transport's tests"

#: No word of a holder's pool is 0, and no two are equal.
FIRST_WORD = 1 << 40

#: How often a pull under way is looked at.
LOOK_S = 0.001


def words(pool: memoryview, block_bytes: int) -> NDArray[np.uint64]:
    """The pool by blocks and 8-byte words; writes go through."""
    return np.frombuffer(pool, np.uint64).reshape(-1, block_bytes // 8)


def content(blocks: Sequence[int], block_bytes: int) -> NDArray[np.uint64]:
    """What these blocks of a holder hold, in the same shape."""
    words_per_block = block_bytes // 8
    firsts = np.array(blocks, np.uint64) * np.uint64(words_per_block) + np.uint64(FIRST_WORD)
    return firsts[:, None] + np.arange(words_per_block, dtype=np.uint64)[None, :]


@asynccontextmanager
async def peer(
    address: str,
    incarnation: int,
    interface: str | None = None,
    advertise: Callable[[bytes], bytes] = bytes,
    device: str = "cpu",
) -> AsyncGenerator[CollectiveTransport]:
    """A transport with its network and server, at "host:port"; port 0 takes a free one."""
    network = GrpcNetwork(token=TOKEN)
    host, _, port = address.rpartition(":")
    if port == "0":
        # gRPC registers methods before it binds, and the transport is told where it is reached.
        probe = network.server(address)
        port = (await probe.start()).rpartition(":")[2]
        await probe.stop(0.0)
    server = network.server(f"{host}:{port}")
    transport = CollectiveTransport(
        clock=LiveClock(),
        network=network,
        address=f"{host}:{port}",
        incarnation=Incarnation(incarnation),
        interface=interface,
        device=device,
        advertise=advertise,
    )
    transport.register_on(server)
    await server.start()
    try:
        yield transport
    finally:
        await transport.close()
        await server.stop(0.0)
        await network.close()


async def _next_line() -> str:
    line: str = await asyncio.to_thread(sys.stdin.readline)
    return line.strip()


def _say(line: str) -> None:
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


async def hold(address: str, num_blocks: int, block_bytes: int, incarnation: int, interface: str | None) -> None:
    async with peer(address, incarnation, interface) as transport:
        pool = register_pool(transport, num_blocks, block_bytes)
        words(pool, block_bytes)[:] = content(range(num_blocks), block_bytes)
        _say(transport.endpoint().hex())
        while await _next_line():
            pass
        pool.release()


class _Reader:
    def __init__(self, transport: CollectiveTransport, endpoint: bytes, pool: memoryview, block_bytes: int) -> None:
        self._transport = transport
        self._endpoint = endpoint
        self._words = words(pool, block_bytes)
        self._bytes = np.frombuffer(pool, np.uint8)
        self._block_bytes = block_bytes
        self._filled = 0

    async def obey(self, verb: str, number: int) -> str:
        match verb:
            case "pull":
                return await self._pull(number, begun="begun")
            case "pulls":
                answer = await self._pull(number, begun=None)
                _say("begun")
                while answer == "ok":
                    answer = await self._pull(number, begun=None)
                return answer
            case "fill":
                self._filled = number
                self._bytes[:] = number
                return "filled"
            case "filled":
                return str(int(np.count_nonzero(self._bytes[number * self._block_bytes :] == self._filled)))
            case "right":
                same = (self._words[:number] == content(range(number), self._block_bytes)).all(axis=1)
                return str(int(np.count_nonzero(same)))
            case _:
                return f"no such command: {verb}"

    async def _pull(self, num_blocks: int, begun: str | None) -> str:
        before = self._words[0, 0]
        pull = self._transport.pull(self._endpoint, [(BlockId(each), BlockId(each)) for each in range(num_blocks)])
        over = asyncio.ensure_future(pull.wait())
        if begun is not None:
            while not over.done() and self._words[0, 0] == before:  # noqa: ASYNC110 - memory has no event
                await asyncio.sleep(LOOK_S)
            _say(begun)
        error = (await over).error
        return "ok" if error is None else type(error).__name__


async def read(address: str, num_blocks: int, block_bytes: int, endpoint: bytes, interface: str | None) -> None:
    async with peer(address, 1, interface) as transport:
        reader = _Reader(transport, endpoint, register_pool(transport, num_blocks, block_bytes), block_bytes)
        _say("ready")
        while line := await _next_line():
            verb, _, number = line.partition(" ")
            _say(await reader.obey(verb, int(number)))
        del reader


def main(arguments: Sequence[str]) -> None:
    role, address, num_blocks, block_bytes, fourth, *rest = arguments
    interface = rest[0] if rest else None
    if role == "hold":
        asyncio.run(hold(address, int(num_blocks), int(block_bytes), int(fourth), interface))
    else:
        asyncio.run(read(address, int(num_blocks), int(block_bytes), bytes.fromhex(fourth), interface))


if __name__ == "__main__":
    main(sys.argv[1:])
