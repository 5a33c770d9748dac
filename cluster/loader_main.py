"""The loader: `python -m cluster.loader_main`, started by the node agent to fill memory with one model's weights.

A process of its own, so that one that is killed, or runs out of memory in a conversion, leaves nothing half full: the
agent drops memory whose loader did not end well.
"""

from __future__ import annotations

import mmap
import os
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.child_main import log, tell
from cluster.launch import (
    MAX_LAUNCH_BYTES,
    Failed,
    Filled,
    Sized,
    decode_go,
    decode_loader_launch,
)
from cluster.lifeline import die_with_parent
from cluster.remote_model import open_far
from cluster.telling import Teller
from coldstart.loader import WeightLoader
from coldstart.local_tier import LocalTier
from coldstart.pipeline import NUM_THREADS
from coldstart.tier_files import LiveTierFiles
from contracts.errors import LoadError, TandemError
from rpc.clock import LiveBlockingClock

if TYPE_CHECKING:
    from cluster.launch import LoaderLaunch, WeightTierOptions
    from coldstart.compressed import CompressedLoader


#: A model answers by then.
_NICE = 10


def main() -> int:
    try:
        launch = decode_loader_launch(sys.stdin.buffer.readline(MAX_LAUNCH_BYTES))
        die_with_parent(launch.parent_pid)
        clock = LiveBlockingClock()
        with _loader(launch) as loader:
            began_s = clock.now_s()
            num_bytes = loader.prepare()
            prepared_s = clock.now_s() - began_s
            tell(Sized(num_bytes=num_bytes))
            line = sys.stdin.buffer.readline(MAX_LAUNCH_BYTES)
            if not line:
                return 0
            go = decode_go(line)
            mapping = mmap.mmap(launch.descriptor, go.num_bytes)
            memory = memoryview(mapping)
            began_s = clock.now_s()
            # Without closing it after an error, whose frames hold views of it: then it goes with the process.
            loaded = loader.fill(memory)
            seconds = clock.now_s() - began_s
            memory.release()
            mapping.close()
            goes_on = isinstance(loader, WeightLoader) and loader.has_more
            has_converted = isinstance(loader, WeightLoader) and loader.has_converted
            tell(
                Filled(
                    weight_bytes=loaded.weight_bytes,
                    index_bytes=loaded.index_bytes,
                    tier=loaded.tier,
                    goes_on=goes_on,
                    seconds=seconds,
                    is_direct=loaded.is_direct,
                    converted_s=prepared_s if has_converted else 0.0,
                )
            )
            if isinstance(loader, WeightLoader) and goes_on:
                _complete(loader, launch.descriptor, go.num_bytes)
    except TandemError as error:
        tell(Failed(error=error.code, message=error.message))
        return 1
    except (OSError, MemoryError) as error:
        tell(Failed(error=LoadError.code, message=f"memory for weights: {error}"))
        return 1
    return 0


def _complete(loader: WeightLoader, descriptor: int, num_bytes: int) -> None:
    """The disk tier's copy. The agent seals the memory meanwhile: it is mapped anew, in a way that can only be read."""
    os.nice(_NICE)
    read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    os.close(descriptor)
    with mmap.mmap(read_only, num_bytes, prot=mmap.PROT_READ) as mapping, memoryview(mapping) as memory:
        os.close(read_only)
        loader.finish(memory)


def _loader(launch: LoaderLaunch) -> WeightLoader | CompressedLoader:
    if launch.compressed is None:
        return WeightLoader(
            launch.key, _tier(launch.ssd), progress=Teller(), log=log, open_far=partial(open_far, say=log)
        )
    from coldstart.compressed import CompressedLoader

    memory = mmap.mmap(launch.compressed, 0, prot=mmap.PROT_READ)
    num_threads = min(NUM_THREADS, len(os.sched_getaffinity(0)))
    return CompressedLoader(launch.key, memory, num_threads=num_threads, progress=Teller())


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
