"""What the holder's machine keeps of each lease, and of each withdrawal that its reader has not heard of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contracts.messages import BlockRef, LeaseTerms, Peer, ProgressRequest, Seal


class LeaseState(Enum):
    #: Granted, still growing.
    OFFERED = "offered"
    #: Complete: a confirmation may be answered with yes.
    SEALED = "sealed"


@dataclass(slots=True, kw_only=True, repr=False)
class HolderLease:
    terms: LeaseTerms
    reader: Peer
    #: Every block of the lease with its generation at the opening; all are pinned.
    blocks: tuple[BlockRef, ...]
    #: End of the term, as far as it was granted to the reader; only grows.
    expires_s: float
    #: No grant reaches further.
    last_s: float
    #: Offered only once the offer can carry all of it.
    whole: bool = False
    #: The reader answered the offer; up to which position it knew the blocks then, or had them before.
    accepted: bool = False
    had: int = 0
    #: `blocks[:num_final]` are never written again; only grows.
    num_final: int = 0
    #: `blocks[num_skipped:num_ready]` are prepared and may be announced; only grows, at most `num_final`.
    num_ready: int = 0
    #: Before this position blocks were passed over, for the reader has them: none there is announced any more.
    num_skipped: int = 0
    #: Up to where blocks are being prepared; None while none are.
    preparing: int | None = None
    #: Of `blocks[:num_ready]`, anything for those that were passed over; empty without checksums.
    checksums: list[int] = field(default_factory=list[int])
    #: None while OFFERED.
    seal: Seal | None = None
    #: Position up to which the reader knows the blocks; at most `had`, or `num_ready` until it confirmed.
    expected: int = 0
    seal_known: bool = False
    #: A confirmation was answered with yes.
    confirmed: bool = False
    #: The one offer or progress call in flight; what it carried.
    calling: bool = False
    sent_seal: bool = False
    #: Calls that failed in a row, and when to try again.
    failures: int = 0
    retry_at_s: float = 0.0
    last_error: str = ""

    def __repr__(self) -> str:
        # Not the terms: their endpoint is a secret.
        blocks = f"{self.expected}/{self.num_ready}/{self.num_final}/{len(self.blocks)}"
        return f"<lease {self.terms.lease_id} {self.state.value} [{blocks} known/ready/final/all]>"

    @property
    def state(self) -> LeaseState:
        return LeaseState.OFFERED if self.seal is None else LeaseState.SEALED

    @property
    def has_news(self) -> bool:
        """Something of the lease can be said that is not known to the reader yet."""
        complete = self.seal is not None and self.num_ready == self.num_final
        if not self.accepted:
            return complete or not self.whole
        return self.expected < self.num_ready or (complete and not self.seal_known)

    @property
    def ordered(self) -> bool:
        known = self.num_skipped <= self.expected <= max(self.had, self.num_final if self.confirmed else self.num_ready)
        return known and 0 <= self.num_skipped <= self.num_ready <= self.num_final <= len(self.blocks)

    def skip(self) -> None:
        """Passes over final blocks that the reader has; while none are being prepared."""
        if self.num_ready < (stop := min(self.expected, self.num_final)):
            if self.terms.checksums:
                self.checksums += [0] * (stop - self.num_ready)
            self.num_ready = self.num_skipped = stop

    def next_due_s(self) -> float:
        if self.has_news and not self.calling:
            return min(self.expires_s, self.retry_at_s)
        return self.expires_s


@dataclass(slots=True, kw_only=True)
class Farewell:
    """A withdrawal on its way to the reader."""

    reader: Peer
    body: ProgressRequest
    until_s: float
    calling: bool = False
    failures: int = 0
    retry_at_s: float = 0.0


@dataclass(slots=True)
class HolderCounters:
    """What happened since the start, for metrics."""

    opened: int = 0
    #: Ended leases by outcome.
    outcomes: Counter[str] = field(default_factory=Counter[str])
    #: Events that changed nothing, by what they were and why.
    ignored: Counter[str] = field(default_factory=Counter[str])
    #: Calls that failed, by kind and error code.
    failed_calls: Counter[str] = field(default_factory=Counter[str])
    #: Bytes hashed for announcements, and the time that took.
    checksum_bytes: int = 0
    checksum_s: float = 0.0
