"""The holder's machine: every event in every state, terms, retries, and what it announces."""

from __future__ import annotations

import contextlib
import itertools
from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import (
    BadRequest,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
    TandemError,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.ids import Incarnation, LeaseId
from contracts.messages import (
    AckRequest,
    ConfirmReply,
    ConfirmRequest,
    ProgressReply,
    RenewReply,
    RenewRequest,
)
from kvtransfer.block_work import Preparation
from kvtransfer.holder import Holder
from kvtransfer.holder_events import (
    AckArrived,
    Advanced,
    Answer,
    ConfirmAsked,
    FarewellEnded,
    HolderEvent,
    HolderInstruction,
    HolderTick,
    LeaseEnded,
    LeaseOutcome,
    OfferAnswered,
    OfferFailed,
    Opened,
    PrepareBlocks,
    Prepared,
    ProgressAnswered,
    ProgressFailed,
    ReaderGone,
    Refuse,
    RenewAsked,
    Sealed,
    SendFarewell,
    SendOffer,
    SendProgress,
    Withdrawn,
)
from kvtransfer.ledger import Ledger
from tests.unit.kvtransfer.builders import HOLDER, LEASE, READER, SEAL, TTL_S, terms

if TYPE_CHECKING:
    from collections.abc import Callable

OLD = Incarnation(HOLDER.incarnation - 1)
LOST = WorkerUnavailable("gone")


class Bench:
    """One holder with one lease of three blocks, on a hand-set clock."""

    def __init__(self, *, max_age_s: float = 600.0, prepares: bool = False) -> None:
        self.now_s = 100.0
        self.ledger = Ledger(8)
        self.holder = Holder(self.ledger, HOLDER.incarnation, max_age_s=max_age_s, prepares=prepares)
        blocks = self.ledger.allocate("prompt", 3)
        assert blocks is not None
        self.blocks = tuple(blocks)
        self.last: list[HolderInstruction] = []

    def feed(self, *events: HolderEvent) -> list[HolderInstruction]:
        for event in events:
            self.last = self.holder.handle(event, self.now_s)
            self.holder.check()
            self.ledger.check()
        return self.last

    def after(self, delay_s: float) -> list[HolderInstruction]:
        self.now_s += delay_s
        return self.feed(HolderTick())

    def opened(self) -> Bench:
        self.feed(Opened(terms=terms(), reader=READER, blocks=self.blocks))
        return self

    def accepted(self) -> Bench:
        self.opened().feed(OfferAnswered(LEASE))
        return self

    def announcing(self) -> Bench:
        self.accepted().feed(Advanced(LEASE, 2))
        return self

    def sealing(self) -> Bench:
        self.accepted().feed(Sealed(LEASE, 3, SEAL))
        return self

    def sealed(self) -> Bench:
        self.sealing().feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=3)))
        return self

    def confirmed(self) -> Bench:
        self.sealed().feed(CONFIRM)
        return self

    def refused_once(self) -> Bench:
        self.opened().feed(OfferFailed(LEASE, NoCapacity("full")))
        return self

    def withdrawn(self) -> Bench:
        self.accepted().feed(Withdrawn(LEASE, "cancelled"))
        return self

    def ended(self) -> Bench:
        self.confirmed().feed(ACK)
        return self

    def offering_preparing(self) -> Bench:
        self.opened().feed(Advanced(LEASE, 2))
        return self

    def preparing(self) -> Bench:
        self.accepted().feed(Advanced(LEASE, 2))
        return self

    def prepared(self) -> Bench:
        self.preparing().feed(PREPARED)
        return self

    def part_there(self) -> Bench:
        self.opened().feed(OfferAnswered(LEASE, expected=2))
        return self

    def all_there(self) -> Bench:
        self.opened().feed(OfferAnswered(LEASE, expected=3))
        return self

    def all_there_sealing(self) -> Bench:
        self.all_there().feed(Sealed(LEASE, 2, SEAL))
        return self

    def lingering(self) -> Bench:
        self.preparing().feed(ACK)
        return self


CONFIRM = ConfirmAsked(ConfirmRequest(lease_id=LEASE, holder_incarnation=HOLDER.incarnation))
RENEW = RenewAsked(RenewRequest(lease_ids=(LEASE,), holder_incarnation=HOLDER.incarnation))
ACK = AckArrived(AckRequest(lease_ids=(LEASE,), holder_incarnation=HOLDER.incarnation))

