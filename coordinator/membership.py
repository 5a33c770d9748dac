"""Who is in the cluster: registration with incarnations, heartbeats, expiry, and what was placed since.

A machine without I/O: `CoordinatorShell` feeds it messages and the time. A worker is believed while its
heartbeats come and no engine step of it is older than its bound; a worker that comes back from a hang is
still the same incarnation and is taken up again with its next heartbeat (its requests were failed meanwhile
by the gateways, which fence by owner epoch).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import StaleIncarnation
from contracts.messages import Member, WorkerLoad
from coordinator.policy.dispatch import WorkerView

if TYPE_CHECKING:
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import DispatchItem, Placement, TransferReport, WorkerInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipLimits:
    heartbeat_interval_s: float = 0.5
    #: Silence after which a worker is taken for dead.
    heartbeat_timeout_s: float = 3.0
    #: Age of an engine step after which a worker is taken for hung though its rpc answers.
    step_bound_s: float = 60.0
    #: A placement counts as load until a heartbeat this much younger has come: by then the worker's own
    #: figures contain it.
    booking_grace_s: float = 0.25
    #: A dead worker's entry is kept this long, so that `Members` can show it.
    forget_after_s: float = 600.0


@dataclass(slots=True)
class _Booking:
    at_s: float
    prompt_tokens: int = 0
    context_tokens: int = 0
    requests: int = 0


@dataclass(slots=True)
class _Entry:
    info: WorkerInfo
    load: WorkerLoad
    heartbeat_s: float
    #: The last that its heartbeats told; None before the first.
    transfers: TransferReport | None = None
    #: Placements that no heartbeat contains yet, oldest first.
    bookings: list[_Booking] = field(default_factory=list[_Booking])
    #: Whether the last `expire` found it alive; only for reporting changes.
    alive: bool = True


class Membership:
    def __init__(self, limits: MembershipLimits) -> None:
        self._limits = limits
        #: The newest known life of each worker, dead ones included until forgotten.
        self._entries: dict[WorkerId, _Entry] = {}

    def register(self, info: WorkerInfo, now_s: float) -> None:
        """Takes up a life of a worker; the earlier one is gone with it. Idempotent.

        Raises StaleIncarnation when a later life is known.
        """
        known = self._entries.get(info.worker_id)
        if known is not None and known.info.incarnation > info.incarnation:
            raise StaleIncarnation(
                f"{info.worker_id} registers as incarnation {info.incarnation}, but {known.info.incarnation} is known"
            )
        if known is not None and known.info == info:
            known.heartbeat_s = now_s
            return
        load = WorkerLoad(free_blocks=info.total_blocks)
        self._entries[info.worker_id] = _Entry(info=info, load=load, heartbeat_s=now_s)

    def heartbeat(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        load: WorkerLoad,
        now_s: float,
        transfers: TransferReport | None = None,
    ) -> bool:
        """False when this life is not known: the worker must register."""
        entry = self._entries.get(worker_id)
        if entry is None or entry.info.incarnation != incarnation:
            return False
        entry.load = load
        entry.transfers = transfers or entry.transfers
        entry.heartbeat_s = now_s
        settled_s = now_s - self._limits.booking_grace_s
        entry.bookings = [booking for booking in entry.bookings if booking.at_s > settled_s]
        return True

    def deregister(self, worker_id: WorkerId, incarnation: Incarnation) -> bool:
        """Forgets one life; a newer one stays. Returns whether anything was forgotten."""
        entry = self._entries.get(worker_id)
        if entry is None or entry.info.incarnation != incarnation:
            return False
        del self._entries[worker_id]
        return True

    def book(self, item: DispatchItem, placement: Placement, now_s: float) -> None:
        """Remembers a placement as load until a heartbeat contains it."""
        self._entries[placement.prefill.worker_id].bookings.append(
            _Booking(at_s=now_s, prompt_tokens=item.prompt_tokens, requests=1)
        )
        self._entries[placement.decode.worker_id].bookings.append(
            _Booking(at_s=now_s, context_tokens=item.prompt_tokens + item.max_tokens)
        )

    def expire(self, now_s: float) -> tuple[list[str], list[str]]:
        """Notes who died and who came back since the last call; returns one sentence for each."""
        lost: list[str] = []
        back: list[str] = []
        for worker_id, entry in list(self._entries.items()):
            reason = self._dead_because(entry, now_s)
            if reason is not None and entry.alive:
                lost.append(f"{worker_id} incarnation {entry.info.incarnation}: {reason}")
            elif reason is None and not entry.alive:
                back.append(f"{worker_id} incarnation {entry.info.incarnation}")
            entry.alive = reason is None
            if now_s - entry.heartbeat_s > self._limits.forget_after_s:
                del self._entries[worker_id]
        return lost, back

    def live(self, now_s: float) -> list[WorkerView]:
        """The workers that may be given requests, by worker id."""
        return [
            WorkerView(
                info=entry.info,
                load=entry.load,
                booked_prompt_tokens=sum(booking.prompt_tokens for booking in entry.bookings),
                booked_context_tokens=sum(booking.context_tokens for booking in entry.bookings),
                booked_requests=sum(booking.requests for booking in entry.bookings),
            )
            for _, entry in sorted(self._entries.items())
            if self._dead_because(entry, now_s) is None
        ]

    def members(self, now_s: float) -> tuple[Member, ...]:
        """Live workers with their last load, for people and health checks."""
        return tuple(
            Member(
                info=entry.info,
                load=entry.load,
                heartbeat_age_s=now_s - entry.heartbeat_s,
                transfers=entry.transfers,
            )
            for _, entry in sorted(self._entries.items())
            if self._dead_because(entry, now_s) is None
        )

    def _dead_because(self, entry: _Entry, now_s: float) -> str | None:
        silence_s = now_s - entry.heartbeat_s
        if silence_s > self._limits.heartbeat_timeout_s:
            return f"no heartbeat for {silence_s:.1f} s"
        if entry.load.step_age_s > self._limits.step_bound_s:
            return f"an engine step has run for {entry.load.step_age_s:.1f} s"
        return None
