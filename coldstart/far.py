"""A folder of this machine that stands for a checkpoint in an object store: all of it but the weights.

It holds the small files, the index, and `tandem-remote.json`, which says where the weights are and which disk tier
keeps them. Whoever wants only the config or the tokenizer reads it like any model folder; a loader takes the weights
from the tier where they are there already, else from the store straight into memory while the tier fills
(`coldstart.through`). So a model is served in the time of its slowest tier, and not of all of them one after the other.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec

from coldstart.format import INDEX_NAME, checksum
from coldstart.remote import read_small
from contracts.errors import CorruptCheckpoint, LoadError

if TYPE_CHECKING:
    from coldstart.download import Found
    from coldstart.remote import RemoteFolder

FAR_NAME = "tandem-remote.json"
#: Within a tier's folder.
FAR_FOLDER = "far"
_MAX_FAR_BYTES = 64 << 10


class Far(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the weights of such a folder are."""

    url: Annotated[str, msgspec.Meta(min_length=1)]
    tier_path: Annotated[str, msgspec.Meta(min_length=1)]
    tier_bytes: Annotated[int, msgspec.Meta(gt=0)]


def read_far(folder: Path) -> Far | None:
    """None of a folder that stands for nothing else. Raises CorruptCheckpoint, and LoadError when it cannot be read."""
    path = folder / FAR_NAME
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_FAR_BYTES)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return msgspec.json.decode(data, type=Far)
    except msgspec.MsgspecError as error:
        raise CorruptCheckpoint(f"{path}: {error}") from error


def make_far(remote: RemoteFolder, found: Found, far: Far) -> Path:
    """The folder that stands for a converted checkpoint, made unless it is there. One name for one content: those who
    use an older one are not disturbed. Raises CorruptCheckpoint, LoadError."""
    assert found.index is not None, "an original has to be here to be converted"
    digest = hashlib.sha256(far.url.encode() + b"\0" + found.index_data + msgspec.json.encode(far))
    parent = Path(far.tier_path) / FAR_FOLDER
    folder = parent / digest.hexdigest()[:40]
    files = {INDEX_NAME: found.index_data, FAR_NAME: msgspec.json.encode(far)}
    there = {each.file.name: each.file for each in found.plan.files}
    for copied in found.index.files:
        file = there.get(copied.name)
        if file is None:
            raise CorruptCheckpoint(f"{remote.name}/{copied.name}: is missing")
        data = read_small(remote, file)
        if len(data) != copied.num_bytes or checksum(data) != copied.checksum:
            raise CorruptCheckpoint(f"{remote.name}/{copied.name}: changed since the checkpoint was converted")
        files[copied.name] = data
    try:
        if _holds(folder, files):
            return folder
        parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=".unfinished-", dir=parent))
        try:
            for name, data in files.items():
                (unfinished / name).write_bytes(data)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(unfinished, folder)
        except BaseException:
            shutil.rmtree(unfinished, ignore_errors=True)
            # Somebody else may have made the same folder meanwhile.
            if not _holds(folder, files):
                raise
    except OSError as error:
        raise LoadError(f"{folder}: cannot be written: {error.strerror}") from error
    return folder


def _holds(folder: Path, files: dict[str, bytes]) -> bool:
    return all((folder / name).is_file() and (folder / name).read_bytes() == data for name, data in files.items())