PREPARED = Prepared(LEASE, Preparation(num_bytes=128, checksum_s=0.25))

STATES: dict[str, Callable[[Bench], Bench]] = {
    "offering": Bench.opened,
    "offer failed": Bench.refused_once,
    "accepted": Bench.accepted,
    "announcing": Bench.announcing,
    "sealing": Bench.sealing,
    "sealed": Bench.sealed,
    "confirmed": Bench.confirmed,
    "withdrawn": Bench.withdrawn,
    "ended": Bench.ended,
    # where the reader has leading blocks
    "part there": Bench.part_there,
    "all there": Bench.all_there,
    "all there, sealing": Bench.all_there_sealing,
    # and with preparations
    "offering, preparing": Bench.offering_preparing,
    "preparing": Bench.preparing,
    "prepared": Bench.prepared,
    "ended, preparing": Bench.lingering,
}


def bench_in(state: str) -> Bench:
    prepares = "prepar" in state
    return STATES[state](Bench(prepares=prepares))


EVENTS: dict[str, HolderEvent] = {
    "offer answered": OfferAnswered(LEASE),
    "offer lost": OfferFailed(LEASE, LOST),
    "offer refused": OfferFailed(LEASE, IncompatiblePeer("other model")),
    "offer to a full reader": OfferFailed(LEASE, NoCapacity("full")),
    "advanced": Advanced(LEASE, 3),
    "advanced a little": Advanced(LEASE, 2),
    "sealed": Sealed(LEASE, 3, SEAL),
    "prepared": PREPARED,
    "preparation failed": Prepared(LEASE, Preparation(error=LOST)),
    "all known": ProgressAnswered(LEASE, ProgressReply(known=True, expected=3)),
    "progress known": ProgressAnswered(LEASE, ProgressReply(known=True, expected=2)),
    "progress unknown": ProgressAnswered(LEASE, ProgressReply(known=False)),
    "progress lost": ProgressFailed(LEASE, LOST),
    "farewell arrived": FarewellEnded(LEASE, None),
    "farewell lost": FarewellEnded(LEASE, LOST),
    "confirm": CONFIRM,
    "confirm of another life": ConfirmAsked(ConfirmRequest(lease_id=LEASE, holder_incarnation=OLD)),
    "renew": RENEW,
    "renew of another life": RenewAsked(RenewRequest(lease_ids=(LEASE,), holder_incarnation=OLD)),
    "ack": ACK,
    "ack of another life": AckArrived(AckRequest(lease_ids=(LEASE,), holder_incarnation=OLD)),
    "withdrawn": Withdrawn(LEASE, "cancelled"),
    "reader gone": ReaderGone(READER.worker_id, READER.incarnation),
    "another reader gone": ReaderGone(READER.worker_id, Incarnation(1)),
    "tick": HolderTick(),
}


def describe(bench: Bench, event: HolderEvent) -> str:
    """What an event did, in words: instructions, and whether it was counted as ignored."""
    ignored = bench.holder.counters.ignored.total()
    try:
        words = [_word(each) for each in bench.feed(event)]
    except InvariantBroken:
        return "bug"
    if bench.holder.counters.ignored.total() > ignored:
        words.insert(0, "ignored")
    return ", ".join(words) or "-"


def _word(instruction: HolderInstruction) -> str:
    match instruction:
        case LeaseEnded(outcome=outcome):
            return f"ended {outcome}"
        case Answer(ConfirmReply(stands=stands)):
            return "stands" if stands else "does not stand"
        case Answer(RenewReply(alive=alive)):
            return "alive" if alive else "not alive"
        case Answer():
            return "ok"
        case Refuse(error):
            return error.code
        case _:
            return type(instruction).__name__


