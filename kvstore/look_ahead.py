"""Tells the stores which prompts wait here, the next first, so that what these need comes from disk to memory in time
(the scheduler-aware window of CachedAttention, ATC'24, section 3.3.2).

Hints and nothing more: a store that does not hear them serves the same blocks, only later. So what is lost is not
repeated; what waits by then is told with the next change.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.failpoints import RarePath
from contracts.store_messages import PREFETCH, PrefetchRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from contracts.clock import Clock
    from contracts.ids import WorkerId
    from contracts.messages import Peer
    from rpc import Network

#: Prompts that are told of: those that a worker reads within a few steps. More would push each other out of a store.
MAX_PROMPTS = 16
#: Keys in one message, over all its prompts; the last prompt is cut.
MAX_KEYS = 4096
#: Between two looks at what waits.
INTERVAL_S = 0.05
#: What a store may take to answer, and how long one that did not is left alone.
TIMEOUT_S = 1.0
PAUSE_S = 2.0

_TOLD = RarePath("kvstore.look_ahead_told", "a store was told which prompts wait")

Prompts = tuple[tuple[bytes, ...], ...]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A prompt that waits, and what of its beginning a store is believed to hold."""

    store: Peer
    #: Whole keys of leading blocks that are not here, in order.
    keys: tuple[bytes, ...]


@dataclass(slots=True)
class _Told:
    """What one store was told."""

    #: None: it is not known what it has heard.
    prompts: Prompts | None = ()
    under_way: Prompts | None = None
    #: It did not answer, and is left alone until then.
    quiet_until_s: float = -math.inf


@dataclass(slots=True)
class LookAheadWindow:
    """Who is to be told what: one message under way to each store, none to one that has just not answered. Reads no
    clock."""

    max_prompts: int = MAX_PROMPTS
    max_keys: int = MAX_KEYS
    #: Stores that know of prompts, or may.
    _stores: dict[Peer, _Told] = field(default_factory=dict["Peer", "_Told"])

    def due(self, wanted: Sequence[Wanted], now_s: float) -> list[tuple[Peer, Prompts]]:
        """What to tell now: `wanted`, the next first, is all that waits; it is cut to the window. Each of these has to
        be followed by `answered` or `failed`."""
        wishes: dict[Peer, list[tuple[bytes, ...]]] = {}
        left: dict[Peer, int] = {}
        for each in wanted[: self.max_prompts]:
            prompts = wishes.setdefault(each.store, [])
            keys = each.keys[: left.setdefault(each.store, self.max_keys)]
            left[each.store] -= len(keys)
            if keys:
                prompts.append(keys)
        messages: list[tuple[Peer, Prompts]] = []
        for store in [*wishes, *(store for store in self._stores if store not in wishes)]:
            prompts_now = tuple(wishes.get(store, ()))
            told = self._stores.setdefault(store, _Told())
            if told.under_way is None and prompts_now != told.prompts and now_s >= told.quiet_until_s:
                told.under_way = prompts_now
                messages.append((store, prompts_now))
        return messages

    def answered(self, store: Peer) -> None:
        told = self._stores[store]
        told.prompts, told.under_way = told.under_way, None
        if not told.prompts:
            del self._stores[store]

    def failed(self, store: Peer, now_s: float) -> None:
        """What it has heard is not known; it forgets by itself what is not fetched, so an empty message is spared."""
        told = self._stores[store]
        if not told.under_way:
            del self._stores[store]
            return
        told.prompts, told.under_way, told.quiet_until_s = None, None, now_s + PAUSE_S


class LookAhead:
    """Use: `await run()` beside the rest of the worker; `changed` whenever other prompts wait than before."""

    def __init__(
        self,
        *,
        worker: Peer,
        wanted: Callable[[int], Iterable[Wanted]],
        is_store: Callable[[WorkerId], bool],
        network: Network,
        clock: Clock,
    ) -> None:
        """`wanted`: at most so many prompts that wait and have a source, the next first. `is_store`: whether that
        member is a store: others are not told."""
        self._worker = worker
        self._wanted = wanted
        self._is_store = is_store
        self._network = network
        self._clock = clock
        self._window = LookAheadWindow()
        self._changed = asyncio.Event()
        #: Messages that were answered, and that were not, since the start.
        self.messages_total = 0
        self.failures_total = 0

    def changed(self) -> None:
        """Cheap; may be called as often as one likes."""
        self._changed.set()

    async def run(self) -> None:
        """Until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._changed.wait()
                self._changed.clear()
                wanted = [each for each in self._wanted(MAX_PROMPTS) if self._is_store(each.store.worker_id)]
                for store, prompts in self._window.due(wanted, self._clock.now_s()):
                    tasks.create_task(self._tell(store, prompts), name=f"prefetch at {store.worker_id}")
                await self._clock.sleep(INTERVAL_S)

    async def _tell(self, store: Peer, prompts: Prompts) -> None:
        ask = PrefetchRequest(
            target=store.incarnation,
            worker_id=self._worker.worker_id,
            incarnation=self._worker.incarnation,
            prompts=prompts,
        )
        try:
            await self._network.channel(store.address).call(PREFETCH, ask, timeout_s=TIMEOUT_S)
        except TandemError:
            # Its heartbeats tell the coordinator more than lines here would.
            self.failures_total += 1
            self._window.failed(store, self._clock.now_s())
        else:
            _TOLD.reached()
            self.messages_total += 1
            self._window.answered(store)
        self._changed.set()
