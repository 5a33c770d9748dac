"""The reader's machine: every event in every state, terms, retries, waiting, and quarantine."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import (
    BadRequest,
    Cancelled,
    CorruptKv,
    DeadlineExceeded,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.ids import BlockId, Incarnation, LeaseId
from contracts.messages import ConfirmReply, HandoffReply, Peer, ProgressReply, ProgressRequest, RenewReply
from kvtransfer.block_work import Landing
from kvtransfer.ledger import Ledger
from kvtransfer.reader import MAX_ENDED_LEASES, Reader
from kvtransfer.reader_events import (
    AbortReason,
    AckEnded,
    AskConfirm,
    AskRenew,
    BlocksFreed,
    CancelRequested,
    ConfirmAnswered,
    ConfirmFailed,
    HolderGone,
    LandBlocks,
    Landed,
    LeaseAborted,
    LeaseAdopted,
    Offered,
    ProgressArrived,
    PullEnded,
    ReaderEvent,
    ReaderInstruction,
    ReaderTick,
    RefuseOffer,
    RefuseProgress,
    RenewAnswered,
    RenewFailed,
    ReplyProgress,
    SendAck,
    StartPull,
    StopPull,
    Verdict,
)
from kvtransfer.transport import PullResult
from tests.unit.kvtransfer.builders import HOLDER, IDENTITY, LEASE, SEAL, TTL_S, progress, terms

if TYPE_CHECKING:
    from collections.abc import Callable

KEY = (HOLDER.worker_id, HOLDER.incarnation)
NEXT_LIFE = msgspec.structs.replace(HOLDER, incarnation=Incarnation(HOLDER.incarnation + 1))
LOST = WorkerUnavailable("gone")
DONE = PullEnded(LEASE, PullResult(num_bytes=3, wire_s=0.5))
FAILED = PullEnded(LEASE, PullResult(num_bytes=1, wire_s=0.1, error=LOST))
LANDED = Landed(LEASE, Landing(num_bytes=128, checksum_s=0.25))
CORRUPT = Landed(LEASE, Landing(corrupt=(1,)))
CORRUPT_AGAIN = Landed(LEASE, Landing(corrupt=(0,)))


def offered(lease_id: LeaseId = LEASE, num_blocks: int = 3, holder: Peer = HOLDER) -> Offered:
    return Offered(terms=terms(lease_id, num_blocks=num_blocks, holder=holder), owner=f"owner of {lease_id}")


def having(num_blocks: int, lease_id: LeaseId = LEASE) -> Offered:
    """Of a lease of three blocks, so many are here."""
    return replace(offered(lease_id), have=num_blocks)


class Bench:
    """One reader with a pool of eight blocks, on a hand-set clock."""

    def __init__(self, *, max_waiting: int = 4, lands: bool = False) -> None:
        self.now_s = 100.0
        self.ledger = Ledger(8)
        self.reader = Reader(
            self.ledger, IDENTITY, ("memory",), max_waiting=max_waiting, max_pull_bytes=10 * 64, lands=lands
        )
        self.last: list[ReaderInstruction] = []

    def feed(self, *events: ReaderEvent) -> list[ReaderInstruction]:
        for event in events:
            self.last = self.reader.handle(event, self.now_s)
            self.reader.check()
            self.ledger.check()
        return self.last

    def after(self, delay_s: float) -> list[ReaderInstruction]:
        self.now_s += delay_s
        return self.feed(ReaderTick())

    def until_due(self) -> list[ReaderInstruction]:
        due_s = self.reader.next_due_s()
        assert due_s is not None
        self.now_s = due_s
        return self.feed(ReaderTick())

    def fresh(self) -> Bench:
        return self

    def waiting(self) -> Bench:
        self.ledger.allocate("others", 6)
        self.feed(offered())
        return self

    def reserved(self) -> Bench:
        self.feed(offered())
        return self

    def pulling(self) -> Bench:
        self.reserved().feed(ProgressArrived(progress(0, 4, 5)))
        return self

    def pulled(self) -> Bench:
        self.pulling().feed(DONE)
        return self

    def sealed(self) -> Bench:
        self.reserved().feed(ProgressArrived(progress(0, 4, 5, 6, seal=SEAL)))
        return self

    def confirming(self) -> Bench:
        self.sealed().feed(DONE)
        return self

    def confirm_lost(self) -> Bench:
        self.confirming().feed(ConfirmFailed(LEASE, LOST))
        return self

    def quarantined(self) -> Bench:
        self.pulling().feed(CancelRequested(LEASE, "client left"))
        return self

    def renewing(self) -> Bench:
        self.reserved().after(TTL_S / 4)
        return self

    def adopted(self) -> Bench:
        self.confirming().feed(ConfirmAnswered(LEASE, ConfirmReply(stands=True)))
        return self

    def landing(self) -> Bench:
        self.pulling().feed(DONE)
        return self

    def refetching(self) -> Bench:
        self.landing().feed(CORRUPT)
        return self

    def landing_for_the_last_time(self) -> Bench:
        self.refetching().feed(DONE, CORRUPT_AGAIN, DONE)
        return self

    def landing_in_quarantine(self) -> Bench:
        self.landing().feed(CancelRequested(LEASE, "client left"))
        return self

    def forgotten(self) -> Bench:
        self.adopted().feed(AckEnded(KEY, None))
        return self

    def part_here(self) -> Bench:
        self.feed(having(2))
        return self

    def part_here_waiting(self) -> Bench:
        self.ledger.allocate("others", 8)
        return self.part_here()

    def part_here_pulling(self) -> Bench:
        self.part_here().feed(ProgressArrived(progress(2, 6)))
        return self

    def all_here(self) -> Bench:
        self.feed(having(3))
        return self

    def all_here_confirming(self) -> Bench:
        self.all_here().feed(ProgressArrived(progress(3, seal=SEAL)))
        return self


STATES: dict[str, Callable[[Bench], Bench]] = {
    "fresh": Bench.fresh,
    "waiting": Bench.waiting,
    "reserved": Bench.reserved,
    "pulling": Bench.pulling,
    "pulled": Bench.pulled,
    "sealed": Bench.sealed,
    "confirming": Bench.confirming,
    "confirm lost": Bench.confirm_lost,
    "quarantined": Bench.quarantined,
    "renewing": Bench.renewing,
    "adopted": Bench.adopted,
    "forgotten": Bench.forgotten,
    # where leading blocks were here before
    "part here": Bench.part_here,
    "part here, waiting": Bench.part_here_waiting,
    "part here, pulling": Bench.part_here_pulling,
    "all here": Bench.all_here,
    "all here, confirming": Bench.all_here_confirming,
    # and where pulled blocks are checked
    "landing": Bench.landing,
    "refetching": Bench.refetching,
    "landing for the last time": Bench.landing_for_the_last_time,
    "landing in quarantine": Bench.landing_in_quarantine,
}


def bench_in(state: str) -> Bench:
    return STATES[state](Bench(lands="landing" in state or state == "refetching"))


EVENTS: dict[str, ReaderEvent] = {
    "offer": offered(),
    "offer with a block here": having(1),
    "offer of the holder's next life": offered(LeaseId("p0/8/1"), 1, NEXT_LIFE),
    "progress": ProgressArrived(progress(0, 4, 5)),
    "progress with a gap": ProgressArrived(progress(1, 5)),
    "progress too long": ProgressArrived(progress(0, 4, 5, 6, 7)),
    "seal": ProgressArrived(progress(0, 4, 5, 6, seal=SEAL)),
    "seal after one block": ProgressArrived(progress(0, 4, seal=SEAL)),
    "progress of another life": ProgressArrived(progress(0, 4, incarnation=NEXT_LIFE.incarnation)),
    "withdrawal": ProgressArrived(progress(0, withdrawn="cancelled")),
    "pull done": DONE,
    "pull failed": FAILED,
    "landed": LANDED,
    "landed with a corrupt block": CORRUPT_AGAIN,
    "landing failed": Landed(LEASE, Landing(error=LOST)),
    "confirmed": ConfirmAnswered(LEASE, ConfirmReply(stands=True)),
    "not confirmed": ConfirmAnswered(LEASE, ConfirmReply(stands=False, reason="gone")),
    "confirm lost": ConfirmFailed(LEASE, LOST),
    "confirm stale": ConfirmFailed(LEASE, StaleIncarnation("another life")),
    "renewed": RenewAnswered(KEY, RenewReply(alive=(LEASE,), ttl_s=TTL_S)),
    "not renewed": RenewAnswered(KEY, RenewReply(alive=(), ttl_s=TTL_S)),
    "renew lost": RenewFailed(KEY, LOST),
    "renew stale": RenewFailed(KEY, StaleIncarnation("another life")),
    "ack arrived": AckEnded(KEY, None),
    "ack lost": AckEnded(KEY, LOST),
    "cancel": CancelRequested(LEASE, "client left"),
    "holder gone": HolderGone(HOLDER.worker_id, HOLDER.incarnation),
    "blocks freed": BlocksFreed(),
    "tick": ReaderTick(),
}


def describe(bench: Bench, event: ReaderEvent) -> str:
    """What an event did, in words: instructions, and whether it was counted as ignored."""
    ignored = bench.reader.counters.ignored.total()
    words = [_word(each) for each in bench.feed(event)]
    if bench.reader.counters.ignored.total() > ignored:
        words.insert(0, "ignored")
    return ", ".join(words) or "-"


def _word(instruction: ReaderInstruction) -> str:
    match instruction:
        case Verdict(reply):
            return reply.verdict
        case RefuseOffer(error) | RefuseProgress(error):
            return error.code
        case ReplyProgress(reply):
            return f"expects {reply.expected}" if reply.known else "unknown"
        case LeaseAborted(reason=reason):
            return f"aborted {reason}"
        case _:
            return type(instruction).__name__


#: What each event does: in most states, and in those where it does something else.
TABLE: dict[str, tuple[str, dict[str, str]]] = {
    "offer": (
        "reserved",
        {
            "waiting": "waiting",
            "quarantined": "transfer_aborted",
            "adopted": "transfer_aborted",
            "forgotten": "transfer_aborted",
            "part here, waiting": "waiting",
            "landing in quarantine": "transfer_aborted",
        },
    ),
    "offer with a block here": (
        "reserved",
        {
            "waiting": "waiting",
            "quarantined": "transfer_aborted",
            "adopted": "transfer_aborted",
            "forgotten": "transfer_aborted",
            "part here, waiting": "waiting",
            "landing in quarantine": "transfer_aborted",
        },
    ),
    "offer of the holder's next life": (
        "aborted holder_gone, reserved",
        {
            "fresh": "reserved",
            "pulling": "StopPull, aborted holder_gone, reserved",
            "sealed": "StopPull, aborted holder_gone, reserved",
            "quarantined": "reserved",
            "adopted": "reserved",
            "forgotten": "reserved",
            "part here, waiting": "aborted holder_gone, waiting",
            "part here, pulling": "StopPull, aborted holder_gone, reserved",
            "refetching": "StopPull, aborted holder_gone, reserved",
            "landing in quarantine": "reserved",
        },
    ),
    "progress": (
        "expects 2",
        {
            "fresh": "unknown",
            "reserved": "expects 2, StartPull",
            "sealed": "expects 3",
            "confirming": "expects 3",
            "confirm lost": "expects 3",
            "quarantined": "unknown",
            "renewing": "expects 2, StartPull",
            "adopted": "unknown",
            "forgotten": "unknown",
            "part here, pulling": "expects 3",
            "all here": "expects 3",
            "all here, confirming": "expects 3",
            "landing in quarantine": "unknown",
        },
    ),
    "progress with a gap": (
        "unknown",
        {
            "waiting": "expects 0",
            "reserved": "expects 0",
            "pulling": "expects 2",
            "pulled": "expects 2",
            "sealed": "expects 3",
            "confirming": "expects 3",
            "confirm lost": "expects 3",
            "renewing": "expects 0",
            "part here": "expects 2",
            "part here, waiting": "expects 2",
            "part here, pulling": "expects 3",
            "all here": "expects 3",
            "all here, confirming": "expects 3",
            "landing": "expects 2",
            "refetching": "expects 2",
            "landing for the last time": "expects 2",
        },
    ),
    "progress too long": (
        "bad_request",
        {
            "fresh": "unknown",
            "quarantined": "unknown",
            "adopted": "unknown",
            "forgotten": "unknown",
            "landing in quarantine": "unknown",
        },
    ),
    "seal": (
        "expects 3",
        {
            "fresh": "unknown",
            "reserved": "expects 3, StartPull",
            "pulled": "expects 3, StartPull",
            "quarantined": "unknown",
            "renewing": "expects 3, StartPull",
            "adopted": "unknown",
            "forgotten": "unknown",
            "part here": "expects 3, StartPull",
            "all here": "expects 3, AskConfirm",
            "landing in quarantine": "unknown",
        },
    ),
    "seal after one block": (
        "bad_request",
        {
            "fresh": "unknown",
            "waiting": "expects 1",
            "reserved": "expects 1, StartPull",
            "quarantined": "unknown",
            "renewing": "expects 1, StartPull",
            "adopted": "unknown",
            "forgotten": "unknown",
            "part here": "expects 2, AskConfirm",
            "part here, waiting": "expects 2",
            "all here": "expects 3, AskConfirm",
            "landing in quarantine": "unknown",
        },
    ),
    "progress of another life": (
        "stale_incarnation",
        {
            "fresh": "unknown",
            "quarantined": "unknown",
            "adopted": "unknown",
            "forgotten": "unknown",
            "landing in quarantine": "unknown",
        },
    ),
    "withdrawal": (
        "aborted withdrawn, expects 0",
        {
            "fresh": "unknown",
            "pulling": "StopPull, aborted withdrawn, expects 0",
            "sealed": "StopPull, aborted withdrawn, expects 0",
            "quarantined": "unknown",
            "adopted": "unknown",
            "forgotten": "unknown",
            "part here, pulling": "StopPull, aborted withdrawn, expects 0",
            "refetching": "StopPull, aborted withdrawn, expects 0",
            "landing in quarantine": "unknown",
        },
    ),
    "pull done": (
        "ignored",
        {
            "pulling": "-",
            "sealed": "AskConfirm",
            "quarantined": "-",
            "part here, pulling": "-",
            "refetching": "LandBlocks",
        },
    ),
    "pull failed": (
        "ignored",
        {
            "pulling": "aborted pull_failed, SendAck",
            "sealed": "aborted pull_failed, SendAck",
            "quarantined": "-",
            "part here, pulling": "aborted pull_failed, SendAck",
            "refetching": "aborted pull_failed, SendAck",
        },
    ),
    "landed": (
        "ignored",
        {
            "landing": "-",
            "landing for the last time": "-",
            "landing in quarantine": "-",
        },
    ),
    "landed with a corrupt block": (
        "ignored",
        {
            "landing": "StartPull",
            "landing for the last time": "aborted corrupt, SendAck",
            "landing in quarantine": "-",
        },
    ),
    "landing failed": (
        "ignored",
        {
            "landing": "aborted pull_failed, SendAck",
            "landing for the last time": "aborted pull_failed, SendAck",
            "landing in quarantine": "-",
        },
    ),
    "confirmed": (
        "ignored",
        {
            "confirming": "LeaseAdopted, SendAck",
            "all here, confirming": "LeaseAdopted, SendAck",
        },
    ),
    "not confirmed": (
        "ignored",
        {
            "confirming": "aborted not_confirmed, SendAck",
            "all here, confirming": "aborted not_confirmed, SendAck",
        },
    ),
    "confirm lost": (
        "ignored",
        {
            "confirming": "-",
            "all here, confirming": "-",
        },
    ),
    "confirm stale": (
        "ignored",
        {
            "confirming": "aborted holder_gone",
            "all here, confirming": "aborted holder_gone",
        },
    ),
    "renewed": (
        "ignored",
        {
            "renewing": "-",
        },
    ),
    "not renewed": (
        "ignored",
        {
            "renewing": "aborted expired, SendAck",
        },
    ),
    "renew lost": (
        "ignored",
        {
            "renewing": "-",
        },
    ),
    "renew stale": (
        "ignored",
        {
            "renewing": "aborted holder_gone",
        },
    ),
    "ack arrived": (
        "ignored",
        {
            "quarantined": "-",
            "adopted": "-",
            "landing in quarantine": "-",
        },
    ),
    "ack lost": (
        "ignored",
        {
            "quarantined": "-",
            "adopted": "-",
            "landing in quarantine": "-",
        },
    ),
    "cancel": (
        "aborted cancelled, SendAck",
        {
            "fresh": "ignored",
            "pulling": "StopPull, aborted cancelled, SendAck",
            "sealed": "StopPull, aborted cancelled, SendAck",
            "quarantined": "ignored",
            "adopted": "ignored",
            "forgotten": "ignored",
            "part here, pulling": "StopPull, aborted cancelled, SendAck",
            "refetching": "StopPull, aborted cancelled, SendAck",
            "landing in quarantine": "ignored",
        },
    ),
    "holder gone": (
        "aborted holder_gone",
        {
            "fresh": "ignored",
            "pulling": "StopPull, aborted holder_gone",
            "sealed": "StopPull, aborted holder_gone",
            "quarantined": "-",
            "adopted": "-",
            "forgotten": "ignored",
            "part here, pulling": "StopPull, aborted holder_gone",
            "refetching": "StopPull, aborted holder_gone",
            "landing in quarantine": "-",
        },
    ),
    "blocks freed": (
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
        ends = [
            each.lease_id
            for event in (first, second)
            for each in bench.feed(event)
            if isinstance(each, LeaseAdopted | LeaseAborted)
        ]
        assert len(ends) == len(set(ends)), (first, second)


def test_offer_to_adoption() -> None:
    bench = Bench()
    assert _word(bench.feed(offered())[0]) == "reserved"
    bench.feed(ProgressArrived(progress(0, 4, 5)))
    reply, pull = bench.last
    assert reply == ReplyProgress(ProgressReply(known=True, expected=2))
    assert pull == StartPull(
        lease_id=LEASE,
        holder=HOLDER,
        endpoints={"memory": b"pool"},
        pairs=((BlockId(4), BlockId(0)), (BlockId(5), BlockId(1))),
    )
    bench.feed(ProgressArrived(progress(2, 6, seal=SEAL)))
    (tail,) = bench.feed(DONE)
    assert isinstance(tail, StartPull)
    assert tail.pairs == ((BlockId(6), BlockId(2)),)
    (question,) = bench.feed(DONE)
    assert isinstance(question, AskConfirm)
    assert (question.holder, question.body.lease_id) == (HOLDER, LEASE)
    adopted, ack = bench.feed(ConfirmAnswered(LEASE, ConfirmReply(stands=True)))
    owner = f"owner of {LEASE}"
    assert adopted == LeaseAdopted(lease_id=LEASE, owner=owner, blocks=[BlockId(0), BlockId(1), BlockId(2)], seal=SEAL)
    assert isinstance(ack, SendAck)
    assert bench.ledger.blocks_of(owner) == [0, 1, 2]
    bench.feed(AckEnded(KEY, None))
    assert bench.reader.idle
    assert bench.reader.next_due_s() is None
    counters = bench.reader.counters
    assert (counters.pulls, counters.pulled_bytes, counters.wire_s) == (2, 6, 1.0)


def test_seal_before_the_reservation_needs_no_second_message() -> None:
    bench = Bench().waiting()
    bench.feed(ProgressArrived(progress(0, 4, 5, 6, seal=SEAL)))
    bench.ledger.release_all("others")
    (pull,) = bench.feed(BlocksFreed())
    assert isinstance(pull, StartPull)
    assert len(pull.pairs) == 3
    (question,) = bench.feed(DONE)
    assert isinstance(question, AskConfirm)


def test_large_pulls_are_cut() -> None:
    bench = Bench()
    layout_bytes = IDENTITY.layout.block_bytes
    bench.reader = Reader(bench.ledger, IDENTITY, ("memory",), max_pull_bytes=2 * layout_bytes)
    bench.feed(offered(), ProgressArrived(progress(0, 4, 5, 6)))
    assert [len(each.pairs) for each in bench.last if isinstance(each, StartPull)] == [2]
    (rest,) = bench.feed(DONE)
    assert isinstance(rest, StartPull)
    assert len(rest.pairs) == 1


def test_announcements_may_repeat_overlap_and_lack_their_beginning() -> None:
    bench = Bench().reserved()
    for message, expected in (
        (progress(1, 5), 0),
        (progress(0, 4), 1),
        (progress(0, 4), 1),
        (progress(0, 4, 5), 2),
        (progress(2, 6, seal=SEAL), 3),
        (progress(1, 5, 6, seal=SEAL), 3),
        (progress(0, 4), 3),
    ):
        bench.feed(ProgressArrived(message))
        assert bench.last[0] == ReplyProgress(ProgressReply(known=True, expected=expected))


@pytest.mark.parametrize(
    "message",
    [
        progress(-1, 4),
        progress(3, 7),
        progress(0, 4, seal=SEAL),
        progress(0, seal=SEAL),
    ],
)
def test_contradicting_announcements_are_refused(message: object) -> None:
    bench = Bench().reserved()
    bench.feed(ProgressArrived(progress(0, 4, 5)))
    assert isinstance(message, type(progress(0)))
    (refusal,) = bench.feed(ProgressArrived(message))
    assert isinstance(refusal, RefuseProgress)
    assert isinstance(refusal.error, BadRequest)


def test_nothing_is_announced_after_the_seal() -> None:
    bench = Bench().reserved()
    bench.feed(ProgressArrived(progress(0, 4, 5, seal=SEAL)))
    (refusal,) = bench.feed(ProgressArrived(progress(2, 6)))
    assert isinstance(refusal, RefuseProgress)
    assert "sealed at 2" in refusal.error.message


def refused(bench: Bench, event: Offered) -> Exception:
    (refusal,) = bench.feed(event)
    assert isinstance(refusal, RefuseOffer)
    assert bench.reader.num_leases == 0
    return refusal.error


def test_offers_wait_in_order_and_are_not_overtaken() -> None:
    bench = Bench(max_waiting=3)
    bench.ledger.allocate("others", 6)
    ids = [LeaseId(f"p0/7/{number}") for number in range(4)]
    verdicts = [_word(bench.feed(offered(each, n))[0]) for each, n in zip(ids[:3], (2, 4, 1), strict=True)]
    assert verdicts == ["reserved", "waiting", "waiting"]
    assert bench.reader.leases_by_state()["waiting"] == 2
    bench.feed(offered(ids[3], 1))
    assert _word(bench.last[0]) == "waiting"
    (refusal,) = bench.feed(offered(LeaseId("p0/7/9"), 1))
    assert isinstance(refusal, RefuseOffer)
    assert isinstance(refusal.error, NoCapacity)
    bench.ledger.release("others", [BlockId(0), BlockId(1), BlockId(2)])
    bench.feed(BlocksFreed())
    assert bench.reader.leases_by_state()["waiting"] == 3
    bench.ledger.release("others", [BlockId(3)])
    bench.feed(BlocksFreed())
    assert bench.reader.leases_by_state()["waiting"] == 2
    assert sorted(bench.ledger.reserved_blocks(ids[1])) == [0, 1, 2, 3]


def test_an_aborted_lease_makes_room_for_a_waiting_one() -> None:
    bench = Bench()
    bench.feed(offered(LeaseId("big"), 8), offered())
    assert _word(bench.last[0]) == "waiting"
    bench.feed(CancelRequested(LeaseId("big"), "client left"))
    assert bench.reader.leases_by_state() == {
        "waiting": 0,
        "reserved": 1,
        "pulling": 0,
        "confirming": 0,
        "quarantined": 0,
    }


def test_quarantine_lasts_until_the_transport_says_so() -> None:
    bench = Bench().quarantined()
    stop, aborted, _ack = bench.last
    assert stop == StopPull(LEASE)
    assert isinstance(aborted, LeaseAborted)
    assert isinstance(aborted.error, Cancelled)
    assert bench.ledger.load()["quarantined_blocks"] == 3
    bench.feed(AckEnded(KEY, None))
    assert bench.after(1e6) == []
    assert not bench.reader.idle
    assert bench.reader.lease_ids() == []
    bench.feed(DONE)
    assert bench.ledger.load()["free_blocks"] == 8
    assert bench.reader.idle


def test_quarantine_outlives_the_memory_of_ended_leases() -> None:
    bench = Bench().quarantined()
    bench.feed(*(ProgressArrived(progress(0, withdrawn="x", lease_id=LeaseId(str(n)))) for n in range(5000)))
    (refusal,) = bench.feed(offered())
    assert isinstance(refusal, RefuseOffer)
    assert isinstance(refusal.error, TransferAborted)


def test_withdrawal_may_overtake_its_offer() -> None:
    bench = Bench()
    bench.feed(ProgressArrived(progress(0, withdrawn="cancelled")))
    error = refused(bench, offered())
    assert isinstance(error, TransferAborted)
    assert "cancelled" in str(error)


def test_memory_of_ended_leases_is_bounded() -> None:
    bench = Bench()
    for number in range(MAX_ENDED_LEASES + 1):
        bench.reader.handle(ProgressArrived(progress(0, withdrawn="x", lease_id=LeaseId(str(number)))), 0.0)
    assert _word(bench.feed(offered(LeaseId("0")))[0]) == "reserved"
    assert _word(bench.feed(offered(LeaseId("1")))[0]) == "transfer_aborted"


def test_an_offer_grants_half_its_term() -> None:
    bench = Bench().reserved()
    (question,) = bench.after(TTL_S / 4)
    assert isinstance(question, AskRenew)
    while bench.reader.num_leases:
        if any(isinstance(each, AskRenew) for each in bench.last):
            bench.feed(RenewFailed(KEY, DeadlineExceeded("late")))
        bench.until_due()
    assert bench.now_s == 100.0 + TTL_S / 2
    aborted = [each for each in bench.last if isinstance(each, LeaseAborted)]
    assert [each.reason for each in aborted] == [AbortReason.EXPIRED]


def test_renewal_counts_from_the_asking() -> None:
    bench = Bench().reserved()
    (question,) = bench.until_due()
    assert isinstance(question, AskRenew)
    asked_s = bench.now_s
    assert question.body.lease_ids == (LEASE,)
    bench.now_s += 1.0
    assert bench.feed(RenewAnswered(KEY, RenewReply(alive=(LEASE,), ttl_s=TTL_S))) == []
    assert bench.reader.next_due_s() == asked_s + TTL_S / 3
    (again,) = bench.until_due()
    assert isinstance(again, AskRenew)
    assert bench.after(TTL_S / 3) == []
    bench.after(TTL_S / 3 + 0.001)
    assert bench.reader.num_leases == 0
    assert bench.now_s == pytest.approx(asked_s + TTL_S, abs=0.01)


def test_leases_of_one_holder_are_renewed_together() -> None:
    bench = Bench().reserved()
    bench.now_s += 1.0
    bench.feed(offered(LeaseId("p0/7/2"), 1))
    (question,) = bench.until_due()
    assert isinstance(question, AskRenew)
    assert question.body.lease_ids == (LEASE, "p0/7/2")
    bench.feed(RenewAnswered(KEY, RenewReply(alive=(LeaseId("p0/7/2"),), ttl_s=TTL_S)))
    assert bench.reader.lease_ids() == ["p0/7/2"]


def test_confirmation_is_asked_again_while_the_term_lasts() -> None:
    bench = Bench().confirming()
    asked = 1
    while bench.reader.num_leases:
        if any(isinstance(each, AskConfirm) for each in bench.last):
            bench.feed(ConfirmFailed(LEASE, DeadlineExceeded("late")))
        elif any(isinstance(each, AskRenew) for each in bench.last):
            bench.feed(RenewFailed(KEY, DeadlineExceeded("late")))
        bench.until_due()
        asked += sum(isinstance(each, AskConfirm) for each in bench.last)
    assert asked > 4
    assert bench.now_s == 100.0 + TTL_S / 2
    assert bench.ledger.load()["free_blocks"] == 8


def test_acknowledgements_gather_while_one_is_under_way_and_are_given_up_in_the_end() -> None:
    bench = Bench().adopted()
    bench.feed(offered(LeaseId("p0/7/2"), 1), CancelRequested(LeaseId("p0/7/2"), "client left"))
    assert [type(each) for each in bench.last] == [LeaseAborted]
    (ack,) = bench.feed(AckEnded(KEY, None))
    assert isinstance(ack, SendAck)
    assert ack.body.lease_ids == ("p0/7/2",)
    while not bench.reader.idle:
        if any(isinstance(each, SendAck) for each in bench.last):
            bench.feed(AckEnded(KEY, LOST))
        if not bench.reader.idle:
            bench.until_due()
    assert bench.now_s < 100.0 + 3 * TTL_S
    assert bench.reader.next_due_s() is None


def test_older_life_of_a_holder_is_refused() -> None:
    bench = Bench()
    bench.feed(offered(LeaseId("p0/8/1"), 1, NEXT_LIFE))
    (refusal,) = bench.feed(offered())
    assert isinstance(refusal, RefuseOffer)
    assert isinstance(refusal.error, StaleIncarnation)
    assert bench.reader.lease_ids() == ["p0/8/1"]


def test_repr() -> None:
    assert repr(Bench().reserved().reader) == (
        "<Reader [0 waiting, 1 reserved, 0 pulling, 0 confirming, 0 quarantined | 1 holders]>"
    )


def test_check_finds_damage() -> None:
    bench = Bench().reserved()
    vars(bench.reader)["_waiting"][LEASE] = vars(bench.reader)["_leases"][LEASE]
    with pytest.raises(InvariantBroken, match="0 leases wait, 1 queued"):
        bench.reader.check()


# --- landings -------------------------------------------------------------------------------------------


def checksummed(lease_id: LeaseId = LEASE) -> Offered:
    return Offered(terms=msgspec.structs.replace(terms(lease_id), checksums=True), owner="r")


def test_pulled_blocks_are_compared_and_only_bad_ones_pulled_again() -> None:
    bench = Bench(lands=True)
    bench.feed(checksummed(), ProgressArrived(progress(0, 4, 5, 6, seal=SEAL, checksums=(11, 12, 13))))
    (work,) = bench.feed(DONE)
    assert work == LandBlocks(lease_id=LEASE, blocks=(BlockId(0), BlockId(1), BlockId(2)), checksums=(11, 12, 13))
    (again,) = bench.feed(Landed(LEASE, Landing(corrupt=(0, 2), num_bytes=192, checksum_s=0.5)))
    assert isinstance(again, StartPull)
    assert again.pairs == ((BlockId(4), BlockId(0)), (BlockId(6), BlockId(2)))
    (work,) = bench.feed(DONE)
    assert work == LandBlocks(lease_id=LEASE, blocks=(BlockId(0), BlockId(2)), checksums=(11, 13))
    (question,) = bench.feed(Landed(LEASE, Landing(num_bytes=128, checksum_s=0.25)))
    assert isinstance(question, AskConfirm)
    counters = bench.reader.counters
    assert (counters.corrupt_blocks, counters.refetched_blocks) == (2, 2)
    assert (counters.checksum_bytes, counters.checksum_s) == (320, 0.75)


def test_each_piece_has_its_own_refetches() -> None:
    bench = Bench(lands=True)
    bench.feed(checksummed(), ProgressArrived(progress(0, 4, 5, checksums=(11, 12))))
    bench.feed(DONE, CORRUPT, DONE, CORRUPT_AGAIN, DONE, LANDED)
    bench.feed(ProgressArrived(progress(2, 6, seal=SEAL, checksums=(13,))))
    bench.feed(DONE, CORRUPT_AGAIN, DONE, CORRUPT_AGAIN, DONE)
    (question,) = bench.feed(LANDED)
    assert isinstance(question, AskConfirm)


def test_corruption_names_the_lease_the_block_and_the_way() -> None:
    bench = Bench(lands=True)
    bench.feed(checksummed(), ProgressArrived(progress(0, 4, 5, 6, checksums=(11, 12, 13))))
    bench.feed(DONE, CORRUPT, DONE, CORRUPT_AGAIN, DONE, CORRUPT_AGAIN)
    (aborted, _ack) = bench.last
    assert isinstance(aborted, LeaseAborted)
    assert (type(aborted.error), aborted.reason) == (CorruptKv, AbortReason.CORRUPT)
    for part in (f"lease {LEASE}", "block 1 of 3", "5 of p0", "1 here", "3 pulls over memory"):
        assert part in aborted.error.message
    assert bench.ledger.load()["free_blocks"] == 8


def test_blocks_being_checked_are_quarantined_until_that_is_over() -> None:
    bench = Bench(lands=True).landing_in_quarantine()
    assert bench.ledger.load()["quarantined_blocks"] == 3
    bench.feed(AckEnded(KEY, None))
    assert bench.after(1e6) == []
    bench.feed(CORRUPT)
    assert bench.reader.idle
    assert bench.ledger.load()["free_blocks"] == 8


@pytest.mark.parametrize("checksums", [(), (11,), (11, 12, 13)])
def test_announcement_with_a_wrong_number_of_checksums_is_refused(checksums: tuple[int, ...]) -> None:
    bench = Bench(lands=True)
    (refusal,) = bench.feed(checksummed(), ProgressArrived(progress(0, 4, 5, checksums=checksums)))
    assert isinstance(refusal, RefuseProgress)
    assert f"{len(checksums)} checksums of 2 blocks" in refusal.error.message


# --- terms of a renewal ---------------------------------------------------------------------------------


def test_a_lease_near_its_end_does_not_cut_the_renewal_of_others_short() -> None:
    bench = Bench()
    bench.feed(offered())
    # Nine tenths of this one's term are over before it comes.
    late = Offered(terms=terms(LeaseId("p0/7/2"), num_blocks=1, ttl_s=0.2), owner="late")
    bench.feed(late)
    (question,) = bench.until_due()
    assert isinstance(question, AskRenew)
    assert question.body.lease_ids == ("p0/7/2", LEASE)
    assert question.timeout_s == 1.0
    # The late one ends meanwhile; the answer still serves the other.
    bench.after(0.06)
    assert bench.reader.lease_ids() == [LEASE]
    bench.now_s += 0.5
    assert bench.feed(RenewAnswered(KEY, RenewReply(alive=(LEASE,), ttl_s=TTL_S))) == []
    assert bench.reader.lease_ids() == [LEASE]


def test_a_short_term_survives_lost_renewals() -> None:
    """Two lost in a row, each taking as long as it may: the third comes before the term is over."""
    bench = Bench()
    bench.feed(Offered(terms=terms(ttl_s=1.0), owner="r"))
    bench.until_due()
    bench.feed(RenewAnswered(KEY, RenewReply(alive=(LEASE,), ttl_s=1.0)))
    for _ in range(2):
        (question,) = bench.until_due()
        assert isinstance(question, AskRenew)
        bench.now_s += question.timeout_s
        bench.feed(RenewFailed(KEY, DeadlineExceeded("lost")))
    (third,) = bench.until_due()
    assert isinstance(third, AskRenew)


# --- offers that carry what is final --------------------------------------------------------------------


def carrying(body: ProgressRequest) -> Offered:
    return Offered(terms=msgspec.structs.replace(terms(), progress=body), owner="r")


def test_an_offer_that_carries_everything_is_pulled_at_once() -> None:
    bench = Bench()
    pull, verdict = bench.feed(carrying(progress(0, 4, 5, 6, seal=SEAL)))[:2]
    assert isinstance(pull, StartPull)
    assert len(pull.pairs) == 3
    assert verdict == Verdict(HandoffReply(verdict="reserved", expected=3))
    (question,) = bench.feed(DONE)
    assert isinstance(question, AskConfirm)


def test_a_repeated_offer_may_bring_more() -> None:
    bench = Bench()
    bench.feed(carrying(progress(0, 4)))
    (verdict,) = bench.feed(carrying(progress(0, 4, 5, 6, seal=SEAL)))
    assert verdict == Verdict(HandoffReply(verdict="reserved", expected=3))


@pytest.mark.parametrize(
    "body",
    [
        progress(0, 4, 5, 6, 7),
        progress(0, 4, lease_id=LeaseId("another")),
        progress(0, 4, incarnation=Incarnation(99)),
        progress(0, withdrawn="gone"),
    ],
    ids=["too many", "another lease", "another life", "withdrawn"],
)
def test_an_offer_that_contradicts_itself_starts_nothing(body: ProgressRequest) -> None:
    bench = Bench()
    assert isinstance(refused(bench, carrying(body)), BadRequest)
    assert bench.reader.idle


# --- offers that do not wait --------------------------------------------------------------------------------------


def test_an_offer_that_does_not_wait_is_refused_without_room_and_leaves_nothing() -> None:
    bench = Bench()
    bench.ledger.allocate("others", 6)
    (refused,) = bench.feed(replace(offered(), waits=False))
    assert isinstance(refused, RefuseOffer)
    assert isinstance(refused.error, NoCapacity)
    assert (bench.reader.num_leases, bench.reader.num_waiting) == (0, 0)


def test_an_offer_that_does_not_wait_takes_what_is_there_also_before_those_that_wait() -> None:
    bench = Bench()
    bench.ledger.allocate("others", 5)
    bench.feed(offered(LeaseId("p0/7/2"), num_blocks=4))
    assert bench.reader.num_waiting == 1
    instructions = bench.feed(replace(offered(), waits=False))
    assert any(isinstance(each, Verdict) and each.reply.verdict == "reserved" for each in instructions)
    assert bench.reader.num_waiting == 1
    assert len(bench.ledger.reserved_blocks(LEASE)) == 3


def test_an_offer_that_does_not_wait_is_not_asked_about() -> None:
    ledger = Ledger(8)
    reader = Reader(ledger, IDENTITY, ("memory",), may_reserve=lambda: False)
    reader.handle(replace(offered(), waits=False), 100.0)
    assert ledger.is_reserved(LEASE)


@pytest.mark.parametrize("waits", [True, False])
def test_blocks_that_may_not_be_given_up_are_no_room(*, waits: bool) -> None:
    class Keeper:
        def victims(self, num_blocks: int) -> tuple[BlockId, ...]:
            return ()

    bench = Bench()
    for number, block in enumerate(bench.ledger.allocate("others", 6) or ()):
        bench.ledger.set_key(block, bytes([number]))
    bench.ledger.release_all("others")
    bench.ledger.evictor = Keeper()
    assert bench.ledger.available_blocks == 8
    assert _word(bench.feed(replace(offered(), waits=waits))[0]) == ("waiting" if waits else "no_capacity")
    bench.ledger.evictor = None
    assert _word(bench.feed(replace(offered(), waits=waits))[0]) == ("waiting" if waits else "reserved")
    assert bench.ledger.is_reserved(LEASE)


# --- leases of which leading blocks are here ------------------------------------------------------------------------


def sources(instructions: list[ReaderInstruction]) -> list[int]:
    """The holder's blocks that are pulled."""
    return [source for each in instructions if isinstance(each, StartPull) for source, _ in each.pairs]


