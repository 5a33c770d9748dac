"""Membership as a machine: lives and their ends, suspicion, silence and fencing."""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import StaleIncarnation
from contracts.ids import Incarnation, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import LatencyFit, TransferReport, WorkerInfo, WorkerLoad
from coordinator import Membership, MembershipLimits
from coordinator.membership import ALL_UP, LONGEST_GAP_S, LOOK_INTERVAL_S, Standing

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


@dataclass
class Roll:
    """Listens, and refuses what a listener need not bear."""

    infos: dict[str, WorkerInfo] = field(default_factory=dict[str, WorkerInfo])
    loads: dict[str, WorkerLoad] = field(default_factory=dict[str, WorkerLoad])
    fits: list[LatencyFit | None] = field(default_factory=list[LatencyFit | None])

    def add(self, info: WorkerInfo, now_s: float) -> None:
        assert info.worker_id not in self.infos
        self.infos[info.worker_id] = info

    def remove(self, worker_id: WorkerId) -> None:
        del self.infos[worker_id]
        self.loads.pop(worker_id, None)

    def report(self, worker_id: WorkerId, load: WorkerLoad, now_s: float, fit: LatencyFit | None = None) -> None:
        assert worker_id in self.infos
        self.loads[worker_id] = load
        self.fits.append(fit)


def lives(membership: Membership, now_s: float) -> list[tuple[str, int]]:
    """Those that may be given requests, and incarnations."""
    return [(member.info.worker_id, member.info.incarnation) for member in membership.members(now_s)]


def suspects(membership: Membership, now_s: float) -> list[str]:
    """Both ways to ask agree."""
    found = sorted(membership.standing(now_s).suspects)
    assert found == [member.info.worker_id for member in membership.members(now_s) if member.state == "suspect"]
    return [*found]


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
def roll() -> Roll:
    return Roll()


@pytest.fixture
def membership(roll: Roll) -> Membership:
    machine = Membership(LIMITS, roll)
    machine.register(life(1), 0.0)
    return machine


def test_a_silent_worker_is_dead_after_the_timeout_for_good(membership: Membership, roll: Roll) -> None:
    assert pass_time(membership, 0.0, 3.0) == []
    assert lives(membership, 3.0) == [("p0", 1)]
    assert pass_time(membership, 3.0, 3.01) == ["p0 incarnation 1: no heartbeat for 3.0 s"]
    assert roll.infos == {}
    assert membership.members(3.01) == ()
    assert gone(membership, 3.01) == [("p0", 1)]
    why = r"given up and is not taken up again: no heartbeat for 3\.0 s"
    with pytest.raises(StaleIncarnation, match=why):
        beat(membership, 3.2)
    with pytest.raises(StaleIncarnation, match=why):
        membership.register(life(1), 3.2)
    membership.register(life(2), 3.4)
    assert lives(membership, 3.4) == [("p0", 2)]
    assert [info.incarnation for info in roll.infos.values()] == [2]
    assert beat(membership, 3.5, incarnation=2)


def test_whoever_asks_first_finds_the_dead(membership: Membership) -> None:
    """No answer depends on whether the shell has looked in between."""
    pass_time(membership, 0.0, 2.5)
    assert lives(membership, 3.2) == []
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


def test_a_later_life_replaces_the_earlier_and_fences_it(membership: Membership, roll: Roll) -> None:
    membership.register(life(2), 1.0)
    assert gone(membership, 1.0) == [("p0", 1)]
    with pytest.raises(StaleIncarnation, match="speaks as incarnation 1, but 2 is known"):
        beat(membership, 1.1)
    assert not membership.deregister(P0, Incarnation(1), 1.1)
    with pytest.raises(StaleIncarnation):
        membership.register(life(1), 1.2)
    assert lives(membership, 1.2) == [("p0", 2)]
    assert [info.incarnation for info in roll.infos.values()] == [2]


def test_a_goodbye_is_final_too(membership: Membership) -> None:
    assert membership.deregister(P0, Incarnation(1), 1.0)
    assert not membership.deregister(P0, Incarnation(1), 1.1)
    assert gone(membership, 1.1) == [("p0", 1)]
    assert membership.expire(1.1) == [], "nobody was lost"
    with pytest.raises(StaleIncarnation, match="it said goodbye"):
        membership.register(life(1), 1.2)


