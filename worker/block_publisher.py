"""Tells the coordinator which blocks this worker's prefix cache holds, as they come and go.

What is told, and again after a failure, is `kvstore.block_log`'s affair; here is when. It runs beside the heartbeats
and keeps none of them waiting.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import BLOCK_EVENTS
from kvstore.block_keys import HINT_BYTES, hints
from kvstore.block_log import BlockLog
from worker.outage_lines import OutageLines

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from contracts.clock import Clock
    from contracts.messages import WorkerInfo
    from rpc import Network

#: News wait for each other this long at most.
INTERVAL_S = 0.1
TIMEOUT_S = 1.0
#: After a call that failed, or a coordinator that does not know this life (yet): the first wait, which doubles, and
#: the longest.
FIRST_BACKOFF_S = 0.1
LONGEST_BACKOFF_S = 2.0

_LOST = Failpoint("worker.block_events_lost", "block events are told, and count as not heard")
_TOLD_AGAIN = RarePath("worker.block_events_again", "block events were not answered, or by one who does not know them")


class BlockPublisher:
    """Implements `kvtransfer.ledger.KeyListener`. Use: `await run()` beside the rest of the worker."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        held: Callable[[], Iterable[bytes]],
        network: Network,
        coordinator_address: str,
        clock: Clock,
        registered: asyncio.Event,
        holds_already: bool = False,
        log: Callable[[str], None],
    ) -> None:
        """`held`: all keys that stand; the owner has it hear of them as they come and go. `holds_already`: there may be
        some from before. Nothing is told before `registered` is set."""
        self._network = network
        self._address = coordinator_address
        self._clock = clock
        self._registered = registered
        begun, over = "block events are not heard by the coordinator", "block events are heard again"
        self._outage = OutageLines(begun, over, clock, log)
        self._events = BlockLog(
            info.worker_id, info.incarnation, lambda: hints(tuple(held())), holds_already=holds_already
        )
        self._news = asyncio.Event()
        if holds_already:
            self._news.set()
        #: Set to end a wait after a failure.
        self._anew = asyncio.Event()
        #: Messages that were answered, since the start.
        self.messages_total = 0

    @property
    def num_events(self) -> int:
        """Since the start."""
        return self._events.num_events

    def stored(self, key: bytes) -> None:
        self._events.stored(key[:HINT_BYTES])
        self._news.set()

    def removed(self, key: bytes) -> None:
        self._events.removed(key[:HINT_BYTES])
        self._news.set()

    def registered_anew(self) -> None:
        """The coordinator took this life up once more, or another coordinator did: what it knows is asked."""
        self._events.reset()
        self._anew.set()
        self._news.set()

    async def run(self) -> None:
        """Until cancelled."""
        await self._registered.wait()
        backoff_s = FIRST_BACKOFF_S
        while True:
            await self._news.wait()
            self._news.clear()
            self._anew.clear()
            if await self._tell():
                backoff_s = FIRST_BACKOFF_S
                await self._clock.sleep(INTERVAL_S)
                continue
            _TOLD_AGAIN.reached()
            self._news.set()
            try:
                async with asyncio.timeout(backoff_s):
                    await self._anew.wait()
                backoff_s = FIRST_BACKOFF_S
            except TimeoutError:
                backoff_s = min(2 * backoff_s, LONGEST_BACKOFF_S)

    async def _tell(self) -> bool:
        """Whether the coordinator has heard all that had happened when this began."""
        until = self._events.num_events
        while (message := self._events.next_message()) is not None:
            if message.snapshot is None and message.keys and message.start >= until:
                self._news.set()
                break
            try:
                channel = self._network.channel(self._address)
                reply = await channel.call(BLOCK_EVENTS, message, timeout_s=TIMEOUT_S)
            except TandemError as error:
                self._events.failed()
                self._outage.failed(error)
                return False
            self._outage.answered()
            if _LOST.fires():
                self._events.failed()
                return False
            self.messages_total += 1
            self._events.answered(reply)
            if not reply.known:
                return False
        return True
