"""A store's machine with its surroundings in memory: blocks have bytes, which land step by step where disk and workers
put them, and whoever reads them is checked after every step.

What lies under a key is `content(key)` and nothing else, so bytes of another block, of one that is still being written
and of one that was given away are all seen.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, assert_never

from contracts.ids import BlockId, LeaseId, WorkerId
from kvstore.tiers.dram import DramTier
from kvstore.tiers.events import (
    AdvanceLease,
    BlockRead,
    FetchAsked,
    FetchOver,
    FoundNothing,
    Kept,
    OpenLease,
    PinAsked,
    ReadDisk,
    SealLease,
    StoreEvent,
    StoreInstruction,
    StoreTick,
    UnpinAsked,
    WindowTold,
    WithdrawLease,
    WriteDisk,
    Written,
)
from kvstore.tiers.machine import StoreLimits, StoreMachine
from kvtransfer import BlockClass, Ledger
from tests.support.store_chains import BLOCK_TOKENS, POSITIONS
from tests.support.store_disk import BLOCK_BYTES, ModelDisk
from tests.support.store_eviction import RecordingEviction
from tests.support.store_views import Fetch, Keep, KeySet, Read, Write, content

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import Generation

GARBAGE = b"garbage"
#: Of work for the disk, each from the one before; more is no progress.
MAX_ROUNDS = 64


class StoreWorld:
    """One life of one store, over a disk that outlives it."""

    def __init__(
        self,
        num_blocks: int,
        disk: ModelDisk | None = None,
        *,
        eviction: RecordingEviction | None = None,
        limits: StoreLimits | None = None,
        now_s: float = 0.0,
    ) -> None:
        self.disk = disk or ModelDisk()
        self.limits = limits or StoreLimits()
        self.eviction = eviction or RecordingEviction()
        self.ledger = Ledger(num_blocks)
        self.dram = DramTier(self.ledger, self.disk, self.eviction, block_bytes=BLOCK_BYTES)
        self.machine = StoreMachine(self.dram, self.disk, self.limits, block_tokens=BLOCK_TOKENS)
        self.now_s = now_s
        self.news = KeySet(list(self.disk.stands))
        self.dram.news = self.news
        self.disk.on_lost = self._lost
        self.memory = [GARBAGE] * num_blocks
        #: All that are not over.
        self.fetches: dict[str, Fetch] = {}
        self.reads: dict[int, Read] = {}
        self.writes: dict[int, Write] = {}
        self.keeps: dict[LeaseId, Keep] = {}
        #: Given up while bytes may still land.
        self.quarantined: dict[LeaseId, Keep] = {}
        #: What the last event made the machine say.
        self.said: list[StoreInstruction] = []

    def feed(self, event: StoreEvent) -> list[StoreInstruction]:
        self.said = self.machine.handle(event, self.now_s)
        for instruction in self.said:
            self._perform(instruction)
        return self.said

    def stands(self, key: bytes) -> bool:
        """In memory or, as far as anybody knows, on disk."""
        return key in self.disk.stands or self.ledger.lookup(key) is not None

    # --- readers ------------------------------------------------------------------------------------------

    def ask(self, fetch_id: str, keys: Sequence[bytes], position: int = 0) -> Fetch:
        """Asks, and sees that what could be had is had."""
        keys = tuple(keys)
        standing = self.machine.num_standing(keys)
        being_read = {key for read in self.reads.values() for key in read.undone}
        sure = 0
        while sure < len(keys) and (self.ledger.lookup(keys[sure]) is not None or keys[sure] in being_read):
            sure += 1
        fetch = self.fetches[fetch_id] = Fetch(keys)
        self.feed(FetchAsked(fetch_id, keys, position))
        assert sure <= len(fetch.blocks) <= standing, (sure, fetch, standing)
        assert (fetch.end == 0) == (not fetch.blocks), "nothing was found, or a lease was opened"
        if fetch.end == 0:
            del self.fetches[fetch_id]
        return fetch

    def over(self, fetch_id: str) -> Fetch:
        """Its lease ends, for whatever reason."""
        fetch = self.fetches.pop(fetch_id)
        self.ledger.unpin(LeaseId(fetch_id))
        self.feed(FetchOver(fetch_id))
        return fetch

    # --- disk ---------------------------------------------------------------------------------------------

    def begin_read(self, load_id: int, index: int) -> None:
        """Part of a block comes from disk."""
        read = self.reads[load_id]
        self.memory[read.order.blocks[index]] = b"torn " + read.order.keys[index]
        if self.disk.stands.get(read.order.keys[index], False):
            read.begun.add(index)

    def end_read(self, load_id: int, index: int) -> None:
        """The rest of it comes, or the disk finds that it is damaged or gone."""
        read = self.reads[load_id]
        key = read.order.keys[index]
        is_there = index in read.begun or self.disk.stands.get(key, False)
        self.memory[read.order.blocks[index]] = content(key) if is_there else b"damaged " + key
        if not is_there and key in self.disk.stands:
            self.disk.drop(key)
        read.done.add(index)
        if len(read.done) == len(read.order.keys):
            del self.reads[load_id]
        self.feed(BlockRead(load_id, index, is_there))

    def land_write(self, write_id: int, index: int) -> None:
        """One block is durable."""
        write = self.writes[write_id]
        each = write.order.blocks[index]
        assert self.memory[each.block] == content(each.key)
        write.landed.add(index)
        self.disk.put(each.key)

    def end_write(self, write_id: int) -> None:
        """The disk is done; what has not landed it refused."""
        write = self.writes.pop(write_id)
        stored = [
            index in write.landed and each.key in self.disk.stands for index, each in enumerate(write.order.blocks)
        ]
        self.feed(Written(write_id, tuple(stored)))

    # --- workers that give ----------------------------------------------------------------------------------

    def offer(self, lease_id: LeaseId, keys: Sequence[bytes], position: int = 0) -> bool:
        """As the store's shell on Keep; whether something is copied."""
        have = self.machine.num_standing(keys)
        missing = tuple(keys[have:])
        blocks = self.ledger.reserve(lease_id, len(missing)) if missing else None
        if blocks is None:
            return False
        self._scribble(blocks)
        self.ledger.begin_pull(lease_id)
        self.keeps[lease_id] = Keep(missing, position + have, blocks)
        return True

    def land(self, lease_id: LeaseId) -> None:
        """One more block is copied whole, and the next one in part."""
        keep = self.keeps[lease_id]
        index = keep.num_landed
        self.memory[keep.blocks[index]] = content(keep.keys[index])
        keep.num_landed += 1
        if index + 1 < len(keep.keys):
            self.memory[keep.blocks[index + 1]] = b"torn " + keep.keys[index + 1]

    def adopt(self, lease_id: LeaseId) -> None:
        """The lease was sealed with what has come, at least one block."""
        keep = self.keeps.pop(lease_id)
        owner = f"keep/{lease_id}"
        self.ledger.end_pull(lease_id)
        self.ledger.adopt(lease_id, owner)
        count = keep.num_landed
        kept = Kept(
            owner=owner,
            keys=keep.keys[:count],
            blocks=tuple(keep.blocks[:count]),
            first_block=keep.position,
            num_tokens=(keep.position + len(keep.keys)) * BLOCK_TOKENS,
            lossy=False,
        )
        self.feed(kept)
        self.ledger.release_all(owner)

    def abort(self, lease_id: LeaseId) -> None:
        """The worker that gives is killed; bytes may land until `settle`."""
        self.quarantined[lease_id] = self.keeps.pop(lease_id)
        self.ledger.abort(lease_id)

    def settle(self, lease_id: LeaseId) -> None:
        self._scribble(self.quarantined.pop(lease_id).blocks)
        self.ledger.settle(lease_id)

    # --- others -------------------------------------------------------------------------------------------

    def take(self, owner: str, num_blocks: int) -> bool:
        """Somebody else needs memory, and writes there."""
        blocks = self.ledger.allocate(owner, num_blocks)
        self._scribble(blocks or ())
        return blocks is not None

    def clear(self, tiers: Sequence[str], *, with_pinned: bool) -> None:
        """As the store's shell on CacheClear."""
        if "ssd" in tiers:
            self.disk.clear(with_pinned=with_pinned)
        if "dram" in tiers:
            if with_pinned:
                self.disk.excused |= set(self.dram.pinned_keys) - self.disk.stands.keys()
            self.dram.clear(with_pinned=with_pinned)

    def window(self, worker_id: str, *prompts: Sequence[bytes]) -> None:
        self.feed(WindowTold(WorkerId(worker_id), tuple(map(tuple, prompts))))

    def pin(self, keys: Sequence[bytes], until_s: float | None = None) -> None:
        self.feed(PinAsked(tuple(keys), until_s))

    def unpin(self, keys: Sequence[bytes]) -> None:
        self.feed(UnpinAsked(tuple(keys)))

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        self.feed(StoreTick())

    def keep(self, keys: Sequence[bytes], position: int = 0) -> None:
        """All of these come from a worker at one go."""
        lease_id = LeaseId(f"whole/{position}/{keys[0].hex()}")
        if self.offer(lease_id, keys, position):
            for _ in self.keeps[lease_id].keys:
                self.land(lease_id)
            self.adopt(lease_id)

    def finish_disk(self) -> None:
        """Everything that the disk was asked for is done, and what follows from it."""
        for _ in range(MAX_ROUNDS):
            if not self.reads and not self.writes:
                return
            for load_id, read in list(self.reads.items()):
                for index in sorted(set(range(len(read.order.keys))) - read.done):
                    self.begin_read(load_id, index)
                    self.end_read(load_id, index)
            for write_id, write in list(self.writes.items()):
                for index in sorted(set(range(len(write.order.blocks))) - write.landed):
                    self.land_write(write_id, index)
                self.end_write(write_id)
        raise AssertionError(f"the disk is kept busy for ever by {self.machine!r}")

    # --- instructions ---------------------------------------------------------------------------------------

    def _perform(self, instruction: StoreInstruction) -> None:
        match instruction:
            case FoundNothing(fetch_id):
                fetch = self._open_fetch(fetch_id, asked=True)
                fetch.end = 0
            case OpenLease(fetch_id=fetch_id, blocks=blocks, num_ready=num_ready, is_sealed=is_sealed):
                fetch = self._open_fetch(fetch_id, asked=True)
                assert 0 < len(blocks) <= len(fetch.keys), instruction
                assert 0 <= num_ready <= len(blocks), instruction
                assert is_sealed == (num_ready == len(blocks)), "what is all ready grows no more"
                assert sum(instruction.tier_blocks.values()) == len(blocks), instruction
                fetch.blocks, fetch.num_ready = blocks, num_ready
                fetch.end = num_ready if is_sealed else None
                self.ledger.pin(LeaseId(fetch_id), blocks)
            case AdvanceLease(fetch_id, num_ready):
                fetch = self._open_fetch(fetch_id)
                assert fetch.num_ready < num_ready < len(fetch.blocks), (fetch, instruction)
                fetch.num_ready = num_ready
            case SealLease(fetch_id, num_blocks):
                fetch = self._open_fetch(fetch_id)
                assert max(1, fetch.num_ready) <= num_blocks <= len(fetch.blocks), (fetch, instruction)
                fetch.num_ready = fetch.end = num_blocks
            case WithdrawLease(fetch_id):
                fetch = self._open_fetch(fetch_id)
                assert fetch.num_ready == 0, "what is ready is worth a seal"
                fetch.end = 0
            case ReadDisk(load_id=load_id, keys=keys, blocks=blocks):
                assert len(keys) == len(blocks) > 0, instruction
                assert all(self.disk.has(keys)), "nothing is read that is not there"
                self._scribble(blocks)
                self.reads[load_id] = Read(instruction, tuple(map(self.ledger.generation, blocks)))
            case WriteDisk(write_id=write_id, blocks=kept):
                assert kept, instruction
                self.writes[write_id] = Write(instruction, tuple(self.ledger.generation(each.block) for each in kept))
            case _:
                assert_never(instruction)

    def _open_fetch(self, fetch_id: str, *, asked: bool = False) -> Fetch:
        fetch = self.fetches[fetch_id]
        assert fetch.end is None, f"{fetch} has come to its end, and hears more"
        assert asked == (not fetch.blocks), fetch
        return fetch

    def _scribble(self, blocks: Sequence[BlockId]) -> None:
        for block in blocks:
            self.memory[block] = GARBAGE

    def _lost(self, keys: list[bytes]) -> None:
        """As `StoreShell.disk_lost`."""
        for key in keys:
            if self.ledger.lookup(key) is None:
                self.news.removed(key)

    # --- what must hold at every instant ----------------------------------------------------------------------

    def check(self) -> None:
        self.machine.check()
        self.ledger.check()
        for index, block_class in enumerate(map(self.ledger.block_class, self._all_blocks())):
            if block_class is BlockClass.FREE:
                self.memory[index] = GARBAGE
        for fetch in self.fetches.values():
            for key, block in zip(fetch.keys, fetch.blocks[: fetch.num_ready], strict=False):
                assert self.memory[block] == content(key), f"a reader sees {self.memory[block]!r} for {key!r}"
        for key in self.ledger.all_keys():
            found = self.ledger.lookup(key)
            assert found is not None
            assert self.memory[found] == content(key), f"{self.memory[found]!r} is found as {key!r}"
            position = self.dram.position[found]
            assert position == self.eviction.entries[found] == POSITIONS.get(key, position)
        for read in self.reads.values():
            for index, block in enumerate(read.order.blocks):
                if index not in read.done:
                    self._expect_held(block, read.generations[index])
        for write in self.writes.values():
            for each, generation in zip(write.order.blocks, write.generations, strict=True):
                self._expect_held(each.block, generation)
                assert self.memory[each.block] == content(each.key), "the disk writes what changes under it"
        self._check_books()

    def _check_books(self) -> None:
        """What the tier tells others is what stands; nothing exceeds its share."""
        in_memory = set(self.ledger.all_keys())
        assert self.news.keys == in_memory | set(self.disk.stands), "the coordinator believes something else"
        assert self.disk.pinned <= set(self.dram.pinned_keys), "the disk keeps what nobody pins any more"
        assert set(self.eviction.entries) == {self.ledger.lookup(key) for key in in_memory}
        num_reading = sum(len(read.undone) for read in self.reads.values())
        reading_share = max(self.limits.reading_share, self.limits.ahead_share)
        assert num_reading <= max(1, int(reading_share * self.ledger.num_blocks))
        num_writing = sum(len(write.order.blocks) for write in self.writes.values())
        assert num_writing <= max(1, int(self.limits.writing_share * self.ledger.num_blocks))
        if not self.fetches and not self.reads and not self.writes:
            assert self.machine.idle

    def _expect_held(self, block: BlockId, generation: Generation) -> None:
        assert self.ledger.block_class(block) is BlockClass.OWNED, f"block {block} is used by the disk"
        assert self.ledger.generation(block) == generation, f"block {block} was given to somebody else meanwhile"

    def _all_blocks(self) -> list[BlockId]:
        return [BlockId(index) for index in range(self.ledger.num_blocks)]
