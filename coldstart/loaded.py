"""Weights in memory that a load filled, as the engine takes them."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch

from coldstart.format import check_folder, read_index
from coldstart.memory import WeightMemory, as_array
from coldstart.partition import PartitionPlan
from coldstart.pipeline import MemoryDestination
from coldstart.reading import load_partition, partition_of
from contracts.errors import ConfigError, CorruptCheckpoint
from engine.checkpoint import torch_dtype
from engine.model_config import load_model_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor
    from typing_extensions import Buffer

    from coldstart.format import Index
    from coldstart.pipeline import LoadProgress
    from engine.canary import Canary
    from engine.safetensors_files import StoredDtype


class LoadedWeights:
    """`engine.weights.FusedWeights` over one partition's bytes. Nothing is copied; tensors keep the memory alive."""

    def __init__(self, memory: Buffer | Tensor, index: Index, rank: int = 0) -> None:
        """`memory` begins with the whole partition, verified: a mapping, which may be read-only, or a uint8 tensor.

        Raises ConfigError when there is no such rank, or the memory is too short.
        """
        partition = partition_of(index, rank)
        self.index = index
        self.rank = rank
        self._entries = {entry.name: entry for entry in partition.tensors}
        self._flat = memory if isinstance(memory, torch.Tensor) else bytes_tensor(memory)
        if len(self._flat) < partition.num_bytes:
            raise ConfigError(f"{len(self._flat)} bytes of memory do not hold a partition of {partition.num_bytes}")

    def __repr__(self) -> str:
        return f"<LoadedWeights {self.index.partitions[self.rank].file} {self.index.dtype}>"

    @property
    def fingerprint(self) -> str:
        return self.index.model_fingerprint

    @property
    def dtype(self) -> StoredDtype:
        return self.index.dtype

    @property
    def canary(self) -> Canary | None:
        return self.index.canary

    def names(self) -> tuple[str, ...]:
        """In forward order."""
        return tuple(self._entries)

    def tensor(self, name: str) -> Tensor:
        """The rank's share of a fused tensor; not to be written to. Raises ConfigError when there is none."""
        entry = self._entries.get(name)
        if entry is None:
            raise ConfigError(f"{self!r} holds no tensor {name}")
        return self._flat[entry.offset : entry.offset + entry.num_bytes].view(torch_dtype(self.dtype)).view(entry.shape)


def bytes_tensor(memory: Buffer) -> Tensor:
    """A flat uint8 tensor over memory that it keeps alive, and that may be read-only: then nobody is to write to it."""
    array = as_array(memory)
    if not len(array):
        return torch.empty(0, dtype=torch.uint8)
    # By address: of read-only memory torch would warn, every time.
    held: Any = (ctypes.c_ubyte * len(array)).from_address(int(array.ctypes.data))
    held.array = array
    return torch.frombuffer(held, dtype=torch.uint8)


def read_checkpoint(folder: Path) -> Index:
    """The index of a folder in which everything stands but perhaps the weights' bytes, which loading checks.

    Raises CorruptCheckpoint, LoadError, and ConfigError for a model that is not supported.
    """
    index = read_index(folder)
    check_folder(folder, index)
    check_fits(folder, index)
    return index


def check_fits(folder: Path, index: Index) -> None:
    """Raises CorruptCheckpoint where the index is not of the folder's model, and ConfigError for one that is not
    supported."""
    config = load_model_config(folder)
    for rank, partition in enumerate(index.partitions):
        plan = PartitionPlan(config, index.dtype, rank=rank, tensor_parallel=index.tensor_parallel)
        if plan.entries != partition.tensors or plan.num_bytes != partition.num_bytes:
            raise CorruptCheckpoint(f"{folder}: its index does not fit its config.json")


def load_checkpoint(
    folder: Path, rank: int = 0, *, progress: Callable[[LoadProgress], None] | None = None
) -> LoadedWeights:
    """One partition of a converted checkpoint, in memory of its own that goes with the last tensor over it.

    Raises CorruptCheckpoint, LoadError, ConfigError: never are there wrong weights.
    """
    index = read_checkpoint(folder)
    memory = WeightMemory(partition_of(index, rank).num_bytes)
    memory.close_descriptor()
    load_partition(folder, index, rank, MemoryDestination(memory.mapping, index.chunk_bytes), progress=progress)
    return LoadedWeights(memory.mapping, index, rank)