#: What each event does: in most states, and in those where it does something else.
TABLE: dict[str, tuple[str, dict[str, str]]] = {
    "offer answered": (
        "ignored",
        {
            "offering": "-",
            "offering, preparing": "-",
        },
    ),
    "offer lost": (
        "ignored",
        {
            "offering": "-",
            "offering, preparing": "-",
        },
    ),
    "offer refused": (
        "ignored",
        {
            "offering": "ended refused",
            "offering, preparing": "ended refused",
        },
    ),
    "offer to a full reader": (
        "ignored",
        {
            "offering": "-",
            "offering, preparing": "-",
        },
    ),
    "advanced": (
        "-",
        {
            "accepted": "SendProgress",
            "sealing": "bug",
            "sealed": "bug",
            "confirmed": "bug",
            "withdrawn": "ignored",
            "ended": "ignored",
            "part there": "SendProgress",
            "all there, sealing": "bug",
            "prepared": "PrepareBlocks",
            "ended, preparing": "ignored",
        },
    ),
    "advanced a little": (
        "-",
        {
            "accepted": "SendProgress",
            "sealing": "bug",
            "sealed": "bug",
            "confirmed": "bug",
            "withdrawn": "ignored",
            "ended": "ignored",
            "all there, sealing": "bug",
            "ended, preparing": "ignored",
        },
    ),
    "sealed": (
        "-",
        {
            "accepted": "SendProgress",
            "sealing": "bug",
            "sealed": "bug",
            "confirmed": "bug",
            "withdrawn": "ignored",
            "ended": "ignored",
            "part there": "SendProgress",
            "all there": "SendProgress",
            "all there, sealing": "bug",
            "prepared": "PrepareBlocks",
            "ended, preparing": "ignored",
        },
    ),
    "prepared": (
        "ignored",
        {
            "offering, preparing": "-",
            "preparing": "SendProgress",
            "ended, preparing": "-",
        },
    ),
    "preparation failed": (
        "ignored",
        {
            "offering, preparing": "ended withdrawn, SendFarewell",
            "preparing": "ended withdrawn, SendFarewell",
            "ended, preparing": "-",
        },
    ),
    "all known": (
        "ignored",
        {
            "announcing": "ended refused",
            "sealing": "-",
            "all there, sealing": "-",
            "prepared": "ended refused",
        },
    ),
    "progress known": (
        "ignored",
        {
            "announcing": "-",
            "sealing": "SendProgress",
            "all there, sealing": "-",
            "prepared": "-",
        },
    ),
    "progress unknown": (
        "ignored",
        {
            "announcing": "ended expired",
            "sealing": "ended expired",
            "all there, sealing": "ended expired",
            "prepared": "ended expired",
        },
    ),
    "progress lost": (
        "ignored",
        {
            "announcing": "-",
            "sealing": "-",
            "all there, sealing": "-",
            "prepared": "-",
        },
    ),
    "farewell arrived": (
        "ignored",
        {
            "withdrawn": "-",
        },
    ),
    "farewell lost": (
        "ignored",
        {
            "withdrawn": "-",
        },
    ),
    "confirm": (
        "does not stand",
        {
            "sealing": "stands",
            "sealed": "stands",
            "confirmed": "stands",
            "all there, sealing": "stands",
        },
    ),
    "confirm of another life": (
        "stale_incarnation",
        {},
    ),
    "renew": (
        "alive",
        {
            "withdrawn": "not alive",
            "ended": "not alive",
            "ended, preparing": "not alive",
        },
    ),
    "renew of another life": (
        "stale_incarnation",
        {},
    ),
    "ack": (
        "ended refused, ok",
        {
            "confirmed": "ended released, ok",
            "withdrawn": "ignored, ok",
            "ended": "ignored, ok",
            "ended, preparing": "ignored, ok",
        },
    ),
    "ack of another life": (
        "stale_incarnation",
        {},
    ),
    "withdrawn": (
        "ended withdrawn, SendFarewell",
        {
            "withdrawn": "ignored",
            "ended": "ignored",
            "ended, preparing": "ignored",
        },
    ),
    "reader gone": (
        "ended expired",
        {
            "confirmed": "ended released",
            "withdrawn": "-",
            "ended": "-",
            "ended, preparing": "-",
        },
    ),
    "another reader gone": (
        "-",
        {},
    ),
    "tick": (
        "-",
        {},
    ),
}


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_state(event: str) -> None:
    common, special = TABLE[event]
    actual = {state: describe(bench_in(state), EVENTS[event]) for state in STATES}
    assert actual == {state: special.get(state, common) for state in STATES}


@pytest.mark.parametrize("state", STATES)
def test_any_two_events_in_any_order_end_a_lease_at_most_once(state: str) -> None:
    """Repeats and reordering: `feed` audits machine and ledger after each event."""
    for first, second in itertools.product(EVENTS.values(), repeat=2):
        bench = bench_in(state)
        ends = 0
        for event in (first, second):
            with contextlib.suppress(InvariantBroken):
                ends += sum(isinstance(each, LeaseEnded) for each in bench.feed(event))
            bench.holder.check()
            bench.ledger.check()
        assert ends <= 1, (first, second)


