"""How the bytes of a block are kept on disk."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from contracts.errors import CorruptKv

if TYPE_CHECKING:
    from typing_extensions import Buffer


class BlockCodec(Protocol):
    """Made for blocks of one layout. Called in threads, several at once; never keeps what it is given."""

    @property
    def codec_id(self) -> int:
        """Stands in files: stable for ever, below 256."""
        ...

    @property
    def name(self) -> str: ...

    def encode(self, block: memoryview, /) -> Buffer: ...

    def decode(self, data: memoryview, into: memoryview, /) -> None:
        """Writes the whole block. Raises CorruptKv where `data` is not what `encode` made of one."""
        ...


class RawCodec:
    """Blocks as they are."""

    codec_id = 0
    name = "raw"

    def encode(self, block: memoryview, /) -> memoryview:
        return block

    def decode(self, data: memoryview, into: memoryview, /) -> None:
        if len(data) != len(into):
            raise CorruptKv(f"{len(data)} bytes stand for a block of {len(into)}")
        copy(into, data)


RAW = RawCodec()


def copy(into: memoryview, data: memoryview) -> None:
    """Other than a slice assignment, this lets other threads run meanwhile."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))
