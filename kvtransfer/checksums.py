"""XXH3-64 of blocks: what the holder announces, and what the reader compares before it uses a block.

The hash runs at memory speed and without the interpreter's lock (for blocks above a few KiB), so a thread of its
own leaves the event loop alone. It finds bytes that changed on their way; it is no defence against somebody who
wants to be believed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contracts.ids import BlockId
    from kvtransfer.transport import Pool


def block_checksums(pool: Pool, blocks: Iterable[BlockId]) -> tuple[int, ...]:
    """XXH3-64 of each block's bytes as they stand now, in the order asked."""
    view, size = pool.view(), pool.block_bytes
    return tuple(xxhash.xxh3_64_intdigest(view[block * size : (block + 1) * size]) for block in blocks)


def corrupt_blocks(pool: Pool, blocks: Sequence[BlockId], expected: Sequence[int]) -> tuple[int, ...]:
    """Which of `blocks` (as positions in it) do not have the checksum that `expected` has at the same place."""
    found = block_checksums(pool, blocks)
    return tuple(index for index, pair in enumerate(zip(found, expected, strict=True)) if pair[0] != pair[1])
