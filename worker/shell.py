"""A worker, put together: ledger, leases, both roles, one step loop, frames, and the rpc handlers.

The handlers are thin: check that the message is meant for this life, pass it to the side it belongs to, wake the
step loop. What happens to a request afterwards is decided in `prefill`, `decode` and `kvtransfer`.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar, cast

from contracts.control_messages import DRAIN, SET_ROLE
from contracts.errors import Internal, InvariantBroken, NotReady, StaleIncarnation, TransferAborted
from contracts.failpoints import RarePath
from contracts.messages import (
    AUDIT,
    CANCEL,
    DESCRIBE,
    FETCH,
    FRAMES,
    HANDOFF,
    PREFILL,
    AuditReply,
    DescribeReply,
    Empty,
    HandoffRequest,
    Peer,
    WorkerLoad,
)
from contracts.store_messages import CACHE_CLEAR, CACHE_STAT, CacheClearReply
from decode import DecodeBatch, DecodeLimits
from decode.swap import Swaps
from engine.compose import StepBudget
from engine.room import Room
from kvstore.fetch_answers import FetchAnswers
from kvstore.fetches import PrefixFetches
from kvstore.look_ahead import LookAhead
from kvstore.prefix_cache import PrefixCache
from kvtransfer import HolderService, Ledger, Prober, ReaderService
from prefill import PrefillLimits, PrefillQueue
from prefill.admission import may_fetch
from worker.block_publisher import BlockPublisher
from worker.device_tier import DeviceTier
from worker.frames import FrameOutbox
from worker.moves import Moves
from worker.peers import PeerWatch
from worker.registration import Registration
from worker.standing import OpenWork, Standing
from worker.step_loop import StepLoop
from worker.store_offers import StoreOffers
from worker.transfers import transfer_report
from worker.waiting_blocks import waiting_blocks
from worker.watchdog import LOOK_INTERVAL_S, LifeOver, Watchdog, WatchdogLimits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable

    from contracts.clock import Clock
    from contracts.control_messages import DrainRequest, SetRoleRequest
    from contracts.ids import GatewayId, Incarnation, WorkerId
    from contracts.messages import (
        CancelRequest,
        DescribeRequest,
        FetchReply,
        FetchRequest,
        FramesRequest,
        HandoffReply,
        LeaseTerms,
        PrefillRequest,
        RequestKey,
        Role,
        WorkerInfo,
        WorkerLife,
    )
    from contracts.requests import Frame, GenerateRequest
    from contracts.store_messages import CacheClearRequest, CacheStatReply, CacheStatRequest
    from engine.plan import Engine
    from kvtransfer import Pool, TransportSet
    from kvtransfer.staging import Staging
    from rpc import CallContext, Network, Server

AskT = TypeVar("AskT")
ReplyT = TypeVar("ReplyT")

#: How often deadlines of requests are looked at.
SWEEP_INTERVAL_S = 0.5
#: What a worker whose life is over gets to tell everybody.
LAST_WORDS_S = 1.5

_OTHER_LIFE_CALLED = RarePath("worker.other_life_called", "a call was meant for another life of this worker")
_PEER_BURIED = RarePath("worker.peer_buried", "the coordinator told of a life that is over")
_LIFE_OVER = RarePath("worker.life_over", "a worker ends its own life")


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLimits:
    budget: StepBudget = field(default_factory=lambda: StepBudget(max_tokens=512, max_sequences=64))
    prefill: PrefillLimits = field(default_factory=PrefillLimits)
    decode: DecodeLimits = field(default_factory=DecodeLimits)
    lease_ttl_s: float = 10.0
    max_waiting_offers: int = 256
    #: Deltas waiting for one gateway's stream before that gateway is given up.
    max_pending_deltas: int = 20_000
    watchdog: WatchdogLimits = field(default_factory=WatchdogLimits)
    #: Whether the ways to peers are measured before they are needed.
    probe: bool = True
    #: Whether the KV of prompts is kept for others that begin alike.
    prefix_cache: bool = True
    #: Whether targets of answers cut the prompts that are read beside them.
    tpot_chunks: bool = True


class WorkerShell:
    """Use: construct, `register_on(server)`, then `await run()` until cancelled."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        engine: Engine,
        transports: TransportSet,
        network: Network,
        clock: Clock,
        coordinator_address: str,
        limits: WorkerLimits,
        pool: Pool | None = None,
        checksum: bool = False,
        staging: Staging | None = None,
        on_role: Callable[[Role], None] = lambda role: None,
        log: Callable[[str], None],
    ) -> None:
        """`checksum` needs `pool`, whose bytes it covers; `staging` is for pools in device memory. `on_role` hears of
        another role than that of `info`."""
        self._info = info
        as_peer = Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address)
        self._network = network
        self._clock = clock
        self._log = log
        self._engine = engine
        self._transports = transports
        #: Set as soon as it is clear that `run` will raise LifeOver.
        self._life_over = asyncio.Event()
        #: What requests and coordinator are told when this life ends.
        self._end_reason = "it is stopping"
        self._watchdog = Watchdog(limits.watchdog)
        #: No new request is taken any more.
        self._stopping = False
        #: Found by an rpc handler; ends `run`.
        self._bug: InvariantBroken | None = None
        self._bug_found = asyncio.Event()
        #: Where each peer was last heard to be.
        self._peer_addresses: dict[WorkerId, str] = {}
        self.ledger = Ledger(engine.num_blocks)
        self.holder = HolderService(
            ledger=self.ledger,
            network=network,
            clock=clock,
            worker=as_peer,
            identity=info.identity,
            transports=transports,
            ttl_s=limits.lease_ttl_s,
            pool=pool,
            checksum=checksum,
            staging=staging,
            on_settled=self._blocks_may_be_free,
            log=log,
        )
        self.reader = ReaderService(
            ledger=self.ledger,
            network=network,
            clock=clock,
            transports=transports,
            identity=info.identity,
            max_waiting=limits.max_waiting_offers,
            may_reserve=lambda: self.decode.may_reserve(),
            pool=pool,
            checksum=checksum,
            staging=staging,
            on_settled=self._blocks_may_be_free,
            log=log,
        )
        self._prober = Prober(
            self.ledger,
            clock,
            block_bytes=info.identity.layout.block_bytes,
            on_settled=self._blocks_may_be_free,
        )
        self._registration = Registration(
            info=info,
            network=network,
            coordinator_address=coordinator_address,
            clock=clock,
            load=self.load,
            transfers=lambda: transfer_report(self.holder, self.reader, transports),
            latency=lambda: self.loop.latency.fit(),
            on_gone=self._bury,
            on_registered_anew=lambda: self.publisher.registered_anew(),
            log=log,
        )
        #: Set once the coordinator has taken this life up.
        self.registered: asyncio.Event = self._registration.registered
        self.publisher = BlockPublisher(
            info=info,
            held=self.ledger.all_keys,
            network=network,
            coordinator_address=coordinator_address,
            clock=clock,
            registered=self.registered,
            log=log,
        )
        self._peers = PeerWatch(
            info=info,
            network=network,
            coordinator_address=coordinator_address,
            transports=transports,
            prober=self._prober,
            clock=clock,
            fetches=limits.prefix_cache,
            probes=limits.probe,
            on_store=lambda store: self.store_offers.use(store),
            log=log,
        )
        self.standing = Standing(
            info, open_work=self._open_work, on_change=self._registration.tell_soon, on_role=self._serve_as
        )
        self._on_role = on_role
        self.outbox = FrameOutbox(
            worker_id=info.worker_id,
            incarnation=info.incarnation,
            clock=clock,
            max_pending_deltas=limits.max_pending_deltas,
            on_given_up=self._gateway_given_up,
        )
        room = self.room = Room(
            layout=info.identity.layout,
            num_blocks=engine.num_blocks,
            growth_tokens=limits.decode.growth_tokens,
            available_blocks=lambda: self.ledger.available_blocks,
        )
        self.prefixes = PrefixCache(self.ledger, info.identity, enabled=limits.prefix_cache)
        self.device_tier = DeviceTier(
            ledger=self.ledger,
            prefixes=self.prefixes,
            reader=self.reader,
            layout=info.identity.layout,
            listener=self.publisher,
        )
        self.store_offers = StoreOffers(
            prefixes=self.prefixes,
            holder=self.holder,
            network=network,
            clock=clock,
            may_take=lambda num_blocks: may_fetch(num_blocks, room.view()),
            on_blocks_freed=self._blocks_may_be_free,
            log=log,
        )
        self.fetches = PrefixFetches(
            ledger=self.ledger,
            prefixes=self.prefixes,
            reader=self.reader,
            network=network,
            clock=clock,
            worker=as_peer,
            identity=info.identity,
            refusal=transports.refusal,
            may_take=lambda num_blocks: may_fetch(num_blocks, room.view()),
            on_ended=self._blocks_may_be_free,
            on_bug=self._found,
            on_copied=self.store_offers.served,
            log=log,
        )
        self.fetch_answers = FetchAnswers(
            prefixes=self.prefixes,
            holder=self.holder,
            identity=info.identity,
            on_blocks_freed=self._blocks_may_be_free,
        )
        self.moves = Moves(
            own=as_peer,
            network=network,
            clock=clock,
            engine=engine,
            outbox=self.outbox,
            standing=self.standing,
            refusal=transports.refusal,
            latency=lambda: self.loop.latency.fit(),
            reading_s=self._reading_s,
            on_change=self._blocks_may_be_free,
            log=log,
        )
        sequence_ids = itertools.count()
        self.decode = DecodeBatch(
            engine=engine,
            ledger=self.ledger,
            prefixes=self.prefixes,
            reader=self.reader,
            room=room,
            holder=self.holder,
            own=as_peer,
            limits=limits.decode,
            emit=self.outbox.emit,
            move_calls=self.moves,
            swaps=Swaps(
                keep=self.store_offers.keep,
                store=lambda: self.store_offers.store,
                start_fetch=self.fetches.start,
                expected_fetch_s=self.fetches.expected_s,
                reading_s=self._reading_s,
                block_tokens=info.identity.layout.block_tokens,
            ),
            clock=clock,
            on_change=self._blocks_may_be_free,
            sequence_ids=sequence_ids,
            keep=self.store_offers.keep,
        )
        self.prefill = PrefillQueue(
            engine=engine,
            ledger=self.ledger,
            prefixes=self.prefixes,
            holder=self.holder,
            room=room,
            own_worker_id=info.worker_id,
            limits=limits.prefill,
            emit=self.outbox.emit,
            send_offer=self._send_offer,
            start_fetch=self.fetches.start,
            hand_over=self.decode.take_over,
            also_writes=info.role == "mixed",
            on_blocks_freed=self._blocks_may_be_free,
            sequence_ids=sequence_ids,
            ahead_tokens=limits.budget.max_tokens,
            reading_s=self._reading_s,
            expected_fetch_s=self.fetches.expected_s,
            on_order=lambda: self.look_ahead.changed(),
            on_read=lambda request, chain: self.store_offers.keep(chain, len(chain), request),
        )
        self.moves.join(self.decode, self.prefill)
        self.look_ahead = LookAhead(
            worker=as_peer,
            wanted=self.prefill.wanted,
            is_store=lambda worker_id: worker_id in self._peers.stores,
            network=network,
            clock=clock,
        )
        self.loop = StepLoop(
            engine=engine,
            sources=(self.decode, self.prefill),
            budget=limits.budget,
            clock=clock,
            watchdog=self._watchdog,
            after_step=self.outbox.flush,
            log=log,
            tpot_chunks=limits.tpot_chunks,
        )
        self._max_batch_tokens = limits.budget.max_tokens

    def register_on(self, server: Server) -> None:
        server.register(PREFILL, self._fatal_if_broken(self._on_prefill))
        server.register(CANCEL, self._fatal_if_broken(self._on_cancel))
        server.register(HANDOFF, self._fatal_if_broken(self._on_handoff))
        server.register(FETCH, self._fatal_if_broken(self._on_fetch))
        self.moves.register_on(server, self._fatal_if_broken)
        server.register(DRAIN, self._on_drain)
        server.register(SET_ROLE, self._fatal_if_broken(self._on_set_role))
        server.register(AUDIT, self._on_audit)
        server.register(CACHE_STAT, self._on_cache_stat)
        server.register(CACHE_CLEAR, self._fatal_if_broken(self._on_cache_clear))
        server.register(DESCRIBE, self._on_describe)
        server.register_stream(FRAMES, self._on_frames)
        self.holder.register(server)
        self.reader.register(server)

    async def run(self) -> None:
        """Serves until cancelled, or until something cannot be; then ends what is open and says goodbye.

        Raises LifeOver (in a group) when this life must end.
        """
        async with self.holder, self.reader:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self.loop.run(), name="step-loop")
                    tasks.create_task(self._sweep(), name="sweep")
                    tasks.create_task(self._keep_registered(), name="heartbeat")
                    tasks.create_task(self.publisher.run(), name="block-events")
                    tasks.create_task(self.store_offers.run(), name="write-back")
                    tasks.create_task(self.look_ahead.run(), name="look-ahead")
                    tasks.create_task(self.moves.run(), name="moves")
                    tasks.create_task(self._end_on_a_bug(), name="bugs")
                    tasks.create_task(self._watch_over(), name="watchdog")
                    tasks.create_task(self._peers.run(), name="peers")
            finally:
                await self._leave()
                await self.fetches.close()
                await self._prober.close()

    async def live(self) -> str:
        """As `run`, but returns why this life must end, at most `LAST_WORDS_S` after that was clear.

        The process is to exit then without waiting for engine or transports: what is stuck in them is why it
        ends, or may be. Every request's gateway, the coordinator and the peers have been told, if they listened.
        """
        serving = asyncio.create_task(self.run(), name="serving")
        over = asyncio.create_task(self._life_over.wait(), name="life-over")
        try:
            await asyncio.wait([serving, over], return_when=asyncio.FIRST_COMPLETED)
            if not self._life_over.is_set():
                await serving
                raise Internal(f"{self._info.worker_id} ended without a reason")
            await asyncio.wait([serving], timeout=LAST_WORDS_S)
            return self._end_reason
        except asyncio.CancelledError:
            serving.cancel()
            await asyncio.wait([serving])
            raise
        finally:
            over.cancel()
            serving.cancel()
            serving.add_done_callback(_heard)

    # --- rpc handlers -----------------------------------------------------------------------------

    async def _on_prefill(self, ask: PrefillRequest, context: CallContext) -> Empty:
        self._require(ask.target, "Prefill")
        if not self.prefill.knows(ask.request):
            self.standing.check_open("new prompt")
        await self._note_peer(ask.decode)
        if ask.prefix is not None and ask.prefix.source is not None:
            await self._note_peer(ask.prefix.source)
        self.prefill.submit(ask, self._clock.now_s())
        self.loop.wake()
        return Empty()

    async def _on_cancel(self, ask: CancelRequest, context: CallContext) -> Empty:
        self._cancel(ask.requests, ask.reason)
        return Empty()

    async def _on_handoff(self, ask: HandoffRequest, context: CallContext) -> HandoffReply:
        self._require(ask.target, "Handoff")
        self.moves.check_handoff(ask)
        await self._note_peer(ask.terms.holder)
        if (refusal := self._transports.refusal(ask.terms.holder)) is not None:
            raise TransferAborted(refusal)
        return self.decode.offer(ask, self._clock.now_s())

    async def _on_fetch(self, ask: FetchRequest, context: CallContext) -> FetchReply:
        self._require(ask.target, "Fetch")
        if self.standing.draining and not self._open_work().requests:
            # Prefixes would be fetched for as long as there are any: a drain is to end.
            self.standing.check_open("fetch")
        await self._note_peer(ask.reader)
        return await self.fetch_answers.answer(ask)

    def _on_frames(self, ask: FramesRequest, context: CallContext) -> AsyncIterator[Frame]:
        self._require(ask.target, "Frames")
        return self.outbox.stream(ask.gateway_id)

    async def _on_drain(self, ask: DrainRequest, context: CallContext) -> Empty:
        self._require(ask.target, "Drain")
        was_draining = self.standing.draining
        self.standing.drain(ask, self._clock.now_s())
        if self.standing.draining != was_draining:
            self._log(f"{self._info.worker_id} {'drains' if ask.draining else 'drains no more'}: {ask.reason}")
        return Empty()

    async def _on_set_role(self, ask: SetRoleRequest, context: CallContext) -> Empty:
        self._require(ask.target, "SetRole")
        self.standing.set_role(ask)
        return Empty()

    async def _on_audit(self, ask: Empty, context: CallContext) -> AuditReply:
        return AuditReply(
            load=self.load(),
            total_blocks=self._engine.num_blocks,
            open_requests=self._open_work().requests,
            holder_leases=self.holder.num_leases,
            reader_leases=self.reader.num_leases,
            problems=self.problems(),
        )

    async def _on_describe(self, ask: DescribeRequest, context: CallContext) -> DescribeReply:
        self._require(ask.target, "Describe")
        return DescribeReply(
            identity=self._info.identity,
            num_blocks=self._engine.num_blocks,
            endpoints=self._transports.endpoints(),
        )

    async def _on_cache_stat(self, ask: CacheStatRequest, context: CallContext) -> CacheStatReply:
        self._require(ask.target, "CacheStat")
        return self.device_tier.stat()

    async def _on_cache_clear(self, ask: CacheClearRequest, context: CallContext) -> CacheClearReply:
        self._require(ask.target, "CacheClear")
        return CacheClearReply(dropped={"device": self.device_tier.clear()} if "device" in ask.tiers else {})

    def _require(self, target: Incarnation, what: str) -> None:
        if target != self._info.incarnation:
            _OTHER_LIFE_CALLED.reached()
            raise StaleIncarnation(
                f"{what} is meant for {self._info.worker_id} incarnation {target}, this is {self._info.incarnation}"
            )
        if self._stopping:
            raise NotReady(f"{self._info.worker_id} is stopping", retry_after_s=1.0)

    def _fatal_if_broken(
        self, handler: Callable[[AskT, CallContext], Awaitable[ReplyT]]
    ) -> Callable[[AskT, CallContext], Awaitable[ReplyT]]:
        """A handler that finds state which cannot be ends the worker: it must not go on to lie."""

        async def guarded(ask: AskT, context: CallContext) -> ReplyT:
            try:
                return await handler(ask, context)
            except InvariantBroken as error:
                self._found(error)
                raise

        return guarded

    def _found(self, bug: InvariantBroken) -> None:
        self._bug = bug
        self._bug_found.set()

    async def _end_on_a_bug(self) -> None:
        await self._bug_found.wait()
        assert self._bug is not None, "set together"
        raise self._bug

    async def _note_peer(self, peer: Peer) -> None:
        """Lets the connection to an earlier life of this peer go, unless another worker has its address now."""
        old = self._peer_addresses.get(peer.worker_id)
        self._peer_addresses[peer.worker_id] = peer.address
        if old not in (None, peer.address) and old not in self._peer_addresses.values():
            await self._network.drop(old)

    def _open_work(self) -> OpenWork:
        num_coming = self.moves.num_coming
        # A prompt on its way may be one that is to be written here.
        answers = self.prefill.own_count + self.decode.open_count + num_coming
        return OpenWork(
            requests=self.prefill.open_count + self.decode.open_count + num_coming,
            leases=self.holder.num_leases + self.reader.num_leases,
            prompts=self.prefill.open_count + num_coming - len(self.decode.moves_in),
            answers=answers,
        )

    def _serve_as(self, info: WorkerInfo) -> None:
        """The role has changed. What is open goes on: both sides are there in every role."""
        self._log(f"{info.worker_id} is a {info.role} worker from now on")
        self.prefill.set_also_writes(self.standing.also_writes)
        self._peers.role_changed(info)
        self._registration.changed(info)
        self._on_role(cast("Role", info.role))

    # --- between the sides ------------------------------------------------------------------------

    async def _send_offer(
        self, reader: Peer, terms: LeaseTerms, request: GenerateRequest, timeout_s: float
    ) -> HandoffReply:
        ask = HandoffRequest(target=reader.incarnation, terms=terms, request=request)
        return await self._network.channel(reader.address).call(HANDOFF, ask, timeout_s=timeout_s)

    def _reading_s(self, num_tokens: int, num_computed: int) -> float:
        return self.loop.latency.reading_s(
            tokens=num_tokens, num_computed=num_computed, max_tokens=self._max_batch_tokens
        )

    def _blocks_may_be_free(self) -> None:
        self.reader.blocks_freed()
        self.loop.wake()

    def _gateway_given_up(self, gateway_id: GatewayId, reason: str) -> None:
        keys = [*self.prefill.keys_of(gateway_id), *self.decode.keys_of(gateway_id)]
        self._log(f"gateway {gateway_id} {reason}; its {len(keys)} requests are cancelled")
        self._cancel(keys, f"gateway {gateway_id} {reason}")

    def _cancel(self, keys: Iterable[RequestKey], reason: str) -> None:
        for key in keys:
            self.prefill.cancel(key, reason)
            self.decode.cancel(key, reason)
            self.moves.cancel_here(key, reason)
        self.loop.wake()

    # --- upkeep -----------------------------------------------------------------------------------

    async def _sweep(self) -> None:
        while True:
            await self._clock.sleep(SWEEP_INTERVAL_S)
            now_s = self._clock.now_s()
            self.standing.look(now_s)
            self.prefill.expire(now_s)
            self.decode.expire(now_s)
            self.outbox.expire(now_s)
            self.outbox.flush()
            # What ended may have stood in the way of something that fits.
            self.loop.wake()

    async def _watch_over(self) -> None:
        """Ends this life when the watchdog says so."""
        while True:
            await self._clock.sleep(LOOK_INTERVAL_S)
            reason = self._watchdog.look(
                self._clock.now_s(),
                quarantined_blocks=self.ledger.load()["quarantined_blocks"],
                total_blocks=self._engine.num_blocks,
            )
            if reason is not None:
                raise self._over(reason)

    def _over(self, reason: str) -> LifeOver:
        _LIFE_OVER.reached()
        self._end_reason = reason
        self._life_over.set()
        return LifeOver(f"{self._info.worker_id} incarnation {self._info.incarnation} ends: {reason}")

    async def _keep_registered(self) -> None:
        try:
            await self._registration.keep()
        except LifeOver as error:
            raise self._over(error.message) from error

    def _bury(self, life: WorkerLife) -> None:
        """Ends the leases with a life that the coordinator has given up."""
        _PEER_BURIED.reached()
        self.holder.reader_gone(life.worker_id, life.incarnation)
        self.reader.holder_gone(life.worker_id, life.incarnation)

    async def _leave(self) -> None:
        """Nothing new from here on, and no request left to wait for its deadline."""
        self._stopping = True
        message = f"{self._info.worker_id} ends: {self._end_reason}"
        self.decode.fail_all("worker_unavailable", message)
        self.prefill.fail_all("worker_unavailable", message)
        self.outbox.flush()
        await self._registration.leave(self._end_reason)

    def load(self) -> WorkerLoad:
        work = self._open_work()
        wanted = waiting_blocks(
            self.room.view(),
            preempted=self.decode.preempted_blocks,
            offered_blocks=self.decode.offered_blocks,
            unread_blocks=self.prefill.waiting_blocks,
        )
        return WorkerLoad(
            **self.ledger.load(),
            waiting_requests=self.prefill.waiting_count + self.decode.waiting_count,
            waiting_offers=self.decode.waiting_offers,
            pending_prompt_tokens=self.prefill.pending_tokens,
            pending_prompt_pairs=self.prefill.pending_pairs,
            unread_for=self.prefill.unread_for,
            running_requests=self.prefill.running_count + self.decode.running_count,
            running_decodes=self.decode.decode_count,
            context_tokens=self.decode.context_tokens,
            unread_tokens=self.decode.unread_tokens,
            answers=self.prefill.answer_tallies.report(self.decode.answer_tallies),
            step_age_s=self._watchdog.step_age_s(self._clock.now_s()),
            draining=self.standing.draining,
            open_requests=work.requests,
            open_leases=work.leases,
            open_prompts=work.prompts,
            open_answers=work.answers,
            head_demand_blocks=wanted.head,
            queued_demand_blocks=wanted.all,
            priorities=self.decode.priorities,
            preempted_answers=self.decode.preempted_count,
            waiting_prompts=self.prefill.waiting_count,
            moving_out=self.moves.num_leaving,
            moving_in=self.moves.num_coming,
        )

    def problems(self) -> tuple[str, ...]:
        """What is wrong with the books; empty in a healthy worker."""
        return tuple(self.ledger.problems())


def _heard(task: asyncio.Task[None]) -> None:
    """Its error is known."""
    if not task.cancelled():
        task.exception()
