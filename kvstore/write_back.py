"""Write-back: the blocks of what has ended at a worker are offered to its store, so that they outlast its own cache.

A machine from events to instructions; `worker.store_offers` opens its leases. What is to be kept waits as keys alone
and holds nothing. When its turn comes, the blocks that the store is not known to have are looked up, and offered where
they still stand, together with the last one before them, which shows the store that they go on from what it has.

It must never cost a request anything: an offer pins blocks that could be evicted, so it is made only where they are to
spare, stands for `max_offer_s` at most, and is taken back as soon as something waits for blocks. What fails is dropped:
the next turn of the conversation offers it again.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from contracts.failpoints import RarePath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from contracts.ids import BlockId
    from contracts.messages import Peer
    from contracts.requests import GenerateRequest
    from kvstore.prefix_cache import KeyChain, PrefixCache

_KEPT = RarePath("kvstore.written_back", "a store took blocks of an answer or a prompt that had ended")


class Keep(Protocol):
    """Hears of a sequence that has ended, or whose prompt was handed over: its first `num_blocks` blocks are final and
    have their keys."""

    def __call__(self, chain: KeyChain, num_blocks: int, request: GenerateRequest) -> None: ...


def keep_nothing(chain: KeyChain, num_blocks: int, request: GenerateRequest) -> None:
    """`Keep` where there are no stores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WriteBackLimits:
    #: Sequences that wait for their turn; the oldest goes when one more comes.
    max_waiting: int = 64
    #: Offers at once, and blocks of one; a longer sequence takes several.
    max_offers: int = 2
    max_offer_blocks: int = 1024
    #: How long one may stand.
    max_offer_s: float = 2.0
    #: Keys remembered that the store has.
    max_known: int = 65_536
    #: After offers that failed: the first wait, which doubles, and the longest.
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 15.0
    #: How often what stands or waits is looked at.
    look_interval_s: float = 0.05


# --- events -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A sequence to keep, by the keys of its leading blocks."""

    keys: tuple[bytes, ...]
    lossy: bool = False
    tenant: str = ""
    #: The store turned out to lack what it was believed to have: it is offered from the beginning.
    anew: bool = False


@dataclass(frozen=True, slots=True)
class StoreIs:
    """The store of this worker, in its present life; None: there is none."""

    store: Peer | None


@dataclass(frozen=True, slots=True)
class Served:
    """The store was seen to have these."""

    keys: tuple[bytes, ...]


@dataclass(frozen=True, slots=True)
class Replied:
    """The store took an offer, and has its first `expected` blocks already."""

    number: int
    expected: int


@dataclass(frozen=True, slots=True)
class OfferEnded:
    """Exactly once for each offer that was ordered."""

    number: int
    #: The store has all of it now.
    taken: bool


@dataclass(frozen=True, slots=True)
class Looked:
    """Time has passed, or blocks have come or gone."""


WriteBackEvent = Wanted | StoreIs | Served | Replied | OfferEnded | Looked

# --- instructions -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class OfferBlocks:
    """Open a sealed lease over `blocks`, which stand until something is allocated, and offer it to `store`."""

    number: int
    store: Peer
    blocks: tuple[BlockId, ...]
    keys: tuple[bytes, ...]
    first_block: int
    lossy: bool
    tenant: str


@dataclass(frozen=True, slots=True)
class TakeBack:
    """Withdraw that offer's lease."""

    number: int
    reason: str


WriteBackInstruction = OfferBlocks | TakeBack


@dataclass(slots=True, kw_only=True)
class WriteBackCounters:
    """Since the start."""

    #: Offers that the store took whole, and their blocks that it was not known to have.
    offers_taken: int = 0
    blocks_taken: int = 0
    #: Sequences that were not kept, or not all of them, by why.
    dropped: Counter[str]


@dataclass(slots=True, kw_only=True)
class _Offer:
    wanted: Wanted
    store: Peer
    #: Positions in its sequence.
    start: int
    stop: int
    #: From here on the store was not known to have them.
    first_new: int
    until_s: float
    #: Why it was taken back; empty while it was not.
    taken_back: str = ""


