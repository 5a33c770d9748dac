"""A decode batch with what it stands on; the reader's part of a handoff is played by hand."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from contracts.ids import Incarnation, LeaseId, WorkerId
from contracts.messages import HandoffRequest, LeaseTerms, Peer, Seal
from contracts.requests import TokenDelta
from decode import DecodeBatch, DecodeLimits
from engine.plan import Sampled
from engine.sequence import owner_name, request_key
from kvstore.prefix_cache import PrefixCache
from kvtransfer import Ledger
from tests.support.move_calls import RecordingCalls
from tests.support.roles import (
    BLOCK_TOKENS,
    IDENTITY,
    READER,
    Deltas,
    Facts,
    HandClock,
    RecordingHolder,
    RecordingReader,
    room_over,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.ids import BlockId
    from contracts.requests import GenerateRequest
    from engine.plan import SequenceStep
    from kvstore.prefix_cache import KeyChain


OWN = Peer(worker_id=WorkerId("d0"), incarnation=Incarnation(1), address="d0:1")


@dataclass
class Side:
    """A decode batch with what it stands on."""

    num_blocks: int = 16
    growth_tokens: int = 4
    prefix_cache: bool = False
    own: Peer = OWN

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.num_blocks)
        self.room = room_over(self.ledger, growth_tokens=self.growth_tokens)
        self.prefixes = PrefixCache(self.ledger, IDENTITY, enabled=self.prefix_cache)
        self.reader = RecordingReader()
        self.holder = RecordingHolder()
        self.calls = RecordingCalls()
        self.deltas = Deltas()
        self.clock = HandClock()
        #: The tokens whose KV was last written to each block, as far as it was.
        self.content: dict[BlockId, list[int]] = {}
        #: Keys of what was to be kept, in order.
        self.kept: list[tuple[bytes, ...]] = []
        self.batch = DecodeBatch(
            engine=Facts(num_blocks=self.num_blocks),
            ledger=self.ledger,
            prefixes=self.prefixes,
            reader=cast("Any", self.reader),
            room=self.room,
            holder=cast("Any", self.holder),
            own=self.own,
            move_calls=self.calls,
            limits=DecodeLimits(),
            emit=self.deltas,
            clock=self.clock,
            on_change=lambda: None,
            sequence_ids=itertools.count(),
            keep=self._keep,
        )

    def offer(self, request: GenerateRequest, now_s: float = 0.0) -> LeaseId:
        lease_id = LeaseId(f"lease-{request.request_id}")
        terms = LeaseTerms(
            lease_id=lease_id,
            holder=READER,
            identity=IDENTITY,
            endpoints={"shm": b""},
            num_blocks=IDENTITY.layout.blocks_for(len(request.token_ids)),
            ttl_s=10.0,
        )
        self.batch.offer(HandoffRequest(target=Incarnation(1), terms=terms, request=request), now_s)
        return lease_id

    def adopt(self, request: GenerateRequest, now_s: float = 1.0) -> None:
        """Offer, pull and adoption in one: the reader's part of it is done by hand."""
        self.adopt_offered(request, self.offer(request), now_s)

    def adopt_offered(self, request: GenerateRequest, lease_id: LeaseId, now_s: float = 1.0) -> None:
        first = TokenDelta(request_id=request.request_id, index=0, token_ids=(7,))
        owner = owner_name(request_key(request))
        have = self.reader.have[lease_id]
        blocks = self.ledger.allocate(owner, IDENTITY.layout.blocks_for(len(request.token_ids)) - have)
        assert blocks is not None
        for position, block in enumerate(blocks, have):
            self.content[block] = list(request.token_ids[position * BLOCK_TOKENS :][:BLOCK_TOKENS])
        seal = Seal(num_tokens=len(request.token_ids), first_delta=first)
        self.clock.time_s = now_s
        self.reader.adopted(lease_id, blocks, seal)

    def step(self, token_id: int | Callable[[int], int] = 8, now_s: float = 2.0) -> int:
        """Everything that could run does, all of it; returns how many sequences were computed. `token_id`: what is
        sampled, or that by its output index."""
        decodes, chunks = self.batch.candidates(now_s)
        samples: dict[int, int] = {}
        for candidate in (*decodes, *chunks):
            step = self.batch.build(candidate.sequence_id, candidate.num_tokens, now_s)
            self._write(step)
            if step.sample is not None:
                index = step.sample.output_index
                samples[candidate.sequence_id] = token_id if isinstance(token_id, int) else token_id(index)
        for candidate in (*decodes, *chunks):
            token = samples.get(candidate.sequence_id)
            sampled = None if token is None else Sampled(token_id=token)
            self.batch.apply(candidate.sequence_id, candidate.num_tokens, sampled, now_s)
        self.ledger.check()
        return len(decodes) + len(chunks)

    def _write(self, step: SequenceStep) -> None:
        """As an engine does; what has a key is final."""
        for position, token in enumerate(step.token_ids, step.start):
            block = step.block_ids[position // BLOCK_TOKENS]
            assert self.ledger.key_of(block) is None, f"{step} writes a block that others may share"
            self.content[block] = [*self.content.get(block, [])[: position % BLOCK_TOKENS], token]

    def _keep(self, chain: KeyChain, num_blocks: int, request: GenerateRequest) -> None:
        self.kept.append(chain.part(0, num_blocks))

    def assert_clean(self) -> None:
        self.ledger.check()
        view = self.room.view()
        assert (view.num_admitted, view.promised_blocks, view.starving, view.offer) == (0, 0, False, None)
        assert self.ledger.available_blocks == self.num_blocks
        assert self.batch.open_count == 0
