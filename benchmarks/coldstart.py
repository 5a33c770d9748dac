"""How fast weights come into memory: our loader against raw reads, other loaders, and memory itself.

    python -m benchmarks.coldstart [--quick] [--peer-python PATH] [--folder DIR] [--rounds N]

A synthetic checkpoint of 4.2 GB (`--quick`: 0.5 GB) is written once, converted, and loaded again and again; all of it
is deleted at the end. Before every load its files are put out of the page cache, and that is checked. Sides take turns,
in an order that rotates; a figure is a ratio of medians over rounds, and tables give medians and ranges of all alike.
Every side loads in a process of its own that has imported everything before the clock starts.

Peers run with `--peer-python`, an interpreter that has them (see benchmarks/coldstart_peers.py); what it lacks is left
out with a line. torch.load and safetensors run with this one.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import shutil
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.child import REPO, Child
from benchmarks.coldstart_model import FULL, QUICK, write_model
from benchmarks.coldstart_ready import (
    cold_first_tokens,
    dram_ready,
    import_torch_ms,
    print_first_tokens,
    print_ready,
    warm_first_tokens,
)
from benchmarks.coldstart_ways import RAW_WAYS
from benchmarks.report import finish, print_table, spread
from cluster.model_source import resolve_model
from coldstart.convert import convert
from coldstart.format import read_index
from coldstart.memory import address_of

MIB = 1 << 20
OWN_PEERS = ("torch", "safetensors")
OTHER_PEERS = ("fastsafetensors", "runai", "tensorizer")
#: What each step of ours adds, in order (ServerlessLLM, OSDI'24, figure 7).
ABLATION = (
    ("tensors", "tensor by tensor, one thread"),
    ("bulk", "+ bulk reads of one flat file"),
    ("direct", "+ past the page cache"),
    ("threads", "+ several threads"),
    ("pipeline", "+ checked while others read"),
    ("ours disk", "+ pages made ahead"),
)
TMPFS = ("ours tmpfs", "memcpy fresh", "ours tmpfs-made", "memcpy made")
#: More than this share of a file in the page cache is not cold.
MAX_RESIDENT_SHARE = 0.01


@dataclass
class Side:
    name: str
    num_bytes: int
    took_s: list[float] = field(default_factory=list[float])
    answers: list[dict[str, float]] = field(default_factory=list[dict[str, float]])

    @property
    def rate(self) -> float:
        """Median, GB/s."""
        return self.num_bytes / median(self.took_s) / 1e9

    @property
    def rates(self) -> list[float]:
        return [self.num_bytes / took_s / 1e9 for took_s in self.took_s]


def make_cold(folder: Path) -> None:
    """Puts the folder's files out of the page cache; raises RuntimeError when they stay, as mapped ones do."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            share = resident_share(file.fileno())
        if share > MAX_RESIDENT_SHARE:
            raise RuntimeError(f"{path}: {share:.0%} of it stays in the page cache")


def resident_share(descriptor: int) -> float:
    """Of a file's pages, those in the page cache."""
    size = os.fstat(descriptor).st_size
    if not size:
        return 0.0
    with mmap.mmap(descriptor, size, prot=mmap.PROT_READ) as mapping:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        mincore = ctypes.CDLL(None, use_errno=True).mincore
        mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        if mincore(address_of(mapping), size, pages.ctypes.data) != 0:
            raise OSError(ctypes.get_errno(), "mincore")
        return float(np.count_nonzero(pages & 1)) / len(pages)


