"""The loader: `python -m cluster.loader_main`, started by the node agent to fill memory with one model's weights.

A process of its own, so that one that is killed, or runs out of memory in a conversion, leaves nothing half full: the
agent drops memory whose loader did not end well.
"""

from __future__ import annotations

import mmap
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.child_main import log, tell
from cluster.launch import (
    MAX_LAUNCH_BYTES,
    Failed,
    Filled,
    Loading,
    Sized,
    decode_go,
    decode_loader_launch,
)
from cluster.lifeline import die_with_parent
from coldstart.loader import WeightLoader
from coldstart.local_tier import LocalTier
from coldstart.tier_files import LiveTierFiles
from contracts.errors import LoadError, TandemError
from rpc.clock import LiveBlockingClock

if TYPE_CHECKING:
    from cluster.launch import WeightTierOptions

#: Between two words on how far it is: also the sign that it gets on.
TELL_INTERVAL_S = 0.2


class Teller:
    """Says how far a load is, not more often than somebody would want to know."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._next_s = 0.0

    def __call__(self, what: str, done_bytes: int, total_bytes: int) -> None:
        now_s = time.monotonic()
        with self._guard:
            if now_s < self._next_s:
                return
            self._next_s = now_s + TELL_INTERVAL_S
            tell(Loading(what=what, fraction=done_bytes / max(1, total_bytes)))


def main() -> int:
    try:
        launch = decode_loader_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        die_with_parent(launch.parent_pid)
        tier = _tier(launch.ssd)
        with WeightLoader(launch.key, tier, progress=Teller(), log=log) as loader:
            tell(Sized(num_bytes=loader.prepare()))
            line = sys.stdin.buffer.readline(MAX_LAUNCH_BYTES)
            if not line:
                return 0
            go = decode_go(line)
            with mmap.mmap(launch.descriptor, go.num_bytes) as mapping, memoryview(mapping) as memory:
                loaded = loader.fill(memory)
        tell(Filled(weight_bytes=loaded.weight_bytes, index_bytes=loaded.index_bytes, tier=loaded.tier))
    except TandemError as error:
        tell(Failed(error=error.code, message=error.message))
        return 1
    except (OSError, MemoryError) as error:
        tell(Failed(error=LoadError.code, message=f"memory for weights: {error}"))
        return 1
    return 0


def _tier(options: WeightTierOptions | None) -> LocalTier | None:
    if options is None:
        return None
    try:
        return LocalTier(
            Path(options.path).expanduser(),
            capacity_bytes=options.size_bytes,
            files=LiveTierFiles(),
            clock=LiveBlockingClock(),
            tell=log,
        )
    except TandemError as error:
        log(f"the disk tier of weights is passed by: {error.message}")
        return None


if __name__ == "__main__":
    sys.exit(main())
