"""A better split becomes flips, one after the other."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.control_messages import FlipOperation, OperationStatus
from contracts.errors import BadRequest
from contracts.ids import WorkerId
from coordinator.replan_terms import Split
from coordinator.split_applier import GIVE_UP_AFTER_S, MIN_STAY_S, SplitApplier, next_flip
from simulator import VirtualClock, run
from tests.support.conductors import info_of

if TYPE_CHECKING:
    from contracts.control_messages import Operation, OperationState, WorkerSlot
    from contracts.messages import Role
    from simulator import Program

SPLIT = Split(
    text="1 prefill + 3 decode", gain=0.2, instead_of="3 prefill + 1 decode", workers=(("decode", 3), ("prefill", 1))
)


class Operator:
    def __init__(self) -> None:
        self.roles: dict[WorkerId, Role] = {
            WorkerId("p-0"): "prefill",
            WorkerId("p-1"): "prefill",
            WorkerId("p-2"): "prefill",
            WorkerId("d-0"): "decode",
        }
        self.begun: list[Operation] = []
        self.states: list[OperationState] = []
        self.refuses = ""

    def begin(self, operation: Operation, *, by: str = "operator") -> int:
        assert by == "replanner"
        if self.refuses:
            raise BadRequest(self.refuses)
        self.begun.append(operation)
        self.states.append("running")
        return len(self.begun) - 1

    def end(self, state: OperationState = "done") -> None:
        operation = self.begun[-1]
        assert isinstance(operation, FlipOperation)
        self.states[-1] = state
        if state == "done":
            self.roles[operation.worker_id] = operation.role

    def statuses(self) -> tuple[OperationStatus, ...]:
        each = enumerate(zip(self.begun, self.states, strict=True))
        return tuple(
            OperationStatus(operation_id=number, operation=operation, state=state, text="it says why", age_s=0.0)
            for number, (operation, state) in each
        )

    def slots(self) -> tuple[WorkerSlot, ...]:
        return ()


class Desk:
    def __init__(self) -> None:
        self.clock = VirtualClock()
        self.operator = Operator()
        self.told: list[str] = []
        self.applier = SplitApplier(
            self.clock,
            infos=lambda: [info_of(name, role=role) for name, role in self.operator.roles.items()],
            requests=lambda: {WorkerId("p-0"): 9},
            operator=self.operator,
            log=self.told.append,
        )


def test_flips_come_one_after_the_other_and_the_busiest_stays() -> None:
    async def main(program: Program) -> None:
        desk = Desk()
        async with desk.applier:
            desk.applier.apply(SPLIT)
            await desk.clock.sleep(5.0)
            assert desk.operator.begun == [FlipOperation(worker_id=WorkerId("p-1"), role="decode")]
            desk.operator.end()
            await desk.clock.sleep(5.0)
            assert desk.operator.begun[1:] == [FlipOperation(worker_id=WorkerId("p-2"), role="decode")]
            desk.operator.end()
            await desk.clock.sleep(5.0)
            assert len(desk.operator.begun) == 2
            assert desk.told == ["the split 1 prefill + 3 decode is carried out"]
            # What it does is to be seen before the next.
            desk.applier.apply(Split(text="back", gain=1.0, instead_of="", workers=(("decode", 1), ("prefill", 3))))
            await desk.clock.sleep(5.0)
            assert len(desk.operator.begun) == 2
            await desk.clock.sleep(MIN_STAY_S)
            desk.applier.apply(Split(text="back", gain=1.0, instead_of="", workers=(("decode", 1), ("prefill", 3))))
            await desk.clock.sleep(5.0)
            assert len(desk.operator.begun) == 3

    run(main, seed=1)


@pytest.mark.parametrize("trouble", ["failed", "cancelled", "refused", "endless"])
def test_a_split_that_cannot_be_carried_out_is_given_up(trouble: str) -> None:
    async def main(program: Program) -> None:
        desk = Desk()
        async with desk.applier:
            if trouble == "refused":
                desk.operator.refuses = "nobody could serve"
            desk.applier.apply(SPLIT)
            await desk.clock.sleep(5.0)
            if trouble in ("failed", "cancelled"):
                desk.operator.end(trouble)  # type: ignore[arg-type]
            if trouble == "endless":
                await desk.clock.sleep(GIVE_UP_AFTER_S)
                desk.operator.end()
            await desk.clock.sleep(5.0)
            assert len(desk.operator.begun) == (0 if trouble == "refused" else 1)
            assert desk.told[0].startswith("the split 1 prefill + 3 decode is given up")

    run(main, seed=1)


def test_a_split_without_numbers_is_only_told() -> None:
    async def main(program: Program) -> None:
        desk = Desk()
        async with desk.applier:
            desk.applier.apply(Split(text="2 mixed", gain=1.0, instead_of=""))
            await desk.clock.sleep(5.0)
            assert not desk.operator.begun
            assert "did not say" in desk.told[0]

    run(main, seed=1)


ROLES: list[Role] = ["prefill", "decode", "mixed"]


@given(
    st.lists(st.sampled_from(ROLES), min_size=1, max_size=12), st.lists(st.sampled_from(ROLES), min_size=1, max_size=12)
)
def test_flips_reach_the_split_and_no_more_than_needed(now: list[Role], then: list[Role]) -> None:
    roles: dict[WorkerId, Role] = {WorkerId(str(number)): role for number, role in enumerate(now)}
    wanted = Counter(then)
    needed = sum(max(0, number - Counter(now)[role]) for role, number in wanted.items())
    count = 0
    while (flip := next_flip(roles, wanted, {})) is not None:
        roles[flip[0]] = flip[1]
        count += 1
        assert count <= len(now)
    assert count <= needed
    if len(now) == len(then):
        assert Counter(roles.values()) == wanted
