"""The machine of operations: in tables, and against workers and agents that do as they please."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from contracts.control_messages import (
    DrainOperation,
    DrainRequest,
    FlipOperation,
    MoveOperation,
    RemoveOperation,
    RestartOperation,
    RestartWorkerRequest,
    SetRoleRequest,
    StartOperation,
    StartWorkerRequest,
    StopWorkerRequest,
    UndrainOperation,
)
from contracts.errors import BadRequest, NoCapacity, NotFound
from contracts.ids import Incarnation, WorkerId
from coordinator.operation_terms import (
    Answered,
    Call,
    Looked,
    OperationLimits,
    Sight,
    SlotSeen,
    WorkerSeen,
    who_would_be_missed,
    workers_of,
)
from coordinator.operations import Operations
from tests.support.roles import IDENTITY
from worker.standing import OpenWork

if TYPE_CHECKING:
    from contracts.control_messages import Operation, OperationStatus, SlotState
    from contracts.errors import TandemError
    from contracts.messages import MemberRole, Role

LIMITS = OperationLimits(
    drain_s=60.0, settle_s=1.0, drain_lasts_s=15.0, renew_s=3.0, safe_s=20.0, role_s=10.0, open_s=10.0, end_s=10.0,
    start_s=30.0, max_running=3,
)  # fmt: skip
TICK_S = 0.25
P0, P1, D0, D1 = (WorkerId(name) for name in ("p0", "p1", "d0", "d1"))
ROLES: dict[WorkerId, MemberRole] = {P0: "prefill", P1: "prefill", D0: "decode", D1: "decode"}


@dataclass(slots=True)
class Worker:
    """A process and its slot."""

    worker_id: WorkerId
    role: MemberRole
    incarnation: int = 1
    is_up: bool = True
    is_wanted: bool = True
    requests: int = 0
    prompts: int = 0
    answers: int = 0
    draining: bool = False
    drain_ends_s: float = float("inf")
    #: Starts so many seconds from now; None: it does not start.
    starts_in_s: float | None = None
    given_up: bool = False

    def end(self, *, again_in_s: float | None) -> None:
        self.is_up, self.requests, self.draining = False, 0, False
        self.prompts = self.answers = 0
        self.starts_in_s = again_in_s


@dataclass
class World:
    """Workers, a node agent, and the machine; time passes in ticks."""

    workers: dict[WorkerId, Worker] = field(
        default_factory=lambda: {worker_id: Worker(worker_id, role) for worker_id, role in ROLES.items()}
    )
    machine: Operations = field(default_factory=lambda: Operations(LIMITS))
    now_s: float = 0.0
    agent_is_up: bool = True
    #: What calls come to, by their bodies' names; all others do what they ask for.
    lost: set[str] = field(default_factory=set[str])
    calls: list[Call] = field(default_factory=list[Call])
    start_s: float = 3.0
    new_build_starts: bool = True

    def sight(self) -> Sight:
        slots = {
            each.worker_id: SlotSeen(
                worker_id=each.worker_id,
                role=each.role,
                state=self._state(each),
                incarnation=Incarnation(each.incarnation),
                problem="it exited with code 7" if each.given_up else "",
                agent=Incarnation(1),
                address="agent:1",
            )
            for each in self.workers.values()
        }
        up = {
            each.worker_id: WorkerSeen(
                worker_id=each.worker_id,
                incarnation=Incarnation(each.incarnation),
                role=each.role,
                identity=IDENTITY,
                address=f"{each.worker_id}:1",
                draining=each.draining,
                open_requests=each.requests,
                open_prompts=each.prompts,
                open_answers=each.answers,
            )
            for each in self.workers.values()
            if each.is_up
        }
        return Sight(workers=up, slots=slots if self.agent_is_up else {})

    def _state(self, each: Worker) -> SlotState:
        if each.given_up:
            return "given_up"
        return "ready" if each.is_up else "starting" if each.starts_in_s is not None else "stopped"

    def begin(self, operation: Operation) -> int:
        return self.machine.begin(operation, self.sight(), self.now_s)

    def look(self) -> None:
        for instruction in self.machine.handle(Looked(self.sight()), self.now_s):
            if isinstance(instruction, Call):
                self.calls.append(instruction)

    def tick(self) -> None:
        self.look()
        calls, self.calls = self.calls, []
        for call in calls:
            self._carry_out(call)
        self.now_s += TICK_S
        for each in self.workers.values():
            if each.draining and self.now_s > each.drain_ends_s:
                each.draining = False
            if each.starts_in_s is not None:
                each.starts_in_s -= TICK_S
                if each.starts_in_s <= 0:
                    each.starts_in_s, each.is_up = None, True

    def run(self, for_s: float) -> None:
        until_s = self.now_s + for_s
        while self.now_s < until_s:
            self.tick()

    def _carry_out(self, call: Call) -> None:
        name = type(call.body).__name__
        problem = "nobody answers" if name in self.lost else self._done(call)
        self.machine.handle(Answered(call.call_id, problem), self.now_s)

    def _done(self, call: Call) -> str | None:
        match call.body:
            case DrainRequest(target=target, draining=draining, for_s=for_s):
                each = self.workers[WorkerId(call.address.removesuffix(":1"))]
                if not each.is_up or each.incarnation != target:
                    return "it is gone"
                each.draining = draining
                each.drain_ends_s = float("inf") if for_s is None else self.now_s + for_s
            case SetRoleRequest(target=target, role=role):
                each = self.workers[WorkerId(call.address.removesuffix(":1"))]
                if not each.is_up or each.incarnation != target:
                    return "it is gone"
                work = OpenWork(each.requests, 0, each.prompts, each.answers)
                if against := work.against(each.role, role):
                    return f"{against} are open"
                each.role = role
            case StartWorkerRequest(worker_id=worker_id, role=role):
                each = self.workers[worker_id]
                if not each.is_up and each.starts_in_s is None:
                    each.role = role or each.role
                    each.incarnation, each.given_up = each.incarnation + 1, False
                    each.starts_in_s = self.start_s
            case StopWorkerRequest(worker_id=worker_id):
                self.workers[worker_id].end(again_in_s=None)
            case RestartWorkerRequest(worker_id=worker_id, life=life, python=python):
                each = self.workers[worker_id]
                if each.incarnation == life:
                    each.incarnation += 1
                    each.given_up = bool(python) and not self.new_build_starts
                    each.end(again_in_s=None if each.given_up else self.start_s)
        return None

    def status(self, number: int) -> OperationStatus:
        (found,) = [each for each in self.machine.statuses(self.now_s) if each.operation_id == number]
        return found

    def ended(self, number: int, within_s: float = 300.0) -> OperationStatus:
        until_s = self.now_s + within_s
        while self.status(number).state == "running":
            assert self.now_s < until_s, self.status(number)
            self.tick()
        return self.status(number)


# --- each operation ---------------------------------------------------------------------------------


def test_a_drain_ends_when_nothing_has_been_there_for_a_while_and_lasts() -> None:
    world = World()
    world.workers[D0].requests = 2
    number = world.begin(DrainOperation(worker_id=D0))
    world.run(5.0)
    assert world.machine.leaving == {D0}
    assert world.status(number).text == "d0 drains: 2 requests, 0 leases"
    world.workers[D0].requests = 0
    world.run(0.5)
    world.workers[D0].requests = 1  # placed before the drain was known
    world.run(0.75)
    world.workers[D0].requests = 0
    world.run(0.75)
    assert world.status(number).state == "running"
    assert world.ended(number).text == "nothing is left there"
    assert world.machine.leaving == frozenset()
    world.run(100.0)
    assert world.workers[D0].draining, "an operator's drain lasts"
    assert world.ended(world.begin(UndrainOperation(worker_id=D0))).state == "done"
    assert not world.workers[D0].draining


def test_prompts_that_are_read_elsewhere_for_a_worker_keep_it_from_being_drained() -> None:
    drained = WorkerSeen(
        worker_id=D0, incarnation=Incarnation(1), role="decode", identity=IDENTITY, address="d0:1", draining=True
    )
    assert drained.is_drained()
    assert not replace(drained, awaited=1).is_drained()
    assert replace(drained, awaited=1).left() == "0 requests, 0 leases, 1 prompts read elsewhere for it"


def test_a_drain_with_a_deadline_fails_there_and_the_worker_stays_drained() -> None:
    world = World()
    world.workers[D0].requests = 3
    status = world.ended(world.begin(DrainOperation(worker_id=D0, within_s=4.0)))
    assert (status.state, status.text) == ("failed", "after 4 s there are 3 requests, 0 leases")
    assert world.workers[D0].draining


def test_a_flip_takes_the_role_and_then_requests() -> None:
    world = World()
    number = world.begin(FlipOperation(worker_id=D0, role="prefill"))
    assert world.ended(number).text == "it is a prefill worker now"
    assert (world.workers[D0].role, world.workers[D0].draining, world.workers[D0].incarnation) == ("prefill", False, 1)


@pytest.mark.parametrize("worker_id", [P0, D0])
def test_a_worker_becomes_mixed_with_its_work_and_takes_requests_all_the_time(worker_id: WorkerId) -> None:
    world = World()
    worker = world.workers[worker_id]
    worker.requests = worker.prompts = worker.answers = 3
    number = world.begin(FlipOperation(worker_id=worker_id, role="mixed"))
    while world.status(number).state == "running":
        world.tick()
        assert not worker.draining
        assert world.machine.leaving == frozenset()
    status = world.status(number)
    assert (status.state, status.text) == ("done", "it is a mixed worker now; nothing had to leave")
    assert status.age_s <= 3 * TICK_S
    assert (worker.role, worker.requests, worker.incarnation) == ("mixed", 3, 1)


@pytest.mark.parametrize(
    ("role", "text", "outcome"),
    [("decode", "d0 drains: 2 prompts to leave, answers stay", "it is a decode worker now; its answers stayed"),
     ("prefill", "d0 drains: 3 answers to leave, prompts stay", "it is a prefill worker now; its prompts stayed")],
)  # fmt: skip
def test_a_mixed_worker_gives_up_only_what_its_next_role_does_not_do(role: Role, text: str, outcome: str) -> None:
    world = World()
    worker = world.workers[D0]
    worker.role, worker.requests, worker.prompts, worker.answers = "mixed", 5, 2, 3
    number = world.begin(FlipOperation(worker_id=D0, role=role))
    world.run(3.0)
    assert world.status(number).text == text
    assert world.machine.leaving == {D0}
    assert world.machine.keep_answers == ({D0} if role == "decode" else frozenset())
    if role == "decode":
        worker.prompts = 0
    else:
        worker.answers = 0
    world.run(0.75)
    assert worker.role == "mixed", "one that was placed before the drain was known may still come"
    assert world.ended(number).text == outcome
    assert (worker.role, worker.draining, worker.requests) == (role, False, 5)
    assert (world.machine.leaving, world.machine.keep_answers) == (frozenset(), frozenset())


def test_prompts_read_elsewhere_for_it_are_answers_that_a_mixed_worker_is_about_to_have() -> None:
    seen = replace(
        World().sight().workers[D0], role="mixed", draining=True, open_requests=4, open_leases=4, awaited=1
    )  # fmt: skip
    assert seen.is_drained("answers")
    assert not seen.is_drained("prompts")
    assert replace(seen, awaited=0).is_drained("prompts")
    assert not replace(seen, draining=False, open_requests=0, awaited=0).is_drained("answers")


def test_a_mixed_worker_whose_prompts_stay_on_is_taken_back_in_time() -> None:
    world = World()
    worker = world.workers[D0]
    worker.role, worker.requests, worker.prompts = "mixed", 1, 1
    status = world.ended(world.begin(FlipOperation(worker_id=D0, role="decode")))
    assert (status.state, status.text) == (
        "failed", "d0: not drained after 60 s: there are 1 prompts to leave, answers stay"
    )  # fmt: skip
    assert (worker.role, worker.draining) == ("mixed", False)


def test_one_that_was_drained_takes_requests_again_once_it_is_mixed() -> None:
    world = World()
    assert world.ended(world.begin(DrainOperation(worker_id=D0))).state == "done"
    assert world.workers[D0].draining
    assert world.ended(world.begin(FlipOperation(worker_id=D0, role="mixed"))).state == "done"
    assert (world.workers[D0].role, world.workers[D0].draining) == ("mixed", False)


def test_becoming_mixed_needs_an_answer_and_the_same_life() -> None:
    world = World(lost={"SetRoleRequest"})
    status = world.ended(world.begin(FlipOperation(worker_id=D0, role="mixed")))
    assert (status.state, status.text) == ("failed", "d0: nobody answers (within 10 s)")
    assert not world.workers[D0].draining
    number = world.begin(FlipOperation(worker_id=D0, role="mixed"))
    world.tick()
    world.workers[D0].incarnation += 1
    status = world.ended(number)
    assert (status.state, status.text) == ("failed", "d0: its life ended before it had the role")


def test_the_last_writer_may_become_mixed_for_it_writes_all_the_same() -> None:
    world = World()
    world.workers[D1].end(again_in_s=None)
    with pytest.raises(BadRequest, match="without d0 nobody could serve requests"):
        world.begin(FlipOperation(worker_id=D0, role="prefill"))
    assert world.ended(world.begin(FlipOperation(worker_id=D0, role="mixed"))).state == "done"


def test_a_flip_that_is_not_drained_in_time_is_taken_back() -> None:
    world = World()
    world.workers[D0].requests = 1
    status = world.ended(world.begin(FlipOperation(worker_id=D0, role="prefill")))
    assert (status.state, status.text) == ("failed", "d0: not drained after 60 s: there are 1 requests, 0 leases")
    assert (world.workers[D0].role, world.workers[D0].draining) == ("decode", False)


def test_a_worker_that_cannot_be_told_its_role_takes_requests_again() -> None:
    world = World(lost={"SetRoleRequest"})
    status = world.ended(world.begin(FlipOperation(worker_id=D0, role="prefill")))
    assert (status.state, status.text) == ("failed", "d0: nobody answers (within 10 s)")
    assert not world.workers[D0].draining


def test_a_restart_goes_from_one_to_the_next_and_never_has_two_down() -> None:
    world = World()
    number = world.begin(RestartOperation())
    seen: list[WorkerId] = []
    while world.status(number).state == "running":
        world.tick()
        down = {each.worker_id for each in world.workers.values() if each.draining or not each.is_up}
        assert len(down) <= 1
        seen += [each for each in down if not seen or seen[-1] != each]
    assert seen == [P0, D0, P1, D1], "soon there is one new worker of each role"
    assert world.status(number).text == "4 restarted"
    assert {each.incarnation for each in world.workers.values()} == {2}


def test_a_restart_waits_while_the_others_could_not_serve() -> None:
    world = World()
    number = world.begin(RestartOperation(worker_ids=(D0, D1)))
    while world.workers[D0].incarnation == 1:
        world.tick()
    world.workers[P0].end(again_in_s=15.0)
    world.workers[P1].end(again_in_s=None)
    while not world.workers[D0].is_up:
        world.tick()
    # Nobody can serve as it is: one more that is down changes nothing.
    world.workers[P0].is_up, world.workers[P0].starts_in_s = True, None
    world.workers[D0].draining = True
    world.run(2.0)
    assert "d1 waits for the others: without d1 nobody could serve" in world.status(number).text
    assert not world.workers[D1].draining
    world.workers[D0].draining = False
    assert world.ended(number).state == "done"


def test_a_build_that_does_not_start_ends_the_restart_at_its_first_worker() -> None:
    world = World(new_build_starts=False)
    status = world.ended(world.begin(RestartOperation(python="/new/python")))
    assert (status.state, status.text) == ("failed", "p0: given up: it exited with code 7 (0 of 4 done)")
    assert [each.worker_id for each in world.workers.values() if each.is_up and not each.draining] == [P1, D0, D1]


def test_a_removed_worker_is_stopped_and_can_be_started() -> None:
    world = World()
    world.workers[D0].requests = 1
    number = world.begin(RemoveOperation(worker_id=D0, within_s=5.0))
    assert world.ended(number).state == "done", "what is there after its time loses it"
    assert not world.workers[D0].is_up
    assert world.ended(world.begin(StartOperation(worker_id=D0))).state == "done"
    assert world.workers[D0].is_up


def test_a_worker_moves_once_the_other_one_is_up_in_its_role() -> None:
    """The last writer may: somebody writes all the time."""
    world = World()
    for each in (P1, D1):
        world.workers[each].end(again_in_s=None)
    world.workers[D0].requests = 1
    number = world.begin(MoveOperation(worker_id=D0, to=P1))
    world.run(2.0)
    assert not world.workers[D0].draining
    assert "p1 starts" in world.status(number).text
    world.run(3.0)
    assert (world.workers[P1].is_up, world.workers[P1].role) == (True, "decode")
    assert world.machine.leaving == {D0}
    assert world.workers[D0].is_up
    world.workers[D0].requests = 0
    status = world.ended(number)
    assert (status.state, status.text) == ("done", "it has stopped, and p1 is up in its place")
    assert not world.workers[D0].is_up


def test_where_the_other_one_does_not_come_nothing_happens_to_the_one_that_was_to_move() -> None:
    world = World()
    world.workers[D1].end(again_in_s=None)
    world.workers[D1].given_up = True
    world.lost = {"StartWorkerRequest"}
    status = world.ended(world.begin(MoveOperation(worker_id=D0, to=D1)))
    assert status.state == "failed"
    assert status.text.startswith("d1: ")
    assert world.workers[D0].is_up
    assert not any(isinstance(call.body, DrainRequest) for call in world.calls)
    with pytest.raises(BadRequest, match="p1 runs already"):
        world.begin(MoveOperation(worker_id=D0, to=P1))
    world.workers[P1].end(again_in_s=None)
    with pytest.raises(NotFound, match="d1 is not up"):
        world.begin(MoveOperation(worker_id=D1, to=P1))


def test_a_move_that_is_cancelled_while_it_drains_leaves_both_there() -> None:
    world = World()
    world.workers[D1].end(again_in_s=None)
    world.workers[D0].requests = 1
    number = world.begin(MoveOperation(worker_id=D0, to=D1))
    world.run(6.0)
    assert world.workers[D0].draining
    world.machine.cancel(number, world.now_s)
    assert world.ended(number).state == "cancelled"
    assert all(world.workers[each].is_up and not world.workers[each].draining for each in (D0, D1))


def test_an_order_that_was_undone_meanwhile_is_given_again() -> None:
    world = World()
    world.workers[D0].end(again_in_s=None)
    number = world.begin(StartOperation(worker_id=D0))
    world.run(1.0)
    world.workers[D0].end(again_in_s=None)
    assert world.ended(number, within_s=10.0).state == "done"


def test_an_agent_that_is_lost_fails_the_restart_with_the_reason() -> None:
    world = World()
    number = world.begin(RestartOperation(worker_ids=(D0,)))
    world.agent_is_up = False
    status = world.ended(number)
    assert (status.state, status.text) == ("failed", "d0: its node agent is not heard (within 40 s)")
    world.run(LIMITS.drain_lasts_s + 1)
    assert (world.workers[D0].incarnation, world.workers[D0].draining) == (1, False)


def test_a_life_that_ends_while_it_is_drained_fails_a_flip_and_is_as_good_as_restarted() -> None:
    for operation, expected in (
        (FlipOperation(worker_id=D0, role="prefill"), "failed"),
        (RestartOperation(worker_ids=(D0,)), "done"),
    ):
        world = World()
        world.workers[D0].requests = 1
        number = world.begin(operation)
        world.run(3.0)
        world.workers[D0].incarnation += 1
        world.workers[D0].end(again_in_s=1.0)
        assert world.ended(number).state == expected
        assert not world.workers[D0].draining


@pytest.mark.parametrize("after_s", [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 2.5, 4.0, 5.0])
def test_a_cancelled_restart_leaves_everybody_up_and_open(after_s: float) -> None:
    world = World()
    number = world.begin(RestartOperation())
    world.run(after_s)
    world.machine.cancel(number, world.now_s)
    assert world.ended(number).state == "cancelled"
    world.run(10.0)
    assert all(each.is_up and not each.draining for each in world.workers.values())
    world.machine.cancel(number, world.now_s)
    with pytest.raises(NotFound):
        world.machine.cancel(99, world.now_s)


def test_undraining_ends_a_drain_that_runs() -> None:
    world = World()
    world.workers[D0].requests = 1
    draining = world.begin(DrainOperation(worker_id=D0))
    world.run(2.0)
    opening = world.begin(UndrainOperation(worker_id=D0))
    assert world.status(draining).state == "cancelled"
    assert world.ended(opening).state == "done"
    assert not world.workers[D0].draining


# --- what is refused --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "error", "text"),
    [
        (DrainOperation(worker_id=WorkerId("x")), NotFound, "there is no worker x; there are d0, d1, p0, p1"),
        (FlipOperation(worker_id=D0, role="decode"), BadRequest, "d0 is a decode worker already"),
        (RestartOperation(worker_ids=(D0, D0)), BadRequest, "a worker is named twice: d0, d0"),
    ],
)
def test_what_makes_no_sense_is_refused(operation: Operation, error: type[TandemError], text: str) -> None:
    with pytest.raises(error) as refused:
        World().begin(operation)
    assert refused.value.message == text


def test_the_last_worker_of_a_role_is_spared_unless_it_is_forced() -> None:
    world = World()
    world.workers[P1].end(again_in_s=None)
    text = r"without p0 nobody could serve requests: the others are 2 decode \(forced, requests are refused meanwhile\)"
    for operation in (DrainOperation(worker_id=P0), RemoveOperation(worker_id=P0), RestartOperation(worker_ids=(P0,))):
        with pytest.raises(BadRequest, match=text):
            world.begin(operation)
    assert world.ended(world.begin(RestartOperation(worker_ids=(P0,), force=True))).state == "done"
    world.workers[P1].is_up = True
    world.begin(DrainOperation(worker_id=P1))
    world.tick()
    with pytest.raises(BadRequest, match="without p0"):
        world.begin(DrainOperation(worker_id=P0))


def test_workers_of_another_kv_do_not_stand_in() -> None:
    world = World()
    sight = world.sight()
    newer = replace(sight.workers[P1], identity=msgspec.structs.replace(IDENTITY, protocol_version=2))
    mixed = Sight(workers={**sight.workers, P1: newer}, slots=sight.slots)
    assert who_would_be_missed(P0, sight, ()) is None
    assert who_would_be_missed(P0, mixed, ()) is not None


def test_a_worker_belongs_to_one_operation_at_a_time_and_few_run_at_once() -> None:
    world = World()
    number = world.begin(RestartOperation())
    with pytest.raises(BadRequest, match=f"operation {number} has d1; cancel it first"):
        world.begin(DrainOperation(worker_id=D1))
    world.machine.cancel(number, world.now_s)
    for _ in range(LIMITS.max_running):
        world.workers[WorkerId(f"m{_}")] = Worker(WorkerId(f"m{_}"), "mixed", requests=1)
        world.begin(DrainOperation(worker_id=WorkerId(f"m{_}")))
    with pytest.raises(NoCapacity, match="3 operations run"):
        world.begin(DrainOperation(worker_id=D1))


def test_stores_are_restarted_first_and_not_drained() -> None:
    world = World()
    store = WorkerId("store-a")
    world.workers[store] = Worker(store, "store")
    assert workers_of(RestartOperation(), world.sight())[0] == store
    with pytest.raises(BadRequest, match="store-a is a store"):
        world.begin(DrainOperation(worker_id=store))
    assert world.ended(world.begin(RestartOperation(worker_ids=(store,)))).state == "done"


# --- whatever happens -------------------------------------------------------------------------------

WORKER_IDS = st.sampled_from([P0, P1, D0, D1])
OPERATIONS = st.one_of(
    st.builds(FlipOperation, worker_id=WORKER_IDS, role=st.sampled_from(["prefill", "decode", "mixed"])),
    st.builds(RestartOperation, worker_ids=st.lists(WORKER_IDS, max_size=3).map(tuple), force=st.booleans()),
    st.builds(StartOperation, worker_id=WORKER_IDS),
    st.builds(MoveOperation, worker_id=WORKER_IDS, to=WORKER_IDS),
    st.builds(RemoveOperation, worker_id=WORKER_IDS, within_s=st.none() | st.just(3.0), force=st.booleans()),
    st.builds(UndrainOperation, worker_id=WORKER_IDS),
)
BODIES = ("DrainRequest", "SetRoleRequest", "StartWorkerRequest", "StopWorkerRequest", "RestartWorkerRequest")


class History(RuleBasedStateMachine):
    """Operations that take their drain back, over workers that crash, agents that vanish and calls that are lost."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()

    @rule(operation=OPERATIONS)
    def begin(self, operation: Operation) -> None:
        with suppress(BadRequest, NotFound, NoCapacity):
            self.world.begin(operation)

    @rule(number=st.integers(1, 8))
    def cancel(self, number: int) -> None:
        if number <= len(self.world.machine.statuses(self.world.now_s)):
            self.world.machine.cancel(number, self.world.now_s)

    @rule(for_s=st.sampled_from([0.25, 0.5, 1.0, 3.0, 20.0]))
    def pass_time(self, for_s: float) -> None:
        self.world.run(for_s)

    @rule(worker_id=WORKER_IDS, requests=st.integers(0, 2))
    def have(self, worker_id: WorkerId, requests: int) -> None:
        if self.world.workers[worker_id].is_up:
            self.world.workers[worker_id].requests = requests

    @rule(worker_id=WORKER_IDS, again_in_s=st.sampled_from([0.25, 5.0]))
    def crash(self, worker_id: WorkerId, again_in_s: float) -> None:
        each = self.world.workers[worker_id]
        if each.is_up:
            each.incarnation += 1
            each.end(again_in_s=again_in_s)

    @rule(is_up=st.booleans())
    def agent(self, *, is_up: bool) -> None:
        self.world.agent_is_up = is_up

    @rule(lost=st.sets(st.sampled_from(BODIES)))
    def lose(self, lost: set[str]) -> None:
        self.world.lost = lost

    @invariant()
    def each_worker_has_one_operation(self) -> None:
        running = [each for each in self.world.machine.statuses(self.world.now_s) if each.state == "running"]
        assert len(running) == self.world.machine.num_running
        assert self.world.machine.leaving <= set(self.world.machine.busy)

    def teardown(self) -> None:
        """Left alone, everything ends, and nobody stays drained: nobody asked for that."""
        self.world.run(700.0)
        statuses = self.world.machine.statuses(self.world.now_s)
        assert [each for each in statuses if each.state == "running"] == []
        assert [each.worker_id for each in self.world.workers.values() if each.draining] == []
        assert self.world.machine.leaving == frozenset()


TestHistory = History.TestCase
TestHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
