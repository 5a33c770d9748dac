"""A model that lies in an object store, brought to this machine's disk tier of checkpoints."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rpc.clock import LiveBlockingClock, LiveClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.far import Far
    from coldstart.local_tier import LocalTier
    from coldstart.object_source import ObjectFolder
    from coldstart.tier_handles import Entry
    from contracts.config import WeightTierConfig
    from engine.compute_dtype import DtypeChoice

#: Where checkpoints go when the configuration names no folder: they have to be somewhere.
DEFAULT_TIER = "~/.cache/tandem/weights"

_TELL_INTERVAL_S = 5.0


def is_remote(model: str) -> bool:
    return "://" in model


def reach_model(
    url: str, dtype: DtypeChoice, tier: WeightTierConfig, say: Callable[[str], None], *, stream: bool
) -> tuple[Path, Entry | None]:
    """The model's folder here, and what keeps it there as long as it is used. Blocks.

    With `stream`, of a checkpoint in Tandem's format that the disk tier does not have, only what is small is fetched:
    loaders take its weights from the store (`coldstart.far`). Anything else is in the tier then, converted where it was
    an original. Raises ConfigError, LoadError, NoCapacity and the others of `coldstart.download.fetch_checkpoint`.
    """
    # Their libraries take a moment to import, and only such addresses need them.
    from coldstart.download import Wanted, fetch_checkpoint, inspect, key_of
    from coldstart.far import Far, make_far

    far = Far(url=url, tier_path=str(Path(tier.path or DEFAULT_TIER).expanduser().absolute()), tier_bytes=tier.size)
    remote, local = open_far(far, say)
    try:
        wanted = Wanted(dtype=dtype)
        found = inspect(remote) if stream else None
        if found is not None and found.index is not None:
            entry = local.look_up(key_of(remote, found, wanted))
            return (make_far(remote, found, far), None) if entry is None else (entry.path, entry)
        say(f"model {remote.name}: fetching what is not here yet")
        entry = fetch_checkpoint(remote, local, wanted, convert=_convert, progress=_Progress(remote.name, say))
        return entry.path, entry
    finally:
        remote.close()


def fetch_far(far: Far, say: Callable[[str], None]) -> Entry:
    """All of what a folder stands for, in its disk tier. Blocks. Raises as `reach_model`."""
    from coldstart.download import fetch_checkpoint

    remote, local = open_far(far, say)
    try:
        return fetch_checkpoint(remote, local, progress=_Progress(remote.name, say))
    finally:
        remote.close()


def open_far(far: Far, say: Callable[[str], None]) -> tuple[ObjectFolder, LocalTier]:
    """The store, which the caller closes, and the tier. Raises ConfigError, LoadError."""
    from coldstart.local_tier import LocalTier
    from coldstart.object_source import ObjectFolder
    from coldstart.tier_files import LiveTierFiles

    local = LocalTier(
        Path(far.tier_path),
        capacity_bytes=far.tier_bytes,
        files=LiveTierFiles(),
        clock=LiveBlockingClock(),
        tell=say,
    )
    return ObjectFolder(far.url, clock=LiveClock(), rng=random.Random()), local


def _convert(source: Path, target: Path, *, dtype: DtypeChoice, tensor_parallel: int) -> None:
    """To what an engine of this machine computes in, so that its workers can use it where it lies."""
    from coldstart.convert import ConvertOptions, convert
    from coldstart.fuse import engine_dtype

    computed = cast("Any", engine_dtype(source, dtype))
    convert(source, target, ConvertOptions(dtype=computed, tensor_parallel=tensor_parallel))


class _Progress:
    def __init__(self, name: str, say: Callable[[str], None]) -> None:
        self._name = name
        self._say = say
        self._next_s = time.monotonic() + _TELL_INTERVAL_S

    def __call__(self, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + _TELL_INTERVAL_S
            share = done_bytes / max(1, total_bytes)
            self._say(f"model {self._name}: {share:.0%} of {total_bytes / 1e9:.2f} GB")
