"""The store's machine, case by case; `test_machine_model` has it all at random."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from contracts.errors import InvariantBroken
from contracts.ids import LeaseId
from kvstore.codecs.window import DEFAULT_WINDOW_TOKENS
from kvstore.tiers.events import (
    AdvanceLease,
    BlockRead,
    FetchAsked,
    FoundNothing,
    Kept,
    OpenLease,
    ReadDisk,
    SealLease,
    WithdrawLease,
    WriteDisk,
)
from kvstore.tiers.machine import MAX_BLOCKS_PER_WRITE, MAX_WINDOW_AGE_S, StoreLimits
from tests.support.store_chains import BLOCK_TOKENS, CHAINS, chain
from tests.support.store_disk import ModelDisk
from tests.support.store_eviction import RecordingEviction
from tests.support.store_world import StoreWorld

if TYPE_CHECKING:
    from collections.abc import Sequence

LONG, SHORT, _, OTHER_SALT = CHAINS
WHOLE = StoreLimits(reading_share=1.0, ahead_share=1.0, writing_share=1.0, window_share=1.0)


def world(num_blocks: int = 16, on_disk: Sequence[bytes] = (), limits: StoreLimits = WHOLE) -> StoreWorld:
    return StoreWorld(num_blocks, ModelDisk(on_disk), limits=limits)


# --- fetches --------------------------------------------------------------------------------------------


def test_what_is_all_in_memory_is_sealed_at_once() -> None:
    store = world()
    store.keep(LONG)
    store.finish_disk()
    fetch = store.ask("f", LONG)
    assert (fetch.num_ready, fetch.end) == (6, 6)
    (opened,) = store.said
    assert isinstance(opened, OpenLease)
    assert opened.tier_blocks == {"dram": 6}
    store.check()


def test_what_is_on_disk_comes_block_by_block_and_what_is_behind_it_waits() -> None:
    store = world(on_disk=LONG[1:4])
    store.keep(LONG[:1])
    store.keep(LONG[4:], 4)
    fetch = store.ask("f", LONG)
    opened, read = store.said
    assert isinstance(opened, OpenLease)
    assert isinstance(read, ReadDisk)
    assert (fetch.num_ready, fetch.end, opened.tier_blocks) == (1, None, {"dram": 3, "ssd": 3})
    store.end_read(read.load_id, 1)
    assert store.said == []
    store.end_read(read.load_id, 0)
    assert store.said == [AdvanceLease("f", 3)]
    store.end_read(read.load_id, 2)
    assert store.said == [SealLease("f", 6)]
    assert [store.dram.position[block] for block in fetch.blocks] == [0, 1, 2, 3, 4, 5]
    store.check()


def test_a_block_that_cannot_be_read_ends_the_lease_before_it() -> None:
    store = world(on_disk=LONG[:5])
    store.disk.damage(LONG[2])
    store.disk.damage(LONG[4])
    fetch = store.ask("f", LONG)
    (load_id,) = store.reads
    for index in (3, 0, 2, 4):
        store.end_read(load_id, index)
    assert fetch.end is None, "the second one may still come"
    store.end_read(load_id, 1)
    assert store.said == [SealLease("f", 2)]
    assert store.machine.failed_reads == 2
    store.over("f")
    store.check()
    assert store.ledger.load()["cached_blocks"] == 3, "what was read stays"


def test_blocks_from_the_middle_of_a_prompt_know_where_they_stand() -> None:
    store = world(on_disk=LONG)
    fetch = store.ask("f", LONG[3:], 3)
    store.finish_disk()
    assert [store.dram.position[block] for block in fetch.blocks] == [3, 4, 5]
    store.check()


def test_a_lease_whose_first_block_cannot_be_read_is_withdrawn() -> None:
    store = world(on_disk=SHORT)
    store.disk.damage(SHORT[0])
    store.ask("f", SHORT)
    (load_id,) = store.reads
    store.end_read(load_id, 0)
    (withdrawn,) = store.said
    assert isinstance(withdrawn, WithdrawLease)
    store.over("f")
    for index in (1, 2, 3):
        store.end_read(load_id, index)
    store.check()
    assert store.machine.idle


def test_two_fetches_of_one_prefix_read_it_once() -> None:
    store = world(on_disk=[*LONG, *SHORT])
    store.ask("f", LONG)
    second = store.ask("g", SHORT)
    (opened, read) = store.said
    assert isinstance(opened, OpenLease)
    assert isinstance(read, ReadDisk)
    assert read.keys == SHORT[2:], "the first two are on their way"
    store.over("f")
    store.finish_disk()
    store.check()
    assert second.end == 4


def test_nothing_and_nothing_asked_for() -> None:
    store = world(on_disk=LONG[1:])
    assert store.ask("f", LONG).end == 0
    assert store.said == [FoundNothing("f")]
    assert store.ask("g", ()).end == 0
    assert store.machine.idle


def test_a_fetch_id_that_comes_again_does_not_get_what_the_first_one_waited_for() -> None:
    """Its reader may be another life, and ask for something else."""
    store = world(on_disk=[*LONG, *OTHER_SALT])
    store.ask("f", LONG)
    (first,) = store.reads
    store.over("f")
    again = store.ask("f", OTHER_SALT)
    for index in range(len(LONG)):
        store.end_read(first, index)
        store.check()
    assert (again.num_ready, again.end) == (0, None)
    store.finish_disk()
    store.check()
    assert again.end == 3


def test_a_fetch_takes_as_much_from_disk_as_there_is_room_for() -> None:
    store = world(8, on_disk=LONG)
    store.keep(OTHER_SALT)
    store.finish_disk()
    assert store.take("other", 4)
    # One free block, three cached ones.
    fetch = store.ask("f", LONG)
    assert len(fetch.blocks) == 4
    store.check()
    assert world(8, LONG, StoreLimits(reading_share=0.25)).ask("f", LONG).blocks == (0, 1)


def test_what_is_pinned_makes_no_room_for_what_is_read() -> None:
    store = world(4, on_disk=LONG)
    store.keep(OTHER_SALT)
    (write_id,) = store.writes
    store.pin(OTHER_SALT)
    store.end_write(write_id)
    assert len(store.ask("f", LONG).blocks) == 1
    assert all(map(store.stands, OTHER_SALT))
    store.check()


def test_misuse_is_a_bug_with_a_name() -> None:
    store = world(on_disk=LONG)
    store.ask("f", LONG)
    (load_id,) = store.reads
    with pytest.raises(InvariantBroken, match="fetch f is asked for twice"):
        store.machine.handle(FetchAsked("f", LONG), 0.0)
    store.end_read(load_id, 0)
    with pytest.raises(InvariantBroken, match=f"block 0 of read {load_id} is done twice"):
        store.machine.handle(BlockRead(load_id, 0, True), 0.0)


@pytest.mark.parametrize("name", ["reading_share", "ahead_share", "writing_share", "window_share"])
@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_shares_are_shares(name: str, share: float) -> None:
    with pytest.raises(ValueError, match=name):
        StoreLimits(**{name: share})


# --- what waits -----------------------------------------------------------------------------------------


def test_a_window_brings_prompts_from_disk_and_says_what_is_to_stay() -> None:
    store = world(on_disk=[*LONG[2:], *OTHER_SALT])
    store.keep(SHORT)
    store.window("p0", SHORT, LONG)
    (read,) = store.said
    assert isinstance(read, ReadDisk)
    assert read.is_ahead
    assert read.keys == LONG[2:], "the first two came from a worker"
    assert store.eviction.need == tuple(map(store.ledger.lookup, SHORT))
    store.finish_disk()
    assert store.eviction.need == tuple(map(store.ledger.lookup, [*SHORT, *LONG[2:]]))
    assert store.ask("f", LONG).end == 6
    store.check()


@pytest.mark.parametrize("seed", range(4))
def test_what_one_waiting_prompt_has_does_not_go_for_what_another_one_lacks(seed: int) -> None:
    """Whatever the policy thinks of it."""
    hostile = RecordingEviction(rng=random.Random(seed))
    store = StoreWorld(6, ModelDisk(LONG), eviction=hostile, limits=WHOLE)
    store.keep(OTHER_SALT)
    store.keep(chain(7, 8, 9))
    store.finish_disk()
    unneeded = list(map(store.ledger.lookup, chain(7, 8, 9)))
    store.window("p0", OTHER_SALT, LONG[:3])
    assert sorted(store.eviction.evicted) == unneeded, "the newest ones, but nobody waits for them"
    store.finish_disk()
    store.pass_time(1.0)
    store.check()
    assert all(store.ledger.lookup(key) is not None for key in [*OTHER_SALT, *LONG[:3]])
    assert len(store.eviction.evicted) == 3, "nothing goes to and fro"


def test_nothing_is_needed_once_nobody_waits() -> None:
    store = world()
    store.keep(SHORT)
    store.window("p0", SHORT)
    assert store.eviction.need
    store.window("p1", LONG)
    store.window("p0")
    store.window("p1")
    assert store.eviction.need == ()


def test_what_a_worker_said_of_its_waiting_prompts_is_forgotten_if_it_says_no_more() -> None:
    store = world(on_disk=SHORT)
    store.keep(LONG)
    store.window("p0", LONG)
    store.pass_time(MAX_WINDOW_AGE_S)
    assert store.eviction.need, "it still counts"
    store.pass_time(1.0)
    assert store.machine.num_windows == 0
    assert store.eviction.need == ()


def test_a_window_told_again_counts_anew_and_others_are_forgotten() -> None:
    store = world()
    store.window("p0", LONG)
    store.window("p1", SHORT)
    store.pass_time(MAX_WINDOW_AGE_S - 1.0)
    store.window("p0", LONG)
    store.pass_time(2.0)
    assert store.machine.num_windows == 1


# --- keeping --------------------------------------------------------------------------------------------


def test_what_came_is_written_once_and_held_until_then() -> None:
    store = world()
    store.keep(LONG)
    store.keep(SHORT)
    assert [[each.key for each in write.order.blocks] for write in store.writes.values()] == [
        list(LONG),
        list(SHORT[2:]),
    ]
    assert store.ledger.load()["owned_blocks"] == 8
    store.finish_disk()
    assert store.ledger.load()["cached_blocks"] == 8
    assert store.machine.idle
    store.check()


def test_long_writes_come_in_parts_and_too_many_are_not_written() -> None:
    keys = chain(*range(200))
    store = world(256, limits=StoreLimits(writing_share=0.5))
    store.keep(keys)
    assert [len(write.order.blocks) for write in store.writes.values()] == [MAX_BLOCKS_PER_WRITE] * 2
    assert store.machine.not_written == {"write queue full": 200 - 128}
    first = min(store.writes)
    store.land_write(first, 0)
    store.end_write(first)
    assert store.machine.not_written["refused by the disk tier"] == MAX_BLOCKS_PER_WRITE - 1
    store.check()
    assert store.ask("f", keys).end == 200


def test_what_found_no_place_in_the_queue_is_written_when_there_is_one() -> None:
    keys = chain(*range(200))
    store = world(256, limits=StoreLimits(writing_share=0.5))
    store.keep(keys)
    store.finish_disk()
    assert all(store.disk.has(keys)), "each write that ends makes room for the next"
    assert store.machine.idle
    store.check()


def test_what_the_disk_refused_is_written_once_it_takes_blocks_again() -> None:
    store = world(64)
    store.keep(LONG)
    store.disk.problem = "disk full"
    first = min(store.writes)
    store.end_write(first)
    store.pass_time(5.0)
    assert not store.writes
    store.disk.problem = ""
    store.pass_time(1.0)
    assert [each.key for write in store.writes.values() for each in write.order.blocks] == list(LONG)
    store.finish_disk()
    assert all(store.disk.has(LONG))
    store.check()


def test_blocks_of_the_lossy_class_are_marked_but_for_the_newest_tokens() -> None:
    store = world(64)
    num_exact = DEFAULT_WINDOW_TOKENS // BLOCK_TOKENS
    keys = chain(*range(num_exact + 3))
    for lossy, owner, part in ((True, "a", keys), (False, "b", OTHER_SALT)):
        blocks = store.ledger.allocate(owner, len(part))
        assert blocks is not None
        num_tokens = len(part) * BLOCK_TOKENS
        kept = Kept(owner=owner, keys=part, blocks=tuple(blocks), first_block=0, num_tokens=num_tokens, lossy=lossy)
        (write,) = store.machine.handle(kept, 0.0)
        assert isinstance(write, WriteDisk)
        assert [each.lossy for each in write.blocks] == [lossy and index < 3 for index in range(len(part))]
        assert [each.position for each in write.blocks] == list(range(len(part)))


def test_a_worker_that_brings_what_is_being_read_makes_no_second_copy_findable() -> None:
    store = world(on_disk=LONG[:2])
    lease_id = LeaseId("k")
    blocks = store.ledger.allocate("keep/k", 2)
    assert blocks is not None
    fetch = store.ask("f", LONG[:2])
    for key, block in zip(LONG, blocks, strict=False):
        store.memory[block] = b"kv of " + key
    kept = Kept(owner=f"keep/{lease_id}", keys=LONG[:2], blocks=tuple(blocks), first_block=0, num_tokens=8, lossy=False)
    assert store.feed(kept) == [], "it stands on disk"
    store.finish_disk()
    store.check()
    assert (fetch.end, [store.ledger.lookup(key) for key in LONG[:2]]) == (2, blocks)
    store.over("f")
    assert store.ledger.load()["free_blocks"] == 14


# --- pins -----------------------------------------------------------------------------------------------


def test_a_pin_that_comes_while_a_block_is_being_written_holds_on_disk_too() -> None:
    store = world(4)
    store.keep(OTHER_SALT)
    store.pin(OTHER_SALT[:2], until_s=5.0)
    store.finish_disk()
    assert store.disk.pinned == set(OTHER_SALT[:2])
    assert store.take("other", 4), "what stands on disk need not stand here"
    store.pass_time(5.0)
    assert store.disk.pinned == set()
    store.check()


def test_the_last_copy_of_what_is_pinned_goes_for_nobody_and_only_for_those_who_say_so() -> None:
    store = world(4)
    store.keep(OTHER_SALT)
    (write_id,) = store.writes
    store.end_write(write_id)
    store.pin(OTHER_SALT)
    assert not store.take("other", 2)
    store.clear(("ssd", "dram"), with_pinned=False)
    assert all(map(store.stands, OTHER_SALT))
    store.unpin(OTHER_SALT[2:])
    assert store.take("other", 2)
    store.clear(("ssd", "dram"), with_pinned=True)
    assert not any(map(store.stands, OTHER_SALT))
    assert list(store.dram.pinned_keys) == []
    store.check()
