"""Whether a worker takes requests, and in which role: what drains, flips and its own leaving change."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.control_messages import (
    OPERATE,
    DrainOperation,
    DrainRequest,
    OperateReply,
    OperateRequest,
    SetRoleRequest,
)
from contracts.errors import BadRequest, DeadlineExceeded, NotReady
from contracts.ids import Incarnation, WorkerId
from contracts.messages import Role, WorkerInfo
from simulator import VirtualClock, run
from tests.support.roles import IDENTITY
from worker.retiring import SETTLE_S, retire
from worker.standing import OpenWork, Standing

if TYPE_CHECKING:
    from simulator import Program

INFO = WorkerInfo(
    worker_id=WorkerId("d0"),
    incarnation=Incarnation(3),
    role="decode",
    address="d0:1",
    model="m",
    identity=IDENTITY,
    total_blocks=8,
    max_context_tokens=64,
)
LIFE = INFO.incarnation


class Side:
    """A standing, what is open, and what it told."""

    def __init__(self, info: WorkerInfo = INFO) -> None:
        self.work = OpenWork(0, 0)
        self.changes = 0
        self.roles: list[str] = []
        self.standing = Standing(
            info,
            open_work=lambda: self.work,
            on_change=self._changed,
            on_role=lambda told: self.roles.append(told.role),
        )

    def _changed(self) -> None:
        self.changes += 1

    def drain(self, *, now_s: float = 0.0, for_s: float | None = None) -> None:
        self.standing.drain(DrainRequest(target=LIFE, draining=True, reason="flip", for_s=for_s), now_s)

    def undrain(self, *, now_s: float = 0.0) -> None:
        self.standing.drain(DrainRequest(target=LIFE, draining=False), now_s)


def test_who_drains_takes_nothing_new_and_says_why() -> None:
    side = Side()
    side.standing.check_open("new prompt")
    side.drain()
    with pytest.raises(NotReady, match=r"d0 takes no new prompt: it is draining \(flip\)"):
        side.standing.check_open("new prompt")
    side.undrain()
    side.standing.check_open("new prompt")
    assert side.changes == 2, "each is told at once"


def test_a_drain_that_nobody_renews_ends_by_itself() -> None:
    side = Side()
    side.drain(for_s=15.0)
    side.drain(now_s=10.0, for_s=15.0)
    side.standing.look(20.0)
    assert side.standing.draining
    side.standing.look(25.5)
    assert not side.standing.draining
    assert side.changes == 2
    side.drain(now_s=30.0)
    side.standing.look(1e9)
    assert side.standing.draining, "this one lasts"


def test_who_leaves_drains_whatever_anybody_says() -> None:
    side = Side()
    side.standing.leave("it was told to end")
    side.undrain()
    side.drain(for_s=1.0)
    side.standing.look(100.0)
    assert side.standing.draining


@pytest.mark.parametrize("work", [OpenWork(1, 0), OpenWork(0, 2)])
def test_the_other_role_is_taken_only_by_the_empty(work: OpenWork) -> None:
    side = Side()
    side.work = work
    with pytest.raises(NotReady, match=f"d0 cannot become a prefill worker: {work} are open"):
        side.standing.set_role(SetRoleRequest(target=LIFE, role="prefill"))
    side.standing.set_role(SetRoleRequest(target=LIFE, role="decode"))
    assert side.roles == []
    side.work = OpenWork(0, 0)
    side.standing.set_role(SetRoleRequest(target=LIFE, role="prefill"))
    assert (side.roles, side.standing.info.role) == (["prefill"], "prefill")
    assert side.standing.info.incarnation == LIFE


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_whoever_begins_to_do_both_gives_up_nothing(role: Role) -> None:
    side = Side(msgspec.structs.replace(INFO, role=role))
    side.work = OpenWork(5, 3, prompts=2, answers=3)
    side.standing.set_role(SetRoleRequest(target=LIFE, role="mixed"))
    side.standing.set_role(SetRoleRequest(target=LIFE, role="mixed"))
    assert (side.roles, side.standing.info.role, side.standing.also_writes) == (["mixed"], "mixed", True)
    assert side.changes == 0, "it was open all the time"


@pytest.mark.parametrize(
    ("role", "against", "left"),
    [("decode", OpenWork(5, 3, prompts=2, answers=3), "2 prompts"),
     ("prefill", OpenWork(5, 3, prompts=2, answers=3), "3 answers")],
)  # fmt: skip
def test_whoever_gives_up_one_of_both_keeps_what_the_other_has(role: Role, against: OpenWork, left: str) -> None:
    side = Side(msgspec.structs.replace(INFO, role="mixed"))
    side.work = against
    with pytest.raises(NotReady, match=f"d0 cannot become a {role} worker: {left} are open"):
        side.standing.set_role(SetRoleRequest(target=LIFE, role=role))
    assert (side.roles, side.standing.info.role) == ([], "mixed")
    side.work = against._replace(prompts=0) if role == "decode" else against._replace(answers=0)
    side.standing.set_role(SetRoleRequest(target=LIFE, role=role))
    assert side.roles == [role]


def test_a_store_has_no_other_role() -> None:
    with pytest.raises(BadRequest, match="d0 is a store"):
        Side(msgspec.structs.replace(INFO, role="store")).standing.set_role(SetRoleRequest(target=LIFE, role="mixed"))


@given(st.lists(st.tuples(st.sampled_from(["drain", "lease", "undrain", "look"]), st.floats(0.1, 20.0))))
def test_changes_are_told_exactly_when_there_are_some(steps: list[tuple[str, float]]) -> None:
    side, now_s, flips, was = Side(), 0.0, 0, False
    for what, wait_s in steps:
        now_s += wait_s
        match what:
            case "drain":
                side.drain(now_s=now_s)
            case "lease":
                side.drain(now_s=now_s, for_s=5.0)
            case "undrain":
                side.undrain(now_s=now_s)
            case _:
                side.standing.look(now_s)
        flips += side.standing.draining != was
        was = side.standing.draining
        assert side.changes == flips


# --- leaving ----------------------------------------------------------------------------------------


class Coordinator:
    """A network, a channel and a coordinator in one."""

    def __init__(self, *, answers: bool) -> None:
        self.asked: list[OperateRequest] = []
        self._answers = answers

    def channel(self, address: str) -> Coordinator:
        return self

    async def call(self, method: object, body: OperateRequest, *, timeout_s: float) -> OperateReply:
        assert method is OPERATE
        if not self._answers:
            raise DeadlineExceeded("nobody answers")
        self.asked.append(body)
        return OperateReply(operation_id=1)


def leaves(side: Side, coordinator: Coordinator, *, within_s: float, empty_after_s: float) -> tuple[bool, float]:
    """Whether nothing was left, and how long that took."""

    async def main(program: Program) -> tuple[bool, float]:
        loop = asyncio.get_running_loop()
        loop.call_later(empty_after_s, lambda: setattr(side, "work", OpenWork(0, 0)))
        is_empty = await retire(
            side.standing,
            reason="it was told to end",
            within_s=within_s,
            network=cast("Any", coordinator),
            coordinator_address="c:1",
            clock=VirtualClock(),
            log=lambda line: None,
        )
        return is_empty, loop.time()

    return run(main, seed=0)


@pytest.mark.parametrize("answers", [True, False])
def test_a_worker_that_is_told_to_end_leaves_when_it_has_nothing_left(*, answers: bool) -> None:
    side, coordinator = Side(), Coordinator(answers=answers)
    side.work = OpenWork(2, 1)
    is_empty, took_s = leaves(side, coordinator, within_s=7.0, empty_after_s=3.0)
    assert is_empty
    assert 3.0 + SETTLE_S <= took_s < 3.2 + SETTLE_S
    assert side.standing.draining
    if answers:
        (ask,) = coordinator.asked
        assert ask.operation == DrainOperation(worker_id=WorkerId("d0"), within_s=7.0, force=True)


def test_and_with_what_is_left_when_its_time_is_over() -> None:
    side = Side()
    side.work = OpenWork(2, 1)
    is_empty, took_s = leaves(side, Coordinator(answers=True), within_s=7.0, empty_after_s=100.0)
    assert not is_empty
    assert 7.0 <= took_s < 7.2
