"""Where a simulated cluster can be watched from outside: every token that reaches the gateway, every block that a
pull writes. What is watched does not change what happens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from gateway.core import GatewayCore

if TYPE_CHECKING:
    from contracts.ids import BlockId, RequestId
    from contracts.messages import Peer
    from contracts.requests import Frame, TokenDelta
    from gateway.core import Submission
    from gateway.stream import RequestStream
    from kvtransfer.ledger import BlockClass, Ledger
    from simulator.engine import BlockContent, ModelledEngine


class Witness(Protocol):
    def heard(self, peer: Peer, submission: Submission, delta: TokenDelta) -> None:
        """A delta came from a worker, of a request that was submitted to this gateway; nobody may want it any more."""
        ...

    def landed(self, host: str, block_id: BlockId, block_class: BlockClass) -> None:
        """A pull writes a block of this life's pool, which its ledger keeps under this class."""
        ...


class WatchedGateway(GatewayCore):
    def __init__(self, witness: Witness, *args: Any) -> None:
        super().__init__(*args)
        self._witness = witness
        #: All that were ever submitted here.
        self._submissions: dict[RequestId, Submission] = {}

    def submit(self, submission: Submission) -> RequestStream:
        stream = super().submit(submission)
        self._submissions[stream.request_id] = submission
        return stream

    def _on_frame(self, peer: Peer, frame: Frame) -> None:
        for delta in frame.deltas:
            self._witness.heard(peer, self._submissions[delta.request_id], delta)
        super()._on_frame(peer, frame)


class WatchedPool:
    """`kvtransfer.memory.BlockStore` of a modelled engine."""

    def __init__(self, witness: Witness, host: str, engine: ModelledEngine) -> None:
        self._witness = witness
        self._host = host
        self._engine = engine
        #: Set before the first pull.
        self.ledger: Ledger

    def read_block(self, block_id: BlockId) -> BlockContent:
        return self._engine.read_block(block_id)

    def write_block(self, block_id: BlockId, content: BlockContent) -> None:
        self._witness.landed(self._host, block_id, self.ledger.block_class(block_id))
        self._engine.write_block(block_id, content)
