"""Sees what no client sees: every token that reaches a gateway, wanted or not, and every block that a pull writes.

The gateway drops what a try says that it has given up, and blocks that are written by mistake may be nobody's just
then: a client would notice such a bug once in a thousand trials. Here it counts wherever it happens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvtransfer.ledger import BlockClass
from simulator.engine import expected_tokens

if TYPE_CHECKING:
    from contracts.ids import BlockId, RequestId
    from contracts.messages import Peer
    from contracts.requests import TokenDelta
    from gateway.core import Submission

#: Memory that was given to a pull.
_GIVEN = (BlockClass.RESERVED, BlockClass.QUARANTINED)


class Witness:
    """Implements `simulator.witness.Witness`; `problems` is empty where everything held."""

    def __init__(self) -> None:
        self.problems: list[str] = []
        #: Right answers, as far as they were needed.
        self._right: dict[RequestId, list[int]] = {}
        #: Tokens that came, by the life that computed them, its try and the output index.
        self._heard: set[tuple[str, RequestId, int, int]] = set()

    def heard(self, peer: Peer, submission: Submission, delta: TokenDelta) -> None:
        life = f"{peer.worker_id}@{peer.incarnation}"
        where = f"{life}: {delta.request_id}, attempt {delta.attempt}"
        right = self._right_tokens(submission, delta)
        for index, token_id in enumerate(delta.token_ids, delta.index):
            if index >= len(right) or token_id != right[index]:
                expected = right[index] if index < len(right) else "the end"
                self.problems.append(f"{where}: token {index} is {token_id}, not {expected}")
            key = (life, delta.request_id, delta.attempt, index)
            if key in self._heard:
                self.problems.append(f"{where}: token {index} is computed twice")
            self._heard.add(key)

    def landed(self, host: str, block_id: BlockId, block_class: BlockClass) -> None:
        if block_class not in _GIVEN:
            self.problems.append(f"{host}: a pull writes block {block_id}, which is {block_class.name}")

    def _right_tokens(self, submission: Submission, delta: TokenDelta) -> list[int]:
        right = self._right.get(delta.request_id)
        if right is None:
            sampling = submission.sampling
            right = expected_tokens(submission.token_ids, sampling, sampling.max_tokens)
            self._right[delta.request_id] = right
        return right
