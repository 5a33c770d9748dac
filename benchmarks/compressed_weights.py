"""Weights kept compressed in memory: how small, how fast there and back, and whether that beats reading them again.

    python -m benchmarks.compressed_weights [--quick] [--folder DIR] [--rounds N]

Gaussian weights of standard deviation 0.02 in bfloat16 and float32 (1 GiB each; `--quick`: 128 MiB), float32 that was
made from bfloat16, and the demo model. First each codec alone, by threads, over all chunks. Then whole loads into fresh
memory, every chunk checked: out of the compressed copy, and from the disk past the page cache; sides take turns. Beside
each rate stands what it takes of the processor, which says more on a machine that others use too.
"""

from __future__ import annotations

import argparse
import mmap
import os
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.coldstart import make_cold
from benchmarks.report import finish, print_table, spread
from coldstart.codec_trial import try_codec
from coldstart.codecs.registry import BEST, CODECS
from coldstart.compressed import CompressedCopy, Compression, RawCopy
from coldstart.convert import convert
from coldstart.format import (
    CHUNK_BYTES,
    INDEX_NAME,
    Index,
    Partition,
    TensorEntry,
    checksum,
    encode_index,
    partition_name,
    read_index,
)
from coldstart.pipeline import MemoryDestination
from coldstart.reading import load_partition
from engine.safetensors_files import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.safetensors_files import StoredDtype

DEMO = Path(__file__).parents[1] / "engine" / "demo"
FULL_BYTES, QUICK_BYTES = 1 << 30, 128 << 20
CODEC_NAMES = [kind.name for kind in CODECS.values() if kind.name != "raw"]


@dataclass
class Model:
    title: str
    folder: Path
    raw: RawCopy

    @property
    def num_bytes(self) -> int:
        return len(self.raw.weights)