def adopted_by(bench: Bench) -> list[BlockId]:
    """What a confirmation that is answered with yes brings."""
    adopted, *_ = bench.feed(ConfirmAnswered(LEASE, ConfirmReply(stands=True)))
    assert isinstance(adopted, LeaseAdopted)
    assert bench.ledger.blocks_of(adopted.owner) == adopted.blocks
    return adopted.blocks


@pytest.mark.parametrize(
    "body", [progress(0, 4, 5, 6, seal=SEAL), progress(2, 6, seal=SEAL)], ids=["whole", "the rest"]
)
def test_what_is_here_is_neither_set_aside_nor_pulled(body: ProgressRequest) -> None:
    bench = Bench()
    assert bench.feed(having(2)) == [Verdict(HandoffReply(verdict="reserved", expected=2))]
    assert len(bench.ledger.reserved_blocks(LEASE)) == 1
    bench.feed(ProgressArrived(body))
    assert sources(bench.last) == [6]
    (question,) = bench.feed(DONE)
    assert isinstance(question, AskConfirm)
    assert adopted_by(bench) == [0]


def test_a_lease_of_which_all_is_here_waits_for_its_seal_and_is_confirmed() -> None:
    bench = Bench()
    bench.feed(having(3))
    assert bench.ledger.reserved_blocks(LEASE) == []
    assert bench.feed(ProgressArrived(progress(0, 4, 5))) == [ReplyProgress(ProgressReply(known=True, expected=3))]
    reply, question = bench.feed(ProgressArrived(progress(3, seal=SEAL)))
    assert reply == ReplyProgress(ProgressReply(known=True, expected=3))
    assert isinstance(question, AskConfirm)
    assert adopted_by(bench) == []
    assert isinstance(bench.last[-1], SendAck)
    assert bench.ledger.load()["free_blocks"] == 8