def test_the_gone_are_told_for_a_while_and_the_latest_of_them_only() -> None:
    limits = MembershipLimits(tell_gone_for_s=10.0, max_told_gone=3)
    membership = Membership(limits, Roll())
    for incarnation in range(1, 7):
        membership.register(life(incarnation), float(incarnation))
    assert gone(membership, 6.0) == [("p0", 3), ("p0", 4), ("p0", 5)]
    assert gone(membership, 15.5) == [("p0", 5)]
    assert membership.gone(30.0) == ()
    with pytest.raises(StaleIncarnation):
        membership.register(life(5), 31.0)


def test_memory_of_the_fenced_is_bounded() -> None:
    membership = Membership(MembershipLimits(max_fenced=2), Roll())
    for name in ("a", "b", "c"):
        worker_id = WorkerId(name)
        membership.register(life(1, worker_id), 0.0)
        membership.deregister(worker_id, Incarnation(1), 0.0)
    membership.register(life(1, WorkerId("a")), 0.1)
    for name in ("b", "c"):
        with pytest.raises(StaleIncarnation):
            membership.register(life(1, WorkerId(name)), 0.1)


def test_a_new_coordinator_takes_up_whoever_registers() -> None:
    membership = Membership(LIMITS, Roll())
    assert not beat(membership, 0.0, incarnation=7)
    membership.register(life(7), 0.1)
    assert beat(membership, 0.2, incarnation=7)


def test_the_mark_stands_for_the_lives_that_are_known_and_for_nothing_else() -> None:
    membership = Membership(LIMITS, Roll())
    others = [life(1, WorkerId(f"d{number}")) for number in range(3)]
    marks = [membership.mark]
    for info in (INFO, *others):
        membership.register(info, 0.0)
        marks.append(membership.mark)
    assert marks[0] == 0
    assert len(set(marks)) == 5
    membership.register(INFO, 0.1)
    beat(membership, 0.1, load=WorkerLoad(free_blocks=3))
    membership.standing(LIMITS.suspicion_s + 0.05)
    assert membership.mark == marks[-1], "neither repetition nor load nor suspicion is a change of members"

    # One that was just started, and hears of them in another order.
    another = Membership(LIMITS, Roll())
    for info in (*reversed(others), INFO):
        another.register(info, 77.0)
    assert another.mark == membership.mark

    membership.deregister(P0, Incarnation(1), 1.6)
    gone_mark = membership.mark
    assert gone_mark not in marks
    membership.register(life(2), 1.7)
    assert membership.mark not in (*marks, gone_mark), "another life"
    second = membership.mark
    membership.register(msgspec.structs.replace(life(2), address="127.0.0.1:2"), 1.8)
    assert membership.mark not in (*marks, gone_mark, second), "on another address"
    pass_time(membership, 1.8, 30.0)
    assert membership.mark == 0
    assert lives(membership, 30.0) == []


def test_the_last_transfers_told_stay(membership: Membership) -> None:
    report = TransferReport(leases={"holder.sealed": 1})
    membership.heartbeat(P0, Incarnation(1), WorkerLoad(), 0.5, report)
    beat(membership, 1.0)
    assert [member.transfers for member in membership.members(1.0)] == [report]


def test_registering_twice_keeps_what_is_known(membership: Membership, roll: Roll) -> None:
    membership.heartbeat(P0, Incarnation(1), WorkerLoad(context_tokens=5), 0.5)
    membership.register(life(1), 0.6)
    assert roll.loads == {"p0": WorkerLoad(context_tokens=5)}, "not removed and added again"
    assert membership.members(0.6)[0].load.context_tokens == 5


@pytest.mark.parametrize("incarnation", [1, 2])
def test_another_registration_is_another_worker(membership: Membership, roll: Roll, incarnation: int) -> None:
    """A later life, and the same one with other figures: nothing that was reported or placed stays."""
    beat(membership, 0.6, load=WorkerLoad(context_tokens=5))
    membership.register(msgspec.structs.replace(life(incarnation), total_blocks=20), 0.7)
    assert [info.total_blocks for info in roll.infos.values()] == [20]
    assert roll.loads == {}
    assert [member.load for member in membership.members(0.7)] == [WorkerLoad(free_blocks=20)]


