"""Who is in the cluster: registration with incarnations, heartbeats, suspicion, ends of lives.

A machine without I/O: `CoordinatorShell` feeds it messages and the time; whoever places requests is its `Listener`. A
worker is believed while its heartbeats come. One that is late is *suspect*: it gets requests only where no other can
take them, and its next heartbeat ends that. A life that fell silent, said goodbye or was replaced by a later one is
*gone*, and that is final: everybody who may hold leases with it is told (`gone`), so it is never taken up again,
however well it feels when it comes back; it is refused with StaleIncarnation, ends itself, and its next life registers
anew. A coordinator that was restarted knows nothing and takes up whoever registers.

A hung engine is no matter of heartbeats: the worker that has it ends itself (`worker.watchdog`). Time in which
the coordinator itself did not run is nobody's silence.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec

from contracts.errors import StaleIncarnation
from contracts.failpoints import RarePath
from contracts.messages import Member, WorkerLife, WorkerLoad
from contracts.pauses import PauseWatch

if TYPE_CHECKING:
    from contracts.ids import Incarnation, WorkerId
    from contracts.messages import LatencyFit, TransferReport, WorkerInfo

#: `expire` is called at least this often.
LOOK_INTERVAL_S = 0.5
#: Between two looks or messages; after a longer gap the coordinator itself did not run.
LONGEST_GAP_S = 1.5


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipLimits:
    """Raises ValueError for a suspicion that could never come."""

    heartbeat_interval_s: float = 0.5
    #: Silence after which a worker gets requests only where no other can take them; None: half the timeout.
    suspect_after_s: float | None = None
    #: Silence after which a life is over.
    heartbeat_timeout_s: float = 3.0
    #: The same where everybody is silent at once: they get no requests meanwhile, but their lives go on. When
    #: somebody is heard again, the others have a `heartbeat_timeout_s` from then to be heard too.
    isolation_timeout_s: float = 20.0
    #: How long, and of how many lives, the end is told with every heartbeat.
    tell_gone_for_s: float = 60.0
    max_told_gone: int = 256
    #: Worker ids whose last ended life is remembered, to refuse it; far more than a cluster has.
    max_fenced: int = 16_384

    def __post_init__(self) -> None:
        if not 0 < self.suspicion_s <= self.heartbeat_timeout_s:
            raise ValueError(
                f"suspect_after_s ({self.suspicion_s:g}) must be above 0 and at most heartbeat_timeout_s "
                f"({self.heartbeat_timeout_s:g})"
            )

    @property
    def suspicion_s(self) -> float:
        return self.heartbeat_timeout_s / 2 if self.suspect_after_s is None else self.suspect_after_s


_ISOLATED = RarePath("coordinator.isolated", "everybody fell silent at once, nobody is given up for it yet")
_STALE_LIFE = RarePath("coordinator.stale_life", "a life spoke that is over")
_PLACE_TAKEN = RarePath("coordinator.place_taken", "a later life of a worker took the place of one that was up")
_SUSPECT_HEARD = RarePath("coordinator.suspect_heard", "a suspect was heard again")


class Listener(Protocol):
    """Hears which lives begin and end, and what they report. A worker is added before it is reported and removed,
    and removed before its next life is added."""

    def add(self, info: WorkerInfo, now_s: float) -> None: ...

    def remove(self, worker_id: WorkerId) -> None: ...

    def report(self, worker_id: WorkerId, load: WorkerLoad, now_s: float, fit: LatencyFit | None = None) -> None: ...


@dataclass(frozen=True, slots=True)
class Standing:
    """The present lives that are not simply up."""

    #: Silent for a while: to be used where no other can take a request.
    suspects: frozenset[WorkerId] = frozenset()
    #: Silent for longer than ends a life, and spared for now: not to be used at all.
    unheard: frozenset[WorkerId] = frozenset()


ALL_UP = Standing()


@dataclass(slots=True)
class _Entry:
    info: WorkerInfo
    load: WorkerLoad
    #: Of the last heartbeat; moved on by pauses of the coordinator.
    heartbeat_s: float
    transfers: TransferReport | None = None
    latency: LatencyFit | None = None


class Membership:
    """Calls cost the same however many workers there are, but for `members` and for what changes."""

    def __init__(self, limits: MembershipLimits, listener: Listener) -> None:
        self._limits = limits
        self._listener = listener
        self._mark = 0
        self._pauses = PauseWatch(LONGEST_GAP_S)
        #: When anybody was last heard, and when that was after everybody had been silent; moved on by pauses.
        self._last_heard_s = -math.inf
        self._isolation_over_s = -math.inf
        #: The present life of each worker that has one, by heartbeat: whoever is silent longest stands first.
        self._entries: OrderedDict[WorkerId, _Entry] = OrderedDict()
        #: What `standing` said last, and until when it holds unless one of those named is heard or ends.
        self._standing = ALL_UP
        self._standing_until_s = -math.inf
        self._draining: frozenset[WorkerId] = frozenset()
        #: Last ended life of each worker, and why it ended; the one that ended last stands last.
        self._fenced: OrderedDict[WorkerId, tuple[Incarnation, str]] = OrderedDict()
        #: When lives ended, oldest first: those that are told.
        self._gone: OrderedDict[WorkerLife, float] = OrderedDict()
        #: One sentence for each life that fell silent since `expire` was last called.
        self._lost: list[str] = []

    def __len__(self) -> int:
        """Present lives, as of the last call."""
        return len(self._entries)

    @property
    def mark(self) -> int:
        """`MembersReply.members_mark`, as of the last call."""
        return self._mark

    def register(self, info: WorkerInfo, now_s: float) -> None:
        """Takes up a life of a worker; the earlier one is gone with it. Idempotent.

        Raises StaleIncarnation for a life that is gone, or when a later one is known.
        """
        self._look(now_s)
        self._refuse_stale(info.worker_id, info.incarnation)
        self._note_heard(now_s)
        known = self._entries.get(info.worker_id)
        if known is not None and known.info == info:
            self._refresh(known, now_s)
            return
        if known is not None and known.info.incarnation < info.incarnation:
            _PLACE_TAKEN.reached()
            self._end(known, f"incarnation {info.incarnation} took its place", now_s)
        elif known is not None:
            self._take_out(known)
        entry = _Entry(info=info, load=WorkerLoad(free_blocks=info.total_blocks), heartbeat_s=now_s)
        self._entries[info.worker_id] = entry
        self._mark ^= _mark_of(info)
        self._listener.add(info, now_s)
        if known is not None and msgspec.structs.replace(known.info, role=info.role) == info:
            # The same life in another role has what it had: nobody is to think it empty until its next heartbeat.
            entry.load, entry.transfers, entry.latency = known.load, known.transfers, known.latency
            self._note_draining(info.worker_id, known.load.draining)
            self._listener.report(info.worker_id, known.load, now_s, known.latency)

    def heartbeat(
        self,
        worker_id: WorkerId,
        incarnation: Incarnation,
        load: WorkerLoad,
        now_s: float,
        transfers: TransferReport | None = None,
        latency: LatencyFit | None = None,
    ) -> bool:
        """False when this life is not known: the worker must register. `transfers`, `latency`: None is as last time.

        Raises StaleIncarnation as `register` does.
        """
        if not self.knows(worker_id, incarnation, now_s):
            return False
        entry = self._entries[worker_id]
        self._note_heard(now_s)
        self._refresh(entry, now_s)
        entry.load = load
        self._note_draining(worker_id, load.draining)
        entry.transfers = transfers or entry.transfers
        entry.latency = latency or entry.latency
        self._listener.report(worker_id, load, now_s, entry.latency)
        return True

    def knows(self, worker_id: WorkerId, incarnation: Incarnation, now_s: float) -> bool:
        """Whether this is the worker's present life. Raises StaleIncarnation as `register` does."""
        self._look(now_s)
        self._refuse_stale(worker_id, incarnation)
        entry = self._entries.get(worker_id)
        return entry is not None and entry.info.incarnation == incarnation

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

    def expire(self, now_s: float) -> list[str]:
        """To be called every `LOOK_INTERVAL_S`. One sentence for each life that fell silent since the last call."""
        self._look(now_s)
        lost, self._lost = self._lost, []
        return lost

    def standing(self, now_s: float) -> Standing:
        """The same object for as long as nothing changes."""
        self._look(now_s)
        if now_s > self._standing_until_s:
            self._judge(now_s)
        return self._standing

    def members(self, now_s: float, *, with_unheard: bool = False) -> tuple[Member, ...]:
        """The lives that may be given requests, with their last load, by worker id: for people and health checks.
        `with_unheard`: those too that are spared for now, as suspects."""
        standing = self.standing(now_s)
        return tuple(
            Member(
                info=entry.info,
                load=entry.load,
                heartbeat_age_s=now_s - entry.heartbeat_s,
                transfers=entry.transfers,
                state="suspect" if worker_id in standing.suspects or worker_id in standing.unheard else "up",
            )
            for worker_id, entry in sorted(self._entries.items())
            if with_unheard or worker_id not in standing.unheard
        )

    @property
    def draining(self) -> frozenset[WorkerId]:
        """The present lives that say that they take no new request. The same object for as long as nothing changes."""
        return self._draining

    # --- silence ----------------------------------------------------------------------------------

    def _look(self, now_s: float) -> None:
        """Ends the lives that fell silent. Comes first in every call: nothing may see one that should be over."""
        if paused_s := self._pauses.look(now_s):
            self._forgive(paused_s, now_s)
        self._end_the_silent(now_s)
        while self._gone and now_s - next(iter(self._gone.values())) > self._limits.tell_gone_for_s:
            self._gone.popitem(last=False)

    def _forgive(self, paused_s: float, now_s: float) -> None:
        for entry in self._entries.values():
            entry.heartbeat_s = min(now_s, entry.heartbeat_s + paused_s)
        self._last_heard_s = min(now_s, self._last_heard_s + paused_s)
        self._isolation_over_s = min(now_s, self._isolation_over_s + paused_s)
        self._standing_until_s = -math.inf

    def _end_the_silent(self, now_s: float) -> None:
        timeout_s = self._limits.heartbeat_timeout_s
        patience_s: float | None = None
        while self._entries:
            entry = next(iter(self._entries.values()))
            silence_s = now_s - entry.heartbeat_s
            if silence_s <= timeout_s:
                return
            if patience_s is None:
                patience_s = self._limits.isolation_timeout_s if self._are_spared(now_s) else timeout_s
            if silence_s <= patience_s:
                return
            reason = f"no heartbeat for {silence_s:.1f} s"
            self._lost.append(f"{entry.info.worker_id} incarnation {entry.info.incarnation}: {reason}")
            self._end(entry, reason, now_s)

    def _are_spared(self, now_s: float) -> bool:
        """Whether silence may be the coordinator's own: now, or so lately that not everybody had time to be heard."""
        if self._is_isolated(now_s):
            _ISOLATED.reached()
            return True
        return now_s - self._isolation_over_s <= self._limits.heartbeat_timeout_s

    def _is_isolated(self, now_s: float) -> bool:
        """Whether everybody fell silent at once: then it is the coordinator that is cut off, or the network is down,
        and nothing is known of anybody."""
        return len(self._entries) > 1 and now_s - self._last_heard_s > self._limits.heartbeat_timeout_s / 2

    def _judge(self, now_s: float) -> None:
        suspicion_s, timeout_s = self._limits.suspicion_s, self._limits.heartbeat_timeout_s
        suspects: list[WorkerId] = []
        unheard: list[WorkerId] = []
        spared_until_s = self._isolation_over_s + timeout_s
        until_s = math.inf
        for worker_id, entry in self._entries.items():
            silence_s = now_s - entry.heartbeat_s
            if silence_s > timeout_s:
                # Just after everybody was silent, whoever is not heard yet is most likely well.
                if now_s <= spared_until_s:
                    suspects.append(worker_id)
                    until_s = min(until_s, spared_until_s)
                else:
                    unheard.append(worker_id)
                continue
            # The first of each kind is the first to pass on to the next.
            until_s = min(until_s, entry.heartbeat_s + (timeout_s if silence_s > suspicion_s else suspicion_s))
            if silence_s <= suspicion_s:
                break
            suspects.append(worker_id)
        found = Standing(frozenset(suspects), frozenset(unheard)) if suspects or unheard else ALL_UP
        if found != self._standing:
            self._standing = found
        # Without anybody, until somebody registers: who does so is up for a while, so infinity would do too.
        self._standing_until_s = min(until_s, now_s + suspicion_s)

    def _note_heard(self, now_s: float) -> None:
        """Of somebody. The others' messages come later by up to a heartbeat and what a new connection takes."""
        if self._is_isolated(now_s):
            self._isolation_over_s = now_s
            self._standing_until_s = -math.inf
        self._last_heard_s = now_s

    def _note_draining(self, worker_id: WorkerId, draining: bool) -> None:
        if draining != (worker_id in self._draining):
            self._draining ^= {worker_id}

    def _refresh(self, entry: _Entry, now_s: float) -> None:
        entry.heartbeat_s = now_s
        worker_id = entry.info.worker_id
        self._entries.move_to_end(worker_id)
        if worker_id in self._standing.suspects or worker_id in self._standing.unheard:
            _SUSPECT_HEARD.reached()
            self._standing_until_s = -math.inf

    # --- ends of lives ----------------------------------------------------------------------------

    def _take_out(self, entry: _Entry) -> None:
        worker_id = entry.info.worker_id
        del self._entries[worker_id]
        self._note_draining(worker_id, False)
        self._mark ^= _mark_of(entry.info)
        self._standing_until_s = -math.inf
        self._listener.remove(worker_id)

    def _end(self, entry: _Entry, reason: str, now_s: float) -> None:
        worker_id, incarnation = entry.info.worker_id, entry.info.incarnation
        self._take_out(entry)
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


def _mark_of(info: WorkerInfo) -> int:
    """Its part of the mark: combined in any order they give the same number."""
    return int.from_bytes(hashlib.blake2b(msgspec.msgpack.encode(info), digest_size=8).digest())
