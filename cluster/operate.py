"""Operating a running cluster: what `tandem workers` and `operations` print, what `drain`, `flip`, `restart`, `start`
and `stop` do."""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING, TypeVar

import msgspec
import uvloop
from rich.console import Console
from rich.table import Table

from contracts.control_messages import OPERATE, OPERATIONS, OperateRequest, OperationsRequest
from contracts.errors import DeadlineExceeded, NotFound, WorkerUnavailable
from contracts.ids import WorkerId
from contracts.messages import MEMBERS, Empty
from coordinator.operation_terms import title
from rpc import GrpcNetwork, LiveClock

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from cluster.cache import Cluster
    from contracts.control_messages import Operation, OperationsReply, OperationStatus, WorkerSlot
    from contracts.messages import Member, MembersReply, Method
    from rpc import Channel

RequestT = TypeVar("RequestT", bound=msgspec.Struct)
ReplyT = TypeVar("ReplyT", bound=msgspec.Struct)
AnswerT = TypeVar("AnswerT")

#: Deadline of each question.
ASK_TIMEOUT_S = 5.0
#: Between looks at an operation that is waited for.
LOOK_INTERVAL_S = 0.3
#: A coordinator that does not answer may be starting again: it is asked for so long.
PATIENCE_S = 15.0


def run(cluster: Cluster, operation: Operation, *, waits: bool) -> int:
    """Begins an operation and follows it to its end, saying what it waits for. 0 where it is done. Interrupted, it
    goes on without us. Raises what the coordinator refuses it with."""
    begun: list[int] = []
    try:
        return asking(cluster, lambda channel: _run(channel, operation, begun, waits=waits))
    except KeyboardInterrupt:
        for number in begun:
            print(
                f"\noperation {number} goes on; `tandem operations` shows it, and --cancel {number} ends it",
                file=sys.stderr,
            )
        raise


async def _run(channel: Channel, operation: Operation, begun: list[int], *, waits: bool) -> int:
    reply = await channel.call(OPERATE, OperateRequest(operation=operation), timeout_s=ASK_TIMEOUT_S)
    number = reply.operation_id
    begun.append(number)
    _say(f"operation {number}: {title(operation)}")
    if not waits:
        return 0
    told = ""
    while True:
        status = _found(number, await _patiently(channel, OPERATIONS, OperationsRequest()))
        if status.state != "running":
            _say(f"{status.state} after {status.age_s:.1f} s: {status.text}")
            return int(status.state != "done")
        if status.text != told:
            told = status.text
            _say(told)
        await asyncio.sleep(LOOK_INTERVAL_S)


def _found(number: int, reply: OperationsReply) -> OperationStatus:
    """Raises WorkerUnavailable where nothing is known of it any more."""
    for status in reply.operations:
        if status.operation_id == number:
            return status
    raise WorkerUnavailable(f"the coordinator does not know operation {number} any more: it was restarted")


def print_operations(clusters: Sequence[Cluster], cancel: int | None, *, as_json: bool) -> int:
    """Those that run, and the last that ended; of each model."""
    ask = OperationsRequest(cancel=cancel)
    found = [
        (cluster, asking(cluster, lambda channel: channel.call(OPERATIONS, ask, timeout_s=ASK_TIMEOUT_S)).operations)
        for cluster in clusters
    ]
    if as_json:
        print(msgspec.json.encode(by_model(found)).decode())
        return 0
    for cluster, statuses in found:
        if len(found) > 1:
            _say(f"{cluster.model}:")
        table = table_of("number", "operation", "state", "age", "by", "")
        for status in statuses:
            table.add_row(
                str(status.operation_id),
                title(status.operation),
                status.state,
                f"{status.age_s:.0f} s",
                status.by,
                status.text,
            )
        _print(table)
    return 0


def by_model(found: Sequence[tuple[Cluster, AnswerT]]) -> object:
    """What is printed as JSON: of one cluster the answer, of several an object by model."""
    if len(found) == 1:
        return found[0][1]
    return {str(cluster.model): answer for cluster, answer in found}


