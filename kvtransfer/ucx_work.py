"""What a UCX transport reads from a peer: pulls, in parts, and the probe of a connection."""

from __future__ import annotations

import asyncio
import contextlib
from abc import ABC, abstractmethod
from collections import deque
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.transport import PullResult
from kvtransfer.ucx_parts import Part, Region, parts

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.errors import TandemError
    from kvtransfer.transport import BlockPair, Pool
    from kvtransfer.ucx_agent import Agent, Read
    from kvtransfer.ucx_endpoint import UcxEndpoint

#: Bytes posted at a time, in whole blocks. Small enough that other pulls soon get a turn.
PART_BYTES = 16 << 20

#: Bytes that a probe reads.
PROBE_BYTES = 8


def device_of(pool: Pool) -> int | None:
    """The number of the CUDA device that holds the pool; None: host memory."""
    device: int | None = getattr(pool, "device", None)
    return device


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


class Work(ABC):
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

    @abstractmethod
    def next_read(self, agent: Agent, peer: Peer, pool: Pool) -> Read | None:
        """Posts the next part, None where there is none, and sets `exhausted` with the last. Raises Unreachable or
        BadRequest."""

    @abstractmethod
    def finish(self, now_s: float) -> None:
        """Nothing lands any more: tells who waits. Called once."""

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
        #: Not posted yet; None before the pull's turn has come.
        self._parts: deque[Part] | None = None
        self._result: asyncio.Future[PullResult] = self._loop.create_future()

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._result)

    def request_stop(self) -> None:
        self.stop_requested = True
        self._rouse()

    def next_read(self, agent: Agent, peer: Peer, pool: Pool) -> Read | None:
        endpoint, device = peer.endpoint, device_of(pool)
        if self._parts is None:
            source = Region(endpoint.address, endpoint.num_blocks, endpoint.device)
            own = Region(pool.address, pool.num_blocks, device)
            self._parts = deque(parts(self.pairs, source, own, pool.block_bytes, PART_BYTES))
        part = self._parts.popleft() if self._parts else None
        self.exhausted = not self._parts
        return None if part is None else agent.read(peer.name, part, endpoint.device, device)

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
        return agent.read(peer.name, Part(source, target, PROBE_BYTES), peer.endpoint.device, None)

    def finish(self, now_s: float) -> None:
        self.tell(self._settle)

    def _settle(self) -> None:
        if not self.done.done():
            self.done.set_result(self.error)
