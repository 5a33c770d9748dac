"""The frames of every worker: one stream per life of a worker, opened before the first request, kept open."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from contracts.errors import Internal, StaleIncarnation, TandemError, WorkerUnavailable
from contracts.failpoints import Failpoint
from contracts.messages import FRAMES, FramesRequest, WorkerLife

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from contracts.clock import Clock
    from contracts.ids import GatewayId, WorkerId
    from contracts.messages import Peer
    from contracts.requests import Frame
    from gateway.limits import GatewayLimits
    from rpc import Network

    Spawn = Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]]
    OnFrame = Callable[[Peer, Frame], None]
    OnLost = Callable[[Peer, str], None]

_NOT_OPENED = Failpoint("gateway.stream_not_opened", "a worker's stream ends before its first frame")


class WorkerLink:
    """The stream from one life of one worker.

    A worker opens its side with a frame (empty or not), so a stream counts as open from its first frame on.
    `on_lost` is called whenever an open stream ends: frames may be missing from then on.
    """

    def __init__(
        self,
        network: Network,
        clock: Clock,
        gateway_id: GatewayId,
        limits: GatewayLimits,
        peer: Peer,
        on_frame: OnFrame,
        on_lost: OnLost,
        release: Callable[[str], Coroutine[Any, Any, None]],
    ) -> None:
        """`release(address)` is called when this link needs its connection no more."""
        self._network = network
        self._clock = clock
        self._release = release
        self._request = FramesRequest(gateway_id=gateway_id, target=peer.incarnation)
        self._limits = limits
        self._on_frame = on_frame
        self._on_lost = on_lost
        self.peer = peer
        #: Done while the stream is open (None), or after the last try for good (the error); replaced by a
        #: new one with each try. Never an exception: nobody may be waiting.
        self._outcome: asyncio.Future[TandemError | None] = asyncio.get_running_loop().create_future()
        #: Set once no further try will be made.
        self.closed = False
        #: Whether frames have ceased to come, or never did: since the last try that failed.
        self.is_lost = False
        #: When the last one came; None: none ever did.
        self.heard_s: float | None = None

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open" if self._outcome.done() else "opening"
        return f"<WorkerLink {self.peer.worker_id}/{self.peer.incarnation} {state}>"

    async def wait_open(self) -> None:
        """Returns at the first frame; raises the error of the try that is being made."""
        error = await asyncio.shield(self._outcome)
        if error is not None:
            raise error

    async def run(self) -> None:
        """Reads frames until the worker's life is over, or was silent for `reopen_give_up_s`."""
        backoff_s, silent_since_s = self._limits.reopen_backoff_s, self._clock.now_s()
        while True:
            error = await self._read_one_stream()
            if self._outcome.done():
                backoff_s, silent_since_s = self._limits.reopen_backoff_s, self._clock.now_s()
            give_up = self._clock.now_s() - silent_since_s >= self._limits.reopen_give_up_s
            self._fail(error, for_good=give_up or isinstance(error, StaleIncarnation))
            if self.closed:
                await self._release(self.peer.address)
                return
            await self._clock.sleep(backoff_s)
            backoff_s = min(2 * backoff_s, self._limits.max_reopen_backoff_s)

    def close(self, error: TandemError) -> None:
        """Ends this link because a newer life of the worker took its place, or the gateway stops."""
        if not self.closed:
            self._fail(error, for_good=True)

    def _fail(self, error: TandemError, *, for_good: bool) -> None:
        was_open = self._outcome.done()
        if not was_open:
            self._outcome.set_result(error)
        self.closed = for_good
        # One that was given up is worth a try again; an ended life is not.
        self.is_lost = not for_good or isinstance(error, StaleIncarnation)
        self._outcome = asyncio.get_running_loop().create_future()
        if for_good:
            self._outcome.set_result(error)
        if was_open:
            self._on_lost(self.peer, _reason(error))

    async def _read_one_stream(self) -> TandemError:
        """Why the stream ended."""
        if _NOT_OPENED.fires():
            return WorkerUnavailable(f"the stream of worker {self.peer.worker_id} is not opened on purpose")
        try:
            frames = self._network.channel(self.peer.address).stream(
                FRAMES, self._request, idle_timeout_s=self._limits.frames_idle_timeout_s
            )
            async with aclosing(frames):
                expected = 0
                async for frame in frames:
                    self._check(frame, expected)
                    expected += 1
                    self.heard_s = self._clock.now_s()
                    if not self._outcome.done():
                        self._outcome.set_result(None)
                        self.is_lost = False
                    self._on_frame(self.peer, frame)
        except TandemError as error:
            return error
        return WorkerUnavailable(f"worker {self.peer.worker_id} closed its stream")

    def _check(self, frame: Frame, expected: int) -> None:
        peer = self.peer
        if frame.worker_id != peer.worker_id or frame.incarnation != peer.incarnation:
            raise StaleIncarnation(
                f"{peer.worker_id}/{peer.incarnation} was expected, {frame.worker_id}/{frame.incarnation} answered"
            )
        if frame.sequence_number != expected:
            raise Internal(f"worker {peer.worker_id} sent frame {frame.sequence_number}, {expected} was expected")