def test_a_life_in_another_role_keeps_what_it_told(membership: Membership, roll: Roll) -> None:
    """It took the role with its work in it: until its next heartbeat nobody may think that it has none, or that it
    takes requests when it drains."""
    load = WorkerLoad(context_tokens=5, draining=True)
    beat(membership, 0.6, load=load)
    mark = membership.mark
    membership.register(msgspec.structs.replace(life(1), role="decode"), 0.7)
    assert [info.role for info in roll.infos.values()] == ["decode"]
    assert roll.loads == {"p0": load}
    assert [member.load for member in membership.members(0.7)] == [load]
    assert membership.draining == {"p0"}
    assert membership.mark != mark
    beat(membership, 0.8)
    assert membership.draining == frozenset()


def test_what_steps_took_is_passed_on(membership: Membership, roll: Roll) -> None:
    fit = LatencyFit(1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 9, 9)
    membership.heartbeat(P0, Incarnation(1), WorkerLoad(), 0.5, latency=fit)
    beat(membership, 1.0)
    assert roll.fits == [fit, fit], "nothing said is as last time"
    membership.register(life(2), 1.1)
    beat(membership, 1.2, incarnation=2)
    assert roll.fits == [fit, fit, None]


def test_only_the_present_life_is_known(membership: Membership) -> None:
    assert membership.knows(P0, Incarnation(1), 0.1)
    assert not membership.knows(P0, Incarnation(2), 0.1)
    assert not membership.knows(WorkerId("ghost"), Incarnation(1), 0.1)
    membership.register(life(2), 0.2)
    with pytest.raises(StaleIncarnation):
        membership.knows(P0, Incarnation(1), 0.3)


def test_an_unknown_worker_is_told_to_register(membership: Membership) -> None:
    assert not membership.heartbeat(WorkerId("ghost"), Incarnation(1), WorkerLoad(), 0.0)


# --- suspicion ------------------------------------------------------------------------------------------


def test_a_late_worker_is_suspect_until_it_is_heard(membership: Membership) -> None:
    assert pass_time(membership, 0.0, 1.5) == []
    assert membership.standing(1.5) is ALL_UP
    assert suspects(membership, 1.6) == ["p0"]
    assert pass_time(membership, 1.6, 2.9) == []
    assert suspects(membership, 2.9) == ["p0"], "and goes on being one"
    beat(membership, 2.95)
    assert membership.standing(2.95) is ALL_UP
    assert pass_time(membership, 2.95, 4.5) == []
    assert suspects(membership, 4.5) == ["p0"]
    assert pass_time(membership, 4.5, 6.0) == ["p0 incarnation 1: no heartbeat for 3.0 s"]
    assert membership.standing(6.0) is ALL_UP


def test_the_standing_is_the_same_object_while_nothing_changes(pair: Membership) -> None:
    pass_time(pair, 0.0, 1.5)
    pair.heartbeat(P0, Incarnation(1), WorkerLoad(), 1.5)
    first = pair.standing(1.7)
    assert first.suspects == {"d0"}
    pair.heartbeat(P0, Incarnation(1), WorkerLoad(), 2.0)
    assert pair.standing(2.9) is first
    pair.heartbeat(WorkerId("d0"), Incarnation(1), WorkerLoad(), 2.95)
    assert pair.standing(2.96) is ALL_UP


def test_a_new_life_of_a_suspect_is_none(pair: Membership) -> None:
    pass_time(pair, 0.0, 2.0)
    assert suspects(pair, 2.0) == ["d0", "p0"]
    pair.register(life(2), 2.1)
    assert suspects(pair, 2.1) == ["d0"]
    pair.deregister(WorkerId("d0"), Incarnation(1), 2.2)
    assert pair.standing(2.2) is ALL_UP


def test_suspicion_comes_when_it_is_told_to() -> None:
    membership = Membership(MembershipLimits(suspect_after_s=0.7), Roll())
    membership.register(life(1), 0.0)
    assert suspects(membership, 0.69) == []
    assert suspects(membership, 0.71) == ["p0"]
    for wrong in (0.0, -1.0, 3.5):
        with pytest.raises(ValueError, match="suspect_after_s"):
            MembershipLimits(suspect_after_s=wrong)


def test_a_pause_of_the_coordinator_makes_no_suspects(membership: Membership) -> None:
    pass_time(membership, 0.0, 1.0)
    assert suspects(membership, 500.0) == []
    assert suspects(membership, 500.49) == []
    assert suspects(membership, 500.51) == ["p0"]


