"""The part of the KV cache that stands in a worker's own pool: its figures, and how it is emptied."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from contracts.store_messages import CacheStatReply, TierFigures

if TYPE_CHECKING:
    from contracts.layout import BlockLayout
    from kvstore.prefix_cache import PrefixCache
    from kvtransfer import Ledger, ReaderService
    from kvtransfer.ledger import KeyListener


class DeviceTier:
    """Implements `kvtransfer.ledger.KeyListener`: hears of keys that come and go, and passes that on."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        prefixes: PrefixCache,
        reader: ReaderService,
        layout: BlockLayout,
        listener: KeyListener,
    ) -> None:
        """Listens to `ledger`; `listener` hears all of it, too."""
        self._ledger = ledger
        self._prefixes = prefixes
        self._reader = reader
        self._layout = layout
        self._listener = listener
        #: Why blocks go that go now.
        self._reason = "capacity"
        self._evicted: Counter[str] = Counter()
        ledger.key_listener = self

    def stored(self, key: bytes) -> None:
        self._listener.stored(key)

    def removed(self, key: bytes) -> None:
        self._evicted[self._reason] += 1
        self._listener.removed(key)

    def clear(self) -> int:
        """Evicts what nobody holds; how many blocks."""
        self._reason = "cleared"
        try:
            return self._ledger.evict(self._ledger.cached_blocks())
        finally:
            self._reason = "capacity"

    def stat(self) -> CacheStatReply:
        """As of now, and since the start. What is taken includes blocks of requests that run."""
        block_bytes = self._layout.block_bytes
        figures = TierFigures(
            tier="device",
            capacity_bytes=self._ledger.num_blocks * block_bytes,
            used_bytes=(self._ledger.num_blocks - self._ledger.load()["free_blocks"]) * block_bytes,
            num_blocks=sum(1 for _ in self._ledger.all_keys()),
            hit_blocks=self._prefixes.hit_blocks_total,
            missed_blocks=self._prefixes.missed_blocks_total,
            bytes_in={"worker": self._reader.counters.pulled_bytes},
            evicted=dict(self._evicted),
        )
        return CacheStatReply(tiers=(figures,), block_tokens=self._layout.block_tokens, block_bytes=block_bytes)
