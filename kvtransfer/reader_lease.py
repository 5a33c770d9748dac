"""What the reader's machine keeps of each lease."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from contracts.ids import BlockId, LeaseId
from contracts.messages import BlockRef

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.messages import LeaseTerms, ProgressRequest, Seal
    from kvtransfer.reader_events import HolderKey
    from kvtransfer.transport import BlockPair


class ReaderState(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    PULLING = "pulling"
    CONFIRMING = "confirming"
    QUARANTINED = "quarantined"


@dataclass(slots=True, kw_only=True, repr=False)
class ReaderLease:
    terms: LeaseTerms
    owner: str
    state: ReaderState
    #: End of the term, as far as the holder granted it for certain.
    expires_s: float
    #: When to ask for more of it; past while a renewal is in flight.
    renew_at_s: float
    #: So many leading blocks stand here already. Nothing below is about them: it counts from position `have` on.
    have: int = 0
    #: Whether it is told when all announced blocks are here, and for how many it was told last.
    follows: bool = False
    told_caught_up: int = -1
    #: Position in the lease up to which the holder said that its blocks are final.
    num_final: int = 0
    #: The holder's final blocks from `have` on, and their checksums (none where the terms have none).
    announced: list[BlockRef] = field(default_factory=list[BlockRef])
    checksums: list[int] = field(default_factory=list[int])
    #: Where they go; parallel to the rest of the lease's block list, empty while WAITING.
    blocks: list[BlockId] = field(default_factory=list[BlockId])
    #: `blocks[:num_pulled]` hold the announced bytes; up to `num_pulling` they are under way.
    num_pulled: int = 0
    num_pulling: int = 0
    #: Positions that the pull in flight, or the landing after it, is about; empty when there is none.
    window: Sequence[int] = ()
    #: The bytes are here and are being checked or moved on.
    landing: bool = False
    #: How often corrupt blocks of the present window were pulled again.
    refetches: int = 0
    seal: Seal | None = None
    #: The one Confirm in flight; failures in a row, and when to try again.
    calling: bool = False
    failures: int = 0
    retry_at_s: float = 0.0

    def __repr__(self) -> str:
        # Not the terms: their endpoint is a secret.
        blocks = f"{self.num_pulled}/{self.num_pulling}/{len(self.announced)}/{self.num_wanted}"
        sealed = f", sealed at {self.num_final}" if self.seal is not None else ""
        have = f", after {self.have} that stood here" if self.have else ""
        return f"<lease {self.lease_id} {self.state.value} [{blocks} pulled/pulling/known/all{have}{sealed}]>"

    @property
    def lease_id(self) -> LeaseId:
        return self.terms.lease_id

    @property
    def holder_key(self) -> HolderKey:
        return (self.terms.holder.worker_id, self.terms.holder.incarnation)

    @property
    def num_wanted(self) -> int:
        """Blocks that are set aside for it."""
        return self.terms.num_blocks - self.have

    @property
    def expected(self) -> int:
        """Position of the first block that the holder has still to announce."""
        return max(self.have, self.num_final)

    @property
    def pull_in_flight(self) -> bool:
        """Bytes of the lease may still land or move: from the pull's start until its blocks have landed."""
        return self.num_pulling > self.num_pulled

    @property
    def complete(self) -> bool:
        return self.seal is not None and self.num_pulled == len(self.announced)

    @property
    def ordered(self) -> bool:
        known = len(self.announced)
        pulls = 0 <= self.num_pulled <= self.num_pulling <= known <= self.num_wanted <= self.terms.num_blocks
        return pulls and known == self.expected - self.have

    def next_due_s(self) -> float | None:
        """None in quarantine: only the transport ends that."""
        if self.state is ReaderState.QUARANTINED:
            return None
        if self.state is ReaderState.CONFIRMING and not self.calling:
            return min(self.expires_s, self.retry_at_s)
        return self.expires_s

    # --- announcements ----------------------------------------------------------------------------------

    def misfit(self, body: ProgressRequest) -> str | None:
        """What of the message contradicts the lease."""
        stop = body.start + len(body.blocks)
        if body.start < 0 or stop > self.terms.num_blocks:
            return f"blocks [{body.start}, {stop}) of {self.terms.num_blocks}"
        if self.seal is not None and stop > self.num_final:
            return f"blocks [{body.start}, {stop}) after it was sealed at {self.num_final}"
        if body.seal is not None and (stop < self.num_final or stop == 0):
            return f"sealed at block {stop}, {self.num_final} known"
        if self.terms.checksums and len(body.checksums) != len(body.blocks):
            return f"{len(body.checksums)} checksums of {len(body.blocks)} blocks"
        return None

    def announce(self, body: ProgressRequest) -> None:
        """Takes in what fits on to what is known; what is known or stands here is skipped, a gap changes nothing."""
        num_skipped = self.expected - body.start
        if num_skipped < 0:
            return
        self.announced += body.blocks[num_skipped:]
        if self.terms.checksums:
            self.checksums += body.checksums[num_skipped:]
        self.num_final = max(self.num_final, body.start + len(body.blocks))
        if self.seal is None:
            self.seal = body.seal

    # --- pulls ------------------------------------------------------------------------------------------

    def pairs(self) -> tuple[BlockPair, ...]:
        """The window as (the holder's block, own block)."""
        if isinstance(self.window, range):
            refs = self.announced[self.window.start : self.window.stop]
        else:
            refs = [self.announced[each] for each in self.window]
        return tuple(zip([ref.block_id for ref in refs], self.targets(), strict=True))

    def targets(self) -> list[BlockId]:
        """The window's own blocks."""
        if isinstance(self.window, range):
            return self.blocks[self.window.start : self.window.stop]
        return [self.blocks[each] for each in self.window]

    def landed(self) -> None:
        """The window's blocks are good."""
        self.num_pulled = self.num_pulling
        self.window = ()
        self.refetches = 0


@dataclass(slots=True)
class ReaderCounters:
    """What happened since the start, for metrics."""

    offered: int = 0
    #: Refused offers by error code.
    refused: Counter[str] = field(default_factory=Counter[str])
    adopted: int = 0
    #: Aborted leases by reason.
    aborted: Counter[str] = field(default_factory=Counter[str])
    #: Events that changed nothing, by what they were and why.
    ignored: Counter[str] = field(default_factory=Counter[str])
    #: Calls that failed, by kind and error code.
    failed_calls: Counter[str] = field(default_factory=Counter[str])
    pulls: int = 0
    #: Bytes that landed, useful or not, and the time they took on the wire.
    pulled_bytes: int = 0
    wire_s: float = 0.0
    #: Blocks found with another checksum than announced, each time; those that were pulled again for it.
    corrupt_blocks: int = 0
    refetched_blocks: int = 0
    #: Bytes hashed to compare, and the time that took.
    checksum_bytes: int = 0
    checksum_s: float = 0.0
