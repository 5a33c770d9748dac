"""The store's host memory: what of each block is known, which cached block goes first, and what may not go."""

from __future__ import annotations

import math
from collections import Counter, deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from contracts.ids import BlockId
from contracts.store_messages import TierFigures

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from kvstore.tiers.disk import DiskTier
    from kvtransfer import Ledger

#: Ages of so many evicted blocks are kept for their median.
_EVICTED_AGES = 512


class _Naming(NamedTuple):
    position: int
    is_on_disk: bool | None


class Victim(Protocol):
    @property
    def entry(self) -> int: ...


class EvictionSuggestions(Protocol):
    """What the books ask of an eviction policy; entries are block ids."""

    def stored(self, entry: int, *, position: int, now_s: float, key_hint: int = 0) -> None: ...

    def hit(self, entries: Sequence[int], now_s: float) -> None: ...

    def removed(self, entry: int, *, evicted: bool) -> None: ...

    def needed(self, entries: Sequence[int]) -> None:
        """The entries that what waits will need, soonest first; in place of what was said before."""
        ...

    def victims(self, count: int, now_s: float, may: Callable[[int], bool]) -> Sequence[Victim]:
        """So many entries at most that `may` go; the one that is missed least first."""
        ...


class KeyNews(Protocol):
    """Hears which keys the store as a whole has."""

    def stored(self, key: bytes) -> None: ...

    def removed(self, key: bytes) -> None: ...


