"""Workers of a study that come, drain, change their roles and go.

Who leaves a role is drained first. Drained is who has nothing left, and is named by no request that still runs. Who
begins to do both goes on meanwhile, and who gives up one of both keeps what it has of the other, as live. A start
and a change of role take the time that they are said to; a worker costs from the moment in which its start is asked for
to that in which it is gone.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from contracts.messages import Role
    from simulator.heap.context import Context
    from simulator.heap.worker import Worker

#: How often a worker that drains is looked at.
_LOOK_INTERVAL_S = 0.1


class Phase(IntEnum):
    ABSENT = 0
    STARTING = 1
    READY = 2
    DRAINING = 3
    #: Drained, and not in its next role yet.
    CHANGING = 4


class Member:
    """A worker's standing."""

    __slots__ = ("asked_s", "costs_since_s", "first_role", "next_role", "phase", "takes_s", "worker")

    def __init__(self, worker: Worker, phase: Phase) -> None:
        self.worker = worker
        self.phase = phase
        self.first_role: Role = worker.role
        #: When it was asked for what it goes through.
        self.asked_s = 0.0
        #: What it waits for takes so long; while it drains: what comes then.
        self.takes_s = 0.0
        #: While it drains, and changes; None: it ends.
        self.next_role: Role | None = None
        self.costs_since_s = 0.0

    @property
    def gives_up_one(self) -> bool:
        """It reads and writes, and is to do one of both."""
        return self.next_role is not None and self.worker.role == "mixed"


class Lifecycle:
    def __init__(
        self,
        context: Context,
        workers: Sequence[Worker],
        *,
        is_named: Callable[[Worker, Role | None], bool],
        on_changed: Callable[[Worker], None],
        is_over: Callable[[], bool],
    ) -> None:
        """`is_named`: a request that runs will come back to it; with a role, one that it has no more in that role.
        `on_changed` is told whenever a worker's flags or role are others."""
        self._heap = context.heap
        self._is_named = is_named
        self._on_changed = on_changed
        self._is_over = is_over
        self.members: dict[str, Member] = {}
        self._paid_s = 0.0
        self.num_starts = self.num_stops = self.num_flips = 0
        for worker in workers:
            phase = Phase.READY if worker.is_up else Phase.ABSENT
            self.members[worker.worker_id] = Member(worker, phase)

    def count(self, phase: Phase) -> int:
        return sum(member.phase is phase for member in self.members.values())

    def worker_s(self, until_s: float) -> float:
        """Seconds that workers cost so far."""
        running = (member for member in self.members.values() if member.phase is not Phase.ABSENT)
        return self._paid_s + sum(until_s - member.costs_since_s for member in running)

    def start(self, worker_id: str, takes_s: float) -> None:
        """Of one that is absent; of another nothing changes."""
        member = self.members[worker_id]
        if member.phase is not Phase.ABSENT:
            return
        self.num_starts += 1
        member.costs_since_s = member.asked_s = self._heap.now_s
        member.takes_s = takes_s
        self._enter(member, Phase.STARTING)
        self._heap.after(takes_s, self._ready, member)

    def stop(self, worker_id: str) -> None:
        """Drained first. Of one that is not ready nothing changes."""
        if self._drain(worker_id, None, 0.0):
            self.num_stops += 1

    def flip(self, worker_id: str, role: Role, takes_s: float) -> None:
        """Drained first; but who takes on the other role beside its own has it at once, and who gives up one of two is
        drained of that alone. Of one that is not ready nothing changes."""
        member = self.members[worker_id]
        if role == "mixed" and member.phase is Phase.READY:
            self.num_flips += 1
            member.worker.mix()
            self._on_changed(member.worker)
        elif self._drain(worker_id, role, takes_s):
            self.num_flips += 1

    def _drain(self, worker_id: str, next_role: Role | None, takes_s: float) -> bool:
        member = self.members[worker_id]
        if member.phase is not Phase.READY:
            return False
        member.next_role, member.takes_s, member.asked_s = next_role, takes_s, self._heap.now_s
        self._enter(member, Phase.DRAINING)
        self._heap.after(_LOOK_INTERVAL_S, self._look, member)
        return True

    def _look(self, member: Member) -> None:
        worker = member.worker
        if self._is_over():
            self._heap.overtaken()
            return
        worker.sync()
        if not self._is_drained(member):
            self._heap.after(_LOOK_INTERVAL_S, self._look, member)
            return
        if member.gives_up_one:
            # It works on.
            self._heap.after(member.takes_s, self._unmix, member)
            return
        if member.next_role is None:
            self._paid_s += self._heap.now_s - member.costs_since_s
            self._enter(member, Phase.ABSENT)
            return
        self._enter(member, Phase.CHANGING)
        self._heap.after(member.takes_s, self._ready, member)

    def _is_drained(self, member: Member) -> bool:
        worker, role = member.worker, member.next_role
        if member.gives_up_one:
            return role is not None and worker.has_left_to(role) and not self._is_named(worker, role)
        return worker.is_empty and not self._is_named(worker, None)

    def _unmix(self, member: Member) -> None:
        if self._is_over():
            self._heap.overtaken()
        elif not self._is_drained(member):
            self._look(member)
        elif member.next_role is not None:
            member.worker.unmix(member.next_role)
            member.next_role = None
            self._enter(member, Phase.READY)

    def _ready(self, member: Member) -> None:
        if member.next_role is None:
            # A new process: it has its first role, and knows no prefix.
            member.worker.begin_anew(member.first_role)
        else:
            member.worker.set_role(member.next_role)
            member.next_role = None
        self._enter(member, Phase.READY)

    def _enter(self, member: Member, phase: Phase) -> None:
        member.phase = phase
        worker = member.worker
        worker.is_up = phase in (Phase.READY, Phase.DRAINING)
        worker.is_draining = phase is Phase.DRAINING
        worker.keeps_answers = worker.is_draining and member.gives_up_one and member.next_role == "decode"
        self._on_changed(worker)
