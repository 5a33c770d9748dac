"""The holder's process of `benchmarks.kvtransfer`: `python -m benchmarks.kvtransfer_holder SCRATCH`.

Reads orders from its standard input, one JSON object a line, and answers each with a line that begins with `MARK`
(libraries may print, too). It ends when the input does.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.kvtransfer_handoff import Offerer
from benchmarks.kvtransfer_lanes import holder_lanes
from kvtransfer import HostPool

if TYPE_CHECKING:
    from benchmarks.kvtransfer_lanes import HolderLane

MARK = "@kvtransfer "


def stamp(block: int) -> int:
    """What every byte of a holder's block is."""
    return 1 + block * 7 % 251


def filled_pool(num_blocks: int, block_bytes: int) -> HostPool:
    pool = HostPool(num_blocks, block_bytes)
    content = np.frombuffer(pool.view(), np.uint8).reshape(num_blocks, block_bytes)
    content[:] = np.array([stamp(block) for block in range(num_blocks)], np.uint8)[:, None]
    return pool


class Holder:
    """At most one pool at a time, and the lanes to it."""

    def __init__(self, scratch: Path) -> None:
        self._makers = holder_lanes(scratch)
        self._lanes: dict[str, HolderLane] = {}
        self._pool: HostPool | None = None

    async def obey(self, order: dict[str, Any]) -> dict[str, Any]:
        match order["do"]:
            case "open":
                return await self._open(order["lanes"], order["num_blocks"], order["block_bytes"])
            case "lane":
                self._lanes[order["lane"]].obey(order["order"])
                return {}
            case "close":
                await self.close()
                return {}
            case "handoff":
                async with Offerer(order["reader"], order["num_blocks"], order["block_bytes"]) as offerer:
                    return await offerer.offer(order["count"])
            case other:
                raise ValueError(f"unknown order {other!r}")

    async def _open(self, lanes: list[str], num_blocks: int, block_bytes: int) -> dict[str, Any]:
        self._pool = filled_pool(num_blocks, block_bytes)
        hellos: dict[str, Any] = {}
        for name in lanes:
            self._lanes[name] = self._makers[name]()
            hellos[name] = await self._lanes[name].open(self._pool)
        return hellos

    async def close(self) -> None:
        lanes, self._lanes = self._lanes, {}
        for lane in lanes.values():
            await lane.close()
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()


async def serve(scratch: Path) -> None:
    loop = asyncio.get_running_loop()
    reader = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    async with contextlib.AsyncExitStack() as stack:
        holder = Holder(scratch)
        stack.push_async_callback(holder.close)
        while line := await reader.readline():
            answer = await holder.obey(json.loads(line))
            sys.stdout.write(f"{MARK}{json.dumps(answer)}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(serve(Path(sys.argv[1])))
