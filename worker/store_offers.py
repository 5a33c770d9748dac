"""Offers a worker's finished blocks to its store: the shell around `kvstore.write_back`.

It opens the leases that the machine orders, and tells it what becomes of them. It runs beside the step loop: what ends
there is only noted here, and offered in this task's own turn.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import TandemError
from contracts.messages import Seal
from contracts.store_messages import KEEP, KeepRequest
from kvstore.write_back import (
    Looked,
    OfferBlocks,
    OfferEnded,
    Replied,
    Served,
    StoreIs,
    TakeBack,
    Wanted,
    WriteBack,
    WriteBackLimits,
)
from kvtransfer import LeaseOutcome
from worker.outage_lines import OutageLines

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.ids import LeaseId
    from contracts.messages import HandoffReply, LeaseTerms, Peer
    from contracts.requests import GenerateRequest
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvstore.write_back import WriteBackCounters, WriteBackEvent, WriteBackInstruction
    from kvtransfer import HolderService
    from rpc import Network


class StoreOffers:
    """Use: `await run()` beside the rest of the worker, until cancelled."""

    def __init__(
        self,
        *,
        prefixes: PrefixCache,
        holder: HolderService,
        network: Network,
        clock: Clock,
        may_take: Callable[[int], bool],
        on_blocks_freed: Callable[[], None],
        log: Callable[[str], None],
        limits: WriteBackLimits | None = None,
    ) -> None:
        """`may_take`: as in `WriteBack`. `on_blocks_freed` is called when an offer ended."""
        self._block_tokens = prefixes.block_tokens
        self._holder = holder
        self._network = network
        self._clock = clock
        self._on_blocks_freed = on_blocks_freed
        begun, over = "what ends here does not get to the store", "what ends here gets to the store again"
        self._outage = OutageLines(begun, over, clock, log)
        limits = limits or WriteBackLimits()
        self._max_offer_s = limits.max_offer_s
        self._machine = WriteBack(prefixes, may_take, limits)
        self._store: Peer | None = None
        #: Not told to the machine yet.
        self._news: list[WriteBackEvent] = []
        self._has_news = asyncio.Event()
        #: Of the offers that have not ended.
        self._leases: dict[int, LeaseId] = {}

    def __repr__(self) -> str:
        return f"<StoreOffers {self._machine!r}>"

    @property
    def counters(self) -> WriteBackCounters:
        return self._machine.counters

    @property
    def num_open(self) -> int:
        return self._machine.num_open

    @property
    def num_waiting(self) -> int:
        return self._machine.num_waiting

    @property
    def store(self) -> Peer | None:
        """This worker's, in its present life."""
        return self._store

    def use(self, store: Peer | None) -> None:
        """This worker's store from now on, in its present life; None: there is none."""
        if store != self._store:
            self._store = store
            self._tell(StoreIs(store))

    def keep(self, chain: KeyChain, num_blocks: int, request: GenerateRequest) -> None:
        """Implements `kvstore.write_back.Keep`."""
        if self._store is None or not num_blocks:
            return
        lossy = request.kv_class == "lossy"
        self._tell(Wanted(keys=chain.part(0, num_blocks), lossy=lossy, tenant=request.tenant))

    def served(self, source: Peer, keys: tuple[bytes, ...]) -> None:
        """Blocks with these keys came from `source`: if that is the store, it need not be offered them."""
        if source == self._store:
            self._tell(Served(keys))

    async def run(self) -> None:
        while True:
            now_s = self._clock.now_s()
            due_s = self._machine.next_look_s(now_s)
            try:
                async with asyncio.timeout(None if due_s is None else max(0.0, due_s - now_s)):
                    await self._has_news.wait()
            except TimeoutError:
                self._tell(Looked())
            self._has_news.clear()
            news, self._news = self._news, []
            for event in news:
                for instruction in self._machine.handle(event, self._clock.now_s()):
                    self._perform(instruction)

    def _tell(self, event: WriteBackEvent) -> None:
        self._news.append(event)
        self._has_news.set()

    def _perform(self, instruction: WriteBackInstruction) -> None:
        match instruction:
            case OfferBlocks():
                self._offer(instruction)
            case TakeBack(number, reason):
                if (lease_id := self._leases.get(number)) is not None:
                    self._holder.withdraw(lease_id, reason)

    def _offer(self, order: OfferBlocks) -> None:
        async def send(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            ask = KeepRequest(
                target=order.store.incarnation,
                terms=terms,
                keys=order.keys,
                first_block=order.first_block,
                lossy=order.lossy,
                tenant=order.tenant,
            )
            try:
                reply = await self._network.channel(order.store.address).call(KEEP, ask, timeout_s=timeout_s)
            except TandemError as error:
                self._outage.failed(error)
                raise
            self._outage.answered()
            self._tell(Replied(order.number, reply.expected))
            return reply

        def ended(lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
            self._leases.pop(order.number, None)
            self._tell(OfferEnded(order.number, taken=outcome is LeaseOutcome.RELEASED))
            self._on_blocks_freed()

        try:
            self._leases[order.number] = self._holder.open(
                order.blocks,
                order.store,
                send_offer=send,
                on_ended=ended,
                seal=Seal(num_tokens=len(order.blocks) * self._block_tokens),
                whole=True,
                max_age_s=self._max_offer_s,
            )
        except TandemError:
            # The worker is stopping.
            self._tell(OfferEnded(order.number, taken=False))
