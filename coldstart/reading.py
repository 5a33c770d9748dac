"""One weight file of this machine into memory or onto a device. Without torch: loaders need none."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING

from coldstart.file_source import FileSource
from coldstart.pipeline import NUM_THREADS, PartitionLoad
from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from coldstart.format import Index, Partition
    from coldstart.pipeline import Destination, LoadProgress, LoadReport


def partition_of(index: Index, rank: int) -> Partition:
    """Raises ConfigError when there is no such rank."""
    if not 0 <= rank < index.tensor_parallel:
        raise ConfigError(f"there is no rank {rank} of {index.tensor_parallel}")
    return index.partitions[rank]


def load_partition(
    folder: Path,
    index: Index,
    rank: int,
    destination: Destination,
    *,
    num_threads: int = NUM_THREADS,
    progress: Callable[[LoadProgress], None] | None = None,
) -> LoadReport:
    """Reads a weight file of this machine into `destination`. Blocks. Raises as `PartitionLoad.run`."""
    partition = partition_of(index, rank)
    with ExitStack() as stack:
        # Whatever happens, nobody writes to the destination afterwards.
        stack.callback(destination.stop)
        source = FileSource(folder / partition.file)
        stack.callback(source.close)
        # A page that came wrong past the cache may come right through it, and the other way round.
        second = FileSource(folder / partition.file, direct=not source.is_direct)
        stack.callback(second.close)
        load = PartitionLoad(
            source,
            partition,
            index.chunk_bytes,
            destination,
            second=second,
            num_threads=num_threads,
            progress=progress,
        )
        return replace(load.run(), is_direct=source.is_direct)
