"""Random lives of a store, killed at any moment: no reader ever sees what it did not ask for, and the books balance."""

from __future__ import annotations

import itertools
import random
import sys
from typing import get_args

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from contracts.config import EvictionPolicyName
from contracts.ids import LeaseId
from kvstore.tiers.eviction import dram_eviction
from kvstore.tiers.machine import StoreLimits
from tests.support.store_chains import CHAINS
from tests.support.store_disk import ModelDisk
from tests.support.store_eviction import RecordingEviction
from tests.support.store_world import StoreWorld

POLICIES: tuple[EvictionPolicyName, ...] = get_args(EvictionPolicyName)
SHARES = st.sampled_from([0.2, 0.5, 1.0])
WORKERS = st.sampled_from(["p0", "p1", "d0"])


@st.composite
def _parts(draw: st.DrawFn) -> tuple[tuple[bytes, ...], int]:
    """Consecutive keys of a prompt, mostly from its first one on, and the position of the first."""
    keys = draw(st.sampled_from(CHAINS))
    start = draw(st.sampled_from([0, 0, 0, 1, 2]))
    stop = draw(st.sampled_from([len(keys), len(keys)]) | st.integers(start + 1, len(keys)))
    return keys[start:stop], start


PARTS = _parts()
LEADING = st.sampled_from(CHAINS).flatmap(lambda keys: st.integers(1, len(keys)).map(lambda stop: keys[:stop]))


