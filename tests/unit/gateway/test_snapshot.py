"""Where requests go by a gateway's own knowledge of the cluster."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.messages import DispatchItem, Member, Placement, Rejection, WorkerInfo, WorkerLife, WorkerLoad
from gateway.limits import GatewayLimits
from gateway.snapshot import OwnLoad, Snapshot
from tests.support.fake_backend import IDENTITY

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.messages import MemberRole

LIMITS = GatewayLimits(snapshot_ttl_s=60.0, silent_after_s=1.5, unnamed_for_s=3.0, members_interval_s=1.0)


def info(worker_id: str, role: MemberRole, incarnation: int = 1) -> WorkerInfo:
    return WorkerInfo(
        worker_id=WorkerId(worker_id),
        incarnation=Incarnation(incarnation),
        role=role,
        address=f"{worker_id}:{incarnation}",
        model="m",
        identity=IDENTITY,
        total_blocks=1000,
        max_context_tokens=4096,
    )


def member(worker: WorkerInfo, age_s: float = 0.1, load: WorkerLoad | None = None) -> Member:
    return Member(info=worker, load=load or WorkerLoad(free_blocks=1000), heartbeat_age_s=age_s)


PREFILLS = [info(f"p{number}", "prefill") for number in range(3)]
DECODES = [info(f"d{number}", "decode") for number in range(2)]
ALL = [*PREFILLS, *DECODES]


def told(workers: Iterable[WorkerInfo] = ALL, now_s: float = 0.0) -> Snapshot:
    snapshot = Snapshot(LIMITS)
    snapshot.told([member(worker) for worker in workers], now_s)
    return snapshot


def item(number: int = 0, prompt_tokens: int = 100, avoid: tuple[str, ...] = ()) -> DispatchItem:
    return DispatchItem(
        request_id=RequestId(f"r{number}"),
        prompt_tokens=prompt_tokens,
        max_tokens=10,
        avoid=tuple(WorkerId(worker_id) for worker_id in avoid),
        slo_class="chat",
        block_keys=bytes(8 * 5),
    )


def lives(worker_ids: Iterable[str]) -> set[WorkerLife]:
    return {WorkerLife(WorkerId(worker_id), Incarnation(1)) for worker_id in worker_ids}


def place(
    snapshot: Snapshot,
    asked: DispatchItem,
    now_s: float = 0.0,
    lost: Iterable[str] = (),
    own: dict[str, OwnLoad] | None = None,
    heard: Iterable[str] = (),
) -> Placement | Rejection:
    return snapshot.place(
        asked,
        now_s,
        lost=lives(lost),
        heard=lives(heard),
        own=lambda: {WorkerId(worker_id): load for worker_id, load in (own or {}).items()},
    )


def workers_of(verdict: Placement | Rejection) -> tuple[str, str]:
    assert isinstance(verdict, Placement), verdict
    return verdict.prefill.worker_id, verdict.decode.worker_id


def test_what_was_placed_counts_at_once() -> None:
    snapshot = told()
    places = [workers_of(place(snapshot, item(number))) for number in range(6)]
    assert {prefill for prefill, _ in places[:3]} == {"p0", "p1", "p2"}
    assert {prefill for prefill, _ in places[3:]} == {"p0", "p1", "p2"}
    assert {decode for _, decode in places[:2]} == {"d0", "d1"}


def test_the_load_that_was_told_counts() -> None:
    snapshot = Snapshot(LIMITS)
    busy = WorkerLoad(free_blocks=500, pending_prompt_tokens=10_000, waiting_requests=5)
    loads = {"p0": busy, "p1": busy}
    snapshot.told([member(worker, load=loads.get(worker.worker_id)) for worker in ALL], 0.0)
    assert workers_of(place(snapshot, item()))[0] == "p2"


def test_the_reason_says_whose_decision_it_was_and_how_old_its_grounds() -> None:
    verdict = place(told(), item(), 2.5)
    assert isinstance(verdict, Placement)
    assert verdict.reason.startswith("by this gateway, from what it heard of the cluster 2.5 s ago: ")


def test_later_only_the_gateways_own_requests_count() -> None:
    """Else a long outage would fill all queues on paper."""
    snapshot = told()
    for number in range(5000):
        now_s = number * 0.01
        own = {"p0": OwnLoad(waiting_requests=3, pending_prompt_tokens=300)} if now_s > 2 else {}
        verdict = place(snapshot, item(number), now_s, own=own)
        assert isinstance(verdict, Placement), verdict
    busy = {"p0": OwnLoad(waiting_requests=3, pending_prompt_tokens=300)}
    last = [workers_of(place(snapshot, item(), 60.0, own=busy))[0] for _ in range(4)]
    assert "p0" not in last[:2]


def test_workers_whose_frames_are_lost_get_nothing() -> None:
    snapshot = told()
    assert {workers_of(place(snapshot, item(number), lost=["p0", "d1"])) for number in range(8)} == {
        ("p1", "d0"),
        ("p2", "d0"),
    }
    verdict = place(snapshot, item(), lost=["d0", "d1"])
    assert isinstance(verdict, Rejection)
    assert verdict.code == "not_ready"


def test_an_ended_life_is_not_its_successor() -> None:
    snapshot = told([*PREFILLS, info("d0", "decode", incarnation=2)])
    assert workers_of(place(snapshot, item(), lost=["d0"]))[1] == "d0"


def test_workers_that_fail_are_avoided_while_there_are_others() -> None:
    snapshot = told()
    assert workers_of(place(snapshot, item(avoid=("p0", "p1", "d0")))) == ("p2", "d1")
    assert workers_of(place(snapshot, item(avoid=("p0", "p1", "p2"))))[0] in {"p0", "p1", "p2"}


def test_silent_workers_are_the_last_choice() -> None:
    snapshot = Snapshot(LIMITS)
    ages = {"p0": 2.0, "p1": 2.5, "d0": 2.0, "d1": 2.0}
    snapshot.told([member(worker, ages.get(worker.worker_id, 0.1)) for worker in ALL], 0.0)
    places = [workers_of(place(snapshot, item(number))) for number in range(4)]
    assert {prefill for prefill, _ in places} <= {"p0", "p1", "p2"}
    assert {decode for _, decode in places} == {"d0", "d1"}
    snapshot.told([member(worker, {"p0": 2.0, "p1": 2.5}.get(worker.worker_id, 0.1)) for worker in ALL], 1.0)
    assert {workers_of(place(snapshot, item(number), 1.0))[0] for number in range(4)} == {"p2"}


@pytest.mark.parametrize(("age_s", "is_usable"), [(0.0, True), (60.0, True), (60.1, False)])
def test_it_ends_after_its_time(age_s: float, is_usable: bool) -> None:
    snapshot = told(now_s=5.0)
    assert snapshot.is_usable(5.0 + age_s) is is_usable
    assert snapshot.age_s(5.0 + age_s) == pytest.approx(age_s)


def test_before_the_first_answer_and_without_workers_it_is_of_no_use() -> None:
    assert not Snapshot(LIMITS).is_usable(0.0)
    assert not told([]).is_usable(0.0)


def test_a_new_coordinators_ignorance_is_not_the_workers_end() -> None:
    snapshot = told()
    snapshot.told([member(PREFILLS[0])], 10.0)
    assert snapshot.unnamed == {"p1", "p2", "d0", "d1"}
    assert workers_of(place(snapshot, item(), 10.0))[1] in {"d0", "d1"}
    snapshot.told([member(worker) for worker in ALL], 12.0)
    assert not snapshot.unnamed
    assert {one.info.worker_id for one in snapshot.members} == {worker.worker_id for worker in ALL}
    snapshot.told([], 20.0)
    snapshot.told([], 22.9)
    assert len(snapshot.members) == 5
    snapshot.told([], 23.1)
    assert snapshot.is_empty


def test_who_had_fallen_silent_and_is_not_named_any_more_is_gone() -> None:
    snapshot = Snapshot(LIMITS)
    snapshot.told([member(DECODES[0], 2.9), member(DECODES[1]), *(member(one) for one in PREFILLS)], 0.0)
    snapshot.told([member(DECODES[1]), *(member(one) for one in PREFILLS)], 1.0)
    assert {workers_of(place(snapshot, item(number), 1.0))[1] for number in range(4)} == {"d1"}


EVERYBODY = [worker.worker_id for worker in ALL]


def falling_silent(heard: Iterable[str]) -> Snapshot:
    """All are well at 0, silent at 2, and at 4 the coordinator names none of them any more."""
    snapshot = told()
    snapshot.told([member(worker, 2.0) for worker in ALL], 2.0, heard=lives(heard))
    snapshot.told([], 4.0, heard=lives(heard))
    return snapshot


def test_a_coordinator_that_hears_nobody_is_not_believed_against_frames() -> None:
    snapshot = falling_silent(EVERYBODY)
    for now_s in range(5, 65):
        snapshot.told([], now_s, heard=lives(EVERYBODY))
        assert isinstance(place(snapshot, item(now_s), now_s, heard=EVERYBODY), Placement)
    assert snapshot.unnamed == set(EVERYBODY)
    snapshot.told([], 64.1, heard=lives(EVERYBODY))
    assert snapshot.is_empty, "longer than a snapshot is good for"


def test_whose_frames_cease_meanwhile_is_gone() -> None:
    snapshot = falling_silent(EVERYBODY)
    others = [worker_id for worker_id in EVERYBODY if worker_id != "d0"]
    snapshot.told([], 5.0, heard=lives(others))
    assert "d0" in snapshot.unnamed, "its next frame may be late"
    snapshot.told([], 7.1, heard=lives(others))
    assert snapshot.unnamed == set(others)


def test_without_frames_a_coordinator_that_hears_nobody_is_doubted_only_briefly() -> None:
    snapshot = falling_silent([])
    assert {peer.worker_id for peer in snapshot.unproven} == set(EVERYBODY)
    assert isinstance(place(snapshot, item(), 4.0), Placement)
    snapshot.told([], 6.9, heard=lives(["p0", "d0"]))
    assert {peer.worker_id for peer in snapshot.unproven} == {"p1", "p2", "d1"}
    snapshot.told([], 7.1)
    assert snapshot.unnamed == {"p0", "d0"}
    assert snapshot.unproven == []


def test_a_coordinator_that_hears_somebody_knows_who_is_gone() -> None:
    snapshot = falling_silent(EVERYBODY)
    snapshot.told([member(PREFILLS[0])], 5.0, heard=lives(EVERYBODY))
    assert EVERYBODY[:1] == [one.info.worker_id for one in snapshot.members]
    restarted = told()
    restarted.told([member(PREFILLS[0])], 1.0)
    assert restarted.unnamed
    assert restarted.unproven == [], "it names them soon, or they have left"
    assert {peer.worker_id for peer in restarted.named} == {PREFILLS[0].worker_id}


def test_what_this_gateway_hears_is_not_silent() -> None:
    snapshot = Snapshot(LIMITS)
    snapshot.told([member(worker, 2.0 if worker in PREFILLS else 0.1) for worker in ALL], 0.0)
    places = [workers_of(place(snapshot, item(number), heard=["p1"])) for number in range(4)]
    assert {prefill for prefill, _ in places} == {"p1"}
    assert workers_of(place(snapshot, item(), lost=["p1"], heard=["p1"]))[0] in {"p0", "p2"}


def test_a_later_life_takes_the_place_of_an_earlier_one() -> None:
    snapshot = told()
    assert isinstance(place(snapshot, item()), Placement)
    later = info("d0", "decode", incarnation=2)
    snapshot.told([*(member(one) for one in PREFILLS), member(later)], 1.0)
    decodes = [place(snapshot, item(number), 1.0, lost=["d1"]) for number in range(2)]
    assert {msgspec.structs.asdict(one.decode)["incarnation"] for one in decodes if isinstance(one, Placement)} == {2}


def test_a_prompt_for_which_no_worker_is_large_enough_is_refused_for_good() -> None:
    verdict = place(told(), item(prompt_tokens=10**6))
    assert isinstance(verdict, Rejection)
    assert verdict.code == "context_length_exceeded"


def test_stores_take_no_requests_and_have_no_streams() -> None:
    store = info("s0", "store")
    snapshot = told([*ALL, store])
    assert {each.info.worker_id for each in snapshot.members} == {each.worker_id for each in ALL}
    assert {peer.worker_id for peer in snapshot.named} == {each.worker_id for each in ALL}
    for number in range(12):
        placement = place(snapshot, item(number))
        assert isinstance(placement, Placement)
        assert {placement.prefill.worker_id, placement.decode.worker_id}.isdisjoint({"s0"})
    alone = told([store])
    assert alone.is_empty
    assert isinstance(place(alone, item()), Rejection)
    # Nobody is named any more, and nobody asks a store for frames.
    snapshot.told([], 1.0)
    assert "s0" not in {peer.worker_id for peer in snapshot.unproven}


def test_a_coordinator_that_hears_a_store_is_not_cut_off() -> None:
    store = info("s0", "store")
    for members, are_believed in (([member(store)], False), ([member(store, age_s=5.0)], True), ([], True)):
        snapshot = told([*ALL, store])
        snapshot.told(members, 1.0)
        snapshot.told(members, 1.0 + LIMITS.unnamed_for_s + 0.1, heard=lives(each.worker_id for each in ALL))
        assert (not snapshot.is_empty) is are_believed
