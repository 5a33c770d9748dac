"""A store's answers to fetches: one lease for each, told once, ended once, whatever is repeated or late."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

import msgspec
import pytest

from contracts.errors import (
    BadRequest,
    DeadlineExceeded,
    IncompatiblePeer,
    NoCapacity,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.ids import Incarnation, WorkerId
from contracts.messages import FetchReply, FetchRequest, Peer
from kvstore.block_keys import KEY_BYTES
from kvstore.fetch_answers import MAX_FETCH_BLOCKS, MAX_LEASE_AGE_S
from kvstore.tiers.answers import MAX_STORE_FETCHES, StoreAnswers, check_keys
from kvstore.tiers.dram import DramTier
from kvstore.tiers.events import BlockRead, Kept, ReadDisk, StoreEvent, WriteDisk, Written
from kvstore.tiers.machine import StoreLimits, StoreMachine
from kvtransfer import LeaseOutcome, Ledger
from tests.support.store_chains import BLOCK_TOKENS, CHAINS, IDENTITY
from tests.support.store_disk import BLOCK_BYTES, ModelDisk
from tests.support.store_eviction import RecordingEviction
from tests.support.store_holder import STORE, FakeHolder, FakeLease

if TYPE_CHECKING:
    from kvtransfer import HolderService

LONG, SHORT, MIDDLE, OTHER_SALT = CHAINS
READER = Peer(worker_id=WorkerId("p0"), incarnation=Incarnation(7), address="p0")


class Bench:
    """`StoreAnswers` between a real machine and a holder that does what it is told."""

    def __init__(self, on_disk: tuple[bytes, ...] = ()) -> None:
        self.ledger = Ledger(16)
        self.disk = ModelDisk(on_disk)
        dram = DramTier(self.ledger, self.disk, RecordingEviction(), block_bytes=BLOCK_BYTES)
        self.machine = StoreMachine(dram, self.disk, StoreLimits(reading_share=1.0), block_tokens=BLOCK_TOKENS)
        self.holder = FakeHolder()
        self.num_freed = 0
        self.reads: list[ReadDisk] = []
        self.answers = StoreAnswers(
            holder=cast("HolderService", self.holder), identity=IDENTITY, feed=self.feed, on_blocks_freed=self._freed
        )

    def feed(self, event: StoreEvent) -> None:
        for instruction in self.machine.handle(event, 0.0):
            if isinstance(instruction, ReadDisk):
                self.reads.append(instruction)
            elif isinstance(instruction, WriteDisk):
                self.feed(Written(instruction.write_id, (False,) * len(instruction.blocks)))
            else:
                self.answers.perform(instruction)

    def keep(self, keys: tuple[bytes, ...]) -> None:
        blocks = tuple(self.ledger.allocate("keep", len(keys)) or ())
        num_tokens = len(keys) * BLOCK_TOKENS
        self.feed(Kept(owner="keep", keys=keys, blocks=blocks, first_block=0, num_tokens=num_tokens, lossy=False))

    async def ask(self, keys: tuple[bytes, ...], fetch_id: str = "f") -> asyncio.Task[FetchReply]:
        """A call that has come as far as it can."""
        call = asyncio.create_task(self.answers.answer(request(keys, fetch_id)))
        await settle()
        return call

    @property
    def lease(self) -> FakeLease:
        return self.holder.leases[-1]

    def _freed(self) -> None:
        self.num_freed += 1


def request(keys: tuple[bytes, ...], fetch_id: str = "f", *, taken: bool = False) -> FetchRequest:
    return FetchRequest(
        target=STORE.incarnation, fetch_id=fetch_id, reader=READER, identity=IDENTITY, keys=keys, taken=taken
    )


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_what_is_in_memory_is_told_sealed_and_needs_no_word_more() -> None:
    bench = Bench()
    bench.keep(LONG)
    call = await bench.ask(LONG)
    lease = bench.lease
    assert (lease.reader, lease.whole, lease.max_age_s) == (READER, True, MAX_LEASE_AGE_S)
    assert lease.seal is not None
    assert lease.seal.num_tokens == len(LONG) * BLOCK_TOKENS
    assert not call.done(), "nothing is told before all can be announced"
    assert (await lease.offer()).expected == len(LONG)
    assert await call == FetchReply(terms=lease.terms(), tier_blocks={"dram": 6})
    lease.end(LeaseOutcome.RELEASED)
    assert (bench.answers.num_open, bench.machine.idle, bench.num_freed) == (0, True, 1)


async def test_what_comes_from_disk_is_told_open_and_goes_on_once_it_was_taken() -> None:
    bench = Bench(LONG)
    call = await bench.ask(LONG)
    lease = bench.lease
    assert (lease.whole, lease.seal, lease.num_final) == (False, None, 0)
    offered = asyncio.create_task(lease.offer())
    assert (await call).terms == lease.terms()
    assert (await call).tier_blocks == {"ssd": 6}
    await settle()
    assert not offered.done(), "news would overtake the answer"
    assert await bench.answers.answer(request((), taken=True)) == FetchReply()
    assert (await offered).expected == 0
    (read,) = bench.reads
    for index in (1, 0, 2):
        bench.feed(BlockRead(read.load_id, index, True))
    bench.feed(BlockRead(read.load_id, 3, False))
    assert lease.calls == [("advance", 2), ("advance", 3), ("seal", (3, 3 * BLOCK_TOKENS))]


async def test_a_lease_of_nothing_is_withdrawn() -> None:
    bench = Bench(LONG)
    await bench.ask(LONG)
    bench.feed(BlockRead(bench.reads[0].load_id, 0, False))
    ((call, reason),) = bench.lease.calls
    assert (call, "could not be read" in str(reason)) == ("withdraw", True)


async def test_nothing_is_found() -> None:
    bench = Bench(LONG[1:])
    assert await bench.answers.answer(request(LONG)) == FetchReply()
    assert await bench.answers.answer(request(())) == FetchReply()
    assert (bench.answers.num_open, bench.holder.leases) == (0, [])


async def test_a_repeat_gets_the_same_lease_before_and_after_it_was_told() -> None:
    bench = Bench()
    bench.keep(LONG)
    calls = [await bench.ask(LONG), await bench.ask(LONG)]
    await bench.lease.offer()
    calls.append(await bench.ask(LONG))
    assert [(await call).terms for call in calls] == [bench.lease.terms()] * 3
    assert len(bench.holder.leases) == 1
    bench.lease.end(LeaseOutcome.EXPIRED)
    again = await bench.ask(LONG)
    assert len(bench.holder.leases) == 2
    again.cancel()


async def test_one_that_gives_up_takes_nothing_from_one_that_waits() -> None:
    bench = Bench()
    bench.keep(LONG)
    first, second = await bench.ask(LONG), await bench.ask(LONG)
    first.cancel()
    await settle()
    await bench.lease.offer()
    assert (await second).terms == bench.lease.terms()


async def test_taken_of_what_nobody_knows_is_ignored() -> None:
    bench = Bench(LONG)
    assert await bench.answers.answer(request((), taken=True)) == FetchReply()
    assert (bench.answers.num_open, bench.holder.leases) == (0, [])


async def test_taken_may_come_before_the_offer_is_made_again() -> None:
    bench = Bench(LONG)
    await bench.ask(LONG)
    with pytest.raises(DeadlineExceeded, match="p0 has not taken s0/1/0"):
        await bench.lease.offer(timeout_s=0.0)
    await bench.answers.answer(request((), taken=True))
    assert (await bench.lease.offer(timeout_s=0.0)).expected == 0


async def test_terms_without_news_are_waited_for_too() -> None:
    bench = Bench(LONG)
    await bench.ask(LONG)
    with pytest.raises(DeadlineExceeded):
        await bench.lease.offer(announced=False, timeout_s=0.0)
    await bench.answers.answer(request((), taken=True))
    assert (await bench.lease.offer(announced=False)).expected == 0


@pytest.mark.parametrize("num_read", [2, 6])
async def test_of_what_a_second_offer_says_the_reader_is_told_again(num_read: int) -> None:
    """It has the first terms only, and would wait for the rest for ever."""
    bench = Bench(LONG)
    call = await bench.ask(LONG)
    (read,) = bench.reads
    bench.feed(BlockRead(read.load_id, 0, True))
    with pytest.raises(DeadlineExceeded):
        await bench.lease.offer(timeout_s=0.0)
    told = (await call).terms
    for index in range(1, num_read):
        bench.feed(BlockRead(read.load_id, index, True))
    await bench.answers.answer(request((), taken=True))
    again = await bench.lease.offer()
    assert told is not None
    assert told.progress is not None
    assert again.expected is not None
    assert again.expected <= len(told.progress.blocks) == 1


async def test_a_seal_that_says_nothing_but_that_it_ends_is_told_again() -> None:
    """It is short because the second block could not be read: the reader has the only one already."""
    bench = Bench(LONG)
    await bench.ask(LONG)
    (read,) = bench.reads
    bench.feed(BlockRead(read.load_id, 0, True))
    with pytest.raises(DeadlineExceeded):
        await bench.lease.offer(timeout_s=0.0)
    bench.feed(BlockRead(read.load_id, 1, False))
    assert bench.lease.seal is not None
    await bench.answers.answer(request((), taken=True))
    assert (await bench.lease.offer()).expected == 0, "less than all, so that the seal is announced"


async def test_a_lease_that_ends_before_it_was_told_fails_the_call() -> None:
    bench = Bench(LONG)
    call = await bench.ask(LONG)
    bench.lease.end(LeaseOutcome.EXPIRED, "nobody came")
    with pytest.raises(TransferAborted, match=r"s0/1/0 ended expired: nobody came"):
        await call
    assert (bench.answers.num_open, bench.machine.num_fetches, bench.num_freed) == (0, 0, 1)
    for index in range(len(LONG)):
        bench.feed(BlockRead(bench.reads[0].load_id, index, True))
    assert bench.lease.calls == [], "it hears of nothing any more"
    assert bench.machine.idle


async def test_a_lease_that_ends_after_it_was_told_is_over_once() -> None:
    bench = Bench(LONG)
    call = await bench.ask(LONG)
    with pytest.raises(DeadlineExceeded):
        await bench.lease.offer(timeout_s=0.0)
    bench.lease.end(LeaseOutcome.RELEASED)
    assert (await call).terms == bench.lease.terms()
    assert (bench.answers.num_open, bench.machine.num_fetches, bench.num_freed) == (0, 0, 1)


async def test_a_holder_that_grants_nothing_fails_the_call_and_leaves_nothing() -> None:
    bench = Bench(LONG[3:])
    bench.keep(LONG[:3])
    bench.holder.refusal = WorkerUnavailable("it is stopping")
    call = await bench.ask(LONG)
    with pytest.raises(WorkerUnavailable, match="it is stopping"):
        await call
    assert (bench.answers.num_open, bench.machine.num_fetches) == (0, 0)
    for index in range(3):
        bench.feed(BlockRead(bench.reads[0].load_id, index, True))
    assert bench.machine.idle
    assert bench.ledger.load()["owned_blocks"] == 0


async def test_too_many_at_once_are_refused_until_one_is_over() -> None:
    bench = Bench()
    bench.keep(LONG)
    calls = [await bench.ask(LONG, f"f{number}") for number in range(MAX_STORE_FETCHES)]
    with pytest.raises(NoCapacity) as refused:
        await bench.answers.answer(request(LONG, "one more"))
    assert refused.value.retry_after_s
    assert (await bench.ask(LONG, "f3")) is not None, "a repeat is none more"
    assert bench.answers.num_open == MAX_STORE_FETCHES
    bench.lease.end(LeaseOutcome.EXPIRED)
    with pytest.raises(TransferAborted):
        await calls[-1]
    one_more = await bench.ask(LONG, "one more")
    assert bench.answers.num_open == MAX_STORE_FETCHES
    for call in (*calls, one_more):
        call.cancel()


async def test_other_kv_is_refused() -> None:
    bench = Bench()
    bench.keep(LONG)
    other = msgspec.structs.replace(request(LONG), identity=msgspec.structs.replace(IDENTITY, rope_base=5.0))
    with pytest.raises(IncompatiblePeer, match="KV for p0"):
        await bench.answers.answer(other)
    assert bench.answers.num_open == 0


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((b"short",), f"a block key has {KEY_BYTES} bytes"),
        ((LONG[0], LONG[0] + b"x"), f"a block key has {KEY_BYTES} bytes"),
        ((b"",), f"a block key has {KEY_BYTES} bytes"),
        ((LONG[0], LONG[1], LONG[0]), "one key stands twice"),
        (tuple(b"%032d" % number for number in range(MAX_FETCH_BLOCKS + 1)), f"at most {MAX_FETCH_BLOCKS}"),
    ],
)
async def test_keys_that_are_none_are_refused(keys: tuple[bytes, ...], message: str) -> None:
    with pytest.raises(BadRequest, match=message):
        check_keys(keys, MAX_FETCH_BLOCKS)
    bench = Bench()
    with pytest.raises(BadRequest, match=message):
        await bench.answers.answer(request(keys))
    assert bench.answers.num_open == 0


def test_keys_that_are_ones() -> None:
    check_keys((), 0)
    check_keys(LONG, len(LONG))


@pytest.mark.parametrize("first_block", [-1, 2**31, 2**63])
async def test_a_position_that_is_none_is_refused(first_block: int) -> None:
    bench = Bench(LONG)
    with pytest.raises(BadRequest, match="position"):
        await bench.answers.answer(msgspec.structs.replace(request(LONG), first_block=first_block))
    assert (bench.answers.num_open, bench.machine.idle) == (0, True)
