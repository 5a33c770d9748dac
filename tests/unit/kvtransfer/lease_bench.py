"""Two workers that hand KV over for the tests of whole leases, on a real event loop with real threads."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING, Self

from contracts.ids import BlockId, GatewayId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.messages import HANDOFF, HandoffReply, HandoffRequest, LeaseTerms, Peer, Seal
from contracts.requests import GenerateRequest, SamplingParams
from kvtransfer import HolderService, HostPool, Ledger, MemoryFabric, ReaderService, TransportSet
from kvtransfer.staging import PinnedMirror
from rpc import LiveClock, MemoryNetwork
from tests.unit.kvtransfer.builders import IDENTITY, SEAL

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from contextlib import AsyncExitStack

    import torch

    from contracts.errors import TandemError
    from kvtransfer import BlockPair, LeaseOutcome, MemoryTransport, Pool, Pull, PullResult
    from rpc import CallContext
    from rpc.memory import MemoryProcess

NUM_BLOCKS = 16
BLOCK_BYTES = 4096
#: How long a test waits for what must happen.
PATIENCE_S = 60.0
REQUEST = GenerateRequest(
    request_id=RequestId("q"),
    gateway_id=GatewayId("g"),
    token_ids=(1,),
    num_prompt_tokens=1,
    sampling=SamplingParams(max_tokens=1),
    deadline_s=60.0,
)


class _SpoiltPull:
    def __init__(self, pull: Pull, pool: HostPool, targets: list[BlockId]) -> None:
        self._pull = pull
        self._pool = pool
        self._targets = targets

    async def wait(self) -> PullResult:
        result = await self._pull.wait()
        for target in self._targets:
            self._pool.view()[target * BLOCK_BYTES + 7] ^= 0x40
        self._targets = []
        return result

    def request_stop(self) -> None:
        self._pull.request_stop()


class Spoiler:
    """Flips one bit in some blocks of each pull: `spoil[n]` are the positions in the n-th one's first pull.

    Positions count in the lease's block list, as the first pull of the lease brought it whole.
    """

    def __init__(self, spoil: Sequence[tuple[int, ...]]) -> None:
        self._spoil = list(spoil)
        self._first: list[BlockPair] = []
        self.pulled: list[list[BlockPair]] = []

    def targets(self, pairs: Sequence[BlockPair]) -> list[BlockId]:
        self.pulled.append(list(pairs))
        self._first = self._first or list(pairs)
        positions = self._spoil.pop(0) if self._spoil else ()
        spoilt = {self._first[position][1] for position in positions}
        return [target for _, target in pairs if target in spoilt]


class SpoilingTransport:
    """A transport in memory whose pulls go through a `Spoiler`."""

    name = "memory"

    def __init__(self, transport: MemoryTransport, spoiler: Spoiler) -> None:
        self._transport = transport
        self._spoiler = spoiler
        self._pool: HostPool | None = None

    def register(self, pool: Pool) -> None:
        assert isinstance(pool, HostPool)
        self._pool = pool
        self._transport.register(pool)

    def endpoint(self) -> bytes:
        return self._transport.endpoint()

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        await self._transport.connect(endpoint, deadline_s)

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> Pull:
        assert self._pool is not None
        return _SpoiltPull(self._transport.pull(endpoint, pairs), self._pool, self._spoiler.targets(pairs))

    def forget(self, endpoint: bytes) -> None:
        self._transport.forget(endpoint)

    async def close(self) -> None:
        await self._transport.close()


class _Side:
    """A worker's memory: its pool, and where there is a device, the tensor that the engine would use."""

    def __init__(self, stack: AsyncExitStack, network: MemoryProcess, device: str | None) -> None:
        self.network = network
        self.ledger = Ledger(NUM_BLOCKS)
        self.pool = HostPool(NUM_BLOCKS, BLOCK_BYTES)
        stack.callback(self.pool.close)
        self.mirror: PinnedMirror | None = None
        self.tensor: torch.Tensor | None = None
        if device is not None:
            import torch

            self.tensor = torch.zeros(NUM_BLOCKS, BLOCK_BYTES, dtype=torch.uint8, device=device)
            self.mirror = PinnedMirror(self.tensor, self.pool)
            stack.callback(self.mirror.close)

    def write(self, block: BlockId, content: bytes) -> None:
        """As the engine does."""
        if self.tensor is None:
            self.pool.view()[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES] = content
        else:
            import torch

            self.tensor[block] = torch.frombuffer(bytearray(content), dtype=torch.uint8).to(self.tensor.device)

    def read(self, block: BlockId) -> bytes:
        if self.tensor is None:
            return bytes(self.pool.view()[block * BLOCK_BYTES : (block + 1) * BLOCK_BYTES])
        return bytes(self.tensor[block].cpu().numpy().tobytes())


