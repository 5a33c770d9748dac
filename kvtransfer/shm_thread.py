"""The thread that reads other processes' pools: attaches to them, copies, and lets them go.

Copies are done one after the other; small ones by who asks for them, without the thread. Attaching takes as long as
the holder's process takes to answer, which may be hung: it goes on beside the copies, and what waits for it keeps
nothing else waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import selectors
import socket
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import Cancelled, DeadlineExceeded, IncompatiblePeer, Internal, TandemError, WorkerUnavailable
from kvtransfer.block_copy import BlockCopy, CopyBuild, StopFlag, copy_in_python
from kvtransfer.shm_door import decode_endpoint
from kvtransfer.shm_link import Attaching, Link
from kvtransfer.transport import PullResult

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.clock import Clock
    from kvtransfer.host_pool import HostPool
    from kvtransfer.transport import BlockPair

#: Other processes' pools mapped at a time; the one unused for longest goes first.
MAX_LINKS = 64

#: A pull of so few bytes is copied at once, on the event loop: 0.1 ms, of which waking the thread costs the multiple.
MAX_INLINE_BYTES = 1 << 20

#: How long a door may take to answer when a pull connects by itself.
CONNECT_TIMEOUT_S = 1.0


class Job(ABC):
    """Something to do with the pool behind `endpoint`. Ends once, on the thread."""

    def __init__(self, endpoint: bytes, timeout_s: float) -> None:
        self.endpoint = endpoint
        #: How long the holder may take to hand out its pool.
        self.timeout_s = timeout_s
        self.stop = StopFlag()
        self._loop = asyncio.get_running_loop()

    @abstractmethod
    def fail(self, error: TandemError) -> None:
        """Ends it before it has begun."""

    def _tell(self, callback: Callable[[], None]) -> None:
        # A loop that was closed has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(callback)

    def too_late(self) -> TandemError:
        return DeadlineExceeded(f"no pool attached within {self.timeout_s:g} s")


class ConnectJob(Job):
    """Attaches ahead of the first pull."""

    def __init__(self, endpoint: bytes, timeout_s: float) -> None:
        super().__init__(endpoint, timeout_s)
        self.done: asyncio.Future[TandemError | None] = self._loop.create_future()

    def finish(self, error: TandemError | None) -> None:
        self._tell(lambda: self.done.set_result(error))

    def fail(self, error: TandemError) -> None:
        self.finish(error)


class PullJob(Job):
    """Copies the blocks of `pairs`."""

    def __init__(self, endpoint: bytes, pairs: Sequence[BlockPair], asked_s: float) -> None:
        super().__init__(endpoint, CONNECT_TIMEOUT_S)
        self.pairs = tuple(pairs)
        self.asked_s = asked_s
        self.done: asyncio.Future[PullResult] = self._loop.create_future()

    def finish(self, result: PullResult) -> None:
        self._tell(lambda: self.done.set_result(result))

    def fail(self, error: TandemError) -> None:
        self.finish(PullResult(num_bytes=0, wire_s=0.0, error=error))

    def too_late(self) -> TandemError:
        return WorkerUnavailable(f"the holder handed out no pool within {self.timeout_s:g} s")


@dataclass(slots=True)
class _Attempt:
    """An attach, and what waits for it: each job until a time of its own."""

    attaching: Attaching
    waiting: list[tuple[Job, float]] = field(default_factory=list[tuple[Job, float]])


class TransferThread:
    """Copies, one pull after the other, from other processes' pools into this one's."""

    def __init__(self, pool: HostPool, clock: Clock, build: CopyBuild) -> None:
        self._pool = pool
        self._clock = clock
        #: Until the function is compiled, the loop in Python.
        self._build: CopyBuild | None = build
        self._copy: BlockCopy = copy_in_python
        #: Not looked at yet, and pools to let go. Appended by the loop, taken by the thread.
        self._submitted: deque[Job | bytes] = deque()
        self._closing = threading.Event()
        self._wake, self._woken = socket.socketpair()
        self._wake.setblocking(False)
        self._woken.setblocking(False)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._woken, selectors.EVENT_READ)
        #: Attached pools, least recently used first. The thread alone changes them, and holds the lock when it does.
        self._links: OrderedDict[bytes, Link] = OrderedDict()
        self._links_lock = threading.Lock()
        #: The rest is touched by the thread alone.
        self._attempts: dict[bytes, _Attempt] = {}
        #: Pulls whose pool was attached when they got here, oldest first.
        self._ready: deque[PullJob] = deque()
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="kv-transfer", daemon=True)
        self._thread.start()

    def submit(self, job: Job) -> None:
        self._submitted.append(job)
        self.rouse()

    def pull_now(self, pull: PullJob) -> bool:
        """Does a small pull at once, on the caller's thread, which is the loop's; False: it is not small, or its
        holder is not attached, and nothing was done."""
        if len(pull.pairs) * self._pool.block_bytes > MAX_INLINE_BYTES or not self._links_lock.acquire(blocking=False):
            return False
        try:
            link = self._links.get(pull.endpoint)
            if link is None or not link.alive:
                return False
            pull.done.set_result(self._carry_out(pull, link))
        finally:
            self._links_lock.release()
        return True

    def forget(self, endpoint: bytes) -> None:
        """Lets the pool behind `endpoint` go, after the jobs submitted before."""
        self._submitted.append(endpoint)
        self.rouse()

    def rouse(self) -> None:
        """Has the thread look at stop flags and what was submitted."""
        # A full socket holds enough to wake the thread; a closed one needs nothing any more.
        with contextlib.suppress(OSError):
            self._wake.send(b"x")

    async def close(self) -> None:
        """Ends all jobs, that in hand where its stop flag is set, and then the thread."""
        self._closing.set()
        self.rouse()
        await asyncio.shield(self._ended)
        self._thread.join()
        self._wake.close()

    # --- the thread -------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._closing.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._woken:
                    self._woken.recv(4096)
                elif key.data in self._attempts:
                    self._hear(key.data)
                else:
                    # A link's connection says nothing but its end.
                    self._unlink(key.data)
            while self._submitted:
                self._begin(self._submitted.popleft())
            self._dismiss_waiting()
            if self._ready:
                self._pull(self._ready.popleft())
        self._end_all()
        self._selector.close()
        self._woken.close()
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._ended.set_result, None)

    def _patience_s(self) -> float | None:
        """Until there is something to do without being roused."""
        if self._ready:
            return 0.0
        if not self._attempts:
            return None
        first_s = min(late_s for attempt in self._attempts.values() for _, late_s in attempt.waiting)
        return max(0.0, first_s - self._clock.now_s())

    def _begin(self, job: Job | bytes) -> None:
        if isinstance(job, bytes):
            self._unlink(job)
            return
        try:
            self._heed_stop(job)
            if self._attached(job.endpoint):
                self._go_on(job)
            else:
                self._wait(job)
        except Exception as error:
            job.fail(_as_tandem_error(error))

    def _attached(self, raw: bytes) -> bool:
        link = self._links.get(raw)
        if link is None:
            return False
        if not link.alive:
            self._unlink(raw)
            return False
        with self._links_lock:
            self._links.move_to_end(raw)
        return True

    def _wait(self, job: Job) -> None:
        """Has the job wait for the attach to its pool, begun now if none is under way."""
        attempt = self._attempts.get(job.endpoint)
        if attempt is None:
            endpoint = decode_endpoint(job.endpoint)
            if endpoint.block_bytes != self._pool.block_bytes:
                ours, theirs = self._pool.block_bytes, endpoint.block_bytes
                raise IncompatiblePeer(f"block_bytes: {ours} here, {theirs} there")
            attempt = self._attempts[job.endpoint] = _Attempt(Attaching(endpoint))
            self._selector.register(attempt.attaching.connection, selectors.EVENT_READ, job.endpoint)
        attempt.waiting.append((job, self._clock.now_s() + job.timeout_s))

    def _go_on(self, job: Job) -> None:
        if isinstance(job, ConnectJob):
            job.finish(None)
        elif isinstance(job, PullJob):
            self._ready.append(job)

    def _hear(self, raw: bytes) -> None:
        """The door answered an attach."""
        attempt = self._attempts[raw]
        try:
            link = attempt.attaching.take()
        except Exception as error:
            self._abandon(raw)
            for job, _ in attempt.waiting:
                job.fail(_as_tandem_error(error))
            return
        if link is None:
            return
        # Its connection stays registered: from now on it is the link's.
        del self._attempts[raw]
        with self._links_lock:
            self._links[raw] = link
        for job, _ in attempt.waiting:
            self._go_on(job)
        self._drop_oldest_link()

    def _drop_oldest_link(self) -> None:
        needed = {pull.endpoint for pull in self._ready}
        unused = (raw for raw in self._links if raw not in needed)
        if len(self._links) > MAX_LINKS and (oldest := next(unused, None)) is not None:
            self._unlink(oldest)

    def _dismiss_waiting(self) -> None:
        """Ends what was stopped, or has waited for its holder for too long; gives up attaching for nobody."""
        for raw, attempt in list(self._attempts.items()):
            now_s = self._clock.now_s()
            staying: list[tuple[Job, float]] = []
            for job, late_s in attempt.waiting:
                if job.stop:
                    job.fail(Cancelled("the pull was stopped"))
                elif late_s <= now_s:
                    job.fail(job.too_late())
                else:
                    staying.append((job, late_s))
            attempt.waiting = staying
            if not staying:
                self._abandon(raw)

    def _pull(self, pull: PullJob) -> None:
        link = self._links.get(pull.endpoint)
        if pull.stop or self._closing.is_set():
            pull.fail(Cancelled("the pull was stopped"))
        elif link is None:
            pull.fail(WorkerUnavailable("the holder ended before the pull began"))
        else:
            pull.finish(self._carry_out(pull, link))

    def _carry_out(self, pull: PullJob, link: Link) -> PullResult:
        self._take_native()
        num_bytes = 0
        error: TandemError | None = None
        started_s = self._clock.now_s()
        try:
            num_bytes = self._copy(link, self._pool, self._pool.block_bytes, pull.pairs, pull.stop)
        except Exception as failure:
            error = _as_tandem_error(failure)
        wire_s = self._clock.now_s() - started_s
        if error is None and num_bytes < len(pull.pairs) * self._pool.block_bytes:
            error = Cancelled("the pull was stopped")
        if error is None and not link.alive:
            error = WorkerUnavailable(f"the holder at {link.endpoint!r} ended during the pull")
        return PullResult(num_bytes=num_bytes, wire_s=wire_s, wait_s=started_s - pull.asked_s, error=error)

    def _take_native(self) -> None:
        build = self._build
        if build is not None and build.poll():
            self._copy = build.take()
            self._build = None

    def _heed_stop(self, job: Job) -> None:
        if job.stop or self._closing.is_set():
            raise Cancelled("the pull was stopped")

    def _abandon(self, raw: bytes) -> None:
        attempt = self._attempts.pop(raw)
        self._selector.unregister(attempt.attaching.connection)
        attempt.attaching.close()

    def _unlink(self, raw: bytes) -> None:
        with self._links_lock:
            link = self._links.pop(raw, None)
            if link is not None:
                self._selector.unregister(link.connection)
                link.close()

    def _end_all(self) -> None:
        jobs: list[Job] = [*self._ready, *(job for job in self._submitted if isinstance(job, Job))]
        for raw, attempt in list(self._attempts.items()):
            jobs += [job for job, _ in attempt.waiting]
            self._abandon(raw)
        for job in jobs:
            job.fail(Cancelled("the transport is closed"))
        for raw in list(self._links):
            self._unlink(raw)


def _as_tandem_error(error: Exception) -> TandemError:
    """Whatever went wrong, the job is over, and who waits must know."""
    if isinstance(error, TandemError):
        return error
    return Internal(f"shared-memory transfer: {type(error).__name__}: {error}")