class WriteBack:
    """What one worker life writes back. Not thread-safe: it lives on the worker's loop."""

    def __init__(
        self, prefixes: PrefixCache, may_take: Callable[[int], bool], limits: WriteBackLimits | None = None
    ) -> None:
        """`may_take`: whether so many of the available blocks may be pinned now; of 0: that nothing waits for some."""
        self._prefixes = prefixes
        self._may_take = may_take
        self._limits = limits or WriteBackLimits()
        self._store: Peer | None = None
        #: What that store is believed to have, the least recently used first.
        self._known: OrderedDict[bytes, None] = OrderedDict()
        #: Empty while there is no store.
        self._waiting: deque[Wanted] = deque()
        self._open: dict[int, _Offer] = {}
        self._last_number = 0
        self._num_failures = 0
        self._not_before_s = 0.0
        self.counters = WriteBackCounters(dropped=Counter())

    def __repr__(self) -> str:
        return f"<WriteBack [{len(self._waiting)} waiting, {len(self._open)} offered, {len(self._known)} known]>"

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def next_look_s(self, now_s: float) -> float | None:
        """When `handle` wants to be told `Looked` at the latest; None: not before the next event."""
        if not self._open and not self._waiting:
            return None
        soon_s = now_s + self._limits.look_interval_s
        return soon_s if self._open else max(soon_s, self._not_before_s)

    def handle(self, event: WriteBackEvent, now_s: float) -> list[WriteBackInstruction]:
        instructions: list[WriteBackInstruction] = []
        match event:
            case Wanted():
                self._want(event)
            case StoreIs(store):
                instructions += self._change_store(store)
            case Served(keys):
                self._learn(keys)
            case Replied(number, expected):
                instructions += self._replied(number, expected)
            case OfferEnded(number, taken):
                self._ended(number, taken, now_s)
            case Looked():
                pass
        if self._open:
            instructions += self._take_back(now_s)
        if self._waiting:
            instructions += self._offer_next(now_s)
        return instructions

    # --- what waits ---------------------------------------------------------------------------------------

    def _want(self, wanted: Wanted) -> None:
        if self._store is None or self._num_known(wanted.keys) == len(wanted.keys):
            return
        self._waiting.append(wanted)
        if len(self._waiting) > self._limits.max_waiting:
            self._waiting.popleft()
            self._drop("queue full")

    def _change_store(self, store: Peer | None) -> list[WriteBackInstruction]:
        if store == self._store:
            return []
        self._store = store
        self._known.clear()
        self._num_failures, self._not_before_s = 0, 0.0
        if store is None:
            for _ in self._waiting:
                self._drop("no store")
            self._waiting.clear()
        return [
            self._order_back(number, offer, "another store is used")
            for number, offer in self._open.items()
            if not offer.taken_back
        ]

    # --- what the store has -------------------------------------------------------------------------------

    def _num_known(self, keys: tuple[bytes, ...]) -> int:
        """Leading ones that the store is believed to have."""
        return next((index for index, key in enumerate(keys) if key not in self._known), len(keys))

    def _learn(self, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._known[key] = None
            self._known.move_to_end(key)
        while len(self._known) > self._limits.max_known:
            self._known.popitem(last=False)

    # --- offers -------------------------------------------------------------------------------------------

    def _offer_next(self, now_s: float) -> list[WriteBackInstruction]:
        """Offers what can be offered now, in the order in which it came."""
        if self._store is None or now_s < self._not_before_s or not self._may_take(0):
            return []
        instructions: list[WriteBackInstruction] = []
        later: list[Wanted] = []
        while self._waiting and len(self._open) < self._limits.max_offers:
            wanted = self._waiting.popleft()
            first_new = self._num_known(wanted.keys)
            if first_new == len(wanted.keys):
                continue
            if any(self._overlaps(offer, wanted, first_new) for offer in self._open.values()):
                later.append(wanted)  # what follows from that offer is known soon
                continue
            order = self._offer(wanted, first_new, now_s)
            if order is None:
                later.append(wanted)
                break
            instructions += order
        self._waiting.extendleft(reversed(later))
        return instructions

    @staticmethod
    def _overlaps(offer: _Offer, wanted: Wanted, first_new: int) -> bool:
        """Whether the first block that would be new is being offered."""
        if not offer.start <= first_new < offer.stop:
            return False
        return offer.wanted.keys[first_new] == wanted.keys[first_new]

    def _offer(self, wanted: Wanted, first_new: int, now_s: float) -> list[WriteBackInstruction] | None:
        """None: there are no blocks to spare for it now. Nothing is ordered where the blocks are gone."""
        assert self._store is not None, "nothing waits without a store"
        start = max(0, first_new - 1)
        blocks = self._prefixes.match(wanted.keys[start : start + self._limits.max_offer_blocks])
        stop = start + len(blocks)
        if stop <= first_new:
            self._drop("evicted before its turn")
            return []
        if not self._may_take(len(blocks) - self._prefixes.num_held(blocks)):
            return None
        self._last_number += 1
        until_s = now_s + self._limits.max_offer_s
        self._open[self._last_number] = _Offer(
            wanted=wanted, store=self._store, start=start, stop=stop, first_new=first_new, until_s=until_s
        )
        order = OfferBlocks(
            number=self._last_number,
            store=self._store,
            blocks=tuple(blocks),
            keys=wanted.keys[start:stop],
            first_block=start,
            lossy=wanted.lossy,
            tenant=wanted.tenant,
        )
        return [order]

    def _replied(self, number: int, expected: int) -> list[WriteBackInstruction]:
        offer = self._open.get(number)
        if offer is None or offer.store != self._store:
            return []
        self._learn(offer.wanted.keys[offer.start : min(offer.start + expected, offer.stop)])
        if offer.taken_back or expected > 0 or not offer.start:
            return []
        # It has not even the block that these go on from: it gave up what it had of the sequence.
        for key in offer.wanted.keys:
            self._known.pop(key, None)
        wanted = offer.wanted
        if not wanted.anew:
            self._waiting.appendleft(Wanted(keys=wanted.keys, lossy=wanted.lossy, tenant=wanted.tenant, anew=True))
        return [self._order_back(number, offer, "the store lacks what comes before it")]

    def _take_back(self, now_s: float) -> list[WriteBackInstruction]:
        """Gives up what stands in the way of requests, or has stood too long."""
        standing = [(number, offer) for number, offer in self._open.items() if not offer.taken_back]
        if standing and not self._may_take(0):
            return [self._order_back(number, offer, "its blocks may be needed") for number, offer in standing]
        return [
            self._order_back(number, offer, "the store is too slow")
            for number, offer in standing
            if now_s >= offer.until_s
        ]

    def _order_back(self, number: int, offer: _Offer, reason: str) -> TakeBack:
        offer.taken_back = reason
        return TakeBack(number, reason)

    def _ended(self, number: int, taken: bool, now_s: float) -> None:
        offer = self._open.pop(number)
        if taken:
            _KEPT.reached()
            self._num_failures, self._not_before_s = 0, 0.0
            self.counters.offers_taken += 1
            self.counters.blocks_taken += offer.stop - offer.first_new
            if offer.store == self._store:
                self._learn(offer.wanted.keys[: offer.stop])
                if offer.stop < len(offer.wanted.keys):
                    self._waiting.appendleft(offer.wanted)
            return
        self._drop(offer.taken_back or "the store did not take it")
        if not offer.taken_back or now_s >= offer.until_s:
            self._num_failures += 1
            wait_s = self._limits.first_backoff_s * 2 ** min(self._num_failures - 1, 16)
            self._not_before_s = now_s + min(wait_s, self._limits.longest_backoff_s)

    def _drop(self, why: str) -> None:
        self.counters.dropped[why] += 1
