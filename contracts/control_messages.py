"""What operators, the coordinator, node agents and workers say to each other about who runs where, in which role.

Who calls whom:

    operator     -> coordinator   Operate, Operations
    coordinator  -> worker        Drain, SetRole (and Migrate: see `contracts.messages`)
    node agent   -> coordinator   AgentBeat
    coordinator  -> node agent    StartWorker, StopWorker, RestartWorker
"""

from __future__ import annotations

from typing import Literal

import msgspec

from contracts.ids import Incarnation, WorkerId
from contracts.messages import Empty, MemberRole, Method, Role
from contracts.weight_messages import NodeWeights

# --- workers ----------------------------------------------------------------------------------------


class DrainRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """From now on no new request is taken (NotReady), or with `draining` false again. What is here goes on, ends or is
    moved away. Idempotent; the last one counts. Raises StaleIncarnation."""

    target: Incarnation
    draining: bool
    reason: str = ""
    #: After so long without another word the drain is over by itself: whoever asked for it may be gone. None: it lasts.
    for_s: float | None = None


class SetRoleRequest(msgspec.Struct, frozen=True, kw_only=True):
    """The worker has this role from now on, and registers with it. Idempotent.

    To become `mixed` nothing has to leave, and from `mixed` only the requests of the kind that the role does not have.
    Raises NotReady, with numbers, while there are some; between `prefill` and `decode` while any requests or leases are
    open. Raises BadRequest where it cannot have the role, and StaleIncarnation.
    """

    target: Incarnation
    role: Role


# --- node agents ------------------------------------------------------------------------------------

#: As `cluster.supervision.State`; "absent": it was never started, and could be.
SlotState = Literal["absent", "starting", "ready", "ending", "restarting", "stopped", "given_up"]

#: Those of a worker that runs, or is about to.
RUNNING_SLOTS: frozenset[SlotState] = frozenset({"starting", "ready", "ending", "restarting"})


