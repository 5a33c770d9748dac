"""The prefill side of a worker alone: a queue with what it stands on, and a reader that answers as it is told."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from contracts.ids import Incarnation
from contracts.messages import HandoffReply, Peer, PrefillRequest
from engine.plan import Sampled
from kvstore.fetch_ends import FetchEnd, FetchTicket
from kvstore.prefix_cache import PrefixCache
from kvtransfer import Ledger
from prefill import PrefillLimits, PrefillQueue
from tests.support.roles import IDENTITY, READER, Deltas, Facts, RecordingHolder, room_over

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.errors import TandemError
    from contracts.ids import BlockId
    from contracts.messages import LeaseTerms, PrefixPlan
    from contracts.requests import GenerateRequest
    from engine.sequence import Sequence
    from kvstore.prefix_cache import KeyChain


@dataclass
class Side:
    """A prefill queue with what it stands on."""

    num_blocks: int = 16
    also_writes: bool = False
    prefix_cache: bool = True
    limits: PrefillLimits = field(default_factory=PrefillLimits)
    handed_over: list[Sequence] = field(default_factory=list["Sequence"])
    #: What the reader answers; None: accepted.
    answer: TandemError | None = None
    #: Fetches asked for: (source, from which block, up to which); and who waits for those begun.
    fetches: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    waiters: list[Callable[[FetchEnd], None]] = field(default_factory=list["Callable[[FetchEnd], None]"])
    may_fetch: bool = True
    #: Seconds that reading one block takes, and fetching one; 0: not known.
    read_block_s: float = 0.0
    fetch_block_s: float = 0.0
    #: Prompts that were read whole and have left.
    read: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.num_blocks)
        self.room = room_over(self.ledger, growth_tokens=8)
        self.holder = RecordingHolder()
        self.deltas = Deltas()
        self.queue = PrefillQueue(
            engine=Facts(num_blocks=self.num_blocks),
            ledger=self.ledger,
            prefixes=PrefixCache(self.ledger, IDENTITY, enabled=self.prefix_cache),
            holder=cast("Any", self.holder),
            own_worker_id="p0",
            room=self.room,
            limits=self.limits,
            emit=self.deltas,
            send_offer=self._send_offer,
            start_fetch=self._start_fetch,
            hand_over=lambda sequence, now_s: self.handed_over.append(sequence),
            also_writes=self.also_writes,
            on_blocks_freed=lambda: None,
            sequence_ids=itertools.count(),
            reading_s=lambda num_tokens, num_computed: self.read_block_s * num_tokens / IDENTITY.layout.block_tokens,
            expected_fetch_s=lambda source, num_blocks: self.fetch_block_s * num_blocks or None,
            on_read=lambda request, chain: self.read.append(request.request_id),
        )

    async def _send_offer(
        self, reader: Peer, terms: LeaseTerms, request: GenerateRequest, timeout_s: float
    ) -> HandoffReply:
        if self.answer is not None:
            raise self.answer
        return HandoffReply(verdict="reserved")

    def _start_fetch(
        self,
        chain: KeyChain,
        local: list[BlockId],
        stop: int,
        source: Peer,
        waiter: Callable[[FetchEnd], None],
        *,
        start: int | None = None,
    ) -> FetchTicket | None:
        start = len(local) if start is None else start
        self.fetches.append((source.worker_id, start, stop))
        if not self.may_fetch:
            return None
        self.waiters.append(waiter)
        return FetchTicket(start=start, stop=stop, leave=lambda: self.waiters.remove(waiter))

    def fetched(self, ended_s: float, start: int = 0, **tier_blocks: int) -> None:
        """The oldest fetch ends; the prompt finds what `arrive` put there."""
        self.waiters.pop(0)(FetchEnd(ended_s=ended_s, start=start, tier_blocks=tier_blocks))

    def submit(
        self, request: GenerateRequest, *, local: bool = False, now_s: float = 0.0, prefix: PrefixPlan | None = None
    ) -> None:
        own = Peer(worker_id=cast("Any", "p0"), incarnation=Incarnation(1), address="p0:1")
        decode = own if local else READER
        ask = PrefillRequest(target=Incarnation(1), request=request, decode=decode, prefix=prefix)
        self.queue.submit(ask, now_s)

    def step(self, num_tokens: int, token_id: int | None = None, now_s: float = 1.0) -> None:
        """One chunk of the oldest running prompt."""
        _, chunks = self.queue.candidates(now_s)
        sequence_id = chunks[0].sequence_id
        self.queue.build(sequence_id, num_tokens, now_s)
        sampled = Sampled(token_id=token_id) if token_id is not None else None
        self.queue.apply(sequence_id, num_tokens, sampled, now_s + 0.5)

    def assert_clean(self) -> None:
        self.ledger.check()
        assert self.ledger.available_blocks == self.num_blocks
        assert self.queue.open_count == 0
        assert self.queue.pending_tokens == 0
        assert self.queue.unread_for == ()
        view = self.room.view()
        assert (view.num_admitted, view.promised_blocks, view.lent_blocks, view.prompt) == (0, 0, 0, None)
