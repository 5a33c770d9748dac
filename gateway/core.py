"""The gateway without HTTP: takes token ids, gives back each request's tokens in order, once.

The shell around `gateway.ownership`: it carries out what the machines return (calls, timers, buffers) and
feeds them what happens. Nothing here waits for a client: a request whose client is slow is cancelled, the
frames of the others go on. Time is the injected `Clock` and the running loop's timers, so the same code
runs on a virtual loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

from contracts.errors import (
    ConfigError,
    Internal,
    InvariantBroken,
    NoCapacity,
    NotFound,
    NotReady,
    TandemError,
    Unauthorized,
    WorkerUnavailable,
)
from contracts.ids import RequestId
from contracts.messages import (
    MEMBERS,
    PREFILL,
    DispatchItem,
    Empty,
    Member,
    Peer,
    Placement,
    PrefillRequest,
    RequestKey,
)
from contracts.requests import GenerateRequest, SamplingParams
from gateway import ownership as own
from gateway.cancels import CancelQueue
from gateway.dispatching import Dispatcher
from gateway.links import WorkerLinks

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from structlog.typing import FilteringBoundLogger

    from contracts.clock import Clock
    from contracts.ids import GatewayId
    from contracts.requests import Frame, TokenDelta
    from gateway.limits import GatewayLimits
    from gateway.timeline import Timeline
    from rpc import Network

#: Requests whose Cancel is remembered, and how soon it is repeated for tokens that come in spite of it.
_MAX_REMEMBERED_CANCELS = 1024
_CANCEL_AGAIN_AFTER_S = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """What to continue, and until when."""

    #: Not empty.
    token_ids: tuple[int, ...]
    sampling: SamplingParams
    #: Seconds from `received_s` after which the request fails with DeadlineExceeded.
    deadline_s: float
    #: When the client's request arrived, on the gateway's clock; None: now.
    received_s: float | None = None


@dataclass(slots=True)
class CoreStats:
    """Counters over the life of the gateway."""

    #: By reason: deltas that reached no client (duplicates, forgotten requests, other attempts, …).
    dropped_deltas: dict[str, int] = field(default_factory=dict[str, int])
    lost_streams: int = 0
    num_frames: int = 0

    def drop(self, reason: str, count: int = 1) -> None:
        self.dropped_deltas[reason] = self.dropped_deltas.get(reason, 0) + count


class RequestStream:
    """One request's answer: iterate it for deltas in order, the last with `finish`; then it ends.

    Iterating raises the TandemError that ended the request, after what had arrived before it. One reader.
    Leaving `async with` cancels the request unless it has ended.
    """

    def __init__(self, core: GatewayCore, request_id: RequestId) -> None:
        self.request_id = request_id
        #: Where the time went; set when the request has ended.
        self.timeline: Timeline | None = None
        self._core = core
        #: Deltas that the reader has not taken, and how many tokens they hold.
        self._deltas: deque[TokenDelta] = deque()
        self.num_buffered_tokens = 0
        self._error: TandemError | None = None
        self._news = asyncio.Event()
        self._is_accepted = False

    def cancel(self, reason: str, *, outcome: str = "cancelled") -> None:
        """Ends the request now, wherever it is. Iterating then ends without an error. May be repeated."""
        self._core.feed(self.request_id, own.CancelAsked(reason, outcome))

    async def accepted(self) -> None:
        """Returns once a worker has the request (or it ended well); raises what ended it before that."""
        while not (self._is_accepted or self.timeline):
            await self._wait()
        if not self._is_accepted and self._error is not None:
            raise self._error

    async def __anext__(self) -> TokenDelta:
        while not self._deltas:
            if self.timeline is not None:
                if self._error is not None:
                    raise self._error
                raise StopAsyncIteration
            await self._wait()
        delta = self._deltas.popleft()
        self.num_buffered_tokens -= len(delta.token_ids)
        return delta

    def __aiter__(self) -> Self:
        return self

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exception: object) -> None:
        self.cancel("the client is gone")

    def put(self, delta: TokenDelta) -> None:
        """For the core."""
        self._deltas.append(delta)
        self.num_buffered_tokens += len(delta.token_ids)
        self.accept()

    def accept(self) -> None:
        """For the core."""
        self._is_accepted = True
        self._news.set()

    def end(self, error: TandemError | None, timeline: Timeline) -> None:
        """For the core."""
        self._error, self.timeline = error, timeline
        self._news.set()

    async def _wait(self) -> None:
        self._news.clear()
        await self._news.wait()


@dataclass(slots=True)
class _Open:
    """An open request: its machine, its reader's end, its timers."""

    machine: own.RequestMachine
    stream: RequestStream
    deadline: asyncio.TimerHandle | None = None
    gap: asyncio.TimerHandle | None = None

    def stop_timers(self) -> None:
        for timer in (self.deadline, self.gap):
            if timer is not None:
                timer.cancel()
        self.deadline = self.gap = None


