"""Answers workers' claims on requests: batched per life of a worker, never repeated, bounded.

A lost verdict costs time, never correctness: a claim is repeated until it is answered, and its request's machine
answers again the same.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.messages import GRANT, ClaimVerdict, GrantRequest, Peer, RequestKey
from gateway.batches import Batches

if TYPE_CHECKING:
    from contracts.ids import GatewayId
    from gateway.batches import Spawn
    from gateway.limits import GatewayLimits
    from rpc import Network


class VerdictQueue:
    def __init__(self, network: Network, gateway_id: GatewayId, limits: GatewayLimits, spawn: Spawn) -> None:
        self._network = network
        self._gateway_id = gateway_id
        self._timeout_s = limits.grant_timeout_s
        self._batches = Batches[Peer, RequestKey, ClaimVerdict](
            spawn, self._send_batch, max_waiting=limits.max_waiting_verdicts, max_batch=limits.max_verdict_batch
        )

    @property
    def num_dropped(self) -> int:
        """Verdicts that did not arrive, as far as is known, over the life of the gateway."""
        return self._batches.num_dropped

    def add(self, peer: Peer, verdict: ClaimVerdict) -> None:
        """The last one for a key is the one that counts."""
        self._batches.add(peer, verdict.key, verdict)

    async def _send_batch(self, peer: Peer, batch: dict[RequestKey, ClaimVerdict]) -> bool:
        verdicts = tuple(batch.values())
        request = GrantRequest(target=peer.incarnation, gateway_id=self._gateway_id, verdicts=verdicts)
        try:
            await self._network.channel(peer.address).call(GRANT, request, timeout_s=self._timeout_s)
        except TandemError:
            return False
        return True
