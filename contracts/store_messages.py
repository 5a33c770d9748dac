"""Messages to and from the KV stores: one store for each machine, which keeps KV between requests in host memory and
on disk, for all workers.

A store is a member like the workers (role "store"): it registers, beats, tells the coordinator what it holds, is
fetched from with Fetch and answers Describe, Confirm, Renew and Ack. What it takes, it takes as a reader: a worker
offers it blocks under a sealed lease.

    worker   -> store   Keep (an offer), Prefetch
    store    -> worker  Confirm, Renew, Ack
    operator -> store   CacheStat, CacheList, CacheClear, CachePin
    operator -> worker  CacheStat, CacheClear
"""

from __future__ import annotations

from typing import Literal

import msgspec

from contracts.ids import Incarnation, WorkerId
from contracts.messages import Empty, HandoffReply, LeaseTerms, Method

#: Where a block's bytes stand: a worker's own pool, a store's host memory, a store's disk.
Tier = Literal["device", "dram", "ssd"]

TIERS: tuple[Tier, ...] = ("device", "dram", "ssd")


class KeepRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Offers a store consecutive blocks of one sequence under a sealed lease, for it to copy what it lacks.

    Answered at once; `HandoffReply.expected` says from which block of the lease on the store copies. Raises NoCapacity
    (not now), IncompatiblePeer, StaleIncarnation, BadRequest. Idempotent by lease id.
    """

    target: Incarnation
    terms: LeaseTerms
    #: Whole keys, 32 bytes each, parallel to the lease's blocks.
    keys: tuple[bytes, ...]
    #: Position of the first of them in its sequence.
    first_block: int = 0
    #: The keys are of the lossy class: what stands under them may go through a lossy codec.
    lossy: bool = False
    tenant: str = ""


class PrefetchRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The prompts that wait at a worker and begin with blocks that the store is believed to hold, the next one first.

    Replaces what that worker told before. A hint: the store brings what it can from disk to memory, and keeps it there
    in this order of need.
    """

    target: Incarnation
    worker_id: WorkerId
    incarnation: Incarnation
    #: Whole keys of leading blocks of each prompt, in order.
    prompts: tuple[tuple[bytes, ...], ...] = ()


class CacheStatRequest(msgspec.Struct, frozen=True, kw_only=True):
    target: Incarnation


class TierFigures(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One tier of one process, now and since its start."""

    tier: Tier
    #: Room, and what is taken; bytes. Of a compressed tier as they lie there.
    capacity_bytes: int
    used_bytes: int
    num_blocks: int
    pinned_blocks: int = 0
    #: Blocks found here when somebody asked for them, and blocks asked for here that were not.
    hit_blocks: int = 0
    missed_blocks: int = 0
    #: Bytes that came in and went out, by where from or to: "worker", "dram", "ssd".
    bytes_in: dict[str, int] = {}
    bytes_out: dict[str, int] = {}
    #: Blocks that went, by why: "capacity", "corrupt", "cleared", "not admitted", "disk full", ...
    evicted: dict[str, int] = {}
    #: Age in seconds of the block that nobody asked for the longest, and the median of the evicted ones.
    oldest_s: float | None = None
    evicted_age_s: float | None = None
    #: Blocks that were kept as they are because their codec failed on them.
    unencoded_blocks: int = 0
    #: Why the tier does not take anything at the moment; empty: it does.
    problem: str = ""


class CacheStatReply(msgspec.Struct, frozen=True, kw_only=True):
    tiers: tuple[TierFigures, ...]
    block_tokens: int
    block_bytes: int


class CacheListRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The blocks that were asked for most, or last."""

    target: Incarnation
    order: Literal["hits", "recent", "oldest"] = "hits"
    limit: int = 50
    #: Only those whose key begins so.
    key_prefix: bytes = b""
    pinned_only: bool = False


class CachedBlock(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    key: bytes
    tiers: tuple[Tier, ...]
    #: Position in its sequence.
    position: int
    hits: int
    age_s: float
    idle_s: float
    pinned: bool = False
    codec: str = "raw"
    num_bytes: int = 0


class CacheListReply(msgspec.Struct, frozen=True, kw_only=True):
    blocks: tuple[CachedBlock, ...]
    #: All that match.
    num_matching: int


class CacheClearRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Drops what nobody refers to; pinned blocks too where `with_pinned`."""

    target: Incarnation
    tiers: tuple[Tier, ...] = TIERS
    with_pinned: bool = False


class CacheClearReply(msgspec.Struct, frozen=True, kw_only=True):
    #: Blocks dropped, by tier.
    dropped: dict[str, int]


class CachePinRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Pinned blocks are not evicted while they are the last copy here. Idempotent."""

    target: Incarnation
    keys: tuple[bytes, ...]
    #: False: unpin.
    pin: bool = True
    #: How long it holds from now; None: until it is unpinned or the store ends.
    for_s: float | None = None


class CachePinReply(msgspec.Struct, frozen=True, kw_only=True):
    #: How many of the keys stand here and are pinned now (or were, and are not any more).
    num_blocks: int
    #: Why not all: empty where all are.
    reason: str = ""


KEEP = Method("store/Keep", KeepRequest, HandoffReply)
PREFETCH = Method("store/Prefetch", PrefetchRequest, Empty)
CACHE_STAT = Method("cache/Stat", CacheStatRequest, CacheStatReply)
CACHE_LIST = Method("cache/List", CacheListRequest, CacheListReply)
CACHE_CLEAR = Method("cache/Clear", CacheClearRequest, CacheClearReply)
CACHE_PIN = Method("cache/Pin", CachePinRequest, CachePinReply)
