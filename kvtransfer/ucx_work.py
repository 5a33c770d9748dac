"""What a UCX transport reads from a peer: pulls, in parts, and the probe of a connection."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.transport import PullResult, check_pairs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from contracts.errors import TandemError
    from kvtransfer.transport import BlockPair, Pool
    from kvtransfer.ucx_agent import Agent, Pieces, Read
    from kvtransfer.ucx_endpoint import UcxEndpoint

    Blocks = NDArray[np.int64]

    #: Source blocks, target blocks, and how many blocks follow each other from there on.
    Runs = tuple[Blocks, Blocks, Blocks]

#: Bytes posted at a time, in whole blocks. Small enough that other pulls soon get a turn.
PART_BYTES = 8 << 20

#: Bytes that a probe reads.
PROBE_BYTES = 8


def device_of(pool: Pool) -> int | None:
    """The number of the CUDA device that holds the pool; None: host memory."""
    device: int | None = getattr(pool, "device", None)
    return device


def checked_columns(pairs: Sequence[BlockPair], num_source_blocks: int, num_own_blocks: int) -> tuple[Blocks, Blocks]:
    """Source blocks, target blocks. Raises BadRequest where a pair names a block that one of the two pools does not
    have."""
    flat = np.fromiter(itertools.chain.from_iterable(pairs), np.int64, 2 * len(pairs))
    sources, targets = flat[::2].copy(), flat[1::2].copy()
    # A negative number is a very large one without its sign.
    if len(pairs) and (
        sources.view(np.uint64).max() >= num_source_blocks or targets.view(np.uint64).max() >= num_own_blocks
    ):
        check_pairs(pairs, num_source_blocks, num_own_blocks)
    return sources, targets


def joined(sources: Blocks, targets: Blocks) -> Runs:
    """As `kvtransfer.transport.runs`, but at a cost per block that does not show beside that of copying it. There is
    at least one pair."""
    num_pairs = len(sources)
    begins = np.empty(num_pairs, np.bool_)
    begins[0] = True
    begins[1:] = (sources[1:] - sources[:-1] != 1) | (targets[1:] - targets[:-1] != 1)
    firsts = np.flatnonzero(begins)
    lengths = np.empty_like(firsts)
    lengths[:-1] = firsts[1:] - firsts[:-1]
    lengths[-1] = num_pairs - firsts[-1]
    return sources[firsts], targets[firsts], lengths


def pieces(address: int, device: int | None, blocks: Blocks, lengths: Blocks, size: int) -> Pieces:
    """Where runs of blocks lie in a pool, as NIXL wants it."""
    table = np.empty((len(blocks), 3), np.uint64)
    table[:, 0] = blocks * size + address
    table[:, 1] = lengths * size
    table[:, 2] = device or 0
    return table


class Peer:
    """A holder that NIXL knows, and what is read from it. The thread's alone."""

    def __init__(self, name: str, endpoint: UcxEndpoint) -> None:
        self.name = name
        self.endpoint = endpoint
        #: Posting, or with reads under way.
        self.active: list[Work] = []
        #: Not begun, in the order asked.
        self.waiting: deque[Work] = deque()
        #: Set when the connection broke, or the peer's life is over: nothing more is posted.
        self.ending: TandemError | None = None

    @property
    def idle(self) -> bool:
        return not self.active and not self.waiting


class Work:
    """Something to read from one peer. The thread's, except for `stop_requested`."""

    def __init__(self, endpoint: bytes, asked_s: float) -> None:
        self.endpoint = endpoint
        self.asked_s = asked_s
        self.stop_requested = False
        #: Posted and not over, in the order posted.
        self.reads: list[Read] = []
        self.num_bytes = 0
        self.first_post_s: float | None = None
        #: Nothing is left to post.
        self.exhausted = False
        self.error: TandemError | None = None
        #: A pull that failed is not terminal before.
        self.settled_s = 0.0
        self._loop = asyncio.get_running_loop()

    def next_read(self, agent: Agent, peer: Peer, pool: Pool) -> Read | None:
        """Posts the next part, None where there is none, and sets `exhausted` with the last. Raises Unreachable or
        BadRequest."""
        raise NotImplementedError

    def finish(self, now_s: float) -> None:
        """Nothing lands any more: tells who waits. Called once."""
        raise NotImplementedError

    def tell(self, callback: Callable[[], None]) -> None:
        # A loop that was closed has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)


class UcxPull(Work):
    """`kvtransfer.transport.Pull` of the UCX thread."""

    def __init__(self, endpoint: bytes, pairs: Sequence[BlockPair], asked_s: float, rouse: Callable[[], None]) -> None:
        super().__init__(endpoint, asked_s)
        self.pairs = tuple(pairs)
        self._rouse = rouse
        #: Source and target blocks, once checked, and how many of them were posted.
        self._columns: tuple[Blocks, Blocks] | None = None
        self._num_posted = 0
        self._result: asyncio.Future[PullResult] = self._loop.create_future()

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._result)

    def request_stop(self) -> None:
        self.stop_requested = True
        self._rouse()

    def next_read(self, agent: Agent, peer: Peer, pool: Pool) -> Read | None:
        size = pool.block_bytes
        if self._columns is None:
            self._columns = checked_columns(self.pairs, peer.endpoint.num_blocks, pool.num_blocks)
        start, stop = self._num_posted, self._num_posted + max(1, PART_BYTES // size)
        self._num_posted = stop
        self.exhausted = stop >= len(self.pairs)
        if start >= len(self.pairs):
            return None
        sources, targets, lengths = joined(*(column[start:stop] for column in self._columns))
        source_device, target_device = peer.endpoint.device, device_of(pool)
        return agent.read(
            peer.name,
            pieces(peer.endpoint.address, source_device, sources, lengths, size),
            source_device,
            pieces(pool.address, target_device, targets, lengths, size),
            target_device,
        )

    def finish(self, now_s: float) -> None:
        first_s = now_s if self.first_post_s is None else self.first_post_s
        result = PullResult(
            num_bytes=self.num_bytes, wire_s=now_s - first_s, wait_s=first_s - self.asked_s, error=self.error
        )
        self.tell(lambda: self._result.set_result(result))


class Probe(Work):
    """Reads a few bytes of the peer's pool into memory that nobody uses: the connection stands."""

    def __init__(self, endpoint: bytes, asked_s: float, scratch_address: int) -> None:
        """`scratch_address`: of registered host memory."""
        super().__init__(endpoint, asked_s)
        self._scratch_address = scratch_address
        self.done: asyncio.Future[TandemError | None] = self._loop.create_future()

    def next_read(self, agent: Agent, peer: Peer, pool: Pool) -> Read | None:
        self.exhausted = True
        source = np.array([[peer.endpoint.address, PROBE_BYTES, peer.endpoint.device or 0]], np.uint64)
        target = np.array([[self._scratch_address, PROBE_BYTES, 0]], np.uint64)
        return agent.read(peer.name, source, peer.endpoint.device, target, None)

    def finish(self, now_s: float) -> None:
        self.tell(self._settle)

    def _settle(self) -> None:
        if not self.done.done():
            self.done.set_result(self.error)
