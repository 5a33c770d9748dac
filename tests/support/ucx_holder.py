"""A process that holds a pool for readers over UCX: `python -m tests.support.ucx_holder BLOCKS BYTES [INTERFACE]`.

Fills its blocks with `content`, prints its endpoint in hex, and lives until its standard input ends. UCX_TLS in
its environment says how it is reached.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

import numpy as np

from contracts.ids import Incarnation
from kvtransfer.ucx import UcxTransport
from rpc import LiveClock
from tests.support.pools import register_pool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

#: No word of a holder's pool is 0, and no two are equal.
FIRST_WORD = 1 << 40


def words(pool: memoryview, block_bytes: int) -> NDArray[np.uint64]:
    """The pool by blocks and 8-byte words; writes go through."""
    return np.frombuffer(pool, np.uint64).reshape(-1, block_bytes // 8)


def content(blocks: Sequence[int], block_bytes: int) -> NDArray[np.uint64]:
    """What these blocks of a holder hold, in the same shape."""
    words_per_block = block_bytes // 8
    starts = np.array(blocks, np.int64)[:, None] * words_per_block
    return (starts + np.arange(FIRST_WORD, FIRST_WORD + words_per_block)).astype(np.uint64)


async def hold(num_blocks: int, block_bytes: int, interface: str | None) -> None:
    transport = UcxTransport(clock=LiveClock(), incarnation=Incarnation(7), worker_name="p0", interface=interface)
    pool = register_pool(transport, num_blocks, block_bytes)
    words(pool, block_bytes)[:] = content(range(num_blocks), block_bytes)
    sys.stdout.write(transport.endpoint().hex() + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    pool.release()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(hold(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None))