class DramTier:
    """Books over the store's ledger, whose evictor and key listener it is. Not thread-safe.

    A pinned key is given up here only while it stands on disk.
    """

    def __init__(self, ledger: Ledger, disk: DiskTier, eviction: EvictionSuggestions, *, block_bytes: int) -> None:
        self.ledger = ledger
        self._disk = disk
        self._eviction = eviction
        self.block_bytes = block_bytes
        self._now_s = 0.0
        #: Hears of keys that come to the store and leave it.
        self.news: KeyNews | None = None
        #: When each pinned key is let go.
        self._pins: dict[bytes, float] = {}
        #: No pin is over before.
        self._next_over_s = math.inf
        #: By block; of those with a key.
        self.position = np.zeros(ledger.num_blocks, np.int32)
        self.hits = np.zeros(ledger.num_blocks, np.int32)
        self.stored_s = np.zeros(ledger.num_blocks)
        self.used_s = np.zeros(ledger.num_blocks)
        #: What is said of the block that is given its key.
        self._naming = _Naming(0, None)
        self._evicted: Counter[str] = Counter()
        self._evicted_ages_s: deque[float] = deque(maxlen=_EVICTED_AGES)
        self.hit_blocks = 0
        self.missed_blocks = 0
        self.bytes_in: Counter[str] = Counter()
        self.bytes_out: Counter[str] = Counter()
        ledger.evictor = self
        ledger.key_listener = self

    def pass_time(self, now_s: float) -> list[bytes]:
        """Takes note of the time; the keys whose pins are over by then are not pinned any more."""
        self._now_s = now_s
        if now_s < self._next_over_s:
            return []
        over = [key for key, until_s in self._pins.items() if until_s <= now_s]
        for key in over:
            del self._pins[key]
        self._next_over_s = min(self._pins.values(), default=math.inf)
        return over

    # --- blocks -------------------------------------------------------------------------------------------

    def lookup(self, key: bytes) -> BlockId | None:
        return self.ledger.lookup(key)

    def name(
        self,
        block: BlockId,
        key: bytes,
        position: int,
        *,
        is_on_disk: bool | None = None,
    ) -> bool:
        """Gives a block its key: it can be found from now on. False where another block has it. `is_on_disk` spares a
        look, which takes longer for one key than for a hundred together."""
        self._naming = _Naming(position, is_on_disk)
        return self.ledger.set_key(block, key)

    def use(self, blocks: Sequence[BlockId]) -> None:
        """Somebody asked for these."""
        if blocks:
            self.hits[list(blocks)] += 1
            self.used_s[list(blocks)] = self._now_s
            self._eviction.hit(blocks, self._now_s)
            self.hit_blocks += len(blocks)
            self.went("worker", len(blocks))

    def came(self, source: str, num_blocks: int) -> None:
        """For the figures: so many blocks came from there."""
        self.bytes_in[source] += num_blocks * self.block_bytes

    def went(self, target: str, num_blocks: int) -> None:
        """For the figures: so many blocks went there."""
        self.bytes_out[target] += num_blocks * self.block_bytes

    def num_available(self) -> int:
        """Blocks that could be allocated now; O(cached blocks)."""
        return self.ledger.load()["free_blocks"] + sum(map(self._may_go, self.ledger.cached_blocks()))

    def need(self, blocks: Sequence[BlockId]) -> None:
        """What waits will ask for these, soonest first."""
        self._eviction.needed(blocks)

    # --- pins ---------------------------------------------------------------------------------------------

    def pin(self, keys: Iterable[bytes], until_s: float | None) -> None:
        over_s = math.inf if until_s is None else until_s
        self._next_over_s = min(self._next_over_s, over_s)
        for key in keys:
            self._pins[key] = over_s

    def unpin(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._pins.pop(key, None)

    def is_pinned(self, key: bytes) -> bool:
        return key in self._pins

    @property
    def pinned_keys(self) -> Iterable[bytes]:
        return self._pins.keys()

    # --- `kvtransfer.ledger.Evictor` and `KeyListener` ------------------------------------------------------

    def victims(self, num_blocks: int) -> Sequence[BlockId]:
        suggested = self._eviction.victims(num_blocks, self._now_s, self._may_go)
        if len(suggested) < num_blocks:
            return ()
        blocks = [BlockId(victim.entry) for victim in suggested]
        self._note_gone(blocks, "capacity")
        return blocks

    def stored(self, key: bytes) -> None:
        block = self.ledger.lookup(key)
        assert block is not None, "told before it can be looked up"
        position, is_on_disk = self._naming
        self.position[block] = position
        self.hits[block] = 0
        self.stored_s[block] = self.used_s[block] = self._now_s
        # Not told which block is before it: one whose end is being written could then not go. Those of one prompt leave
        # from their end all the same, for they are used together.
        hint = int.from_bytes(key[:8], "little")
        self._eviction.stored(block, position=position, now_s=self._now_s, key_hint=hint)
        if self.news is None:
            return
        if not (self._disk.has((key,))[0] if is_on_disk is None else is_on_disk):
            self.news.stored(key)

    def removed(self, key: bytes) -> None:
        if self.news is not None and not self._disk.has((key,))[0]:
            self.news.removed(key)

    def clear(self, *, with_pinned: bool) -> int:
        """Drops what nobody refers to; how many blocks. `with_pinned`: last copies too; of keys that are pinned those
        that stand on disk stay so."""
        if with_pinned:
            pinned = list(self._pins)
            for key, is_on_disk in zip(pinned, self._disk.has(pinned), strict=True):
                if not is_on_disk:
                    del self._pins[key]
        blocks = [block for block in self.ledger.cached_blocks() if self._may_go(block)]
        self._note_gone(blocks, "cleared")
        return self.ledger.evict(blocks)

    # --- what stands ----------------------------------------------------------------------------------------

    def figures(self) -> TierFigures:
        ledger = self.ledger
        blocks = [block for key in ledger.all_keys() if (block := ledger.lookup(key)) is not None]
        oldest_s = self._now_s - float(self.used_s[blocks].min()) if blocks else None
        ages_s = sorted(self._evicted_ages_s)
        return TierFigures(
            tier="dram",
            capacity_bytes=ledger.num_blocks * self.block_bytes,
            used_bytes=(ledger.num_blocks - ledger.load()["free_blocks"]) * self.block_bytes,
            num_blocks=len(blocks),
            pinned_blocks=sum(ledger.lookup(key) is not None for key in self._pins),
            hit_blocks=self.hit_blocks,
            missed_blocks=self.missed_blocks,
            bytes_in=dict(self.bytes_in),
            bytes_out=dict(self.bytes_out),
            evicted=dict(self._evicted),
            oldest_s=oldest_s,
            evicted_age_s=ages_s[len(ages_s) // 2] if ages_s else None,
        )

    def _may_go(self, block: int) -> bool:
        key = self.ledger.key_of(BlockId(block))
        if key is None or not self.ledger.is_cached(BlockId(block)):
            return False
        return key not in self._pins or self._disk.has((key,))[0]

    def _note_gone(self, blocks: Sequence[BlockId], why: str) -> None:
        for block in blocks:
            self._eviction.removed(block, evicted=why == "capacity")
            self._evicted_ages_s.append(self._now_s - float(self.used_s[block]))
        self._evicted[why] += len(blocks)