@pytest.mark.parametrize("num_here", range(4))
def test_an_offer_that_carries_everything_brings_what_is_not_here(num_here: int) -> None:
    bench = Bench()
    bench.feed(replace(carrying(progress(0, 4, 5, 6, seal=SEAL)), have=num_here))
    assert sources(bench.last) == [4, 5, 6][num_here:]
    assert Verdict(HandoffReply(verdict="reserved", expected=3)) in bench.last
    assert any(isinstance(each, AskConfirm) for each in bench.last) == (num_here == 3)


def test_what_was_here_at_the_first_offer_counts() -> None:
    bench = Bench()
    bench.feed(having(2))
    assert bench.feed(having(0)) == [Verdict(HandoffReply(verdict="reserved", expected=2))]
    bench.feed(having(99), ProgressArrived(progress(0, 4, 5, 6, seal=SEAL)))
    assert sources(bench.last) == [6]


def test_a_waiting_offer_keeps_what_is_here_and_needs_room_for_the_rest() -> None:
    bench = Bench()
    bench.ledger.allocate("others", 8)
    assert bench.feed(having(2)) == [Verdict(HandoffReply(verdict="waiting", expected=2))]
    bench.ledger.release("others", [BlockId(5)])
    bench.feed(BlocksFreed())
    assert bench.ledger.reserved_blocks(LEASE) == [5]
    bench.feed(ProgressArrived(progress(2, 6, seal=SEAL)))
    assert bench.last[1:] == [
        StartPull(lease_id=LEASE, holder=HOLDER, endpoints={"memory": b"pool"}, pairs=((BlockId(6), BlockId(5)),))
    ]


