"""The gateway without HTTP: takes token ids, gives back each request's tokens in order, once.

The shell around `gateway.ownership`: it carries out what the machines return (calls, timers, buffers) and
feeds them what happens. Nothing here waits for a client: a request whose client is slow is cancelled, the
frames of the others go on. Time is the injected `Clock` and the running loop's timers, so the same code
runs on a virtual loop.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from contracts.errors import (
    ERROR_BY_CODE,
    InvariantBroken,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
)
from contracts.failpoints import Failpoint, RarePath
from contracts.ids import RequestId
from contracts.messages import (
    MEMBERS,
    PREFILL,
    Empty,
    Member,
    Peer,
    Placement,
    PrefillRequest,
    Rejection,
    RequestKey,
    WorkerLife,
)
from contracts.requests import GenerateRequest, SamplingParams
from gateway import events as ev
from gateway.block_hints import BlockHints
from gateway.cancels import CancelQueue
from gateway.claims import Outcome, verdict
from gateway.dispatching import Dispatcher, Surroundings
from gateway.links import WorkerLinks
from gateway.open_requests import OpenRequest, for_client, own_loads
from gateway.ownership import RequestMachine
from gateway.promises import Promises
from gateway.stats import CoreStats
from gateway.stream import RequestStream
from gateway.terms import NO_TERMS, Terms
from gateway.verdicts import VerdictQueue

if TYPE_CHECKING:
    from collections.abc import Coroutine
    from types import TracebackType

    from structlog.typing import FilteringBoundLogger

    from contracts.clock import Clock
    from contracts.ids import Attempt, GatewayId, WorkerId
    from contracts.messages import MemberRole, MembersReply
    from contracts.requests import Claim, Frame, TokenDelta
    from gateway.limits import GatewayLimits
    from gateway.snapshot import Snapshot
    from rpc import Network

#: Cancels that are remembered, and how soon one is repeated for tokens that come in spite of it.
_MAX_REMEMBERED_CANCELS = 4096
_CANCEL_AGAIN_AFTER_S = 1.0

_PREFILL_TWICE = Failpoint("gateway.prefill_twice", "the answer to a Prefill is lost, it is sent again")

_FORGOTTEN = RarePath("gateway.forgotten", "tokens came of a request that has ended here")
_STREAM_LOST = RarePath("gateway.stream_lost", "an open stream of frames ended")


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
    terms: Terms = NO_TERMS
    #: As in `DispatchItem`; None: to be made, which takes the loop 0.06 ms for 1,000 tokens.
    block_keys: bytes | None = None


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
        #: Set while the coordinator may know others than the snapshot does.
        self._others_are_there = asyncio.Event()
        #: Of the coordinator's last answer: lives, and what they did.
        self._roles: set[tuple[WorkerLife, MemberRole]] = set()
        self._cancels = CancelQueue(network, clock, limits, self._spawn)
        self._verdicts = VerdictQueue(network, gateway_id, limits, self._spawn)
        self._links = WorkerLinks(network, clock, gateway_id, limits, self._spawn, self._on_frame, self._on_lost)
        self._promises = Promises()
        self._dispatcher = Dispatcher(
            network,
            clock,
            coordinator_address,
            gateway_id,
            limits,
            Surroundings(
                lost=self._links.lost,
                heard=self._heard,
                own_loads=lambda: own_loads(self._open.values()),
                follow_members=self._follow_members,
                on_other_members=self._others_are_there.set,
                outcomes=self._promises.take,
            ),
            self._on_answer,
            self.stats,
            log,
        )
        #: For those who make block keys before they submit.
        self.block_hints = BlockHints()
        #: Requests whose machine is not over.
        self._open: dict[RequestId, OpenRequest] = {}
        #: When Cancel was last sent to a worker for a request, oldest first.
        self._cancelled: dict[tuple[WorkerId, RequestKey], float] = {}
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

    @property
    def num_dropped_verdicts(self) -> int:
        return self._verdicts.num_dropped

    async def __aenter__(self) -> Self:
        await self._tasks.__aenter__()
        self._spawn(self._dispatcher.run())
        self._spawn(self._dispatcher.look_for_coordinator())
        self._spawn(self._watch_members())
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopping = True
        for request_id in list(self._open):
            self.feed(request_id, ev.Failed(NotReady("the gateway is stopping", retry_after_s=1.0)))
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
        self.check_room()
        self._num_submitted += 1
        request_id = RequestId(f"{self.gateway_id}-{self._num_submitted}")
        received_s = self.clock.now_s() if submission.received_s is None else submission.received_s
        block_keys, terms = submission.block_keys, submission.terms
        if block_keys is None:
            block_keys = self.block_hints.of(submission.token_ids, terms.cache_salt, terms.kv_class)
        machine = RequestMachine(
            self._request(request_id, submission),
            received_s=received_s,
            limits=self.limits,
            terms=terms,
            block_keys=block_keys,
        )
        self._dispatcher.add(machine.dispatch_item(self.clock.now_s()))
        stream = RequestStream(request_id, self._on_cancel)
        entry = self._open[request_id] = OpenRequest(machine, stream, terms, received_s)
        self._idle.clear()
        remaining_s = max(0.0, received_s + submission.deadline_s - self.clock.now_s())
        entry.deadline = self._feed_later(remaining_s, request_id, ev.DeadlinePassed(submission.deadline_s))
        return stream

    async def wait_idle(self) -> None:
        """Returns when no request is open, here or on its way to a worker."""
        await self._idle.wait()

    @property
    def snapshot(self) -> Snapshot:
        """The cluster as last told."""
        return self._dispatcher.snapshot

    async def members(self) -> tuple[Member, ...]:
        """The workers, as the coordinator sees them. Raises what the call raises."""
        return (await self.cluster()).members

    async def cluster(self) -> MembersReply:
        """The same, with what the coordinator tells of itself. The snapshot hears of every answer."""
        channel = self._network.channel(self._coordinator_address)
        reply = await channel.call(MEMBERS, Empty(), timeout_s=self.limits.members_timeout_s)
        self._told(reply)
        return reply

    def feed(self, request_id: RequestId, event: ev.Event) -> None:
        """Gives a request's machine an event and carries out its instructions, in order; no effect once it is
        over. What the instructions themselves cause is handled after them."""
        entry = self._open.get(request_id)
        if entry is None:
            return
        entry.events.append(event)
        if entry.is_handling:
            return
        entry.is_handling = True
        machine = entry.machine
        try:
            while entry.events and not machine.over:
                for instruction in machine.handle(entry.events.popleft(), self.clock.now_s()):
                    self._carry_out(entry, instruction)
        finally:
            entry.is_handling = False
        if machine.over:
            self._forget(entry)

    # --- requests -------------------------------------------------------------------------------

    def check_room(self) -> None:
        """Raises as `submit` does: for whoever has work to do before."""
        if self._stopping:
            raise NotReady("the gateway is stopping", retry_after_s=1.0, reason="stopping")
        if len(self._open) >= self.limits.max_open_requests:
            message = f"{len(self._open)} requests are open at this gateway, the limit"
            raise NoCapacity(message, retry_after_s=1.0, reason="gateway_full")

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
            tpot_target_s=submission.terms.tpot_target_s,
            priority=submission.terms.priority,
            tenant=submission.terms.tenant,
            cache_salt=submission.terms.cache_salt,
            kv_class=submission.terms.kv_class,
        )

    async def _watch_members(self) -> None:
        """Keeps what is known of the cluster up to date: now and then, and when a dispatch was answered by a
        coordinator that knows others. More often after a change (where one worker starts, more do), and most often
        while requests wait for one to start."""
        limits = self.limits
        while True:
            self._others_are_there.clear()
            before = self.snapshot.mark
            await self._follow_members()
            is_quiet = self.snapshot.mark == before and not self.snapshot.is_empty
            longest_s = limits.members_interval_s if is_quiet else limits.probe_interval_s
            if any(entry.retry is not None and entry.machine.history.is_awaited for entry in self._open.values()):
                longest_s = limits.members_pause_s
            pause_s = min(limits.members_pause_s, longest_s)
            await self.clock.sleep(pause_s)
            with suppress(TimeoutError):
                async with asyncio.timeout(longest_s - pause_s):
                    await self._others_are_there.wait()

    async def _follow_members(self) -> None:
        try:
            await self.members()
        except TandemError as error:
            self.log.debug("members_not_told", error=error.message)

    def _told(self, reply: MembersReply) -> None:
        if self._stopping:
            return
        members = reply.members
        self.snapshot.told(members, self.clock.now_s(), mark=reply.members_mark, heard=self._heard())
        # A worker can only claim a request of ours (`gateway.claims`) where its frames reach us.
        for peer in (*self.snapshot.named, *self.snapshot.unproven):
            try:
                self._links.ensure(peer)
            except StaleIncarnation as error:
                self.log.debug("stream_not_opened", worker=peer.worker_id, error=error.message)
        self.block_hints.learn(member.info.identity for member in members)
        roles: set[tuple[WorkerLife, MemberRole]] = {
            (WorkerLife(each.info.worker_id, each.info.incarnation), each.info.role) for each in members
        }
        if roles - self._roles:
            self._ask_again()
        self._roles = roles

    def _ask_again(self) -> None:
        """Somebody has come: whoever waits to ask for a place need not wait any longer."""
        for request_id, entry in list(self._open.items()):
            if entry.retry is not None:
                entry.retry.cancel()
                self._retry(request_id)

    def _retry(self, request_id: RequestId) -> None:
        entry = self._open.get(request_id)
        if entry is not None:
            entry.retry = None
            self.feed(request_id, ev.RetryDue())

    def _heard(self) -> set[WorkerLife]:
        return self._links.heard(self.limits.silent_after_s)

    def _forget(self, entry: OpenRequest) -> None:
        request_id = entry.machine.request.request_id
        for reason, count in entry.machine.dropped.items():
            self.stats.drop(reason, count)
        del self._open[request_id]
        if not self._open:
            self._idle.set()

    def _carry_out(self, entry: OpenRequest, instruction: ev.Instruction) -> None:
        request_id = entry.stream.request_id
        match instruction:
            case ev.Deliver(delta):
                self._deliver(entry, delta)
            case ev.End(error, timeline):
                entry.stop_timers()
                self._dispatcher.discard(request_id)
                self.stats.failed_after_replays += error is not None and entry.was_replayed
                entry.stream.end(error, timeline)
            case ev.Accept():
                entry.stream.accept()
            case ev.AskPlacement(item):
                try:
                    self._dispatcher.add(item)
                except NoCapacity as error:
                    self.feed(request_id, ev.Unanswered(error))
            case ev.RetryLater(delay_s):
                entry.retry = asyncio.get_running_loop().call_later(delay_s, self._retry, request_id)
                if entry.machine.history.is_awaited:
                    self._others_are_there.set()
            case ev.OpenStreams(attempt, placement):
                self._spawn(self._open_streams(request_id, attempt, placement))
            case ev.SendPrefill(placement, request):
                self._spawn(self._send_prefill(request, placement))
            case ev.SendCancel(peers, key, reason):
                for peer in peers:
                    self._send_cancel(peer, key, reason)
            case ev.SendVerdict():
                self._send_verdict(instruction)
            case ev.AnswerStray(peer, key):
                self._cancel_stray(peer, key)
            case ev.StartGapTimer():
                if entry.gap is None:
                    entry.gap = self._feed_later(self.limits.gap_timeout_s, request_id, ev.GapExpired())
            case ev.StopGapTimer():
                entry.stop_gap_timer()
            case ev.NoteReplay():
                self._note_replay(entry, instruction)
            case ev.NoteResumed(after_s):
                self.stats.resumed.add(after_s)
            case ev.NoteMoved():
                self._note_moved(instruction)
            case ev.NoteMoveGap(gap_s):
                self.stats.move_gaps.add(gap_s)

    def _deliver(self, entry: OpenRequest, delta: TokenDelta) -> None:
        stream = entry.stream
        if delta.index == 0 and delta.token_ids and (predicted := entry.predicted) is not None:
            self._promises.first_token(entry.terms, predicted, self.clock.now_s() - entry.received_s)
        stream.put(delta)
        num_tokens = stream.num_buffered_tokens
        if num_tokens > self.limits.max_buffered_tokens:
            self.feed(stream.request_id, ev.Overflowed(num_tokens))

    def _note_replay(self, entry: OpenRequest, note: ev.NoteReplay) -> None:
        entry.was_replayed = True
        self.stats.replay(note.reason)
        self.log.warning(
            "request_replayed",
            request=entry.stream.request_id,
            attempt=entry.machine.request.attempt,
            workers=",".join(note.suspects),
            reason=note.reason,
            error=note.error.message,
            delivered=note.num_delivered,
        )

    def _note_moved(self, note: ev.NoteMoved) -> None:
        self.log.info(
            "request_moved",
            request=note.key.request_id,
            attempt=note.key.attempt,
            owner_epoch=note.key.owner_epoch,
            source=note.source,
            destination=note.destination,
            delivered=note.num_delivered,
            missing=note.num_missing,
        )

    async def _open_streams(self, request_id: RequestId, attempt: Attempt, placement: Placement) -> None:
        for peer in (placement.prefill, placement.decode):
            try:
                await self._links.ensure(peer).wait_open()
            except TandemError as error:
                self.log.warning("stream_not_opened", worker=peer.worker_id, error=error.message)
                failure = for_client(error, f"worker {peer.worker_id}")
                self.feed(request_id, ev.StreamsFailed(attempt, peer.worker_id, failure))
                return
        self.feed(request_id, ev.StreamsOpened(attempt))

    async def _send_prefill(self, request: GenerateRequest, placement: Placement) -> None:
        """Safe to send twice (request id and attempt fence it), but not repeated: time is short."""
        peer = placement.prefill
        body = PrefillRequest(
            target=peer.incarnation, request=request, decode=placement.decode, prefix=placement.prefix
        )
        try:
            channel = self._network.channel(peer.address)
            if _PREFILL_TWICE.fires():
                await channel.call(PREFILL, body, timeout_s=self.limits.prefill_timeout_s)
            await channel.call(PREFILL, body, timeout_s=self.limits.prefill_timeout_s)
        except TandemError as error:
            self.log.warning("prefill_failed", worker=peer.worker_id, error=error.message)
            failure = for_client(error, f"prefill worker {peer.worker_id}")
            event: ev.Event = ev.PrefillFailed(request.attempt, failure)
        else:
            event = ev.PrefillAccepted(request.attempt)
        self.feed(request.request_id, event)

    # --- what comes in --------------------------------------------------------------------------

    def _on_cancel(self, request_id: RequestId, reason: str, outcome: str) -> None:
        self.feed(request_id, ev.CancelAsked(reason, outcome))

    def _on_answer(self, request_id: RequestId, answer: Placement | Rejection | TandemError) -> None:
        match answer:
            case Placement():
                self.feed(request_id, ev.Placed(answer))
            case Rejection():
                kind = ERROR_BY_CODE.get(answer.code, NoCapacity)
                reason = answer.reason or None
                error = kind(answer.message, retry_after_s=answer.retry_after_s, reason=reason)
                self.feed(request_id, ev.Refused(error))
            case TandemError():
                self.feed(request_id, ev.Unanswered(answer))

    def _on_frame(self, peer: Peer, frame: Frame) -> None:
        self.stats.num_frames += 1
        for delta in frame.deltas:
            if delta.request_id in self._open:
                self.feed(delta.request_id, ev.Received(peer, delta))
                continue
            # Its Cancel was lost, or crossed these tokens on the way.
            _FORGOTTEN.reached()
            self.stats.drop("forgotten")
            if delta.finish is None:
                self._cancel_stray(peer, RequestKey(delta.request_id, delta.attempt, delta.owner_epoch))
        for claim in frame.claims:
            self._on_claim(peer, claim)

    def _on_claim(self, peer: Peer, claim: Claim) -> None:
        if claim.request_id in self._open:
            self.feed(claim.request_id, ev.Claimed(peer, claim))
        else:
            self._send_verdict(verdict(peer, claim, Outcome.FORGOTTEN))

    def _send_verdict(self, answer: ev.SendVerdict) -> None:
        self.stats.claim(answer.outcome)
        self._verdicts.add(answer.peer, answer.verdict)

    def _cancel_stray(self, peer: Peer, key: RequestKey) -> None:
        """Tokens of a try that nobody waits for."""
        cancelled_s = self._cancelled.get((peer.worker_id, key))
        if cancelled_s is None or self.clock.now_s() - cancelled_s >= _CANCEL_AGAIN_AFTER_S:
            self._send_cancel(peer, key, "nobody waits for this request")

    def _send_cancel(self, peer: Peer, key: RequestKey, reason: str) -> None:
        self._cancelled.pop((peer.worker_id, key), None)
        self._cancelled[peer.worker_id, key] = self.clock.now_s()
        if len(self._cancelled) > _MAX_REMEMBERED_CANCELS:
            del self._cancelled[next(iter(self._cancelled))]
        self._cancels.add(peer, key, reason)

    def _on_lost(self, peer: Peer, reason: str) -> None:
        if self._stopping:
            return
        _STREAM_LOST.reached()
        self.stats.lost_streams += 1
        self.log.warning("worker_lost", worker=peer.worker_id, incarnation=peer.incarnation, reason=reason)
        lost = ev.WorkerLost(peer, reason)
        for request_id in list(self._open):
            self.feed(request_id, lost)

    # --- tasks and timers -----------------------------------------------------------------------

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._tasks.create_task(work)
        self._running[task] = None
        task.add_done_callback(self._running.pop)
        return task

    def _feed_later(self, delay_s: float, request_id: RequestId, event: ev.Event) -> asyncio.TimerHandle:
        return asyncio.get_running_loop().call_later(delay_s, self.feed, request_id, event)
