"""Tells workers to forget requests: batched per worker, repeated briefly, bounded.

A lost Cancel costs work, never correctness: workers give requests up at their own deadline, and tokens of a
forgotten request make the gateway ask again.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from contracts.errors import TandemError
from contracts.failpoints import Failpoint
from contracts.messages import CANCEL, CancelRequest, RequestKey

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from contracts.clock import Clock
    from contracts.messages import Peer
    from gateway.limits import GatewayLimits
    from rpc import Network

    Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

_CANCEL_LOST = Failpoint("gateway.cancel_lost", "cancels are not sent and count as failed")


class CancelQueue:
    def __init__(self, network: Network, clock: Clock, limits: GatewayLimits, spawn: Spawn) -> None:
        self._network = network
        self._clock = clock
        self._limits = limits
        self._spawn = spawn
        #: By address: requests to cancel there and why, oldest first; at most `max_waiting_cancels` each.
        self._waiting: dict[str, dict[RequestKey, str]] = {}
        #: The one sender of each address; an address is here exactly while it is in `_waiting`.
        self._senders: dict[str, asyncio.Task[None]] = {}
        #: Cancels given up, over the life of the gateway.
        self.num_dropped = 0

    def add(self, peer: Peer, key: RequestKey, reason: str) -> None:
        waiting = self._waiting.setdefault(peer.address, {})
        if len(waiting) >= self._limits.max_waiting_cancels:
            self.num_dropped += 1
            return
        waiting[key] = reason
        if peer.address not in self._senders:
            self._senders[peer.address] = self._spawn(self._send_all(peer.address))

    async def flush(self) -> None:
        """Returns when all are sent or given up; cancelling it gives up what is left."""
        while self._senders:
            await asyncio.gather(*self._senders.values())

    async def _send_all(self, address: str) -> None:
        waiting = self._waiting[address]
        try:
            while waiting:
                await self._send_batch(address, _take(waiting, self._limits.max_cancel_batch))
        finally:
            self.num_dropped += len(waiting)
            del self._waiting[address], self._senders[address]

    async def _send_batch(self, address: str, batch: dict[RequestKey, str]) -> None:
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
                return
            except TandemError:
                continue
        self.num_dropped += len(batch)


def _take(waiting: dict[RequestKey, str], count: int) -> dict[RequestKey, str]:
    keys = list(waiting)[:count]
    return {key: waiting.pop(key) for key in keys}
