"""A model that lies in an object store, brought to this machine's disk tier of checkpoints."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rpc.clock import LiveBlockingClock, LiveClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from coldstart.tier_handles import Entry
    from contracts.config import WeightTierConfig
    from engine.compute_dtype import DtypeChoice

#: Where checkpoints go when the configuration names no folder: they have to be somewhere.
DEFAULT_TIER = "~/.cache/tandem/weights"

_TELL_INTERVAL_S = 5.0


def is_remote(model: str) -> bool:
    return "://" in model


def fetch_model(url: str, dtype: DtypeChoice, tier: WeightTierConfig, say: Callable[[str], None]) -> Entry:
    """The checkpoint's entry in the disk tier, pinned; fetched and converted unless it is there. Blocks while it does.

    Raises ConfigError, LoadError, NoCapacity and the other errors of `coldstart.download.fetch_checkpoint`.
    """
    # Their libraries take a moment to import, and only such addresses need them.
    from coldstart.download import Wanted, fetch_checkpoint
    from coldstart.local_tier import LocalTier
    from coldstart.object_source import ObjectFolder
    from coldstart.tier_files import LiveTierFiles

    remote = ObjectFolder(url, clock=LiveClock(), rng=random.Random())
    try:
        local = LocalTier(
            Path(tier.path or DEFAULT_TIER).expanduser(),
            capacity_bytes=tier.size,
            files=LiveTierFiles(),
            clock=LiveBlockingClock(),
            tell=say,
        )
        say(f"model {remote.name}: fetching what is not here yet")
        return fetch_checkpoint(
            remote, local, Wanted(dtype=dtype), convert=_convert, progress=_Progress(remote.name, say)
        )
    finally:
        remote.close()


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
