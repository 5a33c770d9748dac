"""The flags of the commands that operate a running cluster: workers, operations, drain, flip, restart, start, move and
stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, cast

from cyclopts import Parameter

from cluster.cluster_flags import AsJson, ClusterFlags, Model, running_cluster, running_clusters
from contracts.config import parse_duration_s
from contracts.errors import ConfigError
from contracts.ids import WorkerId

if TYPE_CHECKING:
    from cyclopts import App

    from contracts.control_messages import Operation

WorkerName = Annotated[str, Parameter(help="Its id, as `tandem workers` shows it.")]
RoleName = Literal["prefill", "decode", "mixed"]
NoWait = Annotated[
    bool,
    Parameter(name="--no-wait", negative="", help="Return as soon as it has begun, and print its number."),
]
Force = Annotated[
    bool, Parameter(name="--force", negative="", help="Even where nobody is left meanwhile who could serve requests.")
]
Within = Annotated[
    str | None,
    Parameter(name="--within", help="How long it may take, for example 30s; what is there then loses its worker."),
]


def workers(
    *,
    model: Model = None,
    where: ClusterFlags | None = None,
    as_json: AsJson = False,
) -> int:
    """Who is in a running cluster: roles, states, load, builds."""
    from cluster import operate

    return operate.print_workers(running_clusters(where, model=model), as_json=as_json)


def operations(
    *,
    cancel: Annotated[int | None, Parameter(name="--cancel", help="End this operation where it stands.")] = None,
    model: Model = None,
    where: ClusterFlags | None = None,
    as_json: AsJson = False,
) -> int:
    """The operations that run on a cluster, and those that ended last."""
    from cluster import operate

    if cancel is not None:
        one = running_cluster(where, model=model)
        return operate.print_operations([one], cancel, as_json=as_json)
    return operate.print_operations(running_clusters(where, model=model), None, as_json=as_json)


def drain(
    worker: WorkerName,
    /,
    *,
    within: Within = None,
    undo: Annotated[bool, Parameter(name="--undo", negative="", help="Have it take requests again.")] = False,
    force: Force = False,
    no_wait: NoWait = False,
    where: ClusterFlags | None = None,
) -> int:
    """Keep new requests from a worker, and wait until it has none."""
    from contracts.control_messages import DrainOperation, UndrainOperation

    operation: Operation = UndrainOperation(worker_id=WorkerId(worker))
    if not undo:
        operation = DrainOperation(worker_id=WorkerId(worker), within_s=_duration_s(within), force=force)
    return _run(operation, worker, where, no_wait=no_wait)


def flip(
    worker: WorkerName,
    role: Annotated[RoleName, Parameter(help="That it is to have.")],
    /,
    *,
    force: Force = False,
    no_wait: NoWait = False,
    where: ClusterFlags | None = None,
) -> int:
    """Give a worker another role, in the same process. What that role does not do leaves first; to become mixed
    nothing has to."""
    from contracts.control_messages import FlipOperation

    operation = FlipOperation(worker_id=WorkerId(worker), role=role, force=force)
    return _run(operation, worker, where, no_wait=no_wait)


def restart(
    *worker: WorkerName,
    rolling: Annotated[
        bool, Parameter(name="--rolling", negative="", help="All workers and stores, where none is named.")
    ] = False,
    python: Annotated[
        str | None,
        Parameter(name="--python", help="Interpreter of the build that they are to run, on their machines."),
    ] = None,
    force: Force = False,
    no_wait: NoWait = False,
    model: Model = None,
    where: ClusterFlags | None = None,
) -> int:
    """Drain and restart workers, one after the other."""
    from contracts.control_messages import RestartOperation

    if not worker and not rolling:
        raise ConfigError("whom? Name workers, or give --rolling for all")
    names = tuple(WorkerId(each) for each in worker)
    operation = RestartOperation(worker_ids=names, python=python or "", force=force)
    first = worker[0] if worker else None
    return _run(operation, first, where, no_wait=no_wait, model=model)


def start(
    worker: WorkerName,
    /,
    *,
    role: Annotated[RoleName | None, Parameter(name="--role", help="Instead of that of its pool.")] = None,
    no_wait: NoWait = False,
    where: ClusterFlags | None = None,
) -> int:
    """Start a worker that its node agent has a place for."""
    from contracts.control_messages import StartOperation

    operation = StartOperation(worker_id=WorkerId(worker), role=role)
    return _run(operation, worker, where, no_wait=no_wait)


def move(
    worker: WorkerName,
    to: Annotated[str, Parameter(help="Worker that is started instead, on another machine for example.")],
    /,
    *,
    no_wait: NoWait = False,
    where: ClusterFlags | None = None,
) -> int:
    """Start another worker, and when it is ready drain and end this one: what it has goes on elsewhere."""
    from contracts.control_messages import MoveOperation

    operation = MoveOperation(worker_id=WorkerId(worker), to=WorkerId(to))
    return _run(operation, worker, where, no_wait=no_wait)


def stop(
    worker: WorkerName,
    /,
    *,
    within: Within = None,
    force: Force = False,
    no_wait: NoWait = False,
    where: ClusterFlags | None = None,
) -> int:
    """Drain a worker and end its process."""
    from contracts.control_messages import RemoveOperation

    operation = RemoveOperation(worker_id=WorkerId(worker), within_s=_duration_s(within), force=force)
    return _run(operation, worker, where, no_wait=no_wait)


def add_operate_commands(app: App) -> None:
    for command in (workers, operations, drain, flip, restart, start, move, stop):
        app.command(command)


def _run(
    operation: Operation,
    worker: str | None,
    where: ClusterFlags | None,
    *,
    no_wait: bool,
    model: str | None = None,
) -> int:
    from cluster import operate

    cluster = running_cluster(where, model=model, worker=worker)
    return operate.run(cluster, operation, waits=not no_wait)


def _duration_s(text: str | None) -> float | None:
    if text is None:
        return None
    try:
        return cast("float", parse_duration_s(text))
    except ValueError as error:
        raise ConfigError(f"--within: {error}") from None
