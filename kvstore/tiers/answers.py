"""The holder's side of a fetch from a store: a lease that may still grow while its blocks come from disk."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import (
    BadRequest,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    TandemError,
    TransferAborted,
)
from contracts.messages import FetchReply, HandoffReply, Seal
from kvstore.block_keys import KEY_BYTES
from kvstore.fetch_answers import MAX_FETCH_BLOCKS, MAX_LEASE_AGE_S, RETRY_AFTER_S
from kvstore.tiers.events import (
    AdvanceLease,
    FetchAsked,
    FetchOver,
    FoundNothing,
    OpenLease,
    SealLease,
    StoreEvent,
    WithdrawLease,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import LeaseId
    from contracts.layout import KvIdentity
    from contracts.messages import FetchRequest, LeaseTerms, Peer, ProgressRequest
    from kvtransfer import HolderService, LeaseOutcome

#: Positions of blocks are below this.
MAX_POSITION = 1 << 31
#: Fetches that a store serves at once.
MAX_STORE_FETCHES = 64

LeaseInstruction = OpenLease | FoundNothing | AdvanceLease | SealLease | WithdrawLease


@dataclass(slots=True, eq=False)
class _Grant:
    """One fetch."""

    reader: Peer
    #: What the reader is told: None: there is nothing.
    reply: asyncio.Future[FetchReply]
    #: Set when the reader has taken terms that were not sealed.
    taken: asyncio.Event = field(default_factory=asyncio.Event)
    #: What the terms that it was given announced.
    told: ProgressRequest | None = None
    lease_id: LeaseId | None = None


def check_keys(keys: tuple[bytes, ...], most: int, first_block: int = 0) -> None:
    """Raises BadRequest unless these can be keys of one sequence's blocks, the first of them at that position."""
    if len(keys) > most:
        raise BadRequest(f"{len(keys)} keys in one message; at most {most} are taken")
    if any(len(key) != KEY_BYTES for key in keys):
        raise BadRequest(f"a block key has {KEY_BYTES} bytes")
    if len(set(keys)) != len(keys):
        raise BadRequest("one key stands twice among those of one sequence")
    if not 0 <= first_block <= MAX_POSITION - len(keys):
        raise BadRequest(f"position {first_block} of {len(keys)} blocks is none of a sequence's")


class StoreAnswers:
    """Answers Fetch for a store. Not thread-safe: it lives on the store's loop."""

    def __init__(
        self,
        *,
        holder: HolderService,
        identity: KvIdentity,
        feed: Callable[[StoreEvent], None],
        on_blocks_freed: Callable[[], None],
    ) -> None:
        """`feed` gives the store's machine an event and has its instructions performed, by `perform` where they are of
        leases."""
        self._holder = holder
        self._identity = identity
        self._feed = feed
        self._on_blocks_freed = on_blocks_freed
        #: All and only fetches whose lease has not ended.
        self._grants: dict[str, _Grant] = {}

    @property
    def num_open(self) -> int:
        return len(self._grants)

    async def answer(self, ask: FetchRequest) -> FetchReply:
        """As `kvstore.fetch_answers.FetchAnswers.answer`; the terms may not be sealed yet."""
        if (mismatch := self._identity.mismatch(ask.identity)) is not None:
            raise IncompatiblePeer(f"KV for {ask.reader.worker_id}: {mismatch}")
        grant = self._grants.get(ask.fetch_id)
        if ask.taken:
            if grant is not None:
                grant.taken.set()
            return FetchReply()
        if grant is None:
            check_keys(ask.keys, MAX_FETCH_BLOCKS, ask.first_block)
            if len(self._grants) >= MAX_STORE_FETCHES:
                raise NoCapacity(f"{len(self._grants)} prefixes are being fetched here", retry_after_s=RETRY_AFTER_S)
            grant = self._grants[ask.fetch_id] = _Grant(ask.reader, asyncio.get_running_loop().create_future())
            self._feed(FetchAsked(ask.fetch_id, ask.keys, ask.first_block))
        # Shielded: a repeat may wait for it too.
        return await asyncio.shield(grant.reply)

    def perform(self, instruction: LeaseInstruction) -> None:
        grant = self._grants.get(instruction.fetch_id)
        if grant is None:
            # Its lease has ended, and the machine hears of it next.
            return
        match instruction:
            case FoundNothing(fetch_id):
                del self._grants[fetch_id]
                grant.reply.set_result(FetchReply())
            case OpenLease():
                self._open(instruction, grant)
            case AdvanceLease(_, num_ready):
                if grant.lease_id is not None:
                    self._holder.advance(grant.lease_id, num_ready)
            case SealLease(_, num_blocks):
                if grant.lease_id is not None:
                    self._holder.seal(grant.lease_id, num_blocks, self._seal(num_blocks))
            case WithdrawLease(_, reason):
                if grant.lease_id is not None:
                    self._holder.withdraw(grant.lease_id, reason)

    def _seal(self, num_blocks: int) -> Seal:
        return Seal(num_tokens=num_blocks * self._identity.layout.block_tokens)

    def _open(self, order: OpenLease, grant: _Grant) -> None:
        fetch_id = order.fetch_id

        async def tell(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            if not grant.reply.done():
                grant.told = terms.progress
                grant.reply.set_result(FetchReply(terms=terms, tier_blocks=order.tier_blocks))
            told = grant.told
            if told is not None and told.seal is not None:
                return HandoffReply(verdict="reserved", expected=len(told.blocks))
            # What comes next would overtake the answer.
            try:
                async with asyncio.timeout(timeout_s):
                    await grant.taken.wait()
            except TimeoutError:
                raise DeadlineExceeded(f"{grant.reader.worker_id} has not taken {terms.lease_id}") from None
            num_told = 0 if told is None else len(told.blocks)
            if terms.progress is not None and terms.progress.seal is not None:
                # These terms are not those that the reader has: it is to hear of the seal.
                num_told = min(num_told, len(terms.progress.blocks) - 1)
            return HandoffReply(verdict="reserved", expected=num_told)

        def ended(lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
            self._grants.pop(fetch_id, None)
            if not grant.reply.done():
                grant.reply.set_exception(TransferAborted(f"lease {lease_id} ended {outcome}: {reason}"))
                # Whoever asked may have given up.
                grant.reply.exception()
            self._feed(FetchOver(fetch_id))
            self._on_blocks_freed()

        try:
            grant.lease_id = self._holder.open(
                order.blocks,
                grant.reader,
                send_offer=tell,
                on_ended=ended,
                num_final_blocks=order.num_ready,
                seal=self._seal(len(order.blocks)) if order.is_sealed else None,
                max_age_s=MAX_LEASE_AGE_S,
                whole=order.is_sealed,
            )
        except InvariantBroken:
            raise
        except TandemError as error:
            del self._grants[fetch_id]
            grant.reply.set_exception(error)
            grant.reply.exception()
            self._feed(FetchOver(fetch_id))
