"""`ByteSource` over a file of this machine: past the page cache where the file system lets us.

Direct reads go from the disk straight into the caller's memory, without a copy and without pushing other files out of
the cache (ServerlessLLM, OSDI'24, section 4.2). A file system that refuses them (overlays, some network ones) and the
tail of a file whose length is no multiple of a page are read through the cache, whose pages are let go afterwards.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from coldstart.source import ALIGNMENT_BYTES
from contracts.errors import CorruptCheckpoint, LoadError

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

#: What says that direct reads are not to be had, or not of this place or into this buffer.
_REFUSED = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP)


class FileSource:
    """See `coldstart.source.ByteSource`. Its length is the one that the file has when it is opened."""

    def __init__(self, path: Path, *, direct: bool = True, keep_cached: bool = False) -> None:
        """`direct` False: through the page cache; `keep_cached` leaves there what was read.

        Raises LoadError, and CorruptCheckpoint for a file that is not there.
        """
        self.name = str(path)
        self._keep_cached = keep_cached
        self._direct = -1
        try:
            self._buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CorruptCheckpoint(f"{path}: is missing") from error
        except OSError as error:
            raise LoadError(f"{path}: cannot be opened: {error.strerror}") from error
        try:
            self.num_bytes = os.fstat(self._buffered).st_size
            if direct:
                self._direct = _open_direct(path)
        except OSError as error:
            self.close()
            raise LoadError(f"{path}: cannot be opened: {error.strerror}") from error

    def __repr__(self) -> str:
        return f"<FileSource {self.name} {'direct' if self.is_direct else 'buffered'}>"

    @property
    def is_direct(self) -> bool:
        """Whether reads go past the page cache: then their speed is the disk's."""
        return self._direct >= 0

    def read_into(self, offset: int, into: Buffer) -> None:
        """As `ByteSource.read_into`. What is not aligned is read too, through the cache."""
        with memoryview(into) as whole, whole.cast("B") as view:
            done = 0
            if self.is_direct:
                done = self._read_direct(offset, view[: len(view) // ALIGNMENT_BYTES * ALIGNMENT_BYTES])
            if done < len(view):
                self._read_all(self._buffered, offset + done, view[done:])
                if not self._keep_cached:
                    os.posix_fadvise(self._buffered, offset + done, len(view) - done, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        for descriptor in (self._buffered, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._buffered = self._direct = -1

    def _read_direct(self, offset: int, view: memoryview) -> int:
        """Bytes read: all of them, or, where direct reads are refused, fewer."""
        done = 0
        while done < len(view):
            try:
                count = os.preadv(self._direct, [view[done:]], offset + done)
            except OSError as error:
                if error.errno in _REFUSED:
                    return done
                raise self._failed(offset + done, len(view) - done, error) from error
            if count <= 0:
                raise self._truncated(offset + done, len(view) - done)
            done += count
            if count % ALIGNMENT_BYTES:
                # A read that ended early ended within a page: the next would not be aligned.
                return done
        return done

    def _read_all(self, descriptor: int, offset: int, view: memoryview) -> None:
        done = 0
        while done < len(view):
            try:
                count = os.preadv(descriptor, [view[done:]], offset + done)
            except OSError as error:
                raise self._failed(offset + done, len(view) - done, error) from error
            if count <= 0:
                raise self._truncated(offset + done, len(view) - done)
            done += count

    def _failed(self, offset: int, num_bytes: int, error: OSError) -> LoadError:
        return LoadError(f"{self.name}: cannot read {num_bytes} bytes at {offset}: {error.strerror}")

    def _truncated(self, offset: int, num_bytes: int) -> CorruptCheckpoint:
        return CorruptCheckpoint(
            f"{self.name}: truncated: it ends at or before {offset}, {num_bytes} bytes are missing"
        )


def _open_direct(path: Path) -> int:
    """-1 where the file system has no direct reads."""
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError as error:
        if error.errno in _REFUSED:
            return -1
        raise