@pytest.mark.parametrize("num_here", [-1, 4])
def test_what_cannot_be_here_is_refused(num_here: int) -> None:
    bench = Bench()
    error = refused(bench, having(num_here))
    assert isinstance(error, BadRequest)
    assert f"{num_here} of them cannot stand here" in error.message
    assert bench.reader.idle


def test_a_lease_larger_than_the_pool_fits_where_its_beginning_is_here() -> None:
    bench = Bench()
    assert isinstance(refused(bench, offered(num_blocks=9)), BadRequest)
    bench.feed(replace(offered(num_blocks=9), have=1))
    assert len(bench.ledger.reserved_blocks(LEASE)) == 8


@pytest.mark.parametrize(("num_here", "num_sealed"), list(itertools.product(range(4), range(1, 4))))
def test_adopted_is_what_was_not_here_up_to_the_seal(num_here: int, num_sealed: int) -> None:
    bench = Bench()
    bench.feed(having(num_here))
    bench.feed(ProgressArrived(progress(0, *[4, 5, 6][:num_sealed], seal=SEAL)))
    assert bench.last[0] == ReplyProgress(ProgressReply(known=True, expected=max(num_here, num_sealed)))
    assert sources(bench.last) == [4, 5, 6][num_here:num_sealed]
    if num_sealed > num_here:
        bench.feed(DONE)
    assert isinstance(bench.last[-1], AskConfirm)
    num_adopted = max(0, num_sealed - num_here)
    assert adopted_by(bench) == [0, 1, 2][:num_adopted]
    assert bench.ledger.load()["free_blocks"] == 8 - num_adopted


