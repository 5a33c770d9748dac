"""Asks the coordinator where requests run: one call in flight, everything that came meanwhile in the next."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import NoCapacity, NotReady, TandemError
from contracts.failpoints import Failpoint
from contracts.messages import DISPATCH, DispatchItem, DispatchRequest, Placement, Rejection

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.ids import GatewayId, RequestId
    from gateway.limits import GatewayLimits
    from rpc import Network

#: What a rejected client is told where the coordinator could not be asked.
_RETRY_AFTER_S = 1.0

_DISPATCH_LATE = Failpoint("gateway.dispatch_late", "the coordinator is asked late, for more requests at once")
_DISPATCH_TWICE = Failpoint("gateway.dispatch_twice", "the coordinator's answer is lost, it is asked again")
_LONGEST_LATENESS_S = 0.2


class Dispatcher:
    """`on_answer` is called once for every item that was not discarded: with the coordinator's verdict, or with
    an error when there is none."""

    def __init__(
        self,
        network: Network,
        coordinator_address: str,
        gateway_id: GatewayId,
        limits: GatewayLimits,
        on_answer: Callable[[RequestId, Placement | Rejection | TandemError], None],
    ) -> None:
        self._network = network
        self._address = coordinator_address
        self._gateway_id = gateway_id
        self._limits = limits
        self._on_answer = on_answer
        #: Items not yet part of a call, oldest first; at most `max_waiting_dispatch`.
        self._waiting: dict[RequestId, DispatchItem] = {}
        self._wanted = asyncio.Event()

    def add(self, item: DispatchItem) -> None:
        """Raises NoCapacity when too many requests wait for the coordinator."""
        if len(self._waiting) >= self._limits.max_waiting_dispatch:
            raise NoCapacity(
                f"{len(self._waiting)} requests already wait for the coordinator, the limit",
                retry_after_s=_RETRY_AFTER_S,
            )
        self._waiting[item.request_id] = item
        self._wanted.set()

    def discard(self, request_id: RequestId) -> None:
        self._waiting.pop(request_id, None)

    async def run(self) -> None:
        while True:
            await self._wanted.wait()
            await _DISPATCH_LATE.delay(_LONGEST_LATENESS_S)
            batch = self._take()
            if not batch:
                self._wanted.clear()
                continue
            for item, answer in zip(batch, await self._ask(batch), strict=True):
                self._on_answer(item.request_id, answer)

    def _take(self) -> tuple[DispatchItem, ...]:
        ids = list(self._waiting)[: self._limits.max_dispatch_batch]
        return tuple(self._waiting.pop(request_id) for request_id in ids)

    async def _ask(self, batch: tuple[DispatchItem, ...]) -> Sequence[Placement | Rejection | TandemError]:
        """Answers parallel to `batch`."""
        request = DispatchRequest(gateway_id=self._gateway_id, items=batch)
        try:
            channel = self._network.channel(self._address)
            if _DISPATCH_TWICE.fires():
                await channel.call(DISPATCH, request, timeout_s=self._limits.dispatch_timeout_s)
            reply = await channel.call(DISPATCH, request, timeout_s=self._limits.dispatch_timeout_s)
        except TandemError as error:
            return [self._no_answer(f"did not answer ({error.code})")] * len(batch)
        if len(reply.verdicts) != len(batch):
            return [self._no_answer(f"answered {len(reply.verdicts)} of {len(batch)} requests")] * len(batch)
        return reply.verdicts

    def _no_answer(self, what: str) -> TandemError:
        return NotReady(f"the coordinator {what}", retry_after_s=_RETRY_AFTER_S)
