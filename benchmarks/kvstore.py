"""What the KV store costs and saves: its index, its two tiers, the first token of a prompt it knows, its codecs.

    python -m benchmarks.kvstore [--quick] [--only PART] [--folder DIR] [--lmcache PYTHON]

- index: 256 keys put into an index of a million others and matched again; memory of ten million blocks.
- dram: prefixes fetched from a store over shared memory, beside memcpy of the same blocks.
- ssd: the disk tier's writes and reads, beside a raw loop past the page cache on the same disk.
- ttft: a prompt of 2,000 tokens of which the store's memory or disk has 1,800, beside computing all, 1P1D.
- codecs: size and recall of int4 with zstd on the demo model (`benchmarks.kv_codecs` says more).
- lmcache: LMCache's CPU and disk back ends with the same blocks, by an interpreter that has it (`--lmcache`).
- profile: only when asked for: where a store's event loop spends its time.

Both sides of a ratio take turns in one run; figures are medians. `--folder` says which disk is meant.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import torch

from benchmarks.kv_codecs import BATCH, TEXT_TOKENS, Quality, Stored, demo_bench, measure_recall
from benchmarks.kvstore_blocks import BLOCK_BYTES, PREFIX_BLOCKS
from benchmarks.kvstore_disk import measure_ssd
from benchmarks.kvstore_fetch import measure_dram, print_profile
from benchmarks.kvstore_index import measure_match, measure_memory
from benchmarks.kvstore_ttft import measure_ttft
from benchmarks.report import finish, print_table, spread
from engine.demo.evaluate import BUCKETS, held_out_probes
from kvstore.codecs import make_codec
from kvstore.codecs.window import DEFAULT_WINDOW_TOKENS

if TYPE_CHECKING:
    from collections.abc import Callable

LMCACHE_TIMEOUT_S = 180.0


def measure_index(*, quick: bool) -> dict[str, float]:
    return measure_match(100 if quick else 1000) | measure_memory(quick=quick)


def measure_codecs(*, quick: bool) -> dict[str, float]:
    torch.set_num_threads(2)
    bench, demo = demo_bench(BATCH, TEXT_TOKENS)
    per_bucket = (100 if quick else 1000) // len(BUCKETS)
    probes = [probe for bucket in BUCKETS for probe in held_out_probes(demo, bucket, per_bucket)]
    # The first is exact: what the others are held against.
    codecs = {name: make_codec(name, bench.layout) for name in ("raw", "int4")}
    found = {name: Quality() for name in codecs}
    stored = {name: Stored() for name in codecs}
    for start in range(0, len(probes), BATCH):
        part = probes[start : start + BATCH]
        measure_recall(bench, demo, part, codecs, found, stored, DEFAULT_WINDOW_TOKENS)
    lost = 100 * (found["raw"].recall - found["int4"].recall)
    ratio = stored["int4"].ratio(bench.layout)
    print_table(
        f"demo model, {found['raw'].asked} prompts, the newest {DEFAULT_WINDOW_TOKENS} tokens exact",
        ["blocks", "times smaller than bf16", "recall %", "points lost"],
        [
            ["exact", 1.0, 100 * found["raw"].recall, 0.0],
            ["int4 and zstd, scales counted", ratio, 100 * found["int4"].recall, lost],
        ],
    )
    return {"int4_size_ratio": ratio, "int4_recall_points_lost": lost}


def measure_lmcache(python: Path | None, folder: Path, *, quick: bool) -> dict[str, float]:
    """Nothing where it is not there or cannot run: that is said."""
    if python is None:
        print("\nLMCache is not measured: --lmcache PYTHON says which interpreter has it")
        return {}
    script = str(Path(__file__).with_name("kvstore_lmcache.py"))
    with tempfile.TemporaryDirectory(prefix="lmcache-", dir=folder) as scratch:
        try:
            done = subprocess.run(
                [str(python), script, "2" if quick else "8", scratch],
                capture_output=True,
                text=True,
                timeout=LMCACHE_TIMEOUT_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            print(f"\nLMCache is not measured: {error}")
            return {}
    lines = [line for line in done.stdout.splitlines() if line.startswith('{"put_cpu"')]
    if done.returncode != 0 or not lines:
        print(f"\nLMCache is not measured: {(done.stderr.splitlines() or ['no reason given'])[-1]}")
        return {}
    found: dict[str, list[float]] = json.loads(lines[-1])
    num_bytes = PREFIX_BLOCKS * BLOCK_BYTES
    names = {
        "copy": "copy between the engine's own blocks (torch)",
        "put_cpu": "put into the CPU back end",
        "get_cpu": "get from the CPU back end",
        "put_disk": "put into the disk back end, O_DIRECT, not synced",
        "get_disk": "get from the disk back end, O_DIRECT, not checked",
    }
    print_table(
        f"LMCache in its own process, {PREFIX_BLOCKS} blocks of {BLOCK_BYTES:,} bytes",
        ["what", "ms", "GB/s"],
        [
            [name, spread([1e3 * value for value in found[key]]), num_bytes / median(found[key]) / 1e9]
            for key, name in names.items()
        ],
    )
    return {f"lmcache_{key}_gb_per_s": num_bytes / median(found[key]) / 1e9 for key in names if key != "copy"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="about a minute: fewer rounds, smaller sizes")
    parser.add_argument("--only", action="append", help="one part, by its name above; may be repeated")
    parser.add_argument(
        "--folder", type=Path, default=Path(), help="a folder on the disk that is meant (default: here)"
    )
    parser.add_argument("--lmcache", type=Path, metavar="PYTHON", help="an interpreter that can import lmcache")
    given = parser.parse_args()
    quick: bool = given.quick
    folder: Path = given.folder.resolve()
    if not folder.is_dir():
        parser.error(f"--folder: {folder} is no folder")
    parts: dict[str, Callable[[], dict[str, float]]] = {
        "index": partial(measure_index, quick=quick),
        "dram": partial(measure_dram, 4 if quick else 25),
        "ssd": partial(measure_ssd, folder, quick=quick),
        "ttft": partial(measure_ttft, folder, quick=quick),
        "codecs": partial(measure_codecs, quick=quick),
        "lmcache": partial(measure_lmcache, given.lmcache, folder, quick=quick),
    }
    chosen: list[str] = given.only or list(parts)
    if unknown := [each for each in chosen if each not in (*parts, "profile")]:
        parser.error(f"--only: {unknown[0]} is none of {', '.join((*parts, 'profile'))}")
    figures: dict[str, float] = {}
    for name in chosen:
        if name != "profile":
            figures |= parts[name]()
            continue
        with tempfile.TemporaryDirectory(prefix="kvstore-", dir=folder) as scratch:
            print_profile(16, scratch)
    finish("kvstore", figures)


if __name__ == "__main__":
    main()
