"""Ways of our own of getting a checkpoint into memory, for `benchmarks.coldstart`; each load in a child process.

    python -m benchmarks.coldstart_ways ORIGINAL CONVERTED TMPFS

Each line on its input names a way; a line of JSON says how long it took. What it loaded is let go before the next.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from coldstart.file_source import FileSource
from coldstart.format import checksum, read_index
from coldstart.loaded import LoadedWeights
from coldstart.memory import WeightMemory, populate_read
from coldstart.pipeline import NUM_THREADS, MemoryDestination, PartitionLoad
from coldstart.reading import load_partition
from contracts.ids import BlockId
from engine.checkpoint import Checkpoint
from engine.fused import expected_tensors
from engine.model_config import load_model_config
from engine.ops import select_ops
from engine.plan import SequenceStep, StepPlan
from engine.runner import EngineOptions, load_runner

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.format import Index

MIB = 1 << 20
#: Pieces and threads of the raw limit.
RAW_WAYS = tuple((piece * MIB, threads) for piece in (1, 4) for threads in (2, 4, 8, 16))
PROMPT_TOKENS = 16


def run_threads(num_threads: int, num_jobs: int, job: Callable[[int], None]) -> None:
    """Each thread takes the next job."""
    guard, waiting = threading.Lock(), iter(range(num_jobs))

    def work() -> None:
        while True:
            with guard:
                number = next(waiting, None)
            if number is None:
                return
            job(number)

    threads = [threading.Thread(target=work) for _ in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def raw(path: Path, piece: int, num_threads: int) -> None:
    """Direct reads of all of it, each thread into one buffer of its own: nothing is kept or checked."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    buffers = threading.local()
    size = path.stat().st_size

    def job(number: int) -> None:
        if not hasattr(buffers, "view"):
            buffers.view = memoryview(mmap.mmap(-1, piece))
            buffers.view[:] = bytes(piece)
        wanted = min(piece, size - number * piece)
        if os.preadv(descriptor, [buffers.view[:wanted]], number * piece) != wanted:
            raise RuntimeError(f"a short read of {path}")

    run_threads(num_threads, -(-size // piece), job)
    os.close(descriptor)


class Ways:
    def __init__(self, original: Path, converted: Path, on_tmpfs: Path) -> None:
        self._original = original
        self._folders = {"disk": converted, "tmpfs": on_tmpfs}

    def run(self, words: list[str]) -> dict[str, float]:
        """Seconds, and what else the way tells."""
        way, *rest = words
        if way == "raw":
            path = self._folders["disk"] / self._index("disk").partitions[0].file
            return _timed(lambda: raw(path, int(rest[0]), int(rest[1])))
        if way == "ours":
            return self._ours(rest[0])
        if way == "memcpy":
            return self._memcpy(made=rest[0] == "made")
        if way == "tensors":
            return self._tensors()
        if way == "forwards":
            return self._forwards(populate=rest[0] == "populated")
        return self._ablation(way)

    def _index(self, place: str) -> Index:
        return read_index(self._folders[place])

    def _memory(self, place: str, *, made: bool = False) -> mmap.mmap:
        memory = WeightMemory(self._index(place).partitions[0].num_bytes)
        memory.close_descriptor()
        if made:
            np.frombuffer(memory.mapping, np.uint8)[::4096] = 0
        return memory.mapping

    def _ours(self, place: str) -> dict[str, float]:
        """As a worker does it: `made` has the pages made before, as memcpy has them there."""
        place, _, state = place.partition("-")
        memory = self._memory(place, made=state == "made")
        folder = self._folders[place]
        before = _reset_peak()

        def load() -> None:
            index = read_index(folder)
            destination = MemoryDestination(memory, index.chunk_bytes, populate=state != "made")
            load_partition(folder, index, 0, destination)

        found = _timed(load)
        destination_bytes = 0 if state == "made" else len(memory)
        return {**found, "extra_bytes": float(_peak_bytes() - before - destination_bytes)}

    def _memcpy(self, *, made: bool) -> dict[str, float]:
        path = self._folders["tmpfs"] / self._index("tmpfs").partitions[0].file
        with path.open("rb") as file:
            source = np.frombuffer(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ), np.uint8)
        source[::4096].sum()
        target = np.frombuffer(self._memory("tmpfs", made=made), np.uint8)

        def copy() -> None:
            target[:] = source

        return _timed(copy)

    def _tensors(self) -> dict[str, float]:
        """As the engine reads without us: tensor by tensor, through the cache, one thread, not checked."""
        shapes = expected_tensors(load_model_config(self._original))

        def load() -> None:
            with Checkpoint(self._original, shapes) as checkpoint:
                for name, shape in shapes.items():
                    checkpoint.read_into(name, torch.empty(shape, dtype=torch.bfloat16))

        return _timed(load)

    def _ablation(self, way: str) -> dict[str, float]:
        """`bulk`: large reads in order; `direct`: past the cache; `threads`: several; all three check afterwards.
        `pipeline` checks while others read."""
        index = self._index("disk")
        partition, chunk_bytes = index.partitions[0], index.chunk_bytes
        memory = self._memory("disk")
        num_threads = NUM_THREADS if way in ("threads", "pipeline") else 1
        view = memoryview(memory)

        def check(chunk: int) -> None:
            piece = view[chunk * chunk_bytes : (chunk + 1) * chunk_bytes]
            if checksum(piece) != partition.checksums[chunk]:
                raise RuntimeError(f"chunk {chunk} is wrong")

        def load() -> None:
            source = FileSource(self._folders["disk"] / partition.file, direct=way != "bulk")
            destination = MemoryDestination(memory, chunk_bytes, populate=False)
            verify = way == "pipeline"
            PartitionLoad(source, partition, chunk_bytes, destination, num_threads=num_threads, verify=verify).run()
            source.close()
            if not verify:
                run_threads(num_threads, len(partition.checksums), check)

        return _timed(load)

    def _forwards(self, *, populate: bool) -> dict[str, float]:
        """An engine over a copy that lies in memory, mapped as another process would: bind, and three forwards."""
        folder = self._folders["disk"]
        index = self._index("disk")
        memory = WeightMemory(index.partitions[0].num_bytes)
        load_partition(folder, index, 0, MemoryDestination(memory.mapping, index.chunk_bytes))
        mapping = mmap.mmap(memory.read_only, memory.num_bytes, prot=mmap.PROT_READ)
        memory.close()
        ops = select_ops("cpu", log=lambda _: None)
        start_s = time.perf_counter()
        if populate:
            populate_read(mapping)
        mapped_s = time.perf_counter()
        weights = LoadedWeights(mapping, index)
        runner = load_runner(folder, EngineOptions(num_blocks=8), ops, weights=weights)
        bound_s = time.perf_counter()
        step = SequenceStep(
            sequence_id=0, token_ids=list(range(PROMPT_TOKENS)), start=0, block_ids=[BlockId(0)], sample=None
        )
        ends_s = [bound_s]
        for _ in range(3):
            runner.run(StepPlan((step,)))
            ends_s.append(time.perf_counter())
        return {
            "s": ends_s[1] - start_s,
            "map_s": mapped_s - start_s,
            "bind_s": bound_s - mapped_s,
            "first_s": ends_s[1] - ends_s[0],
            "second_s": ends_s[2] - ends_s[1],
            "third_s": ends_s[3] - ends_s[2],
        }


def _timed(do: Callable[[], object]) -> dict[str, float]:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    do()
    return {"s": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}


def _status_bytes(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _reset_peak() -> int:
    """Resident bytes now; the peak counts from here."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _peak_bytes() -> int:
    return _status_bytes("VmHWM")


def main() -> None:
    torch.set_num_threads(2)
    ways = Ways(Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(ways.run(line.split())), flush=True)


if __name__ == "__main__":
    main()
