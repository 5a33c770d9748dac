"""What `tandem workers` shows."""

from __future__ import annotations

import pytest

from cluster.doctor import sleeps
from cluster.operate import WorkerRow, worker_rows
from contracts.control_messages import DrainOperation, OperationsReply, OperationStatus, WorkerSlot
from contracts.ids import Incarnation, WorkerId
from contracts.messages import Member, WorkerInfo, WorkerLoad
from tests.support.roles import IDENTITY


def member(name: str, load: WorkerLoad) -> Member:
    info = WorkerInfo(
        worker_id=WorkerId(name),
        incarnation=Incarnation(1),
        role="decode",
        address=f"{name}:1",
        model="m",
        identity=IDENTITY,
        total_blocks=10,
        max_context_tokens=64,
        node="here",
        build="1.2 (protocol 3)",
    )
    return Member(info=info, load=load, heartbeat_age_s=0.1)


def slot(name: str, state: str, problem: str = "", doing: str = "") -> WorkerSlot:
    return WorkerSlot(
        worker_id=WorkerId(name),
        pool="d",
        role="decode",
        state=state,  # type: ignore[arg-type]
        problem=problem,
        doing=doing,
    )


def test_everybody_has_a_line_whether_up_or_not() -> None:
    drain = OperationStatus(
        operation_id=4, operation=DrainOperation(worker_id=WorkerId("d1")), state="running", text="", age_s=1.0
    )
    rows = worker_rows(
        [
            member("d0", WorkerLoad(free_blocks=4, cached_blocks=3, open_requests=2)),
            member("d1", WorkerLoad(free_blocks=10, draining=True, open_leases=1)),
            member("d2", WorkerLoad(free_blocks=10, draining=True)),
        ],
        OperationsReply(
            operations=(drain,),
            slots=(slot("d0", "ready"), slot("d3", "given_up", "no such file"), slot("d4", "absent")),
        ),
    )
    assert [(row.worker_id, row.state, row.requests, row.used_blocks) for row in rows] == [
        ("d0", "up", 2, 3),
        ("d1", "draining", 0, 0),
        ("d2", "drained", 0, 0),
        ("d3", "given up", 0, 0),
        ("d4", "absent", 0, 0),
    ]
    assert rows[0].build == "1.2 (protocol 3)"
    assert rows[1].note == "operation 4: drain d1"
    assert rows[3] == WorkerRow(worker_id=WorkerId("d3"), role="decode", state="given up", note="no such file")


def test_a_start_says_what_it_is_at() -> None:
    starting = slot("d0", "starting", "crashed before", "loading weights 40%")
    (row,) = worker_rows([], OperationsReply(operations=(), slots=(starting,)))
    assert (row.state, row.note) == ("starting", "loading weights 40%")


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["absent", "stopped"], True),
        (["absent", "starting"], False),
        (["given_up", "absent"], False),
        ([], False),
    ],
)
def test_a_model_sleeps_where_nobody_is_wanted(states: list[str], expected: bool) -> None:
    store = WorkerSlot(worker_id=WorkerId("store"), pool="", role="store", state="starting")
    slots = [slot(f"d{number}", state) for number, state in enumerate(states)]
    assert sleeps([store, *slots]) is expected
