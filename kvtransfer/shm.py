"""The shared-memory transport: workers of one machine read each other's pools.

A pull is a memory copy by one thread per process, which lets go of the GIL while it copies: neither the event
loop nor the engine waits. Neighbouring blocks are copied together, in pieces small enough that a stop is soon
heard. Once the thread has reported a pull, nothing of it can land: that is all that "terminal" takes here.

No port is opened. See `kvtransfer.shm_door` for who may read.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import selectors
import socket
import threading
from collections import OrderedDict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import (
    Cancelled,
    ConfigError,
    DeadlineExceeded,
    IncompatiblePeer,
    Internal,
    InvariantBroken,
    TandemError,
    WorkerUnavailable,
)
from kvtransfer.host_pool import HostPool
from kvtransfer.shm_door import Door, decode_endpoint, encode_endpoint
from kvtransfer.shm_link import Link, attach
from kvtransfer.transport import PullResult, check_pairs, runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.clock import Clock
    from contracts.ids import Incarnation
    from kvtransfer.transport import BlockPair, Pool

#: Bytes copied between two looks at the stop flag.
PIECE_BYTES = 4 << 20

#: Other processes' pools mapped at a time; the one unused for longest goes first.
MAX_LINKS = 64

#: How long a door may take to answer when a pull connects by itself.
CONNECT_TIMEOUT_S = 1.0


class ShmPull:
    """`kvtransfer.transport.Pull` of the transfer thread."""

    def __init__(self, endpoint: bytes, pairs: Sequence[BlockPair], asked_s: float) -> None:
        self.endpoint = endpoint
        self.pairs = tuple(pairs)
        self.asked_s = asked_s
        self.stop_requested = threading.Event()
        self._loop = asyncio.get_running_loop()
        self._result: asyncio.Future[PullResult] = self._loop.create_future()

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._result)

    def request_stop(self) -> None:
        self.stop_requested.set()

    def finish(self, result: PullResult) -> None:
        """Called once, by the transfer thread."""
        self._loop.call_soon_threadsafe(self._result.set_result, result)


class _Connect:
    """A request to attach ahead of the first pull."""

    def __init__(self, endpoint: bytes, timeout_s: float) -> None:
        self.endpoint = endpoint
        self.timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[TandemError | None] = self._loop.create_future()

    def finish(self, error: TandemError | None) -> None:
        self._loop.call_soon_threadsafe(self._settle, error)

    def _settle(self, error: TandemError | None) -> None:
        if not self.done.done():
            self.done.set_result(error)


class TransferThread:
    """Copies, one pull after the other, from other processes' pools into this one's."""

    def __init__(self, pool: HostPool, clock: Clock) -> None:
        self._pool = pool
        self._clock = clock
        #: Work not begun, oldest first. Appended by the loop, taken by the thread.
        self._jobs: deque[ShmPull | _Connect] = deque()
        self._closing = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        #: Attached pools, least recently used first; touched by the thread alone.
        self._links: OrderedDict[bytes, Link] = OrderedDict()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
        self._thread.start()

    def submit(self, job: ShmPull | _Connect) -> None:
        self._jobs.append(job)
        self._rouse()

    async def close(self) -> None:
        """Ends the job in hand at its next piece, all others unbegun, and then the thread."""
        self._closing.set()
        self._rouse()
        await asyncio.shield(self._ended)
        self._thread.join()
        self._wake.close()

    def _rouse(self) -> None:
        # A full socket holds enough to wake the thread.
        with contextlib.suppress(BlockingIOError):
            self._wake.send(b"x")

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select():
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                else:
                    # A link's connection says nothing but its end.
                    self._unlink(key.data)
            while self._jobs:
                self._work(self._jobs.popleft())
        for raw in list(self._links):
            self._unlink(raw)
        self._selector.close()
        self._woken.close()
        self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _work(self, job: ShmPull | _Connect) -> None:
        copied = _Copied()
        error: TandemError | None = None
        try:
            if isinstance(job, ShmPull):
                self._pull(job, copied)
            else:
                self._link(job.endpoint, job.timeout_s)
        except TandemError as failure:
            error = failure
        except Exception as failure:
            # Whatever went wrong, the work is over, and who waits must know.
            error = Internal(f"shared-memory transfer: {type(failure).__name__}: {failure}")
        if isinstance(job, ShmPull):
            job.finish(PullResult(num_bytes=copied.num_bytes, wire_s=copied.wire_s, wait_s=copied.wait_s, error=error))
        else:
            job.finish(error)

    def _pull(self, pull: ShmPull, copied: _Copied) -> None:
        self._heed_stop(pull)
        link = self._link(pull.endpoint, CONNECT_TIMEOUT_S)
        check_pairs(pull.pairs, link.endpoint.num_blocks, self._pool.num_blocks)
        started_s = self._clock.now_s()
        copied.wait_s = started_s - pull.asked_s
        try:
            self._copy(link, pull, copied)
        finally:
            copied.wire_s = self._clock.now_s() - started_s
        if not link.alive:
            raise WorkerUnavailable(f"the holder at {link.endpoint!r} ended during the pull")

    def _copy(self, link: Link, pull: ShmPull, copied: _Copied) -> None:
        block_bytes = self._pool.block_bytes
        for first_source, first_target, num_blocks in runs(pull.pairs):
            source = link.address + first_source * block_bytes
            target = self._pool.address + first_target * block_bytes
            end = target + num_blocks * block_bytes
            while target < end:
                self._heed_stop(pull)
                size = min(PIECE_BYTES, end - target)
                ctypes.memmove(target, source, size)
                copied.num_bytes += size
                source += size
                target += size

    def _heed_stop(self, pull: ShmPull) -> None:
        if pull.stop_requested.is_set() or self._closing.is_set():
            raise Cancelled("the pull was stopped")

    def _link(self, raw: bytes, timeout_s: float) -> Link:
        """The link to that endpoint, attached now if there is none or its holder is gone."""
        link = self._links.get(raw)
        if link is not None and not link.alive:
            self._unlink(raw)
            link = None
        if link is None:
            endpoint = decode_endpoint(raw)
            if endpoint.block_bytes != self._pool.block_bytes:
                ours, theirs = self._pool.block_bytes, endpoint.block_bytes
                raise IncompatiblePeer(f"block_bytes: {ours} here, {theirs} there")
            link = attach(endpoint, timeout_s)
            self._links[raw] = link
            self._selector.register(link.connection, selectors.EVENT_READ, raw)
            if len(self._links) > MAX_LINKS:
                self._unlink(next(iter(self._links)))
        self._links.move_to_end(raw)
        return link

    def _unlink(self, raw: bytes) -> None:
        link = self._links.pop(raw, None)
        if link is not None:
            self._selector.unregister(link.connection)
            link.close()


@dataclass(slots=True)
class _Copied:
    """How far a pull got."""

    num_bytes: int = 0
    wire_s: float = 0.0
    wait_s: float = 0.0


class ShmTransport:
    """`kvtransfer.transport.Transport` for workers of one user on one machine. Linux only."""

    name = "shm"

    def __init__(self, *, clock: Clock, incarnation: Incarnation) -> None:
        self._clock = clock
        self._incarnation = incarnation
        #: All three from `register` on, the thread from the first pull on; None again after `close`.
        self._pool: HostPool | None = None
        self._door: Door | None = None
        self._thread: TransferThread | None = None

    def register(self, pool: Pool) -> None:
        if self._pool is not None:
            raise InvariantBroken("a second pool is registered with the shared-memory transport")
        if not isinstance(pool, HostPool):
            raise ConfigError(f"the shared-memory transport serves host memory, not {pool!r}")
        self._pool = pool
        self._door = Door(pool, self._incarnation, self._clock)

    def endpoint(self) -> bytes:
        if self._door is None:
            raise InvariantBroken("the shared-memory transport has no pool registered")
        return encode_endpoint(self._door.endpoint)

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        request = _Connect(endpoint, deadline_s)
        self._transfers().submit(request)
        try:
            async with asyncio.timeout(deadline_s):
                error = await request.done
        except TimeoutError:
            raise DeadlineExceeded(f"no pool attached within {deadline_s:g} s") from None
        if error is not None:
            raise error

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> ShmPull:
        pull = ShmPull(endpoint, pairs, self._clock.now_s())
        self._transfers().submit(pull)
        return pull

    def forget(self, endpoint: bytes) -> None:
        """Nothing to do: the end of the holder's connection is seen by itself, and a mapping harms nobody."""

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        door, self._door = self._door, None
        self._pool = None
        if thread is not None:
            await thread.close()
        if door is not None:
            door.close()

    def _transfers(self) -> TransferThread:
        if self._pool is None:
            raise InvariantBroken("the shared-memory transport has no pool registered, or was closed")
        if self._thread is None:
            self._thread = TransferThread(self._pool, self._clock)
        return self._thread