def print_workers(clusters: Sequence[Cluster], *, as_json: bool) -> int:
    """One line for each member, and for each worker that a node agent could start; of all models."""

    async def ask(channel: Channel) -> tuple[MembersReply, OperationsReply]:
        members = await channel.call(MEMBERS, Empty(), timeout_s=ASK_TIMEOUT_S)
        return members, await channel.call(OPERATIONS, OperationsRequest(), timeout_s=ASK_TIMEOUT_S)

    answers = [asking(cluster, ask) for cluster in clusters]
    rows = [row for members, reply in answers for row in worker_rows(members.members, reply)]
    if not rows:
        raise NotFound("the coordinator knows of no worker, and of no node agent")
    if as_json:
        print(msgspec.json.encode(rows).decode())
        return 0
    table = table_of("worker", "role", "state", "requests", "blocks", "node", "build", "")
    for row in rows:
        blocks = f"{row.used_blocks} of {row.total_blocks}" if row.total_blocks else ""
        requests = str(row.requests) if row.total_blocks else ""
        table.add_row(row.worker_id, row.role, row.state, requests, blocks, row.node, row.build, row.note)
    _print(table)
    return 0


class WorkerRow(msgspec.Struct, frozen=True, kw_only=True):
    """A worker or store, as people want to know it."""

    worker_id: WorkerId
    role: str
    #: "up", "suspect", "draining", "drained", or its slot's state.
    state: str
    requests: int = 0
    #: Blocks that requests and leases hold, of how many.
    used_blocks: int = 0
    total_blocks: int = 0
    node: str = ""
    build: str = ""
    #: The operation that has it, what its start is at, or why it is not up.
    note: str = ""


def worker_rows(members: Sequence[Member], reply: OperationsReply) -> list[WorkerRow]:
    """By worker id. Pure."""
    notes: dict[WorkerId, str] = {}
    for status in reply.operations:
        worker_id = getattr(status.operation, "worker_id", None)
        if status.state == "running" and worker_id is not None:
            notes[worker_id] = f"operation {status.operation_id}: {title(status.operation)}"
    rows = {member.info.worker_id: _member_row(member, notes) for member in members}
    for slot in reply.slots:
        if slot.worker_id not in rows:
            rows[slot.worker_id] = _slot_row(slot, notes)
    return [row for _, row in sorted(rows.items())]


def _member_row(member: Member, notes: dict[WorkerId, str]) -> WorkerRow:
    info, load = member.info, member.load
    state: str = member.state
    if load.draining:
        state = "draining" if load.open_requests or load.open_leases else "drained"
    return WorkerRow(
        worker_id=info.worker_id,
        role=info.role,
        state=state,
        requests=load.open_requests,
        used_blocks=info.total_blocks - load.available_blocks,
        total_blocks=info.total_blocks,
        node=info.node,
        build=info.build,
        note=notes.get(info.worker_id, ""),
    )


def _slot_row(slot: WorkerSlot, notes: dict[WorkerId, str]) -> WorkerRow:
    return WorkerRow(
        worker_id=slot.worker_id,
        role=slot.role,
        state=slot.state.replace("_", " "),
        note=notes.get(slot.worker_id, slot.doing or slot.problem),
    )


# --- asking -----------------------------------------------------------------------------------------


def asking(cluster: Cluster, ask: Callable[[Channel], Awaitable[AnswerT]]) -> AnswerT:
    """Asks the coordinator of a running cluster, over a connection of its own."""

    async def live() -> AnswerT:
        network = GrpcNetwork(token=cluster.token)
        try:
            return await ask(network.channel(cluster.coordinator))
        finally:
            await network.close()

    return uvloop.run(live())


async def _patiently(channel: Channel, method: Method[RequestT, ReplyT], body: RequestT) -> ReplyT:
    """Asks again while the coordinator does not answer, for `PATIENCE_S`; then raises that."""
    clock = LiveClock()
    until_s = clock.now_s() + PATIENCE_S
    while True:
        try:
            return await channel.call(method, body, timeout_s=ASK_TIMEOUT_S)
        except (WorkerUnavailable, DeadlineExceeded):
            if clock.now_s() > until_s:
                raise
            await clock.sleep(LOOK_INTERVAL_S)


def _say(line: str) -> None:
    print(line, flush=True)


def table_of(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in names:
        table.add_column(name, justify="right" if name in ("requests", "age") else "left")
    return table


def _print(table: Table) -> None:
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=200)).print(table)
