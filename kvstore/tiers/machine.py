"""A store's protocol: fetches that are answered from memory and disk, blocks that came to stay, prompts that wait.

    fetch:  asked ── all in memory ──▶ lease sealed at once
                  ── some on disk ──▶ lease open ──read*──▶ advanced ──▶ sealed (short where the disk failed)
    block:  kept (memory) ──▶ written behind (disk) ──▶ evicted from memory ──▶ read again (memory)

`StoreMachine.handle` is the only thing that changes what stands where. It performs no I/O and reads no clock:
`worker.store_shell` executes its instructions and feeds back what came of them. Bytes that are still being read have
no key, so nobody finds them; what is read for one prompt is found by the next as soon as it is verified.

Blocks that are being read or written are referred to in the ledger until the disk is done with them: nothing lands in
a block that was given to somebody else. Reads that nobody waits for any more go on: somebody will.
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, assert_never

from contracts.errors import InvariantBroken
from contracts.failpoints import RarePath
from kvstore.codecs.window import num_lossy_blocks
from kvstore.tiers.disk import KeptBlock
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
from kvstore.tiers.window import blocks_ahead

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.ids import BlockId, WorkerId
    from kvstore.tiers.disk import DiskTier
    from kvstore.tiers.dram import DramTier
    from kvtransfer import Ledger

#: Blocks of one `WriteDisk` at most.
MAX_BLOCKS_PER_WRITE = 64

#: How long what a worker said of its waiting prompts counts: that they wait no more may be lost on the way.
MAX_WINDOW_AGE_S = 10.0

#: Owner of what waiting prompts need, while room is made for what they lack.
_WINDOW = "window"

_FROM_DISK = RarePath("kvstore.store_reads_disk", "a fetch is answered with blocks that come from the store's disk")
_READ_FAILED = RarePath("kvstore.store_read_failed", "a block was not on the store's disk any more, or was damaged")
_READ_JOINED = RarePath("kvstore.store_read_joined", "a fetch waits for a block that is being read for another one")
_WRITE_SKIPPED = RarePath("kvstore.store_write_skipped", "a block is not written to disk: too many wait for that")


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """Shares of the memory's blocks."""

    #: That may be read for fetches, and ahead of them, at once.
    reading_share: float = 0.5
    ahead_share: float = 0.25
    #: That may wait to be written.
    writing_share: float = 0.25
    #: That the prompts which wait may have kept for them.
    window_share: float = 0.5

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; above 0 and at most 1 is needed")


@dataclass(slots=True, kw_only=True, eq=False)
class _Fetch:
    fetch_id: str
    owner: str
    blocks: list[BlockId]
    #: Leading blocks that are ready, and those behind the first that is not.
    is_ready: list[bool]
    num_ready: int = 0
    #: It ends before the first block that could not be read.
    stop: int
    is_sealed: bool = False


@dataclass(slots=True, kw_only=True)
class _Load:
    owner: str
    keys: tuple[bytes, ...]
    blocks: tuple[BlockId, ...]
    #: In the sequence, counted from 0.
    positions: tuple[int, ...]
    is_done: list[bool] = field(init=False)

    def __post_init__(self) -> None:
        self.is_done = [False] * len(self.keys)


@dataclass(slots=True)
class _Reading:
    """A block that is being read."""

    block: BlockId
    #: Fetches that wait for it, and which of their blocks it is. Not by id: one that is over may be asked for again.
    waiting: list[tuple[_Fetch, int]] = field(default_factory=list[tuple[_Fetch, int]])