def test_blocks_set_aside_beyond_the_seal_go_to_who_waits() -> None:
    bench = Bench()
    waiting = LeaseId("p0/7/2")
    bench.feed(offered(num_blocks=8), offered(waiting, 7), ProgressArrived(progress(0, 4, seal=SEAL)), DONE)
    assert adopted_by(bench) == [0]
    assert len(bench.ledger.reserved_blocks(waiting)) == 7


def test_a_seal_before_blocks_that_were_announced_and_skipped_is_refused() -> None:
    bench = Bench()
    (refusal,) = bench.feed(having(3), ProgressArrived(progress(0, 4, 5)), ProgressArrived(progress(0, 4, seal=SEAL)))
    assert isinstance(refusal, RefuseProgress)
    assert "sealed at block 1, 2 known" in refusal.error.message


def test_of_blocks_that_are_here_no_checksum_is_compared() -> None:
    bench = Bench(lands=True)
    bench.feed(replace(checksummed(), have=1), ProgressArrived(progress(0, 4, 5, 6, seal=SEAL, checksums=(11, 12, 13))))
    (work,) = bench.feed(DONE)
    assert work == LandBlocks(lease_id=LEASE, blocks=(BlockId(0), BlockId(1)), checksums=(12, 13))
    bench.feed(CORRUPT, DONE, CORRUPT_AGAIN, DONE)
    (aborted, _ack) = bench.feed(CORRUPT_AGAIN)
    assert isinstance(aborted, LeaseAborted)
    for part in ("block 2 of 3", "6 of p0", "1 here"):
        assert part in aborted.error.message


@given(data=st.data())
def test_whatever_is_announced_in_whatever_pieces_the_rest_is_pulled_once_and_in_order(data: st.DataObject) -> None:
    num_blocks = data.draw(st.integers(1, 7), label="blocks")
    num_here = data.draw(st.integers(0, num_blocks), label="here")
    num_sealed = data.draw(st.integers(1, num_blocks), label="sealed")
    pieces = data.draw(st.lists(st.tuples(st.integers(0, num_sealed), st.integers(0, num_sealed))), label="pieces")
    bench = Bench()
    block_ids = [100 + position for position in range(num_sealed)]
    bench.feed(replace(offered(num_blocks=num_blocks), have=num_here))
    pulled: list[int] = []
    for start, stop in [*map(sorted, pieces), (0, num_sealed)]:
        whole = (start, stop) == (0, num_sealed)
        bench.feed(ProgressArrived(progress(start, *block_ids[start:stop], seal=SEAL if whole else None)))
        while (now := sources(bench.last)) or any(isinstance(each, AskConfirm) for each in bench.last):
            pulled += now
            if not now:
                break
            bench.feed(DONE)
    assert pulled == block_ids[num_here:]
    assert len(adopted_by(bench)) == len(pulled)
