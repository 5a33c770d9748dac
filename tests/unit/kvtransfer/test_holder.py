"""The holder's machine: every event in every state, terms, retries, and what it announces."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest

from contracts.errors import (
    BadRequest,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
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

    def __init__(self, *, max_age_s: float = 600.0) -> None:
        self.now_s = 100.0
        self.ledger = Ledger(8)
        self.holder = Holder(self.ledger, HOLDER.incarnation, max_age_s=max_age_s)
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


CONFIRM = ConfirmAsked(ConfirmRequest(lease_id=LEASE, holder_incarnation=HOLDER.incarnation))
RENEW = RenewAsked(RenewRequest(lease_ids=(LEASE,), holder_incarnation=HOLDER.incarnation))
ACK = AckArrived(AckRequest(lease_ids=(LEASE,), holder_incarnation=HOLDER.incarnation))

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
}

EVENTS: dict[str, HolderEvent] = {
    "offer answered": OfferAnswered(LEASE),
    "offer lost": OfferFailed(LEASE, LOST),
    "offer refused": OfferFailed(LEASE, IncompatiblePeer("other model")),
    "advanced": Advanced(LEASE, 3),
    "sealed": Sealed(LEASE, 3, SEAL),
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


#: One row per event: what it does in each state, in the order of STATES; one cell where all are alike.
TABLE: dict[str, str | tuple[str, ...]] = {
    "offer answered": (
        "-",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
    ),
    "offer lost": (
        "-",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
    ),
    "offer refused": (
        "ended refused",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
    ),
    "advanced": ("-", "-", "SendProgress", "-", "bug", "bug", "bug", "ignored", "ignored"),
    "sealed": ("-", "-", "SendProgress", "-", "bug", "bug", "bug", "ignored", "ignored"),
    "progress known": (
        "ignored",
        "ignored",
        "ignored",
        "-",
        "SendProgress",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
    ),
    "progress unknown": (
        "ignored",
        "ignored",
        "ignored",
        "ended expired",
        "ended expired",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
    ),
    "progress lost": ("ignored", "ignored", "ignored", "-", "-", "ignored", "ignored", "ignored", "ignored"),
    "farewell arrived": (
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "-",
        "ignored",
    ),
    "farewell lost": (
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "ignored",
        "-",
        "ignored",
    ),
    "confirm": (
        "does not stand",
        "does not stand",
        "does not stand",
        "does not stand",
        "stands",
        "stands",
        "stands",
        "does not stand",
        "does not stand",
    ),
    "confirm of another life": "stale_incarnation",
    "renew": ("alive", "alive", "alive", "alive", "alive", "alive", "alive", "not alive", "not alive"),
    "renew of another life": "stale_incarnation",
    "ack": (
        "ended refused, ok",
        "ended refused, ok",
        "ended refused, ok",
        "ended refused, ok",
        "ended refused, ok",
        "ended refused, ok",
        "ended released, ok",
        "ignored, ok",
        "ignored, ok",
    ),
    "ack of another life": "stale_incarnation",
    "withdrawn": (
        "ended withdrawn, SendFarewell",
        "ended withdrawn, SendFarewell",
        "ended withdrawn, SendFarewell",
        "ended withdrawn, SendFarewell",
        "ended withdrawn, SendFarewell",
        "ended withdrawn, SendFarewell",
        "ended withdrawn, SendFarewell",
        "ignored",
        "ignored",
    ),
    "reader gone": (
        "ended expired",
        "ended expired",
        "ended expired",
        "ended expired",
        "ended expired",
        "ended expired",
        "ended released",
        "-",
        "-",
    ),
    "another reader gone": "-",
    "tick": "-",
}


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_state(event: str) -> None:
    row = TABLE[event]
    expected = {state: row if isinstance(row, str) else row[index] for index, state in enumerate(STATES)}
    actual = {state: describe(build(Bench()), EVENTS[event]) for state, build in STATES.items()}
    assert actual == expected


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


def test_offer_is_repeated_with_growing_delays_until_the_term_is_over() -> None:
    bench = Bench().opened()
    sent_s: list[float] = []
    while bench.holder.num_leases:
        if any(isinstance(each, SendOffer) for each in bench.last):
            sent_s.append(bench.now_s)
            bench.feed(OfferFailed(LEASE, NoCapacity("full")))
        due_s = bench.holder.next_due_s()
        assert due_s is not None
        bench.now_s = due_s
        bench.feed(HolderTick())
    gaps = [later - earlier for earlier, later in itertools.pairwise(sent_s)]
    assert gaps[:5] == pytest.approx([0.05, 0.1, 0.2, 0.4, 0.8])
    assert max(gaps) <= 1.0
    (ended,) = bench.last
    assert isinstance(ended, LeaseEnded)
    assert (ended.outcome, bench.now_s) == (LeaseOutcome.EXPIRED, 100.0 + TTL_S)
    assert "full" in ended.reason
    assert bench.holder.idle
    assert bench.holder.next_due_s() is None


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
