"""Membership as a machine: lives, silence, hung steps, and placements that no heartbeat shows yet."""

from __future__ import annotations

import msgspec
import pytest

from contracts.errors import StaleIncarnation
from contracts.ids import Incarnation, RequestId, WorkerId
from contracts.layout import BlockLayout, KvIdentity
from contracts.messages import DispatchItem, Placement, WorkerInfo, WorkerLoad
from coordinator import Membership, MembershipLimits
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


def life(incarnation: int) -> WorkerInfo:
    return msgspec.structs.replace(INFO, incarnation=Incarnation(incarnation))


@pytest.fixture
def membership() -> Membership:
    machine = Membership(LIMITS)
    machine.register(life(1), 0.0)
    return machine


def test_a_silent_worker_is_dead_after_the_timeout_and_back_with_a_heartbeat(membership: Membership) -> None:
    assert len(membership.live(3.0)) == 1
    assert membership.live(3.01) == []
    lost, _ = membership.expire(3.01)
    assert lost == ["p0 incarnation 1: no heartbeat for 3.0 s"]
    assert membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), 4.0)
    _, back = membership.expire(4.0)
    assert back == ["p0 incarnation 1"]
    assert len(membership.live(4.0)) == 1


def test_a_hung_step_makes_a_worker_dead_though_it_beats(membership: Membership) -> None:
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(step_age_s=60.1), 1.0)
    assert membership.live(1.0) == []
    assert membership.expire(1.0)[0] == ["p0 incarnation 1: an engine step has run for 60.1 s"]


def test_a_later_life_replaces_the_earlier_and_fences_it(membership: Membership) -> None:
    membership.register(life(2), 1.0)
    assert not membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), 1.1)
    assert not membership.deregister(WorkerId("p0"), Incarnation(1))
    with pytest.raises(StaleIncarnation, match="registers as incarnation 1, but 2 is known"):
        membership.register(life(1), 1.2)
    assert [view.info.incarnation for view in membership.live(1.2)] == [2]


def test_registering_twice_keeps_what_is_known(membership: Membership) -> None:
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(context_tokens=5), 0.5)
    membership.register(life(1), 0.6)
    assert membership.live(0.6)[0].load.context_tokens == 5


def test_an_unknown_worker_is_told_to_register(membership: Membership) -> None:
    assert not membership.heartbeat(WorkerId("ghost"), Incarnation(1), WorkerLoad(), 0.0)


def test_placements_count_until_a_heartbeat_contains_them(membership: Membership) -> None:
    ask = DispatchItem(request_id=RequestId("r"), prompt_tokens=30, max_tokens=10)
    verdict = dispatch([ask], membership.live(1.0), DispatchLimits())[0]
    assert isinstance(verdict, Placement)
    membership.book(ask, verdict, 1.0)
    view = membership.live(1.0)[0]
    assert (view.prefill_load_tokens, view.decode_load_tokens, view.waiting_requests) == (30, 40, 1)
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), 1.1)
    assert membership.live(1.1)[0].prefill_load_tokens == 30, "the heartbeat may have left before the request came"
    membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), 1.6)
    assert membership.live(1.6)[0].prefill_load_tokens == 0


def test_the_dead_are_forgotten(membership: Membership) -> None:
    membership.expire(LIMITS.forget_after_s + 1)
    assert not membership.heartbeat(WorkerId("p0"), Incarnation(1), WorkerLoad(), LIMITS.forget_after_s + 1)
