"""A prompt on the prefill side."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, TransferAborted, WorkerUnavailable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from contracts.errors import TandemError
    from contracts.ids import BlockId, LeaseId
    from contracts.messages import Peer, PrefixPlan
    from engine.sequence import Sequence
    from kvstore.fetch_ends import FetchEnd
    from kvstore.prefix_cache import KeyChain
    from prefill.read_ahead import FetchUnderWay


@dataclass(slots=True, kw_only=True, eq=False)
class Prompt:
    """One try of a request on this side."""

    sequence: Sequence
    #: The reader, or None when this worker writes the answer itself.
    reader: Peer | None
    received_s: float
    num_blocks: int
    #: Keys of its full blocks.
    chain: KeyChain
    #: What the coordinator thinks of its beginning; None once its fetch was begun.
    plan: PrefixPlan | None = None
    #: Leading blocks that need not be computed: once admitted those that it shares, before what was found last.
    num_cached: int = 0
    #: Behind a gap that has to be computed more such blocks may stand: token positions `[gap_stop, jump_to)`; both 0
    #: where there are none, or where they have been passed.
    gap_stop: int = 0
    jump_to: int = 0
    #: Of all that were found, so many blocks were somebody's already, and take none of the available ones.
    num_held: int = 0
    #: And so many were lent already.
    num_cached_lent: int = 0
    #: Prompt tokens that were not computed for it, by tier (`PhaseTimes.cached_by_tier`), as of its admission.
    cached_by_tier: dict[str, int] = field(default_factory=dict[str, int])
    #: Leading blocks that have been given their keys.
    num_named: int = 0
    #: Blocks of its lease, while that stands.
    lent: tuple[BlockId, ...] = ()
    #: While its beginning comes from another worker, or a store. It is not in the queue meanwhile.
    fetch: FetchUnderWay | None = None
    #: How long that took, and what it brought.
    fetch_s: float | None = None
    fetched: FetchEnd | None = None
    #: Blocks `[ahead_start, ahead_stop)` that were computed for it while its fetch ran.
    ahead_start: int = 0
    ahead_stop: int = 0
    #: Start of the first step that computed it.
    started_s: float | None = None
    lease_id: LeaseId | None = None
    #: What its offer was last answered with; None: accepted, or not answered yet.
    refusal: TandemError | None = None
    accepted: bool = False
    #: Place among those that are read: in order of admission.
    place: int = 0
    #: A step is writing its blocks.
    in_step: bool = False
    #: Tokens that this step computes.
    step_tokens: int = 0
    #: The first token is out and the lease sealed: the engine is done with it.
    sealed: bool = False
    #: It stands still: it is on its way to another worker.
    parked: bool = False
    #: It was cancelled or failed while in a step; dropped when that step ends.
    doomed: bool = False

    def unread(self, block_tokens: int) -> Iterator[tuple[int, int]]:
        """(first position, tokens) of what is still to be computed, in pieces."""
        start, stop = self.sequence.num_computed or self.num_cached * block_tokens, len(self.sequence.token_ids)
        if self.jump_to:
            yield start, self.gap_stop - start
            start = self.jump_to
        yield start, stop - start

    @property
    def num_unread(self) -> int:
        """Tokens still to be computed, of one that was admitted."""
        return self.sequence.num_remaining - (self.jump_to - self.gap_stop)

    @property
    def num_next(self) -> int:
        """Tokens that the next step may compute."""
        return self.gap_stop - self.sequence.num_computed if self.jump_to else self.sequence.num_remaining

    def note_computed(self, num_tokens: int) -> None:
        """A step has computed so many; what stands behind the gap that they may have filled is passed."""
        self.sequence.num_computed += num_tokens
        if self.jump_to and self.sequence.num_computed == self.gap_stop:
            self.sequence.num_computed = self.jump_to
            self.gap_stop = self.jump_to = 0

    @property
    def num_new_blocks(self) -> int:
        """Blocks that it takes of those that are available."""
        return self.num_blocks - self.num_held

    @property
    def refusal_code(self) -> str:
        """The error code that tells a client why the KV was not taken."""
        if self.refusal is None:
            return TransferAborted.code
        # That the reader did not answer in time says nothing of the request's own deadline.
        return WorkerUnavailable.code if isinstance(self.refusal, DeadlineExceeded) else self.refusal.code
