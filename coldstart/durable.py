"""What a writer that may be killed at any step does to a disk: few verbs, so that tests can end it at each."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from typing import TYPE_CHECKING

from contracts.disk import is_full
from contracts.errors import ConfigError, LoadError, TandemError

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

#: What says that the place was chosen badly, and not that the disk is broken.
_UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


class DurableFiles:
    """All verbs raise OSError."""

    def make_folder(self, folder: Path) -> None:
        """With all on the way; it may be there."""
        folder.mkdir(parents=True, exist_ok=True)

    def open(self, path: Path) -> int:
        """For reading and writing; made where missing. The caller closes it."""
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)

    def allocate(self, descriptor: int, num_bytes: int) -> None:
        """Gives the file this length and, where the file system can, its room at once and in one piece."""
        os.ftruncate(descriptor, num_bytes)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL):
                raise

    def write(self, descriptor: int, data: Buffer, offset: int) -> None:
        with memoryview(data) as whole, whole.cast("B") as view:
            done = 0
            while done < len(view):
                done += os.pwrite(descriptor, view[done:], offset + done)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        os.ftruncate(descriptor, num_bytes)

    def sync(self, descriptor: int) -> None:
        os.fsync(descriptor)

    def sync_folder(self, folder: Path) -> None:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, old: Path, new: Path) -> None:
        """A file takes another's place; a folder that of an empty one."""
        old.rename(new)

    def remove(self, path: Path) -> None:
        """A file, or a folder with all that is in it; may be missing."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
            return
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def writing_failed(path: Path, error: OSError, *, needed_bytes: int, advice: str = "") -> TandemError:
    """What to raise for an OSError of one of the verbs: ConfigError for a bad choice of place, else LoadError."""
    if is_full(error):
        free_bytes = _free_bytes(path)
        room = "" if free_bytes is None else f", {free_bytes} are free"
        return LoadError(f"{path}: no room: {needed_bytes} bytes are needed{room}{advice}")
    if error.errno in _UNWRITABLE:
        return ConfigError(f"{path}: cannot be written: {error.strerror}")
    return LoadError(f"{path}: cannot be written: {error.strerror}{advice}")


def _free_bytes(path: Path) -> int | None:
    for place in (path, *path.parents):
        with contextlib.suppress(OSError):
            status = os.statvfs(place)
            return status.f_bavail * status.f_frsize
    return None
