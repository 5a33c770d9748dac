"""The books over a store's memory: who goes first, who may not go, and the figures."""

from __future__ import annotations

from typing import Literal

import pytest

from contracts.ids import Incarnation
from contracts.store_messages import CacheListRequest, TierFigures
from kvstore.tiers.disk import NoDisk
from kvstore.tiers.listing import list_blocks
from tests.support.store_chains import CHAINS, chain
from tests.support.store_disk import BLOCK_BYTES, ModelDisk
from tests.support.store_world import StoreWorld

LONG, SHORT, MIDDLE, OTHER_SALT = CHAINS
LATER = chain(8, 9)


def filled(num_blocks: int = 8) -> StoreWorld:
    """A store whose memory holds a prompt of six blocks since 1.0 s, one of two since 3.0 s; nothing is on disk."""
    store = StoreWorld(num_blocks, now_s=1.0)
    store.disk.problem = "it takes nothing"
    for keys in (LONG, LATER):
        store.keep(keys)
        for write_id in list(store.writes):
            store.end_write(write_id)
        store.pass_time(2.0)
    return store


# --- who goes -------------------------------------------------------------------------------------------


def test_the_policy_says_who_goes_and_hears_who_went() -> None:
    store = filled()
    fetch = store.ask("f", LONG[:2])
    store.over("f")
    assert store.take("other", 6)
    assert [store.ledger.lookup(key) for key in LONG[:2]] == list(fetch.blocks)
    assert len(store.eviction.evicted) == 6
    assert set(store.eviction.entries) == set(fetch.blocks)
    assert all(store.ledger.lookup(key) is None for key in [*LONG[2:], *LATER])
    store.check()


def test_what_somebody_reads_does_not_go() -> None:
    store = filled()
    store.ask("f", LONG)
    assert not store.take("other", 3)
    assert store.eviction.evicted == [], "all or none"
    assert store.take("other", 2)
    assert all(store.ledger.lookup(key) is not None for key in LONG)


def test_what_is_pinned_goes_where_it_stands_on_disk_too() -> None:
    store = filled()
    store.pin([*LONG, *LATER])
    assert not store.take("other", 1)
    store.disk.put(LATER[1])
    assert store.take("other", 1)
    assert store.ledger.lookup(LATER[1]) is None
    store.check()


def test_pins_end_when_they_are_told_to() -> None:
    store = filled()
    now_s = store.now_s
    store.pin(LONG, now_s + 1.0)
    store.pin(LONG[:2], now_s + 3.0)
    store.pin(LATER)
    for seconds, num_pinned in ((0.5, 8), (0.5, 4), (1.5, 4), (0.5, 2), (1e9, 2)):
        store.pass_time(seconds)
        assert len(list(store.dram.pinned_keys)) == num_pinned
    store.pin(LATER, store.now_s)
    store.pass_time(0.0)
    assert list(store.dram.pinned_keys) == []


def test_room_is_what_could_be_allocated() -> None:
    store = filled(10)
    assert store.dram.num_available() == 10
    store.ask("f", LONG[:3])
    store.pin(LONG[3:4])
    assert store.dram.num_available() == 6
    assert not store.take("other", 7)
    assert store.take("other", 6)
    assert store.dram.num_available() == 0


# --- clear ----------------------------------------------------------------------------------------------


def test_clear_drops_what_nobody_reads_and_nobody_pinned() -> None:
    store = filled()
    store.ask("f", LONG[:2])
    store.pin(LATER)
    assert store.dram.clear(with_pinned=False) == 4
    store.over("f")
    store.check()
    assert store.dram.clear(with_pinned=True) == 4
    assert store.dram.figures().evicted == {"cleared": 8}
    assert store.eviction.evicted == []
    assert store.ledger.load()["free_blocks"] == 8
    store.check()


def test_clear_of_memory_leaves_pins_on_disk_alone() -> None:
    store = filled()
    store.disk.put(LATER[0])
    store.pin(LATER)
    assert store.dram.clear(with_pinned=True) == 8
    assert (list(store.dram.pinned_keys), store.disk.pinned) == ([LATER[0]], {LATER[0]})
    store.unpin(LATER)
    assert store.disk.pinned == set()


# --- figures --------------------------------------------------------------------------------------------


def test_figures_of_an_empty_store() -> None:
    assert StoreWorld(8).dram.figures() == TierFigures(
        tier="dram", capacity_bytes=8 * BLOCK_BYTES, used_bytes=0, num_blocks=0
    )