def test_offer_names_what_is_left_of_the_term() -> None:
    bench = Bench().opened()
    (first,) = bench.last
    assert isinstance(first, SendOffer)
    assert (first.terms.ttl_s, first.timeout_s) == (TTL_S, TTL_S / 4)
    bench.now_s += 2.0
    bench.feed(OfferFailed(LEASE, DeadlineExceeded("late")))
    (second,) = bench.after(0.05)
    assert isinstance(second, SendOffer)
    assert second.terms.ttl_s == pytest.approx(TTL_S - 2.05)
    assert second.timeout_s < second.terms.ttl_s / 2


def offers_until_the_end(bench: Bench, error: TandemError) -> list[float]:
    """When each offer was sent, all of them failing with `error`."""
    sent_s: list[float] = []
    while bench.holder.num_leases:
        for offer in [each for each in bench.last if isinstance(each, SendOffer)]:
            # The reader counts on half of it, and the holder stands by all of it.
            assert 0 < offer.terms.ttl_s <= TTL_S
            sent_s.append(bench.now_s)
            bench.feed(OfferFailed(LEASE, error))
        due_s = bench.holder.next_due_s()
        assert due_s is not None
        bench.now_s = due_s
        bench.feed(HolderTick())
    (ended,) = bench.last
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.EXPIRED
    assert error.message in ended.reason
    assert bench.holder.idle
    assert bench.holder.next_due_s() is None
    return sent_s


def test_offer_is_repeated_with_growing_delays_until_the_term_is_over() -> None:
    bench = Bench().opened()
    sent_s = offers_until_the_end(bench, DeadlineExceeded("silence"))
    gaps = [later - earlier for earlier, later in itertools.pairwise(sent_s)]
    assert gaps[:5] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])
    assert max(gaps) <= 1.0
    assert bench.now_s == 100.0 + TTL_S


def test_a_full_reader_is_waited_for_until_the_lease_is_too_old() -> None:
    bench = Bench(max_age_s=100.0).opened()
    sent_s = offers_until_the_end(bench, NoCapacity("full"))
    assert bench.now_s == 200.0
    assert len(sent_s) > 90


def test_a_lease_may_have_an_age_of_its_own() -> None:
    bench = Bench(max_age_s=100.0)
    bench.feed(Opened(terms=terms(), reader=READER, blocks=bench.blocks, max_age_s=20.0))
    offers_until_the_end(bench, NoCapacity("full"))
    assert bench.now_s == 120.0


def test_a_reader_that_falls_silent_after_it_was_full_costs_one_term() -> None:
    bench = Bench().opened()
    for _ in range(20):
        bench.feed(OfferFailed(LEASE, NoCapacity("full")))
        bench.after(1.0)
    full_s = bench.now_s
    offers_until_the_end(bench, WorkerUnavailable("gone"))
    assert bench.now_s <= full_s + TTL_S


def test_offer_waits_as_long_as_the_reader_says() -> None:
    bench = Bench().opened()
    bench.feed(OfferFailed(LEASE, NoCapacity("full", retry_after_s=3.0)))
    assert bench.after(2.9) == []
    assert isinstance(bench.after(0.2)[0], SendOffer)


@pytest.mark.parametrize("error", [BadRequest("never fits"), StaleIncarnation("old"), IncompatiblePeer("other")])
def test_offer_that_cannot_succeed_is_not_repeated(error: BadRequest) -> None:
    bench = Bench().opened()
    (ended,) = bench.feed(OfferFailed(LEASE, error))
    assert ended == LeaseEnded(lease_id=LEASE, outcome=LeaseOutcome.REFUSED, reason=error.message)


def test_one_announcement_at_a_time_carries_all_that_is_new() -> None:
    bench = Bench().accepted()
    (first,) = bench.feed(Advanced(LEASE, 1))
    assert isinstance(first, SendProgress)
    assert (first.body.start, len(first.body.blocks), first.body.seal) == (0, 1, None)
    assert bench.feed(Advanced(LEASE, 2)) == []
    assert bench.feed(Sealed(LEASE, 3, SEAL)) == []
    (second,) = bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=1)))
    assert isinstance(second, SendProgress)
    assert [ref.block_id for ref in second.body.blocks] == list(bench.blocks[1:])
    assert (second.body.start, second.body.seal) == (1, SEAL)
    assert bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=3))) == []
    assert bench.after(1.0) == []


