"""The reader's side of a prefix fetch: copies leading blocks of a prompt from a worker that holds them.

A fetch fills the prefix cache and nothing else. Its blocks are pulled under the holder's lease, confirmed, adopted,
given their keys, and let go: they are cached then, and whoever waited looks them up as if this worker had computed
them. So whatever goes wrong costs no more than computing: a prompt that waited goes on with what is there.

A fetch takes only blocks that are available when its holder has answered, and waits for none; so two full workers that
want each other's prefixes refuse each other instead of waiting.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from contracts.errors import BadRequest, InvariantBroken, NoCapacity, TandemError, TransferAborted
from contracts.failpoints import Failpoint, RarePath
from contracts.messages import ACK, FETCH, AckRequest, FetchRequest
from kvstore.fetch_answers import MAX_FETCH_BLOCKS

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.ids import BlockId, LeaseId
    from contracts.layout import KvIdentity
    from contracts.messages import LeaseTerms, Peer, Seal
    from kvstore.prefix_cache import KeyChain, PrefixCache
    from kvtransfer import Ledger, ReaderService
    from rpc import Network

#: Fetches of one worker at once.
MAX_FETCHES = 8
#: What the holder may take to answer, and a whole fetch to end.
ASK_TIMEOUT_S = 1.0
FETCH_LIMIT_S = 3.0
#: Of the call that tells a holder that its lease is not wanted.
ACK_TIMEOUT_S = 1.0

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
    #: Holds the blocks before these, lest they be evicted meanwhile; and those that were adopted, until they are named.
    owner: str
    local: list[BlockId]
    waiters: list[Callable[[float], None]] = field(default_factory=list["Callable[[float], None]"])
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
        log: Callable[[str], None],
    ) -> None:
        """`refusal`: why nothing is pulled from a holder, None where something may be. `may_take`: whether a fetch may
        take so many of the blocks that are available now: others may have come to need them since it began. `on_ended`
        is called after each fetch's end, `on_bug` when one finds state that cannot be."""
        self._ledger = ledger
        self._prefixes = prefixes
        self._reader = reader
        self._network = network
        self._clock = clock
        self._worker = worker
        self._identity = identity
        self._refusal = refusal
        self._may_take = may_take
        self._on_ended = on_ended
        self._on_bug = on_bug
        self._log = log
        self._numbers = itertools.count(1)
        #: Under way, by the key of the first block that is fetched.
        self._fetches: dict[bytes, _Fetch] = {}
        self._tasks: dict[_Fetch, asyncio.Task[None]] = {}
        self._closed = False
        #: Since the start: blocks that were copied, fetches that brought some, fetches that brought none.
        self.fetched_blocks_total = 0
        self.fetches_total = 0
        self.failures_total = 0

    def __repr__(self) -> str:
        return f"<PrefixFetches {len(self._tasks)} under way>"

    @property
    def num_open(self) -> int:
        return len(self._tasks)

    def start(
        self, chain: KeyChain, local: list[BlockId], stop: int, source: Peer, waiter: Callable[[float], None]
    ) -> Callable[[], None] | None:
        """Begins to copy blocks `[len(local), stop)` of a prompt, or joins a fetch that does. `local`: the blocks
        before, which stand here. `waiter` is called with the time when the fetch ends, however it does, unless what is
        returned is called before: a fetch that nobody waits for is given up.

        None, and nothing was begun, where too many are under way or nothing is pulled from this holder.
        """
        start = len(local)
        stop = min(stop, start + MAX_FETCH_BLOCKS)
        known = self._fetches.get(chain[start])
        if known is not None:
            _JOINED.reached()
            known.waiters.append(waiter)
            return partial(self._leave, known, waiter)
        if self._closed or len(self._tasks) >= MAX_FETCHES or source.worker_id == self._worker.worker_id:
            return None
        if self._refusal(source) is not None:
            return None
        fetch = _Fetch(
            source=source,
            chain=chain,
            start=start,
            stop=stop,
            # No request's name: those contain a "#".
            owner=f"fetch/{self._worker.incarnation}/{next(self._numbers)}",
            local=local,
            waiters=[waiter],
        )
        self._ledger.share(fetch.owner, local)
        self._fetches[chain[start]] = fetch
        task = self._tasks[fetch] = asyncio.get_running_loop().create_task(self._run(fetch), name=fetch.owner)
        # Not in the task itself: one that is cancelled before its first turn never runs.
        task.add_done_callback(lambda _: self._end(fetch))
        return partial(self._leave, fetch, waiter)

    def _leave(self, fetch: _Fetch, waiter: Callable[[float], None]) -> None:
        if waiter in fetch.waiters:
            fetch.waiters.remove(waiter)
        if not fetch.waiters and fetch in self._tasks:
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
        try:
            async with asyncio.timeout(FETCH_LIMIT_S):
                await self._copy(fetch)
        except InvariantBroken as error:
            self._on_bug(error)
        except TandemError as error:
            fetch.problem = error.message
        except TimeoutError:
            fetch.problem = f"not here within {FETCH_LIMIT_S:g} s"

    def _end(self, fetch: _Fetch) -> None:
        try:
            if fetch.lease_id is not None and self._reader.holds(fetch.lease_id):
                self._reader.cancel(fetch.lease_id, fetch.problem)
            self._ledger.release_all(fetch.owner)
        except InvariantBroken as error:
            self._on_bug(error)
        del self._fetches[fetch.chain[fetch.start]], self._tasks[fetch]
        if fetch.problem:
            _FETCH_FAILED.reached()
            self.failures_total += 1
            where = f"blocks [{fetch.start}, {fetch.stop}) of a prompt"
            self._log(f"{where} do not come from {fetch.source.worker_id}: {fetch.problem}")
        waiters, fetch.waiters = fetch.waiters, []
        for waiter in waiters:
            waiter(self._clock.now_s())
        self._on_ended()

    async def _copy(self, fetch: _Fetch) -> None:
        asked_s = self._clock.now_s()
        source = fetch.source
        ask = FetchRequest(
            target=source.incarnation,
            fetch_id=f"{self._worker.worker_id}/{fetch.owner}",
            reader=self._worker,
            identity=self._identity,
            keys=fetch.chain.part(fetch.start, fetch.stop),
        )
        reply = await self._network.channel(source.address).call(FETCH, ask, timeout_s=ASK_TIMEOUT_S)
        if reply.terms is None:
            fetch.problem = "it has none of them"
            return
        try:
            self._take(fetch, reply.terms, self._clock.now_s() - asked_s)
        except TandemError as error:
            await self._let_go(source, reply.terms.lease_id)
            raise TransferAborted(f"its lease was not taken: {error.message}") from error
        assert fetch.ended is not None, "set when it was taken"
        # Shielded: it is the reader's callbacks that set it, also when this wait is over.
        fetch.problem = await asyncio.shield(fetch.ended)

    def _take(self, fetch: _Fetch, terms: LeaseTerms, took_s: float) -> None:
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
            self._adopted(fetch, blocks, seal)
            ended.set_result("")

        def aborted(lease_id: LeaseId, error: TandemError) -> None:
            ended.set_result(error.message)

        self._reader.offer(terms, owner=fetch.owner, on_adopted=adopted, on_aborted=aborted, waits=False)
        fetch.lease_id, fetch.ended = terms.lease_id, ended

    def _adopted(self, fetch: _Fetch, blocks: list[BlockId], seal: Seal) -> None:
        _FETCHED.reached()
        num_sealed = min(len(blocks), seal.num_tokens // self._prefixes.block_tokens)
        self._prefixes.name(fetch.chain, [*fetch.local, *blocks], fetch.start, fetch.start + num_sealed)
        self.fetched_blocks_total += num_sealed
        self.fetches_total += 1

    async def _let_go(self, source: Peer, lease_id: LeaseId) -> None:
        """Spares the holder the rest of the term."""
        ask = AckRequest(holder_incarnation=source.incarnation, lease_ids=(lease_id,))
        try:
            await self._network.channel(source.address).call(ACK, ask, timeout_s=ACK_TIMEOUT_S)
        except TandemError as error:
            self._log(f"{source.worker_id} was not told that lease {lease_id} is not wanted: {error.message}")
