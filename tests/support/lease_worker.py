"""A process with one side of leased pulls over gRPC and UCX, for tests on two machines.

    python -m tests.support.lease_worker holder|reader ADDRESS INTERFACE BLOCKS BYTES TTL_S

Prints one JSON line once it serves, `{"address": …}`, then answers each JSON line of its standard input with
another: `["open", "10.0.0.2:99", 3]` calls the method `open` of its side. Lives until its input ends.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.ids import GatewayId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.messages import HANDOFF, HandoffReply, HandoffRequest, LeaseTerms, Peer, Seal
from contracts.requests import GenerateRequest, SamplingParams
from kvtransfer import HolderService, LeaseOutcome, Ledger, ReaderService, TransportSet
from kvtransfer.ucx import UcxTransport
from rpc import GrpcNetwork, LiveClock
from tests.support.pools import register_pool
from tests.support.ucx_holder import content, words
from tests.unit.kvtransfer.builders import IDENTITY, SEAL

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from contracts.ids import BlockId
    from rpc import CallContext, Server

#: Of the processes of one test; their network is private.
TOKEN = "two machines"

#: What a block of another request holds.
CANARY = 0xC0FFEE

READER = Incarnation(1)
HOLDER = Incarnation(7)

REQUEST = GenerateRequest(
    request_id=RequestId("q"),
    gateway_id=GatewayId("g"),
    token_ids=(1,),
    num_prompt_tokens=1,
    sampling=SamplingParams(max_tokens=1),
    deadline_s=600.0,
)


def log(line: str) -> None:
    sys.stderr.write(line + "\n")


class Side:
    """What both sides have."""

    def __init__(self, interface: str, num_blocks: int, block_bytes: int, incarnation: Incarnation) -> None:
        self._block_bytes = block_bytes
        self._ledger = Ledger(num_blocks)
        self.network = GrpcNetwork(token=TOKEN)
        transport = UcxTransport(clock=LiveClock(), incarnation=incarnation, worker_name="w", interface=interface)
        self._pool = words(register_pool(transport, num_blocks, block_bytes), block_bytes)
        self._transports = TransportSet((transport,))
        #: How leases ended.
        self._ends: dict[str, str] = {}

    async def start(self, server: Server, stack: AsyncExitStack, ttl_s: float) -> str:
        """Its address, once it serves."""
        raise NotImplementedError

    def load(self) -> dict[str, Any]:
        """The ledger's classes, after an audit."""
        self._ledger.check()
        return {name: value for name, value in self._ledger.load().items() if name.endswith("_blocks")}

    def ends(self) -> dict[str, str]:
        return self._ends


class HolderSide(Side):
    async def start(self, server: Server, stack: AsyncExitStack, ttl_s: float) -> str:
        address = await server.start()
        self._service = HolderService(
            ledger=self._ledger,
            network=self.network,
            clock=LiveClock(),
            worker=Peer(worker_id=WorkerId("p0"), incarnation=HOLDER, address=address),
            identity=IDENTITY,
            transports=self._transports,
            ttl_s=ttl_s,
            log=log,
        )
        self._service.register(server)
        await stack.enter_async_context(self._service)
        return address

    def open(self, reader_address: str, num_blocks: int) -> dict[str, Any]:
        """Leases so many blocks, all of them written; how, and which."""
        reader = Peer(worker_id=WorkerId("d0"), incarnation=READER, address=reader_address)
        blocks = self._ledger.allocate("prompt", num_blocks)
        assert blocks is not None, f"no {num_blocks} blocks in {self._ledger!r}"
        self._pool[blocks] = content(blocks, self._block_bytes)

        async def send_offer(terms: LeaseTerms, timeout_s: float) -> HandoffReply:
            body = HandoffRequest(target=reader.incarnation, terms=terms, request=REQUEST)
            return await self.network.channel(reader.address).call(HANDOFF, body, timeout_s=timeout_s)

        lease_id = self._service.open(blocks, reader, send_offer=send_offer, on_ended=self._ended)
        self._service.seal(lease_id, num_blocks, SEAL)
        self._ledger.release("prompt", blocks)
        return {"lease": lease_id, "blocks": blocks}

    def _ended(self, lease_id: LeaseId, outcome: LeaseOutcome, reason: str) -> None:
        self._ends[lease_id] = outcome.value


class ReaderSide(Side):
    async def start(self, server: Server, stack: AsyncExitStack, ttl_s: float) -> str:
        self._service = ReaderService(
            ledger=self._ledger,
            network=self.network,
            clock=LiveClock(),
            transports=self._transports,
            identity=IDENTITY,
            log=log,
        )
        self._service.register(server)
        server.register(HANDOFF, self._handoff)
        await stack.enter_async_context(self._service)
        return await server.start()

    def landed(self) -> int:
        """Words of the pool that came from a holder."""
        return int(np.count_nonzero(self._pool > CANARY))

    def holds(self, lease_id: str, sources: list[int]) -> bool:
        """Whether these are, in order, the contents of the adopted blocks."""
        expected = content(sources, self._block_bytes)
        return bool(np.array_equal(self._pool[self._ledger.blocks_of(lease_id)], expected))

    def reuse(self) -> int:
        """Another request takes all free blocks and writes them; how many it has then."""
        free = self._ledger.load()["free_blocks"]
        blocks: list[BlockId] = (self._ledger.allocate("other", int(free)) or []) if free else []
        self._pool[blocks] = CANARY
        return len(self._ledger.blocks_of("other"))

    def intact(self) -> bool:
        """Nobody wrote into the blocks of that other request."""
        return bool((self._pool[self._ledger.blocks_of("other")] == CANARY).all())

    def release(self, owner: str) -> None:
        self._ledger.release_all(owner)
        self._service.blocks_freed()

    async def _handoff(self, body: HandoffRequest, context: CallContext) -> HandoffReply:
        return self._service.offer(
            body.terms, owner=body.terms.lease_id, on_adopted=self._adopted, on_aborted=self._aborted
        )

    def _adopted(self, lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
        self._ends[lease_id] = "adopted"

    def _aborted(self, lease_id: LeaseId, error: TandemError) -> None:
        self._ends[lease_id] = f"{error.code}: {error.message}"


async def serve(kind: str, address: str, interface: str, num_blocks: int, block_bytes: int, ttl_s: float) -> None:
    incarnation = HOLDER if kind == "holder" else READER
    side = (HolderSide if kind == "holder" else ReaderSide)(interface, num_blocks, block_bytes, incarnation)
    async with AsyncExitStack() as stack:
        server = side.network.server(f"{address}:0")
        serving = await side.start(server, stack, ttl_s)
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(lines), sys.stdin)
        answer: object = {"address": serving}
        while True:
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
            line = await lines.readline()
            if not line:
                break
            method, *arguments = json.loads(line)
            answer = getattr(side, method)(*arguments)
        await server.stop(0.0)


if __name__ == "__main__":
    kind, address, interface, *numbers = sys.argv[1:]
    asyncio.run(serve(kind, address, interface, int(numbers[0]), int(numbers[1]), float(numbers[2])))
