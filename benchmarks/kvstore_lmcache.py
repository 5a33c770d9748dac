"""LMCache's CPU and disk back ends with the blocks of `benchmarks.kvstore`: run by an interpreter that has LMCache.

    PATH/bin/python benchmarks/kvstore_lmcache.py ROUNDS FOLDER

Prints one line of JSON: seconds of each put and get of a prefix, by back end. A put copies blocks from the memory of an
engine into those of the back end, a get copies them back; disk files go past the page cache, but are neither synced nor
checked. There is no process in between, no lease and no call: that is the store's price, not the copy's.

What LMCache needs for that, without its parts for GPUs: `pip install --no-deps lmcache torch` and numba, with what
their imports ask for.
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import threading
import time
from typing import Any

NUM_PREFIXES, PREFIX_BLOCKS, BLOCK_TOKENS = 8, 112, 16
#: Keys and values, layers, tokens, heads by their size: 196,608 bytes of bfloat16.
SHAPE = (2, 12, BLOCK_TOKENS, 256)
WRITE_TIMEOUT_S = 60.0


class Bench:
    def __init__(self, folder: str) -> None:
        self.torch: Any = importlib.import_module("torch")
        config_class: Any = importlib.import_module("lmcache.v1.config").LMCacheEngineConfig
        metadata_class: Any = importlib.import_module("lmcache.v1.metadata").LMCacheMetadata
        self._key_class: Any = importlib.import_module("lmcache.utils").CacheEngineKey
        self._format: Any = importlib.import_module("lmcache.v1.memory_management").MemoryFormat.KV_2LTD
        back_ends = "lmcache.v1.storage_backend."
        cpu_class: Any = importlib.import_module(f"{back_ends}local_cpu_backend").LocalCPUBackend
        disk_class: Any = importlib.import_module(f"{back_ends}local_disk_backend").LocalDiskBackend
        self.torch.set_num_threads(1)
        config = config_class.from_defaults(
            chunk_size=BLOCK_TOKENS,
            local_cpu=True,
            max_local_cpu_size=1.0,
            local_disk=folder,
            max_local_disk_size=4.0,
            extra_config={"use_odirect": True},
        )
        metadata = metadata_class(
            model_name="benchmark",
            world_size=1,
            local_world_size=1,
            worker_id=0,
            local_worker_id=0,
            kv_dtype=self.torch.bfloat16,
            kv_shape=(12, 2, BLOCK_TOKENS, 4, 64),
        )
        self.cpu = cpu_class(config, metadata, dst_device="cpu")
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()
        self.disk = disk_class(config, self._loop, self.cpu, dst_device="cpu", metadata=metadata)
        self._shape = self.torch.Size(SHAPE)
        #: Of the engine: twice what a prefix takes, in other places than the back end's.
        self.own = self.torch.randn(2 * PREFIX_BLOCKS, *SHAPE, dtype=self.torch.float32).to(self.torch.bfloat16)

    def keys(self, number: int) -> list[Any]:
        return [
            self._key_class("benchmark", 1, 0, number * PREFIX_BLOCKS + at, self.torch.bfloat16)
            for at in range(PREFIX_BLOCKS)
        ]

    def copied_in(self) -> list[Any]:
        """Blocks in the back end's memory."""
        found = [self.cpu.allocate(self._shape, self.torch.bfloat16, self._format) for _ in range(PREFIX_BLOCKS)]
        for at, memory in enumerate(found):
            memory.tensor.copy_(self.own[2 * at])
        return found

    def copied_out(self, found: list[Any]) -> None:
        for at, memory in enumerate(found):
            self.own[2 * at + 1].copy_(memory.tensor)
            memory.ref_count_down()

    def put_cpu(self, keys: list[Any]) -> None:
        for key, memory in zip(keys, self.copied_in(), strict=True):
            self.cpu.submit_put_task(key, memory)
            memory.ref_count_down()

    def get_cpu(self, keys: list[Any]) -> None:
        self.copied_out([self.cpu.get_blocking(key) for key in keys])

    def put_disk(self, keys: list[Any]) -> None:
        written = threading.Semaphore(0)

        def on_written(key: Any) -> None:
            written.release()

        for key, memory in zip(keys, self.copied_in(), strict=True):
            self.disk.submit_put_task(key, memory, on_complete_callback=on_written)
            memory.ref_count_down()
        for _ in keys:
            if not written.acquire(timeout=WRITE_TIMEOUT_S):
                raise RuntimeError("LMCache did not write a block")

    def get_disk(self, keys: list[Any]) -> None:
        self.copied_out(self.disk.batched_get_blocking(keys))


def main() -> None:
    rounds, folder = int(sys.argv[1]), sys.argv[2]
    bench = Bench(folder)
    found: dict[str, list[float]] = {name: [] for name in ("put_cpu", "get_cpu", "put_disk", "get_disk", "copy")}

    def timed(name: str, *arguments: Any) -> None:
        work = getattr(bench, name)
        start_s = time.perf_counter()
        work(*arguments)
        found[name].append(time.perf_counter() - start_s)

    for number in range(NUM_PREFIXES):
        timed("put_cpu", bench.keys(number))
    for number in range(NUM_PREFIXES):
        timed("put_disk", bench.keys(number))
    for turn in range(rounds * NUM_PREFIXES):
        timed("get_cpu", bench.keys(turn * 3 % NUM_PREFIXES))
        timed("get_disk", bench.keys((turn * 3 + 4) % NUM_PREFIXES))
        start_s = time.perf_counter()
        for at in range(PREFIX_BLOCKS):
            bench.own[2 * at + 1].copy_(bench.own[2 * at])
        found["copy"].append(time.perf_counter() - start_s)
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