class WorkerSlot(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A worker that a node agent runs, or could."""

    worker_id: WorkerId
    pool: str
    #: That it has; or with which it would start.
    role: MemberRole
    state: SlotState
    incarnation: Incarnation = Incarnation(0)
    #: From the start of its process to its being ready, the last time; None: never seen.
    start_s: float | None = None
    #: Of that time, what it stood still for its weights; None: not known, or it read them itself.
    weights_wait_s: float | None = None
    #: From the start of its process until it would have used them; known where the wait is.
    weights_due_s: float = 0.0
    #: Since its process was started; None while there is none.
    age_s: float | None = None
    problem: str = ""
    #: What a start is at, or waits for; empty where there is none.
    doing: str = ""
    #: Whose weights it needs; empty: not told.
    model: str = ""


class AgentBeat(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a node agent has; told every `AgentBeatReply.interval_s`."""

    node: str
    #: One life of the agent.
    incarnation: Incarnation
    #: rpc address.
    address: str
    slots: tuple[WorkerSlot, ...]
    #: None: the agent holds no weights, or does not tell.
    weights: NodeWeights | None = None
    #: What workers may take there together, weights and KV; None: nobody counts.
    workers_memory_bytes: int | None = None


class AgentBeatReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    interval_s: float
    #: Number of the last measured load that is known of this life of the agent: it need not be told again.
    measured: int = 0


class StartWorkerRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Starts a slot's worker. Idempotent: of one that runs or starts nothing changes.

    Raises NotFound (no such slot), BadRequest (it cannot have that role), StaleIncarnation (another life of the agent).
    """

    target: Incarnation
    worker_id: WorkerId
    #: Instead of the slot's own; None: that.
    role: Role | None = None


class StopWorkerRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Ends a worker's process, and does not start it again. Idempotent; raises NotFound, StaleIncarnation."""

    target: Incarnation
    worker_id: WorkerId
    reason: str


class RestartWorkerRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Ends a worker's process and begins its next life, in the role that it has, at once and without counting it as a
    crash. Nothing happens where the present life is another than `life`: it is idempotent.

    Raises NotFound (no such slot), BadRequest (no such interpreter), StaleIncarnation (another life of the agent).
    """

    target: Incarnation
    worker_id: WorkerId
    #: The life that is to end.
    life: Incarnation
    #: Interpreter of the build that the next life is to run; empty: the agent's own.
    python: str = ""


# --- operations -------------------------------------------------------------------------------------

# `force`: also where it leaves nobody who could read prompts, or write answers: requests are refused meanwhile.


class DrainOperation(msgspec.Struct, frozen=True, kw_only=True, tag="drain", omit_defaults=True):
    """Nothing new goes there, what is there leaves. `within_s`: whoever is there after that loses it (a notice that the
    worker dies then); None: as long as it takes. The worker stays drained until it is undrained or restarted."""

    worker_id: WorkerId
    within_s: float | None = None
    force: bool = False


class UndrainOperation(msgspec.Struct, frozen=True, kw_only=True, tag="undrain"):
    """The worker takes requests again; a drain of it that still runs is cancelled."""

    worker_id: WorkerId


class FlipOperation(msgspec.Struct, frozen=True, kw_only=True, tag="flip", omit_defaults=True):
    """Given another role: the same process. To become `mixed` it goes on meanwhile; else it takes nothing new until
    what its next role does not do has left (all that it has, between `prefill` and `decode`)."""

    worker_id: WorkerId
    role: Role
    force: bool = False


class RestartOperation(msgspec.Struct, frozen=True, kw_only=True, tag="restart", omit_defaults=True):
    """One after the other: drained, ended, started anew, awaited. Empty: all workers and stores."""

    worker_ids: tuple[WorkerId, ...] = ()
    #: Interpreter of the build that they are to run from now on; empty: the one that they have.
    python: str = ""
    force: bool = False


class StartOperation(msgspec.Struct, frozen=True, kw_only=True, tag="start", omit_defaults=True):
    worker_id: WorkerId
    #: None: its pool's.
    role: Role | None = None


class RemoveOperation(msgspec.Struct, frozen=True, kw_only=True, tag="remove", omit_defaults=True):
    """Drained and ended; not started again."""

    worker_id: WorkerId
    #: After that its process ends, whatever is still there; None: as long as the coordinator waits for a drain.
    within_s: float | None = None
    force: bool = False


class MoveOperation(msgspec.Struct, frozen=True, kw_only=True, tag="move", omit_defaults=True):
    """Another worker is started and awaited, then this one is drained (what it has moves, or ends there) and ended.
    Where the other one does not come, nothing happens to this one."""

    worker_id: WorkerId
    #: Of the same coordinator; it does not run.
    to: WorkerId
    #: That the other one begins with; None: as this one has when the operation begins.
    role: Role | None = None


Operation = (
    DrainOperation
    | UndrainOperation
    | FlipOperation
    | RestartOperation
    | StartOperation
    | RemoveOperation
    | MoveOperation
)

OperationState = Literal["running", "done", "failed", "cancelled"]


class OperationStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    operation_id: int
    operation: Operation
    state: OperationState
    #: What it waits for, or how it ended, with numbers.
    text: str
    age_s: float
    #: Who wanted it: "operator", or the name of a policy.
    by: str = "operator"


class OperateRequest(msgspec.Struct, frozen=True, kw_only=True):
    """Begins an operation. Raises NotFound (no such worker), BadRequest (it cannot be, or another operation has this
    worker), NoCapacity (too many run), with what and why."""

    operation: Operation
    by: str = "operator"


class OperateReply(msgspec.Struct, frozen=True, kw_only=True):
    operation_id: int


class OperationsRequest(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Raises NotFound where there is nothing to cancel."""

    #: Ends this one where it stands; the worker it is about takes requests again. None: only asks.
    cancel: int | None = None


class OperationsReply(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Those that run, and the last that ended, oldest first."""

    operations: tuple[OperationStatus, ...]
    #: What the node agents run, or could, by worker id.
    slots: tuple[WorkerSlot, ...] = ()


# --- methods ----------------------------------------------------------------------------------------

DRAIN = Method("worker/Drain", DrainRequest, Empty)
SET_ROLE = Method("worker/SetRole", SetRoleRequest, Empty)

AGENT_BEAT = Method("coordinator/AgentBeat", AgentBeat, AgentBeatReply)
START_WORKER = Method("agent/StartWorker", StartWorkerRequest, Empty)
STOP_WORKER = Method("agent/StopWorker", StopWorkerRequest, Empty)
RESTART_WORKER = Method("agent/RestartWorker", RestartWorkerRequest, Empty)

OPERATE = Method("coordinator/Operate", OperateRequest, OperateReply, False)
OPERATIONS = Method("coordinator/Operations", OperationsRequest, OperationsReply)