def test_lost_announcement_is_sent_again_and_a_gap_filled() -> None:
    bench = Bench().sealing()
    assert bench.feed(ProgressFailed(LEASE, LOST)) == []
    (again,) = bench.after(0.05)
    assert isinstance(again, SendProgress)
    bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=1)))
    (rest,) = bench.last
    assert isinstance(rest, SendProgress)
    assert (rest.body.start, rest.body.seal) == (1, SEAL)


def test_reader_that_never_advances_is_not_asked_in_a_loop() -> None:
    bench = Bench().sealing()
    for _ in range(3):
        assert bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=0))) == []
        (again,) = bench.after(1.0)
        assert isinstance(again, SendProgress)


def test_reader_that_expects_too_much_is_let_go() -> None:
    bench = Bench().announcing()
    (ended,) = bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=3)))
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.REFUSED


def test_pins_hold_the_bytes_after_the_owner_let_go() -> None:
    bench = Bench().sealed()
    bench.ledger.release_all("prompt")
    assert bench.ledger.load()["offered_blocks"] == 3
    assert [bench.ledger.generation(block) for block in bench.blocks] == [0, 0, 0]
    bench.feed(CONFIRM, ACK)
    assert bench.ledger.load()["free_blocks"] == 8
    assert [bench.ledger.generation(block) for block in bench.blocks] == [1, 1, 1]


def test_term_counts_from_each_grant() -> None:
    bench = Bench().accepted()
    bench.now_s += TTL_S - 1
    bench.feed(RENEW)
    assert bench.after(TTL_S - 1) == []
    (ended,) = bench.after(1)
    assert ended == LeaseEnded(lease_id=LEASE, outcome=LeaseOutcome.EXPIRED, reason="the reader did not renew it")
    assert bench.feed(CONFIRM) == [
        Answer(ConfirmReply(stands=False, reason="the holder let the lease go")),
    ]


def test_confirmation_extends_the_term_and_decides_the_outcome() -> None:
    bench = Bench().sealed()
    bench.now_s += TTL_S - 1
    bench.feed(CONFIRM)
    assert bench.after(TTL_S - 1) == []
    (ended,) = bench.after(1)
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.RELEASED


def test_lost_announcement_answers_do_not_matter_once_confirmed() -> None:
    bench = Bench().sealing()
    bench.feed(CONFIRM)
    assert bench.feed(ProgressFailed(LEASE, LOST)) == []
    assert bench.after(2.0) == []


def test_overtaken_announcement_answer_does_not_undo_a_confirmation() -> None:
    bench = Bench().sealing()
    bench.feed(CONFIRM)
    assert bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=1))) == []
    (ended, _) = bench.feed(ACK)
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.RELEASED


def test_due_end_comes_before_the_event_that_would_prevent_it() -> None:
    bench = Bench().accepted()
    bench.now_s += TTL_S
    ended, answer = bench.feed(RENEW)
    assert isinstance(ended, LeaseEnded)
    assert answer == Answer(RenewReply(alive=(), ttl_s=0.0))


def test_no_lease_is_renewed_past_its_age() -> None:
    bench = Bench(max_age_s=20.0).accepted()
    for _ in range(4):
        bench.now_s += 4.0
        bench.feed(RENEW)
    assert bench.last == [Answer(RenewReply(alive=(), ttl_s=TTL_S))]


def test_one_renewal_for_many_leases() -> None:
    bench = Bench().accepted()
    other = LeaseId("p0/7/2")
    blocks = bench.ledger.allocate("other", 1)
    assert blocks is not None
    bench.feed(Opened(terms=terms(other, num_blocks=1), reader=READER, blocks=tuple(blocks)))
    ids = (LEASE, LeaseId("p0/7/9"), other)
    bench.feed(RenewAsked(RenewRequest(lease_ids=ids, holder_incarnation=HOLDER.incarnation)))
    assert bench.last == [Answer(RenewReply(alive=(LEASE, other), ttl_s=TTL_S))]


