"""The shared-memory transport: workers of one machine read each other's pools.

A pull is a memory copy by one thread per process, which lets go of the GIL while it copies: neither the event
loop nor the engine waits. It looks at the stop flag every few MiB. A small pull is copied before `pull` returns. Once a
copy has been reported, nothing of it can land: that is all that "terminal" takes here.

No port is opened. See `kvtransfer.shm_door` for who may read.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from contracts.errors import ConfigError, DeadlineExceeded, InvariantBroken
from kvtransfer.block_copy import CopyBuild
from kvtransfer.host_pool import HostPool
from kvtransfer.shm_door import Door, encode_endpoint
from kvtransfer.shm_thread import ConnectJob, PullJob, TransferThread

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.clock import Clock
    from contracts.ids import Incarnation
    from kvtransfer.transport import BlockPair, Pool, PullResult


class ShmPull:
    """`kvtransfer.transport.Pull` of the transfer thread."""

    def __init__(self, job: PullJob, thread: TransferThread) -> None:
        self._job = job
        self._thread = thread

    async def wait(self) -> PullResult:
        return await asyncio.shield(self._job.done)

    def request_stop(self) -> None:
        self._job.stop.set()
        self._thread.rouse()


class ShmTransport:
    """`kvtransfer.transport.Transport` for workers of one user on one machine. Linux only."""

    name = "shm"

    def __init__(self, *, clock: Clock, incarnation: Incarnation) -> None:
        self._clock = clock
        self._incarnation = incarnation
        self._build = CopyBuild()
        #: All three from `register` on, the thread from the first pull on; None again after `close`.
        self._pool: HostPool | None = None
        self._door: Door | None = None
        self._thread: TransferThread | None = None
        #: Not terminal.
        self._pulls: dict[ShmPull, bytes] = {}

    def register(self, pool: Pool) -> None:
        if self._pool is not None:
            raise InvariantBroken("a second pool is registered with the shared-memory transport")
        if not isinstance(pool, HostPool):
            raise ConfigError(f"the shared-memory transport serves host memory, not {pool!r}")
        self._pool = pool
        self._door = Door(pool, self._incarnation, self._clock)
        self._build.start()

    def endpoint(self) -> bytes:
        if self._door is None:
            raise InvariantBroken("the shared-memory transport has no pool registered")
        return encode_endpoint(self._door.endpoint)

    async def connect(self, endpoint: bytes, deadline_s: float) -> None:
        job = ConnectJob(endpoint, deadline_s)
        self._transfers().submit(job)
        try:
            async with asyncio.timeout(deadline_s):
                error = await asyncio.shield(job.done)
        except TimeoutError:
            # The thread may be busy with a copy.
            raise DeadlineExceeded(f"no pool attached within {deadline_s:g} s") from None
        finally:
            job.stop.set()
        if error is not None:
            raise error

    def pull(self, endpoint: bytes, pairs: Sequence[BlockPair]) -> ShmPull:
        thread = self._transfers()
        job = PullJob(endpoint, pairs, self._clock.now_s())
        pull = ShmPull(job, thread)
        if not thread.pull_now(job):
            self._pulls[pull] = endpoint
            job.done.add_done_callback(lambda _: self._pulls.pop(pull))
            thread.submit(job)
        return pull

    def forget(self, endpoint: bytes) -> None:
        for pull, holder in self._pulls.items():
            if holder == endpoint:
                pull.request_stop()
        if self._thread is not None:
            self._thread.forget(endpoint)

    async def close(self) -> None:
        thread, self._thread = self._thread, None
        door, self._door = self._door, None
        self._pool = None
        for pull in self._pulls:
            pull.request_stop()
        if thread is not None:
            await thread.close()
        if door is not None:
            door.close()
        self._build.close()

    def _transfers(self) -> TransferThread:
        if self._pool is None:
            raise InvariantBroken("the shared-memory transport has no pool registered, or was closed")
        if self._thread is None:
            self._thread = TransferThread(self._pool, self._clock, self._build)
        return self._thread
