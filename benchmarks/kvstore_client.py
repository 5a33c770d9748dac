"""A worker without an engine, for `benchmarks.kvstore`: it gives a store blocks, and fetches them back."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.kvstore_blocks import BLOCK_BYTES, BLOCK_TOKENS, IDENTITY, PREFIX_BLOCKS
from contracts.ids import BlockId, Incarnation, LeaseId, WorkerId
from contracts.messages import Peer, Seal
from contracts.store_messages import KEEP, KeepRequest
from kvstore.fetches import PrefixFetches
from kvstore.prefix_cache import PrefixCache
from kvtransfer import HolderService, HostPool, LeaseOutcome, Ledger, ReaderService, ShmTransport, TransportSet
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    import random
    from collections.abc import Mapping, Sequence

    from contracts.messages import HandoffReply, LeaseTerms
    from kvstore.fetch_ends import FetchEnd

#: That a store has at once, and room to scatter as many.
NUM_PREFIXES = 8
POOL_BLOCKS = NUM_PREFIXES * PREFIX_BLOCKS * 5 // 4
TIMEOUT_S = 60.0


class _Keys:
    """`kvstore.prefix_cache.KeyChain` of keys that are known."""

    def __init__(self, keys: tuple[bytes, ...]) -> None:
        self.keys = keys

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, index: int) -> bytes:
        return self.keys[index]

    def part(self, start: int, stop: int) -> tuple[bytes, ...]:
        return self.keys[start:stop]


class Client:
    """A worker without an engine: its pool, its two lease services, its fetches."""

    def __init__(self) -> None:
        self._stack = contextlib.AsyncExitStack()
        self._clock = LiveClock()
        self._incarnation = Incarnation(os.getpid())
        self.ledger = Ledger(POOL_BLOCKS)
        self.pool = HostPool(POOL_BLOCKS, BLOCK_BYTES)
        self._stack.callback(self.pool.close)
        self.content = np.frombuffer(self.pool.view(), np.uint8).reshape(POOL_BLOCKS, BLOCK_BYTES)
        self.content[:] = 1
        self.transports = TransportSet((ShmTransport(clock=self._clock, incarnation=self._incarnation),))
        self.network = GrpcNetwork(token="benchmark")

    async def __aenter__(self) -> Client:
        self._stack.push_async_callback(self.transports.close)
        self.transports.register(self.pool)
        self._stack.push_async_callback(self.network.close)
        server = self.network.server("127.0.0.1:0")
        self._stack.push_async_callback(server.stop, 0.0)
        here = Peer(worker_id=WorkerId("worker-0"), incarnation=self._incarnation, address=await server.start())
        common: dict[str, Any] = {
            "ledger": self.ledger,
            "network": self.network,
            "clock": self._clock,
            "transports": self.transports,
            "identity": IDENTITY,
            "log": print,
        }
        self.holder = HolderService(worker=here, **common)
        reader = ReaderService(**common)
        self.holder.register(server)
        reader.register(server)
        await self._stack.enter_async_context(self.holder)
        await self._stack.enter_async_context(reader)
        self.fetches = PrefixFetches(
            ledger=self.ledger,
            prefixes=PrefixCache(self.ledger, IDENTITY),
            reader=reader,
            network=self.network,
            clock=self._clock,
            worker=here,
            identity=IDENTITY,
            refusal=lambda peer: None,
            may_take=lambda num_blocks: True,
            on_ended=lambda: None,
            on_bug=_fail,
            log=print,
        )
        self._stack.push_async_callback(self.fetches.close)
        return self

    async def __aexit__(self, *_: object) -> None:
        del self.content
        await self._stack.aclose()

    async def keep(self, store: Peer, blocks: Sequence[BlockId], keys: tuple[bytes, ...], first_block: int) -> float:
        """Offers blocks to the store; seconds until its lease is released, which is when the store has them."""
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def send(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            ask = KeepRequest(target=store.incarnation, terms=terms, keys=keys, first_block=first_block)
            return await self.network.channel(store.address).call(KEEP, ask, timeout_s=timeout_s)

        def on_ended(lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
            ended.set_result("" if outcome is LeaseOutcome.RELEASED else f"{outcome}: {reason}")

        start_s = time.perf_counter()
        self.holder.open(
            blocks, store, send_offer=send, on_ended=on_ended, seal=Seal(num_tokens=len(blocks) * BLOCK_TOKENS),
            whole=True,
        )  # fmt: skip
        async with asyncio.timeout(TIMEOUT_S):
            problem = await ended
        if problem:
            raise RuntimeError(f"a store did not take {len(blocks)} blocks: {problem}")
        return time.perf_counter() - start_s

    async def fetch(self, store: Peer, keys: tuple[bytes, ...]) -> tuple[float, Mapping[str, int]]:
        """Seconds, and where the blocks stood."""
        ended: asyncio.Future[FetchEnd] = asyncio.get_running_loop().create_future()
        start_s = time.perf_counter()
        # A chain is only ever asked for its keys.
        ticket = self.fetches.start(_Keys(keys), [], len(keys), store, ended.set_result)  # type: ignore[arg-type]
        if ticket is None:
            raise RuntimeError("a fetch was not begun")
        async with asyncio.timeout(TIMEOUT_S):
            end = await ended
        took_s = time.perf_counter() - start_s
        if sum(end.tier_blocks.values()) != len(keys):
            raise RuntimeError(f"{end.tier_blocks} blocks of {len(keys)} came")
        return took_s, end.tier_blocks

    def forget(self, rng: random.Random) -> None:
        """Gives up everything that was fetched; what comes next lies scattered, and not where the last one lay."""
        self.ledger.evict(self.ledger.cached_blocks())
        blocks = self.ledger.allocate("shuffle", self.ledger.num_blocks)
        if blocks is None:
            raise RuntimeError("somebody holds blocks of a pool that should be free")
        rng.shuffle(blocks)
        self.ledger.release("shuffle", blocks)

    def wire_s(self) -> float:
        """Of all pulls so far."""
        return sum(tally.wire_s for tally in self.transports.tallies())


def _fail(error: Exception) -> None:
    raise error
