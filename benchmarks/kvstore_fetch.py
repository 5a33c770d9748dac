"""Part `dram` of `benchmarks.kvstore`: prefixes go to a store and come back, as between a worker and its own store.

Two processes, real gRPC, blocks of the 88 M shape that lie scattered on both sides. What the transfer itself does is
held against memcpy of blocks of the same store over the same two mappings, taking turns with it; no turn copies a
prefix that was copied in one of the two before.

`python -m benchmarks.kvstore_fetch {measure,profile} ROUNDS [FOLDER]` is the worker's process; it prints JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import os
import random
import subprocess
import sys
import time
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import uvloop

from benchmarks.kvstore_blocks import BLOCK_BYTES, PREFIX_BLOCKS, kv_like, prefix_keys
from benchmarks.kvstore_client import NUM_PREFIXES, POOL_BLOCKS, Client
from benchmarks.kvtransfer_lanes import MemmoveReader, NumpyReader
from benchmarks.kvtransfer_reader import HolderProcess
from benchmarks.report import print_table, spread
from contracts.ids import BlockId
from contracts.messages import Peer

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from benchmarks.kvtransfer_lanes import ReaderLane

#: Blocks of one Keep: prefixes come in pieces, mixed with each other's, so that they do not lie in one piece.
PIECE_BLOCKS = 4
LOOK_S = 0.002
PART_TIMEOUT_S = 300.0


@contextlib.asynccontextmanager
async def store_process(folder: str | None) -> AsyncGenerator[HolderProcess]:
    arguments = [str(POOL_BLOCKS), *([folder] if folder else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "benchmarks.kvstore_holder", *arguments,
        stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 26,
    )  # fmt: skip
    try:
        yield HolderProcess(process)
        assert process.stdin is not None
        process.stdin.close()
        async with asyncio.timeout(10):
            await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def settled(process: HolderProcess) -> None:
    """The store has written what it was given."""
    is_idle = False
    while not is_idle:
        await asyncio.sleep(LOOK_S)
        is_idle = (await process.ask(do="look"))["is_idle"]


async def fill(client: Client, store: Peer, prefixes: Sequence[tuple[bytes, ...]], rng: random.Random) -> None:
    """Writes each prefix to the store, in pieces that come mixed; nothing of it is left here."""
    values = kv_like(PIECE_BLOCKS, seed=7)
    pieces = [(keys, start) for keys in prefixes for start in range(0, len(keys), PIECE_BLOCKS)]
    rng.shuffle(pieces)
    for keys, start in pieces:
        part = keys[start : start + PIECE_BLOCKS]
        blocks = client.ledger.allocate("fill", len(part))
        if blocks is None:
            raise RuntimeError("a pool that holds nothing has no room")
        for at, (block, key) in enumerate(zip(blocks, part, strict=True)):
            client.content[block] = values[at]
            client.content[block][: len(key)] = np.frombuffer(key, np.uint8)
        await client.keep(store, blocks, part, start)
        client.ledger.release("fill", blocks)


def verify(client: Client, keys: tuple[bytes, ...]) -> None:
    """Each block that came begins with its own key; then it does not any more."""
    for key in keys:
        block = client.ledger.lookup(key)
        if block is None or client.content[block][: len(key)].tobytes() != key:
            raise RuntimeError("a fetched block is not the one that was kept")
        client.content[block][: len(key)] = 0


async def measure(rounds: int) -> dict[str, list[float]]:
    """Seconds by lane: the wire of a fetch, all of it, and memcpy of the same blocks in two ways."""
    rng = random.Random(5)
    found: dict[str, list[float]] = {name: [] for name in ("wire", "fetch", "memmove", "numpy", "keep", "again")}
    async with store_process(None) as process, Client() as client:
        hello = await process.ask(do="describe")
        store = Peer(worker_id=hello["worker_id"], incarnation=hello["incarnation"], address=hello["address"])
        prefixes = [prefix_keys(number) for number in range(NUM_PREFIXES)]
        await fill(client, store, prefixes, rng)
        where = [(await process.ask(do="blocks", keys=[key.hex() for key in keys]))["blocks"] for keys in prefixes]
        lanes: dict[str, ReaderLane] = {"memmove": MemmoveReader(), "numpy": NumpyReader()}
        for lane in lanes.values():
            await lane.open(client.pool, hello, _no_orders)
        for keys in prefixes:
            await client.fetch(store, keys)
            verify(client, keys)
            client.forget(rng)
        gc.collect()
        gc.disable()
        try:
            for turn in range(rounds * NUM_PREFIXES):
                number = turn % NUM_PREFIXES
                # Three prefixes apart, so that no lane copies what another one has just read.
                others = [(number + 3 * (1 + at)) % NUM_PREFIXES for at in range(len(lanes))]
                wire_s = client.wire_s()
                took_s, _ = await client.fetch(store, prefixes[number])
                found["fetch"].append(took_s)
                found["wire"].append(client.wire_s() - wire_s)
                verify(client, prefixes[number])
                client.forget(rng)
                for (name, lane), other in zip(lanes.items(), others, strict=True):
                    targets = rng.sample(range(POOL_BLOCKS), PREFIX_BLOCKS)
                    pairs = zip(map(BlockId, where[other]), map(BlockId, targets), strict=True)
                    copy = await lane.prepare(list(pairs))
                    start_s = time.perf_counter()
                    await copy()
                    found[name].append(time.perf_counter() - start_s)
                    # It refers to the mapping, which is to be closed.
                    del copy
        finally:
            gc.enable()
        for lane in lanes.values():
            await lane.close()
        await _measure_keeps(process, client, store, rounds, found)
    return found


async def _measure_keeps(
    process: HolderProcess, client: Client, store: Peer, rounds: int, found: dict[str, list[float]]
) -> None:
    """What a store takes to copy a whole prefix, and one that it has."""
    for number in range(rounds):
        keys = prefix_keys(100 + number)
        blocks = client.ledger.allocate("keep", len(keys))
        if blocks is None:
            raise RuntimeError("no room for a prefix")
        found["keep"].append(await client.keep(store, blocks, keys, 0))
        found["again"].append(await client.keep(store, blocks, keys, 0))
        client.ledger.release("keep", blocks)
        client.forget(random.Random(number))
        await settled(process)


async def profile(rounds: int, folder: str | None) -> dict[str, str]:
    """Where a store's loop spends its time, by what it does: cProfile of as many keeps and fetches of a prefix."""
    rng = random.Random(6)
    texts: dict[str, str] = {}
    async with store_process(folder) as process, Client() as client:
        hello = await process.ask(do="describe")
        store = Peer(worker_id=hello["worker_id"], incarnation=hello["incarnation"], address=hello["address"])
        prefixes = [prefix_keys(1000 + number) for number in range(rounds)]
        await process.ask(do="profile")
        for keys in prefixes:
            blocks = client.ledger.allocate("keep", len(keys)) or []
            await client.keep(store, blocks, keys, 0)
            client.ledger.release("keep", blocks)
            await settled(process)
        texts[f"{rounds} keeps"] = (await process.ask(do="profiled"))["text"]
        present = [keys for keys in prefixes if None not in (await _where(process, keys))]
        for tier in ("dram", "ssd") if folder else ("dram",):
            await process.ask(do="profile")
            for keys in present[-NUM_PREFIXES // 2 :] if tier == "dram" else prefixes[: NUM_PREFIXES // 2]:
                if tier == "ssd":
                    await process.ask(do="forget")
                _, tiers = await client.fetch(store, keys)
                if set(tiers) != {tier}:
                    raise RuntimeError(f"{tiers} blocks came, {tier} was meant")
                client.forget(rng)
            texts[f"{NUM_PREFIXES // 2} fetches from {tier}"] = (await process.ask(do="profiled"))["text"]
    return texts


async def _where(process: HolderProcess, keys: tuple[bytes, ...]) -> list[int | None]:
    blocks: list[int | None] = (await process.ask(do="blocks", keys=[key.hex() for key in keys]))["blocks"]
    return blocks


async def _no_orders(order: dict[str, Any]) -> None:
    raise AssertionError(f"an order to nobody: {order}")


# --- the benchmark's side ---------------------------------------------------------------------------------


def run_child(*arguments: str) -> dict[str, Any]:
    # gRPC would otherwise remark on every process that is started.
    environment = os.environ | {"GRPC_ENABLE_FORK_SUPPORT": "0", "GRPC_VERBOSITY": "ERROR", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kvstore_fetch", *arguments],
        stdout=subprocess.PIPE,
        text=True,
        timeout=PART_TIMEOUT_S,
        check=True,
        env=environment,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure_dram(rounds: int) -> dict[str, float]:
    """`rounds` over all prefixes."""
    found: dict[str, list[float]] = run_child("measure", str(rounds))
    num_bytes = PREFIX_BLOCKS * BLOCK_BYTES

    def row(name: str, lane: str) -> list[object]:
        return [name, spread([1e3 * value for value in found[lane]]), num_bytes / median(found[lane]) / 1e9]

    print_table(
        f"{PREFIX_BLOCKS} scattered blocks of {BLOCK_BYTES:,} bytes ({num_bytes / 2**20:.1f} MiB), two processes",
        ["what", "ms", "GB/s"],
        [
            row("fetch from the store: bytes", "wire"),
            row("fetch from the store: all of it, with its calls", "fetch"),
            row("memcpy, ctypes.memmove", "memmove"),
            row("memcpy, numpy", "numpy"),
            row("keep: a prefix goes to the store", "keep"),
            row("keep: one that it has", "again"),
        ],
    )
    best_s = min(median(found["memmove"]), median(found["numpy"]))
    return {
        "dram_over_memcpy": best_s / median(found["wire"]),
        "dram_fetch_ms": 1e3 * median(found["fetch"]),
        "dram_fetch_over_memcpy": best_s / median(found["fetch"]),
    }


def print_profile(rounds: int, folder: str | None) -> None:
    texts: dict[str, str] = run_child("profile", str(rounds), *([folder] if folder else []))
    for what, text in texts.items():
        print(f"\nthe store's loop, {what} of {PREFIX_BLOCKS} blocks\n{text}")


if __name__ == "__main__":
    if sys.argv[1] == "measure":
        result: object = uvloop.run(measure(int(sys.argv[2])))
    else:
        result = uvloop.run(profile(int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
    print(json.dumps(result))
