"""What is offered to a store, when, and from which block on; and that it never stands in anybody's way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.ids import Incarnation, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import Peer
from kvstore.prefix_cache import PrefixCache
from kvstore.write_back import (
    Looked,
    OfferBlocks,
    OfferEnded,
    Replied,
    Served,
    StoreIs,
    TakeBack,
    Wanted,
    WriteBack,
    WriteBackLimits,
)
from kvtransfer import Ledger

if TYPE_CHECKING:
    from contracts.ids import BlockId
    from kvstore.write_back import WriteBackEvent, WriteBackInstruction

BLOCK_TOKENS = 4
IDENTITY = KvIdentity(
    model_fingerprint="m",
    layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=BLOCK_TOKENS, dtype="float32"),
    rope_base=10000.0,
    protocol_version=1,
)
STORE = Peer(worker_id=WorkerId("s0"), incarnation=Incarnation(1), address="s0:1")
ITS_NEXT_LIFE = Peer(worker_id=WorkerId("s0"), incarnation=Incarnation(2), address="s0:2")
LIMITS = WriteBackLimits(max_waiting=3, max_offers=2, max_offer_blocks=4, max_known=32)


class Side:
    """A worker's pool in which sequences have ended."""

    def __init__(self, num_blocks: int = 32, limits: WriteBackLimits = LIMITS, *, store: Peer | None = STORE) -> None:
        self.ledger = Ledger(num_blocks)
        self.prefixes = PrefixCache(self.ledger, IDENTITY)
        self.pressed = False
        #: Available ones that may be pinned at once.
        self.most_blocks = num_blocks
        self.now_s = 0.0
        self.machine = WriteBack(self.prefixes, self.may_take, limits)
        if store is not None:
            self.tell(StoreIs(store))

    def may_take(self, num_blocks: int) -> bool:
        return not self.pressed and num_blocks <= min(self.most_blocks, self.ledger.available_blocks)

    def tell(self, event: WriteBackEvent) -> list[WriteBackInstruction]:
        return self.machine.handle(event, self.now_s)

    def look(self, now_s: float) -> list[WriteBackInstruction]:
        self.now_s = now_s
        return self.tell(Looked())

    def cached(self, tokens: list[int]) -> tuple[bytes, ...]:
        """The keys of a sequence that was written here and has ended."""
        chain = self.prefixes.chain(tokens, "")
        found = self.prefixes.match_prompt(chain, len(tokens) + 1)
        self.ledger.share("x", found)
        new = self.ledger.allocate("x", len(chain) - len(found))
        assert new is not None
        self.prefixes.name(chain, [*found, *new], 0, len(chain))
        self.ledger.release_all("x")
        return chain.part(0, len(chain))

    def blocks(self, keys: tuple[bytes, ...]) -> tuple[BlockId, ...]:
        return tuple(self.prefixes.match(keys))

    def want(self, keys: tuple[bytes, ...]) -> list[WriteBackInstruction]:
        return self.tell(Wanted(keys=keys, tenant="t"))

    def dropped(self) -> dict[str, int]:
        return dict(self.machine.counters.dropped)


def tokens(num_blocks: int, first: int = 0) -> list[int]:
    return list(range(first, first + num_blocks * BLOCK_TOKENS))


def the_offer(instructions: list[WriteBackInstruction]) -> OfferBlocks:
    (offer,) = instructions
    assert isinstance(offer, OfferBlocks)
    return offer


def test_without_a_store_nothing_happens() -> None:
    side = Side(store=None)
    assert side.want(side.cached(tokens(3))) == []
    assert (side.machine.num_waiting, side.machine.next_look_s(0.0), side.dropped()) == (0, None, {})


def test_all_of_it_is_offered_and_once_taken_never_again() -> None:
    side = Side()
    keys = side.cached(tokens(3))
    offer = the_offer(side.want(keys))
    assert (offer.store, offer.keys, offer.first_block, offer.tenant) == (STORE, keys, 0, "t")
    assert offer.blocks == side.blocks(keys)
    assert side.want(keys) == [], "it is under way"
    side.tell(Replied(offer.number, 0))
    assert side.tell(OfferEnded(offer.number, taken=True)) == []
    assert (side.machine.num_open, side.machine.num_waiting) == (0, 0)
    assert side.want(keys) == []
    assert (side.machine.counters.offers_taken, side.machine.counters.blocks_taken) == (1, 3)
    assert side.machine.next_look_s(0.0) is None


def test_the_next_turn_offers_what_is_new_after_the_block_before_it() -> None:
    side = Side()
    side.tell(OfferEnded(the_offer(side.want(side.cached(tokens(2)))).number, taken=True))
    keys = side.cached(tokens(4))
    offer = the_offer(side.want(keys))
    assert (offer.first_block, offer.keys) == (1, keys[1:])
    side.tell(Replied(offer.number, 1))
    side.tell(OfferEnded(offer.number, taken=True))
    assert side.machine.counters.blocks_taken == 4, "the one before counts as known"