def test_farewell_is_repeated_until_the_readers_term_is_over() -> None:
    bench = Bench().withdrawn()
    assert bench.ledger.load()["owned_blocks"] == 3
    sent = 0
    while not bench.holder.idle:
        if any(isinstance(each, SendFarewell) for each in bench.last):
            sent += 1
            bench.feed(FarewellEnded(LEASE, LOST))
        due_s = bench.holder.next_due_s()
        assert due_s is not None
        bench.now_s = due_s
        bench.feed(HolderTick())
    assert sent > 5
    assert bench.now_s == 100.0 + TTL_S


def test_farewell_says_why() -> None:
    bench = Bench().withdrawn()
    _, farewell = bench.last
    assert isinstance(farewell, SendFarewell)
    assert (farewell.reader, farewell.body.withdrawn) == (READER, "cancelled")


def test_repr_and_counts() -> None:
    bench = Bench().sealed()
    assert repr(bench.holder) == "<Holder 7 [0 offered, 1 sealed | 0 farewells]>"
    assert bench.holder.leases_by_state() == {"offered": 0, "sealed": 1}
    bench.feed(CONFIRM, ACK)
    assert bench.holder.counters.outcomes == {"released": 1}


def test_opening_without_blocks_or_twice_is_a_bug() -> None:
    bench = Bench().opened()
    with pytest.raises(InvariantBroken, match="opened with 3"):
        bench.feed(Opened(terms=terms(), reader=READER, blocks=bench.blocks))
    with pytest.raises(InvariantBroken, match="opened with 0"):
        bench.feed(Opened(terms=terms(LeaseId("x"), num_blocks=0), reader=READER, blocks=()))
    with pytest.raises(InvariantBroken, match="sealed without a block"):
        bench.feed(Sealed(LEASE, 0, SEAL))
    with pytest.raises(InvariantBroken, match="advances to block 4"):
        bench.feed(Advanced(LEASE, 4))


# --- preparations ---------------------------------------------------------------------------------------

CHECKSUMMED = msgspec.structs.replace(terms(), checksums=True)


def test_blocks_are_announced_with_their_checksums_once_these_are_known() -> None:
    bench = Bench(prepares=True)
    bench.feed(Opened(terms=CHECKSUMMED, reader=READER, blocks=bench.blocks), OfferAnswered(LEASE))
    (work,) = bench.feed(Advanced(LEASE, 2))
    assert work == PrepareBlocks(lease_id=LEASE, blocks=bench.blocks[:2])
    assert bench.feed(Sealed(LEASE, 3, SEAL)) == []
    more, first = bench.feed(Prepared(LEASE, Preparation(checksums=(11, 12), num_bytes=128, checksum_s=0.5)))
    assert more == PrepareBlocks(lease_id=LEASE, blocks=bench.blocks[2:])
    assert isinstance(first, SendProgress)
    assert (len(first.body.blocks), first.body.checksums, first.body.seal) == (2, (11, 12), None)
    assert bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=2))) == []
    (second,) = bench.feed(Prepared(LEASE, Preparation(checksums=(13,), num_bytes=64, checksum_s=0.25)))
    assert isinstance(second, SendProgress)
    assert (second.body.start, second.body.checksums, second.body.seal) == (2, (13,), SEAL)
    assert (bench.holder.counters.checksum_bytes, bench.holder.counters.checksum_s) == (192, 0.75)


def test_a_gap_is_filled_with_the_same_checksums() -> None:
    bench = Bench(prepares=True)
    bench.feed(Opened(terms=CHECKSUMMED, reader=READER, blocks=bench.blocks), OfferAnswered(LEASE))
    bench.feed(Sealed(LEASE, 3, SEAL), Prepared(LEASE, Preparation(checksums=(11, 12, 13))))
    (again,) = bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=1)))
    assert isinstance(again, SendProgress)
    assert (again.body.start, again.body.checksums) == (1, (12, 13))


def test_large_leases_are_prepared_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvtransfer.holder.MAX_PREPARED_BYTES", 2 * terms().identity.layout.block_bytes)
    bench = Bench(prepares=True).accepted()
    (first,) = bench.feed(Sealed(LEASE, 3, SEAL))
    assert first == PrepareBlocks(lease_id=LEASE, blocks=bench.blocks[:2])
    (second, _progress) = bench.feed(PREPARED)
    assert second == PrepareBlocks(lease_id=LEASE, blocks=bench.blocks[2:])


def test_blocks_being_prepared_stay_pinned_after_the_end() -> None:
    bench = Bench(prepares=True).lingering()
    bench.ledger.release_all("prompt")
    assert bench.ledger.load()["offered_blocks"] == 3
    assert bench.holder.num_leases == 1
    assert not bench.holder.idle
    assert bench.after(1e6) == []
    bench.feed(PREPARED)
    assert bench.ledger.load()["free_blocks"] == 8
    assert bench.holder.idle


