"""The canary of a checkpoint that was just converted, by an engine that computes on its file."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from coldstart.loaded import LoadedWeights
from contracts.errors import LoadError
from engine.canary import measure_canary
from engine.ops import TorchOps
from engine.runner import EngineOptions, load_runner

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.format import Index
    from engine.canary import Canary

_NUM_BLOCKS = 2


def canary_of(folder: Path, index: Index) -> Canary | None:
    """`folder` holds weights and config; `index` need not be written yet. The weights are used where the page cache has
    them, so that a model larger than memory can be asked too. By torch's own operators: another way than workers take.
    Raises LoadError when the file cannot be read."""
    partition = index.partitions[0]
    try:
        with (folder / partition.file).open("rb") as file:
            mapping = mmap.mmap(file.fileno(), partition.num_bytes, prot=mmap.PROT_READ)
    except (OSError, ValueError) as error:
        raise LoadError(f"{folder / partition.file}: cannot be mapped: {error}") from error
    options = EngineOptions(num_blocks=_NUM_BLOCKS)
    return measure_canary(load_runner(folder, options, TorchOps(), weights=LoadedWeights(mapping, index)))
