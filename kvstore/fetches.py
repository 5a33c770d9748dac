"""The reader's side of a prefix fetch: copies leading blocks of a prompt from a worker that holds them.

A fetch fills the prefix cache and nothing else. Its blocks are pulled under the holder's lease, confirmed, adopted,
given their keys, and let go: they are cached then, and whoever waited looks them up as if this worker had computed
them. So whatever goes wrong costs no more than computing: a prompt that waited goes on with what is there.

A fetch takes only blocks that are available when its holder has answered, and waits for none; so two full workers that
want each other's prefixes refuse each other instead of waiting.

One fetch is one lease, however long: a store's lease grows while its disk reads, so that what has been read is pulled
meanwhile, and what cannot wait for the last block is read ahead from the front (`prefill.read_ahead`). Pieces of their
own would cost three calls each, and a holder's leases are few. So a fetch has time by its bytes.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from contracts.errors import (
    BadRequest,
    DeadlineExceeded,
    InvariantBroken,
    NoCapacity,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import ACK, FETCH, AckRequest, FetchRequest
from kvstore.fetch_answers import MAX_FETCH_BLOCKS
from kvstore.fetch_ends import FetchEnd, FetchTicket, limit_s, tiers_of
from kvstore.fetch_rates import FetchRates

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.ids import BlockId, LeaseId, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import FetchReply, LeaseTerms, Peer, Seal
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvtransfer import Ledger, ReaderService
    from rpc import Network

#: Fetches of one worker at once.
MAX_FETCHES = 8
#: What the holder may take to answer.
ASK_TIMEOUT_S = 1.0
#: Of the call that tells a holder that its lease is not wanted.
ACK_TIMEOUT_S = 1.0
#: Whoever has not answered after this long when a fetch is given up counts as not answering.
SILENT_S = 0.2
#: A holder that does not answer is not asked again for so long; twice as long each time, up to the longest. Else each
#: prompt would wait for it once.
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 16.0

_PUT_OFF = Failpoint("kvstore.fetch_put_off", "a fetch is not begun, as if too many were under way")
_HOLDER_SAYS_NO = Failpoint("kvstore.fetch_refused", "a fetch is given up as if its holder had refused")

_FETCHED = RarePath("kvstore.fetched", "a prefix was copied from another worker")
_FETCH_FAILED = RarePath("kvstore.fetch_failed", "a fetch ended without blocks")
_JOINED = RarePath("kvstore.fetch_joined", "a prompt waits for the fetch of another one with the same beginning")


@dataclass(slots=True, kw_only=True, eq=False)
class _Fetch:
    """One prefix on its way here."""

    source: Peer
    chain: KeyChain
    #: Positions that are fetched.
    start: int
    stop: int
    asked_s: float
    #: Holds the blocks before these, lest they be evicted meanwhile; and those that were adopted, until they are named.
    owner: str
    local: list[BlockId]
    waiters: list[Callable[[FetchEnd], None]] = field(default_factory=list["Callable[[FetchEnd], None]"])
    #: What has come of it.
    tiers: dict[str, int] = field(default_factory=dict[str, int])
    lease_id: LeaseId | None = None
    #: Done when the lease has ended: why nothing was adopted, or empty.
    ended: asyncio.Future[str] | None = None
    #: Why nothing came; empty when something did.
    problem: str = "nobody waits for them any more"


class PrefixFetches:
    """All fetches of one worker life. Not thread-safe: it lives on the worker's loop."""

    def __init__(
        self,
        *,
        ledger: Ledger,
        prefixes: PrefixCache,
        reader: ReaderService,
        network: Network,
        clock: Clock,
        worker: Peer,
        identity: KvIdentity,
        refusal: Callable[[Peer], str | None],
        may_take: Callable[[int], bool],
        on_ended: Callable[[], None],
        on_bug: Callable[[InvariantBroken], None],
        on_copied: Callable[[Peer, tuple[bytes, ...]], None] = lambda source, keys: None,
        log: Callable[[str], None],
    ) -> None:
        """`refusal`: why nothing is pulled from a holder, None where something may be. `may_take`: whether a fetch may
        take so many of the blocks that are available now: others may have come to need them since it began. `on_ended`
        is called after each fetch's end, `on_bug` when one finds state that cannot be. `on_copied` hears which leading
        blocks of a prompt its source has, by their keys, when some came from there."""
        self._ledger = ledger
        self._prefixes = prefixes
        self._reader = reader
        self._network = network
        self._clock = clock
        self._worker = worker
        self._identity = identity
        self._refusal = refusal
        self._on_copied = on_copied
        self._may_take = may_take
        self._on_ended = on_ended
        self._on_bug = on_bug
        self._log = log
        self._numbers = itertools.count(1)
        self._rates = FetchRates()
        #: Holders that did not answer: until when they are not asked, and how long that is.
        self._pauses: dict[WorkerId, tuple[float, float]] = {}
        #: All that are under way.
        self._tasks: dict[_Fetch, asyncio.Task[None]] = {}
        self._closed = False
        #: Since the start: blocks that were copied, fetches that brought some, fetches that brought none.
        self.fetched_blocks_total = 0
        #: The same by where they stood.
        self.fetched_by_tier: dict[str, int] = {}
        self.fetches_total = 0
        self.failures_total = 0

    def __repr__(self) -> str:
        return f"<PrefixFetches {len(self._tasks)} under way>"

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    def expected_s(self, source: Peer, num_blocks: int) -> float | None:
        """What a fetch of so many blocks from there takes, as the latest ones did; None: not known."""
        return self._rates.expected_s(source.worker_id, num_blocks)

    def start(
        self,
        chain: KeyChain,
        local: list[BlockId],
        stop: int,
        source: Peer,
        waiter: Callable[[FetchEnd], None],
        *,
        start: int | None = None,
    ) -> FetchTicket | None:
        """Begins to copy blocks `[start, stop)` of a prompt, or joins a fetch that brings such. `local`: the first
        blocks, which stand here; those between them and `start` are somebody else's affair (None: there are none).
        `waiter` is called with what came when the fetch ends, however it does, unless it was left before.

        None, and nothing was begun, where too many are under way or nothing is pulled from this holder.
        """
        start = len(local) if start is None else start
        stop = min(stop, start + MAX_FETCH_BLOCKS)
        fetch = self._joinable(chain, len(local), stop)
        if fetch is not None:
            _JOINED.reached()
            fetch.waiters.append(waiter)
            return self._ticket(fetch, stop, waiter)
        if self._closed or len(self._tasks) >= MAX_FETCHES or source.worker_id == self._worker.worker_id:
            return None
        now_s = self._clock.now_s()
        if _PUT_OFF.fires():
            return None
        if now_s < self._pauses.get(source.worker_id, (0.0, 0.0))[0] or self._refusal(source) is not None:
            return None
        fetch = _Fetch(
            source=source,
            chain=chain,
            start=start,
            stop=stop,
            asked_s=now_s,
            # No request's name: those contain a "#".
            owner=f"fetch/{self._worker.incarnation}/{next(self._numbers)}",
            local=local,
            waiters=[waiter],
        )
        self._ledger.share(fetch.owner, local)
        task = self._tasks[fetch] = asyncio.get_running_loop().create_task(self._run(fetch), name=fetch.owner)
        # Not in the task itself: one that is cancelled before its first turn never runs.
        task.add_done_callback(lambda _: self._end(fetch))
        return self._ticket(fetch, stop, waiter)

    def _joinable(self, chain: KeyChain, num_local: int, stop: int) -> _Fetch | None:
        """One that begins where this prompt has nothing yet, behind the same tokens."""
        for fetch in self._tasks:
            first = fetch.start
            # Nobody waits for it any more: it is being given up.
            if fetch.waiters and num_local <= first < stop and chain[first] == fetch.chain[first]:
                return fetch
        return None

    def _ticket(self, fetch: _Fetch, stop: int, waiter: Callable[[FetchEnd], None]) -> FetchTicket:
        return FetchTicket(start=fetch.start, stop=min(stop, fetch.stop), leave=partial(self._leave, fetch, waiter))

    def _leave(self, fetch: _Fetch, waiter: Callable[[FetchEnd], None]) -> None:
        if waiter in fetch.waiters:
            fetch.waiters.remove(waiter)
        if not fetch.waiters and fetch in self._tasks:
            if fetch.lease_id is None and self._clock.now_s() - fetch.asked_s > SILENT_S:
                self._pause(fetch.source)
            self._tasks[fetch].cancel()

    async def close(self) -> None:
        """Gives everything up; nothing is begun any more."""
        self._closed = True
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # --- one fetch ----------------------------------------------------------------------------------------

    async def _run(self, fetch: _Fetch) -> None:
        longest_s = limit_s((fetch.stop - fetch.start) * self._identity.layout.block_bytes)
        try:
            async with asyncio.timeout(longest_s):
                await self._copy(fetch)
        except InvariantBroken as error:
            self._on_bug(error)
        except TandemError as error:
            fetch.problem = error.message
        except TimeoutError:
            fetch.problem = f"not here within {longest_s:g} s"
            self._pause(fetch.source)

    def _end(self, fetch: _Fetch) -> None:
        try:
            if fetch.lease_id is not None and self._reader.holds(fetch.lease_id):
                self._reader.cancel(fetch.lease_id, fetch.problem)
            self._ledger.release_all(fetch.owner)
        except InvariantBroken as error:
            self._on_bug(error)
        del self._tasks[fetch]
        now_s = self._clock.now_s()
        if fetch.problem:
            _FETCH_FAILED.reached()
            self.failures_total += 1
            where = f"blocks [{fetch.start}, {fetch.stop}) of a prompt"
            self._log(f"{where} do not come from {fetch.source.worker_id}: {fetch.problem}")
        elif fetch.tiers:
            self._rates.observe(fetch.source.worker_id, sum(fetch.tiers.values()), now_s - fetch.asked_s)
            self._pauses.pop(fetch.source.worker_id, None)
        waiters, fetch.waiters = fetch.waiters, []
        for waiter in waiters:
            waiter(FetchEnd(ended_s=now_s, start=fetch.start, tier_blocks=fetch.tiers))
        self._on_ended()

    def _pause(self, source: Peer) -> None:
        _, last_s = self._pauses.get(source.worker_id, (0.0, 0.0))
        pause_s = min(max(2 * last_s, FIRST_PAUSE_S), LONGEST_PAUSE_S)
        self._pauses[source.worker_id] = (self._clock.now_s() + pause_s, pause_s)

    async def _copy(self, fetch: _Fetch) -> None:
        source = fetch.source
        ask = FetchRequest(
            target=source.incarnation,
            fetch_id=f"{self._worker.worker_id}/{fetch.owner}",
            reader=self._worker,
            identity=self._identity,
            keys=fetch.chain.part(fetch.start, fetch.stop),
            first_block=fetch.start,
        )
        try:
            reply = await self._network.channel(source.address).call(FETCH, ask, timeout_s=ASK_TIMEOUT_S)
        except (DeadlineExceeded, WorkerUnavailable):
            self._pause(source)
            raise
        if reply.terms is None:
            fetch.problem = "it has none of them"
            return
        try:
            self._take(fetch, reply, reply.terms, self._clock.now_s() - fetch.asked_s)
        except TandemError as error:
            await self._let_go(source, reply.terms.lease_id)
            raise TransferAborted(f"its lease was not taken: {error.message}") from error
        progress = reply.terms.progress
        if progress is None or progress.seal is None:
            # The holder tells what comes next only to who has taken this.
            taken = msgspec.structs.replace(ask, keys=(), taken=True)
            await self._network.channel(source.address).call(FETCH, taken, timeout_s=ASK_TIMEOUT_S)
        assert fetch.ended is not None, "set when it was taken"
        # Shielded: it is the reader's callbacks that set it, also when this wait is over.
        fetch.problem = await asyncio.shield(fetch.ended)

    def _take(self, fetch: _Fetch, reply: FetchReply, terms: LeaseTerms, took_s: float) -> None:
        if terms.num_blocks > fetch.stop - fetch.start:
            raise BadRequest(f"{terms.num_blocks} blocks came for {fetch.stop - fetch.start} that were asked for")
        # What the reader counts on from now may not end after what the holder granted before.
        if took_s > terms.ttl_s / 2:
            raise TransferAborted(f"its terms came after {took_s:.3f} s, they are for {terms.ttl_s:g} s")
        if not self._may_take(terms.num_blocks):
            raise NoCapacity(f"{terms.num_blocks} blocks are needed for what waits here or is being written")
        if _HOLDER_SAYS_NO.fires():
            raise TransferAborted("it is refused on purpose")
        ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        def adopted(lease_id: LeaseId, blocks: list[BlockId], seal: Seal) -> None:
            self._adopted(fetch, reply, blocks, seal)
            ended.set_result("" if fetch.tiers else "its lease was sealed without a block")

        def aborted(lease_id: LeaseId, error: TandemError) -> None:
            ended.set_result(error.message)

        self._reader.offer(terms, owner=fetch.owner, on_adopted=adopted, on_aborted=aborted, waits=False)
        fetch.lease_id, fetch.ended = terms.lease_id, ended

    def _adopted(self, fetch: _Fetch, reply: FetchReply, blocks: list[BlockId], seal: Seal) -> None:
        """A store whose disk could not read on seals with fewer blocks: the rest of those adopted holds nothing."""
        num_sealed = min(len(blocks), seal.num_tokens // self._prefixes.block_tokens)
        for position, block in enumerate(blocks[:num_sealed], fetch.start):
            self._ledger.set_key(block, fetch.chain[position])
        if num_sealed:
            _FETCHED.reached()
            self._on_copied(fetch.source, fetch.chain.part(0, fetch.start + num_sealed))
            fetch.tiers = tiers_of(reply, num_sealed)
            self.fetched_blocks_total += num_sealed
            self.fetches_total += 1
            for tier, count in fetch.tiers.items():
                self.fetched_by_tier[tier] = self.fetched_by_tier.get(tier, 0) + count

    async def _let_go(self, source: Peer, lease_id: LeaseId) -> None:
        """Spares the holder the rest of the term."""
        ask = AckRequest(holder_incarnation=source.incarnation, lease_ids=(lease_id,))
        try:
            await self._network.channel(source.address).call(ACK, ask, timeout_s=ACK_TIMEOUT_S)
        except TandemError as error:
            self._log(f"{source.worker_id} was not told that lease {lease_id} is not wanted: {error.message}")
