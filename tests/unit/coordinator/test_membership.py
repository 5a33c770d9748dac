"""Membership as a machine: lives and their ends, silence, fencing, and placements that no heartbeat shows yet."""

from __future__ import annotations

import msgspec
import pytest

from contracts.errors import StaleIncarnation
from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import (
    DispatchItem,
    Peer,
    Placement,
    TransferReport,
    WorkerInfo,
    WorkerLoad,
)
from coordinator import Membership, MembershipLimits
from coordinator.membership import LONGEST_GAP_S, LOOK_INTERVAL_S
from coordinator.policy import DispatchLimits, dispatch

LIMITS = MembershipLimits()
INFO = WorkerInfo(
    worker_id=WorkerId("p0"),
    incarnation=Incarnation(1),
    role="mixed",
    address="127.0.0.1:1",
    model="m",
    identity=KvIdentity(
        model_fingerprint="m",
        layout=BlockLayout(num_layers=1, num_kv_heads=1, head_dim=8, block_tokens=8, dtype="float32"),
        rope_base=10000.0,
        protocol_version=1,
    ),
    total_blocks=10,
    max_context_tokens=64,
)


P0 = WorkerId("p0")


def life(incarnation: int, worker_id: WorkerId = P0) -> WorkerInfo:
    return msgspec.structs.replace(INFO, worker_id=worker_id, incarnation=Incarnation(incarnation))


def placed_on(name: str) -> Placement:
    peer = Peer(worker_id=WorkerId(name), incarnation=Incarnation(1), address="127.0.0.1:1")
    return Placement(request_id=RequestId("r"), prefill=peer, decode=peer, reason="")


def gone(membership: Membership, now_s: float) -> list[tuple[str, int]]:
    return [(each.worker_id, each.incarnation) for each in membership.gone(now_s)]


def beat(membership: Membership, now_s: float, incarnation: int = 1, load: WorkerLoad | None = None) -> bool:
    return membership.heartbeat(P0, Incarnation(incarnation), load or WorkerLoad(), now_s)


def pass_time(membership: Membership, from_s: float, to_s: float) -> list[str]:
    """Looks as the shell does, and once at the very end; what was said."""
    lost: list[str] = []
    now_s = from_s
    while now_s < to_s:
        now_s = min(to_s, now_s + LOOK_INTERVAL_S)
        lost += membership.expire(now_s)
    return lost


@pytest.fixture
def membership() -> Membership:
    machine = Membership(LIMITS)
    machine.register(life(1), 0.0)
    return machine


def test_a_silent_worker_is_dead_after_the_timeout_for_good(membership: Membership) -> None:
    assert pass_time(membership, 0.0, 3.0) == []
    assert len(membership.live(3.0).infos) == 1
    assert pass_time(membership, 3.0, 3.01) == ["p0 incarnation 1: no heartbeat for 3.0 s"]
    assert membership.live(3.01).infos == ()
    assert membership.members(3.01) == ()
    assert gone(membership, 3.01) == [("p0", 1)]
    why = r"given up and is not taken up again: no heartbeat for 3\.0 s"
    with pytest.raises(StaleIncarnation, match=why):
        beat(membership, 3.2)
    with pytest.raises(StaleIncarnation, match=why):
        membership.register(life(1), 3.2)
    membership.register(life(2), 3.4)
    assert [info.incarnation for info in membership.live(3.4).infos] == [2]
    assert beat(membership, 3.5, incarnation=2)


def test_whoever_asks_first_finds_the_dead(membership: Membership) -> None:
    """No answer depends on whether the shell has looked in between."""
    pass_time(membership, 0.0, 2.5)
    assert membership.live(3.2).infos == ()
    assert membership.expire(3.2) == ["p0 incarnation 1: no heartbeat for 3.2 s"]
    assert membership.expire(3.3) == [], "told once"


def test_a_late_heartbeat_revives_nobody(membership: Membership) -> None:
    pass_time(membership, 0.0, 2.5)
    with pytest.raises(StaleIncarnation):
        beat(membership, 3.1)


@pytest.mark.parametrize("at_s", [0.0, 1.0, 2.9])
def test_a_pause_of_the_coordinator_is_nobody_s_silence(membership: Membership, at_s: float) -> None:
    pass_time(membership, 0.0, at_s)
    assert membership.expire(at_s + 3600) == []
    left_s = LIMITS.heartbeat_timeout_s - at_s
    assert pass_time(membership, at_s + 3600, at_s + 3600 + left_s - 0.01) == []
    assert len(pass_time(membership, at_s + 3600 + left_s - 0.01, at_s + 3600 + left_s + 0.01)) == 1


def test_a_busy_coordinator_is_not_a_paused_one(membership: Membership) -> None:
    assert membership.expire(LONGEST_GAP_S) == []
    assert membership.expire(2 * LONGEST_GAP_S) == []
    assert len(membership.expire(3 * LONGEST_GAP_S)) == 1


