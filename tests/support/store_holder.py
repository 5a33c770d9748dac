"""A holder service whose leases do what a test says: what the store's answers ask of it is written down."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from contracts.ids import Generation, Incarnation, LeaseId, WorkerId
from contracts.messages import BlockRef, LeaseTerms, Peer, ProgressRequest
from tests.support.store_chains import IDENTITY

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.errors import TandemError
    from contracts.ids import BlockId
    from contracts.messages import HandoffReply, Seal
    from kvtransfer import LeaseOutcome
    from kvtransfer.holder_service import EndedCallback, SendOfferCall

STORE = Peer(worker_id=WorkerId("s0"), incarnation=Incarnation(1), address="store")


@dataclass(slots=True, kw_only=True)
class FakeLease:
    lease_id: LeaseId
    blocks: Sequence[BlockId]
    reader: Peer
    send_offer: SendOfferCall
    on_ended: EndedCallback
    num_final: int
    seal: Seal | None
    whole: bool
    max_age_s: float | None
    #: What came after it was opened.
    calls: list[tuple[str, object]] = field(default_factory=list[tuple[str, object]])

    def terms(self, *, announced: bool = True) -> LeaseTerms:
        """As they would be offered now. `announced`: with what is final."""
        terms = LeaseTerms(
            lease_id=self.lease_id,
            holder=STORE,
            identity=IDENTITY,
            endpoints={},
            num_blocks=len(self.blocks),
            ttl_s=10.0,
        )
        if not announced:
            return terms
        refs = tuple(BlockRef(block, Generation(0)) for block in self.blocks[: self.num_final])
        progress = ProgressRequest(
            lease_id=self.lease_id, holder_incarnation=STORE.incarnation, blocks=refs, seal=self.seal
        )
        return msgspec.structs.replace(terms, progress=progress)

    async def offer(self, *, announced: bool = True, timeout_s: float = 60.0) -> HandoffReply:
        return await self.send_offer(self.terms(announced=announced), timeout_s)

    def end(self, outcome: LeaseOutcome, reason: str = "as the test wants") -> None:
        self.on_ended(self.lease_id, outcome, reason)


class FakeHolder:
    """As much of `HolderService` as a store's answers use."""

    def __init__(self) -> None:
        self.leases: list[FakeLease] = []
        #: Raised by `open`.
        self.refusal: TandemError | None = None

    def open(
        self,
        blocks: Sequence[BlockId],
        reader: Peer,
        *,
        send_offer: SendOfferCall,
        on_ended: EndedCallback,
        num_final_blocks: int = 0,
        seal: Seal | None = None,
        max_age_s: float | None = None,
        whole: bool = False,
    ) -> LeaseId:
        if self.refusal is not None:
            raise self.refusal
        lease = FakeLease(
            lease_id=LeaseId(f"s0/1/{len(self.leases)}"),
            blocks=blocks,
            reader=reader,
            send_offer=send_offer,
            on_ended=on_ended,
            num_final=num_final_blocks,
            seal=seal,
            whole=whole,
            max_age_s=max_age_s,
        )
        self.leases.append(lease)
        return lease.lease_id

    def advance(self, lease_id: LeaseId, num_final_blocks: int) -> None:
        lease = self._lease(lease_id)
        lease.num_final = num_final_blocks
        lease.calls.append(("advance", num_final_blocks))

    def seal(self, lease_id: LeaseId, num_final_blocks: int, seal: Seal) -> None:
        lease = self._lease(lease_id)
        lease.num_final, lease.seal = num_final_blocks, seal
        lease.calls.append(("seal", (num_final_blocks, seal.num_tokens)))

    def withdraw(self, lease_id: LeaseId, reason: str) -> None:
        self._lease(lease_id).calls.append(("withdraw", reason))

    def _lease(self, lease_id: LeaseId) -> FakeLease:
        return next(lease for lease in self.leases if lease.lease_id == lease_id)
