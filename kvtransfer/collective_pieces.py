"""How a list of blocks is cut into messages, and how the bytes of a message get into and out of a pool.

Both sides cut alike, from the number of blocks and their size alone. Copies are numpy's and ctypes': one call a
piece however small the blocks, and none of torch's parallel regions.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from contracts.ids import BlockId
    from kvtransfer.transport import Pool

#: Most bytes of one message. Small enough that a copy out stays in the cache and a stop is soon heard.
PIECE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Piece:
    """`num_blocks` whole blocks from position `first` of the list; or, where blocks are larger than a piece,
    the `num_bytes` from `offset` on of the one block at `first`."""

    first: int
    num_blocks: int
    offset: int
    num_bytes: int


def piece_bytes(block_bytes: int) -> int:
    """Size of the largest piece of a list of such blocks."""
    return min(block_bytes, PIECE_BYTES) * max(1, PIECE_BYTES // block_bytes)


def pieces(num_blocks: int, block_bytes: int) -> Iterator[Piece]:
    if block_bytes > PIECE_BYTES:
        for first in range(num_blocks):
            for offset in range(0, block_bytes, PIECE_BYTES):
                yield Piece(first, 1, offset, min(PIECE_BYTES, block_bytes - offset))
        return
    step = PIECE_BYTES // block_bytes
    for first in range(0, num_blocks, step):
        count = min(step, num_blocks - first)
        yield Piece(first, count, 0, count * block_bytes)


class BlockCopier:
    """Moves pieces between a pool and staging memory."""

    def __init__(self, pool: Pool) -> None:
        self.block_bytes = pool.block_bytes
        self.num_blocks = pool.num_blocks
        self._address = pool.address
        self._blocks = np.frombuffer(pool.view(), np.uint8).reshape(pool.num_blocks, pool.block_bytes)

    def span(self, blocks: Sequence[BlockId], piece: Piece) -> int | None:
        """Where in the pool, in bytes from its start, the whole piece lies; None: in several places."""
        first = blocks[piece.first]
        if any(blocks[piece.first + each] != first + each for each in range(1, piece.num_blocks)):
            return None
        return first * self.block_bytes + piece.offset

    def gather(self, blocks: Sequence[BlockId], piece: Piece, staging: np.ndarray) -> None:
        """Copies a piece that lies in several places to `staging`, which is as long as the piece."""
        ids = np.array(blocks[piece.first : piece.first + piece.num_blocks], np.intp)
        # The ids are checked on arrival; any mode but "raise" spares numpy a second buffer.
        np.take(self._blocks, ids, axis=0, out=staging.reshape(piece.num_blocks, self.block_bytes), mode="clip")

    def scatter(self, staging: np.ndarray, blocks: Sequence[BlockId], piece: Piece) -> None:
        """Copies a piece from `staging`, which is as long as the piece, into the pool."""
        span = self.span(blocks, piece)
        if span is not None:
            ctypes.memmove(self._address + span, staging.ctypes.data, piece.num_bytes)
            return
        ids = np.array(blocks[piece.first : piece.first + piece.num_blocks], np.intp)
        self._blocks[ids] = staging.reshape(piece.num_blocks, self.block_bytes)
