"""The transport in memory: the promises of `kvtransfer.transport` on any event loop, with faults.

A pull's blocks land all at once, when its modelled time is over, or, where its fate says so, some after others. A
block is read and lands in one instant. A pool is bytes, or whatever a modelled engine keeps per block. Time is the
running loop's, so on a virtual loop everything is deterministic. Nothing here reads a clock or global randomness.
"""

from __future__ import annotations

import asyncio
import contextvars
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from contracts.errors import Cancelled, IncompatiblePeer, InvariantBroken, TandemError, WorkerUnavailable
from kvtransfer.transport import PullResult, check_pairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import BlockId
    from kvtransfer.transport import BlockPair, Pool


@dataclass(frozen=True, slots=True, kw_only=True)
class PullInfo:
    """What a pull's fate may depend on."""

    #: Names of the transports.
    holder: str
    reader: str
    num_bytes: int


#: Asked before blocks land: None: they may; seconds: not now, ask again after so many; an error: the pull ends with it.
Obstacle = Callable[[], float | TandemError | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class PullFate:
    """What becomes of one pull."""

    #: Seconds until its last blocks land, or until its error; obstacles come on top.
    duration_s: float
    #: None: all blocks land. Otherwise the pull ends with this.
    error: TandemError | None = None
    #: False: a request to stop is not heard, and the blocks land when they land.
    heeds_stop: bool = True
    #: The blocks land in so many pieces (never more than blocks), evenly over the duration.
    num_pieces: int = 1
    #: With an error: how many of the pieces land before it.
    num_landed: int = 0
    obstacle: Obstacle | None = None

    def pieces(self, pairs: Sequence[BlockPair]) -> list[Sequence[BlockPair]]:
        """What lands together, in order."""
        count = max(1, min(self.num_pieces, len(pairs)))
        num_landing = count if self.error is None else min(self.num_landed, count)
        return [pairs[len(pairs) * i // count : len(pairs) * (i + 1) // count] for i in range(num_landing)]


#: Decides about one pull when it starts.
FateModel = Callable[[PullInfo], PullFate]


def steady_link(info: PullInfo) -> PullFate:
    """0.1 ms and 4 GB/s, without faults."""
    return PullFate(duration_s=1e-4 + info.num_bytes / 4e9)


class BlockStore(Protocol):
    """What a pull copies between. Both sides of a pull keep the same kind of content."""

    def read_block(self, block_id: BlockId) -> Any: ...

    def write_block(self, block_id: BlockId, content: Any) -> None: ...


class PoolStore:
    """Blocks of bytes in a registered pool."""

    def __init__(self, pool: Pool) -> None:
        self._bytes = pool.view()
        self._block_bytes = pool.block_bytes

    def read_block(self, block_id: BlockId) -> bytes:
        start = block_id * self._block_bytes
        return bytes(self._bytes[start : start + self._block_bytes])

    def write_block(self, block_id: BlockId, content: bytes) -> None:
        start = block_id * self._block_bytes
        self._bytes[start : start + self._block_bytes] = content


class MemoryFabric:
    """The pools that the transports of one in-memory cluster can reach."""

    def __init__(self, fate: FateModel = steady_link) -> None:
        self.fate = fate
        #: Registered and neither closed nor crashed.
        self.transports: dict[bytes, MemoryTransport] = {}
        self._numbers = itertools.count()

    def transport(self, name: str) -> MemoryTransport:
        """One process's side; its pool is made by `register`."""
        return MemoryTransport(self, name, next(self._numbers))

    def over(self, name: str, store: BlockStore, *, num_blocks: int, block_bytes: int) -> MemoryTransport:
        """One process's side over blocks that exist already; `block_bytes` is what the link carries."""
        transport = self.transport(name)
        transport.attach(store, num_blocks, block_bytes)
        return transport


class MemoryPull:
    """`kvtransfer.transport.Pull` in memory. `land` copies blocks; its error ends the pull."""

    def __init__(
        self,
        fate: PullFate,
        pairs: Sequence[BlockPair],
        block_bytes: int,
        land: Callable[[Sequence[BlockPair]], TandemError | None],
    ) -> None:
        loop = asyncio.get_running_loop()
        self._fate = fate
        self._pieces = fate.pieces(pairs)
        self._block_bytes = block_bytes
        self._land = land
        self._num_landed_pieces = 0
        self._num_landed_blocks = 0
        self._started_s = loop.time()
        self._interval_s = fate.duration_s / (len(self._pieces) + (fate.error is not None))
        self._result: asyncio.Future[PullResult] = loop.create_future()
        # Who does not hear a stop is not the reader's program, and lands though that is frozen.
        self._context = None if fate.heeds_stop else contextvars.Context()
        self._timer = loop.call_later(self._interval_s, self._go_on, context=self._context)

    @property
    def terminal(self) -> bool:
        return self._result.done()

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._result)

    def request_stop(self) -> None:
        if self._fate.heeds_stop:
            self._stop("the pull was stopped")

    def forget(self) -> None:
        """The reader's process is gone: nothing lands any more."""
        self._stop("the reader is gone")

    def _stop(self, why: str) -> None:
        self._timer.cancel()
        if not self._result.done():
            self._end(Cancelled(why))

    def _go_on(self) -> None:
        if self._num_landed_pieces == len(self._pieces):
            self._end(self._fate.error)
            return
        obstacle = self._fate.obstacle() if self._fate.obstacle is not None else None
        if isinstance(obstacle, TandemError):
            self._end(obstacle)
        elif obstacle is not None:
            self._wait(obstacle)
        else:
            self._land_next()

    def _land_next(self) -> None:
        piece = self._pieces[self._num_landed_pieces]
        error = self._land(piece)
        if error is not None:
            self._end(error)
            return
        self._num_landed_pieces += 1
        self._num_landed_blocks += len(piece)
        if self._num_landed_pieces == len(self._pieces) and self._fate.error is None:
            self._end(None)
        else:
            self._wait(self._interval_s)

    def _wait(self, delay_s: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._go_on, context=self._context)

    def _end(self, error: TandemError | None) -> None:
        wire_s = asyncio.get_running_loop().time() - self._started_s
        num_bytes = self._num_landed_blocks * self._block_bytes
        self._result.set_result(PullResult(num_bytes=num_bytes, wire_s=wire_s, error=error))


class MemoryTransport:
    """`kvtransfer.transport.Transport` in memory; made by `MemoryFabric.transport`."""

    name = "memory"

    def __init__(self, fabric: MemoryFabric, worker: str, number: int) -> None:
        self._fabric = fabric
        self._worker = worker
        self._endpoint = f"memory/{number}/{worker}".encode()
        self._num_blocks = 0
        self._block_bytes = 0
        #: None before a pool is registered.
        self._store: BlockStore | None = None
        #: Pulls that may not be terminal.
        self._pulls: list[MemoryPull] = []

    def __repr__(self) -> str:
        return f"<MemoryTransport {self._endpoint.decode()} [{self._num_blocks} x {self._block_bytes} bytes]>"

    def register(self, pool: Pool) -> None:
        self.attach(PoolStore(pool), pool.num_blocks, pool.block_bytes)

    def attach(self, store: BlockStore, num_blocks: int, block_bytes: int) -> None:
        if self._store is not None:
            raise InvariantBroken(f"{self!r} registers a second pool")
        self._store = store
        self._num_blocks = num_blocks
        self._block_bytes = block_bytes
        self._fabric.transports[self._endpoint] = self

    def endpoint(self) -> bytes:
        if self._store is None:
            raise InvariantBroken(f"{self!r} has no pool registered")
        return self._endpoint

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        self._peer(endpoint)

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> MemoryPull:
        num_bytes = len(pairs) * self._block_bytes
        holder = endpoint.decode().split("/", 2)[-1]
        fate = self._fabric.fate(PullInfo(holder=holder, reader=self._worker, num_bytes=num_bytes))
        pull = MemoryPull(fate, tuple(pairs), self._block_bytes, lambda piece: self._land(endpoint, piece))
        self._pulls = [*(each for each in self._pulls if not each.terminal), pull]
        return pull

    def forget(self, endpoint: bytes) -> None:
        """Nothing is kept for a holder."""

    def crash(self) -> None:
        """The process is gone: nobody reaches its pool any more, and its own pulls never land."""
        self._fabric.transports.pop(self._endpoint, None)
        for pull in self._pulls:
            pull.forget()

    async def close(self) -> None:
        for pull in self._pulls:
            pull.request_stop()
            await pull.wait()
        self._fabric.transports.pop(self._endpoint, None)

    def _peer(self, endpoint: bytes) -> MemoryTransport:
        peer = self._fabric.transports.get(endpoint)
        if peer is None:
            raise WorkerUnavailable(f"no pool at {endpoint.decode()}")
        if peer._block_bytes != self._block_bytes:
            raise IncompatiblePeer(f"block_bytes: {self._block_bytes} here, {peer._block_bytes} there")
        return peer

    def _land(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> TandemError | None:
        try:
            peer = self._peer(endpoint)
            check_pairs(pairs, peer._num_blocks, self._num_blocks)
        except TandemError as error:
            return error
        assert self._store is not None, f"{self!r} pulled without a pool"
        assert peer._store is not None, f"{peer!r} is reachable without a pool"
        for source, target in pairs:
            self._store.write_block(target, peer._store.read_block(source))
        return None