def test_as_many_checksums_as_blocks() -> None:
    bench = Bench(prepares=True)
    bench.feed(Opened(terms=CHECKSUMMED, reader=READER, blocks=bench.blocks), Sealed(LEASE, 3, SEAL))
    with pytest.raises(InvariantBroken, match="2 checksums up to block 3"):
        bench.feed(Prepared(LEASE, Preparation(checksums=(1, 2))))


# --- blocks that stood before their lease ---------------------------------------------------------------


def opened_sealed() -> tuple[Bench, SendOffer]:
    bench = Bench()
    bench.feed(Opened(terms=terms(), reader=READER, blocks=bench.blocks, seal=SEAL))
    (offer,) = bench.last
    assert isinstance(offer, SendOffer)
    return bench, offer


def test_an_offer_of_final_blocks_carries_them_and_the_seal() -> None:
    bench, offer = opened_sealed()
    progress = offer.terms.progress
    assert progress is not None
    assert (len(progress.blocks), progress.seal) == (3, SEAL)
    # The reader knows everything: nothing is announced after it.
    assert bench.feed(OfferAnswered(LEASE, 3)) == []


def test_a_reader_that_took_less_is_sent_the_rest() -> None:
    bench, _ = opened_sealed()
    (rest,) = bench.feed(OfferAnswered(LEASE, 0))
    assert isinstance(rest, SendProgress)
    assert len(rest.body.blocks) == 3


def test_an_answer_that_claims_more_than_there_is_ends_the_lease() -> None:
    bench, _ = opened_sealed()
    (ended,) = bench.feed(OfferAnswered(LEASE, 4))
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.REFUSED


@pytest.mark.parametrize("error", [WorkerUnavailable("lost"), TransferAborted("has ended here: adopted")])
def test_a_lost_answer_does_not_end_what_was_confirmed(error: TandemError) -> None:
    bench, _ = opened_sealed()
    (answer,) = bench.feed(ConfirmAsked(ConfirmRequest(lease_id=LEASE, holder_incarnation=HOLDER.incarnation)))
    assert isinstance(answer, Answer)
    assert bench.feed(OfferFailed(LEASE, error)) == []
    ended, _ = bench.feed(AckArrived(AckRequest(lease_ids=(LEASE,), holder_incarnation=HOLDER.incarnation)))
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.RELEASED


# --- leases over blocks that stood before -------------------------------------------------------------------------


def test_what_was_final_before_the_lease_comes_with_the_offer() -> None:
    bench = Bench()
    (offer,) = bench.feed(Opened(terms=terms(), reader=READER, blocks=bench.blocks, num_final_blocks=2))
    assert isinstance(offer, SendOffer)
    assert offer.terms.progress is not None
    assert (len(offer.terms.progress.blocks), offer.terms.progress.seal) == (2, None)
    assert bench.feed(OfferAnswered(LEASE, expected=2)) == []


def test_a_whole_lease_is_offered_once_all_of_it_is_prepared() -> None:
    bench = Bench(prepares=True)
    opened = Opened(terms=terms(), reader=READER, blocks=bench.blocks, seal=SEAL, whole=True)
    (prepare,) = bench.feed(opened)
    assert isinstance(prepare, PrepareBlocks)
    assert bench.after(1.0) == []
    (offer,) = bench.feed(Prepared(LEASE, Preparation()))
    assert isinstance(offer, SendOffer)
    assert offer.terms.progress is not None
    assert (len(offer.terms.progress.blocks), offer.terms.progress.seal) == (3, SEAL)
    assert bench.feed(OfferAnswered(LEASE, expected=3)) == [], "nothing is left to say"
    assert bench.feed(CONFIRM) == [Answer(ConfirmReply(stands=True))]


def test_a_whole_lease_needs_a_seal_and_fits_into_one_offer() -> None:
    for opened in (
        Opened(terms=terms(), reader=READER, blocks=Bench().blocks, whole=True),
        Opened(terms=terms(num_blocks=4097), reader=READER, blocks=(Bench().blocks[0],) * 4097, seal=SEAL, whole=True),
    ):
        with pytest.raises(InvariantBroken, match="no offer can carry all"):
            Bench().feed(opened)


