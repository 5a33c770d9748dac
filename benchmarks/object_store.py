"""How fast a checkpoint comes out of an object store: our loader against bare requests and another loader.

    python -m benchmarks.object_store --nginx PATH [--quick] [--peer-python PATH] [--limit-mib N] [--rounds N]

nginx serves a converted synthetic checkpoint of 4.2 GB (`--quick`: 0.5 GB) on loopback, out of the page cache, the way
an S3-compatible store answers reads. Sides take turns, in an order that rotates:

    requests      ranges of 8 MiB, 16 side by side, thrown away: what the client library can do
    memory        our loader, every chunk checked, into memory
    through       the same while the disk tier fills: until all is in memory, and until the tier has it too
    tier first    fetched into the disk tier, then loaded from there: what `through` saves
    runai         runai-model-streamer over S3, with `--peer-python` (runai-model-streamer, runai-model-streamer-s3)

`--limit-mib` holds every connection of the server to so many MiB a second.
"""

from __future__ import annotations

import argparse
import asyncio
import mmap
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import obstore

from benchmarks.child import REPO, Child
from benchmarks.coldstart_model import FULL, QUICK, write_model
from benchmarks.report import finish, print_table, spread
from coldstart.convert import convert
from coldstart.download import fetch_checkpoint
from coldstart.format import read_index
from coldstart.local_tier import LocalTier
from coldstart.memory import WeightMemory
from coldstart.object_requests import StoreSettings, open_store
from coldstart.object_source import ObjectFolder
from coldstart.pipeline import MemoryDestination, PartitionLoad
from coldstart.reading import load_partition
from coldstart.remote import parse_address
from coldstart.through import Through, open_through
from coldstart.tier_files import LiveTierFiles
from rpc.clock import LiveBlockingClock, LiveClock

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from coldstart.format import Index
    from coldstart.source import ByteSource

MIB = 1 << 20
PIECE_BYTES = 8 * MIB
SIDE_BY_SIDE = 16
START_TIMEOUT_S = 10.0
WEIGHTS = "weights-00001-of-00001.tandem"

_NGINX = """
{user}
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/error.log;
events {{ worker_connections 256; }}
http {{
  access_log off; sendfile on; tcp_nopush on; keepalive_requests 100000;
  client_body_temp_path {folder}/a; proxy_temp_path {folder}/b; fastcgi_temp_path {folder}/c;
  uwsgi_temp_path {folder}/d; scgi_temp_path {folder}/e;
  server {{ listen 127.0.0.1:{port}; root {root}; {limit} }}
}}
"""


class Nginx:
    def __init__(self, program: Path, root: Path, folder: Path, limit_mib: int) -> None:
        """Returns when it answers. Raises RuntimeError with its words when it does not."""
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            self.port: int = found.getsockname()[1]
        limit = f"limit_rate {limit_mib}m;" if limit_mib else ""
        config = folder / "nginx.conf"
        # As root it would give its workers to somebody who may not read this folder.
        user = "user root;" if os.getuid() == 0 else ""
        config.write_text(_NGINX.format(folder=folder, port=self.port, root=root, limit=limit, user=user))
        self._process = subprocess.Popen([program, "-c", config, "-p", folder], stderr=subprocess.PIPE, text=True)
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while True:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1.0):
                return
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                self.close()
                assert self._process.stderr is not None
                raise RuntimeError(f"{program} does not answer: {self._process.stderr.read()[-500:]}")
            time.sleep(0.05)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait()


class Sides:
    def __init__(self, url: str, index: Index, scratch: Path, stack: ExitStack) -> None:
        self._url = url
        self._index = index
        self._partition = index.partitions[0]
        self._scratch = scratch
        self._remote = ObjectFolder(url, clock=LiveClock(), rng=random.Random(0))
        stack.callback(self._remote.close)
        file = self._remote.look(WEIGHTS)
        assert file is not None, "it was put there"
        self._file = file

    def requests(self) -> dict[str, float]:
        store = open_store(parse_address(self._url), StoreSettings())

        async def all_of_it() -> None:
            starts: Generator[int] = (start for start in range(0, self._partition.num_bytes, PIECE_BYTES))

            async def work() -> None:
                for start in starts:
                    end = min(start + PIECE_BYTES, self._partition.num_bytes)
                    found = await obstore.get_range_async(store, WEIGHTS, start=start, end=end)
                    if len(found) != end - start:
                        raise RuntimeError(f"{len(found)} bytes of {end - start}")

            await asyncio.gather(*(work() for _ in range(SIDE_BY_SIDE)))

        return _timed(lambda: asyncio.run(all_of_it()))

    def memory(self) -> dict[str, float]:
        source = self._remote.open(self._file)
        try:
            return _timed(lambda: self._fill(source).close())
        finally:
            source.close()

    def through(self) -> dict[str, float]:
        tier = self._tier()
        start_s = time.perf_counter()
        through = open_through(self._remote, tier)
        assert isinstance(through, Through), "the tier is empty"
        memory = self._fill(through.sources[0])
        filled_s = time.perf_counter() - start_s
        with memoryview(memory.mapping) as held:
            entry = through.finish({0: held[: self._partition.num_bytes]})
        took_s = time.perf_counter() - start_s
        if entry is None:
            raise RuntimeError(f"the tier kept nothing: {through.problem}")
        entry.close()
        memory.close()
        return {"s": filled_s, "complete_s": took_s}

    def tier_first(self) -> dict[str, float]:
        tier = self._tier()
        start_s = time.perf_counter()
        with fetch_checkpoint(self._remote, tier) as entry:
            fetched_s = time.perf_counter() - start_s
            memory = WeightMemory(self._partition.num_bytes)
            load_partition(entry.path, self._index, 0, MemoryDestination(memory.mapping, self._index.chunk_bytes))
        took_s = time.perf_counter() - start_s
        memory.close()
        return {"s": took_s, "fetched_s": fetched_s}

    def _fill(self, source: ByteSource) -> WeightMemory:
        memory = WeightMemory(self._partition.num_bytes)
        destination = MemoryDestination(memory.mapping, self._index.chunk_bytes)
        PartitionLoad(source, self._partition, self._index.chunk_bytes, destination, num_threads=8).run()
        return memory

    def _tier(self) -> LocalTier:
        """An empty one."""
        folder = self._scratch / "tier"
        shutil.rmtree(folder, ignore_errors=True)
        return LocalTier(folder, capacity_bytes=1 << 40, files=LiveTierFiles(), clock=LiveBlockingClock())


