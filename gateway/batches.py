"""Small messages to many places: what comes together goes in one call, one call at a time for each place, bounded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]

PlaceT = TypeVar("PlaceT")
KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Batches(Generic[PlaceT, KeyT, ValueT]):
    """`send(place, batch)` carries one batch, and says whether it arrived; it must end by itself and not raise."""

    def __init__(
        self,
        spawn: Spawn,
        send: Callable[[PlaceT, dict[KeyT, ValueT]], Awaitable[bool]],
        *,
        max_waiting: int,
        max_batch: int,
    ) -> None:
        """At most `max_waiting` wait for each place; what comes beyond them is dropped."""
        self._spawn = spawn
        self._send = send
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        #: What was not sent yet, oldest first.
        self._waiting: dict[PlaceT, dict[KeyT, ValueT]] = {}
        #: The one sender of each place; a place is here exactly while it is in `_waiting`.
        self._senders: dict[PlaceT, asyncio.Task[None]] = {}
        #: Messages that did not arrive, as far as is known.
        self.num_dropped = 0

    def add(self, place: PlaceT, key: KeyT, value: ValueT) -> None:
        """Replaces what waits there under the same key."""
        waiting = self._waiting.setdefault(place, {})
        if key not in waiting and len(waiting) >= self._max_waiting:
            self.num_dropped += 1
            return
        waiting[key] = value
        if place not in self._senders:
            self._senders[place] = self._spawn(self._send_all(place))

    async def flush(self) -> None:
        """Returns when all are sent or given up; cancelling it gives up what is left."""
        while self._senders:
            await asyncio.gather(*self._senders.values())

    async def _send_all(self, place: PlaceT) -> None:
        waiting = self._waiting[place]
        try:
            while waiting:
                batch = {key: waiting.pop(key) for key in list(waiting)[: self._max_batch]}
                if not await self._send(place, batch):
                    self.num_dropped += len(batch)
        finally:
            self.num_dropped += len(waiting)
            del self._waiting[place], self._senders[place]