class Benchmark:
    def __init__(self, folder: Path, arguments: argparse.Namespace, stack: ExitStack) -> None:
        self._quick: bool = arguments.quick
        self._stack = stack
        self._original, self._converted = folder / "original", folder / "converted"
        start_s = time.perf_counter()
        self._num_bytes = write_model(self._original, QUICK if self._quick else FULL, with_torch=True)
        written_s = time.perf_counter()
        convert(self._original, self._converted)
        converted_s = time.perf_counter()
        print(
            f"checkpoint of {self._num_bytes / 1e9:.2f} GB: written in {written_s - start_s:.1f} s, converted and "
            f"checked in {converted_s - written_s:.1f} s"
        )
        self._tmpfs, self._tmpfs_bytes = self._on_tmpfs(folder)
        self._children: dict[str, Child] = {}
        self._start_children(arguments.peer_python)
        self.sides: dict[str, Side] = {}

    def measure(self, names: list[str], rounds: int, *, num_bytes: int | None = None, cold: bool = True) -> None:
        """Sides take turns; who was first is last in the next round."""
        for name in names:
            self.sides.setdefault(name, Side(name, num_bytes or self._num_bytes))
        for number in range(rounds):
            start = number % len(names)
            for name in names[start:] + names[:start]:
                if not self._one(name, cold=cold):
                    names = [each for each in names if each != name]

    def _one(self, name: str, *, cold: bool) -> bool:
        """False: a peer that cannot load this, and is left out from here on."""
        child = self._children.get(name, self._children["ours"])
        if cold:
            make_cold(self._original)
            make_cold(self._converted)
        try:
            answer = child.ask(name)
        except RuntimeError as error:
            if name not in OTHER_PEERS:
                raise
            print(f"left out: {error}")
            del self._children[name]
            return False
        self.sides[name].took_s.append(answer["s"])
        self.sides[name].answers.append(answer)
        return True

    def best_raw(self) -> str:
        """The fastest in one look at each, and it stands for the disk's limit from there on."""
        names = [f"raw {piece} {threads}" for piece, threads in RAW_WAYS]
        self.measure(names, 1)
        best = max(names, key=lambda name: self.sides[name].rate)
        print("raw reads: " + ", ".join(f"{_raw_title(name)} {self.sides[name].rate:.2f}" for name in names) + " GB/s")
        self.sides[best] = Side(best, self._num_bytes)
        return best

    @property
    def is_quick(self) -> bool:
        return self._quick

    def converted(self) -> dict[str, Path]:
        """By what people call them, the smallest first."""
        small = {"0.5 GB": self._tmpfs}
        return small if self._quick else {**small, "4.2 GB": self._converted}

    def close_children(self) -> None:
        while self._children:
            self._children.popitem()[1].close()

    @property
    def tmpfs_bytes(self) -> int:
        return self._tmpfs_bytes

    @property
    def peers(self) -> list[str]:
        return [name for name in (*OWN_PEERS, *OTHER_PEERS) if name in self._children]

    def _on_tmpfs(self, folder: Path) -> tuple[Path, int]:
        """A small converted checkpoint in memory: it is there beside its copy."""
        tmpfs = Path(tempfile.mkdtemp(prefix="tandem-coldstart-", dir="/dev/shm"))
        self._stack.callback(shutil.rmtree, tmpfs, ignore_errors=True)
        small = self._original
        if not self._quick:
            small = folder / "small"
            write_model(small, QUICK, with_torch=False)
        index = convert(small, tmpfs / "converted")
        return tmpfs / "converted", index.partitions[0].num_bytes

    def _start_children(self, peer_python: Path | None) -> None:
        """All at once: most of it is imports."""
        peer_script = str(REPO / "benchmarks" / "coldstart_peers.py")
        commands = {name: [sys.executable, peer_script, name, str(self._original)] for name in OWN_PEERS}
        if peer_python is not None:
            commands |= {name: [str(peer_python), peer_script, name, str(self._original)] for name in OTHER_PEERS}
        else:
            print(f"left out: {', '.join(OTHER_PEERS)} (no --peer-python)")
        folders = [str(each) for each in (self._original, self._converted, self._tmpfs)]
        commands["ours"] = [sys.executable, "-m", "benchmarks.coldstart_ways", *folders]
        children = {name: Child(command) for name, command in commands.items()}
        for name, child in children.items():
            self._stack.callback(child.close)
            problem = child.why_not()
            if problem is None:
                self._children[name] = child
            else:
                print(f"left out: {name} ({problem})")
        if "ours" not in self._children:
            raise SystemExit("our own loader did not start")


def _raw_title(name: str) -> str:
    _, piece, threads = name.split()
    return f"{int(piece) // MIB} MiB x {threads}"


