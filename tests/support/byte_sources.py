"""`coldstart.source.ByteSource` over bytes in memory, with faults."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer


class BytesSource:
    """`before` is called in the reader's thread with each read's offset; it may block or raise. `spoil` changes what
    was read."""

    def __init__(
        self,
        data: bytes,
        *,
        before: Callable[[int], None] = lambda _: None,
        spoil: Callable[[int, memoryview], None] = lambda _, __: None,
    ) -> None:
        self.name = "bytes"
        self.data = data
        self.offsets: list[int] = []
        self._before = before
        self._spoil = spoil
        self._guard = threading.Lock()
        self.num_reading = 0

    @property
    def num_bytes(self) -> int:
        return len(self.data)

    def read_into(self, offset: int, into: Buffer) -> None:
        with self._guard:
            self.offsets.append(offset)
            self.num_reading += 1
        try:
            self._before(offset)
            view = memoryview(into).cast("B")
            view[:] = self.data[offset : offset + len(view)]
            self._spoil(offset, view)
        finally:
            with self._guard:
                self.num_reading -= 1

    def close(self) -> None:
        """Nothing is open."""
