"""A model in Hugging Face layout read straight into memory in the engine's form, where no disk tier is to keep it."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING

from coldstart.canary_run import canary_of
from coldstart.format import CHUNK_BYTES, Index, Partition, num_chunks, partition_name
from coldstart.original import Original
from coldstart.partition import PartitionPlan, check_shares
from engine.canary import NUM_TOKENS, Canary
from engine.compute_dtype import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.compute_dtype import DtypeChoice
    from engine.safetensors_files import StoredDtype

#: As long in JSON as they can be: memory for an index is taken before its checksums and its canary are known.
_LONGEST = (1 << 64) - 1
_LONGEST_CANARY = Canary(prompt=((1 << 62) - 1,) * NUM_TOKENS, token=(1 << 62) - 1, margin=-1.2345678901234567e-300)


def engine_dtype(model_dir: Path, choice: DtypeChoice) -> StoredDtype:
    """What a CPU engine computes in when it is told `choice`: weights in that dtype are used where they lie. Raises
    ConfigError."""
    with closing(Original(model_dir)) as original:
        return compute_dtype(model_dir, original.config, choice, on_cpu=True)


class Fuser:
    """One partition of a model folder, on its way to memory. Not safe for two threads."""

    def __init__(self, model_dir: Path, dtype: StoredDtype, *, rank: int = 0, tensor_parallel: int = 1) -> None:
        """Raises ConfigError naming file and tensor, or the size that so many ranks cannot share."""
        self._original = Original(model_dir)
        check_shares(self._original.config, tensor_parallel)
        self._dtype: StoredDtype = dtype
        self._rank, self._ranks = rank, tensor_parallel
        self._plans = [
            PartitionPlan(self._original.config, dtype, rank=each, tensor_parallel=tensor_parallel)
            for each in range(tensor_parallel)
        ]

    def close(self) -> None:
        self._original.close()

    @property
    def num_bytes(self) -> int:
        return self._plans[self._rank].num_bytes

    def longest_index(self) -> Index:
        """As `fill` returns it, at its longest."""
        return self._index({}, _LONGEST_CANARY)

    def fill(self, into: memoryview, progress: Callable[[str, int, int], None]) -> Index:
        """`into`: zeroed memory of the partition's length. `progress(what, bytes done, bytes in all)` is called often,
        from two threads one after the other. Raises LoadError and ConfigError.

        Of several ranks the index has the checksums of its own partition only."""
        filled = threading.Event()

        def tell_canary(done: int, total: int) -> None:
            if filled.is_set():
                progress("canary", done, total)

        with ThreadPoolExecutor(1, "canary") as beside:
            # It reads what was just read, or is about to be: the disk is asked once.
            canary = beside.submit(canary_of, self._original.folder, progress=tell_canary)
            checksums = self._fill(into, lambda done, total: progress("weights", done, total))
            filled.set()
            index = self._index({self._rank: checksums}, canary.result())
        self._original.check_unchanged()
        return index

    def _fill(self, into: memoryview, progress: Callable[[int, int], None]) -> tuple[int, ...]:
        plan = self._plans[self._rank]
        checksums: list[int] = []
        for start in range(0, plan.num_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, plan.num_bytes)
            checksums.append(self._original.read_chunk(plan, start, self._dtype, into[start:stop]))
            progress(stop, plan.num_bytes)
        return tuple(checksums)

    def _index(self, checksums: dict[int, tuple[int, ...]], canary: Canary | None) -> Index:
        """Of all partitions, as a conversion's; checksums that are not known are the longest there are."""
        return Index(
            model_fingerprint=self._original.fingerprint,
            dtype=self._dtype,
            tensor_parallel=self._ranks,
            chunk_bytes=CHUNK_BYTES,
            partitions=tuple(
                Partition(
                    file=partition_name(rank, self._ranks),
                    num_bytes=plan.num_bytes,
                    tensors=plan.entries,
                    checksums=checksums.get(rank, (_LONGEST,) * num_chunks(plan.num_bytes, CHUNK_BYTES)),
                )
                for rank, plan in enumerate(self._plans)
            ),
            files=(),
            canary=canary,
        )