def test_a_later_life_replaces_the_earlier_and_fences_it(membership: Membership) -> None:
    membership.register(life(2), 1.0)
    assert gone(membership, 1.0) == [("p0", 1)]
    with pytest.raises(StaleIncarnation, match="speaks as incarnation 1, but 2 is known"):
        beat(membership, 1.1)
    assert not membership.deregister(P0, Incarnation(1), 1.1)
    with pytest.raises(StaleIncarnation):
        membership.register(life(1), 1.2)
    assert [info.incarnation for info in membership.live(1.2).infos] == [2]


def test_a_goodbye_is_final_too(membership: Membership) -> None:
    assert membership.deregister(P0, Incarnation(1), 1.0)
    assert not membership.deregister(P0, Incarnation(1), 1.1)
    assert gone(membership, 1.1) == [("p0", 1)]
    assert membership.expire(1.1) == [], "nobody was lost"
    with pytest.raises(StaleIncarnation, match="it said goodbye"):
        membership.register(life(1), 1.2)


def test_the_gone_are_told_for_a_while_and_the_latest_of_them_only() -> None:
    limits = MembershipLimits(tell_gone_for_s=10.0, max_told_gone=3)
    membership = Membership(limits)
    for incarnation in range(1, 7):
        membership.register(life(incarnation), float(incarnation))
    assert gone(membership, 6.0) == [("p0", 3), ("p0", 4), ("p0", 5)]
    assert gone(membership, 15.5) == [("p0", 5)]
    assert membership.gone(30.0) == ()
    with pytest.raises(StaleIncarnation):
        membership.register(life(5), 31.0)


def test_memory_of_the_fenced_is_bounded() -> None:
    membership = Membership(MembershipLimits(max_fenced=2))
    for name in ("a", "b", "c"):
        worker_id = WorkerId(name)
        membership.register(life(1, worker_id), 0.0)
        membership.deregister(worker_id, Incarnation(1), 0.0)
    membership.register(life(1, WorkerId("a")), 0.1)
    for name in ("b", "c"):
        with pytest.raises(StaleIncarnation):
            membership.register(life(1, WorkerId(name)), 0.1)


def test_a_new_coordinator_takes_up_whoever_registers() -> None:
    membership = Membership(LIMITS)
    assert not beat(membership, 0.0, incarnation=7)
    membership.register(life(7), 0.1)
    assert beat(membership, 0.2, incarnation=7)


def test_the_last_transfers_told_stay(membership: Membership) -> None:
    report = TransferReport(leases={"holder.sealed": 1})
    membership.heartbeat(P0, Incarnation(1), WorkerLoad(), 0.5, report)
    beat(membership, 1.0)
    assert [member.transfers for member in membership.members(1.0)] == [report]


def test_registering_twice_keeps_what_is_known(membership: Membership) -> None:
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(context_tokens=5), 0.5)
    membership.register(life(1), 0.6)
    assert membership.live(0.6).decode_load_tokens.tolist() == [5]
    assert membership.members(0.6)[0].load.context_tokens == 5


@pytest.mark.parametrize("incarnation", [1, 2])
def test_another_registration_starts_without_load(membership: Membership, incarnation: int) -> None:
    """A later life, and the same one with other figures."""
    ask = DispatchItem(request_id=RequestId("r"), prompt_tokens=30, max_tokens=10)
    membership.book(ask, placed_on("p0"), 0.5)
    beat(membership, 0.6, load=WorkerLoad(context_tokens=5))
    membership.register(msgspec.structs.replace(life(incarnation), total_blocks=20), 0.7)
    view = membership.live(0.7)
    assert [info.total_blocks for info in view.infos] == [20]
    assert view.prefill_load_tokens.tolist() == view.decode_load_tokens.tolist() == [0]


def test_an_unknown_worker_is_told_to_register(membership: Membership) -> None:
    assert not membership.heartbeat(WorkerId("ghost"), Incarnation(1), WorkerLoad(), 0.0)


def test_placements_count_until_a_heartbeat_contains_them(membership: Membership) -> None:
    ask = DispatchItem(request_id=RequestId("r"), prompt_tokens=30, max_tokens=10)
    verdict = dispatch([ask], membership.live(1.0), DispatchLimits())[0]
    assert isinstance(verdict, Placement)
    membership.book(ask, verdict, 1.0)
    view = membership.live(1.0)
    assert (view.prefill_load_tokens[0], view.decode_load_tokens[0], view.waiting_requests[0]) == (30, 40, 1)
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), 1.1)
    assert membership.live(1.1).prefill_load_tokens[0] == 30, "the heartbeat may have left before the request came"
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), 1.6)
    assert membership.live(1.6).prefill_load_tokens[0] == 0


# --- everybody silent at once ---------------------------------------------------------------------------


@pytest.fixture
def pair() -> Membership:
    machine = Membership(LIMITS)
    for name in ("p0", "d0"):
        machine.register(life(1, WorkerId(name)), 0.0)
    return machine


