"""The reader's machine: every event in every state, terms, retries, waiting, and quarantine."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
    TransferAborted,
    WorkerUnavailable,
)
from contracts.ids import BlockId, Incarnation, LeaseId
from contracts.messages import ConfirmReply, Peer, ProgressReply, RenewReply
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


def offered(lease_id: LeaseId = LEASE, num_blocks: int = 3, holder: Peer = HOLDER) -> Offered:
    return Offered(terms=terms(lease_id, num_blocks=num_blocks, holder=holder), owner=f"owner of {lease_id}")


class Bench:
    """One reader with a pool of eight blocks, on a hand-set clock."""

    def __init__(self, *, max_waiting: int = 4) -> None:
        self.now_s = 100.0
        self.ledger = Ledger(8)
        self.reader = Reader(self.ledger, IDENTITY, ("memory",), max_waiting=max_waiting, max_pull_bytes=10 * 64)
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

    def forgotten(self) -> Bench:
        self.adopted().feed(AckEnded(KEY, None))
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
}

EVENTS: dict[str, ReaderEvent] = {
    "offer": offered(),
    "offer of the holder's next life": offered(LeaseId("p0/8/1"), 1, NEXT_LIFE),
    "progress": ProgressArrived(progress(0, 4, 5)),
    "progress with a gap": ProgressArrived(progress(1, 5)),
    "progress too long": ProgressArrived(progress(0, 4, 5, 6, 7)),
    "seal": ProgressArrived(progress(0, 4, 5, 6, seal=SEAL)),
    "progress of another life": ProgressArrived(progress(0, 4, incarnation=NEXT_LIFE.incarnation)),
    "withdrawal": ProgressArrived(progress(0, withdrawn="cancelled")),
    "pull done": DONE,
    "pull failed": FAILED,
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
        },
    ),
    "progress": (
        "unknown",
        {
            "waiting": "expects 2",
            "reserved": "expects 2, StartPull",
            "pulling": "expects 2",
            "pulled": "expects 2",
            "sealed": "expects 3",
            "confirming": "expects 3",
            "confirm lost": "expects 3",
            "renewing": "expects 2, StartPull",
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
        },
    ),
    "progress too long": (
        "bad_request",
        {"fresh": "unknown", "quarantined": "unknown", "adopted": "unknown", "forgotten": "unknown"},
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
        },
    ),
    "progress of another life": (
        "stale_incarnation",
        {"fresh": "unknown", "quarantined": "unknown", "adopted": "unknown", "forgotten": "unknown"},
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
        },
    ),
    "pull done": ("ignored", {"pulling": "-", "sealed": "AskConfirm", "quarantined": "-"}),
    "pull failed": (
        "ignored",
        {
            "pulling": "aborted pull_failed, SendAck",
            "sealed": "aborted pull_failed, SendAck",
            "quarantined": "-",
        },
    ),
    "confirmed": ("ignored", {"confirming": "LeaseAdopted, SendAck"}),
    "not confirmed": ("ignored", {"confirming": "aborted not_confirmed, SendAck"}),
    "confirm lost": ("ignored", {"confirming": "-"}),
    "confirm stale": ("ignored", {"confirming": "aborted holder_gone"}),
    "renewed": ("ignored", {"renewing": "-"}),
    "not renewed": ("ignored", {"renewing": "aborted expired, SendAck"}),
    "renew lost": ("ignored", {"renewing": "-"}),
    "renew stale": ("ignored", {"renewing": "aborted holder_gone"}),
    "ack arrived": ("ignored", {"quarantined": "-", "adopted": "-"}),
    "ack lost": ("ignored", {"quarantined": "-", "adopted": "-"}),
    "cancel": (
        "aborted cancelled, SendAck",
        {
            "fresh": "ignored",
            "pulling": "StopPull, aborted cancelled, SendAck",
            "sealed": "StopPull, aborted cancelled, SendAck",
            "quarantined": "ignored",
            "adopted": "ignored",
            "forgotten": "ignored",
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
        },
    ),
    "blocks freed": ("-", {}),
    "tick": ("-", {}),
}


@pytest.mark.parametrize("event", EVENTS)
def test_every_event_in_every_state(event: str) -> None:
    common, special = TABLE[event]
    actual = {state: describe(build(Bench()), EVENTS[event]) for state, build in STATES.items()}
    assert actual == {state: special.get(state, common) for state in STATES}


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


def test_refusals_name_both_sides() -> None:
    other = msgspec.structs.replace(IDENTITY, rope_base=5.0)
    error = refused(Bench(), Offered(terms=terms(identity=other), owner="r"))
    assert isinstance(error, IncompatiblePeer)
    assert "rope_base: 10000.0 here, 5.0 there" in str(error)
    error = refused(Bench(), Offered(terms=terms(transport="ucx"), owner="r"))
    assert isinstance(error, IncompatiblePeer)
    assert "memory here, ucx there" in str(error)
    error = refused(Bench(), offered(num_blocks=9))
    assert isinstance(error, BadRequest)
    assert "9 blocks can never fit: this pool has 8" in str(error)
    assert isinstance(refused(Bench(), offered(num_blocks=0)), BadRequest)
    assert isinstance(refused(Bench(), Offered(terms=terms(ttl_s=0.0), owner="r")), BadRequest)


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
