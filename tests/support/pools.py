"""Pools for transports under test."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

from kvtransfer import HostPool

if TYPE_CHECKING:
    from kvtransfer import Transport


def register_pool(transport: Transport, num_blocks: int, block_bytes: int) -> memoryview:
    """A new pool registered with `transport`; its descriptor goes with the transport."""
    pool = HostPool(num_blocks, block_bytes)
    transport.register(pool)
    weakref.finalize(transport, pool.close)
    return pool.view()
