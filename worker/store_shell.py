"""A store, put together: host memory, disk tier, leases, and the rpc handlers.

A store is a worker without an engine. It takes blocks as a reader, from workers that offer them (Keep), and gives them
as a holder, to workers that ask (Fetch); what stands where is `kvstore.tiers.machine`'s, here its instructions become
leases, reads and writes.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec.structs import replace

from contracts.errors import BadRequest, Internal, InvariantBroken, NotReady, StaleIncarnation, TransferAborted
from contracts.messages import (
    AUDIT,
    DESCRIBE,
    FETCH,
    AuditReply,
    DescribeReply,
    Empty,
    LatencyFit,
    Peer,
    WorkerLoad,
)
from contracts.store_messages import (
    CACHE_CLEAR,
    CACHE_LIST,
    CACHE_PIN,
    CACHE_STAT,
    KEEP,
    PREFETCH,
    CacheClearReply,
    CachePinReply,
    CacheStatReply,
)
from kvstore.tiers.answers import StoreAnswers, check_keys
from kvstore.tiers.disk import NoDisk
from kvstore.tiers.dram import DramTier
from kvstore.tiers.events import (
    BlockRead,
    Kept,
    PinAsked,
    ReadDisk,
    StoreTick,
    UnpinAsked,
    WindowTold,
    WriteDisk,
    Written,
)
from kvstore.tiers.listing import list_blocks
from kvstore.tiers.machine import StoreLimits, StoreMachine
from kvtransfer import HolderService, Ledger, Prober, ReaderService
from kvtransfer.holder import MAX_BLOCKS_PER_PROGRESS
from worker.block_publisher import BlockPublisher
from worker.peers import PeerWatch
from worker.registration import Registration
from worker.transfers import transfer_report
from worker.watchdog import LifeOver

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable

    from contracts.clock import Clock
    from contracts.errors import TandemError
    from contracts.ids import BlockId, Incarnation, LeaseId
    from contracts.messages import (
        DescribeRequest,
        FetchReply,
        FetchRequest,
        HandoffReply,
        Seal,
        WorkerInfo,
        WorkerLife,
    )
    from contracts.store_messages import (
        CacheClearRequest,
        CacheListReply,
        CacheListRequest,
        CachePinRequest,
        CacheStatRequest,
        KeepRequest,
        PrefetchRequest,
    )
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.dram import EvictionSuggestions
    from kvstore.tiers.events import StoreEvent, StoreInstruction
    from kvtransfer import Pool, TransportSet
    from rpc import CallContext, Network, Server

#: How often the machine is told that time has passed.
TICK_S = 0.5
#: What reads and writes under way get to end when the store stops: less than its node agent waits for it.
DISK_GRACE_S = 2.0
#: Prompts and blocks of one worker's window that are looked at.
MAX_WINDOW_PROMPTS = 64
MAX_WINDOW_BLOCKS = 16_384
#: Blocks that are listed at most.
MAX_LISTED = 1_000
#: `WriteDisk`s that the disk works on at once: one is encoded while the other is written.
WRITES_AT_ONCE = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreShellLimits:
    store: StoreLimits = field(default_factory=StoreLimits)
    lease_ttl_s: float = 10.0
    probe: bool = True


class StoreShell:
    """Use: construct, `register_on(server)`, then `await run()` until cancelled."""

    def __init__(
        self,
        *,
        info: WorkerInfo,
        transports: TransportSet,
        network: Network,
        clock: Clock,
        coordinator_address: str,
        eviction: EvictionSuggestions,
        disk: DiskTier | None = None,
        limits: StoreShellLimits | None = None,
        pool: Pool | None = None,
        checksum: bool = False,
        log: Callable[[str], None],
    ) -> None:
        """`transports` have the pool registered whose blocks are the host memory; `disk` reads and writes the same."""
        limits = limits or StoreShellLimits()
        self._info = info
        self._clock = clock
        self._log = log
        self._transports = transports
        self._disk: DiskTier = disk or NoDisk()
        self._layout = info.identity.layout
        self._stopping = False
        self._bug: InvariantBroken | None = None
        self._bug_found = asyncio.Event()
        #: Present while it runs: reads and writes of the disk.
        self._disk_tasks: dict[asyncio.Task[None], None] = {}
        self._write_slots = asyncio.Semaphore(WRITES_AT_ONCE)
        as_peer = Peer(worker_id=info.worker_id, incarnation=info.incarnation, address=info.address)
        self.ledger = Ledger(info.total_blocks)
        self.dram = DramTier(self.ledger, self._disk, eviction, block_bytes=self._layout.block_bytes)
        self.machine = StoreMachine(self.dram, self._disk, limits.store, block_tokens=self._layout.block_tokens)
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
            on_settled=self._blocks_may_be_free,
            log=log,
        )
        self.reader = ReaderService(
            ledger=self.ledger,
            network=network,
            clock=clock,
            transports=transports,
            identity=info.identity,
            pool=pool,
            checksum=checksum,
            on_settled=self._blocks_may_be_free,
            log=log,
        )
        self.answers = StoreAnswers(
            holder=self.holder,
            identity=info.identity,
            feed=self._feed,
            on_blocks_freed=self._blocks_may_be_free,
        )
        self._prober = Prober(
            self.ledger, clock, block_bytes=self._layout.block_bytes, on_settled=self._blocks_may_be_free
        )
        self._registration = Registration(
            info=info,
            network=network,
            coordinator_address=coordinator_address,
            clock=clock,
            load=self.load,
            transfers=lambda: replace(
                transfer_report(self.holder, self.reader, transports), unencoded_blocks=self._num_unencoded()
            ),
            latency=lambda: LatencyFit(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0, 0),
            on_gone=self._bury,
            on_registered_anew=lambda: self.publisher.registered_anew(),
            log=log,
        )
        #: Set once the coordinator has taken this life up.
        self.registered = self._registration.registered
        self.publisher = BlockPublisher(
            info=info,
            held=self._all_keys,
            network=network,
            coordinator_address=coordinator_address,
            clock=clock,
            registered=self.registered,
            holds_already=disk is not None,
            log=log,
        )
        self.dram.news = self.publisher
        self._peers = PeerWatch(
            info=info,
            network=network,
            coordinator_address=coordinator_address,
            transports=transports,
            prober=self._prober,
            clock=clock,
            fetches=True,
            log=log,
        )
        self._probe = limits.probe

    def __repr__(self) -> str:
        return f"<StoreShell {self._info.worker_id} {self.machine!r}>"

    def register_on(self, server: Server) -> None:
        server.register(KEEP, self._on_keep)
        server.register(FETCH, self._on_fetch)
        server.register(PREFETCH, self._on_prefetch)
        server.register(AUDIT, self._on_audit)
        server.register(DESCRIBE, self._on_describe)
        server.register(CACHE_STAT, self._on_stat)
        server.register(CACHE_LIST, self._on_list)
        server.register(CACHE_CLEAR, self._on_clear)
        server.register(CACHE_PIN, self._on_pin)
        self.holder.register(server)
        self.reader.register(server)

    async def run(self) -> None:
        """Serves until cancelled, or until something cannot be. Raises LifeOver (in a group) when the coordinator has
        given this life up: the store is to begin another one."""
        async with self.holder, self.reader:
            try:
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._registration.keep(), name="heartbeat")
                    tasks.create_task(self.publisher.run(), name="block-events")
                    tasks.create_task(self._keep_time(), name="store-clock")
                    tasks.create_task(self._end_on_a_bug(), name="bugs")
                    if self._probe:
                        tasks.create_task(self._peers.run(), name="peers")
            finally:
                self._stopping = True
                await self._registration.leave("it is stopping")
                await self._prober.close()
                await self._finish_disk()

    async def live(self) -> str:
        """As `run`, but returns why this life must end."""
        reason = ""
        try:
            await self.run()
        except* LifeOver as group:
            reason = str(group.exceptions[0])
        return reason

    def disk_lost(self, keys: Iterable[bytes]) -> None:
        """The disk tier gave these up."""
        for key in keys:
            if self.ledger.lookup(key) is None:
                self.publisher.removed(key)

    def disk_found(self, keys: Iterable[bytes]) -> None:
        """The disk tier could be read only now, and has these."""
        self._disk.pin(list(self.dram.pinned_keys))
        for key in keys:
            if self.ledger.lookup(key) is None:
                self.publisher.stored(key)

    def load(self) -> WorkerLoad:
        return WorkerLoad(**self.ledger.load(), running_requests=self.machine.num_fetches)

    def problems(self) -> tuple[str, ...]:
        """What is wrong with the books; empty in a healthy store."""
        try:
            self.machine.check()
        except InvariantBroken as error:
            return (error.message, *self.ledger.problems())
        return tuple(self.ledger.problems())

    # --- rpc handlers -----------------------------------------------------------------------------

    async def _on_fetch(self, ask: FetchRequest, context: CallContext) -> FetchReply:
        self._require(ask.target, "Fetch")
        return await self.answers.answer(ask)

    async def _on_keep(self, ask: KeepRequest, context: CallContext) -> HandoffReply:
        self._require(ask.target, "Keep")
        terms = ask.terms
        if (refusal := self._transports.refusal(terms.holder)) is not None:
            raise TransferAborted(refusal)
        check_keys(ask.keys, MAX_BLOCKS_PER_PROGRESS, ask.first_block)
        if len(ask.keys) != terms.num_blocks:
            raise BadRequest(f"lease {terms.lease_id}: {len(ask.keys)} keys of {terms.num_blocks} blocks")
        have = self.machine.num_standing(ask.keys)
        owner = f"keep/{terms.lease_id}"

        def adopted(lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
            num_sealed = min(len(blocks), max(0, seal.num_tokens // self._layout.block_tokens - have))
            self._feed(
                Kept(
                    owner=owner,
                    keys=ask.keys[have : have + num_sealed],
                    blocks=tuple(blocks[:num_sealed]),
                    first_block=ask.first_block + have,
                    num_tokens=(ask.first_block + len(ask.keys)) * self._layout.block_tokens,
                    lossy=ask.lossy,
                )
            )
            self.ledger.release_all(owner)

        def aborted(lease_id: LeaseId, error: TandemError) -> None:
            """Nothing is missed: the worker offers again what the next turn brings."""

        return self.reader.offer(terms, owner=owner, on_adopted=adopted, on_aborted=aborted, waits=False, have=have)

    async def _on_prefetch(self, ask: PrefetchRequest, context: CallContext) -> Empty:
        self._require(ask.target, "Prefetch")
        prompts = ask.prompts[:MAX_WINDOW_PROMPTS]
        for keys in prompts:
            check_keys(keys, MAX_WINDOW_BLOCKS)
        self._feed(WindowTold(ask.worker_id, prompts))
        return Empty()

    async def _on_audit(self, ask: Empty, context: CallContext) -> AuditReply:
        return AuditReply(
            load=self.load(),
            total_blocks=self.ledger.num_blocks,
            open_requests=self.machine.num_fetches,
            holder_leases=self.holder.num_leases,
            reader_leases=self.reader.num_leases,
            problems=self.problems(),
        )

    async def _on_describe(self, ask: DescribeRequest, context: CallContext) -> DescribeReply:
        self._require(ask.target, "Describe")
        return DescribeReply(
            identity=self._info.identity,
            num_blocks=self.ledger.num_blocks,
            endpoints=self._transports.endpoints(),
        )

    def _num_unencoded(self) -> int:
        figures = self._disk.figures()
        return 0 if figures is None else figures.unencoded_blocks

    async def _on_stat(self, ask: CacheStatRequest, context: CallContext) -> CacheStatReply:
        self._require(ask.target, "CacheStat")
        tiers = (self.dram.figures(), self._disk.figures())
        return CacheStatReply(
            tiers=tuple(each for each in tiers if each is not None),
            block_tokens=self._layout.block_tokens,
            block_bytes=self._layout.block_bytes,
        )

    async def _on_list(self, ask: CacheListRequest, context: CallContext) -> CacheListReply:
        self._require(ask.target, "CacheList")
        return list_blocks(ask, self.dram, self._disk, now_s=self._clock.now_s(), most=MAX_LISTED)

    async def _on_clear(self, ask: CacheClearRequest, context: CallContext) -> CacheClearReply:
        self._require(ask.target, "CacheClear")
        dropped: dict[str, int] = {}
        # The disk first: what is pinned stays in memory only as long as it stands there alone.
        if "ssd" in ask.tiers:
            dropped["ssd"] = self._disk.clear(with_pinned=ask.with_pinned)
        if "dram" in ask.tiers:
            dropped["dram"] = self.dram.clear(with_pinned=ask.with_pinned)
        self._blocks_may_be_free()
        return CacheClearReply(dropped=dropped)

    async def _on_pin(self, ask: CachePinRequest, context: CallContext) -> CachePinReply:
        self._require(ask.target, "CachePin")
        check_keys(ask.keys, MAX_WINDOW_BLOCKS)
        num_blocks = self.machine.num_standing(ask.keys)
        keys = ask.keys[:num_blocks]
        if not ask.pin:
            self._feed(UnpinAsked(keys))
        else:
            self._feed(PinAsked(keys, None if ask.for_s is None else self._clock.now_s() + ask.for_s))
        reason = "" if num_blocks == len(ask.keys) else f"block {num_blocks} of {len(ask.keys)} is not here"
        return CachePinReply(num_blocks=num_blocks, reason=reason)

    def _require(self, target: Incarnation, what: str) -> None:
        if target != self._info.incarnation:
            raise StaleIncarnation(
                f"{what} is meant for {self._info.worker_id} incarnation {target}, this is {self._info.incarnation}"
            )
        if self._stopping:
            raise NotReady(f"{self._info.worker_id} is stopping", retry_after_s=1.0)

    # --- the machine --------------------------------------------------------------------------------------

    def _feed(self, event: StoreEvent) -> None:
        try:
            for instruction in self.machine.handle(event, self._clock.now_s()):
                self._perform(instruction)
        except InvariantBroken as error:
            self._bug = error
            self._bug_found.set()
            raise

    def _perform(self, instruction: StoreInstruction) -> None:
        match instruction:
            case ReadDisk():
                self._start(self._read(instruction), f"read {instruction.load_id}")
            case WriteDisk():
                self._start(self._write(instruction), f"write {instruction.write_id}")
            case _:
                self.answers.perform(instruction)

    def _start(self, work: Coroutine[object, object, None], name: str) -> None:
        task = asyncio.get_running_loop().create_task(work, name=name)
        self._disk_tasks[task] = None
        task.add_done_callback(self._disk_task_ended)

    def _disk_task_ended(self, task: asyncio.Task[None]) -> None:
        del self._disk_tasks[task]
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bug = (
                error if isinstance(error, InvariantBroken) else InvariantBroken(f"{task.get_name()}: {error!r}")
            )
            self._bug_found.set()

    async def _read(self, order: ReadDisk) -> None:
        waiting = set(range(len(order.keys)))

        def ready(index: int, is_there: bool) -> None:
            waiting.discard(index)
            self._feed(BlockRead(order.load_id, index, is_there))

        await self._disk.read(order.keys, order.blocks, ready)
        if waiting:
            raise InvariantBroken(f"the disk tier forgot {len(waiting)} blocks of read {order.load_id}")
        self._blocks_may_be_free()

    async def _write(self, order: WriteDisk) -> None:
        async with self._write_slots:
            stored = await self._disk.write(order.blocks)
        self._feed(Written(order.write_id, tuple(stored)))
        for each, is_there in zip(order.blocks, stored, strict=True):
            if is_there and self.ledger.lookup(each.key) is None:
                self.publisher.stored(each.key)
        self._blocks_may_be_free()

    async def _finish_disk(self) -> None:
        """What is under way lands in memory that is about to go; a disk that hangs is not waited for."""
        if self._disk_tasks:
            await asyncio.wait(list(self._disk_tasks), timeout=DISK_GRACE_S)
        for task in list(self._disk_tasks):
            task.cancel()

    # --- upkeep -------------------------------------------------------------------------------------------

    async def _keep_time(self) -> None:
        """Tells the machine the time, and whoever reads the log what becomes of the disk."""
        told = self._disk.problem
        while True:
            await self._clock.sleep(TICK_S)
            self._feed(StoreTick())
            if (problem := self._disk.problem) != told:
                told = problem
                self._log(f"WARNING: the disk tier: {problem}" if problem else "the disk tier works again")

    async def _end_on_a_bug(self) -> None:
        await self._bug_found.wait()
        if self._bug is None:
            raise Internal(f"{self._info.worker_id} found a bug and lost it")
        raise self._bug

    def _bury(self, life: WorkerLife) -> None:
        """Ends the leases with a life that the coordinator has given up, and forgets what waited there."""
        self.holder.reader_gone(life.worker_id, life.incarnation)
        self.reader.holder_gone(life.worker_id, life.incarnation)
        self._feed(WindowTold(life.worker_id, ()))

    def _blocks_may_be_free(self) -> None:
        self.reader.blocks_freed()

    def _all_keys(self) -> Iterable[bytes]:
        in_memory = self.ledger.all_keys()
        return itertools.chain(in_memory, (key for key in self._disk.all_keys() if key not in in_memory))
