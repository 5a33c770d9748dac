"""Bodies made before a run, so that making them takes no time during it."""

from __future__ import annotations

import errno
import mmap
import tempfile
from array import array
from typing import TYPE_CHECKING, BinaryIO

from contracts.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

#: What is kept in memory; the rest goes to a file.
MEMORY_BYTES = 512 * 1024**2
FILE_BYTES = 32 * 1024**3

_PROGRESS_EVERY = 64


class Spool:
    """`spool[i]` is the i-th body. Reads of the file part come from the page cache, or else wait for the disk.

    Use as a context manager; the file has no name, so that it goes with the process whatever happens.
    """

    def __init__(
        self,
        bodies: Iterable[bytes],
        *,
        on_progress: Callable[[int], None],
        folder: Path | None = None,
        max_memory_bytes: int = MEMORY_BYTES,
        max_file_bytes: int = FILE_BYTES,
    ) -> None:
        """Makes all of them; `on_progress` hears how many there are. The file lies in `folder`, by default where the
        system has temporary files. Raises ConfigError when they do not fit."""
        self._kept: list[bytes] = []
        #: Of the others: where each ends in the file.
        self._ends = array("Q", [0])
        self._file: BinaryIO | None = None
        self._mapped: mmap.mmap | None = None
        self._where = str(folder or tempfile.gettempdir())
        self._max_file_bytes = max_file_bytes
        room = max_memory_bytes
        try:
            for body in bodies:
                if self._file is None and len(body) <= room:
                    room -= len(body)
                    self._kept.append(body)
                else:
                    self._write(body)
                if len(self) % _PROGRESS_EVERY == 0:
                    on_progress(len(self))
            self._map()
        except BaseException:
            self.close()
            raise
        on_progress(len(self))

    def __enter__(self) -> Spool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._kept) + len(self._ends) - 1

    def __getitem__(self, number: int) -> bytes:
        if not 0 <= number < len(self):
            raise IndexError(f"body {number} of {len(self)}")
        if number < len(self._kept):
            return self._kept[number]
        assert self._mapped is not None
        at = number - len(self._kept)
        return self._mapped[self._ends[at] : self._ends[at + 1]]

    def close(self) -> None:
        """Idempotent."""
        if self._mapped is not None:
            self._mapped.close()
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                # Closing writes what is still in the buffer; the file is gone either way.
                if error.errno not in _FULL:
                    raise
        self._mapped = self._file = None
        self._kept.clear()
        del self._ends[1:]

    def _write(self, body: bytes) -> None:
        end = self._ends[-1] + len(body)
        if end > self._max_file_bytes:
            raise ConfigError(
                f"request bodies take more than {self._max_file_bytes / 1024**3:.3g} GiB "
                f"(so far {len(self)} requests): shorten the workload, or scale its lengths"
            )
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._where)  # noqa: SIM115 (closed by `close`)
            self._file.write(body)
        except OSError as error:
            raise self._explained(error) from error
        self._ends.append(end)

    def _map(self) -> None:
        if self._file is None:
            return
        try:
            self._file.flush()
            self._mapped = mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise self._explained(error) from error

    def _explained(self, error: OSError) -> ConfigError:
        """Of a file that cannot be written."""
        advice = "; TMPDIR names another folder" if error.errno in _FULL else ""
        return ConfigError(
            f"request bodies cannot be written to {self._where}: {error.strerror} "
            f"(after {self._ends[-1] / 1024**2:.0f} MiB){advice}"
        )


#: The disk, the quota or the limit on the size of files.
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
