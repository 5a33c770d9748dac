"""The reader's side of the leased pull: a machine from events to instructions.

    WAITING ─▶ RESERVED ─▶ PULLING ─▶ CONFIRMING ─▶ ended ADOPTED
    any ──fault / cancel / term over──▶ ended ABORTED, by way of QUARANTINED while a pull is in flight

A WAITING offer holds no blocks: it is renewed, and reserves in the order of arrival. RESERVED and PULLING
pull what the holder announces while it still computes. CONFIRMING has every byte and asks whether the lease
stood after the last of them; the yes that ends it confirms and adopts in one.

`Reader.handle` is the only thing that changes leases and their reservations in the ledger. It performs no I/O
and reads no clock: `kvtransfer.reader_service` executes its instructions and feeds back what came of them.

Two-sided term: an offer grants half of what it names (the other half may have passed on its way, see
`Holder`); a renewal grants its term from when this side asked. So this side ends first.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, assert_never

from contracts.errors import (
    BadRequest,
    Cancelled,
    IncompatiblePeer,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
    TandemError,
    TransferAborted,
)
from contracts.ids import BlockId, LeaseId
from contracts.messages import (
    AckRequest,
    BlockRef,
    ConfirmReply,
    ConfirmRequest,
    HandoffReply,
    LeaseTerms,
    Peer,
    ProgressReply,
    ProgressRequest,
    RenewReply,
    RenewRequest,
)
from kvtransfer.reader_events import (
    AbortReason,
    AckEnded,
    AskConfirm,
    AskRenew,
    BlocksFreed,
    CancelRequested,
    ConfirmAnswered,
    ConfirmFailed,
    HolderGone,
    HolderKey,
    LeaseAborted,
    LeaseAdopted,
    Offered,
    ProgressArrived,
    PullEnded,
    ReaderEvent,
    ReaderInstruction,
    ReaderTick,
    RefuseOffer,
    RefuseProgress,
    RenewAnswered,
    RenewFailed,
    ReplyProgress,
    SendAck,
    StartPull,
    StopPull,
    Verdict,
)
from kvtransfer.timers import Deadlines, retry_delay_s

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from contracts.ids import Incarnation, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import Seal
    from kvtransfer.ledger import Ledger
    from kvtransfer.transport import PullResult

#: Bytes of one pull at most, so that leases share the wire in turns.
MAX_PULL_BYTES = 64 << 20

#: Lease ids in one Renew or Ack at most; the rest follow in the next.
MAX_LEASES_PER_CALL = 1024

#: Ended leases remembered, so that a repeated offer does not revive one.
MAX_ENDED_LEASES = 4096

#: How long one Confirm may take before it is asked again.
CONFIRM_TIMEOUT_S = 1.0


class ReaderState(Enum):
    WAITING = "waiting"
    RESERVED = "reserved"
    PULLING = "pulling"
    CONFIRMING = "confirming"
    QUARANTINED = "quarantined"


# --- the machine ----------------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, repr=False)
class _Lease:
    terms: LeaseTerms
    owner: str
    state: ReaderState
    #: End of the term, as far as the holder granted it for certain.
    expires_s: float
    #: When to ask for more of it; past while a renewal is in flight.
    renew_at_s: float
    #: Final blocks of the holder, in the lease's order.
    announced: list[BlockRef] = field(default_factory=list[BlockRef])
    #: Where they go; parallel to the lease's block list, empty while WAITING.
    blocks: list[BlockId] = field(default_factory=list[BlockId])
    #: `blocks[:num_pulled]` hold the announced bytes; up to `num_pulling` they are under way.
    num_pulled: int = 0
    num_pulling: int = 0
    seal: Seal | None = None
    #: The one Confirm in flight; failures in a row, and when to try again.
    calling: bool = False
    failures: int = 0
    retry_at_s: float = 0.0

    def __repr__(self) -> str:
        # Not the terms: their endpoint is a secret.
        blocks = f"{self.num_pulled}/{self.num_pulling}/{len(self.announced)}/{self.terms.num_blocks}"
        sealed = ", sealed" if self.seal is not None else ""
        return f"<lease {self.lease_id} {self.state.value} [{blocks} pulled/pulling/known/all{sealed}]>"

    @property
    def lease_id(self) -> LeaseId:
        return self.terms.lease_id

    @property
    def holder_key(self) -> HolderKey:
        return (self.terms.holder.worker_id, self.terms.holder.incarnation)

    @property
    def pull_in_flight(self) -> bool:
        return self.num_pulling > self.num_pulled

    @property
    def complete(self) -> bool:
        return self.seal is not None and self.num_pulled == len(self.announced)

    def next_due_s(self) -> float | None:
        """None in quarantine: only the transport ends that."""
        if self.state is ReaderState.QUARANTINED:
            return None
        if self.state is ReaderState.CONFIRMING and not self.calling:
            return min(self.expires_s, self.retry_at_s)
        return self.expires_s


@dataclass(slots=True)
class _Holder:
    """Calls to one life of one holder, batched over its leases."""

    peer: Peer
    #: Leases that are renewed: all of this holder that have not ended.
    leases: dict[LeaseId, _Lease] = field(default_factory=dict[LeaseId, _Lease])
    #: Ended leases it has not been told of, and until when that is worth while.
    acks_owed: dict[LeaseId, float] = field(default_factory=dict[LeaseId, float])
    #: The ids in the one Renew in flight, and when it was asked; None when none is.
    renewing: tuple[LeaseId, ...] | None = None
    renew_asked_s: float = 0.0
    renew_failures: int = 0
    renew_retry_at_s: float = 0.0
    #: The ids in the one Ack in flight; None when none is.
    acking: tuple[LeaseId, ...] | None = None
    ack_failures: int = 0
    ack_retry_at_s: float = 0.0

    def renew_due_s(self) -> float | None:
        if self.renewing is not None or not self.leases:
            return None
        return max(self.renew_retry_at_s, min(lease.renew_at_s for lease in self.leases.values()))

    def next_due_s(self) -> float | None:
        due = [self.renew_due_s()]
        if self.acks_owed and self.acking is None:
            due.append(self.ack_retry_at_s)
        return min((each for each in due if each is not None), default=None)

    @property
    def done_with(self) -> bool:
        return not self.leases and not self.acks_owed and self.renewing is None and self.acking is None


@dataclass(slots=True)
class ReaderCounters:
    """What happened since the start, for metrics."""

    offered: int = 0
    #: Refused offers by error code.
    refused: Counter[str] = field(default_factory=Counter[str])
    adopted: int = 0
    #: Aborted leases by reason.
    aborted: Counter[str] = field(default_factory=Counter[str])
    #: Events that changed nothing, by what they were and why.
    ignored: Counter[str] = field(default_factory=Counter[str])
    #: Calls that failed, by kind and error code.
    failed_calls: Counter[str] = field(default_factory=Counter[str])
    pulls: int = 0
    #: Bytes that landed, useful or not, and the time they took on the wire.
    pulled_bytes: int = 0
    wire_s: float = 0.0


class Reader:
    """All leases that one life of a worker reads."""

    def __init__(
        self,
        ledger: Ledger,
        identity: KvIdentity,
        transports: Collection[str],
        *,
        max_waiting: int = 256,
        max_pull_bytes: int = MAX_PULL_BYTES,
        may_reserve: Callable[[], bool] = lambda: True,
    ) -> None:
        """`may_reserve` says whether offers may take blocks now; while it says no they wait."""
        self._may_reserve = may_reserve
        self._ledger = ledger
        self._identity = identity
        self._transports = tuple(transports)
        self._max_waiting = max_waiting
        self._max_pull_blocks = max(1, max_pull_bytes // identity.layout.block_bytes)
        #: All leases that have not ended, and aborted ones whose pull is in flight (QUARANTINED). Each one
        #: that is not WAITING has its blocks reserved or quarantined in the ledger.
        self._leases: dict[LeaseId, _Lease] = {}
        #: All and only WAITING leases, in the order of arrival.
        self._waiting: dict[LeaseId, _Lease] = {}
        #: Lives of holders that have leases here or are owed an Ack.
        self._holders: dict[HolderKey, _Holder] = {}
        #: The newest life of each worker that offered something.
        self._newest: dict[WorkerId, Incarnation] = {}
        #: How recent leases ended; oldest first.
        self._ended: dict[LeaseId, str] = {}
        #: One entry per lease that has a next due time, one per holder that has; at or before it.
        self._deadlines: Deadlines[LeaseId | HolderKey] = Deadlines()
        self.counters = ReaderCounters()

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.leases_by_state().items())
        return f"<Reader [{counts} | {len(self._holders)} holders]>"

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """No lease, no quarantine, and nobody left to tell."""
        return not self._leases and not self._holders

    def lease_ids(self) -> list[LeaseId]:
        """Leases that have not ended."""
        return [each for each, lease in self._leases.items() if lease.state is not ReaderState.QUARANTINED]

    def leases_by_state(self) -> dict[str, int]:
        states = Counter(lease.state for lease in self._leases.values())
        return {state.value: states[state] for state in ReaderState}

    def next_due_s(self) -> float | None:
        """When `handle` wants a ReaderTick at the latest; None: not before the next event."""
        return self._deadlines.next_s()

    def check(self) -> None:
        """Audits what the attributes promise; raises InvariantBroken."""
        for lease in self._leases.values():
            self._check_lease(lease)
        waiting = [each for each, lease in self._leases.items() if lease.state is ReaderState.WAITING]
        if waiting != list(self._waiting) or len(waiting) > self._max_waiting:
            raise InvariantBroken(f"{len(waiting)} leases wait, {len(self._waiting)} queued; {self!r}")
        live = [lease for lease in self._leases.values() if lease.state is not ReaderState.QUARANTINED]
        if sum(len(holder.leases) for holder in self._holders.values()) != len(live):
            raise InvariantBroken(f"{len(live)} live leases, not what the holders' lists say; {self!r}")
        if any(holder.done_with for holder in self._holders.values()):
            raise InvariantBroken(f"a holder without business is kept; {self!r}")

    def _check_lease(self, lease: _Lease) -> None:
        reserved = [] if lease.state is ReaderState.WAITING else self._ledger.reserved_blocks(lease.lease_id)
        ordered = 0 <= lease.num_pulled <= lease.num_pulling <= len(lease.announced) <= lease.terms.num_blocks
        quarantined = lease.state is ReaderState.QUARANTINED
        live = lease.lease_id in self._holders[lease.holder_key].leases if not quarantined else True
        if reserved != lease.blocks or not ordered or not live or (quarantined and not lease.pull_in_flight):
            raise InvariantBroken(f"{lease}; {self!r}, {self._ledger!r}")

    def handle(self, event: ReaderEvent, now_s: float) -> list[ReaderInstruction]:
        """Applies one event. What is due by `now_s` happens before it, so no event revives an ended lease."""
        instructions = self._pass_time(now_s)
        match event:
            case Offered():
                instructions += self._offer(event, now_s)
            case ProgressArrived(body):
                instructions += self._progress(body, now_s)
            case RenewAnswered() | RenewFailed() | AckEnded():
                instructions += self._holder_event(event, now_s)
            case HolderGone():
                instructions += self._holder_gone(event, now_s)
            case BlocksFreed() | ReaderTick():
                pass
            case _:
                instructions += self._lease_event(event, now_s)
        instructions += self._reserve_waiting(now_s)
        return instructions

    def _lease_event(
        self, event: PullEnded | ConfirmAnswered | ConfirmFailed | CancelRequested, now_s: float
    ) -> list[ReaderInstruction]:
        lease = self._leases.get(event.lease_id)
        if lease is None:
            return self._ignore(event, "unknown lease")
        match event:
            case PullEnded() if not lease.pull_in_flight:
                return self._ignore(event, "no pull in flight")
            case ConfirmAnswered() | ConfirmFailed() if not lease.calling:
                return self._ignore(event, "no confirmation asked")
            case PullEnded(_, result):
                return self._pull_ended(lease, result, now_s)
            case _ if lease.state is ReaderState.QUARANTINED:
                return self._ignore(event, "already aborted")
            case ConfirmAnswered(_, reply):
                return self._confirm_answered(lease, reply, now_s)
            case ConfirmFailed(_, error):
                return self._confirm_failed(lease, error, now_s)
            case CancelRequested(_, reason):
                return self._abort(lease, AbortReason.CANCELLED, Cancelled(reason), now_s)
            case _:
                assert_never(event)

    def _ignore(self, event: ReaderEvent, why: str) -> list[ReaderInstruction]:
        self.counters.ignored[f"{type(event).__name__}: {why}"] += 1
        return []

    # --- offers -----------------------------------------------------------------------------------------

    def _offer(self, event: Offered, now_s: float) -> list[ReaderInstruction]:
        terms = event.terms
        known = self._leases.get(terms.lease_id)
        if known is not None and known.state is not ReaderState.QUARANTINED:
            return [self._verdict(known)]
        instructions = self._fence(terms.holder, now_s)
        refusal = self._refusal(terms)
        if refusal is not None:
            self.counters.refused[refusal.code] += 1
            return [*instructions, RefuseOffer(refusal)]
        self.counters.offered += 1
        lease = _Lease(
            terms=terms,
            owner=event.owner,
            state=ReaderState.WAITING,
            expires_s=now_s + terms.ttl_s / 2,
            renew_at_s=now_s + terms.ttl_s / 4,
        )
        self._leases[terms.lease_id] = lease
        self._waiting[terms.lease_id] = lease
        holder = self._holders.setdefault(lease.holder_key, _Holder(terms.holder))
        holder.leases[terms.lease_id] = lease
        instructions += self._reserve_waiting(now_s)
        instructions += self._drive(lease, now_s)
        return [*instructions, self._verdict(lease), *self._drive_holder(lease.holder_key, now_s)]

    def _verdict(self, lease: _Lease) -> Verdict:
        waiting = lease.state is ReaderState.WAITING
        return Verdict(HandoffReply(verdict="waiting" if waiting else "reserved"))

    def _refusal(self, terms: LeaseTerms) -> TandemError | None:
        """Why this offer is not for this reader, or not now."""
        lease_id = terms.lease_id
        if lease_id in self._leases or lease_id in self._ended:
            how = self._ended.get(lease_id, "in quarantine")
            return TransferAborted(f"lease {lease_id} has ended here: {how}")
        newest = self._newest[terms.holder.worker_id]
        if terms.holder.incarnation < newest:
            return StaleIncarnation(
                f"lease {lease_id} is of life {terms.holder.incarnation} of {terms.holder.worker_id}; "
                f"life {newest} has been heard of"
            )
        if (mismatch := self._identity.mismatch(terms.identity)) is not None:
            return IncompatiblePeer(f"KV of {terms.holder.worker_id}: {mismatch}")
        if terms.endpoints.keys().isdisjoint(self._transports):
            ours, theirs = ", ".join(self._transports), ", ".join(terms.endpoints)
            return IncompatiblePeer(f"transports: {ours} here, {theirs} there")
        if not 0 < terms.num_blocks <= self._ledger.num_blocks:
            return BadRequest(
                f"lease {lease_id} of {terms.num_blocks} blocks can never fit: this pool has {self._ledger.num_blocks}"
            )
        if not terms.ttl_s > 0:
            return BadRequest(f"lease {lease_id}: ttl_s must be positive, not {terms.ttl_s}")
        return self._no_room(terms)

    def _no_room(self, terms: LeaseTerms) -> NoCapacity | None:
        room = terms.num_blocks <= self._ledger.available_blocks and self._may_reserve()
        fits_now = room and not self._waiting
        if fits_now or len(self._waiting) < self._max_waiting:
            return None
        return NoCapacity(
            f"{terms.num_blocks} blocks wanted, {self._ledger.available_blocks} available, and "
            f"{len(self._waiting)} offers wait already"
        )

    def _fence(self, holder: Peer, now_s: float) -> list[ReaderInstruction]:
        """Ends what older lives of this worker offered: their memory is gone."""
        newest = self._newest.setdefault(holder.worker_id, holder.incarnation)
        if holder.incarnation <= newest:
            return []
        self._newest[holder.worker_id] = holder.incarnation
        instructions: list[ReaderInstruction] = []
        for worker_id, incarnation in list(self._holders):
            if worker_id == holder.worker_id and incarnation < holder.incarnation:
                instructions += self._lose_holder((worker_id, incarnation), now_s)
        return instructions

    def _reserve_waiting(self, now_s: float) -> list[ReaderInstruction]:
        """Gives blocks to waiting offers in the order of arrival; a large one is not overtaken."""
        instructions: list[ReaderInstruction] = []
        while self._waiting and self._may_reserve():
            lease = next(iter(self._waiting.values()))
            blocks = self._ledger.reserve(lease.lease_id, lease.terms.num_blocks)
            if blocks is None:
                break
            del self._waiting[lease.lease_id]
            lease.state = ReaderState.RESERVED
            lease.blocks = blocks
            instructions += self._drive(lease, now_s)
        return instructions

    # --- the holder's announcements ---------------------------------------------------------------------

    def _progress(self, body: ProgressRequest, now_s: float) -> list[ReaderInstruction]:
        lease = self._leases.get(body.lease_id)
        if lease is None or lease.state is ReaderState.QUARANTINED:
            if body.withdrawn is not None:
                # The offer itself may still be on its way.
                self._remember_end(body.lease_id, f"withdrawn: {body.withdrawn}")
            return [ReplyProgress(ProgressReply(known=False))]
        if body.holder_incarnation != lease.terms.holder.incarnation:
            ours = lease.terms.holder.incarnation
            text = f"lease {body.lease_id} is of life {ours} of its holder, not {body.holder_incarnation}"
            return [RefuseProgress(StaleIncarnation(text))]
        if body.withdrawn is not None:
            error = TransferAborted(f"lease {body.lease_id} was withdrawn: {body.withdrawn}")
            aborted = self._abort(lease, AbortReason.WITHDRAWN, error, now_s)
            return [*aborted, ReplyProgress(ProgressReply(known=True))]
        if (problem := self._misfit(lease, body)) is not None:
            return [RefuseProgress(BadRequest(f"progress of lease {body.lease_id}: {problem}"))]
        return self._announce(lease, body, now_s)

    def _misfit(self, lease: _Lease, body: ProgressRequest) -> str | None:
        """What of the message contradicts the lease."""
        stop = body.start + len(body.blocks)
        if body.start < 0 or stop > lease.terms.num_blocks:
            return f"blocks [{body.start}, {stop}) of {lease.terms.num_blocks}"
        known = len(lease.announced)
        if lease.seal is not None and stop > known:
            return f"blocks [{body.start}, {stop}) after it was sealed at {known}"
        if body.seal is not None and (stop < known or stop == 0):
            return f"sealed at block {stop}, {known} known"
        return None

    def _announce(self, lease: _Lease, body: ProgressRequest, now_s: float) -> list[ReaderInstruction]:
        known = len(lease.announced)
        if body.start <= known:
            lease.announced += body.blocks[known - body.start :]
            if lease.seal is None:
                lease.seal = body.seal
        reply = ReplyProgress(ProgressReply(known=True, expected=len(lease.announced)))
        return [reply, *self._drive(lease, now_s)]

    # --- pulls and the confirmation ---------------------------------------------------------------------

    def _pull_ended(self, lease: _Lease, result: PullResult, now_s: float) -> list[ReaderInstruction]:
        self.counters.pulls += 1
        self.counters.pulled_bytes += result.num_bytes
        self.counters.wire_s += result.wire_s
        if lease.state is ReaderState.QUARANTINED:
            self._ledger.settle(lease.lease_id)
            del self._leases[lease.lease_id]
            return []
        self._ledger.end_pull(lease.lease_id)
        if result.error is not None:
            lease.num_pulling = lease.num_pulled
            error = TransferAborted(f"pull of lease {lease.lease_id} failed: {result.error.message}")
            return self._abort(lease, AbortReason.PULL_FAILED, error, now_s)
        lease.num_pulled = lease.num_pulling
        return self._drive(lease, now_s)

    def _confirm_answered(self, lease: _Lease, reply: ConfirmReply, now_s: float) -> list[ReaderInstruction]:
        if not reply.stands:
            error = TransferAborted(f"lease {lease.lease_id} does not stand: {reply.reason}")
            return self._abort(lease, AbortReason.NOT_CONFIRMED, error, now_s)
        seal = lease.seal
        assert seal is not None, f"unsealed lease confirmed: {lease}"
        blocks = self._ledger.adopt(lease.lease_id, lease.owner)
        self.counters.adopted += 1
        del self._leases[lease.lease_id]
        self._leave(lease, "adopted", acknowledge=True, now_s=now_s)
        adopted = LeaseAdopted(lease_id=lease.lease_id, owner=lease.owner, blocks=blocks, seal=seal)
        return [adopted, *self._drive_holder(lease.holder_key, now_s)]

    def _confirm_failed(self, lease: _Lease, error: TandemError, now_s: float) -> list[ReaderInstruction]:
        self.counters.failed_calls[f"confirm: {error.code}"] += 1
        if isinstance(error, StaleIncarnation):
            gone = TransferAborted(f"the holder of lease {lease.lease_id} restarted: {error.message}")
            return self._abort(lease, AbortReason.HOLDER_GONE, gone, now_s)
        lease.calling = False
        lease.failures += 1
        lease.retry_at_s = now_s + retry_delay_s(lease.failures)
        return self._drive(lease, now_s)

    def _drive(self, lease: _Lease, now_s: float) -> list[ReaderInstruction]:
        """Looks at the whole lease, starts what is next, and sets the next deadline."""
        instructions: list[ReaderInstruction] = []
        if lease.state in (ReaderState.RESERVED, ReaderState.PULLING) and not lease.pull_in_flight:
            if lease.num_pulled < len(lease.announced):
                instructions.append(self._pull(lease))
            elif lease.complete:
                lease.state = ReaderState.CONFIRMING
        if lease.state is ReaderState.CONFIRMING and not lease.calling and now_s >= lease.retry_at_s:
            instructions.append(self._ask_confirm(lease, now_s))
        self._set_deadline(lease.lease_id, lease.next_due_s())
        return instructions

    def _pull(self, lease: _Lease) -> StartPull:
        start = lease.num_pulled
        stop = min(len(lease.announced), start + self._max_pull_blocks)
        self._ledger.begin_pull(lease.lease_id)
        lease.state = ReaderState.PULLING
        lease.num_pulling = stop
        sources = [ref.block_id for ref in lease.announced[start:stop]]
        pairs = tuple(zip(sources, lease.blocks[start:stop], strict=True))
        return StartPull(
            lease_id=lease.lease_id,
            holder=lease.terms.holder,
            endpoints=lease.terms.endpoints,
            pairs=pairs,
        )

    def _ask_confirm(self, lease: _Lease, now_s: float) -> AskConfirm:
        lease.calling = True
        return AskConfirm(
            lease_id=lease.lease_id,
            holder=lease.terms.holder,
            body=ConfirmRequest(lease_id=lease.lease_id, holder_incarnation=lease.terms.holder.incarnation),
            timeout_s=min(CONFIRM_TIMEOUT_S, lease.expires_s - now_s),
        )

    # --- ends -------------------------------------------------------------------------------------------

    def _abort(self, lease: _Lease, reason: AbortReason, error: TandemError, now_s: float) -> list[ReaderInstruction]:
        """Ends the lease without adoption. Blocks that a pull may still write go into quarantine."""
        lease_id = lease.lease_id
        instructions: list[ReaderInstruction] = []
        if lease.state is ReaderState.WAITING:
            del self._waiting[lease_id], self._leases[lease_id]
        elif self._ledger.abort(lease_id):
            del self._leases[lease_id]
        else:
            lease.state = ReaderState.QUARANTINED
            instructions.append(StopPull(lease_id))
        self.counters.aborted[reason] += 1
        holder_knows = reason in (AbortReason.WITHDRAWN, AbortReason.HOLDER_GONE)
        self._leave(lease, f"{reason}: {error.message}", acknowledge=not holder_knows, now_s=now_s)
        instructions.append(LeaseAborted(lease_id=lease_id, reason=reason, error=error))
        return [*instructions, *self._drive_holder(lease.holder_key, now_s)]

    def _leave(self, lease: _Lease, how: str, *, acknowledge: bool, now_s: float) -> None:
        """Takes an ended lease out of its holder's list, and the holder's Ack in."""
        holder = self._holders[lease.holder_key]
        del holder.leases[lease.lease_id]
        if acknowledge:
            holder.acks_owed[lease.lease_id] = max(lease.expires_s, now_s) + lease.terms.ttl_s
        self._deadlines.discard(lease.lease_id)
        self._remember_end(lease.lease_id, how)

    def _remember_end(self, lease_id: LeaseId, how: str) -> None:
        self._ended[lease_id] = how
        if len(self._ended) > MAX_ENDED_LEASES:
            del self._ended[next(iter(self._ended))]

    def _holder_gone(self, event: HolderGone, now_s: float) -> list[ReaderInstruction]:
        key = (event.worker_id, event.incarnation)
        if key not in self._holders:
            return self._ignore(event, "unknown holder")
        return self._lose_holder(key, now_s)

    def _lose_holder(self, key: HolderKey, now_s: float) -> list[ReaderInstruction]:
        instructions: list[ReaderInstruction] = []
        holder = self._holders[key]
        holder.acks_owed.clear()
        for lease in list(holder.leases.values()):
            error = TransferAborted(f"life {key[1]} of {key[0]}, holder of lease {lease.lease_id}, is over")
            instructions += self._abort(lease, AbortReason.HOLDER_GONE, error, now_s)
        return [*instructions, *self._drive_holder(key, now_s)]

    def _pass_time(self, now_s: float) -> list[ReaderInstruction]:
        instructions: list[ReaderInstruction] = []
        for key in self._deadlines.pop_due(now_s):
            if isinstance(key, tuple):
                instructions += self._drive_holder(key, now_s)
            elif now_s >= self._leases[key].expires_s:
                error = TransferAborted(f"lease {key} ended: its holder did not renew it")
                instructions += self._abort(self._leases[key], AbortReason.EXPIRED, error, now_s)
            else:
                instructions += self._drive(self._leases[key], now_s)
        return instructions

    def _set_deadline(self, key: LeaseId | HolderKey, due_s: float | None) -> None:
        if due_s is None:
            self._deadlines.discard(key)
        else:
            self._deadlines.set(key, due_s)

    # --- renewals and acknowledgements, batched by holder -----------------------------------------------

    def _holder_event(self, event: RenewAnswered | RenewFailed | AckEnded, now_s: float) -> list[ReaderInstruction]:
        holder = self._holders.get(event.holder)
        if holder is None:
            return self._ignore(event, "unknown holder")
        match event:
            case AckEnded(_, error):
                if holder.acking is None:
                    return self._ignore(event, "nothing acknowledged")
                self._ack_ended(holder, error, now_s)
            case _ if holder.renewing is None:
                return self._ignore(event, "nothing renewed")
            case RenewAnswered(_, reply):
                return [*self._renewed(holder, reply, now_s), *self._drive_holder(event.holder, now_s)]
            case RenewFailed(_, error):
                return [*self._renew_failed(holder, error, now_s), *self._drive_holder(event.holder, now_s)]
            case _:
                assert_never(event)
        return self._drive_holder(event.holder, now_s)

    def _renewed(self, holder: _Holder, reply: RenewReply, now_s: float) -> list[ReaderInstruction]:
        asked, holder.renewing, holder.renew_failures = holder.renewing or (), None, 0
        holder.renew_retry_at_s = now_s
        alive = frozenset(reply.alive)
        leases = [holder.leases[each] for each in asked if each in holder.leases]
        for lease in leases:
            granted = lease.lease_id in alive
            lease.renew_at_s = holder.renew_asked_s + reply.ttl_s / 3 if granted else math.inf
            if granted:
                lease.expires_s = max(lease.expires_s, holder.renew_asked_s + reply.ttl_s)
                self._set_deadline(lease.lease_id, lease.next_due_s())
        instructions: list[ReaderInstruction] = []
        for lease in leases:
            if lease.lease_id not in alive:
                error = TransferAborted(f"the holder let lease {lease.lease_id} go")
                instructions += self._abort(lease, AbortReason.EXPIRED, error, now_s)
        return instructions

    def _renew_failed(self, holder: _Holder, error: TandemError, now_s: float) -> list[ReaderInstruction]:
        self.counters.failed_calls[f"renew: {error.code}"] += 1
        holder.renewing = None
        if isinstance(error, StaleIncarnation):
            return self._lose_holder((holder.peer.worker_id, holder.peer.incarnation), now_s)
        holder.renew_failures += 1
        holder.renew_retry_at_s = now_s + retry_delay_s(holder.renew_failures)
        return []

    def _ack_ended(self, holder: _Holder, error: TandemError | None, now_s: float) -> None:
        sent, holder.acking = holder.acking or (), None
        if error is None or isinstance(error, StaleIncarnation):
            holder.ack_failures = 0
            holder.ack_retry_at_s = now_s
            for lease_id in sent:
                holder.acks_owed.pop(lease_id, None)
            return
        self.counters.failed_calls[f"ack: {error.code}"] += 1
        holder.ack_failures += 1
        holder.ack_retry_at_s = now_s + retry_delay_s(holder.ack_failures)
        for lease_id in [each for each, until_s in holder.acks_owed.items() if now_s >= until_s]:
            del holder.acks_owed[lease_id]

    def _drive_holder(self, key: HolderKey, now_s: float) -> list[ReaderInstruction]:
        """Starts the calls to one holder that are due, sets its next deadline, and forgets it when done."""
        holder = self._holders.get(key)
        if holder is None:
            return []
        instructions: list[ReaderInstruction] = []
        renew_due_s = holder.renew_due_s()
        if renew_due_s is not None and now_s >= renew_due_s:
            instructions.append(self._ask_renew(holder, now_s))
        if holder.acks_owed and holder.acking is None and now_s >= holder.ack_retry_at_s:
            holder.acking = tuple(holder.acks_owed)[:MAX_LEASES_PER_CALL]
            body = AckRequest(holder_incarnation=key[1], lease_ids=holder.acking)
            instructions.append(SendAck(holder=holder.peer, body=body, timeout_s=1.0))
        self._set_deadline(key, holder.next_due_s())
        if holder.done_with:
            del self._holders[key]
        return instructions

    def _ask_renew(self, holder: _Holder, now_s: float) -> AskRenew:
        """Renews every lease of the holder, those due soonest first where not all fit in one call."""
        leases = sorted(holder.leases.values(), key=lambda lease: lease.renew_at_s)[:MAX_LEASES_PER_CALL]
        holder.renewing = tuple(lease.lease_id for lease in leases)
        holder.renew_asked_s = now_s
        ends_s = min(lease.expires_s for lease in leases)
        body = RenewRequest(holder_incarnation=holder.peer.incarnation, lease_ids=holder.renewing)
        return AskRenew(holder=holder.peer, body=body, timeout_s=max(0.05, min(1.0, ends_s - now_s)))
