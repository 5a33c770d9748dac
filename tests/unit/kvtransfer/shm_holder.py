"""A process that holds a pool for the shared-memory tests: `python -m tests.unit.kvtransfer.shm_holder N B`.

Fills each of its N blocks with `pattern(block, B)`, prints its endpoint in hex, and lives until its
standard input ends.
"""

from __future__ import annotations

import asyncio
import random
import sys

from contracts.ids import Incarnation
from kvtransfer import ShmTransport
from rpc import LiveClock
from tests.support.pools import register_pool


def pattern(block: int, block_bytes: int) -> bytes:
    """What a holder's block holds."""
    return random.Random(block).randbytes(block_bytes)


async def hold(num_blocks: int, block_bytes: int) -> None:
    transport = ShmTransport(clock=LiveClock(), incarnation=Incarnation(7))
    pool = register_pool(transport, num_blocks, block_bytes)
    for block in range(num_blocks):
        pool[block * block_bytes : (block + 1) * block_bytes] = pattern(block, block_bytes)
    sys.stdout.write(transport.endpoint().hex() + "\n")
    sys.stdout.flush()
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
    pool.release()
    await transport.close()


if __name__ == "__main__":
    asyncio.run(hold(int(sys.argv[1]), int(sys.argv[2])))
