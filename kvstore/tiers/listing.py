"""What a store tells operators of its blocks."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from contracts.store_messages import CachedBlock, CacheListReply

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.store_messages import CacheListRequest
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.dram import DramTier

_ORDERS: dict[str, Callable[[CachedBlock], tuple[float, float]]] = {
    "hits": lambda block: (-block.hits, block.idle_s),
    "recent": lambda block: (block.idle_s, -block.hits),
    "oldest": lambda block: (-block.idle_s, block.hits),
}


def list_blocks(ask: CacheListRequest, dram: DramTier, disk: DiskTier, *, now_s: float, most: int) -> CacheListReply:
    """The first of the blocks that match, in the order asked for; at most `most`."""
    matching = [
        block
        for block in _all_blocks(dram, disk, now_s)
        if block.key.startswith(ask.key_prefix) and (block.pinned or not ask.pinned_only)
    ]
    first = heapq.nsmallest(max(0, min(ask.limit, most)), matching, key=_ORDERS[ask.order])
    return CacheListReply(blocks=tuple(first), num_matching=len(matching))


def _all_blocks(dram: DramTier, disk: DiskTier, now_s: float) -> Iterator[CachedBlock]:
    in_memory = list(dram.ledger.all_keys())
    on_disk = disk.has(in_memory)
    for key, is_on_disk in zip(in_memory, on_disk, strict=True):
        block = dram.lookup(key)
        if block is None:
            continue
        yield CachedBlock(
            key=key,
            tiers=("dram", "ssd") if is_on_disk else ("dram",),
            position=int(dram.position[block]),
            hits=int(dram.hits[block]),
            age_s=max(0.0, now_s - float(dram.stored_s[block])),
            idle_s=max(0.0, now_s - float(dram.used_s[block])),
            pinned=dram.is_pinned(key),
            num_bytes=dram.block_bytes,
        )
    known = dram.ledger.all_keys()
    for key in disk.all_keys():
        if key in known:
            continue
        described = disk.describe(key, now_s)
        if described is not None:
            yield described
