"""The ledger: classes, conservation, generations, eviction, and misuse."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from contracts.errors import InvariantBroken
from contracts.ids import BlockId, LeaseId
from contracts.messages import WorkerLoad
from kvtransfer.ledger import BlockClass, Ledger

A, B, C = LeaseId("a"), LeaseId("b"), LeaseId("c")
LEASES = st.sampled_from([A, B, C])
OWNERS = st.sampled_from(["r1", "r2", "r3"])
NUM_BLOCKS = 12


class LedgerModel(RuleBasedStateMachine):
    """Random legal use; the books are audited after every step against a model of who holds what."""

    def __init__(self) -> None:
        super().__init__()
        self.ledger = Ledger(NUM_BLOCKS)
        self.owned: dict[str, list[BlockId]] = {}
        self.pinned: dict[LeaseId, list[BlockId]] = {}
        self.reserved: dict[LeaseId, list[BlockId]] = {}
        self.pulling: set[LeaseId] = set()
        self.quarantined: set[LeaseId] = set()
        self.keys: dict[BlockId, bytes] = {}
        self.classes = [BlockClass.FREE] * NUM_BLOCKS
        self.generations = [0] * NUM_BLOCKS

    @rule(owner=OWNERS, num_blocks=st.integers(0, NUM_BLOCKS + 2))
    def allocate(self, owner: str, num_blocks: int) -> None:
        available = self.ledger.available_blocks
        blocks = self.ledger.allocate(owner, num_blocks)
        assert (blocks is None) == (num_blocks > available)
        self._taken(blocks)
        self.owned.setdefault(owner, []).extend(blocks or [])

    @rule(owner=OWNERS, data=st.data())
    def release_some(self, owner: str, data: st.DataObject) -> None:
        held = self.owned.get(owner, [])
        blocks = data.draw(st.lists(st.sampled_from(held), unique=True) if held else st.just([]))
        self.ledger.release(owner, blocks)
        self.owned[owner] = [block for block in held if block not in blocks]

    @rule(owner=OWNERS)
    def release_all(self, owner: str) -> None:
        assert sorted(self.ledger.release_all(owner)) == sorted(self.owned.pop(owner, []))

    @rule(owner=OWNERS, data=st.data())
    def share(self, owner: str, data: st.DataObject) -> None:
        held = self.owned.setdefault(owner, [])
        others = [block for block in self._with_bytes() if block not in held]
        if others:
            block = data.draw(st.sampled_from(others))
            self.ledger.share(owner, [block])
            held.append(block)

    @rule(lease_id=LEASES, data=st.data())
    def pin(self, lease_id: LeaseId, data: st.DataObject) -> None:
        candidates = self._with_bytes()
        if lease_id not in self.pinned and candidates:
            blocks = data.draw(st.lists(st.sampled_from(candidates), unique=True, min_size=1))
            self.ledger.pin(lease_id, blocks)
            self.pinned[lease_id] = blocks

    @rule(lease_id=LEASES)
    def unpin(self, lease_id: LeaseId) -> None:
        if self.pinned.pop(lease_id, None) is not None:
            self.ledger.unpin(lease_id)

    @rule(lease_id=LEASES, num_blocks=st.integers(1, NUM_BLOCKS))
    def reserve(self, lease_id: LeaseId, num_blocks: int) -> None:
        if lease_id in self.reserved:
            return
        available = self.ledger.available_blocks
        blocks = self.ledger.reserve(lease_id, num_blocks)
        assert (blocks is None) == (num_blocks > available)
        self._taken(blocks)
        if blocks is not None:
            self.reserved[lease_id] = list(blocks)

    @rule(lease_id=LEASES)
    def begin_pull(self, lease_id: LeaseId) -> None:
        if lease_id in self.reserved and lease_id not in self.pulling:
            self.ledger.begin_pull(lease_id)
            self.pulling.add(lease_id)

    @rule(lease_id=LEASES)
    def end_pull(self, lease_id: LeaseId) -> None:
        if lease_id in self.pulling:
            self.pulling.discard(lease_id)
            if lease_id in self.quarantined:
                self.ledger.settle(lease_id)
                self.quarantined.discard(lease_id)
                del self.reserved[lease_id]
            else:
                self.ledger.end_pull(lease_id)

    @rule(lease_id=LEASES)
    def abort(self, lease_id: LeaseId) -> None:
        if lease_id in self.reserved and lease_id not in self.quarantined:
            freed = self.ledger.abort(lease_id)
            assert freed == (lease_id not in self.pulling)
            if freed:
                del self.reserved[lease_id]
            else:
                self.quarantined.add(lease_id)

    @rule(lease_id=LEASES, owner=OWNERS)
    def adopt(self, lease_id: LeaseId, owner: str) -> None:
        if lease_id in self.reserved and lease_id not in self.pulling:
            blocks = self.reserved.pop(lease_id)
            assert self.ledger.adopt(lease_id, owner) == blocks
            self.owned.setdefault(owner, []).extend(blocks)

    @rule(key=st.binary(min_size=1, max_size=1), data=st.data())
    def set_key(self, key: bytes, data: st.DataObject) -> None:
        candidates = [block for block in self._with_bytes() if block not in self.keys]
        if candidates:
            block = data.draw(st.sampled_from(candidates))
            assert self.ledger.set_key(block, key) == (key not in self.keys.values())
            if key not in self.keys.values():
                self.keys[block] = key

    @precondition(lambda self: self.keys)
    @rule(data=st.data())
    def lookup(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted(self.keys)))
        assert self.ledger.lookup(self.keys[block]) == block

    @invariant()
    def books_are_right(self) -> None:
        self.ledger.check()
        load = self.ledger.load()
        assert sum(value for value in load.values() if isinstance(value, int)) == NUM_BLOCKS
        for index in range(NUM_BLOCKS):
            block = BlockId(index)
            if self.ledger.block_class(block) is BlockClass.FREE:
                self.keys.pop(block, None)
            assert self.ledger.block_class(block) is self._expected_class(block)

    @invariant()
    def generations_grow_exactly_when_bytes_are_lost(self) -> None:
        for index in range(NUM_BLOCKS):
            block = BlockId(index)
            now, generation = self.ledger.block_class(block), self.ledger.generation(block)
            assert generation >= self.generations[index]
            if now is BlockClass.FREE and self.classes[index] is not BlockClass.FREE:
                assert generation == self.generations[index] + 1
            if now is not BlockClass.FREE and self.classes[index] not in (
                BlockClass.FREE,
                BlockClass.CACHED,
            ):
                # Within one step only an eviction may pass through free unseen.
                assert generation == self.generations[index]
            self.classes[index], self.generations[index] = now, generation

    def _expected_class(self, block: BlockId) -> BlockClass:
        for lease_id, blocks in self.reserved.items():
            if block in blocks:
                return BlockClass.QUARANTINED if lease_id in self.quarantined else BlockClass.RESERVED
        if any(block in blocks for blocks in self.owned.values()):
            return BlockClass.OWNED
        if any(block in blocks for blocks in self.pinned.values()):
            return BlockClass.OFFERED
        return BlockClass.CACHED if block in self.keys else BlockClass.FREE

    def _with_bytes(self) -> list[BlockId]:
        good = (BlockClass.OWNED, BlockClass.OFFERED, BlockClass.CACHED)
        return [BlockId(i) for i in range(NUM_BLOCKS) if self.ledger.block_class(BlockId(i)) in good]

    def _taken(self, blocks: list[BlockId] | None) -> None:
        for block in blocks or []:
            self.keys.pop(block, None)


LedgerModel.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestLedgerModel = LedgerModel.TestCase


def test_load_names_match_worker_load() -> None:
    ledger = Ledger(10)
    ledger.allocate("r", 3)
    ledger.reserve(A, 2)
    load = WorkerLoad(**ledger.load(), waiting_requests=1)
    assert (load.free_blocks, load.owned_blocks, load.reserved_blocks) == (5, 3, 2)


def test_allocates_runs_in_order_again_and_again() -> None:
    ledger = Ledger(8)
    first = ledger.allocate("r", 5) or []
    assert first == [0, 1, 2, 3, 4]
    ledger.release("r", first)
    assert ledger.allocate("s", 5) == first


def test_owned_outranks_offered() -> None:
    ledger = Ledger(2)
    blocks = ledger.allocate("r", 1)
    assert blocks is not None
    ledger.pin(A, blocks)
    assert ledger.block_class(blocks[0]) is BlockClass.OWNED
    ledger.release("r", blocks)
    assert ledger.block_class(blocks[0]) is BlockClass.OFFERED
    assert ledger.generation(blocks[0]) == 0
    ledger.unpin(A)
    assert ledger.block_class(blocks[0]) is BlockClass.FREE
    assert ledger.generation(blocks[0]) == 1


def test_least_recently_used_is_evicted_first_and_of_a_prefix_the_end() -> None:
    ledger = Ledger(4)
    old, new = ledger.allocate("old", 2), ledger.allocate("new", 2)
    assert old is not None
    assert new is not None
    for block in old + new:
        assert ledger.set_key(block, b"key %d" % block)
    ledger.release("old", old)
    ledger.release("new", new)
    assert ledger.load()["cached_blocks"] == 4
    assert ledger.allocate("r", 1) == [old[1]]
    assert ledger.lookup(b"key %d" % old[1]) is None
    assert ledger.lookup(b"key %d" % old[0]) == old[0]
    assert ledger.generation(old[1]) == 1
    ledger.share("again", [old[0]])
    assert ledger.generation(old[0]) == 0
    assert ledger.allocate("r", 1) == [new[1]]
    ledger.check()


def test_second_block_of_a_key_stays_anonymous() -> None:
    ledger = Ledger(2)
    blocks = ledger.allocate("r", 2)
    assert blocks is not None
    assert ledger.set_key(blocks[0], b"k")
    assert not ledger.set_key(blocks[1], b"k")
    assert ledger.set_key(blocks[0], b"k")
    with pytest.raises(InvariantBroken, match="second key"):
        ledger.set_key(blocks[0], b"other")
    ledger.release_all("r")
    assert (ledger.load()["cached_blocks"], ledger.load()["free_blocks"]) == (1, 1)


def test_quarantine_is_never_handed_out() -> None:
    ledger = Ledger(4)
    ledger.reserve(A, 4)
    ledger.begin_pull(A)
    assert not ledger.abort(A)
    assert ledger.allocate("r", 1) is None
    assert repr(ledger) == ("<Ledger [4 quarantined, 0 reserved, 0 owned, 0 offered, 0 cached, 0 free | 4 blocks]>")
    ledger.settle(A)
    assert ledger.allocate("r", 4) is not None


def test_misuse_is_a_bug_with_a_name() -> None:
    ledger = Ledger(4)
    blocks = ledger.allocate("r", 2)
    assert blocks is not None
    with pytest.raises(InvariantBroken, match="'s' releases block 0"):
        ledger.release("s", [BlockId(0)])
    with pytest.raises(InvariantBroken, match="block 3 is FREE"):
        ledger.pin(A, [BlockId(3)])
    with pytest.raises(InvariantBroken, match="pins nothing"):
        ledger.unpin(A)
    with pytest.raises(InvariantBroken, match="nothing reserved"):
        ledger.adopt(A, "r")
    with pytest.raises(InvariantBroken, match="gets block 0 twice"):
        ledger.share("r", [BlockId(0)])
    with pytest.raises(InvariantBroken, match="-1 blocks"):
        ledger.allocate("r", -1)


def test_misuse_of_a_reservation_is_a_bug() -> None:
    ledger = Ledger(4)
    ledger.reserve(A, 1)
    with pytest.raises(InvariantBroken, match="reserves twice"):
        ledger.reserve(A, 1)
    with pytest.raises(InvariantBroken, match="end of a pull"):
        ledger.end_pull(A)
    with pytest.raises(InvariantBroken, match="not in quarantine"):
        ledger.settle(A)
    ledger.begin_pull(A)
    with pytest.raises(InvariantBroken, match="second pull"):
        ledger.begin_pull(A)
    with pytest.raises(InvariantBroken, match="during its pull"):
        ledger.adopt(A, "r")
    ledger.abort(A)
    with pytest.raises(InvariantBroken, match="second abort"):
        ledger.abort(A)
    with pytest.raises(InvariantBroken, match="end of a pull"):
        ledger.end_pull(A)
    ledger.settle(A)
    ledger.check()


@pytest.mark.parametrize("damage", ["count", "reference", "pin", "class", "free", "key", "reserved"])
def test_check_finds_damage(damage: str) -> None:
    ledger = Ledger(4)
    blocks = ledger.allocate("r", 2)
    assert blocks is not None
    ledger.set_key(blocks[0], b"k")
    ledger.check()
    state = vars(ledger)
    if damage == "count":
        state["_counts"][BlockClass.FREE] -= 1
    elif damage == "reference":
        state["_references"][1] += 1
    elif damage == "pin":
        state["_pins"][1] += 1
    elif damage == "class":
        state["_classes"][0] = BlockClass.FREE
    elif damage == "free":
        state["_free"].append(BlockId(2))
    elif damage == "key":
        state["_by_key"].clear()
    else:
        ledger.reserve(A, 1)
        state["_reserved_by"][2] = None
    with pytest.raises(InvariantBroken, match="Ledger"):
        ledger.check()
