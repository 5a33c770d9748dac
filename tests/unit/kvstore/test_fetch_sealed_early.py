"""A fetch whose holder seals before the last block that it announced it would: a store whose disk could not read on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

import pytest

from contracts.ids import Incarnation, WorkerId
from contracts.messages import FETCH, FetchReply, FetchRequest, HandoffReply, LeaseTerms, Peer, Seal
from kvstore.fetches import PrefixFetches
from kvstore.prefix_cache import PrefixCache
from kvtransfer import HolderService, LeaseOutcome, Ledger, MemoryFabric, ReaderService, TransportSet
from rpc import MemoryNetwork
from simulator import Program, VirtualClock, run
from tests.support.pools import register_pool
from tests.unit.kvtransfer.builders import IDENTITY

if TYPE_CHECKING:
    from rpc import CallContext

NUM_BLOCKS = 8
BLOCK_BYTES = 64
BLOCK_TOKENS = IDENTITY.layout.block_tokens
TTL_S = 8.0


@pytest.mark.parametrize("num_sealed", [1, 2, 4])
def test_only_blocks_that_came_get_a_key(num_sealed: int) -> None:
    """The lease is of four blocks and grows one by one; what is set aside beyond its seal is free again."""

    async def main(program: Program) -> None:
        fabric = MemoryFabric()
        network = MemoryNetwork(rng=program.rng("network"))
        sending, receiving = fabric.transport("s"), fabric.transport("p")
        sent = register_pool(sending, NUM_BLOCKS, BLOCK_BYTES)
        received = register_pool(receiving, NUM_BLOCKS, BLOCK_BYTES)
        at_store, at_worker = network.process("s"), network.process("p")
        store_server, worker_server = at_store.server("s:0"), at_worker.server("p:0")
        store = Peer(worker_id=WorkerId("s"), incarnation=Incarnation(1), address=await store_server.start())
        worker = Peer(worker_id=WorkerId("p"), incarnation=Incarnation(1), address=await worker_server.start())
        holder_ledger, ledger = Ledger(NUM_BLOCKS), Ledger(NUM_BLOCKS)
        outcomes: list[LeaseOutcome] = []
        async with AsyncExitStack() as stack:
            holder = await stack.enter_async_context(
                HolderService(
                    ledger=holder_ledger,
                    network=at_store,
                    clock=VirtualClock(),
                    worker=store,
                    identity=IDENTITY,
                    transports=TransportSet((sending,)),
                    ttl_s=TTL_S,
                    log=print,
                )
            )
            reader = await stack.enter_async_context(
                ReaderService(
                    ledger=ledger,
                    network=at_worker,
                    clock=VirtualClock(),
                    transports=TransportSet((receiving,)),
                    identity=IDENTITY,
                    log=print,
                )
            )
            holder.register(store_server)
            reader.register(worker_server)

            async def answer(ask: FetchRequest, context: CallContext) -> FetchReply:
                if ask.taken:
                    taken.set()
                    return FetchReply()
                blocks = holder_ledger.allocate("disk", len(ask.keys))
                assert blocks is not None
                told: asyncio.Future[LeaseTerms] = asyncio.get_running_loop().create_future()

                async def tell(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
                    told.set_result(terms)
                    await taken.wait()
                    return HandoffReply(verdict="reserved")

                lease_id = holder.open(
                    blocks, ask.reader, send_offer=tell, on_ended=lambda _, outcome, __: outcomes.append(outcome)
                )

                async def read() -> None:
                    for position in range(num_sealed):
                        await asyncio.sleep(0.2)
                        block = blocks[position]
                        sent[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = bytes([position + 1]) * BLOCK_BYTES
                        holder.advance(lease_id, position + 1)
                    holder.seal(lease_id, num_sealed, Seal(num_tokens=num_sealed * BLOCK_TOKENS))
                    holder_ledger.release_all("disk")

                reading.append(asyncio.create_task(read()))
                return FetchReply(terms=await told, tier_blocks={"ssd": len(blocks)})

            reading: list[asyncio.Task[None]] = []
            taken = asyncio.Event()
            store_server.register(FETCH, answer)
            prefixes = PrefixCache(ledger, IDENTITY)
            fetches = PrefixFetches(
                ledger=ledger,
                prefixes=prefixes,
                reader=reader,
                network=at_worker,
                clock=VirtualClock(),
                worker=worker,
                identity=IDENTITY,
                refusal=lambda _: None,
                may_take=lambda _: True,
                on_ended=lambda: None,
                on_bug=lambda bug: pytest.fail(str(bug)),
                log=print,
            )
            chain = prefixes.chain(range(4 * BLOCK_TOKENS + 1), "salt")
            ended = asyncio.Event()
            assert fetches.start(chain, [], 4, store, lambda _: ended.set()) is not None
            await asyncio.wait_for(ended.wait(), 10.0)
            found = prefixes.match(chain.part(0, 4))
            stamps = [received[block * BLOCK_BYTES] for block in found]
            assert stamps == list(range(1, num_sealed + 1))
            assert fetches.fetched_blocks_total == num_sealed
            load = ledger.load()
            assert (load["cached_blocks"], load["free_blocks"]) == (num_sealed, NUM_BLOCKS - num_sealed)
            await asyncio.sleep(1.0)
            assert outcomes == [LeaseOutcome.RELEASED]
            assert holder_ledger.load()["free_blocks"] == NUM_BLOCKS
            await fetches.close()

    run(main, seed=1, limit_s=60.0)