def test_figures_count_blocks_bytes_and_ages() -> None:
    store = filled()
    store.pin([*LATER, *OTHER_SALT])
    assert store.now_s == 5.0
    assert store.ask("f", [*LONG[:4], *OTHER_SALT]).end == 4
    store.over("f")
    figures = store.dram.figures()
    assert (figures.capacity_bytes, figures.used_bytes) == (8 * BLOCK_BYTES, 8 * BLOCK_BYTES)
    assert (figures.num_blocks, figures.pinned_blocks) == (8, 2)
    assert (figures.hit_blocks, figures.missed_blocks) == (4, 3)
    assert figures.bytes_in == {"worker": 8 * BLOCK_BYTES}
    assert figures.bytes_out["worker"] == 4 * BLOCK_BYTES
    assert figures.oldest_s == 4.0
    assert (figures.evicted, figures.evicted_age_s) == ({}, None)
    store.pass_time(10.0)
    assert store.take("other", 3)
    figures = store.dram.figures()
    assert figures.evicted == {"capacity": 3}
    assert figures.evicted_age_s == 14.0, "the median of 14, 14 and 10 s"


def test_blocks_that_come_from_disk_are_counted() -> None:
    store = StoreWorld(8, ModelDisk(LONG))
    store.disk.damage(LONG[3])
    fetch = store.ask("f", LONG[:4])
    store.finish_disk()
    assert fetch.end == 3
    assert store.dram.figures().bytes_in == {"ssd": 3 * BLOCK_BYTES}
    assert store.disk.touched == list(LONG[:4])
    store.over("f")
    store.keep(chain(8))
    store.finish_disk()
    assert store.dram.figures().bytes_out["ssd"] == BLOCK_BYTES


# --- listing --------------------------------------------------------------------------------------------


def listed(store: StoreWorld, ask: CacheListRequest, most: int = 100) -> tuple[list[bytes], int]:
    reply = list_blocks(ask, store.dram, store.disk, now_s=store.now_s, most=most)
    return [block.key for block in reply.blocks], reply.num_matching


Order = Literal["hits", "recent", "oldest"]


def request(
    order: Order = "hits", limit: int = 50, key_prefix: bytes = b"", pinned_only: bool = False
) -> CacheListRequest:
    return CacheListRequest(
        target=Incarnation(1), order=order, limit=limit, key_prefix=key_prefix, pinned_only=pinned_only
    )


def test_listing_orders() -> None:
    store = filled()
    store.ask("f", LONG[:1])
    store.pass_time(1.0)
    store.ask("g", LONG[:2])
    # Hits: 2, 1, 0...; idle: 0, 0, then 3 s for LATER, 5 s for the rest.
    assert listed(store, request("hits"))[0][:4] == [*LONG[:2], *LATER]
    assert set(listed(store, request("recent"))[0][:2]) == set(LONG[:2])
    assert set(listed(store, request("recent"))[0][2:4]) == set(LATER)
    assert set(listed(store, request("oldest"))[0][:4]) == set(LONG[2:])


@pytest.mark.parametrize(("limit", "most", "num"), [(3, 100, 3), (50, 2, 2), (0, 100, 0), (-1, 100, 0), (50, 100, 8)])
def test_listing_is_bounded_and_says_how_many_there_are(limit: int, most: int, num: int) -> None:
    keys, num_matching = listed(filled(), request(limit=limit), most)
    assert (len(keys), num_matching) == (num, 8)


def test_listing_of_some_keys_and_of_pinned_ones() -> None:
    store = filled()
    store.disk.put(OTHER_SALT[0])
    store.pin([LONG[3], OTHER_SALT[0]])
    assert set(listed(store, request(pinned_only=True))[0]) == {LONG[3], OTHER_SALT[0]}
    assert listed(store, request(key_prefix=LATER[1][:3])) == ([LATER[1]], 1)
    assert listed(store, request(key_prefix=b"no such key")) == ([], 0)


def test_listing_says_in_which_tiers_a_block_stands() -> None:
    store = filled()
    store.disk.put(LONG[0])
    store.disk.put(OTHER_SALT[0])
    blocks = {each.key: each for each in list_blocks(request(), store.dram, store.disk, now_s=7.0, most=50).blocks}
    assert len(blocks) == 9
    assert blocks[LONG[0]].tiers == ("dram", "ssd")
    assert blocks[LONG[1]].tiers == ("dram",)
    assert blocks[OTHER_SALT[0]].tiers == ("ssd",)
    assert (blocks[LONG[4]].position, blocks[LONG[4]].age_s, blocks[LONG[4]].num_bytes) == (4, 6.0, BLOCK_BYTES)
    assert (blocks[LATER[1]].position, blocks[LATER[1]].idle_s) == (1, 4.0)


# --- without a disk ---------------------------------------------------------------------------------------


async def test_a_store_without_a_disk_has_nothing_there() -> None:
    disk = NoDisk()
    assert list(disk.has(LONG)) == [False] * 6
    assert list(disk.all_keys()) == []
    ready: list[tuple[int, bool]] = []
    await disk.read(LONG[:2], (), lambda index, is_there: ready.append((index, is_there)))
    assert ready == [(0, False), (1, False)]
    assert await disk.write(()) == []
    assert (disk.figures(), disk.describe(LONG[0], 0.0), disk.clear(with_pinned=True)) == (None, None, 0)
