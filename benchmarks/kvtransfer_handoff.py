"""A handoff as workers make it, for `benchmarks.kvtransfer`: both lease services, real gRPC, two processes.

Offer, seal, pull over shared memory, confirm, adopt; times of both sides are of the one monotonic clock of the
machine.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from contracts.ids import GatewayId, Incarnation, LeaseId, RequestId, WorkerId
from contracts.layout import PROTOCOL_VERSION, BlockLayout, KvIdentity
from contracts.messages import (
    HANDOFF,
    PROGRESS,
    HandoffReply,
    HandoffRequest,
    LeaseTerms,
    Peer,
    ProgressRequest,
    Seal,
)
from contracts.requests import GenerateRequest, SamplingParams, TokenDelta
from kvtransfer import HolderService, HostPool, LeaseOutcome, Ledger, ReaderService, ShmTransport, TransportSet
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    from types import TracebackType

    from contracts.errors import TandemError
    from contracts.ids import BlockId
    from rpc import CallContext

TIMEOUT_S = 30.0

IDENTITY = KvIdentity(
    model_fingerprint="benchmark",
    layout=BlockLayout(num_layers=12, num_kv_heads=4, head_dim=64, block_tokens=16, dtype="bfloat16"),
    rope_base=10_000.0,
    protocol_version=PROTOCOL_VERSION,
)
#: Of the layout above.
BLOCK_BYTES = IDENTITY.layout.block_bytes

REQUEST = GenerateRequest(
    request_id=RequestId("request"),
    gateway_id=GatewayId("gateway"),
    token_ids=tuple(range(16)),
    num_prompt_tokens=16,
    sampling=SamplingParams(max_tokens=16),
    deadline_s=60.0,
)


class _Side:
    """What both workers have: a pool with its ledger, a transport, and a server."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        self.stack = contextlib.AsyncExitStack()
        self.clock = LiveClock()
        self.incarnation = Incarnation(os.getpid())
        self.ledger = Ledger(num_blocks)
        self.pool = HostPool(num_blocks, block_bytes)
        self.stack.callback(self.pool.close)
        # As a worker's pool that was in use before.
        content = np.frombuffer(self.pool.view(), np.uint8)
        content[:] = 1
        self.transports = TransportSet((ShmTransport(clock=self.clock, incarnation=self.incarnation),))
        self.stack.push_async_callback(self.transports.close)
        self.transports.register(self.pool)
        self.network = GrpcNetwork(token="benchmark")
        self.stack.push_async_callback(self.network.close)
        self.server = self.network.server("127.0.0.1:0")
        self.stack.push_async_callback(self.server.stop, 0.0)

    def peer(self, name: str, address: str) -> Peer:
        return Peer(worker_id=WorkerId(name), incarnation=self.incarnation, address=address)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stack.__aexit__(kind, error, trace)


class Offerer(_Side):
    """The holder: offers its blocks, one lease after the other."""

    def __init__(self, reader: dict[str, Any], num_blocks: int, block_bytes: int) -> None:
        super().__init__(max(64, num_blocks), block_bytes)
        self._reader = Peer(
            worker_id=WorkerId("reader"), incarnation=Incarnation(reader["incarnation"]), address=reader["address"]
        )
        self._num_blocks = num_blocks

    async def __aenter__(self) -> Self:
        address = await self.server.start()
        self._service = HolderService(
            ledger=self.ledger,
            network=self.network,
            clock=self.clock,
            worker=self.peer("holder", address),
            identity=IDENTITY,
            transports=self.transports,
            log=print,
        )
        self._service.register(self.server)
        await self.stack.enter_async_context(self._service)
        return self

    async def offer(self, count: int) -> dict[str, Any]:
        """When each lease was granted, by its id, and when its blocks were free again."""
        granted_s: dict[LeaseId, float] = {}
        released_s: dict[LeaseId, float] = {}
        for _ in range(count):
            ended = asyncio.Event()

            def on_ended(lease_id: LeaseId, outcome: LeaseOutcome, reason: str, ended: asyncio.Event = ended) -> None:
                if outcome is not LeaseOutcome.RELEASED:
                    raise RuntimeError(f"lease {lease_id} ended {outcome}: {reason}")
                released_s[lease_id] = time.monotonic()
                ended.set()

            blocks = self.ledger.allocate("prompt", self._num_blocks)
            assert blocks is not None, "a handoff has ended, so its blocks are free"
            start_s = time.monotonic()
            delta = TokenDelta(request_id=REQUEST.request_id, index=0, token_ids=(5,))
            seal = Seal(num_tokens=len(blocks) * 16, first_delta=delta)
            lease_id = self._service.open(
                blocks, self._reader, send_offer=self._send_offer, on_ended=on_ended, seal=seal
            )
            granted_s[lease_id] = start_s
            async with asyncio.timeout(TIMEOUT_S):
                await ended.wait()
            self.ledger.release("prompt", blocks)
        return {"granted_s": granted_s, "released_s": released_s, "call_s": await self._calls(count)}

    async def _calls(self, count: int) -> list[float]:
        """Seconds of a call to the reader that does next to nothing: progress of a lease that it does not know."""
        channel = self.network.channel(self._reader.address)
        body = ProgressRequest(lease_id=LeaseId("unknown"), holder_incarnation=self.incarnation)
        seconds: list[float] = []
        for _ in range(count):
            start_s = time.perf_counter()
            await channel.call(PROGRESS, body, timeout_s=TIMEOUT_S)
            seconds.append(time.perf_counter() - start_s)
        return seconds

    async def _send_offer(self, terms: LeaseTerms, timeout_s: float) -> HandoffReply:
        body = HandoffRequest(target=self._reader.incarnation, terms=terms, request=REQUEST)
        return await self.network.channel(self._reader.address).call(HANDOFF, body, timeout_s=timeout_s)


class Adopter(_Side):
    """The reader: takes what is offered, notes when it was adopted, and frees it."""

    def __init__(self, num_blocks: int, block_bytes: int) -> None:
        super().__init__(max(64, num_blocks), block_bytes)
        self.adopted_s: dict[LeaseId, float] = {}

    async def __aenter__(self) -> Self:
        self._service = ReaderService(
            ledger=self.ledger,
            network=self.network,
            clock=self.clock,
            transports=self.transports,
            identity=IDENTITY,
            log=print,
        )
        self._service.register(self.server)
        self.server.register(HANDOFF, self._handoff)
        self.address = await self.server.start()
        await self.stack.enter_async_context(self._service)
        return self

    def describe(self) -> dict[str, Any]:
        return {"address": self.address, "incarnation": self.incarnation}

    async def _handoff(self, body: HandoffRequest, context: CallContext) -> HandoffReply:
        lease_id = body.terms.lease_id
        return self._service.offer(body.terms, owner=lease_id, on_adopted=self._adopted, on_aborted=self._aborted)

    def _adopted(self, lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
        self.adopted_s[lease_id] = time.monotonic()
        self.ledger.release_all(lease_id)
        self._service.blocks_freed()

    def _aborted(self, lease_id: LeaseId, error: TandemError) -> None:
        print(f"lease {lease_id} aborted: {error.message}", flush=True)