class StoreMachine:
    """One life of one store. Not thread-safe."""

    def __init__(
        self, dram: DramTier, disk: DiskTier, limits: StoreLimits | None = None, *, block_tokens: int = 16
    ) -> None:
        self.dram = dram
        self._block_tokens = block_tokens
        self._ledger: Ledger = dram.ledger
        self._disk = disk
        self._limits = limits or StoreLimits()
        self._numbers = itertools.count(1)
        #: All and only fetches whose lease has not ended; each has its blocks in the ledger under its owner.
        self._fetches: dict[str, _Fetch] = {}
        #: All and only reads that the disk is not done with; each has its blocks that are not done under its owner.
        self._loads: dict[int, _Load] = {}
        #: All and only keys that are being read.
        self._reading: dict[bytes, _Reading] = {}
        #: Blocks of all and only writes that the disk is not done with, under the owner of each.
        self._writes: dict[int, tuple[KeptBlock, ...]] = {}
        self._num_writing = 0
        #: By key: blocks that could not be written when they came; tried again while they stand in memory.
        self._unwritten: dict[bytes, KeptBlock] = {}
        #: By worker: what waits there, and when it was told; the oldest first.
        self._windows: dict[WorkerId, tuple[tuple[tuple[bytes, ...], ...], float]] = {}
        #: Blocks that were not written, by why; blocks read in vain.
        self.not_written: Counter[str] = Counter()
        self.failed_reads = 0

    def __repr__(self) -> str:
        return (
            f"<StoreMachine [{len(self._fetches)} fetches, {len(self._reading)} blocks being read, "
            f"{self._num_writing} being written] {self._ledger!r}>"
        )

    @property
    def num_fetches(self) -> int:
        return len(self._fetches)

    @property
    def num_windows(self) -> int:
        """Workers of which it is known what waits there."""
        return len(self._windows)

    @property
    def idle(self) -> bool:
        return not self._fetches and not self._loads and not self._writes

    def num_standing(self, keys: Sequence[bytes]) -> int:
        """How many leading ones of these keys stand here, or will soon."""
        on_disk = self._disk.has(keys)
        for index, key in enumerate(keys):
            if not on_disk[index] and self._ledger.lookup(key) is None and key not in self._reading:
                return index
        return len(keys)

    def handle(self, event: StoreEvent, now_s: float) -> list[StoreInstruction]:
        if over := self.dram.pass_time(now_s):
            self._disk.unpin(over)
        match event:
            case FetchAsked(fetch_id, keys, first_block):
                return self._ask(fetch_id, keys, first_block)
            case FetchOver(fetch_id):
                return self._fetch_over(fetch_id)
            case BlockRead(load_id, index, is_there):
                return self._block_read(load_id, index, is_there)
            case Kept():
                return self._keep(event)
            case Written():
                return self._written(event)
            case WindowTold(worker_id, prompts):
                self._windows.pop(worker_id, None)
                if prompts:
                    self._windows[worker_id] = prompts, now_s
                if not self._windows:
                    self.dram.need(())
                return self._read_ahead()
            case PinAsked(keys, until_s):
                self.dram.pin(keys, until_s)
                self._disk.pin(keys)
            case UnpinAsked(keys):
                self.dram.unpin(keys)
                self._disk.unpin(keys)
            case StoreTick():
                self._forget_windows(now_s)
                return [*self._read_ahead(), *self._write_put_off()]
            case _:
                assert_never(event)
        return []

    # --- fetches ------------------------------------------------------------------------------------------

    def _ask(self, fetch_id: str, keys: tuple[bytes, ...], first_block: int) -> list[StoreInstruction]:
        if fetch_id in self._fetches:
            raise InvariantBroken(f"fetch {fetch_id} is asked for twice; {self!r}")
        standing = self.num_standing(keys)
        self.dram.missed_blocks += len(keys) - standing
        owner = f"fetch/{fetch_id}"
        found = [self._ledger.lookup(key) for key in keys[:standing]]
        # Shared first, lest they be evicted for those that are read.
        self._ledger.share(owner, [block for block in found if block is not None])
        missing = [index for index, block in enumerate(found) if block is None and keys[index] not in self._reading]
        load = self._load(keys, missing, first_block, is_ahead=False)
        num_loaded = 0 if load is None else len(load.keys)
        if num_loaded < len(missing):
            standing = missing[num_loaded]
            self._ledger.release(owner, [block for block in found[standing:] if block is not None])
        if not standing:
            return [FoundNothing(fetch_id)]
        loaded = set(missing[:num_loaded])
        fetch = _Fetch(fetch_id=fetch_id, owner=owner, blocks=[], is_ready=[], stop=standing)
        for index, block in enumerate(found[:standing]):
            fetch.is_ready.append(block is not None)
            if block is None:
                if index not in loaded:
                    _READ_JOINED.reached()
                reading = self._reading[keys[index]]
                reading.waiting.append((fetch, index))
                self._ledger.share(owner, (reading.block,))
                block = reading.block
            fetch.blocks.append(block)
        self._fetches[fetch_id] = fetch
        fetch.num_ready = _num_leading(fetch.is_ready)
        fetch.is_sealed = fetch.num_ready == standing
        self.dram.use([block for block, is_ready in zip(fetch.blocks, fetch.is_ready, strict=True) if is_ready])
        self._disk.touch(keys[:standing])
        num_here = sum(fetch.is_ready)
        tier_blocks = {"dram": num_here, "ssd": standing - num_here}
        opened = OpenLease(
            fetch_id=fetch_id,
            blocks=tuple(fetch.blocks),
            num_ready=fetch.num_ready,
            is_sealed=fetch.is_sealed,
            tier_blocks={tier: count for tier, count in tier_blocks.items() if count},
        )
        if load is None:
            return [opened]
        _FROM_DISK.reached()
        return [opened, load]

    def _fetch_over(self, fetch_id: str) -> list[StoreInstruction]:
        fetch = self._fetches.pop(fetch_id, None)
        if fetch is None:
            return []
        self._ledger.release_all(fetch.owner)
        return self._read_ahead()

    # --- reading ------------------------------------------------------------------------------------------

    def _load(
        self, keys: Sequence[bytes], places: Sequence[int], first_block: int, *, is_ahead: bool
    ) -> ReadDisk | None:
        """Begins to read blocks that stand on disk alone: those at these places among `keys`, of which the first is
        `first_block` of its sequence, or as many of them as there is room for; None: not one."""
        share = self._limits.ahead_share if is_ahead else self._limits.reading_share
        room = max(1, int(share * self._ledger.num_blocks)) - len(self._reading)
        places = places[: max(0, room)]
        if not places:
            return None
        load_id = next(self._numbers)
        owner = f"load/{load_id}"
        blocks = self._ledger.allocate(owner, len(places))
        if blocks is None:
            # What is pinned or held may leave less than that.
            places = places[: self.dram.num_available()]
            blocks = self._ledger.allocate(owner, len(places))
        if not blocks:
            return None
        load = _Load(
            owner=owner,
            keys=tuple(keys[place] for place in places),
            blocks=tuple(blocks),
            positions=tuple(first_block + place for place in places),
        )
        self._loads[load_id] = load
        for key, block in zip(load.keys, blocks, strict=True):
            self._reading[key] = _Reading(block)
        return ReadDisk(load_id=load_id, keys=load.keys, blocks=load.blocks, is_ahead=is_ahead)

    def _block_read(self, load_id: int, index: int, is_there: bool) -> list[StoreInstruction]:
        load = self._loads[load_id]
        if load.is_done[index]:
            raise InvariantBroken(f"block {index} of read {load_id} is done twice; {self!r}")
        load.is_done[index] = True
        key, block = load.keys[index], load.blocks[index]
        reading = self._reading.pop(key)
        if is_there:
            self.dram.came("ssd", 1)
            # Another copy may have come from a worker meanwhile; then this one goes with whoever waits for it.
            self.dram.name(block, key, load.positions[index])
        else:
            _READ_FAILED.reached()
            self.failed_reads += 1
        self._ledger.release(load.owner, (block,))
        instructions: list[StoreInstruction] = []
        for fetch, position in reading.waiting:
            if self._fetches.get(fetch.fetch_id) is fetch:
                instructions += self._came(fetch, position, is_there)
        if all(load.is_done):
            del self._loads[load_id]
            instructions += self._read_ahead()
        return instructions

    def _came(self, fetch: _Fetch, position: int, is_there: bool) -> list[StoreInstruction]:
        """One of its blocks is read, or will not be."""
        fetch_id = fetch.fetch_id
        if fetch.is_sealed:
            return []
        if is_there:
            fetch.is_ready[position] = True
            self.dram.went("worker", 1)
        else:
            fetch.stop = min(fetch.stop, position)
        before, fetch.num_ready = fetch.num_ready, min(_num_leading(fetch.is_ready), fetch.stop)
        if fetch.num_ready == fetch.stop:
            fetch.is_sealed = True
            if not fetch.stop:
                return [WithdrawLease(fetch_id, "its first block could not be read from disk")]
            return [SealLease(fetch_id, fetch.stop)]
        return [AdvanceLease(fetch_id, fetch.num_ready)] if fetch.num_ready > before else []

    def _read_ahead(self) -> list[StoreInstruction]:
        """Brings what waiting prompts need from disk, as far as there is room, and says what is to stay."""
        if not self._windows:
            return []
        needed: dict[BlockId, None] = {}
        wanted: list[tuple[tuple[bytes, ...], list[int]]] = []
        window_blocks = int(self._limits.window_share * self._ledger.num_blocks)
        for keys in blocks_ahead([prompts for prompts, _ in self._windows.values()], window_blocks):
            missing: list[int] = []
            for position, key in enumerate(keys[: self.num_standing(keys)]):
                block = self._ledger.lookup(key)
                if block is not None:
                    needed[block] = None
                elif key not in self._reading:
                    missing.append(position)
            if missing:
                wanted.append((keys, missing))
        self.dram.need(list(needed))
        if not wanted:
            return []
        # Held meanwhile: what one waiting prompt has does not go for what another one lacks.
        self._ledger.share(_WINDOW, list(needed))
        loads: list[StoreInstruction] = []
        for keys, missing in wanted:
            places = [position for position in missing if keys[position] not in self._reading]
            load = self._load(keys, places, 0, is_ahead=True)
            if load is not None:
                loads.append(load)
        self._ledger.release_all(_WINDOW)
        return loads

    def _forget_windows(self, now_s: float) -> None:
        old = [worker_id for worker_id, (_, told_s) in self._windows.items() if now_s - told_s > MAX_WINDOW_AGE_S]
        for worker_id in old:
            del self._windows[worker_id]
        if old and not self._windows:
            self.dram.need(())

    # --- keeping ------------------------------------------------------------------------------------------

    def _keep(self, event: Kept) -> list[StoreInstruction]:
        new: list[KeptBlock] = []
        num_lossy = num_lossy_blocks(event.num_tokens, self._block_tokens)
        on_disk = self._disk.has(event.keys)
        for offset, (key, block) in enumerate(zip(event.keys, event.blocks, strict=True)):
            position = event.first_block + offset
            is_new = self.dram.name(block, key, position, is_on_disk=on_disk[offset])
            if is_new and not on_disk[offset]:
                is_lossy = event.lossy and position < num_lossy
                new.append(KeptBlock(key=key, block=block, position=position, lossy=is_lossy))
        self.dram.came("worker", len(event.blocks))
        instructions = self._write(new)
        # Those that are written are held for that.
        self._ledger.release(event.owner, event.blocks)
        return [*instructions, *self._read_ahead()]

    def _write(self, blocks: list[KeptBlock]) -> list[StoreInstruction]:
        most = max(1, int(self._limits.writing_share * self._ledger.num_blocks))
        room = most - self._num_writing
        if len(blocks) > room:
            _WRITE_SKIPPED.reached()
            self._put_off(blocks[max(0, room) :], "write queue full")
            blocks = blocks[: max(0, room)]
        instructions: list[StoreInstruction] = []
        for start in range(0, len(blocks), MAX_BLOCKS_PER_WRITE):
            part = tuple(blocks[start : start + MAX_BLOCKS_PER_WRITE])
            write_id = next(self._numbers)
            self._ledger.share(f"write/{write_id}", [each.block for each in part])
            self._writes[write_id] = part
            self._num_writing += len(part)
            instructions.append(WriteDisk(write_id=write_id, blocks=part))
        return instructions

    def _written(self, event: Written) -> list[StoreInstruction]:
        blocks = self._writes.pop(event.write_id)
        self._num_writing -= len(blocks)
        self.dram.went("ssd", sum(event.stored))
        refused = [each for each, stored in zip(blocks, event.stored, strict=True) if not stored]
        self._put_off(refused, "refused by the disk tier")
        pinned = [
            each.key
            for each, stored in zip(blocks, event.stored, strict=True)
            if stored and self.dram.is_pinned(each.key)
        ]
        self._disk.pin(pinned)
        self._ledger.release_all(f"write/{event.write_id}")
        return [] if refused else self._write_put_off()

    def _put_off(self, blocks: Sequence[KeptBlock], why: str) -> None:
        """They are written later, if they still stand in memory then."""
        for each in blocks:
            if each.key not in self._unwritten:
                self.not_written[why] += 1
            self._unwritten[each.key] = each
        while len(self._unwritten) > self._ledger.num_blocks:
            del self._unwritten[next(iter(self._unwritten))]

    def _write_put_off(self) -> list[StoreInstruction]:
        """The oldest of those, as far as there is room in the queue and the disk takes blocks."""
        if not self._unwritten or self._disk.problem:
            return []
        most = max(1, int(self._limits.writing_share * self._ledger.num_blocks))
        again: list[KeptBlock] = []
        while self._unwritten and len(again) < min(most - self._num_writing, MAX_BLOCKS_PER_WRITE):
            each = self._unwritten.pop(next(iter(self._unwritten)))
            block = self._ledger.lookup(each.key)
            if block is not None and not self._disk.has((each.key,))[0]:
                again.append(KeptBlock(key=each.key, block=block, position=each.position, lossy=each.lossy))
        return self._write(again)

    # --- audit --------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Audits what the attributes promise; raises InvariantBroken."""
        reading = {
            key: block
            for load in self._loads.values()
            for key, block, is_done in zip(load.keys, load.blocks, load.is_done, strict=True)
            if not is_done
        }
        if reading != {key: each.block for key, each in self._reading.items()}:
            raise InvariantBroken(f"{len(reading)} blocks of reads, {len(self._reading)} kept; {self!r}")
        if self._num_writing != sum(map(len, self._writes.values())):
            raise InvariantBroken(f"{self._num_writing} blocks are said to be written; {self!r}")
        for fetch in self._fetches.values():
            if fetch.num_ready != min(_num_leading(fetch.is_ready), fetch.stop):
                raise InvariantBroken(f"{fetch}; {self!r}")
            if sorted(self._ledger.blocks_of(fetch.owner)) != sorted(fetch.blocks):
                raise InvariantBroken(f"{fetch} holds other blocks; {self!r}")


def _num_leading(flags: list[bool]) -> int:
    return flags.index(False) if False in flags else len(flags)
