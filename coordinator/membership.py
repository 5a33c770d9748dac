"""Who is in the cluster: registration with incarnations, heartbeats, ends of lives, and what was placed since.

A machine without I/O: `CoordinatorShell` feeds it messages and the time. A worker is believed while its heartbeats
come. A life that fell silent, said goodbye or was replaced by a later one is *gone*, and that is final: everybody
who may hold leases with it is told (`gone`), so it is never taken up again, however well it feels when it comes
back; it is refused with StaleIncarnation, ends itself, and its next life registers anew. A coordinator that was
restarted knows nothing and takes up whoever registers.

A hung engine is no matter of heartbeats: the worker that has it ends itself (`worker.watchdog`). Time in which
the coordinator itself did not run is nobody's silence.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import StaleIncarnation
from contracts.failpoints import RarePath
from contracts.messages import Member, WorkerLife, WorkerLoad
from contracts.pauses import PauseWatch
from coordinator.fleet import Fleet

if TYPE_CHECKING:
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import DispatchItem, Placement, TransferReport, WorkerInfo
    from coordinator.policy.fleet_view import FleetView

#: `expire` is called at least this often.
LOOK_INTERVAL_S = 0.5
#: Between two looks or messages; after a longer gap the coordinator itself did not run.
LONGEST_GAP_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipLimits:
    heartbeat_interval_s: float = 0.5
    #: Silence after which a life is over.
    heartbeat_timeout_s: float = 3.0
    #: The same where everybody is silent at once: they get no requests meanwhile, but their lives go on. When
    #: somebody is heard again, the others have a `heartbeat_timeout_s` from then to be heard too.
    isolation_timeout_s: float = 20.0
    #: A placement counts as load until a heartbeat this much younger has come: by then the worker's own
    #: figures contain it.
    booking_grace_s: float = 0.25
    #: How long, and of how many lives, the end is told with every heartbeat.
    tell_gone_for_s: float = 60.0
    max_told_gone: int = 256
    #: Worker ids whose last ended life is remembered, to refuse it; far more than a cluster has.
    max_fenced: int = 16_384


_ISOLATED = RarePath("coordinator.isolated", "everybody fell silent at once, nobody is given up for it yet")
_STALE_LIFE = RarePath("coordinator.stale_life", "a life spoke that is over")
_PLACE_TAKEN = RarePath("coordinator.place_taken", "a later life of a worker took the place of one that was up")


@dataclass(slots=True)
class _Entry:
    info: WorkerInfo
    load: WorkerLoad
    #: Of the last heartbeat; moved on by pauses of the coordinator.
    heartbeat_s: float
    transfers: TransferReport | None = None


class Membership:
    def __init__(self, limits: MembershipLimits) -> None:
        self._limits = limits
        self._pauses = PauseWatch(LONGEST_GAP_S)
        #: Nobody's silence is too long before this; looking at everybody with every message would be quadratic.
        self._look_again_s = -math.inf
        #: Until then nobody's silence is too long for being given requests.
        self._all_heard_until_s = -math.inf
        #: When anybody was last heard, and when that was after everybody had been silent; moved on by pauses.
        self._last_heard_s = -math.inf
        self._isolation_over_s = -math.inf
        #: The present life of each worker that has one.
        self._entries: dict[WorkerId, _Entry] = {}
        #: The same workers, as dispatch looks at them.
        self._fleet = Fleet(limits.booking_grace_s)
        #: Last ended life of each worker, and why it ended; the one that ended last stands last.
        self._fenced: OrderedDict[WorkerId, tuple[Incarnation, str]] = OrderedDict()
        #: When lives ended, oldest first: those that are told.
        self._gone: OrderedDict[WorkerLife, float] = OrderedDict()
        #: One sentence for each life that fell silent since `expire` was last called.
        self._lost: list[str] = []

    def register(self, info: WorkerInfo, now_s: float) -> None:
        """Takes up a life of a worker; the earlier one is gone with it. Idempotent.

        Raises StaleIncarnation for a life that is gone, or when a later one is known.
        """
        self._look(now_s)
        self._refuse_stale(info.worker_id, info.incarnation)
        self._note_heard(now_s)
        known = self._entries.get(info.worker_id)
        if known is not None and known.info == info:
            known.heartbeat_s = now_s
            return
        if known is not None and known.info.incarnation < info.incarnation:
            _PLACE_TAKEN.reached()
            self._end(known, f"incarnation {info.incarnation} took its place", now_s)
        elif known is not None:
            self._fleet.remove(info.worker_id)
        load = WorkerLoad(free_blocks=info.total_blocks)
        self._entries[info.worker_id] = _Entry(info=info, load=load, heartbeat_s=now_s)
        self._fleet.add(info)

    def heartbeat(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        load: WorkerLoad,
        now_s: float,
        transfers: TransferReport | None = None,
    ) -> bool:
        """False when this life is not known: the worker must register. `transfers`: None leaves the last ones.

        Raises StaleIncarnation as `register` does.
        """
        self._look(now_s)
        self._refuse_stale(worker_id, incarnation)
        entry = self._entries.get(worker_id)
        if entry is None or entry.info.incarnation != incarnation:
            return False
        self._note_heard(now_s)
        entry.load = load
        entry.transfers = transfers or entry.transfers
        entry.heartbeat_s = now_s
        self._fleet.report(self._fleet.row_of(worker_id), load, now_s)
        return True

    def deregister(self, worker_id: WorkerId, incarnation: Incarnation, now_s: float) -> bool:
        """Ends one life; a newer one stays. Returns whether it was the present one."""
        self._look(now_s)
        entry = self._entries.get(worker_id)
        if entry is None or entry.info.incarnation != incarnation:
            return False
        self._end(entry, "it said goodbye", now_s)
        return True

    def gone(self, now_s: float) -> tuple[WorkerLife, ...]:
        """The lives that ended within the last `tell_gone_for_s`, the latest `max_told_gone` of them."""
        self._look(now_s)
        return tuple(self._gone)

    def book(self, item: DispatchItem, placement: Placement, now_s: float) -> None:
        """Remembers a placement as load until a heartbeat contains it."""
        prefill_row = self._fleet.row_of(placement.prefill.worker_id)
        decode_row = self._fleet.row_of(placement.decode.worker_id)
        self._fleet.book(item, prefill_row, decode_row, now_s)

    def expire(self, now_s: float) -> list[str]:
        """To be called every `LOOK_INTERVAL_S`. One sentence for each life that fell silent since the last call."""
        self._look(now_s)
        lost, self._lost = self._lost, []
        return lost

    def live(self, now_s: float) -> FleetView:
        """The workers that may be given requests, as they are now: of no use after the next call to this object."""
        self._look(now_s)
        view = self._fleet.view()
        if now_s <= self._all_heard_until_s:
            return view
        heard = {entry.info.worker_id for entry in self._heard(now_s)}
        return view.only(view.rows_of(heard))

    def members(self, now_s: float) -> tuple[Member, ...]:
        """Live workers with their last load, for people and health checks."""
        self._look(now_s)
        return tuple(
            Member(
                info=entry.info,
                load=entry.load,
                heartbeat_age_s=now_s - entry.heartbeat_s,
                transfers=entry.transfers,
            )
            for entry in self._heard(now_s)
        )

    # --- ends of lives ----------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """Ends the lives that fell silent. Comes first in every call: nothing may see one that should be over."""
        paused_s = self._pauses.look(now_s)
        if paused_s or now_s > self._look_again_s:
            self._end_the_silent(paused_s, now_s)
        while self._gone and now_s - next(iter(self._gone.values())) > self._limits.tell_gone_for_s:
            self._gone.popitem(last=False)

    def _end_the_silent(self, paused_s: float, now_s: float) -> None:
        limits = self._limits
        for entry in self._entries.values():
            entry.heartbeat_s = min(now_s, entry.heartbeat_s + paused_s)
        self._last_heard_s = min(now_s, self._last_heard_s + paused_s)
        self._isolation_over_s = min(now_s, self._isolation_over_s + paused_s)
        if self._is_isolated(now_s):
            _ISOLATED.reached()
        spared = self._is_isolated(now_s) or now_s - self._isolation_over_s <= limits.heartbeat_timeout_s
        patience_s = limits.isolation_timeout_s if spared else limits.heartbeat_timeout_s
        for entry in list(self._entries.values()):
            silence_s = now_s - entry.heartbeat_s
            if silence_s > patience_s:
                reason = f"no heartbeat for {silence_s:.1f} s"
                self._lost.append(f"{entry.info.worker_id} incarnation {entry.info.incarnation}: {reason}")
                self._end(entry, reason, now_s)
        # Heartbeats only move this on, and who registers from now on is heard later than anybody here.
        oldest_s = min((entry.heartbeat_s for entry in self._entries.values()), default=now_s)
        self._all_heard_until_s = limits.heartbeat_timeout_s + oldest_s
        self._look_again_s = now_s + LOOK_INTERVAL_S if spared else self._all_heard_until_s

    def _is_isolated(self, now_s: float) -> bool:
        """Whether everybody fell silent at once: then it is the coordinator that is cut off, or the network is down,
        and nothing is known of anybody."""
        return len(self._entries) > 1 and now_s - self._last_heard_s > self._limits.heartbeat_timeout_s / 2

    def _note_heard(self, now_s: float) -> None:
        """Of somebody. The others' messages come later by up to a heartbeat and what a new connection takes."""
        if self._is_isolated(now_s):
            self._isolation_over_s = now_s
        self._last_heard_s = now_s

    def _heard(self, now_s: float) -> list[_Entry]:
        """Those that are not silent for too long, by worker id."""
        timeout_s = self._limits.heartbeat_timeout_s
        return [entry for _, entry in sorted(self._entries.items()) if now_s - entry.heartbeat_s <= timeout_s]

    def _end(self, entry: _Entry, reason: str, now_s: float) -> None:
        worker_id, incarnation = entry.info.worker_id, entry.info.incarnation
        del self._entries[worker_id]
        self._fleet.remove(worker_id)
        self._fenced[worker_id] = (incarnation, reason)
        self._fenced.move_to_end(worker_id)
        if len(self._fenced) > self._limits.max_fenced:
            self._fenced.popitem(last=False)
        self._gone[WorkerLife(worker_id, incarnation)] = now_s
        if len(self._gone) > self._limits.max_told_gone:
            self._gone.popitem(last=False)

    def _refuse_stale(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        known = self._entries.get(worker_id)
        if known is not None and known.info.incarnation > incarnation:
            _STALE_LIFE.reached()
            raise StaleIncarnation(
                f"{worker_id} speaks as incarnation {incarnation}, but {known.info.incarnation} is known"
            )
        last, reason = self._fenced.get(worker_id, (None, ""))
        if last is not None and incarnation <= last:
            _STALE_LIFE.reached()
            raise StaleIncarnation(
                f"incarnation {incarnation} of {worker_id} was given up and is not taken up again: {reason}"
            )
