"""What operations on workers are decided by: who is seen, limits, and what is refused. Pure."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Literal

from contracts.control_messages import (
    RUNNING_SLOTS,
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
from contracts.errors import BadRequest, NotFound

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping

    from contracts.control_messages import Operation, SlotState
    from contracts.ids import Incarnation, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import MemberRole


#: Of the requests at a worker.
Kind = Literal["prompts", "answers"]


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationLimits:
    """Seconds, where nothing else is said."""

    #: Operations that run at the same time.
    max_running: int = 8
    #: Ended ones that are told.
    max_remembered: int = 32
    #: A worker is to be drained within this, where the operation says nothing.
    drain_s: float = 600.0
    #: Empty for so long: what was placed there before its drain was known has come by then, and gone.
    settle_s: float = 1.0
    #: A drain that is part of something larger ends by itself so long after the coordinator last asked for it: the
    #: coordinator may be gone. And how often it asks.
    drain_lasts_s: float = 8.0
    renew_s: float = 2.0
    #: Between two tries of a call that failed.
    retry_s: float = 0.5
    #: For the others to be well enough to do without the next worker.
    safe_s: float = 120.0
    #: To take another role, and to take requests again.
    role_s: float = 10.0
    open_s: float = 15.0
    #: From the order to end a process to its end.
    end_s: float = 30.0
    #: From the order to start a process, or to begin its next life, to its registration.
    start_s: float = 360.0


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSeen:
    """A registered life of a worker or store, as its last heartbeat tells."""

    worker_id: WorkerId
    incarnation: Incarnation
    role: MemberRole
    identity: KvIdentity
    address: str
    #: Heard of lately.
    is_up: bool = True
    draining: bool = False
    open_requests: int = 0
    open_leases: int = 0
    #: As `WorkerLoad`.
    open_prompts: int = 0
    open_answers: int = 0
    #: Prompts that are being read elsewhere, and whose answers will be written here.
    awaited: int = 0

    def is_drained(self, keeps: Kind | None = None) -> bool:
        """It takes nothing new, and nothing is left but what it keeps."""
        if not self.draining:
            return False
        match keeps:
            case None:
                return not (self.open_requests or self.open_leases or self.awaited)
            case "answers":
                return not self.open_prompts
            case "prompts":
                return not (self.open_answers or self.awaited)

    def left(self, keeps: Kind | None = None) -> str:
        """What is there and has to leave, in words."""
        if keeps == "answers":
            return f"{self.open_prompts} prompts to leave, answers stay"
        parts = [f"{self.open_requests} requests", f"{self.open_leases} leases"]
        if keeps == "prompts":
            parts = [f"{self.open_answers} answers to leave, prompts stay"]
        if self.awaited:
            parts.append(f"{self.awaited} prompts read elsewhere for it")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class SlotSeen:
    """A slot of a node agent that was heard of lately."""

    worker_id: WorkerId
    role: MemberRole
    state: SlotState
    #: Of the present or last life.
    incarnation: Incarnation
    problem: str = ""
    agent: Incarnation
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Sight:
    """Everybody, as of now."""

    workers: Mapping[WorkerId, WorkerSeen] = field(default_factory=dict["WorkerId", WorkerSeen])
    slots: Mapping[WorkerId, SlotSeen] = field(default_factory=dict["WorkerId", SlotSeen])


class Step(Enum):
    """What is done with one worker; the value is for people."""

    WAIT = "waits for the others"
    DRAIN = "drains"
    MIX = "takes on the other role beside its own"
    SET_ROLE = "takes its role"
    OPEN = "takes requests again"
    RENEW = "restarts"
    START = "starts"
    STOP = "stops"


#: Steps in which a worker gets no new request: it would refuse it.
LEAVING: frozenset[Step] = frozenset({Step.DRAIN, Step.SET_ROLE, Step.OPEN, Step.RENEW, Step.STOP})


# --- events and instructions ------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Looked:
    """At everybody; several times a second while operations run."""

    sight: Sight


@dataclass(frozen=True, slots=True)
class Answered:
    """A call was answered; `problem`: in words, where it failed."""

    call_id: int
    problem: str | None = None


Event = Looked | Answered

CallBody = DrainRequest | SetRoleRequest | StartWorkerRequest | StopWorkerRequest | RestartWorkerRequest


@dataclass(frozen=True, slots=True)
class Call:
    """To be made, and answered with `Answered` within a bound."""

    call_id: int
    address: str
    body: CallBody


@dataclass(frozen=True, slots=True)
class Report:
    """A sentence for people."""

    text: str


Instruction = Call | Report


# --- what may be done -------------------------------------------------------------------------------


def can_serve(workers: Iterable[WorkerSeen]) -> bool:
    """Whether some of these can read prompts and others of the same KV, or the same ones, write answers."""
    readers: set[KvIdentity] = set()
    writers: set[KvIdentity] = set()
    for worker in workers:
        if worker.role in ("prefill", "mixed"):
            readers.add(worker.identity)
        if worker.role in ("decode", "mixed"):
            writers.add(worker.identity)
    return not readers.isdisjoint(writers)


def who_would_be_missed(worker_id: WorkerId, sight: Sight, leaving: Collection[WorkerId]) -> str | None:
    """Why requests could be served no more without this worker; None: the others can, or nobody can as it is."""
    well = [each for each in sight.workers.values() if each.is_up and not each.draining]
    others = [each for each in well if each.worker_id != worker_id and each.worker_id not in leaving]
    if can_serve(others) or not can_serve(well):
        return None
    counts = Counter(each.role for each in others)
    there = ", ".join(f"{counts[role]} {role}" for role in ("prefill", "decode", "mixed") if counts[role]) or "nobody"
    return f"without {worker_id} nobody could serve requests: the others are {there}"


def workers_of(operation: Operation, sight: Sight) -> tuple[WorkerId, ...]:
    """Whom it is about, in the order of their turns."""
    if isinstance(operation, RestartOperation):
        return operation.worker_ids or _in_turns(sight)
    if isinstance(operation, MoveOperation):
        return operation.to, operation.worker_id
    return (operation.worker_id,)


def _in_turns(sight: Sight) -> tuple[WorkerId, ...]:
    """Stores first, then one of each role by turns: if the next lives can work with each other alone, there is soon a
    pair of them."""
    known = {slot.worker_id: slot.role for slot in sight.slots.values()}
    known |= {worker.worker_id: worker.role for worker in sight.workers.values()}
    running = [
        worker_id
        for worker_id in sorted(known)
        if worker_id in sight.workers or (worker_id in sight.slots and sight.slots[worker_id].state in RUNNING_SLOTS)
    ]
    place: dict[WorkerId, tuple[bool, int, str]] = {}
    seen: Counter[str] = Counter()
    for worker_id in running:
        role = known[worker_id]
        place[worker_id] = (role != "store", seen[role], "" if role == "prefill" else role)
        seen[role] += 1
    return tuple(sorted(running, key=place.__getitem__))


def kept_by(operation: Operation, role: MemberRole) -> Kind | None:
    """Of what a worker of this role has, what stays there while it drains for this operation: who gives up one of two
    roles goes on with the other."""
    if not isinstance(operation, FlipOperation) or role != "mixed":
        return None
    return "answers" if operation.role == "decode" else "prompts"


def steps_for(operation: Operation, worker_id: WorkerId, role: MemberRole, *, draining: bool = False) -> list[Step]:
    """For this worker, of this role; `draining`: it takes nothing new as it is."""
    is_store = role == "store"
    match operation:
        case DrainOperation():
            return [Step.DRAIN]
        case UndrainOperation():
            return [Step.OPEN]
        case FlipOperation(role="mixed"):
            return [Step.MIX, Step.OPEN] if draining else [Step.MIX]
        case FlipOperation():
            return [Step.DRAIN, Step.SET_ROLE, Step.OPEN]
        case RestartOperation(force=force):
            return [Step.RENEW] if is_store else [*([] if force else [Step.WAIT]), Step.DRAIN, Step.RENEW]
        case StartOperation():
            return [Step.START]
        case RemoveOperation():
            return [Step.STOP] if is_store else [Step.DRAIN, Step.STOP]
        case MoveOperation(to=to):
            return [Step.START] if worker_id == to else [Step.WAIT, Step.DRAIN, Step.STOP]


def check(operation: Operation, sight: Sight, busy: Mapping[WorkerId, int], leaving: Collection[WorkerId]) -> None:
    """Raises NotFound or BadRequest where the operation cannot be. `busy`: which operation has which worker."""
    worker_ids = workers_of(operation, sight)
    if not worker_ids:
        raise NotFound("there is no worker to restart")
    if len(set(worker_ids)) < len(worker_ids):
        raise BadRequest(f"a worker is named twice: {', '.join(worker_ids)}", param="worker_ids")
    for worker_id in worker_ids:
        if (other := busy.get(worker_id)) is not None:
            raise BadRequest(f"operation {other} has {worker_id}; cancel it first", param="worker_id")
        _check_one(operation, worker_id, sight, leaving)


def _check_one(operation: Operation, worker_id: WorkerId, sight: Sight, leaving: Collection[WorkerId]) -> None:
    worker, slot = sight.workers.get(worker_id), sight.slots.get(worker_id)
    if worker is None and slot is None:
        known = ", ".join(sorted({*sight.workers, *sight.slots})) or "nobody"
        raise NotFound(f"there is no worker {worker_id}; there are {known}", param="worker_id")
    if isinstance(operation, MoveOperation):
        _check_move(operation, worker_id, worker, slot)
        return
    if isinstance(operation, RestartOperation | StartOperation | RemoveOperation):
        if slot is None:
            raise BadRequest(f"no node agent runs {worker_id}: whoever started it has to do that", param="worker_id")
    elif worker is None:
        raise NotFound(f"{worker_id} is not up", param="worker_id")
    if worker is None:
        return
    if worker.role == "store" and isinstance(operation, DrainOperation | UndrainOperation | FlipOperation):
        raise BadRequest(f"{worker_id} is a store: it has no requests, and no other role", param="worker_id")
    if isinstance(operation, FlipOperation) and worker.role == operation.role:
        raise BadRequest(f"{worker_id} is a {operation.role} worker already", param="role")
    if isinstance(operation, UndrainOperation | StartOperation) or operation.force or worker.role == "store":
        return
    if isinstance(operation, FlipOperation) and operation.role == "mixed":
        # It goes on, and can do more than before.
        return
    if (problem := who_would_be_missed(worker_id, sight, leaving)) is not None:
        raise BadRequest(f"{problem} (forced, requests are refused meanwhile)", param="worker_id")


def _check_move(
    operation: MoveOperation, worker_id: WorkerId, worker: WorkerSeen | None, slot: SlotSeen | None
) -> None:
    if slot is None:
        raise BadRequest(f"no node agent runs {worker_id}: whoever started it has to do that", param="worker_id")
    if worker_id == operation.to:
        if worker is not None or slot.state in RUNNING_SLOTS:
            raise BadRequest(f"{worker_id} runs already: nobody can move there", param="to")
        return
    if worker is None:
        raise NotFound(f"{worker_id} is not up", param="worker_id")
    if worker.role == "store":
        raise BadRequest(f"{worker_id} is a store: what it has does not move", param="worker_id")


def title(operation: Operation) -> str:
    """For people: "flip decode-1 to prefill"."""
    match operation:
        case FlipOperation():
            return f"flip {operation.worker_id} to {operation.role}"
        case RestartOperation():
            return f"restart {', '.join(operation.worker_ids) or 'everybody'}"
        case DrainOperation():
            within = "" if operation.within_s is None else f" within {operation.within_s:g} s"
            return f"drain {operation.worker_id}{within}"
        case UndrainOperation():
            return f"undrain {operation.worker_id}"
        case StartOperation():
            return f"start {operation.worker_id}"
        case RemoveOperation():
            return f"stop {operation.worker_id}"
        case MoveOperation():
            return f"move {operation.worker_id} to {operation.to}"