class StoreModel(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = itertools.count(1)
        self.policy: EvictionPolicyName | None = None
        self.disk = ModelDisk()
        self.world = StoreWorld(1, self.disk)
        self.others: list[str] = []
        #: Until when each key is pinned, by what operators said.
        self.pins: dict[bytes, float] = {}
        #: Those of them that stood after the last step.
        self.pinned_here: set[bytes] = set()

    @initialize(
        num_blocks=st.integers(4, 14),
        shares=st.tuples(SHARES, SHARES, SHARES, SHARES),
        policy=st.sampled_from([*POLICIES, None]),
        on_disk=st.sets(st.sampled_from(CHAINS), min_size=1),
    )
    def begin(
        self,
        num_blocks: int,
        shares: tuple[float, float, float, float],
        policy: EvictionPolicyName | None,
        on_disk: set[tuple[bytes, ...]],
    ) -> None:
        """`policy` None: whoever may go goes, nothing but the store itself keeps what must stay. `on_disk`: from an
        earlier life."""
        self.num_blocks, self.policy = num_blocks, policy
        for key in sorted(itertools.chain(*on_disk)):
            self.disk.put(key)
        reading, ahead, writing, window = shares
        self.limits = StoreLimits(reading_share=reading, ahead_share=ahead, writing_share=writing, window_share=window)
        self._live(now_s=0.0)

    def _live(self, now_s: float) -> None:
        if self.policy is None:
            eviction = RecordingEviction(rng=random.Random(self.num_blocks))
        else:
            eviction = RecordingEviction(dram_eviction(self.policy, self.num_blocks))
        self.world = StoreWorld(self.num_blocks, self.disk, eviction=eviction, limits=self.limits, now_s=now_s)
        self.others.clear()
        self.pins.clear()
        self.pinned_here.clear()

    # --- readers ------------------------------------------------------------------------------------------

    @rule(part=PARTS)
    def fetch(self, part: tuple[tuple[bytes, ...], int]) -> None:
        self.world.ask(f"f{next(self.numbers)}", *part)

    @precondition(lambda self: self.world.fetches)
    @rule(data=st.data())
    def fetch_is_over(self, data: st.DataObject) -> None:
        self.world.over(data.draw(st.sampled_from(list(self.world.fetches))))

    @precondition(lambda self: self.world.fetches)
    @rule(data=st.data(), part=PARTS)
    def fetch_is_over_and_its_id_comes_again(self, data: st.DataObject, part: tuple[tuple[bytes, ...], int]) -> None:
        fetch_id = data.draw(st.sampled_from(list(self.world.fetches)))
        self.world.over(fetch_id)
        self.world.ask(fetch_id, *part)

    # --- disk ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.world.reads)
    @rule(data=st.data(), ends=st.booleans())
    def disk_reads_on(self, data: st.DataObject, ends: bool) -> None:
        load_id = data.draw(st.sampled_from(list(self.world.reads)))
        read = self.world.reads[load_id]
        index = data.draw(st.sampled_from([i for i in range(len(read.order.keys)) if i not in read.done]))
        if ends:
            self.world.end_read(load_id, index)
        else:
            self.world.begin_read(load_id, index)

    @precondition(lambda self: self.world.reads)
    @rule(data=st.data())
    def disk_reads_in_order(self, data: st.DataObject) -> None:
        load_id = data.draw(st.sampled_from(list(self.world.reads)))
        read = self.world.reads[load_id]
        for index in range(data.draw(st.integers(1, len(read.order.keys)))):
            if index not in read.done:
                self.world.end_read(load_id, index)
                self.world.check()

    @precondition(lambda self: self.world.writes)
    @rule(data=st.data(), ends=st.booleans())
    def disk_writes_on(self, data: st.DataObject, ends: bool) -> None:
        write_id = data.draw(st.sampled_from(list(self.world.writes)))
        write = self.world.writes[write_id]
        waiting = [i for i in range(len(write.order.blocks)) if i not in write.landed]
        if ends or not waiting:
            self.world.end_write(write_id)
        else:
            self.world.land_write(write_id, data.draw(st.sampled_from(waiting)))

    @precondition(lambda self: self.disk.stands.keys() - self.disk.pinned)
    @rule(data=st.data())
    def disk_evicts(self, data: st.DataObject) -> None:
        self.disk.drop(data.draw(st.sampled_from(sorted(self.disk.stands.keys() - self.disk.pinned))))

    @precondition(lambda self: self.disk.stands)
    @rule(data=st.data())
    def disk_is_damaged(self, data: st.DataObject) -> None:
        self.disk.damage(data.draw(st.sampled_from(sorted(self.disk.stands))))

    # --- workers that give ----------------------------------------------------------------------------------

    @rule(part=PARTS)
    def keep(self, part: tuple[tuple[bytes, ...], int]) -> None:
        self.world.offer(LeaseId(f"k{next(self.numbers)}"), *part)

    @rule(keys=LEADING)
    def keep_at_one_go(self, keys: tuple[bytes, ...]) -> None:
        lease_id = LeaseId(f"k{next(self.numbers)}")
        if self.world.offer(lease_id, keys):
            for _ in self.world.keeps[lease_id].keys:
                self.world.land(lease_id)
            self.world.adopt(lease_id)

    @precondition(lambda self: self.world.keeps)
    @rule(data=st.data(), ends=st.booleans())
    def bytes_are_copied(self, data: st.DataObject, ends: bool) -> None:
        lease_id = data.draw(st.sampled_from(list(self.world.keeps)))
        keep = self.world.keeps[lease_id]
        if keep.num_landed and (ends or keep.num_landed == len(keep.keys)):
            self.world.adopt(lease_id)
        else:
            self.world.land(lease_id)

    @precondition(lambda self: self.world.keeps)
    @rule(data=st.data())
    def writer_is_killed(self, data: st.DataObject) -> None:
        self.world.abort(data.draw(st.sampled_from(list(self.world.keeps))))

    @precondition(lambda self: self.world.quarantined)
    @rule(data=st.data())
    def pull_of_a_killed_writer_ends(self, data: st.DataObject) -> None:
        self.world.settle(data.draw(st.sampled_from(list(self.world.quarantined))))

    # --- others -------------------------------------------------------------------------------------------

    @rule(worker=WORKERS, prompts=st.lists(LEADING, max_size=3))
    def window(self, worker: str, prompts: list[tuple[bytes, ...]]) -> None:
        self.world.window(worker, *prompts)

    @rule(keys=LEADING, for_s=st.none() | st.floats(0.5, 5.0))
    def pin(self, keys: tuple[bytes, ...], for_s: float | None) -> None:
        until_s = None if for_s is None else self.world.now_s + for_s
        self.world.pin(keys, until_s)
        self.pins.update(dict.fromkeys(keys, float("inf") if until_s is None else until_s))

    @rule(keys=LEADING)
    def unpin(self, keys: tuple[bytes, ...]) -> None:
        self.world.unpin(keys)
        for key in keys:
            self.pins.pop(key, None)

    @rule(seconds=st.floats(0.1, 3.0))
    def pass_time(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    @precondition(lambda self: self.world.ledger.load()["cached_blocks"])
    @rule(tiers=st.sampled_from([("dram",), ("ssd",), ("dram", "ssd")]), with_pinned=st.booleans())
    def clear(self, tiers: tuple[str, ...], with_pinned: bool) -> None:
        self.world.clear(tiers, with_pinned=with_pinned)
        if with_pinned and "dram" in tiers:
            self.pins = {key: until_s for key, until_s in self.pins.items() if key in self.disk.stands}

    @precondition(lambda self: len(self.others) < 2)
    @rule(num_blocks=st.integers(1, 5))
    def others_take_memory(self, num_blocks: int) -> None:
        owner = f"other {next(self.numbers)}"
        if self.world.take(owner, num_blocks):
            self.others.append(owner)

    @precondition(lambda self: self.others)
    @rule(data=st.data())
    def others_give_it_back(self, data: st.DataObject) -> None:
        owner = data.draw(st.sampled_from(self.others))
        self.others.remove(owner)
        self.world.ledger.release_all(owner)

    @precondition(lambda self: self.world.reads or self.world.writes or self.world.keeps)
    @rule()
    def store_is_killed(self) -> None:
        """Its memory is gone, and what was being written; only what has landed stands."""
        self.disk.forget_life()
        self._live(self.world.now_s)

    # --- what must hold -------------------------------------------------------------------------------------

    @invariant()
    def all_is_well(self) -> None:
        self.world.check()

    @invariant()
    def pinned_blocks_stay(self) -> None:
        for key, until_s in list(self.pins.items()):
            if until_s <= self.world.now_s:
                del self.pins[key]
        gone = {key for key in self.pinned_here & self.pins.keys() if not self.world.stands(key)}
        assert gone <= self.disk.excused, f"the last copy of {len(gone)} pinned blocks is gone"
        writing = {each.key for write in self.world.writes.values() for each in write.order.blocks}
        loose = self.pins.keys() & self.disk.stands.keys() - self.disk.pinned - writing
        assert not loose, f"the disk may give up {len(loose)} pinned blocks, and memory relies on it"
        self.disk.excused.clear()
        self.pinned_here = {key for key in self.pins if self.world.stands(key)}

    def teardown(self) -> None:
        """Everybody comes to an end: each fetch has had one, and nothing is held any more."""
        if sys.exception() is not None:
            return
        world = self.world
        world.finish_disk()
        world.check()
        assert all(fetch.end is not None for fetch in world.fetches.values()), "a fetch waits for nothing"
        for fetch_id in list(world.fetches):
            world.over(fetch_id)
        for lease_id in list(world.keeps):
            world.abort(lease_id)
        for lease_id in list(world.quarantined):
            world.settle(lease_id)
        for owner in self.others:
            world.ledger.release_all(owner)
        world.finish_disk()
        world.check()
        load = world.ledger.load()
        assert load["free_blocks"] + load["cached_blocks"] == world.ledger.num_blocks, load


StoreModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestStoreModel = StoreModel.TestCase
