"""What the disk tier of checkpoints needs of a file system: one thin call each, so that tests can break any of them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from typing import TYPE_CHECKING, Protocol

from contracts.errors import LoadError

if TYPE_CHECKING:
    from pathlib import Path

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700


class TierFiles(Protocol):
    """Paths are absolute; every method raises OSError with the errno that says why."""

    def make_folder(self, path: Path) -> None:
        """And those above it; no error where it is there."""
        ...

    def open_folder(self, path: Path) -> int:
        """A descriptor that locks of the folder hang on; another one at each call."""
        ...

    def lock(self, descriptor: int, *, shared: bool) -> bool:
        """Takes the folder's lock, or turns the one held into this kind, at once or not at all. It is held until the
        descriptor is closed, also by the end of the process, and goes along when the folder is renamed."""
        ...

    def close(self, descriptor: int) -> None: ...

    def is_same(self, descriptor: int, path: Path) -> bool:
        """Whether `path` still is that folder."""
        ...

    def names(self, path: Path) -> list[str]:
        """Sorted; none where there is no such folder."""
        ...

    def sizes(self, path: Path) -> dict[str, int]:
        """Bytes of each file in a folder and those below, by name relative to it."""
        ...

    def read(self, path: Path) -> bytes: ...

    def replace(self, path: Path, data: bytes) -> None:
        """A small file: all of it, for good, or nothing."""
        ...

    def rename(self, old: Path, new: Path) -> None:
        """For good."""
        ...

    def remove(self, path: Path) -> None:
        """A file, or a folder with all in it; no error where it is gone."""
        ...

    def sync(self, path: Path) -> None:
        """What a file or folder holds stays after a loss of power."""
        ...

    def set_used(self, path: Path, wall_s: float) -> None: ...

    def used_s(self, path: Path) -> float: ...

    def free_bytes(self, path: Path) -> int: ...


class LiveTierFiles:
    """`TierFiles` of this machine."""

    def make_folder(self, path: Path) -> None:
        path.mkdir(mode=_FOLDER_MODE, parents=True, exist_ok=True)

    def open_folder(self, path: Path) -> int:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def lock(self, descriptor: int, *, shared: bool) -> bool:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self, descriptor: int) -> None:
        os.close(descriptor)

    def is_same(self, descriptor: int, path: Path) -> bool:
        try:
            there, held = path.stat(), os.fstat(descriptor)
        except FileNotFoundError:
            return False
        return (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino)

    def names(self, path: Path) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except FileNotFoundError:
            return []

    def sizes(self, path: Path) -> dict[str, int]:
        found: dict[str, int] = {}
        for folder, _, names in os.walk(path):
            for name in names:
                full = os.path.join(folder, name)
                # Another process may be removing it.
                with contextlib.suppress(FileNotFoundError):
                    found[os.path.relpath(full, path)] = os.stat(full).st_size
        return dict(sorted(found.items()))

    def read(self, path: Path) -> bytes:
        return path.read_bytes()

    def replace(self, path: Path, data: bytes) -> None:
        part = path.with_name(f"{path.name}.part")
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, _FILE_MODE)
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(descriptor, view) :]
        finally:
            os.close(descriptor)
        self.sync(part)
        self.rename(part, path)

    def rename(self, old: Path, new: Path) -> None:
        old.rename(new)
        self.sync(new.parent)
        if old.parent != new.parent:
            self.sync(old.parent)

    def remove(self, path: Path) -> None:
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return

        # Two processes may tidy up at once.
        def forgive(_: object, __: str, error: tuple[type[BaseException], BaseException, object]) -> None:
            if not isinstance(error[1], FileNotFoundError):
                raise error[1]

        shutil.rmtree(path, onerror=forgive)

    def sync(self, path: Path) -> None:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def set_used(self, path: Path, wall_s: float) -> None:
        os.utime(path, (wall_s, wall_s))

    def used_s(self, path: Path) -> float:
        return path.stat().st_mtime

    def free_bytes(self, path: Path) -> int:
        found = os.statvfs(path)
        return found.f_bavail * found.f_frsize


def disk_error(path: Path, error: OSError) -> LoadError:
    """What a person can do something about."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return LoadError(f"{path}: the disk is full ({error.strerror})", reason="disk_full")
    where = f" ({error.filename})" if error.filename else ""
    return LoadError(f"{path}: {error.strerror or error}{where}", reason="disk")