def test_what_the_store_served_is_not_offered() -> None:
    side = Side()
    keys = side.cached(tokens(4))
    side.tell(Served(keys[:3]))
    offer = the_offer(side.want(keys))
    assert (offer.first_block, offer.keys) == (2, keys[2:])


def test_what_the_store_had_already_is_known_even_if_the_offer_fails() -> None:
    side = Side()
    keys = side.cached(tokens(4))
    offer = the_offer(side.want(keys))
    side.tell(Replied(offer.number, 3))
    side.tell(OfferEnded(offer.number, taken=False))
    side.now_s = 100.0
    assert the_offer(side.want(keys)).first_block == 2


def test_a_long_sequence_goes_in_pieces_each_after_the_one_before() -> None:
    side = Side()
    keys = side.cached(tokens(9))
    parts: list[tuple[int, int]] = []
    instructions = side.want(keys)
    while instructions:
        offer = the_offer(instructions)
        parts.append((offer.first_block, offer.first_block + len(offer.keys)))
        side.tell(Replied(offer.number, min(1, offer.first_block)))
        instructions = side.tell(OfferEnded(offer.number, taken=True))
    assert parts == [(0, 4), (3, 7), (6, 9)]
    assert side.machine.counters.blocks_taken == 9


def test_a_store_that_lacks_what_comes_before_gets_all_of_it_once() -> None:
    side = Side()
    side.tell(OfferEnded(the_offer(side.want(side.cached(tokens(2)))).number, taken=True))
    keys = side.cached(tokens(4))
    offer = the_offer(side.want(keys))
    taken_back, again = side.tell(Replied(offer.number, 0))
    assert taken_back == TakeBack(offer.number, "the store lacks what comes before it")
    assert isinstance(again, OfferBlocks)
    assert (again.first_block, again.keys) == (0, keys)
    side.tell(OfferEnded(offer.number, taken=False))
    side.tell(OfferEnded(again.number, taken=True))
    assert (side.machine.num_waiting, side.machine.num_open) == (0, 0)


def test_what_was_evicted_before_its_turn_is_dropped() -> None:
    side = Side()
    keys = side.cached(tokens(4))
    side.pressed = True
    side.want(keys)
    side.ledger.evict(side.blocks(keys)[2:])
    side.pressed = False
    assert the_offer(side.look(1.0)).keys == keys[:2], "what still stands is kept"
    gone = side.cached(tokens(2, first=900))
    side.pressed = True
    side.want(gone)
    side.ledger.evict(side.blocks(gone))
    side.pressed = False
    assert side.look(2.0) == []
    assert side.dropped() == {"evicted before its turn": 1}


def test_nothing_is_offered_while_something_waits_for_blocks_and_what_stands_is_taken_back() -> None:
    side = Side()
    offer = the_offer(side.want(side.cached(tokens(2))))
    side.pressed = True
    assert side.want(side.cached(tokens(2, first=100))) == [TakeBack(offer.number, "its blocks may be needed")]
    assert side.look(0.1) == [], "once"
    side.tell(OfferEnded(offer.number, taken=False))
    assert (side.look(0.2), side.machine.num_waiting) == ([], 1)
    side.pressed = False
    assert the_offer(side.look(0.3)).keys == side.cached(tokens(2, first=100)), "no failure: at once"


def test_a_sequence_waits_until_its_blocks_are_to_spare() -> None:
    side = Side(num_blocks=8)
    keys = side.cached(tokens(4))
    assert side.ledger.allocate("runs", 4) is not None
    side.most_blocks = 3
    assert side.want(keys) == []
    side.ledger.share("reads", side.blocks(keys))
    assert the_offer(side.look(1.0)).keys == keys, "blocks that somebody holds take none of the available ones"


def test_an_offer_that_stands_too_long_is_taken_back_and_the_next_ones_wait_longer_and_longer() -> None:
    side = Side(limits=WriteBackLimits(max_offers=1, first_backoff_s=1.0, longest_backoff_s=4.0))
    waits: list[float] = []
    for number in range(4):
        offer = the_offer(side.want(side.cached(tokens(2, first=100 * number))))
        due_s = side.now_s + 2.0
        assert side.look(due_s - 0.01) == []
        assert side.look(due_s) == [TakeBack(offer.number, "the store is too slow")]
        side.tell(OfferEnded(offer.number, taken=False))
        side.want(side.cached(tokens(2, first=100 * number + 50)))
        next_s = side.machine.next_look_s(side.now_s)
        assert next_s is not None
        assert side.look(next_s - 0.01) == []
        waits.append(next_s - due_s)
        side.tell(OfferEnded(the_offer(side.look(next_s)).number, taken=number == 3))
        waited_s = side.machine.next_look_s(side.now_s)
        assert waited_s is None, "nothing waits"
        side.now_s += 100.0
    assert waits == [1.0, 4.0, 4.0, 4.0], "each round fails twice"
    assert side.dropped() == {"the store is too slow": 4, "the store did not take it": 3}