def run(folder: Path, arguments: argparse.Namespace, stack: ExitStack) -> None:
    quick = arguments.quick
    rounds = arguments.rounds or (3 if quick else 5)
    bench = Benchmark(folder, arguments, stack)
    raw = bench.best_raw()
    sides = bench.sides

    bench.measure([raw, "ours disk", *bench.peers], rounds)
    rows: list[tuple[object, ...]] = [
        (title, spread(sides[name].rates), sides[name].rate / sides[raw].rate)
        for name, title in ((raw, f"raw direct reads, {_raw_title(raw)}"), ("ours disk", "ours"))
    ]
    rows += [(name, spread(sides[name].rates), sides[name].rate / sides[raw].rate) for name in bench.peers]
    print_table(f"cold load, {rounds} rounds", ("", "GB/s", "of raw"), rows)
    figures = {
        "over_raw": sides["ours disk"].rate / sides[raw].rate,
        "over_torch_load": sides["ours disk"].rate / sides["torch"].rate,
        "over_safetensors": sides["ours disk"].rate / sides["safetensors"].rate,
        "over_best_other": sides["ours disk"].rate / max(sides[name].rate for name in bench.peers),
        "raw_gb_per_s": sides[raw].rate,
        "extra_memory_mib": max(answer["extra_bytes"] for answer in sides["ours disk"].answers) / MIB,
    }

    sides["ours disk"] = Side("ours disk", sides["ours disk"].num_bytes)
    bench.measure([name for name, _ in ABLATION], 2 if quick else 3)
    rows = []
    for (name, title), before in zip(ABLATION, (None, *(name for name, _ in ABLATION)), strict=False):
        gain = sides[name].rate / sides[before].rate if before is not None else 1.0
        cpu_s = median(answer["cpu_s"] for answer in sides[name].answers) / sides[name].num_bytes * 1e9
        rows.append((title, spread(sides[name].rates), gain, cpu_s))
    print_table("what each step adds", ("", "GB/s", "times", "CPU s per GB"), rows)

    bench.measure(list(TMPFS), 9, num_bytes=bench.tmpfs_bytes, cold=False)
    figures["tmpfs_over_memcpy"] = sides["ours tmpfs"].rate / sides["memcpy fresh"].rate
    figures["tmpfs_over_memcpy_made"] = sides["ours tmpfs-made"].rate / sides["memcpy made"].rate
    titles = (
        "ours, into fresh memory",
        "memcpy, into fresh memory",
        "ours, pages made before",
        "memcpy, pages made before",
    )
    rows = [(title, spread(sides[name].rates)) for name, title in zip(TMPFS, titles, strict=True)]
    print_table("from tmpfs", ("", "GB/s"), rows)

    ways = ["forwards plain", "forwards populated"]
    ratios: list[float] = []
    bench.measure(ways, 2 if quick else 3, cold=False)
    rows = []
    for name in ways:
        middle = {key: median(each[key] for each in sides[name].answers) for key in sides[name].answers[0]}
        times = [f"{1e3 * middle[key]:.1f}" for key in ("map_s", "bind_s", "first_s", "second_s", "third_s")]
        ratios.append(median(each["first_s"] / each["second_s"] for each in sides[name].answers))
        rows.append((name.split()[1], *times, ratios[-1]))
    columns = ("pages", "map ms", "bind ms", "first ms", "second ms", "third ms", "first over second")
    print_table("an engine over a copy in memory: forward passes of one plan", columns, rows)
    figures["first_over_second_forward"] = ratios[1]
    figures["first_over_second_unpopulated"] = ratios[0]
    bench.close_children()
    figures |= ready_figures(bench, folder, sides[raw].rate)

    print(
        f"\ngoals: over_raw {figures['over_raw']:.2f} (0.9), over_safetensors {figures['over_safetensors']:.2f} (2), "
        f"over_best_other {figures['over_best_other']:.2f} (1, or both within 5 % of the limit), extra_memory_mib "
        f"{figures['extra_memory_mib']:.0f} (256), tmpfs_over_memcpy {figures['tmpfs_over_memcpy']:.2f} (0.8), "
        f"first_over_second_forward {figures['first_over_second_forward']:.2f} (1.2), dram_ready_ms "
        f"{figures['dram_ready_ms']:.0f} (50), standby_first_token_ms {figures['standby_first_token_ms']:.0f} (300), "
        f"cold_over_limit {figures['cold_over_limit']:.2f} (1.3)"
    )
    finish("coldstart", figures)


def ready_figures(bench: Benchmark, folder: Path, raw_gb_per_s: float) -> dict[str, float]:
    """From memory to an answer, with processes that stand by; and from nothing. The machine has nothing else to do."""
    rounds = 3 if bench.is_quick else 7
    demo = folder / "demo"
    convert(resolve_model("demo", print).folder, demo)
    folders = {"demo": demo, **bench.converted()}
    sizes = {name: sum(each.num_bytes for each in read_index(path).partitions) for name, path in folders.items()}
    found = dram_ready(folders, rounds, folder)
    print_ready(sizes, found)
    middle = {name: median(each["total"] for each in answers) for name, answers in found.items()}

    rounds = 1 if bench.is_quick else 5
    warm = warm_first_tokens(rounds)
    ways = {
        "cold process": cold_first_tokens(rounds),
        "a process stands by, weights on disk": warm[:1],
        "a process stands by, weights in memory": warm[1:],
    }
    limit_ms = median(import_torch_ms(3)) + sizes["demo"] / raw_gb_per_s / 1e6
    print_first_tokens(ways, limit_ms)
    cold_ms, first_ms, standby_ms = (median(each["ttft"] for each in answers) for answers in ways.values())
    return {
        # Of the demo model; larger ones beside it, because a canary reads all weights once.
        "dram_ready_ms": middle["demo"],
        "dram_ready_largest_ms": middle[max(sizes, key=lambda name: sizes[name])],
        "standby_first_token_ms": standby_ms,
        "standby_from_disk_ms": first_ms,
        "cold_first_token_ms": cold_ms,
        "cold_over_limit": cold_ms / limit_ms,
    }


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="0.5 GB and fewer rounds: a minute or two")
    parser.add_argument("--peer-python", type=Path, help="interpreter that has the other loaders")
    parser.add_argument("--folder", type=Path, help="where to write, on the disk that is meant; default: the system's")
    parser.add_argument("--rounds", type=int, help="of the main comparison; default 5, with --quick 3")
    arguments = parser.parse_args()
    # Ended from outside, it still deletes what it wrote.
    signal.signal(signal.SIGTERM, _end)
    with tempfile.TemporaryDirectory(prefix="tandem-coldstart-", dir=arguments.folder) as folder, ExitStack() as stack:
        run(Path(folder), arguments, stack)


if __name__ == "__main__":
    main()
