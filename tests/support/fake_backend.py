"""A cluster that follows a script, on a real network: what gateway tests talk to.

One coordinator and workers with the real rpc methods of a cluster; instead of a model, a worker answers each
request with the tokens that `Script.reply` gives. Every stage of a request can be held, so that a test
decides what happens while it waits there; nothing sleeps.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Self

from contracts.errors import StaleIncarnation
from contracts.ids import GatewayId, Incarnation, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import (
    CANCEL,
    DISPATCH,
    FRAMES,
    GRANT,
    MEMBERS,
    PREFILL,
    CancelRequest,
    ClaimVerdict,
    DispatchItem,
    DispatchReply,
    DispatchRequest,
    Empty,
    FramesRequest,
    GrantRequest,
    Member,
    MembersReply,
    Peer,
    Placement,
    Predicted,
    PrefillRequest,
    PrefixPlan,
    Rejection,
    RequestKey,
    Role,
    WorkerInfo,
    WorkerLoad,
)
from contracts.requests import Claim, Frame, PhaseTimes, TokenDelta, TokenLogprobs, TopLogprob
from engine.sequence import failure

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from contracts.errors import TandemError
    from contracts.requests import FinishReason, GenerateRequest
    from rpc import CallContext, MemoryNetwork
    from rpc.memory import MemoryProcess

#: Where a request can be held: before the coordinator answers, before Prefill is answered, or before the
#: output token of that index is sent.
Stage = Literal["dispatch", "prefill"] | int

IDENTITY = KvIdentity(
    model_fingerprint="scripted",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=16, dtype="float32"),
    rope_base=10_000.0,
    protocol_version=1,
)


def count_up(request: GenerateRequest) -> Sequence[int]:
    """Endless enough: token ids 0, 1, 2, … modulo 50."""
    return [index % 50 for index in range(request.sampling.max_tokens)]


@dataclass
class Script:
    """What the cluster does with requests. May be changed while it runs."""

    #: The answer's token ids; cut to `max_tokens`. Shorter ones end with "stop", as after an end-of-sequence.
    reply: Callable[[GenerateRequest], Sequence[int]] = count_up
    #: Coordinator: refuses every request with (code, message, retry_after_s).
    rejection: tuple[str, str, float] | None = None
    #: How many requests get it; None: all.
    rejections_left: int | None = None
    #: The word that goes with it.
    reject_reason: str = ""
    #: Coordinator: was just started, no worker has registered yet.
    is_ignorant: bool = False
    #: Coordinator: what it says stands for the workers that it knows.
    members_mark: int = 0
    #: Coordinator: how long it has not heard its workers, as it says.
    heartbeat_age_s: float = 0.1
    #: What the coordinator tells of its placements.
    predicted: Predicted | None = None
    prefix: PrefixPlan | None = None
    #: Prefill workers: refuse every request.
    prefill_error: TandemError | None = None
    #: By id: prefill workers that refuse every request.
    prefill_errors: dict[str, TandemError] = field(default_factory=dict[str, "TandemError"])
    #: Workers: answer no Grant.
    grant_error: TandemError | None = None
    #: By request id: how often its step fails before it is left alone.
    failing_steps: dict[RequestId, int] = field(default_factory=dict[RequestId, int])
    #: Tokens in one frame of the decode worker.
    tokens_per_frame: int = 1
    #: What the workers claim to have measured.
    first_phases: PhaseTimes = field(default_factory=lambda: PhaseTimes(queue_s=0.0, prefill_s=0.0))
    decode_phases: PhaseTimes = field(default_factory=lambda: PhaseTimes(handoff_s=0.0, decode_s=0.0))


class Gates:
    """Stages at which requests wait until they are opened."""

    def __init__(self) -> None:
        self._closed: dict[Stage, asyncio.Event] = {}
        self._reached: dict[Stage, asyncio.Event] = defaultdict(asyncio.Event)

    def close(self, stage: Stage) -> None:
        self._closed[stage] = asyncio.Event()

    def open(self, stage: Stage) -> None:
        self._closed.pop(stage).set()

    def forget(self, stage: Stage) -> None:
        """Knows no more of those who have been there."""
        self._reached.pop(stage, None)

    async def reached(self, stage: Stage) -> None:
        """Returns once a request waits at (or has passed) the stage."""
        await self._reached[stage].wait()

    async def pass_through(self, stage: Stage) -> None:
        self._reached[stage].set()
        if stage in self._closed:
            await self._closed[stage].wait()


class FakeWorker:
    """One life of a worker. `accepted`, `cancelled` and `verdicts` keep what it was sent, in order."""

    def __init__(
        self,
        process: MemoryProcess,
        worker_id: str,
        incarnation: int,
        role: Role,
        script: Script,
        gates: Gates,
    ) -> None:
        self.worker_id = WorkerId(worker_id)
        self.incarnation = Incarnation(incarnation)
        self.role: Role = role
        self.process = process
        self.peer = Peer(worker_id=self.worker_id, incarnation=self.incarnation, address="")
        self.accepted: list[PrefillRequest] = []
        self.cancelled: list[RequestKey] = []
        #: By call.
        self.verdicts: list[tuple[ClaimVerdict, ...]] = []
        self.script = script
        #: A request id that no gateway knows.
        self.stray_id = RequestId("stray")
        #: Frames streams opened so far.
        self.num_streams = 0
        self._skipped_frames = 0
        self._gates = gates
        self._news = asyncio.Condition()
        #: The one stream of each gateway; a newer one replaces it.
        self._outboxes: dict[GatewayId, asyncio.Queue[tuple[tuple[TokenDelta, ...], tuple[Claim, ...]]]] = {}
        self._answers: dict[RequestKey, asyncio.Task[None]] = {}
        #: Set by the cluster: finds the worker that goes on with an answer.
        self.find: Callable[[WorkerId], FakeWorker]

    async def start(self) -> None:
        server = self.process.server("127.0.0.1:0")
        server.register(PREFILL, self._prefill)
        server.register(CANCEL, self._cancel)
        server.register(GRANT, self._grant)
        server.register_stream(FRAMES, self._frames)
        address = await server.start()
        self.peer = Peer(worker_id=self.worker_id, incarnation=self.incarnation, address=address)

    async def stop(self) -> None:
        for task in list(self._answers.values()):
            task.cancel()
        await asyncio.gather(*self._answers.values(), return_exceptions=True)
        self.process.kill()

    def kill(self) -> None:
        """As SIGKILL does."""
        for task in list(self._answers.values()):
            task.cancel()
        self.process.kill()

    @property
    def num_answering(self) -> int:
        return len(self._answers)

    def skip_frames(self, count: int) -> None:
        """Leaves sequence numbers out, as if frames had been lost."""
        self._skipped_frames += count

    def send(self, *deltas: TokenDelta) -> None:
        """One frame to every gateway that listens."""
        for outbox in self._outboxes.values():
            outbox.put_nowait((deltas, ()))

    def claim(self, *claims: Claim) -> None:
        """One frame with them to every gateway that listens."""
        for outbox in self._outboxes.values():
            outbox.put_nowait(((), claims))

    def tell(self, gateway_id: GatewayId, delta: TokenDelta) -> None:
        """A frame to one gateway, if it listens."""
        if gateway_id in self._outboxes:
            self._outboxes[gateway_id].put_nowait(((delta,), ()))

    async def wait_cancelled(self, request_id: RequestId | None = None) -> None:
        """Returns once a Cancel (for this request) has arrived."""
        async with self._news:
            await self._news.wait_for(lambda: any(request_id in (None, key.request_id) for key in self.cancelled))

    def write_on(self, request: GenerateRequest, start: int) -> None:
        """The rest of an answer, one token in a frame, under the request's owner epoch."""
        reply, finish = self._reply(request)
        for index in range(start, len(reply)):
            last = index + 1 == len(reply)
            self.tell(request.gateway_id, self._delta(request, reply, index, index + 1, finish if last else None))

    async def wait_verdicts(self, count: int) -> list[ClaimVerdict]:
        """The verdicts, once there are so many."""
        async with self._news:
            await self._news.wait_for(lambda: sum(map(len, self.verdicts)) >= count)
        return [verdict for call in self.verdicts for verdict in call]

    async def wait_streams(self, count: int = 1) -> None:
        """Returns once so many streams of frames have been opened."""
        async with self._news:
            await self._news.wait_for(lambda: self.num_streams >= count)

    def info(self) -> WorkerInfo:
        return WorkerInfo(
            worker_id=self.worker_id,
            incarnation=self.incarnation,
            role=self.role,
            address=self.peer.address,
            model="scripted",
            identity=IDENTITY,
            total_blocks=100,
            max_context_tokens=4096,
        )

    async def _prefill(self, body: PrefillRequest, context: CallContext) -> Empty:
        await self._gates.pass_through("prefill")
        error = self.script.prefill_errors.get(self.worker_id, self.script.prefill_error)
        if error is not None:
            raise error
        self.accepted.append(body)
        key = RequestKey(body.request.request_id, body.request.attempt, body.request.owner_epoch)
        decode = self.find(body.decode.worker_id)
        task = asyncio.create_task(self._answer(body.request, decode))
        self._answers[key] = task
        task.add_done_callback(lambda _: self._answers.pop(key))
        return Empty()

    async def _cancel(self, body: CancelRequest, context: CallContext) -> Empty:
        answers = [self._answers[key] for key in body.requests if key in self._answers]
        for answer in answers:
            answer.cancel()
        await asyncio.gather(*answers, return_exceptions=True)
        async with self._news:
            self.cancelled.extend(body.requests)
            self._news.notify_all()
        return Empty()

    async def _grant(self, body: GrantRequest, context: CallContext) -> Empty:
        if body.target != self.incarnation:
            raise StaleIncarnation(f"{self.worker_id} is in its life {self.incarnation}")
        if self.script.grant_error is not None:
            raise self.script.grant_error
        async with self._news:
            self.verdicts.append(body.verdicts)
            self._news.notify_all()
        return Empty()

    async def _frames(self, body: FramesRequest, context: CallContext) -> AsyncIterator[Frame]:
        if body.target != self.incarnation:
            raise StaleIncarnation(f"{self.worker_id} is in its life {self.incarnation}")
        outbox = self._outboxes[body.gateway_id] = asyncio.Queue()
        sequence_number = 0
        deltas: tuple[TokenDelta, ...] = ()
        claims: tuple[Claim, ...] = ()
        async with self._news:
            self.num_streams += 1
            self._news.notify_all()
        while True:
            yield Frame(
                worker_id=self.worker_id,
                incarnation=self.incarnation,
                sequence_number=sequence_number,
                deltas=deltas,
                claims=claims,
            )
            sequence_number += 1 + self._skipped_frames
            try:
                async with asyncio.timeout(1.0):
                    deltas, claims = await outbox.get()
            except TimeoutError:
                deltas, claims = (), ()

    async def _answer(self, request: GenerateRequest, decode: FakeWorker) -> None:
        reply, finish = self._reply(request)
        first = start = len(request.token_ids) - request.num_prompt_tokens
        if self.script.failing_steps.get(request.request_id, 0) > 0:
            self.script.failing_steps[request.request_id] -= 1
            self.tell(request.gateway_id, failure(request, start, "internal", "the step failed"))
            return
        while start < len(reply):
            await self._gates.pass_through(start)
            stop = min(len(reply), start + (1 if start == first else self.script.tokens_per_frame))
            worker = self if start == first else decode
            last = stop == len(reply)
            worker.tell(request.gateway_id, self._delta(request, reply, start, stop, finish if last else None))
            start = stop
            await asyncio.sleep(0)

    def _reply(self, request: GenerateRequest) -> tuple[list[int], FinishReason]:
        reply, max_tokens = list(self.script.reply(request)), request.sampling.max_tokens
        return reply[:max_tokens], "stop" if len(reply) < max_tokens else "length"

    def _delta(
        self,
        request: GenerateRequest,
        reply: list[int],
        start: int,
        stop: int,
        finish: FinishReason | None,
    ) -> TokenDelta:
        phases = {0: self.script.first_phases, 1: self.script.decode_phases}.get(start)
        num_top = request.sampling.logprobs
        return TokenDelta(
            request_id=request.request_id,
            attempt=request.attempt,
            owner_epoch=request.owner_epoch,
            index=start,
            token_ids=tuple(reply[start:stop]),
            logprobs=None if num_top is None else tuple(_logprobs(id_, num_top) for id_ in reply[start:stop]),
            finish=finish,
            phases=phases,
        )


