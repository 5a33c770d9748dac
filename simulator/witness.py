"""Where a simulated cluster can be watched from outside: every step's sequences, every token that reaches the gateway,
every block that a pull copies. Watching does not change what happens."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

from gateway.core import GatewayCore
from simulator.engine import ModelledEngine

if TYPE_CHECKING:
    from contracts.ids import BlockId, RequestId
    from contracts.messages import Peer
    from contracts.requests import Frame, TokenDelta
    from engine.plan import SequenceStep, StepPlan, StepResult
    from gateway import events as ev
    from kvtransfer.ledger import BlockClass, Ledger
    from simulator.engine import BlockContent
    from simulator.store import StoreMemory


class Witness(Protocol):
    def stepped(self, host: str, step: SequenceStep, block_tokens: int, token_id: int | None) -> None:
        """A step of this life has computed a sequence, and sampled that token; nobody may want it any more."""
        ...

    def heard(self, peer: Peer, delta: TokenDelta, now_s: float) -> None:
        """A delta came from a worker; nobody may want it any more."""
        ...

    def forgotten(self, request_id: RequestId, now_s: float) -> None:
        """The gateway is done with this request and has told its workers."""
        ...

    def landed(self, host: str, block_id: BlockId, block_class: BlockClass, source_class: BlockClass) -> None:
        """A pull writes a block of this life's pool; how its ledger, and that of the holder, class the two now."""
        ...

    def loaded(self, host: str, block_id: BlockId, block_class: BlockClass, *, is_named: bool) -> None:
        """A store's disk writes a block of this life's memory; how its ledger classes it now, and whether it can be
        found there."""
        ...

    def spilled(self, host: str, block_id: BlockId, block_class: BlockClass) -> None:
        """A store's disk has read a block of this life's memory to keep it; how its ledger classes it now."""
        ...


class WatchedGateway(GatewayCore):
    def __init__(self, witness: Witness, *args: Any) -> None:
        super().__init__(*args)
        self._witness = witness

    def _on_frame(self, peer: Peer, frame: Frame) -> None:
        for delta in frame.deltas:
            self._witness.heard(peer, delta, _now_s())
        super()._on_frame(peer, frame)

    def feed(self, request_id: RequestId, event: ev.Event) -> None:
        was_open = request_id in self._open
        super().feed(request_id, event)
        if was_open and request_id not in self._open:
            self._witness.forgotten(request_id, _now_s())


class WatchedEngine(ModelledEngine):
    def __init__(self, witness: Witness, host: str, **options: Any) -> None:
        super().__init__(**options)
        self._witness = witness
        self._host = host

    async def step(self, plan: StepPlan) -> StepResult:
        result = await super().step(plan)
        for step in plan.sequences:
            sampled = result.sampled.get(step.sequence_id)
            token_id = None if sampled is None else sampled.token_id
            self._witness.stepped(self._host, step, self.identity.layout.block_tokens, token_id)
        return result


class WatchedPool:
    """`kvtransfer.memory.BlockStore` of a modelled engine or a store; each block travels with its class at its
    holder."""

    def __init__(self, witness: Witness, host: str, engine: ModelledEngine | StoreMemory) -> None:
        self._witness = witness
        self._host = host
        self._engine = engine
        #: Set before the first pull.
        self.ledger: Ledger

    def read_block(self, block_id: BlockId) -> tuple[BlockContent, BlockClass]:
        return self._engine.read_block(block_id), self.ledger.block_class(block_id)

    def write_block(self, block_id: BlockId, content: tuple[BlockContent, BlockClass]) -> None:
        slots, source_class = content
        self._witness.landed(self._host, block_id, self.ledger.block_class(block_id), source_class)
        self._engine.write_block(block_id, slots)


class WatchedMemory:
    """`simulator.store.BlockMemory` as a store's disk sees it."""

    def __init__(self, witness: Witness, host: str, memory: StoreMemory) -> None:
        self._witness = witness
        self._host = host
        self._memory = memory
        #: Set before the first read.
        self.ledger: Ledger

    def read_block(self, block_id: BlockId) -> BlockContent:
        self._witness.spilled(self._host, block_id, self.ledger.block_class(block_id))
        return self._memory.read_block(block_id)

    def write_block(self, block_id: BlockId, content: BlockContent) -> None:
        is_named = self.ledger.key_of(block_id) is not None
        self._witness.loaded(self._host, block_id, self.ledger.block_class(block_id), is_named=is_named)
        self._memory.write_block(block_id, content)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
