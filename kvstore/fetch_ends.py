"""Of fetches: how long one may take, what came of it, and where that stood. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from contracts.ids import BlockId
    from contracts.messages import FetchReply, Peer
    from kvstore.prefix_cache import KeyChain

#: What a whole fetch may take: so long, and what its bytes take from a slow disk, but not for ever (the holder's leases
#: have an age, see `kvstore.fetch_answers.MAX_LEASE_AGE_S`).
FETCH_LIMIT_S = 3.0
SLOWEST_BYTES_PER_S = 100e6
LONGEST_FETCH_S = 15.0
#: Where blocks stood that came from the pool of another worker, for who asks (`contracts.requests.PhaseTimes`).
PEER_TIER = "peer"


def limit_s(num_bytes: int) -> float:
    """What a fetch of so many bytes may take in all."""
    return min(LONGEST_FETCH_S, FETCH_LIMIT_S + num_bytes / SLOWEST_BYTES_PER_S)


def tiers_of(reply: FetchReply, num_blocks: int) -> dict[str, int]:
    """Where the first `num_blocks` blocks of an answer stood, by tier, as the asking side counts it. Pure.

    What a holder does not say stood in its pool. Of blocks that did not come those from the slowest tier are missing:
    it is its reads that fail.
    """
    tiers: dict[str, int] = {}
    for tier in ("device", "dram", "ssd"):
        count = min(reply.tier_blocks.get(tier, 0), num_blocks - sum(tiers.values()))
        if count > 0:
            tiers[PEER_TIER if tier == "device" else tier] = count
    if unsaid := num_blocks - sum(tiers.values()):
        tiers[PEER_TIER] = tiers.get(PEER_TIER, 0) + unsaid
    return tiers


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchTicket:
    """What who waits for a fetch is given."""

    #: Blocks of the prompt that are on their way, if the holder has them.
    start: int
    stop: int
    #: Not to be told of the end any more. A fetch that nobody waits for is given up.
    leave: Callable[[], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchEnd:
    """What a fetch brought: blocks from `start` on, as many as `tier_blocks` counts; maybe none. Of the prompt that it
    was begun for: one that joined may share fewer of them."""

    ended_s: float
    start: int
    #: By where they stood at the holder: "peer", "dram", "ssd".
    tier_blocks: Mapping[str, int]

    @property
    def stop(self) -> int:
        return self.start + sum(self.tier_blocks.values())


class StartFetch(Protocol):
    """Begins to copy blocks `[start, stop)` of a prompt from another worker, or a store, into the prefix cache;
    `local`: the first blocks, which stand here."""

    def __call__(
        self,
        chain: KeyChain,
        local: list[BlockId],
        stop: int,
        source: Peer,
        waiter: Callable[[FetchEnd], None],
        *,
        start: int | None = None,
    ) -> FetchTicket | None:
        """None where that is not possible now. Otherwise `waiter` is called with what came when it has ended, however
        it did, unless the ticket's `leave` was called before."""
        ...