def _logprobs(token_id: int, num_top: int) -> TokenLogprobs:
    top = tuple(TopLogprob(token_id + rank, -0.5 - rank) for rank in range(num_top))
    return TokenLogprobs(-0.5, top)


class FakeCluster:
    """Use as `async with FakeCluster(network)`. By default one prefill and one decode worker."""

    def __init__(
        self, network: MemoryNetwork, roles: dict[str, Role] | None = None, script: Script | None = None
    ) -> None:
        self.script = Script() if script is None else script
        self.gates = Gates()
        self.address = ""
        #: The living workers, by id.
        self.workers: dict[str, FakeWorker] = {}
        #: Dispatch calls, as they came.
        self.dispatches: list[DispatchRequest] = []
        self._network = network
        self._process = network.process("127.0.0.1")
        self._roles: dict[str, Role] = {"prefill-0": "prefill", "decode-0": "decode"} if roles is None else roles
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        server = self._process.server("127.0.0.1:0")
        server.register(DISPATCH, self._dispatch)
        server.register(MEMBERS, self._members)
        self.address = await server.start()
        for worker_id, role in self._roles.items():
            await self.start_worker(worker_id, role)
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self._stack.aclose()
        self._process.kill()

    async def start_worker(self, worker_id: str, role: Role, incarnation: int = 1) -> FakeWorker:
        process = self._network.process("127.0.0.1")
        worker = FakeWorker(process, worker_id, incarnation, role, self.script, self.gates)
        worker.find = lambda decode_id: self.workers[decode_id]
        await worker.start()
        self._stack.push_async_callback(worker.stop)
        self.workers[worker_id] = worker
        return worker

    def kill_coordinator(self) -> None:
        self._process.kill()

    async def _dispatch(self, body: DispatchRequest, context: CallContext) -> DispatchReply:
        self.dispatches.append(body)
        await self.gates.pass_through("dispatch")
        return DispatchReply(
            verdicts=tuple(self._verdict(item) for item in body.items), members_mark=self.script.members_mark
        )

    def _verdict(self, item: DispatchItem) -> Placement | Rejection:
        request_id = item.request_id
        if self.script.is_ignorant:
            return Rejection(request_id=request_id, code="not_ready", message="nobody is up", retry_after_s=1.0)
        if self.script.rejection is not None and self.script.rejections_left != 0:
            if self.script.rejections_left is not None:
                self.script.rejections_left -= 1
            code, message, retry_after_s = self.script.rejection
            reason = self.script.reject_reason
            return Rejection(
                request_id=request_id, code=code, message=message, retry_after_s=retry_after_s, reason=reason
            )
        return Placement(
            request_id=request_id,
            prefill=self._first("prefill", item.avoid).peer,
            decode=self._first("decode", item.avoid).peer,
            reason="scripted",
            prefix=self.script.prefix,
            predicted=self.script.predicted,
        )

    def _first(self, role: Role, avoid: tuple[WorkerId, ...]) -> FakeWorker:
        able = [worker for worker in self.workers.values() if worker.role in (role, "mixed")]
        return next((worker for worker in able if worker.worker_id not in avoid), able[0])

    async def _members(self, body: Empty, context: CallContext) -> MembersReply:
        members = tuple(
            Member(info=worker.info(), load=WorkerLoad(), heartbeat_age_s=self.script.heartbeat_age_s)
            for worker in self.workers.values()
        )
        if self.script.is_ignorant:
            members = ()
        return MembersReply(members=members, members_mark=self.script.members_mark)
