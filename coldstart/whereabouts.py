"""Where a model's weights are on this machine when they are not in its memory. Looks at folders, reads no weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from coldstart.download_plan import converted_key
from coldstart.far import read_far
from coldstart.format import is_converted, partition_name, read_index
from coldstart.loader import folder_identity
from coldstart.tier_handles import CHECKPOINT
from coldstart.tier_records import CheckpointKey
from contracts.errors import ConfigError, LoadError

if TYPE_CHECKING:
    from coldstart.residence import WeightsKey


@dataclass(frozen=True, slots=True)
class Whereabouts:
    #: `ssd`: in the form that loads at the disk's speed, in the model's own folder or the disk tier; else `remote`.
    tier: Literal["ssd", "remote"]
    #: Of that file, or of the original's weights.
    num_bytes: int


def whereabouts(key: WeightsKey, tier_root: Path | None) -> Whereabouts:
    """`tier_root`: of the disk tier. Without its lock: what is said may be over when somebody acts on it. Blocks.

    Raises ConfigError for a folder that is none, LoadError for one that cannot be read, CorruptCheckpoint.
    """
    folder = Path(key.folder)
    far = read_far(folder)
    if far is not None:
        return _of_far(key, folder, Path(far.tier_path))
    partition = partition_name(key.rank, key.tensor_parallel)
    places: list[Path] = []
    if is_converted(folder):
        places.append(folder)
    elif tier_root is not None:
        places.append(
            _entry(
                tier_root,
                CheckpointKey(identity=folder_identity(folder), dtype=key.dtype, tensor_parallel=key.tensor_parallel),
            )
        )
    try:
        for place in places:
            if (place / partition).is_file():
                return Whereabouts("ssd", (place / partition).stat().st_size)
        return Whereabouts("remote", sum(file.stat().st_size for file in folder.glob("*.safetensors")))
    except OSError as error:
        raise LoadError(f"{folder}: cannot be looked at: {error.strerror}") from error


def _of_far(key: WeightsKey, folder: Path, tier_root: Path) -> Whereabouts:
    """Of a folder that stands for a checkpoint in a store."""
    index = read_index(folder)
    if not 0 <= key.rank < len(index.partitions):
        raise ConfigError(f"{folder}: there is no rank {key.rank} of {len(index.partitions)}")
    partition = index.partitions[key.rank]
    is_here = (_entry(tier_root, converted_key(index)) / partition.file).is_file()
    return Whereabouts("ssd" if is_here else "remote", partition.num_bytes)


def _entry(tier_root: Path, key: CheckpointKey) -> Path:
    return tier_root / "entries" / key.folder / CHECKPOINT
