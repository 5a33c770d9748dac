"""Part `index` of `benchmarks.kvstore`: what a prompt's keys take in the store's index, and what that takes of memory.

`python -m benchmarks.kvstore_index {bare,whole,dict} NUM_KEYS` is the child that fills one index and prints by how many
bytes its resident memory grew.
"""

from __future__ import annotations

import gc
import itertools
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.kvstore_blocks import BLOCK_TOKENS, IDENTITY
from benchmarks.report import print_table, spread
from kvstore.block_keys import KEY_BYTES, block_keys, root_key
from kvstore.eviction import Eviction
from kvstore.index import KeyIndex
from kvstore.ssd.catalogue import Catalogue
from kvstore.ssd.format import new_rows, set_keys

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

PROMPT_TOKENS = 4096
NUM_OTHERS = 1_000_000
FULL_KEYS = 10_000_000
QUICK_KEYS = 200_000
#: Keys that are added in one call while an index fills: those of a long prompt.
BATCH_KEYS = 1000
CHILD_TIMEOUT_S = 1200.0
WHAT = {
    "bare": "keys to entries (kvstore.index)",
    "whole": "and what the disk tier's catalogue and the eviction policy keep of each block",
    "dict": "a Python dict of bytes to int",
}


def random_keys(num_keys: int, seed: int) -> Iterator[bytes]:
    """Joined keys in batches; never the same twice."""
    rng = random.Random(seed)
    for start in range(0, num_keys, BATCH_KEYS):
        yield rng.randbytes(KEY_BYTES * min(BATCH_KEYS, num_keys - start))


def split(joined: bytes) -> list[bytes]:
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


def measure_match(rounds: int) -> dict[str, float]:
    """Each round with a prompt of its own, of which nothing is there; a dict takes turns."""
    num_keys = PROMPT_TOKENS // BLOCK_TOKENS
    index = KeyIndex(NUM_OTHERS + rounds * num_keys)
    beside: dict[bytes, int] = {}
    for joined in random_keys(NUM_OTHERS, seed=1):
        index.add(joined)
        beside.update(zip(split(joined), itertools.count(len(beside))))
    rng = random.Random(2)
    root = root_key(IDENTITY, "benchmark")
    seconds: dict[str, list[float]] = {name: [] for name in ("hash", "insert", "match", "dict insert", "dict match")}

    def timed(name: str, work: Callable[[], object]) -> None:
        start_s = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - start_s)

    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            tokens = [rng.randrange(8192) for _ in range(PROMPT_TOKENS)]
            timed("hash", lambda tokens=tokens: list(block_keys(root, tokens, BLOCK_TOKENS)))  # type: ignore[misc]
            keys = list(block_keys(root, tokens, BLOCK_TOKENS))
            timed("insert", lambda keys=keys: index.add(keys))  # type: ignore[misc]
            timed("match", lambda keys=keys: index.num_leading(keys))  # type: ignore[misc]
            if index.num_leading(keys) != num_keys:
                raise RuntimeError("an index has forgotten keys that it was just given")
            timed("dict insert", lambda keys=keys: beside.update(zip(keys, range(num_keys), strict=True)))  # type: ignore[misc]
            timed("dict match", lambda keys=keys: [beside.get(key) for key in keys])  # type: ignore[misc]
    finally:
        gc.enable()
    ms = {name: [1e3 * value for value in values] for name, values in seconds.items()}
    ms["both"] = [insert + match for insert, match in zip(ms["insert"], ms["match"], strict=True)]
    ms["dict both"] = [insert + match for insert, match in zip(ms["dict insert"], ms["dict match"], strict=True)]
    print_table(
        f"index of {NUM_OTHERS:,} keys, a prompt of {PROMPT_TOKENS:,} tokens ({num_keys} keys), {rounds} rounds",
        ["step", "ms"],
        [
            ["hashing (SHA-256, not of the index)", spread(ms["hash"])],
            ["insert", spread(ms["insert"])],
            ["match", spread(ms["match"])],
            ["insert and match", spread(ms["both"])],
            ["insert and match in a dict", spread(ms["dict both"])],
        ],
    )
    return {"match_4096_ms": median(ms["both"])}


def measure_memory(*, quick: bool) -> dict[str, float]:
    num_keys = QUICK_KEYS if quick else FULL_KEYS
    scale = FULL_KEYS / num_keys
    grown = {what: scale * _grown_bytes(what, num_keys) for what in WHAT}
    how = f"{num_keys:,} keys, times {scale:g}" if quick else "resident memory of a process"
    print_table(
        f"memory of {FULL_KEYS:,} blocks ({how})",
        ["what", "GiB", "bytes a block"],
        [[WHAT[what], grown[what] / 2**30, grown[what] / FULL_KEYS] for what in WHAT],
    )
    return {"index_10m_gib": grown["bare"] / 2**30, "index_10m_whole_gib": grown["whole"] / 2**30}


def _grown_bytes(what: str, num_keys: int) -> int:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.kvstore_index", what, str(num_keys)],
        stdout=subprocess.PIPE,
        text=True,
        timeout=CHILD_TIMEOUT_S,
        check=True,
    )
    grown: int = json.loads(done.stdout.splitlines()[-1])
    return grown


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def _fill(what: str, num_keys: int) -> int:
    """By how much this process grew."""
    # Whatever is loaded or made by the first use is not the index's.
    _filled(what, BATCH_KEYS)
    gc.collect()
    before = _resident_bytes()
    kept = _filled(what, num_keys)
    gc.collect()
    grown = _resident_bytes() - before
    del kept
    return grown


def _filled(what: str, num_keys: int) -> object:
    batches = random_keys(num_keys, seed=3)
    if what == "dict":
        beside: dict[bytes, int] = {}
        for joined in batches:
            beside.update(zip(split(joined), itertools.count(len(beside))))
        return beside
    if what == "bare":
        index = KeyIndex(num_keys)
        for joined in batches:
            index.add(joined)
        return index
    return _whole(batches, num_keys)


def _whole(batches: Iterator[bytes], num_keys: int) -> object:
    block_bytes = IDENTITY.layout.block_bytes
    catalogue = Catalogue(num_keys, b"benchmark".ljust(32), half_life_bytes=num_keys * block_bytes, now_s=0.0)
    eviction = Eviction("cost_aware", num_keys)
    num_stored = 0
    for sequence, joined in enumerate(batches):
        keys = split(joined)
        rows = new_rows(len(keys))
        set_keys(rows, keys)
        rows["start"] = np.arange(len(keys), dtype=np.int64) * block_bytes
        rows["length"] = block_bytes
        rows["position"] = np.arange(len(keys))
        segment = catalogue.open_segment(sequence, len(keys) * block_bytes)
        catalogue.record(segment, 0, rows, 0.0)
        for position, key in enumerate(keys):
            hint = int.from_bytes(key[:8], "little")
            eviction.stored(num_stored, position=position, now_s=0.0, key_hint=hint)
            num_stored += 1
    return catalogue, eviction


if __name__ == "__main__":
    print(json.dumps(_fill(sys.argv[1], int(sys.argv[2]))))
