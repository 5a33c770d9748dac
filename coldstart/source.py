"""Where the bytes of one file of a checkpoint come from: a disk, an object store, memory. The seam of the loader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from typing_extensions import Buffer

#: Reads begin and end at multiples of this (but for the end of the file), and so do the buffers they go to: what direct
#: I/O asks for on all common disks.
ALIGNMENT_BYTES = 4096


class ByteSource(Protocol):
    """One file of known length. `read_into` may be called by several threads at once; it blocks."""

    @property
    def name(self) -> str:
        """For people and errors: a path, or an address without its secrets."""
        ...

    @property
    def num_bytes(self) -> int: ...

    def read_into(self, offset: int, into: Buffer) -> None:
        """Fills `into`, a writable buffer, with the bytes from `offset` on.

        Both are aligned to `ALIGNMENT_BYTES`; the last piece of a file may be shorter, and is asked for with its exact
        length. Releases the GIL while it waits. Raises `LoadError` when the bytes cannot be had: truncated, gone,
        unreadable, or, of a remote one, not within its retries and deadlines.
        """
        ...

    def close(self) -> None:
        """Idempotent. No `read_into` may be under way."""
        ...
