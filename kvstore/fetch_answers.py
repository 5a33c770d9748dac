"""The holder's side of a prefix fetch: shares the leading blocks that stand under a lease which is sealed at once.

The lease is an ordinary one; only it is not offered by a call of this worker's but in the answer to its reader's.
What was asked for by whole keys is what is served: blocks of other content, or of another cache salt, have others.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import IncompatiblePeer, NoCapacity, TransferAborted
from contracts.failpoints import RarePath
from contracts.messages import FetchReply, HandoffReply, Seal
from kvtransfer.holder import MAX_BLOCKS_PER_PROGRESS

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import LeaseId
    from contracts.layout import KvIdentity
    from contracts.messages import FetchRequest, LeaseTerms
    from kvstore.prefix_cache import PrefixCache
    from kvtransfer import HolderService, LeaseOutcome

#: Leases that may stand for fetches at once: what they pin is nobody's to evict.
MAX_FETCH_LEASES = 16
#: How long a lease that its reader renews may pin its blocks, its last term included; readers give up long before.
MAX_LEASE_AGE_S = 20.0
#: Blocks of one fetch: one answer carries all.
MAX_FETCH_BLOCKS = MAX_BLOCKS_PER_PROGRESS
#: When to ask again whoever was refused.
RETRY_AFTER_S = 0.5

_FOUND_NOTHING = RarePath("kvstore.fetch_found_nothing", "a prefix was asked for that is not here any more")


@dataclass(slots=True)
class _Grant:
    """One fetch's lease."""

    lease_id: LeaseId
    #: What the reader is told.
    terms: asyncio.Future[LeaseTerms]
    num_blocks: int


class FetchAnswers:
    """Not thread-safe: it lives on the worker's loop."""

    def __init__(
        self,
        *,
        prefixes: PrefixCache,
        holder: HolderService,
        identity: KvIdentity,
        on_blocks_freed: Callable[[], None],
    ) -> None:
        """`on_blocks_freed` is called when a lease ended: its blocks may have become available."""
        self._prefixes = prefixes
        self._holder = holder
        self._identity = identity
        self._on_blocks_freed = on_blocks_freed
        #: All and only fetches whose lease has not ended.
        self._grants: dict[str, _Grant] = {}
        #: Blocks granted since the start.
        self.granted_blocks_total = 0

    @property
    def num_open(self) -> int:
        return len(self._grants)

    async def answer(self, ask: FetchRequest) -> FetchReply:
        """Pins the leading blocks of `ask.keys` that stand here for `ask.reader`, and answers with the lease's terms
        once all of them can be announced. A repeat gets the same lease while it stands.

        Raises IncompatiblePeer, NoCapacity, TransferAborted (the lease ended before it could be announced).
        """
        if (mismatch := self._identity.mismatch(ask.identity)) is not None:
            raise IncompatiblePeer(f"KV for {ask.reader.worker_id}: {mismatch}")
        grant = self._grants.get(ask.fetch_id) or self._grant(ask)
        if grant is None:
            _FOUND_NOTHING.reached()
            return FetchReply()
        # Shielded: a repeat may wait for it too.
        return FetchReply(terms=await asyncio.shield(grant.terms), tier_blocks={"device": grant.num_blocks})

    def _grant(self, ask: FetchRequest) -> _Grant | None:
        keys = ask.keys[:MAX_FETCH_BLOCKS]
        blocks = self._prefixes.match(keys)
        self._prefixes.note_asked(len(keys), len(blocks))
        if not blocks:
            return None
        if len(self._grants) >= MAX_FETCH_LEASES:
            raise NoCapacity(f"{len(self._grants)} prefixes are being fetched here", retry_after_s=RETRY_AFTER_S)
        told: asyncio.Future[LeaseTerms] = asyncio.get_running_loop().create_future()

        async def tell(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            if not told.done():
                told.set_result(terms)
            return HandoffReply(verdict="reserved", expected=len(blocks))

        def ended(lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
            del self._grants[ask.fetch_id]
            if not told.done():
                told.set_exception(TransferAborted(f"lease {lease_id} ended {outcome}: {reason}"))
                # Whoever asked may have given up.
                told.exception()
            self._on_blocks_freed()

        lease_id = self._holder.open(
            blocks,
            ask.reader,
            send_offer=tell,
            on_ended=ended,
            seal=Seal(num_tokens=len(blocks) * self._prefixes.block_tokens),
            max_age_s=MAX_LEASE_AGE_S,
            whole=True,
        )
        grant = self._grants[ask.fetch_id] = _Grant(lease_id, told, len(blocks))
        self.granted_blocks_total += len(blocks)
        return grant
