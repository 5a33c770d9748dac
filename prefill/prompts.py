"""A prompt on the prefill side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, TransferAborted, WorkerUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.errors import TandemError
    from contracts.ids import BlockId, LeaseId
    from contracts.messages import Peer
    from engine.sequence import Sequence
    from kvstore.prefix_cache import KeyChain


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
    #: Leading blocks that need not be computed: once admitted those that it shares, before what was found last.
    num_cached: int = 0
    #: Of these, so many were somebody's already when they were found, and take none of the available blocks.
    num_held: int = 0
    #: And so many were lent already.
    num_cached_lent: int = 0
    #: Leading blocks that have been given their keys.
    num_named: int = 0
    #: Blocks of its lease, while that stands.
    lent: tuple[BlockId, ...] = ()
    #: While its beginning comes from another worker: how it is told to stop. It is not in the queue meanwhile.
    leave_fetch: Callable[[], None] | None = None
    #: How long that took.
    fetch_s: float | None = None
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
    #: It was cancelled or failed while in a step; dropped when that step ends.
    doomed: bool = False

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
