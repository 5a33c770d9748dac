"""Which fetches are begun, joined and not begun: who waits for one, who is left alone after silence, what is learnt."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

from contracts.errors import DeadlineExceeded, WorkerUnavailable
from contracts.ids import Incarnation, LeaseId, WorkerId
from contracts.messages import FETCH, FetchReply, HandoffReply, LeaseTerms, Peer, ProgressRequest, Seal
from kvstore.fetches import ASK_TIMEOUT_S, FIRST_PAUSE_S, MAX_FETCHES, SILENT_S, PrefixFetches
from kvstore.prefix_cache import PrefixCache
from kvtransfer import Ledger
from simulator import Program, VirtualClock, run
from tests.support.roles import IDENTITY

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from contracts.ids import BlockId
    from contracts.messages import FetchRequest
    from kvstore.fetch_ends import FetchEnd, FetchTicket
    from kvstore.prefix_cache import KeyChain

STORE = Peer(worker_id=WorkerId("s0"), incarnation=Incarnation(1), address="s0:1")
WORKER = Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(1), address="p0:1")
TOKENS = tuple(range(100, 165))


class Bench:
    """Network, holder and reader in one; a lease is adopted `takes_s` after it was offered."""

    def __init__(self) -> None:
        self.ledger = Ledger(64)
        self.prefixes = PrefixCache(self.ledger, IDENTITY)
        self.asked: list[FetchRequest] = []
        self.takes_s = 0.1
        #: Blocks that the holder has of what it is asked for; None: it does not answer.
        self.has: int | None = 100
        self.ends: list[FetchEnd] = []
        self.lines: list[str] = []
        self.bugs: list[Exception] = []
        self._leases: set[str] = set()
        self.fetches = PrefixFetches(
            ledger=self.ledger,
            prefixes=self.prefixes,
            reader=cast("Any", self),
            network=cast("Any", self),
            clock=VirtualClock(),
            worker=WORKER,
            identity=IDENTITY,
            refusal=lambda _: None,
            may_take=lambda _: True,
            on_ended=lambda: None,
            on_bug=self.bugs.append,
            log=self.lines.append,
        )

    # The network.

    def channel(self, address: str) -> Bench:
        return self

    async def call(self, method: Any, body: Any, *, timeout_s: float) -> Any:
        if method is not FETCH:
            return None
        if self.has is None:
            await asyncio.sleep(timeout_s)
            raise DeadlineExceeded("nobody answers")
        await asyncio.sleep(0.001)
        self.asked.append(body)
        count = min(self.has, len(body.keys))
        if not count:
            return FetchReply()
        lease_id = LeaseId(f"s0/1/{len(self.asked)}")
        progress = ProgressRequest(
            lease_id=lease_id, holder_incarnation=STORE.incarnation, seal=Seal(num_tokens=count * 4)
        )
        terms = LeaseTerms(
            lease_id=lease_id,
            holder=STORE,
            identity=IDENTITY,
            endpoints={},
            num_blocks=count,
            ttl_s=10.0,
            progress=progress,
        )
        return FetchReply(terms=terms, tier_blocks={"dram": 1, "ssd": count - 1})

    # The reader.

    def offer(self, terms: LeaseTerms, *, owner: str, on_adopted: Any, on_aborted: Any, waits: bool) -> HandoffReply:
        assert terms.progress is not None
        assert terms.progress.seal is not None
        seal = terms.progress.seal
        blocks = self.ledger.reserve(terms.lease_id, terms.num_blocks)
        assert blocks is not None

        def adopt() -> None:
            if terms.lease_id in self._leases:
                self._leases.remove(terms.lease_id)
                on_adopted(terms.lease_id, self.ledger.adopt(terms.lease_id, owner), seal)

        self._leases.add(terms.lease_id)
        asyncio.get_running_loop().call_later(self.takes_s, adopt)
        return HandoffReply(verdict="reserved")

    def holds(self, lease_id: LeaseId) -> bool:
        return lease_id in self._leases

    def cancel(self, lease_id: LeaseId, reason: str) -> None:
        self._leases.remove(lease_id)
        self.ledger.abort(lease_id)

    # The prompts.

    def chain(self, tokens: tuple[int, ...] = TOKENS) -> KeyChain:
        return self.prefixes.chain(tokens, "")

    def start(self, tokens: tuple[int, ...] = TOKENS, stop: int = 16, start: int | None = None) -> FetchTicket | None:
        chain = self.chain(tokens)
        local: list[BlockId] = self.prefixes.match_prompt(chain, len(tokens))
        return self.fetches.start(chain, local, stop, STORE, self.ends.append, start=start)


def on_a_bench(test: Callable[[Bench], Coroutine[Any, Any, None]]) -> None:
    async def main(program: Program) -> None:
        bench = Bench()
        await test(bench)
        await bench.fetches.close()
        bench.ledger.check()
        assert bench.ledger.available_blocks == 64
        assert bench.bugs == []

    run(main, seed=1)


def test_what_came_is_named_from_where_the_fetch_began_and_told_by_tier() -> None:
    async def test(bench: Bench) -> None:
        assert bench.start(start=6, stop=16) is not None
        await asyncio.sleep(1.0)
        assert [(end.start, end.stop, end.tier_blocks) for end in bench.ends] == [(6, 16, {"dram": 1, "ssd": 9})]
        chain = bench.chain()
        assert len(bench.prefixes.match(chain.part(6, 16))) == 10
        assert bench.prefixes.match(chain.part(0, 6)) == []
        assert (bench.asked[0].first_block, bench.asked[0].keys) == (6, chain.part(6, 16))
        assert bench.fetches.fetched_by_tier == {"dram": 1, "ssd": 9}

    on_a_bench(test)


def test_a_prompt_joins_a_fetch_that_begins_where_it_has_nothing_yet() -> None:
    async def test(bench: Bench) -> None:
        first = bench.start(start=6)
        joined = bench.start((*TOKENS[:40], *range(500, 530)), stop=12)
        apart = bench.start((*TOKENS[:20], *range(500, 530)), stop=12)
        assert first is not None
        assert joined is not None
        assert apart is not None
        assert (joined.start, joined.stop) == (6, 12), "its own front is left to it"
        assert (apart.start, bench.fetches.num_open) == (0, 2)
        await asyncio.sleep(1.0)
        assert sorted(end.start for end in bench.ends) == [0, 6, 6]

    on_a_bench(test)


def test_nobody_joins_a_fetch_that_was_given_up() -> None:
    async def test(bench: Bench) -> None:
        first = bench.start()
        assert first is not None
        await asyncio.sleep(0.05)
        first.leave()
        assert bench.start() is not None
        await asyncio.sleep(1.0)
        assert [end.stop for end in bench.ends] == [16]
        assert bench.fetches.failures_total == 1

    on_a_bench(test)


def test_a_fetch_goes_on_for_whoever_still_waits() -> None:
    async def test(bench: Bench) -> None:
        first, _ = bench.start(), bench.start()
        assert first is not None
        first.leave()
        await asyncio.sleep(1.0)
        assert len(bench.ends) == 1
        assert bench.ends[0].stop == 16

    on_a_bench(test)


def test_a_holder_that_is_silent_is_left_alone_and_longer_each_time() -> None:
    async def test(bench: Bench) -> None:
        bench.has = None
        for pause_s in (FIRST_PAUSE_S, 2 * FIRST_PAUSE_S, 4 * FIRST_PAUSE_S):
            assert bench.start() is not None
            await asyncio.sleep(ASK_TIMEOUT_S + 0.01)
            assert bench.fetches.num_open == 0
            await asyncio.sleep(pause_s - 0.1)
            assert bench.start() is None
            await asyncio.sleep(0.2)
        bench.has = 100
        assert bench.start() is not None
        await asyncio.sleep(1.0)
        bench.has = None
        assert bench.start(tuple(range(300, 340)), stop=10) is not None
        await asyncio.sleep(ASK_TIMEOUT_S + 0.01)
        assert bench.start() is None
        await asyncio.sleep(FIRST_PAUSE_S)
        assert bench.start(tuple(range(300, 340)), stop=10) is not None, "an answer has made good what was before"

    on_a_bench(test)


def test_a_question_that_was_given_up_after_a_long_silence_counts_as_one() -> None:
    async def test(bench: Bench) -> None:
        bench.has = None
        for waited_s, is_silent in ((SILENT_S / 2, False), (SILENT_S * 1.5, True)):
            ticket = bench.start()
            assert ticket is not None
            await asyncio.sleep(waited_s)
            ticket.leave()
            await asyncio.sleep(0.0)
            again = bench.start()
            assert (again is None) is is_silent
            if again is not None:
                again.leave()
                await asyncio.sleep(0.0)

    on_a_bench(test)


def test_what_fetches_took_is_known_afterwards_and_failures_teach_nothing() -> None:
    async def test(bench: Bench) -> None:
        bench.has = 0
        assert bench.start() is not None
        await asyncio.sleep(0.5)
        bench.has = 100
        for base in (300, 400):
            assert bench.fetches.expected_s(STORE, 8) is None
            assert bench.start(tuple(range(base, base + 33)), stop=8) is not None
            await asyncio.sleep(0.5)
        expected_s = bench.fetches.expected_s(STORE, 8)
        assert expected_s is not None
        assert 0.1 < expected_s < 0.11
        assert [len(end.tier_blocks) for end in bench.ends] == [0, 2, 2]

    on_a_bench(test)


def test_there_are_only_so_many_fetches_at_once() -> None:
    async def test(bench: Bench) -> None:
        for number in range(MAX_FETCHES):
            assert bench.start(tuple(range(1000 * number, 1000 * number + 9)), stop=2) is not None
        assert bench.start() is None

    on_a_bench(test)


def test_an_unavailable_holder_counts_as_silent() -> None:
    class Gone(Bench):
        async def call(self, method: Any, body: Any, *, timeout_s: float) -> Any:
            raise WorkerUnavailable("it is not there")

    async def main(program: Program) -> None:
        bench = Gone()
        assert bench.start() is not None
        await asyncio.sleep(0.1)
        assert bench.start() is None
        assert (len(bench.ends), bench.fetches.failures_total) == (1, 1)
        await bench.fetches.close()

    run(main, seed=1)