def write_folder(folder: Path, dtype: StoredDtype, num_bytes: int, *, from_bfloat16: bool = False) -> Index:
    """A checkpoint in Tandem's format of Gaussian weights; some MB of memory at a time."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    name = partition_name(0, 1)
    sums: list[int] = []
    with (folder / name).open("wb") as file:
        for _ in range(num_bytes // CHUNK_BYTES):
            numbers = rng.standard_normal(CHUNK_BYTES // ITEM_BYTES[dtype], np.float32) * np.float32(0.02)
            data = numbers.tobytes()
            if dtype == "bfloat16" or from_bfloat16:
                # Rounded to the nearest, ties to even.
                bits = numbers.view(np.uint32)
                rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint32)
                data = (rounded.astype(np.uint16) if dtype == "bfloat16" else rounded << 16).tobytes()
            sums.append(checksum(data))
            file.write(data)
        os.fsync(file.fileno())
    tensor = TensorEntry(name="embedding", offset=0, shape=(num_bytes // ITEM_BYTES[dtype],), dtype=dtype)
    partition = Partition(file=name, num_bytes=num_bytes, tensors=(tensor,), checksums=tuple(sums))
    index = Index(
        model_fingerprint="gaussian",
        dtype=dtype,
        tensor_parallel=1,
        chunk_bytes=CHUNK_BYTES,
        partitions=(partition,),
        files=(),
    )
    (folder / INDEX_NAME).write_bytes(encode_index(index))
    return index


def in_memory(title: str, folder: Path) -> Model:
    """The folder's weights as they lie in a node agent's memory."""
    index = read_index(folder)
    weights = (folder / index.partitions[0].file).read_bytes()
    data = encode_index(index)
    return Model(title, folder, RawCopy(weights + data, len(weights), len(data), rank=0, name=title))


def compress(model: Model, num_threads: int) -> CompressedCopy:
    memory = bytearray(model.num_bytes * 11 // 10 + (1 << 20))
    count = Compression(model.raw, memory, BEST, num_threads=num_threads).run()
    return CompressedCopy(memoryview(memory)[:count], rank=0, name=model.title)


@dataclass(frozen=True)
class Took:
    seconds: float
    #: Of all cores, in this process.
    cpu_s: float


def timed(work: Callable[[], object]) -> Took:
    begin_s, begin_cpu_s = time.perf_counter(), time.process_time()
    work()
    return Took(time.perf_counter() - begin_s, time.process_time() - begin_cpu_s)


def decode(copy: CompressedCopy, num_threads: int) -> Took:
    memory = memoryview(mmap.mmap(-1, copy.num_bytes))
    return timed(lambda: copy.load(memory, num_threads=num_threads))


def read(model: Model) -> Took:
    make_cold(model.folder)
    memory = mmap.mmap(-1, model.num_bytes)
    destination = MemoryDestination(memory, model.raw.chunk_bytes)
    return timed(lambda: load_partition(model.folder, model.raw.index, 0, destination))


def run(folder: Path, *, quick: bool, rounds: int) -> None:
    num_bytes = QUICK_BYTES if quick else FULL_BYTES
    cores = len(os.sched_getaffinity(0))
    by_threads = sorted({1, *(2**power for power in range(1, 5) if 2**power <= cores), min(cores, 16)})
    write_folder(folder / "bfloat16", "bfloat16", num_bytes)
    write_folder(folder / "float32", "float32", num_bytes)
    write_folder(folder / "widened", "float32", num_bytes, from_bfloat16=True)
    convert(DEMO, folder / "demo")
    models = [
        in_memory("Gaussian bfloat16", folder / "bfloat16"),
        in_memory("Gaussian float32", folder / "float32"),
        in_memory("bfloat16 as float32", folder / "widened"),
        in_memory(f"demo model ({read_index(folder / 'demo').dtype})", folder / "demo"),
    ]
    figures: dict[str, float] = {}
    rows: list[tuple[object, ...]] = []
    for model in models:
        for codec in CODEC_NAMES:
            for num_threads in by_threads:
                rates = try_codec(
                    model.raw,
                    codec,
                    num_threads=num_threads,
                    now_s=time.perf_counter,
                    num_chunks=model.raw.num_chunks,
                )
                ratio, there = rates.ratio, rates.compress_bytes_per_s / 1e9
                back = rates.decode_bytes_per_s / 1e9
                rows.append((model.title, codec, num_threads, f"{ratio:.3f}", there, back))
                if model is models[0]:
                    figures[f"{codec}_ratio"] = ratio
                    figures[f"{codec}_compress_gb_per_s_{num_threads}"] = there
                    figures[f"{codec}_decode_gb_per_s_{num_threads}"] = back
    print_table("codecs", ("weights", "codec", "threads", "times smaller", "compress GB/s", "decode GB/s"), rows)

    rows = []
    for model in models[:3]:
        copy = compress(model, cores)
        sides: dict[str, Callable[[], Took]] = {
            "decoded": partial(decode, copy, cores),
            "read": partial(read, model),
        }
        took: dict[str, list[Took]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sorted(sides, reverse=bool(number % 2)):
                took[side].append(sides[side]())
        speeds = {side: [model.num_bytes / one.seconds / 1e9 for one in took[side]] for side in sides}
        cpu_s = {side: median(one.cpu_s for one in took[side]) / model.num_bytes * 1e9 for side in sides}
        speedup = median(speeds["decoded"]) / median(speeds["read"])
        rows.append(
            (
                model.title,
                spread(speeds["decoded"]),
                cpu_s["decoded"],
                spread(speeds["read"]),
                cpu_s["read"],
                speedup,
            )
        )
        if model is models[0]:
            figures["load_gb_per_s"] = median(speeds["decoded"])
            figures["load_cpu_s_per_gb"] = cpu_s["decoded"]
            figures["disk_gb_per_s"] = median(speeds["read"])
            figures["load_over_disk"] = speedup
    columns = ("weights", "from compressed GB/s", "CPU s per GB", "from disk GB/s", "CPU s per GB", "times")
    print_table(f"whole loads, checked, {rounds} rounds, {cores} threads decode", columns, rows)
    finish("compressed_weights", figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="128 MiB of each kind: under a minute")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk that is meant; default: the system's")
    parser.add_argument("--rounds", type=int, help="of whole loads; default 7, with --quick 5")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-compressed-", dir=arguments.folder) as folder:
        run(Path(folder), quick=arguments.quick, rounds=arguments.rounds or (5 if arguments.quick else 7))


if __name__ == "__main__":
    main()
