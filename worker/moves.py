"""Requests that move from here and to here: the calls, the handlers, and the time that their machines need."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, NotReady, StaleIncarnation, TandemError, WorkerUnavailable
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import (
    CANCEL,
    DECLINE,
    GRANT,
    HANDOFF,
    MIGRATE,
    TAKE_OVER,
    YIELD,
    CancelRequest,
    Empty,
    MigrateReply,
    YieldReply,
)
from contracts.requests import ErrorInfo, TokenDelta, counted_priority
from decode.moves.choice import choose_mode, costs_of, spare_blocks
from decode.moves.victims import Candidate, Kind, begin_some, wanted_of
from prefill.prompts import Prompt
from worker.prompt_moves import PromptMoves

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any

    from contracts.clock import Clock
    from contracts.ids import GatewayId
    from contracts.messages import (
        ClaimVerdict,
        DeclineRequest,
        GrantRequest,
        HandoffReply,
        HandoffRequest,
        LatencyFit,
        MigrateRequest,
        Peer,
        RequestKey,
        TakeOverRequest,
        YieldRequest,
    )
    from contracts.requests import Claim
    from decode import DecodeBatch
    from decode.answers import Answer
    from engine.plan import Engine
    from prefill import PrefillQueue
    from rpc import CallContext, Network, Server
    from worker.frames import FrameOutbox
    from worker.standing import Standing

#: What one call between workers may take.
CALL_TIMEOUT_S = 2.0
#: How often machines are looked at while requests move.
LOOK_INTERVAL_S = 0.05

_GRANTED_TOO_LATE = RarePath("worker.granted_too_late", "a claim was granted whose request was given up meanwhile")

_YIELD_TWICE = Failpoint("worker.yield_twice", "the answer to a yield is lost, it is asked again")
_GRANT_LOST = Failpoint("worker.grant_lost", "the answer to a claim is lost, it is claimed again")
_TAKE_OVER_LOST = Failpoint("worker.take_over_lost", "that a request was taken over is not heard")


class Moves:
    """Use: `register_on(server)`, and `await run()` beside the rest of the worker. Implements
    `decode.moves.calls.MoveCalls`."""

    def __init__(
        self,
        *,
        own: Peer,
        network: Network,
        clock: Clock,
        engine: Engine,
        outbox: FrameOutbox,
        standing: Standing,
        refusal: Callable[[Peer], str | None],
        latency: Callable[[], LatencyFit],
        reading_s: Callable[[int, int], float],
        on_change: Callable[[], None],
        log: Callable[[str], None],
    ) -> None:
        """`refusal`: why KV may not move between here and a peer, if it may not; `reading_s`: what reading so many
        tokens behind so many others takes, 0 where that is not known. The two sides are given with `join`."""
        self._own = own
        self._network = network
        self._clock = clock
        self._engine = engine
        self._outbox = outbox
        self._standing = standing
        self._refusal = refusal
        self._latency = latency
        self._reading_s = reading_s
        self._on_change = on_change
        self._log = log
        self._decode: DecodeBatch
        self._prefill: PrefillQueue
        self._prompts: PromptMoves
        #: Present while `run` does.
        self._group: asyncio.TaskGroup | None = None
        #: Set while anything moves, or may.
        self._busy = asyncio.Event()
        #: How moves ended, since the start; how they were begun ("kv", "tokens", "prompt").
        self.outcomes: Counter[str] = Counter()
        self.begun: Counter[str] = Counter()

    def join(self, decode: DecodeBatch, prefill: PrefillQueue) -> None:
        """To be called once, before anything else."""
        self._decode, self._prefill = decode, prefill
        self._prompts = PromptMoves(
            queue=prefill,
            own=self._own,
            calls=self,
            clock=self._clock,
            outcomes=decode.move_outcomes,
            on_change=self._on_change,
        )
        self.outcomes = decode.move_outcomes

    @property
    def num_leaving(self) -> int:
        return len(self._decode.moves_out) + self._prompts.num_leaving

    @property
    def num_coming(self) -> int:
        return len(self._decode.moves_in) + self._prompts.num_coming

    def register_on(self, server: Server, guarded: Callable[[Any], Any]) -> None:
        """`guarded` wraps handlers: one that finds state which cannot be ends the worker."""
        server.register(MIGRATE, guarded(self._on_migrate))
        server.register(YIELD, guarded(self._on_yield))
        server.register(DECLINE, guarded(self._on_decline))
        server.register(TAKE_OVER, guarded(self._on_take_over))
        server.register(GRANT, guarded(self._on_grant))

    async def run(self) -> None:
        """Gives the machines their time, for as long as the worker serves."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            try:
                while True:
                    if not (self.num_leaving or self.num_coming):
                        self._busy.clear()
                        await self._busy.wait()
                    await self._clock.sleep(LOOK_INTERVAL_S)
                    self._look()
            finally:
                self._group = None

    def _look(self) -> None:
        now_s = self._clock.now_s()
        self._decode.moves_out.look(now_s)
        self._decode.moves_in.look(now_s)
        self._prompts.look(now_s)
        self._outbox.flush()

    def cancel_here(self, key: RequestKey, reason: str) -> None:
        """Of a prompt on its way to here; what the two sides have they end themselves."""
        self._prompts.cancel(key, reason)

    # --- handlers ---------------------------------------------------------------------------------

    async def _on_migrate(self, ask: MigrateRequest, context: CallContext) -> MigrateReply:
        self._require(ask.target, "Migrate")
        started: list[RequestKey] = []
        why_not = "" if ask.max_requests > 0 else "none was wanted"

        def begin(one: Answer | Prompt) -> bool:
            nonlocal why_not
            key = one.sequence.key
            problem = None
            if isinstance(one, Prompt):
                self._prompts.send(one, ask.destination)
                self.begun["prompt"] += 1
            else:
                problem = self._send(one, ask)
            if problem is None:
                started.append(key)
            else:
                why_not = problem
            return problem is None

        begin_some(self._candidates(ask), wanted_of(ask), begin)
        self._busy.set()
        if len(started) < ask.max_requests and not why_not:
            why_not = "no other request here may move"
        return MigrateReply(started=tuple(started), reason=why_not if len(started) < ask.max_requests else "")

    async def _on_yield(self, ask: YieldRequest, context: CallContext) -> YieldReply:
        self._require(ask.target, "Yield")
        told: asyncio.Future[YieldReply | TandemError] = asyncio.get_running_loop().create_future()

        def on_rest(answer: YieldReply | TandemError) -> None:
            if not told.done():
                told.set_result(answer)

        self._decode.moves_out.yield_asked(ask.key, on_rest, num_known=ask.num_known, at_most=ask.at_most)
        # What it wrote last must not wait for the next step's frame.
        self._outbox.flush()
        try:
            async with asyncio.timeout(CALL_TIMEOUT_S):
                answer = await told
        except TimeoutError:
            # Whoever asked does not wait any longer, and asks again.
            raise NotReady(f"a step still computes request {ask.key.request_id}", retry_after_s=0.1) from None
        self._outbox.flush()
        if isinstance(answer, TandemError):
            raise answer
        return answer

    async def _on_decline(self, ask: DeclineRequest, context: CallContext) -> Empty:
        self._require(ask.target, "Decline")
        self._decode.moves_out.declined(ask.key, ask.destination, ask.reason)
        return Empty()

    async def _on_take_over(self, ask: TakeOverRequest, context: CallContext) -> Empty:
        self._require(ask.target, "TakeOver")
        self._standing.check_open("request that moves")
        self._busy.set()
        if ask.decode is not None:
            self._prompts.take_over(ask)
        else:
            self._decode.moves_in.take_over(ask, self._clock.now_s())
        self._outbox.flush()
        return Empty()

    async def _on_grant(self, ask: GrantRequest, context: CallContext) -> Empty:
        self._require(ask.target, "Grant")
        if _GRANT_LOST.fires():
            return Empty()
        sides = (self._decode.moves_in, self._decode.moves_out, self._prompts)
        for verdict in ask.verdicts:
            is_known = any(side.claim_answered(verdict) for side in sides)
            if verdict.granted and not is_known and not self._has(verdict.key):
                self._give_up(ask.gateway_id, verdict)
        self._outbox.flush()
        return Empty()

    def _has(self, key: RequestKey) -> bool:
        """An earlier answer to the same claim made it this worker's."""
        return self._decode.has(key) or self._prefill.has(key)

    def _give_up(self, gateway_id: GatewayId, verdict: ClaimVerdict) -> None:
        """What was granted is not here any more. Of one that has ended here, or has moved on, nobody takes notice."""
        _GRANTED_TOO_LATE.reached()
        key = verdict.key
        message = f"{self._own.worker_id} gave the request up before its claim was granted"
        self._outbox.tell(
            gateway_id,
            TokenDelta(
                request_id=key.request_id,
                attempt=key.attempt,
                owner_epoch=key.owner_epoch,
                index=verdict.next_index,
                finish="error",
                error=ErrorInfo(code=WorkerUnavailable.code, message=message),
            ),
        )

    def check_handoff(self, ask: HandoffRequest) -> None:
        """Raises NotReady for a move to a worker that drains."""
        if ask.move is not None:
            self._standing.check_open("request that moves")
            self._busy.set()

    def _require(self, target: int, what: str) -> None:
        if target != self._own.incarnation:
            raise StaleIncarnation(
                f"{what} is meant for {self._own.worker_id} incarnation {target}, this is {self._own.incarnation}"
            )
        if self._group is None:
            raise NotReady(f"{self._own.worker_id} is stopping", retry_after_s=1.0)

    # --- which, and how ---------------------------------------------------------------------------

    def _candidates(self, ask: MigrateRequest) -> list[Candidate[Answer | Prompt]]:
        """Those that are here and asked for by name, if any are; which of them may go is asked of `wanted_of`."""
        found: list[Candidate[Answer | Prompt]] = []

        def add(one: Answer | Prompt, kind: Kind, place: int = 0) -> None:
            request, num_tokens = one.sequence.request, len(one.sequence.token_ids)
            if not ask.request_ids or request.request_id in ask.request_ids:
                num_blocks = self._engine.identity.layout.blocks_for(num_tokens)
                found.append(Candidate(one, kind, counted_priority(request.priority), num_tokens, num_blocks, place))

        for answer in self._decode.answers():
            add(answer, Kind.RUNNING if answer.sequence.block_ids else Kind.PREEMPTED)
        for place, prompt in enumerate(reversed(self._prefill.movable()) if ask.waiting else ()):
            add(prompt, Kind.PROMPT, place)
        return found

    def _send(self, answer: Answer, ask: MigrateRequest) -> str | None:
        """Begins a move; None, or why not."""
        sequence = answer.sequence
        if not sequence.block_ids:
            self._decode.moves_out.send_tokens(answer, ask.destination)
            self.begun["tokens"] += 1
            return None
        identity, num_tokens = self._engine.identity, len(sequence.token_ids)
        block_tokens = identity.layout.block_tokens
        costs = costs_of(
            num_tokens,
            identity.layout.block_bytes // block_tokens,
            ask.bandwidth_bytes_per_s,
            self._reading_s(num_tokens, 0) or None,
        )
        mode, _ = choose_mode(costs, ask.mode)
        if sequence.num_remaining > 1:
            # It was preempted, and is being read again: there is not much KV yet.
            mode = "tokens"
        if mode in ("kv", "stop_and_copy") and (refusal := self._refusal(ask.destination)) is not None:
            return refusal
        moves = self._decode.moves_out
        if mode == "tokens":
            moves.send_tokens(answer, ask.destination)
        elif mode == "stop_and_copy":
            moves.stop_and_send_kv(answer, ask.destination)
        elif mode == "stop_and_read":
            moves.stop_and_send_tokens(answer, ask.destination)
        else:
            last = min(
                sequence.request.num_prompt_tokens + sequence.request.sampling.max_tokens,
                self._engine.max_context_tokens,
            )
            spare = spare_blocks(costs, self._step_s(num_tokens), last - num_tokens, block_tokens)
            if not moves.send_kv(answer, ask.destination, spare):
                return f"there are no {spare} blocks for it to grow into while it is copied"
        self.begun[mode] += 1
        return None

    def _step_s(self, num_tokens: int) -> float | None:
        """Between two tokens of one answer that is alone here: others only make it longer."""
        fit = self._latency()
        if not fit.num_decode_steps:
            return None
        return fit.decode_base_s + fit.sequence_s + fit.context_token_s * num_tokens

    # --- calls ------------------------------------------------------------------------------------

    async def offer(self, peer: Peer, ask: HandoffRequest, timeout_s: float) -> HandoffReply:
        return await self._network.channel(peer.address).call(HANDOFF, ask, timeout_s=timeout_s)

    def take_over(self, peer: Peer, ask: TakeOverRequest, on_answer: Callable[[TandemError | None], None]) -> None:
        async def call() -> None:
            error: TandemError | None = None
            try:
                await self._network.channel(peer.address).call(TAKE_OVER, ask, timeout_s=CALL_TIMEOUT_S)
            except TandemError as raised:
                error = raised
            on_answer(DeadlineExceeded("the answer is lost on purpose") if _TAKE_OVER_LOST.fires() else error)

        self._spawn(call(), lambda: on_answer(NotReady(f"{self._own.worker_id} is stopping")))

    def ask_yield(self, peer: Peer, ask: YieldRequest, on_answer: Callable[[YieldReply | TandemError], None]) -> None:
        async def call() -> None:
            answer: YieldReply | TandemError
            channel = self._network.channel(peer.address)
            try:
                if _YIELD_TWICE.fires():
                    await channel.call(YIELD, ask, timeout_s=CALL_TIMEOUT_S)
                answer = await channel.call(YIELD, ask, timeout_s=CALL_TIMEOUT_S)
            except TandemError as raised:
                answer = raised
            on_answer(answer)
            self._outbox.flush()

        self._spawn(call(), lambda: on_answer(NotReady(f"{self._own.worker_id} is stopping")))

    def decline(self, peer: Peer, ask: DeclineRequest) -> None:
        async def call() -> None:
            try:
                await self._network.channel(peer.address).call(DECLINE, ask, timeout_s=CALL_TIMEOUT_S)
            except TandemError as error:
                # It takes the move back by itself, when that has taken too long.
                self._log(f"{peer.worker_id} could not be told that {ask.key.request_id} is not taken: {error.message}")

        self._spawn(call(), lambda: None)

    def cancel(self, peer: Peer, key: RequestKey, reason: str) -> None:
        async def call() -> None:
            try:
                body = CancelRequest(requests=(key,), reason=reason)
                await self._network.channel(peer.address).call(CANCEL, body, timeout_s=CALL_TIMEOUT_S)
            except TandemError as error:
                # It gives up by itself: its claim will be refused.
                self._log(f"{peer.worker_id} could not be told that {key.request_id} does not come: {error.message}")

        self._spawn(call(), lambda: None)

    def claim(self, gateway_id: GatewayId, claim: Claim) -> None:
        self._outbox.claim(gateway_id, claim)
        self._outbox.flush()

    def hears(self, gateway_id: GatewayId) -> bool:
        return self._outbox.is_read_by(gateway_id)

    def _spawn(self, work: Coroutine[object, object, None], otherwise: Callable[[], None]) -> None:
        self._busy.set()
        try:
            if self._group is not None:
                self._group.create_task(work)
                return
        except RuntimeError:
            # A bug ends the group: like its other tasks this one is cancelled, only before it begins.
            pass
        work.close()
        otherwise()