def runai_child(python: Path, port: int) -> Child:
    """Loads the original's safetensors over S3 for each line."""
    environ = {
        **os.environ,
        "AWS_ACCESS_KEY_ID": "benchmark",
        "AWS_SECRET_ACCESS_KEY": "benchmark-secret",
        "AWS_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        "RUNAI_STREAMER_CONCURRENCY": str(SIDE_BY_SIDE),
    }
    script = str(REPO / "benchmarks" / "coldstart_peers.py")
    return Child([str(python), script, "runai-s3", "s3://original"], environ)


def _timed(do: Callable[[], object]) -> dict[str, float]:
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    do()
    return {"s": time.perf_counter() - start_s, "cpu_s": time.process_time() - start_cpu_s}


def run(folder: Path, arguments: argparse.Namespace, stack: ExitStack) -> None:
    rounds = arguments.rounds or (3 if arguments.quick else 5)
    served = folder / "served"
    served.mkdir()
    num_bytes = write_model(served / "original", QUICK if arguments.quick else FULL, with_torch=False)
    index = convert(served / "original", served / "converted")
    for path in served.rglob("*"):
        if path.is_file():
            _read_once(path)
    nginx = Nginx(arguments.nginx, served, folder, arguments.limit_mib)
    stack.callback(nginx.close)
    sides = Sides(f"http://127.0.0.1:{nginx.port}/converted", read_index(served / "converted"), folder, stack)
    ways: dict[str, Callable[[], dict[str, float]]] = {
        "requests": sides.requests,
        "memory": sides.memory,
        "through": sides.through,
        "tier first": sides.tier_first,
    }
    if arguments.peer_python is not None:
        runai = runai_child(arguments.peer_python, nginx.port)
        stack.callback(runai.close)
        if (problem := runai.why_not()) is not None:
            print(f"left out: runai ({problem})")
        else:
            ways["runai"] = lambda: runai.ask("load")
    else:
        print("left out: runai (no --peer-python)")
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    names = list(ways)
    for number in range(rounds):
        start = number % len(names)
        for name in names[start:] + names[:start]:
            if name not in found:
                continue
            try:
                found[name].append(ways[name]())
            except RuntimeError as error:
                if name != "runai":
                    raise
                print(f"left out: runai ({error})")
                del found[name]
    report(found, index.partitions[0].num_bytes, num_bytes, rounds)


def report(found: dict[str, list[dict[str, float]]], num_bytes: int, original_bytes: int, rounds: int) -> None:
    def rates(name: str, key: str = "s") -> list[float]:
        size = original_bytes if name == "runai" else num_bytes
        return [size / each[key] / 1e9 for each in found[name]]

    rows: list[tuple[Any, ...]] = [
        (name, spread(rates(name)), median(rates(name)) / median(rates("requests"))) for name in found
    ]
    rows.append(("through, the tier too", spread(rates("through", "complete_s")), ""))
    rows.append(("tier first, fetching alone", spread(rates("tier first", "fetched_s")), ""))
    print_table(f"{num_bytes / 1e9:.2f} GB out of a store, {rounds} rounds", ("", "GB/s", "of requests"), rows)
    figures = {
        "requests_gb_per_s": median(rates("requests")),
        "over_requests": median(rates("memory")) / median(rates("requests")),
        "through_over_requests": median(rates("through")) / median(rates("requests")),
        "through_over_tier_first": median(rates("through")) / median(rates("tier first")),
    }
    if "runai" in found:
        figures["over_runai"] = median(rates("memory")) / median(rates("runai"))
    finish("object_store", figures)


def _read_once(path: Path) -> None:
    """Into the page cache: the store's disk is not what is measured."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapping:
        for start in range(0, len(mapping), 64 * MIB):
            _ = mapping[start : start + 64 * MIB]


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nginx", type=Path, required=True, help="the server's program")
    parser.add_argument("--quick", action="store_true", help="0.5 GB and fewer rounds")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has runai-model-streamer and its S3 part")
    parser.add_argument("--limit-mib", type=int, default=0, help="MiB a second of each connection; default: no limit")
    parser.add_argument("--rounds", type=int)
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="tandem-store-") as folder, ExitStack() as stack:
        run(Path(folder), arguments, stack)


if __name__ == "__main__":
    main()
