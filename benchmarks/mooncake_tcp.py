"""Mooncake's transfer engine over TCP, for `benchmarks.kvtransfer`: reads scattered blocks from another process.

    PYTHON -m benchmarks.mooncake_tcp CELL_S BLOCK_BYTES:TOTAL_BYTES ...

Run by the interpreter of an environment that has Mooncake, and nothing of Tandem's: standard library only. Prints its
seconds as one JSON object, as the last line.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import mmap
import random
import subprocess
import sys
import time
from typing import Any

HOST = "127.0.0.1"
MARK = "@mooncake "
MAX_REPEATS = 200


class Memory:
    """Registered memory with all its pages."""

    def __init__(self, engine: Any, num_bytes: int, content: int) -> None:
        self._mapping = mmap.mmap(-1, num_bytes)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._mapping))
        ctypes.memset(self.address, content, num_bytes)
        if engine.register_memory(self.address, num_bytes) != 0:
            raise SystemExit(f"Mooncake could not register {num_bytes} bytes")

    def __getitem__(self, offset: int) -> int:
        return self._mapping[offset]


def make_engine() -> Any:
    engine = importlib.import_module("mooncake.engine").TransferEngine()
    if engine.initialize(HOST, "P2PHANDSHAKE", "tcp", "") != 0:
        raise SystemExit("Mooncake's engine did not start")
    return engine


def hold(num_bytes: int) -> None:
    engine = make_engine()
    memory = Memory(engine, num_bytes, 7)
    print(f"{MARK}{engine.get_rpc_port()} {memory.address}", flush=True)
    sys.stdin.read()


def read(engine: Any, holder: str, source: int, memory: Memory, pool_bytes: int, cell: str, cell_s: float) -> Any:
    block_bytes, total_bytes = map(int, cell.split(":"))
    rng = random.Random(1)
    num_blocks, count = pool_bytes // block_bytes, total_bytes // block_bytes
    seconds: list[float] = []
    stop_s = time.perf_counter() + cell_s
    while len(seconds) < 3 or (time.perf_counter() < stop_s and len(seconds) < MAX_REPEATS):
        own = [memory.address + block * block_bytes for block in rng.sample(range(num_blocks), count)]
        theirs = [source + block * block_bytes for block in rng.sample(range(num_blocks), count)]
        sizes = [block_bytes] * count
        start_s = time.perf_counter()
        status = engine.batch_transfer_sync_read(holder, own, theirs, sizes)
        seconds.append(time.perf_counter() - start_s)
        if status != 0 or any(memory[address - memory.address] != 7 for address in own):
            raise SystemExit(f"Mooncake's read of {count} x {block_bytes} bytes failed ({status})")
    return {"block_bytes": block_bytes, "num_blocks": count, "seconds": seconds[1:]}


def main() -> None:
    if sys.argv[1] == "hold":
        hold(int(sys.argv[2]))
        return
    cell_s, cells = float(sys.argv[1]), sys.argv[2:]
    pool_bytes = max(int(cell.split(":")[1]) for cell in cells) * 5 // 4
    command = [sys.executable, __file__, "hold", str(pool_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next(line for line in process.stdout if line.startswith(MARK))
            port, address = line.removeprefix(MARK).split()
            engine = make_engine()
            memory = Memory(engine, pool_bytes, 0)
            found = [read(engine, f"{HOST}:{port}", int(address), memory, pool_bytes, cell, cell_s) for cell in cells]
            print(json.dumps({"cells": found}), flush=True)
        finally:
            process.kill()


if __name__ == "__main__":
    main()