class LeaseBench:
    """One holder and one reader over the in-memory network and transport."""

    holder: HolderService
    reader: ReaderService
    _reader_peer: Peer

    def __init__(self, stack: AsyncExitStack, device: str | None) -> None:
        network = MemoryNetwork(rng=random.Random(1))
        self.holding = _Side(stack, network.process("p"), device)
        self.reading = _Side(stack, network.process("d"), device)
        #: Why leases ended at the holder.
        self.reasons: dict[LeaseId, str] = {}
        self._holder_ends: dict[LeaseId, LeaseOutcome] = {}
        self._reader_ends: dict[LeaseId, list[BlockId] | TandemError] = {}
        self._sent: dict[LeaseId, list[bytes]] = {}
        self._held: dict[LeaseId, list[BlockId]] = {}
        self._owners: dict[LeaseId, str] = {}

    @classmethod
    async def start(
        cls,
        stack: AsyncExitStack,
        *,
        checksum: bool,
        holder_checksum: bool | None = None,
        device: str | None = None,
        spoiler: Spoiler | None = None,
    ) -> Self:
        bench = cls(stack, device)
        fabric = MemoryFabric()
        sending, receiving = fabric.transport("p"), fabric.transport("d")
        transports = TransportSet((receiving if spoiler is None else SpoilingTransport(receiving, spoiler),))
        transports.register(bench.reading.pool)
        sending.register(bench.holding.pool)
        server = bench.reading.network.server("d:0")
        bench.reader = ReaderService(
            ledger=bench.reading.ledger,
            network=bench.reading.network,
            clock=LiveClock(),
            transports=transports,
            identity=IDENTITY,
            pool=bench.reading.pool,
            checksum=checksum,
            staging=bench.reading.mirror,
            log=print,
        )
        bench.reader.register(server)
        server.register(HANDOFF, bench._handoff)
        address = await server.start()
        stack.push_async_callback(server.stop, 1.0)
        bench._reader_peer = Peer(worker_id=WorkerId("d"), incarnation=Incarnation(1), address=address)
        own = bench.holding.network.server("p:0")
        me = Peer(worker_id=WorkerId("p"), incarnation=Incarnation(1), address=await own.start())
        stack.push_async_callback(own.stop, 1.0)
        bench.holder = HolderService(
            ledger=bench.holding.ledger,
            network=bench.holding.network,
            clock=LiveClock(),
            worker=me,
            identity=IDENTITY,
            transports=TransportSet((sending,)),
            pool=bench.holding.pool,
            checksum=checksum if holder_checksum is None else holder_checksum,
            staging=bench.holding.mirror,
            log=print,
        )
        bench.holder.register(own)
        await stack.enter_async_context(bench.reader)
        await stack.enter_async_context(bench.holder)
        return bench

    # --- a lease's life ---------------------------------------------------------------------------------

    def open(self, num_blocks: int, *, seed: int) -> LeaseId:
        """A lease over blocks of random bytes, all written already."""
        owner = f"prompt {len(self._owners)}"
        blocks = self.holding.ledger.allocate(owner, num_blocks)
        assert blocks is not None
        content = [random.Random(seed * 1000 + index).randbytes(BLOCK_BYTES) for index in range(num_blocks)]
        for block, data in zip(blocks, content, strict=True):
            self.holding.write(block, data)
        lease_id = self.holder.open(
            blocks, self._reader_peer, send_offer=self._send_offer, on_ended=self._ended_at_holder
        )
        self._owners[lease_id] = owner
        self._sent[lease_id] = content
        self._held[lease_id] = blocks
        return lease_id

    def seal(self, lease_id: LeaseId) -> None:
        self.holder.seal(lease_id, len(self._held[lease_id]), SEAL)

    async def hand_off(self, num_blocks: int, *, seed: int, chunk: int = 2) -> LeaseId:
        """A whole handoff, announced chunk by chunk, to its end on both sides."""
        lease_id = self.open(num_blocks, seed=seed)
        for stop in range(chunk, num_blocks, chunk):
            self.holder.advance(lease_id, stop)
            await asyncio.sleep(0.005)
        self.seal(lease_id)
        await self.reader_end(lease_id)
        await self.holder_end(lease_id)
        return lease_id

    async def holder_end(self, lease_id: LeaseId) -> LeaseOutcome:
        await self._until(lambda: lease_id in self._holder_ends)
        return self._holder_ends[lease_id]

    async def reader_end(self, lease_id: LeaseId) -> list[BlockId] | TandemError:
        await self._until(lambda: lease_id in self._reader_ends)
        return self._reader_ends[lease_id]

    def sent_bytes(self, lease_id: LeaseId) -> list[bytes]:
        return self._sent[lease_id]

    def own_blocks(self, lease_id: LeaseId) -> list[BlockId]:
        """The holder's blocks of a lease."""
        return self._held[lease_id]

    def adopted_blocks(self, lease_id: LeaseId) -> list[BlockId] | None:
        end = self._reader_ends.get(lease_id)
        return end if isinstance(end, list) else None

    def adopted_bytes(self, lease_id: LeaseId) -> list[bytes]:
        blocks = self.adopted_blocks(lease_id)
        assert blocks is not None, self._reader_ends.get(lease_id)
        return [self.reading.read(block) for block in blocks]

    def release(self, lease_id: LeaseId) -> None:
        """The reader's request is over."""
        self.reading.ledger.release_all(lease_id)

    async def check_rest(self) -> None:
        """Nothing is held on either side once all requests are over."""
        for lease_id in self._reader_ends:
            self.release(lease_id)
        await self._until(lambda: self.holder.num_leases == self.reader.num_leases == 0)
        for side, service in ((self.holding, self.holder), (self.reading, self.reader)):
            side.ledger.check()
            service.check()
            assert side.ledger.load()["free_blocks"] == NUM_BLOCKS, side.ledger

    # --- callbacks --------------------------------------------------------------------------------------

    async def _send_offer(self, terms: LeaseTerms, timeout_s: float) -> HandoffReply:
        body = HandoffRequest(target=self._reader_peer.incarnation, terms=terms, request=REQUEST)
        channel = self.holding.network.channel(self._reader_peer.address)
        return await channel.call(HANDOFF, body, timeout_s=timeout_s)

    async def _handoff(self, body: HandoffRequest, context: CallContext) -> HandoffReply:
        return self.reader.offer(
            body.terms, owner=body.terms.lease_id, on_adopted=self._adopted, on_aborted=self._ended_at_reader
        )

    def _adopted(self, lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
        self._ended_at_reader(lease_id, blocks)

    def _ended_at_reader(self, lease_id: LeaseId, end: list[BlockId] | TandemError) -> None:
        assert lease_id not in self._reader_ends, f"{lease_id} ended twice"
        self._reader_ends[lease_id] = end

    def _ended_at_holder(self, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
        assert lease_id not in self._holder_ends, f"{lease_id} ended twice"
        self._holder_ends[lease_id] = outcome
        self.reasons[lease_id] = reason
        self.holding.ledger.release_all(self._owners[lease_id])

    async def _until(self, happened: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while True:
                if happened():
                    return
                await asyncio.sleep(0.002)
