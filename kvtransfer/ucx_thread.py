"""The one thread of a UCX transport: every call into NIXL is made here.

Pulls advance side by side, part by part. A part that is posted cannot be taken back: whatever became of its
pull, its bytes may land until NIXL reports the part over. So a pull that was stopped posts nothing more, and is
terminal once its last posted part is. The same goes for a connection, and for the thread itself.

There are two agents. Others read from one, which has a thread of NIXL's to answer them while this one sleeps. The other
one reads, and has none: two threads that look after one agent get in each other's way, at twice the processor time.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import threading
from collections import OrderedDict
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING

from contracts.errors import (
    BadRequest,
    Cancelled,
    ConfigError,
    IncompatiblePeer,
    Internal,
    NoCapacity,
    TandemError,
    WorkerUnavailable,
)
from kvtransfer.host_pool import address_of
from kvtransfer.ucx_agent import Agent, State, Unreachable
from kvtransfer.ucx_endpoint import UcxEndpoint, decode_endpoint
from kvtransfer.ucx_work import Peer, Work, device_of

if TYPE_CHECKING:
    from contracts.clock import Clock
    from contracts.ids import Incarnation
    from kvtransfer.transport import Pool

#: Parts of one pull under way at a time: all that still lands after a stop. Two keep a connection busy.
PARTS_AHEAD = 2

#: Pulls from one peer that are under way at a time; the others wait, in order.
MAX_ACTIVE_PULLS = 8

#: Peers known at a time; the one unused for longest goes first.
MAX_PEERS = 256

#: NIXL reports all reads of a broken connection as over once it has seen one fail, without asking the hardware
#: about the others. They count as over only this much later.
SETTLE_S = 0.25

#: Between two looks at reads under way the thread sleeps this share of the time in which none of them ended. Nobody
#: else takes what arrives over TCP, so it must not take long: with 5 ms a fast network waits for the reader.
SLEEP_SHARE = 1 / 16
SHORTEST_SLEEP_S = 50e-6
LONGEST_SLEEP_S = 1e-3

#: Where none ended for so long, the network is slow or the holder stands still, and it sleeps longer.
STALLED_AFTER_S = 1.0
STALLED_SLEEP_S = 10e-3

#: How often idle connections are looked after: keep-alives that nobody takes would fill them in the end.
PROGRESS_INTERVAL_S = 1.0

#: After a connection broke, pulls from that peer fail at once for so long; then one tries again. UCX keeps a
#: socket for good with every vain attempt at a process of this machine that has died.
RECONNECT_AFTER_S = 1.0

#: How long NIXL may take to start and to register the pool; RDMA pins all of it.
START_TIMEOUT_S = 120.0


class Forget:
    """The life behind an endpoint is over."""

    def __init__(self, endpoint: bytes) -> None:
        self.endpoint = endpoint


class UcxThread:
    """Owns the agents, the peers, and all pulls into one pool."""

    def __init__(
        self, pool: Pool, clock: Clock, *, agent: str, interface: str | None, incarnation: Incarnation
    ) -> None:
        """Returns when the pool is registered. Raises ConfigError where that cannot be."""
        self._pool = pool
        # NIXL may write until the thread ends: the memory stays mapped that long, whoever else lets go of it.
        self._mapping: memoryview | None = pool.view() if device_of(pool) is None else None
        self._clock = clock
        #: From the loop to the thread, which waits for them; None: to look again.
        self._jobs: SimpleQueue[Work | Forget | None] = SimpleQueue()
        self._closing = False
        #: By endpoint, least recently used first.
        self._peers: OrderedDict[bytes, Peer] = OrderedDict()
        #: Broken connections, oldest first: until when, and why.
        self._broken: OrderedDict[bytes, tuple[float, TandemError]] = OrderedDict()
        self._quiet_since_s = 0.0
        self._started = threading.Event()
        self._start_error: TandemError | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ended = asyncio.Event()
        #: Set once started, for good.
        self.endpoint: UcxEndpoint | None = None
        self.scratch_address = 0
        arguments = (agent, interface, incarnation)
        self._thread = threading.Thread(target=self._run, args=arguments, name="kv-ucx", daemon=True)
        self._thread.start()
        if not self._started.wait(START_TIMEOUT_S):
            raise ConfigError(f"UCX did not register {pool!r} within {START_TIMEOUT_S:g} s")
        if self._start_error is not None:
            self._thread.join()
            raise self._start_error

    def submit(self, job: Work | Forget) -> None:
        self._jobs.put(job)

    def rouse(self) -> None:
        self._jobs.put(None)

    async def close(self, timeout_s: float) -> bool:
        """Stops everything; whether all of it became terminal, and the thread ended, within the time. Otherwise
        the thread goes on by itself until it is so, and keeps the pool's memory until then."""
        self._loop = asyncio.get_running_loop()
        self._closing = True
        self.rouse()
        try:
            async with asyncio.timeout(timeout_s):
                await self._ended.wait()
        except TimeoutError:
            return False
        self._thread.join()
        return True

    # --- on the thread ----------------------------------------------------------------------------------

    def _run(self, name: str, interface: str | None, incarnation: Incarnation) -> None:
        # Probes read into it. The agent must be gone before it is.
        scratch = mmap.mmap(-1, mmap.PAGESIZE)
        try:
            serving, reading = self._start(name, interface, incarnation, scratch)
        except TandemError as error:
            self._start_error = error
        except Exception as error:
            self._start_error = Internal(f"UCX transport: {type(error).__name__}: {error}")
        else:
            self._started.set()
            self._work(reading)
            reading.close()
            serving.close()
        self._mapping = None
        self._started.set()
        if self._loop is not None:
            # A loop that was closed has nobody left to tell.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._ended.set)

    def _start(
        self, name: str, interface: str | None, incarnation: Incarnation, scratch: mmap.mmap
    ) -> tuple[Agent, Agent]:
        """The agent that others read from, and the one that reads."""
        device = device_of(self._pool)
        agents: list[Agent] = []
        try:
            for serves in (True, False):
                agent = Agent(name if serves else f"{name}/reader", interface, serves=serves)
                agents.append(agent)
                agent.register(self._pool.address, self._pool.num_blocks * self._pool.block_bytes, device)
            serving, reading = agents
            self.scratch_address = address_of(scratch)
            reading.register(self.scratch_address, mmap.PAGESIZE, None)
        except BaseException:
            for agent in agents:
                agent.close()
            raise
        self.endpoint = UcxEndpoint(
            agent=name,
            metadata=serving.metadata(),
            software=serving.software,
            address=self._pool.address,
            num_blocks=self._pool.num_blocks,
            block_bytes=self._pool.block_bytes,
            device=device,
            incarnation=incarnation,
        )
        return serving, reading

    def _work(self, agent: Agent) -> None:
        """Until it is closing, and everything is terminal."""
        moved = True
        while not self._closing or self._peers or not self._jobs.empty():
            moved = self._take_jobs(agent, self._patience_s(moved))
            for endpoint, peer in list(self._peers.items()):
                moved = self._advance(agent, endpoint, peer) or moved
            if not moved and self._idle:
                agent.progress()

    @property
    def _idle(self) -> bool:
        return all(peer.idle for peer in self._peers.values())

    def _patience_s(self, moved: bool) -> float | None:
        """How long to wait for a job; None: until there is one."""
        now_s = self._clock.now_s()
        if moved:
            self._quiet_since_s = now_s
            return 0.0
        if self._idle:
            return PROGRESS_INTERVAL_S if self._peers else None
        quiet_s = now_s - self._quiet_since_s
        if quiet_s > STALLED_AFTER_S:
            return STALLED_SLEEP_S
        return min(max(quiet_s * SLEEP_SHARE, SHORTEST_SLEEP_S), LONGEST_SLEEP_S)

    def _take_jobs(self, agent: Agent, timeout_s: float | None) -> bool:
        """Waits so long for a job, and takes all there are; whether there was any."""
        try:
            job = self._jobs.get(timeout=timeout_s) if timeout_s != 0.0 else self._jobs.get_nowait()
        except Empty:
            return False
        while True:
            if isinstance(job, Work):
                self._admit(agent, job)
            elif job is not None:
                self._forget(job.endpoint)
            if self._jobs.empty():
                return True
            job = self._jobs.get_nowait()

    def _admit(self, agent: Agent, work: Work) -> None:
        try:
            if self._closing:
                raise Cancelled("the transport is closing")
            peer = self._peers.get(work.endpoint) or self._connect(agent, work.endpoint)
            if peer.ending is not None:
                raise peer.ending
        except TandemError as error:
            work.error = error
            work.finish(self._clock.now_s())
        else:
            self._peers.move_to_end(work.endpoint)
            peer.waiting.append(work)

    def _forget(self, endpoint: bytes) -> None:
        self._broken.pop(endpoint, None)
        peer = self._peers.get(endpoint)
        if peer is not None:
            self._end(peer, WorkerUnavailable(f"the holder {peer.endpoint.agent} is gone"))

    def _connect(self, agent: Agent, raw: bytes) -> Peer:
        """Raises BadRequest, IncompatiblePeer, NoCapacity or WorkerUnavailable."""
        until_s, broken = self._broken.get(raw, (0.0, None))
        if broken is not None and self._clock.now_s() < until_s:
            raise broken
        endpoint = decode_endpoint(raw)
        if endpoint.block_bytes != self._pool.block_bytes:
            ours, theirs = self._pool.block_bytes, endpoint.block_bytes
            raise IncompatiblePeer(f"block_bytes: {ours} here, {theirs} there")
        if endpoint.software != agent.software:
            raise IncompatiblePeer(f"transport ucx: {agent.software} here, {endpoint.software} there")
        if len(self._peers) >= MAX_PEERS:
            self._drop_unused(agent)
        try:
            name = agent.add(endpoint.metadata)
        except Unreachable as error:
            raise WorkerUnavailable(f"the holder {endpoint.agent} cannot be reached over UCX: {error}") from error
        peer = Peer(name, endpoint)
        self._peers[raw] = peer
        return peer

    def _drop_unused(self, agent: Agent) -> None:
        for raw, peer in self._peers.items():
            if peer.idle:
                agent.remove(peer.name)
                del self._peers[raw]
                return
        raise NoCapacity(f"pulls from {MAX_PEERS} holders are under way already")

    def _advance(self, agent: Agent, raw: bytes, peer: Peer) -> bool:
        """One turn for each of the peer's pulls; whether anything changed."""
        if self._closing:
            self._end(peer, Cancelled("the transport is closing"))
        moved = False
        # A pull that was stopped before its turn posts nothing, so it need not wait for one.
        for work in [each for each in peer.waiting if each.stop_requested]:
            peer.waiting.remove(work)
            peer.active.append(work)
        while peer.waiting and len(peer.active) < MAX_ACTIVE_PULLS:
            peer.active.append(peer.waiting.popleft())
        for work in list(peer.active):
            moved = self._post(agent, peer, work) or moved
            moved = self._collect(peer, work) or moved
            if self._is_over(peer, work):
                peer.active.remove(work)
                work.finish(self._clock.now_s())
                moved = True
        if peer.ending is not None and peer.idle:
            agent.remove(peer.name)
            del self._peers[raw]
            moved = True
        return moved

    def _collect(self, peer: Peer, work: Work) -> bool:
        """Takes the reads that are over."""
        under_way = [read for read in work.reads if read.poll() is State.BUSY]
        if len(under_way) == len(work.reads):
            return False
        for read in work.reads:
            if read.state is State.DONE:
                work.num_bytes += read.num_bytes
            elif read.state is State.FAILED:
                self._break(peer, work, read.failure)
            if read.state is not State.BUSY:
                read.release()
        work.reads = under_way
        return True

    def _post(self, agent: Agent, peer: Peer, work: Work) -> bool:
        """Posts one part, where there is one and its turn has come."""
        if work.exhausted or work.error is not None or len(work.reads) >= PARTS_AHEAD:
            return False
        if peer.ending is not None or work.stop_requested:
            work.error = Cancelled("the pull was stopped") if work.stop_requested else peer.ending
            return True
        posted_s = self._clock.now_s()
        try:
            read = work.next_read(agent, peer, self._pool)
        except BadRequest as error:
            work.error = error
        except Unreachable as error:
            self._break(peer, work, str(error))
        except Exception as error:
            # Whatever went wrong, who waits must know.
            work.error = Internal(f"UCX transfer: {type(error).__name__}: {error}")
        else:
            if read is not None:
                if work.first_post_s is None:
                    work.first_post_s = posted_s
                work.reads.append(read)
        return True

    def _is_over(self, peer: Peer, work: Work) -> bool:
        if work.reads:
            return False
        if work.error is None:
            return work.exhausted
        return self._clock.now_s() >= work.settled_s

    def _break(self, peer: Peer, work: Work, failure: str) -> None:
        """The connection is of no use any more: all of the peer's pulls fail, and a later one connects anew."""
        gone = WorkerUnavailable(f"the holder {peer.endpoint.agent} ended or cannot be reached: {failure}")
        if work.error is None or isinstance(work.error, Cancelled):
            work.error = gone
        work.settled_s = self._clock.now_s() + SETTLE_S
        self._end(peer, gone)
        self._broken[work.endpoint] = (self._clock.now_s() + RECONNECT_AFTER_S, gone)
        self._broken.move_to_end(work.endpoint)
        if len(self._broken) > MAX_PEERS:
            self._broken.popitem(last=False)

    def _end(self, peer: Peer, error: TandemError) -> None:
        """Nothing more is posted to it; what waits ends, and what is under way runs out."""
        if peer.ending is None:
            peer.ending = error
        while peer.waiting:
            work = peer.waiting.popleft()
            work.error = peer.ending
            work.finish(self._clock.now_s())