class WorkerLinks:
    """All links of a gateway, one per worker id."""

    def __init__(
        self,
        network: Network,
        clock: Clock,
        gateway_id: GatewayId,
        limits: GatewayLimits,
        spawn: Spawn,
        on_frame: OnFrame,
        on_lost: OnLost,
    ) -> None:
        self._network = network
        self._clock = clock
        self._gateway_id = gateway_id
        self._limits = limits
        self._spawn = spawn
        self._on_frame = on_frame
        self._on_lost = on_lost
        #: The newest life seen of each worker.
        self._links: dict[WorkerId, tuple[WorkerLink, asyncio.Task[None]]] = {}

    def ensure(self, peer: Peer) -> WorkerLink:
        """The link to this life of the worker, started when there is none; an older life's is lost.

        Raises StaleIncarnation when a newer life is known.
        """
        known = self._links.get(peer.worker_id)
        if known is not None:
            link, task = known
            if link.peer.incarnation > peer.incarnation:
                raise StaleIncarnation(f"worker {peer.worker_id} has restarted")
            if link.peer == peer and not link.closed:
                return link
            task.cancel()
            link.close(StaleIncarnation(f"worker {peer.worker_id} has restarted"))
            if link.peer.address != peer.address:
                self._spawn(self._release(link.peer.address))
        return self._start(peer)

    def lost(self) -> set[WorkerLife]:
        """Lives whose frames do not reach us."""
        links = (link for link, _ in self._links.values() if link.is_lost)
        return {WorkerLife(link.peer.worker_id, link.peer.incarnation) for link in links}

    def heard(self, within_s: float) -> set[WorkerLife]:
        """Lives from which a frame came within that time."""
        since_s = self._clock.now_s() - within_s
        links = (link for link, _ in self._links.values() if link.heard_s is not None and link.heard_s >= since_s)
        return {WorkerLife(link.peer.worker_id, link.peer.incarnation) for link in links}

    def close(self) -> None:
        for link, task in self._links.values():
            task.cancel()
            link.close(WorkerUnavailable("the gateway stopped"))
        self._links.clear()

    async def _release(self, address: str) -> None:
        """Lets a connection go, unless another worker lives at its address now."""
        if all(link.closed or link.peer.address != address for link, _ in self._links.values()):
            await self._network.drop(address)

    def _start(self, peer: Peer) -> WorkerLink:
        link = WorkerLink(
            self._network,
            self._clock,
            self._gateway_id,
            self._limits,
            peer,
            self._on_frame,
            self._on_lost,
            self._release,
        )
        self._links[peer.worker_id] = (link, self._spawn(link.run()))
        return link


def _reason(error: TandemError) -> str:
    """For clients: without addresses, which the transport's own messages carry."""
    if isinstance(error, StaleIncarnation):
        return "it has restarted"
    known = {"deadline_exceeded": "it was silent for too long", "worker_unavailable": "its stream ended"}
    return known.get(error.code, f"its stream failed ({error.code})")