@given(
    beats=st.lists(st.tuples(st.floats(0.01, 0.49), st.sampled_from(["a", "b", "c", "d", None])), max_size=60),
    suspicion_s=st.sampled_from([0.3, 1.0, 1.4]),
)
def test_standing_is_what_the_last_heartbeats_say(beats: list[tuple[float, str | None]], suspicion_s: float) -> None:
    """Against a plain reading of the rules; `e` is heard all the time, so nobody is spared."""
    limits = MembershipLimits(suspect_after_s=suspicion_s, heartbeat_timeout_s=1.4)
    roll = Roll()
    membership = Membership(limits, roll)
    heard = dict.fromkeys("abcde", 0.0)
    for each in heard:
        membership.register(life(1, WorkerId(each)), 0.0)
    now_s = 0.0
    for passed_s, name in beats:
        now_s += passed_s
        heard = {each: at_s for each, at_s in heard.items() if now_s - at_s <= limits.heartbeat_timeout_s}
        for speaker in sorted(heard.keys() & {name or "e", "e"}):
            assert membership.heartbeat(WorkerId(speaker), Incarnation(1), WorkerLoad(), now_s)
            heard[speaker] = now_s
        late = {each for each, at_s in heard.items() if now_s - at_s > suspicion_s}
        assert membership.standing(now_s).suspects == late
        assert membership.standing(now_s).unheard == set()
        assert [str(member.info.worker_id) for member in membership.members(now_s)] == sorted(heard)
        assert sorted(roll.infos) == sorted(heard)


# --- everybody silent at once ---------------------------------------------------------------------------


@pytest.fixture
def pair() -> Membership:
    machine = Membership(LIMITS, Roll())
    for name in ("p0", "d0"):
        machine.register(life(1, WorkerId(name)), 0.0)
    return machine


def test_silence_of_everybody_is_the_coordinators_own(pair: Membership) -> None:
    assert pass_time(pair, 0.0, LIMITS.isolation_timeout_s - 0.1) == []
    assert pair.standing(LIMITS.isolation_timeout_s - 0.1).unheard == {"d0", "p0"}
    assert pair.members(LIMITS.isolation_timeout_s - 0.1) == ()
    assert gone(pair, LIMITS.isolation_timeout_s - 0.1) == []
    for name in ("p0", "d0"):
        assert pair.heartbeat(WorkerId(name), Incarnation(1), WorkerLoad(), LIMITS.isolation_timeout_s - 0.1)
    assert pair.standing(LIMITS.isolation_timeout_s) is ALL_UP


def test_once_somebody_is_heard_again_the_others_are_a_last_resort_for_a_while(pair: Membership) -> None:
    """They are most likely well too; requests must not fail for want of them."""
    back_s = 10.5
    pass_time(pair, 0.0, back_s)
    assert pair.standing(back_s).unheard == {"d0", "p0"}
    beat(pair, back_s)
    assert lives(pair, back_s + 0.1) == [("d0", 1), ("p0", 1)]
    assert pair.standing(back_s + 0.1) == Standing(suspects=frozenset({WorkerId("d0")}))
    assert pair.heartbeat(WorkerId("d0"), Incarnation(1), WorkerLoad(), back_s + 0.2)
    assert pair.standing(back_s + 0.3) is ALL_UP


def test_who_stays_silent_after_the_others_are_back_is_given_up(pair: Membership) -> None:
    back_s = 10.5
    pass_time(pair, 0.0, back_s)
    now_s = back_s
    while now_s <= back_s + LIMITS.heartbeat_timeout_s:
        beat(pair, now_s)
        assert pair.standing(now_s).suspects == {"d0"}
        now_s += 0.5
    beat(pair, now_s)
    assert lives(pair, now_s) == [("p0", 1)]
    assert gone(pair, now_s) == [("d0", 1)]


def test_silence_of_everybody_ends_them_too_in_the_end(pair: Membership) -> None:
    lost = pass_time(pair, 0.0, LIMITS.isolation_timeout_s + 1.0)
    assert len(lost) == 2
    assert len(gone(pair, LIMITS.isolation_timeout_s + 1.0)) == 2


def test_silence_of_one_among_others_is_its_own(pair: Membership) -> None:
    now_s = 0.0
    while now_s < 4.0:
        now_s += 0.5
        beat(pair, now_s)
    assert lives(pair, now_s) == [("p0", 1)]
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
    assert len(lives(pair, heard_s + 0.5)) == 2


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