def test_silence_of_everybody_is_the_coordinators_own(pair: Membership) -> None:
    assert pass_time(pair, 0.0, LIMITS.isolation_timeout_s - 0.1) == []
    assert pair.live(LIMITS.isolation_timeout_s - 0.1).infos == ()
    assert pair.members(LIMITS.isolation_timeout_s - 0.1) == ()
    assert gone(pair, LIMITS.isolation_timeout_s - 0.1) == []
    for name in ("p0", "d0"):
        assert pair.heartbeat(WorkerId(name), Incarnation(1), WorkerLoad(), LIMITS.isolation_timeout_s - 0.1)
    assert len(pair.live(LIMITS.isolation_timeout_s).infos) == 2


def test_of_the_silent_only_those_heard_again_get_requests(pair: Membership) -> None:
    """As long as nobody has looked again. p0 is the second of the two and the first of those heard: its load is its
    own all the same."""
    back_s = 10.5
    pass_time(pair, 0.0, back_s)
    beat(pair, back_s)
    ask = DispatchItem(request_id=RequestId("r"), prompt_tokens=30, max_tokens=10)
    view = pair.live(back_s + 0.1)
    assert [info.worker_id for info in view.infos] == ["p0"]
    verdict = dispatch([ask], view, DispatchLimits())[0]
    assert isinstance(verdict, Placement)
    pair.book(ask, verdict, back_s + 0.1)
    assert pair.live(back_s + 0.2).prefill_load_tokens.tolist() == [30]
    assert pair.heartbeat(WorkerId("d0"), Incarnation(1), WorkerLoad(), back_s + 0.2)
    view = pair.live(back_s + 0.3)
    assert [info.worker_id for info in view.infos] == ["d0", "p0"]
    assert view.prefill_load_tokens.tolist() == [0, 30]


def test_silence_of_everybody_ends_them_too_in_the_end(pair: Membership) -> None:
    lost = pass_time(pair, 0.0, LIMITS.isolation_timeout_s + 1.0)
    assert len(lost) == 2
    assert len(gone(pair, LIMITS.isolation_timeout_s + 1.0)) == 2


def test_silence_of_one_among_others_is_its_own(pair: Membership) -> None:
    now_s = 0.0
    while now_s < 4.0:
        now_s += 0.5
        beat(pair, now_s)
    assert [info.worker_id for info in pair.live(now_s).infos] == ["p0"]
    assert gone(pair, now_s) == [("d0", 1)]


def test_a_late_silence_of_the_last_one_does_not_save_the_first(pair: Membership) -> None:
    for number in range(1, 5):
        assert pass_time(pair, 0.5 * (number - 1), 0.5 * number) == []
        beat(pair, 0.5 * number)
    assert pass_time(pair, 2.0, 3.2) == ["d0 incarnation 1: no heartbeat for 3.2 s"]
    assert pass_time(pair, 3.2, 4.9) == []


# --- the end of such a silence --------------------------------------------------------------------------

TIMEOUT_S = LIMITS.heartbeat_timeout_s


@pytest.mark.parametrize("silent_s", [1.6, 2.9, 3.1, 8.0, 16.9])
def test_when_the_first_is_heard_again_the_others_have_time_to_be(pair: Membership, silent_s: float) -> None:
    assert pass_time(pair, 0.0, silent_s) == []
    beat(pair, silent_s)
    heard_s = silent_s + TIMEOUT_S - 0.1
    lost: list[str] = []
    while silent_s < heard_s:
        silent_s += 0.1
        beat(pair, silent_s)
        lost += pass_time(pair, silent_s - 0.1, silent_s)
    assert lost == []
    assert pair.heartbeat(WorkerId("d0"), Incarnation(1), WorkerLoad(), heard_s)
    assert pass_time(pair, heard_s, heard_s + 0.5) == []
    assert len(pair.live(heard_s + 0.5).infos) == 2


def test_whoever_stays_silent_after_that_is_lost(pair: Membership) -> None:
    pass_time(pair, 0.0, 8.0)
    now_s, lost = 8.0, list[str]()
    while not lost:
        beat(pair, now_s)
        lost = pass_time(pair, now_s, now_s + LOOK_INTERVAL_S)
        now_s += LOOK_INTERVAL_S
    assert lost[0].startswith("d0 incarnation 1: no heartbeat for ")
    assert 8.0 + TIMEOUT_S < now_s <= 8.0 + TIMEOUT_S + LOOK_INTERVAL_S


def test_silences_of_everybody_one_after_the_other_save_nobody_for_good(pair: Membership) -> None:
    """d0 is dead, and the network comes and goes: each time the others get time to be heard."""
    now_s, lost = 0.0, list[str]()
    while not lost:
        lost = pass_time(pair, now_s, now_s + 2.0)
        now_s += 2.0
        beat(pair, now_s)
    assert now_s <= LIMITS.isolation_timeout_s + 2.0
    assert len(gone(pair, now_s)) == 1


def test_the_time_to_be_heard_does_not_pass_while_the_coordinator_is_paused(pair: Membership) -> None:
    pass_time(pair, 0.0, 8.0)
    beat(pair, 8.0)
    assert pass_time(pair, 8.0, 8.5) == []
    paused_s = 8.5 + 60.0
    assert pair.expire(paused_s) == []
    beat(pair, paused_s)
    assert pass_time(pair, paused_s, paused_s + 2.0) == []
    assert gone(pair, paused_s + 2.0) == []
