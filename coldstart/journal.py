"""Which chunks a conversion has written, so that one that was killed goes on where it stood.

The first line says what is converted into what; a journal of something else is none. Each further line is one chunk
with its checksum, told after its bytes were written. After a crash of the machine a line may have outlasted its bytes:
whoever trusts a line reads the bytes back before they count.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.durable import DurableFiles

_LINE = re.compile(rb"(\d{1,6}) (\d{1,9}) ([0-9a-f]{16})\n")


class Journal:
    """Open until `close`. Raises OSError."""

    def __init__(self, path: Path, files: DurableFiles) -> None:
        self._files = files
        self._descriptor = files.open(path)
        self._end = 0

    def resume(self, identity: bytes) -> dict[tuple[int, int], int] | None:
        """Checksums by (partition, chunk) that an earlier run told; None where there was none with this identity.

        A last line that was half written is dropped.
        """
        text = os.pread(self._descriptor, os.fstat(self._descriptor).st_size, 0)
        first = identity + b"\n"
        if not text.startswith(first):
            return None
        told: dict[tuple[int, int], int] = {}
        self._end = len(first)
        while (line := _LINE.match(text, self._end)) is not None:
            told[int(line[1]), int(line[2])] = int(line[3], 16)
            self._end = line.end()
        self._files.truncate(self._descriptor, self._end)
        return told

    def begin(self, identity: bytes) -> None:
        """Forgets all; `identity` has no line break."""
        assert b"\n" not in identity, identity
        self._files.truncate(self._descriptor, 0)
        self._end = 0
        self._append(identity + b"\n")

    def tell(self, partition: int, chunk: int, checksum: int) -> None:
        """The later of two lines about one chunk counts."""
        self._append(f"{partition} {chunk} {checksum:016x}\n".encode())

    def close(self) -> None:
        os.close(self._descriptor)

    def _append(self, line: bytes) -> None:
        self._files.write(self._descriptor, line, self._end)
        self._end += len(line)
