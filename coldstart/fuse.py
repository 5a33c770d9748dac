"""A model in Hugging Face layout read straight into memory in the engine's form, where no disk tier is to keep it."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from coldstart.format import CHUNK_BYTES, Index, Partition, checksum, num_chunks, partition_name
from coldstart.original import Original
from coldstart.partition import PartitionPlan, check_shares
from engine.compute_dtype import compute_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from engine.compute_dtype import DtypeChoice
    from engine.safetensors_files import StoredDtype

#: As long in JSON as a checksum can be: memory for an index is taken before its checksums are known.
_LONGEST = (1 << 64) - 1


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

    def index(self, checksums: dict[int, tuple[int, ...]]) -> Index:
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
        )

    def fill(self, into: memoryview, progress: Callable[[int, int], None]) -> Index:
        """`into`: zeroed memory of the partition's length. Raises LoadError and ConfigError."""
        plan = self._plans[self._rank]
        checksums: list[int] = []
        for start in range(0, plan.num_bytes, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, plan.num_bytes)
            for span in plan.spans(start, stop):
                low = start + span.start
                self._original.read(span, self._dtype, into[low : low + span.num_items * plan.item_bytes])
            checksums.append(checksum(into[start:stop]))
            progress(stop, plan.num_bytes)
        self._original.check_unchanged()
        return self.index({self._rank: tuple(checksums)})
