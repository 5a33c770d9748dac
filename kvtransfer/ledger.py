"""The books of one worker's KV blocks: who holds each block, and which class it is in.

Every block has request references, lease pins (this worker is the holder), a reservation (this worker is the
reader) and a key. Its class follows from these by precedence:

    quarantined > reserved > owned > offered > cached > free

and the six counts sum to the total at every instant. All changes are synchronous and O(blocks touched);
nothing here does I/O, reads a clock or touches a byte of KV.

Misuse (releasing what is not held, adopting while bytes may still land) is a bug of the caller and raises
InvariantBroken with the block, the names and the counts.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol, TypedDict

from contracts.errors import InvariantBroken
from contracts.ids import BlockId, Generation

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from contracts.ids import LeaseId


class BlockClass(IntEnum):
    """What a block is for now. A higher value takes precedence."""

    FREE = 0
    #: Nobody refers to it, but it has a key and its bytes stand until it is evicted.
    CACHED = 1
    #: Kept alive only by the pins of leases that this worker granted.
    OFFERED = 2
    #: Referred to by at least one request.
    OWNED = 3
    #: Set aside for a lease that this worker reads; bytes may be landing.
    RESERVED = 4
    #: Of an aborted lease whose pull has not reached a terminal state: bytes may still land.
    QUARANTINED = 5


#: Blocks of these classes may have a key.
_WITH_KEYS = (BlockClass.CACHED, BlockClass.OFFERED, BlockClass.OWNED)


class BlockCounts(TypedDict):
    """Blocks by class, under the names that `contracts.messages.WorkerLoad` uses; they sum to the total."""

    free_blocks: int
    owned_blocks: int
    offered_blocks: int
    reserved_blocks: int
    cached_blocks: int
    quarantined_blocks: int


class KeyListener(Protocol):
    """Hears which keys can be looked up, at once and in order. Must not call the ledger."""

    def stored(self, key: bytes) -> None:
        """A block has this key from now on."""
        ...

    def removed(self, key: bytes) -> None:
        """No block has it any more."""
        ...


class Evictor(Protocol):
    """Chooses which cached blocks go where there is no free one."""

    def victims(self, num_blocks: int) -> Sequence[BlockId]:
        """So many different cached blocks, which are evicted at once, or none: then not enough may be given up. Must
        not call what changes the ledger."""
        ...


@dataclass(slots=True)
class _Reservation:
    blocks: list[BlockId]
    #: Bytes may land in `blocks` at any moment.
    pulling: bool = False
    #: Aborted while pulling; implies `pulling`.
    quarantined: bool = False


class Ledger:
    """Who holds which of `num_blocks` blocks. Not thread-safe: it lives on the worker's event loop."""

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise InvariantBroken(f"a ledger of {num_blocks} blocks")
        self.num_blocks = num_blocks
        #: Hears of keys that come and go.
        self.key_listener: KeyListener | None = None
        #: None: the least recently used one goes first, and all may be given up.
        self.evictor: Evictor | None = None
        #: owner -> the blocks it refers to; no entry is empty.
        self._owned: dict[str, dict[BlockId, None]] = {}
        #: lease granted here -> the blocks it pins.
        self._pinned: dict[LeaseId, tuple[BlockId, ...]] = {}
        #: lease read here -> its blocks.
        self._reservations: dict[LeaseId, _Reservation] = {}
        #: Per block: owners that refer to it; leases that pin it; the reservation it is part of.
        self._references: list[int] = [0] * num_blocks
        self._pins: list[int] = [0] * num_blocks
        self._reserved_by: list[LeaseId | None] = [None] * num_blocks
        #: Per block: how often it became free. A reader that saw a smaller one saw other bytes.
        self._generations: list[int] = [0] * num_blocks
        #: Per block its key, and back: a key names at most one block; a free block has none.
        self._keys: list[bytes | None] = [None] * num_blocks
        self._by_key: dict[bytes, BlockId] = {}
        #: Per block the class that `_class_of` computes, and how many blocks each class has.
        self._classes: list[BlockClass] = [BlockClass.FREE] * num_blocks
        self._counts: list[int] = [num_blocks, 0, 0, 0, 0, 0]
        #: All and only free blocks, the next to hand out last. Last in, first out: memory that was touched is
        #: touched again, and runs of neighbours stay runs.
        self._free: list[BlockId] = [BlockId(index) for index in reversed(range(num_blocks))]
        #: All and only cached blocks, least recently used first.
        self._cached: OrderedDict[BlockId, None] = OrderedDict()

    def __repr__(self) -> str:
        counts = ", ".join(f"{self._counts[each]} {each.name.lower()}" for each in reversed(BlockClass))
        return f"<Ledger [{counts} | {self.num_blocks} blocks]>"

    # --- what stands ------------------------------------------------------------------------------------

    def load(self) -> BlockCounts:
        """The class counts; O(1)."""
        return BlockCounts(
            free_blocks=self._counts[BlockClass.FREE],
            owned_blocks=self._counts[BlockClass.OWNED],
            offered_blocks=self._counts[BlockClass.OFFERED],
            reserved_blocks=self._counts[BlockClass.RESERVED],
            cached_blocks=self._counts[BlockClass.CACHED],
            quarantined_blocks=self._counts[BlockClass.QUARANTINED],
        )

    @property
    def available_blocks(self) -> int:
        """Blocks that `allocate` or `reserve` could hand out now, as far as `evictor` gives cached ones up: free and
        cached ones."""
        return self._counts[BlockClass.FREE] + self._counts[BlockClass.CACHED]

    def block_class(self, block: BlockId) -> BlockClass:
        return self._classes[block]

    def generation(self, block: BlockId) -> Generation:
        return Generation(self._generations[block])

    def blocks_of(self, owner: str) -> list[BlockId]:
        """What `owner` refers to, in the order it got them; empty for an unknown owner."""
        return list(self._owned.get(owner, ()))

    def reserved_blocks(self, lease_id: LeaseId) -> list[BlockId]:
        """The blocks set aside (or in quarantine) for a lease read here, in the lease's order."""
        return list(self._reservation(lease_id).blocks)

    def is_reserved(self, lease_id: LeaseId) -> bool:
        """Blocks are set aside (or in quarantine) for this lease."""
        return lease_id in self._reservations

    # --- requests ---------------------------------------------------------------------------------------

    def allocate(self, owner: str, num_blocks: int) -> list[BlockId] | None:
        """Gives `owner` that many blocks, or None and nothing where not enough are free or cached.

        Free blocks go first; then cached ones are evicted: those that `evictor` names, else least recently used first.
        """
        blocks = self._take(num_blocks)
        if blocks is not None:
            self._refer(owner, blocks)
        return blocks

    def share(self, owner: str, blocks: Sequence[BlockId]) -> None:
        """Adds `owner`'s reference to blocks whose bytes stand (owned, offered or cached)."""
        self._require_bytes(blocks, f"share with {owner!r}")
        self._refer(owner, blocks)

    def release(self, owner: str, blocks: Iterable[BlockId]) -> None:
        """Drops `owner`'s reference to each block; those that nobody holds become cached or free."""
        held = self._owned.get(owner, {})
        # Backwards, so that the next allocation gets them in the same order, and so that of a cached prefix
        # the end is evicted before the beginning.
        for block in reversed(list(blocks)):
            if block not in held:
                raise InvariantBroken(f"{owner!r} releases block {block}, which it does not hold; {self!r}")
            del held[block]
            self._references[block] -= 1
            self._reclass(block)
        if not held:
            self._owned.pop(owner, None)

    def release_all(self, owner: str) -> list[BlockId]:
        """Drops every reference of `owner` (none is no error) and says which blocks these were."""
        blocks = self.blocks_of(owner)
        self.release(owner, blocks)
        return blocks

    # --- leases granted here ----------------------------------------------------------------------------

    def pin(self, lease_id: LeaseId, blocks: Sequence[BlockId]) -> None:
        """Keeps the bytes of `blocks` for the readers of a lease, whatever their owners do."""
        if lease_id in self._pinned:
            raise InvariantBroken(f"lease {lease_id} pins twice; {self!r}")
        self._require_bytes(blocks, f"pin for lease {lease_id}")
        self._pinned[lease_id] = tuple(blocks)
        for block in blocks:
            self._pins[block] += 1
            self._reclass(block)

    def unpin(self, lease_id: LeaseId) -> None:
        blocks = self._pinned.pop(lease_id, None)
        if blocks is None:
            raise InvariantBroken(f"unpin of lease {lease_id}, which pins nothing; {self!r}")
        for block in reversed(blocks):
            self._pins[block] -= 1
            self._reclass(block)

    def pinned_leases(self) -> list[LeaseId]:
        """The leases that pin blocks."""
        return list(self._pinned)

    # --- leases read here -------------------------------------------------------------------------------

    def reserve(self, lease_id: LeaseId, num_blocks: int) -> list[BlockId] | None:
        """Sets blocks aside for a lease to be pulled; None and nothing where not enough are available."""
        if lease_id in self._reservations:
            raise InvariantBroken(f"lease {lease_id} reserves twice; {self!r}")
        blocks = self._take(num_blocks)
        if blocks is not None:
            self._reservations[lease_id] = _Reservation(blocks)
            for block in blocks:
                self._reserved_by[block] = lease_id
                self._reclass(block)
        return blocks

    def begin_pull(self, lease_id: LeaseId) -> None:
        """From here on bytes may land in the lease's blocks."""
        reservation = self._reservation(lease_id)
        if reservation.pulling:
            raise InvariantBroken(f"second pull of lease {lease_id} before the first ended; {self!r}")
        reservation.pulling = True

    def end_pull(self, lease_id: LeaseId) -> None:
        """The transport reported the pull terminal: nothing lands any more."""
        reservation = self._reservation(lease_id)
        if not reservation.pulling or reservation.quarantined:
            raise InvariantBroken(f"end of a pull of lease {lease_id}: {reservation}; {self!r}")
        reservation.pulling = False

    def abort(self, lease_id: LeaseId) -> bool:
        """Gives the lease up. True: its blocks are free. False: a pull is in flight, so they are quarantined
        until `settle`."""
        reservation = self._reservation(lease_id)
        if reservation.quarantined:
            raise InvariantBroken(f"second abort of lease {lease_id}; {self!r}")
        if not reservation.pulling:
            self._unreserve(lease_id)
            return True
        reservation.quarantined = True
        for block in reservation.blocks:
            self._reclass(block)
        return False

    def settle(self, lease_id: LeaseId) -> None:
        """The transport reported the pull of an aborted lease terminal: its blocks are free now."""
        if not self._reservation(lease_id).quarantined:
            raise InvariantBroken(f"settle of lease {lease_id}, which is not in quarantine; {self!r}")
        self._unreserve(lease_id)

    def adopt(self, lease_id: LeaseId, owner: str) -> list[BlockId]:
        """Turns the lease's reservation into `owner`'s blocks; no pull may be in flight."""
        reservation = self._reservation(lease_id)
        if reservation.pulling:
            raise InvariantBroken(f"adoption of lease {lease_id} during its pull; {self!r}")
        del self._reservations[lease_id]
        for block in reservation.blocks:
            self._reserved_by[block] = None
        self._refer(owner, reservation.blocks)
        return reservation.blocks

    # --- keys -------------------------------------------------------------------------------------------

    def set_key(self, block: BlockId, key: bytes) -> bool:
        """Names a block's content, so that it becomes cached rather than free when nobody holds it.

        False, and nothing changes, where another block has that key already. A block is named once.
        """
        self._require_bytes([block], "name")
        if self._keys[block] not in (None, key):
            raise InvariantBroken(f"block {block} gets a second key; {self!r}")
        if self._by_key.setdefault(key, block) != block:
            return False
        if self._keys[block] is None:
            self._keys[block] = key
            if self.key_listener is not None:
                self.key_listener.stored(key)
        return True

    def evict(self, blocks: Iterable[BlockId]) -> int:
        """Gives up those of these blocks that are cached; how many that were."""
        cached = [block for block in blocks if block in self._cached]
        for block in cached:
            self._evict(block)
        return len(cached)

    def is_cached(self, block: BlockId) -> bool:
        """Nobody holds it, and its bytes stand until it is evicted."""
        return block in self._cached

    def cached_blocks(self) -> list[BlockId]:
        """All cached blocks, least recently used first."""
        return list(self._cached)

    def key_of(self, block: BlockId) -> bytes | None:
        """The key of a block's content; None where it has none."""
        return self._keys[block]

    def lookup(self, key: bytes) -> BlockId | None:
        """The block with that content; its bytes stand until it is evicted, so `share` it at once."""
        return self._by_key.get(key)

    def all_keys(self) -> Iterable[bytes]:
        """All keys that `lookup` knows, as a view."""
        return self._by_key.keys()

    # --- audit ------------------------------------------------------------------------------------------

    def check(self) -> None:
        """Audits every class, reference, pin and counter from scratch; O(blocks). Raises InvariantBroken."""
        problems = self.problems()
        if problems:
            raise InvariantBroken(f"{self!r}: " + "; ".join(problems[:20]))

    def problems(self) -> list[str]:
        """What `check` would complain about; empty in a ledger without bugs."""
        return [
            *self._holder_problems(),
            *self._class_problems(),
            *self._key_problems(),
        ]

    def _holder_problems(self) -> list[str]:
        references = [0] * self.num_blocks
        pins = [0] * self.num_blocks
        reserved_by: list[LeaseId | None] = [None] * self.num_blocks
        problems = [f"owner {owner!r} without blocks" for owner, blocks in self._owned.items() if not blocks]
        for blocks in self._owned.values():
            for block in blocks:
                references[block] += 1
        for pinned in self._pinned.values():
            for block in pinned:
                pins[block] += 1
        for lease_id, reservation in self._reservations.items():
            if reservation.quarantined and not reservation.pulling:
                problems.append(f"lease {lease_id} quarantined without a pull")
            for block in reservation.blocks:
                if reserved_by[block] is not None:
                    problems.append(f"block {block} reserved by {reserved_by[block]} and {lease_id}")
                reserved_by[block] = lease_id
        if (references, pins, reserved_by) != (self._references, self._pins, self._reserved_by):
            kept = zip(self._references, self._pins, self._reserved_by, strict=True)
            counted = zip(references, pins, reserved_by, strict=True)
            problems.extend(
                f"block {index} (references, pins, lease) kept {ours}, counted {right}"
                for index, (ours, right) in enumerate(zip(kept, counted, strict=True))
                if ours != right
            )
        if self._reservations:
            problems.extend(
                f"block {index} is reserved for {holder} and held: {(references[index], pins[index])}"
                for index, holder in enumerate(reserved_by)
                if holder is not None and (references[index] or pins[index])
            )
        return problems

    def _class_problems(self) -> list[str]:
        expected = self._classes_anew()
        problems: list[str] = []
        if expected != self._classes:
            problems.extend(
                f"block {index} is {right.name}, kept as {kept.name}"
                for index, (right, kept) in enumerate(zip(expected, self._classes, strict=True))
                if right is not kept
            )
        counts = [expected.count(block_class) for block_class in BlockClass]
        if counts != self._counts or sum(counts) != self.num_blocks:
            problems.append(f"class counts kept {self._counts}, counted {counts} of {self.num_blocks}")
        for name, members, block_class in (
            ("free list", list(self._free), BlockClass.FREE),
            ("cache", list(self._cached), BlockClass.CACHED),
        ):
            # As many as there are of that class, all of that class, none twice: they are those, and need no list.
            num_classed = self._classes.count(block_class)
            if len(members) == num_classed == len(set(members)) and num_classed == self._classes_of(members).count(
                block_class
            ):
                continue
            classed = [index for index, kept in enumerate(self._classes) if kept is block_class]
            if sorted(members) != classed:
                problems.append(f"{name} holds {sorted(members)[:16]}, blocks of that class {classed[:16]}")
        return problems

    def _classes_anew(self) -> list[BlockClass]:
        """As `_class_of` says of each; at one go, because audits after every event are most of what trials take."""
        free, cached, offered, owned = BlockClass.FREE, BlockClass.CACHED, BlockClass.OFFERED, BlockClass.OWNED
        found = [
            owned if references else offered if pins else free if key is None else cached
            for references, pins, key in zip(self._references, self._pins, self._keys, strict=True)
        ]
        if self._reserved_by.count(None) != self.num_blocks:
            for index, lease_id in enumerate(self._reserved_by):
                if lease_id is not None:
                    found[index] = self._class_of(BlockId(index))
        return found

    def _classes_of(self, blocks: Iterable[BlockId]) -> list[BlockClass]:
        return list(map(self._classes.__getitem__, blocks))

    def _key_problems(self) -> list[str]:
        named = {key: BlockId(index) for index, key in enumerate(self._keys) if key is not None}
        problems = [] if named == self._by_key else [f"{len(named)} keys kept, {len(self._by_key)} indexed"]
        classes = self._classes_of(named.values())
        if sum(map(classes.count, _WITH_KEYS)) != len(classes):
            problems.extend(
                f"{block_class.name} block {block} has a key"
                for block, block_class in zip(named.values(), classes, strict=True)
                if block_class not in _WITH_KEYS
            )
        return problems

    # --- changes of class -------------------------------------------------------------------------------

    def _class_of(self, block: BlockId) -> BlockClass:
        lease_id = self._reserved_by[block]
        if lease_id is not None:
            quarantined = self._reservations[lease_id].quarantined
            return BlockClass.QUARANTINED if quarantined else BlockClass.RESERVED
        if self._references[block]:
            return BlockClass.OWNED
        if self._pins[block]:
            return BlockClass.OFFERED
        return BlockClass.FREE if self._keys[block] is None else BlockClass.CACHED

    def _reclass(self, block: BlockId) -> None:
        """Brings a block's class, the counts, the free list, the cache and its generation up to date."""
        before, after = self._classes[block], self._class_of(block)
        if before is after:
            return
        self._classes[block] = after
        self._counts[before] -= 1
        self._counts[after] += 1
        if before is BlockClass.CACHED:
            del self._cached[block]
        if after is BlockClass.CACHED:
            self._cached[block] = None
        elif after is BlockClass.FREE:
            self._generations[block] += 1
            self._free.append(block)

    def _take(self, num_blocks: int) -> list[BlockId] | None:
        """Removes blocks from the free list, evicting where needed; the caller gives each one a holder."""
        if num_blocks < 0:
            raise InvariantBroken(f"{num_blocks} blocks asked for; {self!r}")
        if num_blocks > self.available_blocks:
            return None
        num_missing = num_blocks - len(self._free)
        if num_missing > 0 and not self._evict_some(num_missing):
            return None
        return [self._free.pop() for _ in range(num_blocks)]

    def _evict_some(self, num_blocks: int) -> bool:
        """Whether so many were evicted; if not, none was."""
        if self.evictor is None:
            for _ in range(num_blocks):
                self._evict(next(iter(self._cached)))
            return True
        victims = self.evictor.victims(num_blocks)
        if not victims:
            return False
        if len(set(victims)) != num_blocks or any(block not in self._cached for block in victims):
            raise InvariantBroken(f"{victims[:16]} are not {num_blocks} different cached blocks; {self!r}")
        for block in victims:
            self._evict(block)
        return True

    def _evict(self, block: BlockId) -> None:
        key = self._keys[block]
        assert key is not None, f"cached block {block} without a key; {self!r}"
        del self._by_key[key]
        self._keys[block] = None
        self._reclass(block)
        if self.key_listener is not None:
            self.key_listener.removed(key)

    def _refer(self, owner: str, blocks: Sequence[BlockId]) -> None:
        if not blocks:
            return
        held = self._owned.setdefault(owner, {})
        for block in blocks:
            if block in held:
                raise InvariantBroken(f"{owner!r} gets block {block} twice; {self!r}")
            held[block] = None
            self._references[block] += 1
            self._reclass(block)

    def _reservation(self, lease_id: LeaseId) -> _Reservation:
        reservation = self._reservations.get(lease_id)
        if reservation is None:
            raise InvariantBroken(f"lease {lease_id} has nothing reserved; {self!r}")
        return reservation

    def _unreserve(self, lease_id: LeaseId) -> None:
        for block in reversed(self._reservations.pop(lease_id).blocks):
            self._reserved_by[block] = None
            self._reclass(block)

    def _require_bytes(self, blocks: Sequence[BlockId], purpose: str) -> None:
        """Raises unless the bytes of every block stand (which excludes blocks that a pull may write)."""
        for block in blocks:
            if self._classes[block] not in (BlockClass.OWNED, BlockClass.OFFERED, BlockClass.CACHED):
                name = self._classes[block].name
                raise InvariantBroken(f"{purpose}: block {block} is {name}, it has no bytes; {self!r}")
