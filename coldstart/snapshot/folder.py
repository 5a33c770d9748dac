"""The folder of a machine's snapshots: one file for each worker that there was, within a bound over all models.

Files are whole or not there (`writing`), so that nobody needs a lock: two that make room at once remove more than one
of them had to.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from typing import TYPE_CHECKING

import msgspec

from coldstart.snapshot.writing import PART_SUFFIX

if TYPE_CHECKING:
    from pathlib import Path

SUFFIX = ".snapshot"
#: Of the folder, that one snapshot may take: several workers, and models, are to have theirs.
SHARE = 4
#: What a killed process left half-written is removed after this.
_STALE_S = 600.0
_MODE = 0o700


class SnapshotFolder:
    def __init__(self, folder: Path, capacity_bytes: int) -> None:
        self._folder = folder
        self._capacity_bytes = capacity_bytes

    @property
    def most_bytes(self) -> int:
        """Of one snapshot."""
        return self._capacity_bytes // SHARE

    def path_of(self, model: tuple[str, ...], worker_id: str) -> Path:
        """Where a worker's is, whether it is there or not. `model`: what its next life will be started with."""
        return self._folder / f"{_stem(model)}-{re.sub('[^A-Za-z0-9-]', '_', worker_id)}{SUFFIX}"

    def find(self, model: tuple[str, ...], worker_id: str) -> Path | None:
        """The worker's own snapshot; else the latest of another worker of the same model: KV is the same for all."""
        own = self.path_of(model, worker_id)
        if own.is_file():
            return own
        found = [path for path in self._snapshots() if path.name.startswith(f"{_stem(model)}-")]
        return max(found, key=_used_s, default=None)

    def make_room(self, path: Path, now_wall_s: float) -> list[str]:
        """After `path` was written: of the others those not used for the longest time go until all fit. Their names.
        Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            for part in self._folder.glob(f"*{PART_SUFFIX}"):
                if now_wall_s - _used_s(part) > _STALE_S:
                    part.unlink(missing_ok=True)
        sizes = {each: _size(each) for each in self._snapshots()}
        total, removed = sum(sizes.values()), list[str]()
        for each in sorted(sizes, key=_used_s):
            if total <= self._capacity_bytes:
                break
            if each != path:
                each.unlink(missing_ok=True)
                total -= sizes[each]
                removed.append(each.name)
        return removed

    def note_used(self, path: Path) -> None:
        """Now, by the machine's clock."""
        with contextlib.suppress(OSError):
            os.utime(path)

    def prepare(self) -> None:
        """Makes the folder, for this user alone. Raises OSError."""
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            self._folder.mkdir(mode=_MODE)

    def _snapshots(self) -> list[Path]:
        return [path for path in self._folder.glob(f"*{SUFFIX}") if path.is_file()]


def _stem(model: tuple[str, ...]) -> str:
    return hashlib.sha256(msgspec.msgpack.encode(model)).hexdigest()[:16]


def _used_s(path: Path) -> float:
    """0.0 of one that another process has removed."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