def test_the_oldest_goes_when_too_many_wait() -> None:
    side = Side()
    side.pressed = True
    all_keys = [side.cached(tokens(2, first=100 * number)) for number in range(5)]
    for keys in all_keys:
        side.want(keys)
    assert side.dropped() == {"queue full": 2}
    side.pressed = False
    offered = side.look(1.0)
    assert [each.keys for each in offered if isinstance(each, OfferBlocks)] == all_keys[2:4], (
        "two at once, oldest first"
    )


def test_another_life_of_the_store_is_known_to_have_nothing() -> None:
    side = Side()
    keys = side.cached(tokens(3))
    side.tell(OfferEnded(the_offer(side.want(keys)).number, taken=True))
    late = the_offer(side.want(side.cached(tokens(2, first=100))))
    assert side.tell(StoreIs(ITS_NEXT_LIFE)) == [TakeBack(late.number, "another store is used")]
    assert side.tell(OfferEnded(late.number, taken=True)) == [], "what the old life took the new one does not have"
    again = the_offer(side.want(keys))
    assert (again.store, again.keys) == (ITS_NEXT_LIFE, keys)
    assert len(side.want(side.cached(tokens(2, first=100)))) == 1
    side.want(side.cached(tokens(2, first=200)))
    side.tell(StoreIs(None))
    assert side.machine.num_waiting == 0


@pytest.mark.parametrize("seconds", [0.0, 10.0])
def test_of_two_sequences_that_begin_alike_the_second_waits_for_what_becomes_of_the_first(seconds: float) -> None:
    side = Side()
    first = side.cached(tokens(3))
    second = side.cached([*tokens(3), *tokens(1, first=500)])
    offer = the_offer(side.want(first))
    assert side.want(second) == []
    side.now_s = seconds / 10
    instructions = side.tell(OfferEnded(offer.number, taken=True))
    assert the_offer(instructions).first_block == 2


@given(
    events=st.lists(
        st.one_of(
            st.tuples(st.just("want"), st.integers(0, 5), st.integers(1, 9)),
            st.tuples(st.just("answer"), st.integers(0, 9), st.integers(0, 5)),
            st.tuples(st.just("end"), st.integers(0, 9), st.integers(0, 1)),
            st.tuples(st.just("press"), st.integers(0, 1), st.just(0)),
            st.tuples(st.just("evict"), st.integers(0, 3), st.just(0)),
            st.tuples(st.just("store"), st.integers(0, 2), st.just(0)),
            st.tuples(st.just("wait"), st.integers(1, 40), st.just(0)),
        ),
        max_size=60,
    )
)
def test_whatever_happens_offers_are_right_bounded_and_end(events: list[tuple[str, int, int]]) -> None:
    """Blocks that are offered stand under their keys, in order and without a gap; never more offers or waiting
    sequences than allowed; each offer is taken back at most once; in the end nothing is open."""
    side = Side(num_blocks=40)
    open_offers: dict[int, OfferBlocks] = {}
    taken_back: set[int] = set()

    def note(instructions: list[WriteBackInstruction]) -> None:
        for each in instructions:
            if isinstance(each, TakeBack):
                assert each.number in open_offers
                assert each.number not in taken_back
                taken_back.add(each.number)
                continue
            assert not side.pressed
            assert each.blocks == side.blocks(each.keys)
            assert 0 < len(each.blocks) <= LIMITS.max_offer_blocks
            side.ledger.share(f"offer {each.number}", each.blocks)
            open_offers[each.number] = each
        assert len(open_offers) == side.machine.num_open <= LIMITS.max_offers
        assert side.machine.num_waiting <= LIMITS.max_waiting + LIMITS.max_offers

    def end(number: int, *, taken: bool) -> None:
        offer = open_offers.pop(number)
        side.ledger.release(f"offer {number}", offer.blocks)
        note(side.tell(OfferEnded(number, taken=taken)))

    for what, first, second in events:
        if what == "want":
            if side.ledger.available_blocks >= second:
                note(side.want(side.cached(tokens(second, first=100 * (first % 3)))))
        elif what in ("answer", "end") and open_offers:
            number = sorted(open_offers)[first % len(open_offers)]
            if what == "end":
                end(number, taken=bool(second))
            else:
                note(side.tell(Replied(number, min(second, len(open_offers[number].keys)))))
        elif what == "press":
            side.pressed = bool(first)
        elif what == "evict":
            side.ledger.evict(side.ledger.cached_blocks()[: 3 * first])
        elif what == "store":
            note(side.tell(StoreIs((None, STORE, ITS_NEXT_LIFE)[first])))
        elif what == "wait":
            note(side.look(side.now_s + first / 4))
    side.pressed = False
    for _ in range(100):
        if not open_offers and not side.machine.num_waiting:
            break
        note(side.look(side.now_s + 20.0))
        for number in list(open_offers):
            end(number, taken=True)
    assert (open_offers, side.machine.num_waiting) == ({}, 0)
