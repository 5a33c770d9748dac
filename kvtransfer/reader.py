"""The reader's side of the leased pull: a machine from events to instructions.

    WAITING ─▶ RESERVED ─▶ PULLING ─▶ CONFIRMING ─▶ ended ADOPTED
    any ──fault / cancel / term over──▶ ended ABORTED, by way of QUARANTINED while a pull is in flight

Where blocks need work after their pull (checksums, staging), that belongs to the pull: PULLING lasts until it is
over, and so does the quarantine. A block whose checksum is wrong is pulled again.

A WAITING offer holds no blocks: it is renewed, and reserves in the order of arrival. RESERVED and PULLING
pull what the holder announces while it still computes. CONFIRMING has every byte and asks whether the lease
stood after the last of them; the yes that ends it confirms and adopts in one.

Leading blocks that stand here already (`Offered.have`) are neither set aside nor pulled, and what is announced of them
is skipped. Where that is all, the seal is waited for and the lease confirmed like any other.

`Reader.handle` is the only thing that changes leases and their reservations in the ledger. It performs no I/O
and reads no clock: `kvtransfer.reader_service` executes its instructions and feeds back what came of them.

Two-sided term: an offer grants half of what it names (the other half may have passed on its way, see
`Holder`); a renewal grants its term from when this side asked. So this side ends first.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, assert_never

import msgspec

from contracts.errors import (
    BadRequest,
    Cancelled,
    CorruptKv,
    InvariantBroken,
    NoCapacity,
    StaleIncarnation,
    TandemError,
    TransferAborted,
)
from contracts.failpoints import RarePath
from contracts.messages import (
    ConfirmReply,
    ConfirmRequest,
    HandoffReply,
    LeaseTerms,
    Peer,
    ProgressReply,
    ProgressRequest,
)
from kvtransfer.pairing import Pairing
from kvtransfer.reader_calls import OFFER_RENEW_SHARE, HolderCalls
from kvtransfer.reader_events import (
    AbortReason,
    AckEnded,
    AskConfirm,
    BlocksFreed,
    CancelRequested,
    CaughtUp,
    ConfirmAnswered,
    ConfirmFailed,
    HolderGone,
    HolderKey,
    LandBlocks,
    Landed,
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
    StartPull,
    StopPull,
    Verdict,
)
from kvtransfer.reader_lease import ReaderCounters, ReaderLease, ReaderState
from kvtransfer.timers import Deadlines, retry_delay_s

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from contracts.ids import Incarnation, LeaseId, WorkerId
    from contracts.layout import KvIdentity
    from kvtransfer.block_work import Landing
    from kvtransfer.ledger import Ledger
    from kvtransfer.transport import PullResult

#: Bytes of one pull at most, so that leases share the wire in turns.
MAX_PULL_BYTES = 64 << 20

#: Ended leases remembered, so that a repeated offer does not revive one.
MAX_ENDED_LEASES = 4096

#: How long one Confirm may take before it is asked again.
CONFIRM_TIMEOUT_S = 1.0

#: How often a block with a wrong checksum is pulled again before its lease is given up.
MAX_REFETCHES = 2

_OFFER_WAITS = RarePath("kvtransfer.offer_waits", "a new offer has to wait for blocks at its reader")
_OFFER_REPEATED = RarePath("kvtransfer.offer_repeated", "an offer came again because its answer was lost")
_NEWER_LIFE = RarePath("kvtransfer.newer_life", "the first offer of a new life ends what older ones offered")
_PULL_UNSEALED = RarePath("kvtransfer.pull_unsealed", "blocks are pulled while their prompt is still being read")
_PULL_FAILED = RarePath("kvtransfer.pull_failed", "a lease ended because its pull failed")
_QUARANTINED = RarePath("kvtransfer.quarantined", "a lease was aborted while bytes may still land in its blocks")
_LANDED_LATE = RarePath("kvtransfer.landed_late", "a pull ended after its lease was aborted, its blocks are free")
_NOT_CONFIRMED = RarePath("kvtransfer.not_confirmed", "the holder said that a lease does not stand any more")
_CONFIRM_AGAIN = RarePath("kvtransfer.confirm_again", "a confirmation was not answered and is asked again")
_READER_TERM_OVER = RarePath("kvtransfer.reader_term_over", "a lease ran out at its reader")
_WITHDRAWN = RarePath("kvtransfer.withdrawn", "a lease was taken back while its reader held it")
_WITHDRAWN_EARLY = RarePath("kvtransfer.withdrawn_early", "a withdrawal overtook its offer, or found its lease ended")


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
        lands: bool = False,
        checksum: bool = False,
    ) -> None:
        """`may_reserve` says whether offers may take blocks now; while it says no they wait. `lands`: pulled
        blocks need work before they can be used. `checksum`: only offers that carry checksums are taken."""
        self._may_reserve = may_reserve
        self._lands = lands
        self._ledger = ledger
        self._pairing = Pairing(identity, tuple(transports), checksum=checksum)
        self._max_waiting = max_waiting
        self._max_pull_blocks = max(1, max_pull_bytes // identity.layout.block_bytes)
        #: All leases that have not ended, and aborted ones whose pull is in flight (QUARANTINED). Each one
        #: that is not WAITING has its blocks reserved or quarantined in the ledger.
        self._leases: dict[LeaseId, ReaderLease] = {}
        #: All and only WAITING leases, in the order of arrival.
        self._waiting: dict[LeaseId, ReaderLease] = {}
        #: The newest life of each worker that offered something.
        self._newest: dict[WorkerId, Incarnation] = {}
        #: How recent leases ended; oldest first.
        self._ended: dict[LeaseId, str] = {}
        #: One entry per lease that has a next due time, one per holder that has; at or before it.
        self._deadlines: Deadlines[LeaseId | HolderKey] = Deadlines()
        self.counters = ReaderCounters()
        self._calls = HolderCalls(self._deadlines, self.counters.failed_calls)

    def __repr__(self) -> str:
        counts = ", ".join(f"{count} {name}" for name, count in self.leases_by_state().items())
        return f"<Reader [{counts} | {len(self._calls)} holders]>"

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def idle(self) -> bool:
        """No lease, no quarantine, and nobody left to tell."""
        return not self._leases and not self._calls

    def lease_ids(self) -> list[LeaseId]:
        """Leases that have not ended."""
        return [each for each, lease in self._leases.items() if lease.state is not ReaderState.QUARANTINED]

    def is_sealed(self, lease_id: LeaseId) -> bool:
        """Whether the holder has said that nothing is added to it; False where it is not here."""
        lease = self._leases.get(lease_id)
        return lease is not None and lease.seal is not None

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
        live = sorted(self.lease_ids())
        if sorted(lease.lease_id for key in self._calls.lives() for lease in self._calls.leases_of(key)) != live:
            raise InvariantBroken(f"live leases are {live}, not what the holders' lists say; {self!r}")
        if problems := self._calls.problems():
            raise InvariantBroken(f"{'; '.join(problems)}; {self!r}")

    def _check_lease(self, lease: ReaderLease) -> None:
        reserved = [] if lease.state is ReaderState.WAITING else self._ledger.reserved_blocks(lease.lease_id)
        quarantined = lease.state is ReaderState.QUARANTINED
        windowed = lease.pull_in_flight == bool(lease.window) and (lease.pull_in_flight or not lease.landing)
        if reserved != lease.blocks or not lease.ordered or not windowed or (quarantined and not lease.window):
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
        self, event: PullEnded | Landed | ConfirmAnswered | ConfirmFailed | CancelRequested, now_s: float
    ) -> list[ReaderInstruction]:
        lease = self._leases.get(event.lease_id)
        if lease is None:
            return self._ignore(event, "unknown lease")
        match event:
            case PullEnded() if not lease.pull_in_flight or lease.landing:
                return self._ignore(event, "no pull in flight")
            case Landed() if not lease.landing:
                return self._ignore(event, "nothing landing")
            case ConfirmAnswered() | ConfirmFailed() if not lease.calling:
                return self._ignore(event, "no confirmation asked")
            case PullEnded(_, result):
                return self._pull_ended(lease, result, now_s)
            case Landed(_, result):
                return self._landed(lease, result, now_s)
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
            _OFFER_REPEATED.reached()
            return self._offered_again(known, terms, now_s)
        instructions = self._fence(terms.holder, now_s)
        lease = ReaderLease(
            terms=msgspec.structs.replace(terms, progress=None),
            owner=event.owner,
            state=ReaderState.WAITING,
            expires_s=now_s + terms.ttl_s / 2,
            renew_at_s=now_s + terms.ttl_s * OFFER_RENEW_SHARE,
            have=event.have,
            follows=event.follows,
        )
        if event.waits:
            instructions += self._reserve_waiting(now_s)
        refusal = self._refusal(lease) or self._unfit(lease, terms.progress) or self._place(lease, event.waits)
        if refusal is not None:
            self.counters.refused[refusal.code] += 1
            return [*instructions, RefuseOffer(refusal)]
        self.counters.offered += 1
        if terms.progress is not None:
            lease.announce(terms.progress)
        self._leases[terms.lease_id] = lease
        self._calls.add(lease)
        if lease.state is ReaderState.WAITING:
            _OFFER_WAITS.reached()
        instructions += self._drive(lease, now_s)
        return [*instructions, self._verdict(lease), *self._calls.drive(lease.holder_key, now_s)]

    def _offered_again(self, lease: ReaderLease, terms: LeaseTerms, now_s: float) -> list[ReaderInstruction]:
        """The answer to the first was lost; what became final since may have come with the repeat."""
        if (refusal := self._unfit(lease, terms.progress)) is not None:
            return [RefuseOffer(refusal)]
        if terms.progress is not None:
            lease.announce(terms.progress)
        return [self._verdict(lease), *self._drive(lease, now_s)]

    def _unfit(self, lease: ReaderLease, body: ProgressRequest | None) -> BadRequest | None:
        """Why what an offer announces cannot be so."""
        if body is None:
            return None
        own = (lease.lease_id, lease.terms.holder.incarnation)
        if (body.lease_id, body.holder_incarnation) != own or body.withdrawn is not None:
            return BadRequest(f"offer of lease {lease.lease_id}: what it announces is not this lease's")
        problem = lease.misfit(body)
        return None if problem is None else BadRequest(f"offer of lease {lease.lease_id}: {problem}")

    def _verdict(self, lease: ReaderLease) -> Verdict:
        waiting = lease.state is ReaderState.WAITING
        return Verdict(HandoffReply(verdict="waiting" if waiting else "reserved", expected=lease.expected))

    def _refusal(self, lease: ReaderLease) -> TandemError | None:
        """Why this offer is not for this reader."""
        terms, lease_id = lease.terms, lease.lease_id
        if lease_id in self._leases or lease_id in self._ended:
            how = self._ended.get(lease_id, "in quarantine")
            return TransferAborted(f"lease {lease_id} has ended here: {how}")
        newest = self._newest[terms.holder.worker_id]
        if terms.holder.incarnation < newest:
            return StaleIncarnation(
                f"lease {lease_id} is of life {terms.holder.incarnation} of {terms.holder.worker_id}; "
                f"life {newest} has been heard of"
            )
        return self._pairing.refusal(terms, self._ledger.num_blocks, have=lease.have)

    def _place(self, lease: ReaderLease, waits: bool) -> NoCapacity | None:
        """Gives it blocks, or where it waits a place in the queue; why neither."""
        at_once = not waits or (not self._waiting and self._may_reserve())
        if at_once and self._reserve(lease):
            return None
        if waits and len(self._waiting) < self._max_waiting:
            self._waiting[lease.lease_id] = lease
            return None
        return NoCapacity(
            f"{lease.num_wanted} blocks wanted, {self._ledger.available_blocks} available, and "
            f"{len(self._waiting)} offers wait already"
        )

    def _fence(self, holder: Peer, now_s: float) -> list[ReaderInstruction]:
        """Ends what older lives of this worker offered: their memory is gone."""
        newest = self._newest.setdefault(holder.worker_id, holder.incarnation)
        if holder.incarnation <= newest:
            return []
        _NEWER_LIFE.reached()
        self._newest[holder.worker_id] = holder.incarnation
        instructions: list[ReaderInstruction] = []
        for worker_id, incarnation in self._calls.lives():
            if worker_id == holder.worker_id and incarnation < holder.incarnation:
                instructions += self._lose_holder((worker_id, incarnation), now_s)
        return instructions

    def _reserve_waiting(self, now_s: float) -> list[ReaderInstruction]:
        """Gives blocks to waiting offers in the order of arrival; a large one is not overtaken."""
        instructions: list[ReaderInstruction] = []
        while self._waiting and self._may_reserve():
            lease = next(iter(self._waiting.values()))
            if not self._reserve(lease):
                break
            del self._waiting[lease.lease_id]
            instructions += self._drive(lease, now_s)
        return instructions

    def _reserve(self, lease: ReaderLease) -> bool:
        """Gives its blocks to a lease; False, and nothing changes, where there are not enough."""
        blocks = self._ledger.reserve(lease.lease_id, lease.num_wanted)
        if blocks is None:
            return False
        lease.state = ReaderState.RESERVED
        lease.blocks = blocks
        return True

    # --- the holder's announcements ---------------------------------------------------------------------

    def _progress(self, body: ProgressRequest, now_s: float) -> list[ReaderInstruction]:
        lease = self._leases.get(body.lease_id)
        if lease is None or lease.state is ReaderState.QUARANTINED:
            if body.withdrawn is not None:
                # The offer itself may still be on its way.
                _WITHDRAWN_EARLY.reached()
                self._remember_end(body.lease_id, f"withdrawn: {body.withdrawn}")
            return [ReplyProgress(ProgressReply(known=False))]
        if body.holder_incarnation != lease.terms.holder.incarnation:
            ours = lease.terms.holder.incarnation
            text = f"lease {body.lease_id} is of life {ours} of its holder, not {body.holder_incarnation}"
            return [RefuseProgress(StaleIncarnation(text))]
        if body.withdrawn is not None:
            # Whoever withdraws also answers for the request: nobody is to be told twice.
            _WITHDRAWN.reached()
            error = Cancelled(f"lease {body.lease_id} was withdrawn: {body.withdrawn}")
            aborted = self._abort(lease, AbortReason.WITHDRAWN, error, now_s)
            return [*aborted, ReplyProgress(ProgressReply(known=True))]
        if (problem := lease.misfit(body)) is not None:
            return [RefuseProgress(BadRequest(f"progress of lease {body.lease_id}: {problem}"))]
        lease.announce(body)
        reply = ReplyProgress(ProgressReply(known=True, expected=lease.expected))
        return [reply, *self._drive(lease, now_s)]

    # --- pulls and the confirmation ---------------------------------------------------------------------

    def _pull_ended(self, lease: ReaderLease, result: PullResult, now_s: float) -> list[ReaderInstruction]:
        self.counters.pulls += 1
        self.counters.pulled_bytes += result.num_bytes
        self.counters.wire_s += result.wire_s
        if lease.state is ReaderState.QUARANTINED:
            return self._settle(lease)
        if result.error is not None:
            _PULL_FAILED.reached()
            error = TransferAborted(f"pull of lease {lease.lease_id} failed: {result.error.message}")
            return self._give_up(lease, AbortReason.PULL_FAILED, error, now_s)
        if self._lands:
            lease.landing = True
            return [self._land(lease)]
        return self._window_done(lease, now_s)

    def _landed(self, lease: ReaderLease, result: Landing, now_s: float) -> list[ReaderInstruction]:
        self.counters.checksum_bytes += result.num_bytes
        self.counters.checksum_s += result.checksum_s
        self.counters.corrupt_blocks += len(result.corrupt)
        lease.landing = False
        if lease.state is ReaderState.QUARANTINED:
            return self._settle(lease)
        if result.error is not None:
            error = TransferAborted(f"blocks of lease {lease.lease_id} did not land: {result.error.message}")
            return self._give_up(lease, AbortReason.PULL_FAILED, error, now_s)
        if not result.corrupt:
            return self._window_done(lease, now_s)
        corrupt = tuple(lease.window[each] for each in result.corrupt)
        if lease.refetches == MAX_REFETCHES:
            return self._give_up(lease, AbortReason.CORRUPT, self._corrupt(lease, corrupt), now_s)
        lease.refetches += 1
        lease.window = corrupt
        self.counters.refetched_blocks += len(corrupt)
        return [self._start_pull(lease)]

    def _corrupt(self, lease: ReaderLease, positions: tuple[int, ...]) -> CorruptKv:
        ways = " or ".join(self._pairing.common_transports(lease.terms))
        first = lease.announced[positions[0]]
        position = lease.have + positions[0]
        return CorruptKv(
            f"lease {lease.lease_id}: block {position} of {lease.terms.num_blocks} ({first.block_id} of "
            f"{lease.terms.holder.worker_id}, {lease.blocks[positions[0]]} here) did not have its checksum in "
            f"{MAX_REFETCHES + 1} pulls over {ways}; {len(positions)} such blocks"
        )

    def _settle(self, lease: ReaderLease) -> list[ReaderInstruction]:
        _LANDED_LATE.reached()
        self._ledger.settle(lease.lease_id)
        del self._leases[lease.lease_id]
        return []

    def _give_up(
        self, lease: ReaderLease, reason: AbortReason, error: TandemError, now_s: float
    ) -> list[ReaderInstruction]:
        """Aborts at a moment when nothing lands any more."""
        self._ledger.end_pull(lease.lease_id)
        return self._abort(lease, reason, error, now_s)

    def _window_done(self, lease: ReaderLease, now_s: float) -> list[ReaderInstruction]:
        self._ledger.end_pull(lease.lease_id)
        lease.landed()
        return self._drive(lease, now_s)

    def _confirm_answered(self, lease: ReaderLease, reply: ConfirmReply, now_s: float) -> list[ReaderInstruction]:
        if not reply.stands:
            _NOT_CONFIRMED.reached()
            error = TransferAborted(f"lease {lease.lease_id} does not stand: {reply.reason}")
            return self._abort(lease, AbortReason.NOT_CONFIRMED, error, now_s)
        seal = lease.seal
        assert seal is not None, f"unsealed lease confirmed: {lease}"
        blocks = self._ledger.adopt(lease.lease_id, lease.owner)
        # Sealed early: nothing came for the last ones.
        self._ledger.release(lease.owner, blocks[lease.num_pulled :])
        del blocks[lease.num_pulled :]
        self.counters.adopted += 1
        del self._leases[lease.lease_id]
        self._leave(lease, "adopted", acknowledge=True, now_s=now_s)
        adopted = LeaseAdopted(lease_id=lease.lease_id, owner=lease.owner, blocks=blocks, seal=seal)
        return [adopted, *self._calls.drive(lease.holder_key, now_s)]

    def _confirm_failed(self, lease: ReaderLease, error: TandemError, now_s: float) -> list[ReaderInstruction]:
        self.counters.failed_calls[f"confirm: {error.code}"] += 1
        if isinstance(error, StaleIncarnation):
            gone = TransferAborted(f"the holder of lease {lease.lease_id} restarted: {error.message}")
            return self._abort(lease, AbortReason.HOLDER_GONE, gone, now_s)
        _CONFIRM_AGAIN.reached()
        lease.calling = False
        lease.failures += 1
        lease.retry_at_s = now_s + retry_delay_s(lease.failures)
        return self._drive(lease, now_s)

    def _drive(self, lease: ReaderLease, now_s: float) -> list[ReaderInstruction]:
        """Looks at the whole lease, starts what is next, and sets the next deadline."""
        instructions: list[ReaderInstruction] = []
        if lease.state in (ReaderState.RESERVED, ReaderState.PULLING) and not lease.pull_in_flight:
            if lease.num_pulled < len(lease.announced):
                instructions.append(self._pull(lease))
            elif lease.complete:
                lease.state = ReaderState.CONFIRMING
            elif lease.follows and lease.seal is None and lease.told_caught_up < lease.expected:
                lease.told_caught_up = lease.expected
                instructions.append(CaughtUp(lease.lease_id, lease.expected))
        if lease.state is ReaderState.CONFIRMING and not lease.calling and now_s >= lease.retry_at_s:
            instructions.append(self._ask_confirm(lease, now_s))
        self._set_deadline(lease.lease_id, lease.next_due_s())
        return instructions

    def _pull(self, lease: ReaderLease) -> StartPull:
        start = lease.num_pulled
        stop = min(len(lease.announced), start + self._max_pull_blocks)
        if lease.seal is None:
            _PULL_UNSEALED.reached()
        self._ledger.begin_pull(lease.lease_id)
        lease.state = ReaderState.PULLING
        lease.num_pulling = stop
        lease.window = range(start, stop)
        return self._start_pull(lease)

    def _start_pull(self, lease: ReaderLease) -> StartPull:
        return StartPull(
            lease_id=lease.lease_id,
            holder=lease.terms.holder,
            endpoints=lease.terms.endpoints,
            pairs=lease.pairs(),
        )

    def _land(self, lease: ReaderLease) -> LandBlocks:
        return LandBlocks(
            lease_id=lease.lease_id,
            blocks=tuple(lease.targets()),
            checksums=tuple(lease.checksums[each] for each in lease.window) if lease.checksums else (),
        )

    def _ask_confirm(self, lease: ReaderLease, now_s: float) -> AskConfirm:
        lease.calling = True
        return AskConfirm(
            lease_id=lease.lease_id,
            holder=lease.terms.holder,
            body=ConfirmRequest(lease_id=lease.lease_id, holder_incarnation=lease.terms.holder.incarnation),
            timeout_s=min(CONFIRM_TIMEOUT_S, lease.expires_s - now_s),
        )

    # --- ends -------------------------------------------------------------------------------------------

    def _abort(
        self, lease: ReaderLease, reason: AbortReason, error: TandemError, now_s: float
    ) -> list[ReaderInstruction]:
        """Ends the lease without adoption. Blocks that a pull may still write go into quarantine."""
        lease_id = lease.lease_id
        instructions: list[ReaderInstruction] = []
        if lease.state is ReaderState.WAITING:
            del self._waiting[lease_id], self._leases[lease_id]
        elif self._ledger.abort(lease_id):
            del self._leases[lease_id]
        else:
            _QUARANTINED.reached()
            lease.state = ReaderState.QUARANTINED
            if not lease.landing:
                instructions.append(StopPull(lease_id))
        self.counters.aborted[reason] += 1
        holder_knows = reason in (AbortReason.WITHDRAWN, AbortReason.HOLDER_GONE)
        self._leave(lease, f"{reason}: {error.message}", acknowledge=not holder_knows, now_s=now_s)
        instructions.append(LeaseAborted(lease_id=lease_id, reason=reason, error=error))
        return [*instructions, *self._calls.drive(lease.holder_key, now_s)]

    def _leave(self, lease: ReaderLease, how: str, *, acknowledge: bool, now_s: float) -> None:
        """Takes an ended lease out of its holder's list, and the holder's Ack in."""
        self._calls.leave(lease, max(lease.expires_s, now_s) + lease.terms.ttl_s if acknowledge else None)
        self._deadlines.discard(lease.lease_id)
        self._remember_end(lease.lease_id, how)

    def _remember_end(self, lease_id: LeaseId, how: str) -> None:
        self._ended[lease_id] = how
        if len(self._ended) > MAX_ENDED_LEASES:
            del self._ended[next(iter(self._ended))]

    def _holder_gone(self, event: HolderGone, now_s: float) -> list[ReaderInstruction]:
        key = (event.worker_id, event.incarnation)
        if key not in self._calls:
            return self._ignore(event, "unknown holder")
        return self._lose_holder(key, now_s)

    def _lose_holder(self, key: HolderKey, now_s: float) -> list[ReaderInstruction]:
        instructions: list[ReaderInstruction] = []
        self._calls.tell_nothing(key)
        for lease in self._calls.leases_of(key):
            error = TransferAborted(f"life {key[1]} of {key[0]}, holder of lease {lease.lease_id}, is over")
            instructions += self._abort(lease, AbortReason.HOLDER_GONE, error, now_s)
        return [*instructions, *self._calls.drive(key, now_s)]

    def _pass_time(self, now_s: float) -> list[ReaderInstruction]:
        instructions: list[ReaderInstruction] = []
        for key in self._deadlines.pop_due(now_s):
            if isinstance(key, tuple):
                instructions += self._calls.drive(key, now_s)
            elif now_s >= self._leases[key].expires_s:
                _READER_TERM_OVER.reached()
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

    # --- answers to renewals and acknowledgements -------------------------------------------------------

    def _holder_event(self, event: RenewAnswered | RenewFailed | AckEnded, now_s: float) -> list[ReaderInstruction]:
        key = event.holder
        if key not in self._calls:
            return self._ignore(event, "unknown holder")
        match event:
            case AckEnded() if not self._calls.acking(key):
                return self._ignore(event, "nothing acknowledged")
            case RenewAnswered() | RenewFailed() if not self._calls.renewing(key):
                return self._ignore(event, "nothing renewed")
            case AckEnded(_, error):
                self._calls.ack_ended(key, error, now_s)
            case RenewAnswered(_, reply):
                instructions: list[ReaderInstruction] = []
                for lease in self._calls.renewed(key, reply, now_s):
                    error = TransferAborted(f"the holder let lease {lease.lease_id} go")
                    instructions += self._abort(lease, AbortReason.EXPIRED, error, now_s)
                return [*instructions, *self._calls.drive(key, now_s)]
            case RenewFailed(_, error):
                self._calls.renew_failed(key, error, now_s)
                if isinstance(error, StaleIncarnation):
                    return self._lose_holder(key, now_s)
            case _:
                assert_never(event)
        return [*self._calls.drive(key, now_s)]
