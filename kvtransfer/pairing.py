"""Whether a reader may take KV from a holder at all: decided from what both say of themselves, once per offer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import BadRequest, IncompatiblePeer

if TYPE_CHECKING:
    from contracts.layout import KvIdentity
    from contracts.messages import LeaseTerms


@dataclass(frozen=True, slots=True)
class Pairing:
    """What a reader asks of its holders. Every mismatch is refused with both values."""

    identity: KvIdentity
    transports: tuple[str, ...]
    #: Only blocks that come with checksums are taken.
    checksum: bool = False

    def refusal(self, terms: LeaseTerms, num_own_blocks: int, *, have: int = 0) -> IncompatiblePeer | BadRequest | None:
        """Why such an offer can never be taken here, of whose blocks `have` stand here; None where it can."""
        holder = terms.holder.worker_id
        if (mismatch := self.identity.mismatch(terms.identity)) is not None:
            return IncompatiblePeer(f"KV of {holder}: {mismatch}")
        if not self.common_transports(terms):
            ours, theirs = ", ".join(self.transports), ", ".join(terms.endpoints)
            return IncompatiblePeer(f"transports to {holder}: {ours} here, {theirs} there")
        if self.checksum and not terms.checksums:
            return IncompatiblePeer(f"checksums of {holder}: True here, False there")
        if not (0 < terms.num_blocks <= num_own_blocks + have):
            return BadRequest(
                f"lease {terms.lease_id} of {terms.num_blocks} blocks can never fit: this pool has {num_own_blocks}"
            )
        if not 0 <= have <= terms.num_blocks:
            return BadRequest(f"lease {terms.lease_id} of {terms.num_blocks} blocks: {have} of them cannot stand here")
        if not terms.ttl_s > 0:
            return BadRequest(f"lease {terms.lease_id}: ttl_s must be positive, not {terms.ttl_s}")
        return None

    def common_transports(self, terms: LeaseTerms) -> tuple[str, ...]:
        """Those that both sides have, in this side's order."""
        return tuple(name for name in self.transports if name in terms.endpoints)