# --- readers that have the beginning ------------------------------------------------------------------------------


def test_what_the_reader_has_is_not_announced() -> None:
    bench = Bench().part_there()
    assert bench.feed(Advanced(LEASE, 1)) == []
    assert bench.feed(Advanced(LEASE, 2)) == []
    (rest,) = bench.feed(Sealed(LEASE, 3, SEAL))
    assert isinstance(rest, SendProgress)
    assert [ref.block_id for ref in rest.body.blocks] == [bench.blocks[2]]
    assert (rest.body.start, rest.body.seal) == (2, SEAL)
    assert bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=3))) == []
    assert bench.after(1.0) == []


@pytest.mark.parametrize("num_sealed", [1, 2, 3])
def test_a_reader_that_has_all_is_told_of_the_seal(num_sealed: int) -> None:
    bench = Bench().all_there()
    assert bench.feed(Advanced(LEASE, 1)) == []
    (seal,) = bench.feed(Sealed(LEASE, num_sealed, SEAL))
    assert isinstance(seal, SendProgress)
    assert (seal.body.start, seal.body.blocks, seal.body.seal) == (num_sealed, (), SEAL)
    assert bench.feed(ProgressFailed(LEASE, LOST)) == []
    assert bench.after(0.05) == [seal]
    assert bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=3))) == []
    assert bench.after(1.0) == []
    bench.feed(CONFIRM)
    (ended, _) = bench.feed(ACK)
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.RELEASED


def test_the_seal_is_told_though_the_answer_to_the_offer_comes_after_it() -> None:
    bench = Bench().opened()
    assert bench.feed(Sealed(LEASE, 3, SEAL)) == []
    (seal,) = bench.feed(OfferAnswered(LEASE, expected=3))
    assert isinstance(seal, SendProgress)
    assert seal.body.seal == SEAL


@pytest.mark.parametrize("expected", [-1, 4])
def test_a_reader_cannot_have_what_is_not_of_the_lease(expected: int) -> None:
    bench = Bench().opened()
    (ended,) = bench.feed(OfferAnswered(LEASE, expected))
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.REFUSED
    assert f"expects block {expected}" in ended.reason


def test_what_the_reader_has_is_not_prepared() -> None:
    bench = Bench(prepares=True)
    bench.feed(Opened(terms=CHECKSUMMED, reader=READER, blocks=bench.blocks), OfferAnswered(LEASE, expected=2))
    assert bench.feed(Advanced(LEASE, 1)) == []
    (work,) = bench.feed(Sealed(LEASE, 3, SEAL))
    assert work == PrepareBlocks(lease_id=LEASE, blocks=bench.blocks[2:])
    (rest,) = bench.feed(Prepared(LEASE, Preparation(checksums=(13,))))
    assert isinstance(rest, SendProgress)
    assert (rest.body.start, rest.body.checksums, rest.body.seal) == (2, (13,), SEAL)


def test_a_preparation_under_way_when_the_reader_says_what_it_has_is_the_last() -> None:
    bench = Bench(prepares=True)
    bench.feed(Opened(terms=CHECKSUMMED, reader=READER, blocks=bench.blocks, num_final_blocks=1))
    assert PrepareBlocks(lease_id=LEASE, blocks=bench.blocks[:1]) in bench.last
    assert bench.feed(OfferAnswered(LEASE, expected=3), Sealed(LEASE, 3, SEAL)) == []
    (seal,) = bench.feed(Prepared(LEASE, Preparation(checksums=(11,))))
    assert isinstance(seal, SendProgress)
    assert (seal.body.start, seal.body.blocks, seal.body.checksums, seal.body.seal) == (3, (), (), SEAL)


def test_a_reader_that_lost_what_was_passed_over_for_it_is_let_go() -> None:
    bench = Bench(prepares=True)
    bench.feed(Opened(terms=CHECKSUMMED, reader=READER, blocks=bench.blocks), OfferAnswered(LEASE, expected=2))
    bench.feed(Sealed(LEASE, 3, SEAL), Prepared(LEASE, Preparation(checksums=(13,))))
    (ended,) = bench.feed(ProgressAnswered(LEASE, ProgressReply(known=True, expected=1)))
    assert isinstance(ended, LeaseEnded)
    assert ended.outcome is LeaseOutcome.REFUSED
    assert "expects block 1, not one of [2, 3]" in ended.reason
