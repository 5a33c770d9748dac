"""Tells workers to forget requests: batched per worker, repeated briefly, bounded.

A lost Cancel costs work, never correctness: workers give requests up at their own deadline, and tokens of a
forgotten request make the gateway ask again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.failpoints import Failpoint
from contracts.messages import CANCEL, CancelRequest, RequestKey
from gateway.batches import Batches

if TYPE_CHECKING:
    from contracts.clock import Clock
    from contracts.messages import Peer
    from gateway.batches import Spawn
    from gateway.limits import GatewayLimits
    from rpc import Network

_CANCEL_LOST = Failpoint("gateway.cancel_lost", "cancels are not sent and count as failed")


class CancelQueue:
    def __init__(self, network: Network, clock: Clock, limits: GatewayLimits, spawn: Spawn) -> None:
        self._network = network
        self._clock = clock
        self._limits = limits
        #: By address: requests to cancel there and why.
        self._batches = Batches[str, RequestKey, str](
            spawn, self._send_batch, max_waiting=limits.max_waiting_cancels, max_batch=limits.max_cancel_batch
        )

    @property
    def num_dropped(self) -> int:
        """Cancels given up, over the life of the gateway."""
        return self._batches.num_dropped

    def add(self, peer: Peer, key: RequestKey, reason: str) -> None:
        self._batches.add(peer.address, key, reason)

    async def flush(self) -> None:
        """Returns when all are sent or given up; cancelling it gives up what is left."""
        await self._batches.flush()

    async def _send_batch(self, address: str, batch: dict[RequestKey, str]) -> bool:
        reasons = sorted(set(batch.values()))
        request = CancelRequest(requests=tuple(batch), reason="; ".join(reasons[:3]))
        for attempt in range(self._limits.cancel_attempts):
            if attempt:
                await self._clock.sleep(self._limits.cancel_backoff_s * attempt)
            if _CANCEL_LOST.fires():
                continue
            try:
                channel = self._network.channel(address)
                await channel.call(CANCEL, request, timeout_s=self._limits.cancel_timeout_s)
                return True
            except TandemError:
                continue
        return False
