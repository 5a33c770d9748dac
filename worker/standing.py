"""Whether a worker takes new requests, and in which role it serves: what drains, flips and a wish to leave change.

A machine without I/O. The shell asks it before it takes anything in, and tells it the time; whoever must know of a
change hears of it by `on_change` (a heartbeat is due) and `on_role` (another role, under the same incarnation).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from contracts.errors import BadRequest, NotReady
from contracts.failpoints import RarePath

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.control_messages import DrainRequest, SetRoleRequest
    from contracts.messages import MemberRole, Role, WorkerInfo

#: When whoever is refused may ask here again; elsewhere at once.
RETRY_AFTER_S = 1.0

_REFUSED = RarePath("worker.draining_refused", "a worker that drains was offered a new request")
_LAPSED = RarePath("worker.drain_lapsed", "a drain that nobody renewed ended by itself")


class OpenWork(NamedTuple):
    """What is not over at a worker."""

    requests: int
    #: Granted, and taken.
    leases: int
    #: Of the requests: prompts that are read here, or come to be; and answers that are written here, or will be where
    #: their prompts are read. One that is read here to be written here counts as both.
    prompts: int = 0
    answers: int = 0

    def __str__(self) -> str:
        return f"{self.requests} requests and {self.leases} leases"

    def against(self, role: MemberRole, wanted: Role) -> str:
        """What has to leave before a worker of this role can have the wanted one, in words; empty: nothing. Who reads
        and writes already gives up one of them; who begins to do both gives up nothing."""
        if wanted == "mixed":
            return ""
        if role != "mixed":
            return str(self) if self.requests or self.leases else ""
        if wanted == "decode":
            return f"{self.prompts} prompts" if self.prompts else ""
        return f"{self.answers} answers" if self.answers else ""


class Standing:
    def __init__(
        self,
        info: WorkerInfo,
        *,
        open_work: Callable[[], OpenWork],
        on_change: Callable[[], None] = lambda: None,
        on_role: Callable[[WorkerInfo], None] = lambda info: None,
    ) -> None:
        #: As of now; only the role changes.
        self.info = info
        self.open_work = open_work
        self._on_change = on_change
        self._on_role = on_role
        #: Why nothing new is taken; None: it is.
        self._drain_reason: str | None = None
        self._drain_ends_s = math.inf
        #: The worker itself wants to leave: no order ends that.
        self._leaving = False

    def __repr__(self) -> str:
        state = "open" if self._drain_reason is None else f"draining ({self._drain_reason})"
        return f"<Standing {self.info.worker_id} {self.info.role}, {state}>"

    @property
    def draining(self) -> bool:
        return self._drain_reason is not None

    @property
    def also_writes(self) -> bool:
        return self.info.role == "mixed"

    @property
    def is_drained(self) -> bool:
        """Nothing new is taken, and nothing is left."""
        work = self.open_work()
        return self.draining and not (work.requests or work.leases)

    def check_open(self, what: str) -> None:
        """Raises NotReady while it drains."""
        if self._drain_reason is not None:
            _REFUSED.reached()
            raise NotReady(
                f"{self.info.worker_id} takes no {what}: it is draining ({self._drain_reason})",
                retry_after_s=RETRY_AFTER_S,
            )

    def drain(self, ask: DrainRequest, now_s: float) -> None:
        """Begins, renews or ends a drain. One that wants to leave by itself goes on draining."""
        if self._leaving:
            return
        told = self.draining
        self._drain_reason = (ask.reason or "it was asked to") if ask.draining else None
        self._drain_ends_s = math.inf if ask.for_s is None else now_s + ask.for_s
        if self.draining != told:
            self._on_change()

    def leave(self, reason: str) -> None:
        """The worker drains until its end."""
        self._leaving, self._drain_reason, self._drain_ends_s = True, reason, math.inf
        self._on_change()

    def look(self, now_s: float) -> None:
        """To be called now and then: ends a drain whose time is over."""
        if self.draining and now_s > self._drain_ends_s:
            _LAPSED.reached()
            self._drain_reason = None
            self._on_change()

    def set_role(self, ask: SetRoleRequest) -> None:
        """Raises NotReady, with numbers, while something is open that stands against it (`OpenWork.against`),
        BadRequest for what is no worker's role. It need not drain: what comes later is served in whatever role."""
        role: Role = ask.role
        if self.info.role == "store":
            raise BadRequest(f"{self.info.worker_id} is a store, and cannot be a {role} worker", param="role")
        if role == self.info.role:
            return
        if against := self.open_work().against(self.info.role, role):
            raise NotReady(
                f"{self.info.worker_id} cannot become a {role} worker: {against} are open", retry_after_s=RETRY_AFTER_S
            )
        self.info = msgspec.structs.replace(self.info, role=role)
        self._on_role(self.info)