class GatewayCore:
    """Use as `async with GatewayCore(...) as core`; a bug in its tasks cancels the body.

    Leaving it ends every open request with NotReady and cancels it at its workers.
    """

    def __init__(
        self,
        network: Network,
        clock: Clock,
        gateway_id: GatewayId,
        coordinator_address: str,
        limits: GatewayLimits,
        log: FilteringBoundLogger,
    ) -> None:
        self.clock = clock
        self.limits = limits
        self.log = log
        self.gateway_id = gateway_id
        self.stats = CoreStats()
        self._network = network
        self._coordinator_address = coordinator_address
        self._tasks = asyncio.TaskGroup()
        #: Running tasks in the order they were started, so that stopping is the same in every run.
        self._running: dict[asyncio.Task[None], None] = {}
        self._dispatcher = Dispatcher(network, coordinator_address, gateway_id, limits, self._on_answer)
        self._cancels = CancelQueue(network, clock, limits, self._spawn)
        self._links = WorkerLinks(network, clock, gateway_id, limits, self._spawn, self._on_frame, self._on_lost)
        #: Requests whose machine is not over.
        self._open: dict[RequestId, _Open] = {}
        #: When Cancel was last sent for a request, oldest first.
        self._cancelled: dict[RequestKey, float] = {}
        #: Set exactly while `_open` is empty.
        self._idle = asyncio.Event()
        self._idle.set()
        self._num_submitted = 0
        self._stopping = False

    def __repr__(self) -> str:
        return f"<GatewayCore {self.gateway_id} [{len(self._open)} open | {self._num_submitted} submitted]>"

    @property
    def num_open(self) -> int:
        return len(self._open)

    @property
    def num_dropped_cancels(self) -> int:
        return self._cancels.num_dropped

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._spawn(self._dispatcher.run())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping = True
        for request_id in list(self._open):
            self.feed(request_id, own.Failed(NotReady("the gateway is stopping", retry_after_s=1.0)))
        try:
            await self._settle()
        finally:
            self._links.close()
            for task in list(self._running):
                task.cancel()
            await self._tasks.__aexit__(kind, error, traceback)

    async def _settle(self) -> None:
        """Waits, within `stop_grace_s`, for Prefill calls under way and for the last cancels to leave."""
        try:
            async with asyncio.timeout(self.limits.stop_grace_s):
                await self.wait_idle()
                await self._cancels.flush()
        except TimeoutError:
            self.log.warning("stopped_with_requests", open=self.num_open)

    def submit(self, submission: Submission) -> RequestStream:
        """Starts a request. Raises NoCapacity at the limit of open requests, NotReady while stopping."""
        self._admit()
        self._num_submitted += 1
        request_id = RequestId(f"{self.gateway_id}-{self._num_submitted}")
        received_s = self.clock.now_s() if submission.received_s is None else submission.received_s
        machine = own.RequestMachine(
            self._request(request_id, submission),
            received_s=received_s,
            max_early_tokens=self.limits.max_early_tokens,
        )
        self._dispatcher.add(
            DispatchItem(
                request_id=request_id,
                prompt_tokens=len(submission.token_ids),
                max_tokens=submission.sampling.max_tokens,
            )
        )
        stream = RequestStream(self, request_id)
        entry = self._open[request_id] = _Open(machine, stream)
        self._idle.clear()
        remaining_s = max(0.0, received_s + submission.deadline_s - self.clock.now_s())
        entry.deadline = self._feed_later(remaining_s, request_id, own.DeadlinePassed(submission.deadline_s))
        return stream

    async def wait_idle(self) -> None:
        """Returns when no request is open, here or on its way to a worker."""
        await self._idle.wait()

    async def members(self) -> tuple[Member, ...]:
        """The coordinator's view of the cluster. Raises what the call raises."""
        channel = self._network.channel(self._coordinator_address)
        reply = await channel.call(MEMBERS, Empty(), timeout_s=self.limits.members_timeout_s)
        return reply.members

    def feed(self, request_id: RequestId, event: own.Event) -> None:
        """Gives a request's machine an event and carries out its instructions; no effect once it is over."""
        entry = self._open.get(request_id)
        if entry is None:
            return
        instructions = entry.machine.handle(event, self.clock.now_s())
        if entry.machine.over:
            self._forget(entry)
        for instruction in instructions:
            self._carry_out(entry, instruction)

    # --- requests -------------------------------------------------------------------------------

    def _admit(self) -> None:
        if self._stopping:
            raise NotReady("the gateway is stopping", retry_after_s=1.0)
        if len(self._open) >= self.limits.max_open_requests:
            raise NoCapacity(f"{len(self._open)} requests are open at this gateway, the limit", retry_after_s=1.0)

    def _request(self, request_id: RequestId, submission: Submission) -> GenerateRequest:
        if not submission.token_ids:
            raise InvariantBroken(f"request {request_id} has no tokens")
        return GenerateRequest(
            request_id=request_id,
            gateway_id=self.gateway_id,
            token_ids=submission.token_ids,
            num_prompt_tokens=len(submission.token_ids),
            sampling=submission.sampling,
            deadline_s=submission.deadline_s,
        )

    def _forget(self, entry: _Open) -> None:
        request_id = entry.machine.request.request_id
        entry.stop_timers()
        self._dispatcher.discard(request_id)
        for reason, count in entry.machine.dropped.items():
            self.stats.drop(reason, count)
        del self._open[request_id]
        if not self._open:
            self._idle.set()

    def _carry_out(self, entry: _Open, instruction: own.Instruction) -> None:
        request_id = entry.machine.request.request_id
        match instruction:
            case own.Deliver(delta):
                self._deliver(entry, delta)
            case own.End(error, timeline):
                entry.stop_timers()
                entry.stream.end(error, timeline)
            case own.Accept():
                entry.stream.accept()
            case own.OpenStreams(placement):
                self._spawn(self._open_streams(request_id, placement))
            case own.SendPrefill(placement):
                self._spawn(self._send_prefill(entry.machine.request, placement))
            case own.SendCancel(peers, key, reason):
                self._remember_cancel(key)
                for peer in peers:
                    self._cancels.add(peer, key, reason)
            case own.StartGapTimer():
                if entry.gap is None:
                    entry.gap = self._feed_later(self.limits.gap_timeout_s, request_id, own.GapExpired())
            case own.StopGapTimer():
                if entry.gap is not None:
                    entry.gap.cancel()
                    entry.gap = None

    def _deliver(self, entry: _Open, delta: TokenDelta) -> None:
        stream = entry.stream
        stream.put(delta)
        num_tokens = stream.num_buffered_tokens
        if num_tokens > self.limits.max_buffered_tokens:
            self.feed(stream.request_id, own.Overflowed(num_tokens))

    async def _open_streams(self, request_id: RequestId, placement: Placement) -> None:
        for peer in (placement.prefill, placement.decode):
            try:
                await self._links.ensure(peer).wait_open()
            except TandemError as error:
                self.log.warning("stream_not_opened", worker=peer.worker_id, error=error.message)
                failure = _for_client(error, f"worker {peer.worker_id}")
                self.feed(request_id, own.PrefillFailed(failure))
                return
        self.feed(request_id, own.StreamsOpened())

    async def _send_prefill(self, request: GenerateRequest, placement: Placement) -> None:
        """Safe to send twice (request id and attempt fence it), but not repeated: time is short."""
        peer = placement.prefill
        body = PrefillRequest(target=peer.incarnation, request=request, decode=placement.decode)
        try:
            channel = self._network.channel(peer.address)
            await channel.call(PREFILL, body, timeout_s=self.limits.prefill_timeout_s)
        except TandemError as error:
            self.log.warning("prefill_failed", worker=peer.worker_id, error=error.message)
            event: own.Event = own.PrefillFailed(_for_client(error, f"prefill worker {peer.worker_id}"))
        else:
            event = own.PrefillAccepted()
        self.feed(request.request_id, event)

    # --- what comes in --------------------------------------------------------------------------

    def _on_answer(self, request_id: RequestId, answer: Placement | TandemError) -> None:
        event = own.Placed(answer) if isinstance(answer, Placement) else own.Refused(answer)
        self.feed(request_id, event)

    def _on_frame(self, peer: Peer, frame: Frame) -> None:
        self.stats.num_frames += 1
        for delta in frame.deltas:
            if delta.request_id in self._open:
                self.feed(delta.request_id, own.Received(peer.worker_id, peer.incarnation, delta))
            else:
                self._cancel_stray(peer, delta)

    def _cancel_stray(self, peer: Peer, delta: TokenDelta) -> None:
        """Tokens of a request nobody waits for: its Cancel was lost, or crossed them on the way."""
        self.stats.drop("forgotten")
        key = RequestKey(delta.request_id, delta.attempt)
        cancelled_s = self._cancelled.get(key)
        is_recent = cancelled_s is not None and self.clock.now_s() - cancelled_s < _CANCEL_AGAIN_AFTER_S
        if is_recent or delta.finish is not None:
            return
        self._remember_cancel(key)
        self._cancels.add(peer, key, "nobody waits for this request")

    def _remember_cancel(self, key: RequestKey) -> None:
        self._cancelled.pop(key, None)
        self._cancelled[key] = self.clock.now_s()
        if len(self._cancelled) > _MAX_REMEMBERED_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]

    def _on_lost(self, peer: Peer, reason: str) -> None:
        if self._stopping:
            return
        self.stats.lost_streams += 1
        self.log.warning("worker_lost", worker=peer.worker_id, incarnation=peer.incarnation, reason=reason)
        lost = own.WorkerLost(peer.worker_id, peer.incarnation, reason)
        for request_id in list(self._open):
            self.feed(request_id, lost)

    # --- tasks and timers -----------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(work)
        self._running[task] = None
        task.add_done_callback(self._running.pop)
        return task

    def _feed_later(self, delay_s: float, request_id: RequestId, event: own.Event) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, self.feed, request_id, event)


def _for_client(error: TandemError, who: str) -> TandemError:
    """Errors between our own processes must not look like the client's fault, nor show addresses."""
    if isinstance(error, NoCapacity):
        return NoCapacity(f"{who} is full: {error.message}", retry_after_s=error.retry_after_s)
    if isinstance(error, Unauthorized | NotFound | ConfigError):
        return Internal(f"{who} refused the gateway ({error.code})")
    if isinstance(error, WorkerUnavailable):
        return WorkerUnavailable(f"{who} cannot be reached")
    if error.retryable:
        return type(error)(f"{who}: the call failed ({error.code})", retry_after_s=error.retry_after_s)
    return error
