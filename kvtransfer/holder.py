"""The holder's side of the leased pull: a machine from events to instructions.

    OFFERED --progress*--> SEALED --ack--> ended RELEASED
    any --term over / reader lost--> ended EXPIRED      any --withdraw--> ended WITHDRAWN
    any --reader will not have it--> ended REFUSED

`Holder.handle` is the only thing that changes leases and their pins in the ledger. It performs no I/O and
reads no clock: `kvtransfer.holder_service` executes its instructions and feeds back what came of them.

Two-sided term: the holder counts `ttl_s` from when it grants (sends an offer, answers a renewal or a
confirmation), the reader from when it asked. So the reader's lease ends first, whatever the network does.

A reader without room (NoCapacity) is a reader that lives: the lease waits for it, renewed by the holder itself
and offered again, up to the lease's age. Any other silence costs one term.

Where blocks are prepared (checksums, staging) one preparation per lease runs at a time, and only prepared blocks
are announced. Those being prepared when their lease ends stay pinned until that is over.

A reader may have leading blocks of the lease already, more than are final: from the first answer on these count as
known, and are neither prepared nor announced.

A lease that ended is forgotten: late messages about it are answered as unknown, and counted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, assert_never

import msgspec

from contracts.errors import (
    DeadlineExceeded,
    InvariantBroken,
    NoCapacity,
    NotReady,
    StaleIncarnation,
    TandemError,
    WorkerUnavailable,
)
from contracts.failpoints import RarePath
from contracts.messages import (
    AckRequest,
    BlockRef,
    ConfirmReply,
    ConfirmRequest,
    Empty,
    ProgressReply,
    ProgressRequest,
    RenewReply,
    RenewRequest,
    Seal,
)
from kvtransfer.holder_events import (
    AckArrived,
    Advanced,
    Answer,
    ConfirmAsked,
    FarewellEnded,
    HolderEvent,
    HolderInstruction,
    HolderTick,
    LeaseEnded,
    LeaseOutcome,
    OfferAnswered,
    OfferFailed,
    Opened,
    PrepareBlocks,
    Prepared,
    ProgressAnswered,
    ProgressFailed,
    ReaderGone,
    Refuse,
    RenewAsked,
    Sealed,
    SendFarewell,
    SendOffer,
    SendProgress,
    Withdrawn,
)
from kvtransfer.holder_lease import Farewell, HolderCounters, HolderLease, LeaseState
from kvtransfer.timers import Deadlines, retry_delay_s

if TYPE_CHECKING:
    from contracts.ids import Incarnation, LeaseId
    from kvtransfer.ledger import Ledger

#: Blocks announced by one Progress at most; keeps the message about 64 KiB at most, checksums included.
MAX_BLOCKS_PER_PROGRESS = 4096

#: Bytes of one preparation at most, so that the first blocks are announced while the next are prepared.
MAX_PREPARED_BYTES = 64 << 20

#: Failures of an offer that a repeat may mend. Everything else ends the lease at once.
RETRIED_ERRORS: tuple[type[TandemError], ...] = (NoCapacity, NotReady, WorkerUnavailable, DeadlineExceeded)

_NO_ROOM = RarePath("kvtransfer.no_room", "a reader had no room for an offer, it is made again")
_OFFER_LOST = RarePath("kvtransfer.offer_lost", "an offer or its answer was lost, it is made again")
_HOLDER_TERM_OVER = RarePath("kvtransfer.holder_term_over", "a lease ran out at its holder")
_ACK_UNKNOWN = RarePath("kvtransfer.ack_unknown", "an acknowledgement came again, or after the lease's end")
_CONFIRM_REFUSED = RarePath("kvtransfer.confirm_refused", "a reader asked about a lease that was let go")
_OTHER_LIFE_ASKED = RarePath("kvtransfer.other_life_asked", "a question was meant for another life of the holder")
_READER_GAVE_UP = RarePath("kvtransfer.reader_gave_up", "a reader acknowledged a lease that it did not take")
_READER_LOST = RarePath("kvtransfer.reader_lost", "a lease ended because its reader's life is over")


class Holder:
    """All leases that one life of a worker grants."""

    def __init__(
        self, ledger: Ledger, incarnation: Incarnation, *, max_age_s: float = 600.0, prepares: bool = False
    ) -> None:
        """`prepares`: final blocks need work before they can be announced."""
        self._ledger = ledger
        self._incarnation = incarnation
        self._prepares = prepares
        #: A lease is renewed at most until this age, so that a reader that never finishes cannot hold blocks.
        self._max_age_s = max_age_s
        #: All and only leases that have not ended; each one's pins stand in the ledger.
        self._leases: dict[LeaseId, HolderLease] = {}
        #: Withdrawn leases whose reader has not been told yet.
        self._farewells: dict[LeaseId, Farewell] = {}
        #: Ended leases with a preparation under way: their pins stand until it is over.
        self._lingering: set[LeaseId] = set()
        #: One entry per lease and farewell, at or before its next due time.
        self._deadlines: Deadlines[LeaseId] = Deadlines()
        self.counters = HolderCounters()

    def __repr__(self) -> str:
        states = Counter(lease.state.value for lease in self._leases.values())
        counts = ", ".join(f"{states[state.value]} {state.value}" for state in LeaseState)
        return f"<Holder {self._incarnation} [{counts} | {len(self._farewells)} farewells]>"

    @property
    def num_leases(self) -> int:
        """Leases whose pins stand."""
        return len(self._leases) + len(self._lingering)

    @property
    def idle(self) -> bool:
        """No lease, no pins, and nobody left to tell."""
        return not self._leases and not self._farewells and not self._lingering

    def lease_ids(self) -> list[LeaseId]:
        return list(self._leases)

    def leases_by_state(self) -> dict[str, int]:
        states = Counter(lease.state.value for lease in self._leases.values())
        return {state.value: states[state.value] for state in LeaseState}

    def next_due_s(self) -> float | None:
        """When `handle` wants a HolderTick at the latest; None: not before the next event."""
        return self._deadlines.next_s()

    def check(self) -> None:
        """Audits what the attributes promise; raises InvariantBroken."""
        for lease_id, lease in self._leases.items():
            stands = all(self._ledger.generation(ref.block_id) == ref.generation for ref in lease.blocks)
            ended = lease_id in self._farewells or lease_id in self._lingering
            if not stands or not lease.ordered or ended:
                raise InvariantBroken(f"lease {lease_id}: {lease}; {self!r}, {self._ledger!r}")
        if set(self._ledger.pinned_leases()) != self._leases.keys() | self._lingering:
            raise InvariantBroken(f"pins stand for {self._ledger.pinned_leases()}; {self!r}, {self._ledger!r}")
        if len(self._deadlines) != len(self._leases) + len(self._farewells):
            raise InvariantBroken(f"{len(self._deadlines)} deadlines kept by {self!r}")

    def handle(self, event: HolderEvent, now_s: float) -> list[HolderInstruction]:
        """Applies one event. What is due by `now_s` happens before it, so no event revives an ended lease."""
        instructions = self._pass_time(now_s)
        match event:
            case Opened():
                instructions += self._open(event, now_s)
            case ConfirmAsked(body):
                instructions.append(self._confirm(body, now_s))
            case RenewAsked(body):
                instructions.append(self._renew(body, now_s))
            case AckArrived(body):
                instructions += self._ack(body)
            case ReaderGone():
                instructions += self._reader_gone(event)
            case FarewellEnded():
                instructions += self._farewell_ended(event, now_s)
            case Prepared():
                instructions += self._prepared(event, now_s)
            case HolderTick():
                pass
            case _:
                instructions += self._handle_lease_event(event, now_s)
        return instructions

    def _handle_lease_event(
        self,
        event: OfferAnswered | OfferFailed | Advanced | Sealed | ProgressAnswered | ProgressFailed | Withdrawn,
        now_s: float,
    ) -> list[HolderInstruction]:
        lease = self._leases.get(event.lease_id)
        if lease is None:
            return self._ignore(event, "unknown lease")
        match event:
            case OfferAnswered() | OfferFailed() if lease.accepted or not lease.calling:
                return self._ignore(event, "no offer under way")
            case ProgressAnswered() | ProgressFailed() if not lease.accepted or not lease.calling:
                return self._ignore(event, "no progress under way")
            case OfferAnswered(_, expected):
                return self._offer_answered(lease, expected, now_s)
            case OfferFailed(_, error):
                return self._offer_failed(lease, error, now_s)
            case Advanced(_, num_final_blocks):
                return self._advance(lease, num_final_blocks, None, now_s)
            case Sealed(_, num_final_blocks, seal):
                return self._advance(lease, num_final_blocks, seal, now_s)
            case ProgressAnswered(_, reply):
                return self._progress_answered(lease, reply, now_s)
            case ProgressFailed(_, error):
                return self._progress_failed(lease, error, now_s)
            case Withdrawn(_, reason):
                return self._withdraw(lease, reason, now_s)
            case _:
                assert_never(event)

    def _ignore(self, event: HolderEvent, why: str) -> list[HolderInstruction]:
        self.counters.ignored[f"{type(event).__name__}: {why}"] += 1
        return []

    # --- opening and growing ----------------------------------------------------------------------------

    def _open(self, event: Opened, now_s: float) -> list[HolderInstruction]:
        terms = event.terms
        known = terms.lease_id in self._leases or terms.lease_id in self._lingering
        if known or terms.num_blocks != len(event.blocks) or not event.blocks:
            raise InvariantBroken(f"lease {terms.lease_id} opened with {len(event.blocks)} blocks; {self!r}")
        if event.whole and (event.seal is None or len(event.blocks) > MAX_BLOCKS_PER_PROGRESS):
            raise InvariantBroken(f"no offer can carry all of lease {terms.lease_id}: {len(event.blocks)} blocks")
        self._ledger.pin(terms.lease_id, event.blocks)
        refs = tuple(BlockRef(block, self._ledger.generation(block)) for block in event.blocks)
        max_age_s = self._max_age_s if event.max_age_s is None else min(self._max_age_s, event.max_age_s)
        lease = HolderLease(
            terms=terms,
            reader=event.reader,
            blocks=refs,
            expires_s=now_s + terms.ttl_s,
            last_s=now_s + max(max_age_s, terms.ttl_s),
            whole=event.whole,
        )
        self._leases[terms.lease_id] = lease
        self.counters.opened += 1
        num_final = len(event.blocks) if event.seal is not None else event.num_final_blocks
        return self._advance(lease, num_final, event.seal, now_s)

    def _offer_answered(self, lease: HolderLease, expected: int, now_s: float) -> list[HolderInstruction]:
        lease.accepted = True
        lease.failures = 0
        lease.had = expected
        return self._known_up_to(lease, expected, len(lease.blocks), now_s)

    def _offer_failed(self, lease: HolderLease, error: TandemError, now_s: float) -> list[HolderInstruction]:
        self.counters.failed_calls[f"offer: {error.code}"] += 1
        if lease.confirmed:
            # The offer carried everything; only its answer was lost, or a repeat came too late.
            lease.accepted = True
            lease.calling = False
            return self._drive(lease, now_s)
        if not isinstance(error, RETRIED_ERRORS):
            return self._end(lease, LeaseOutcome.REFUSED, error.message)
        if isinstance(error, NoCapacity):
            # It lives, and nothing of the lease has begun there.
            _NO_ROOM.reached()
            lease.expires_s = max(lease.expires_s, min(now_s + lease.terms.ttl_s, lease.last_s))
        else:
            _OFFER_LOST.reached()
        self._call_failed(lease, error, now_s)
        return self._drive(lease, now_s)

    def _advance(self, lease: HolderLease, num_final: int, seal: Seal | None, now_s: float) -> list[HolderInstruction]:
        lease_id = lease.terms.lease_id
        if lease.seal is not None or not lease.num_final <= num_final <= len(lease.blocks):
            raise InvariantBroken(f"lease {lease_id} advances to block {num_final}: {lease}; {self!r}")
        if seal is not None and num_final == 0:
            raise InvariantBroken(f"lease {lease_id} sealed without a block: {lease}; {self!r}")
        lease.num_final = num_final
        lease.seal = seal
        if not self._prepares:
            lease.num_ready = num_final
        return self._drive(lease, now_s)

    def _prepared(self, event: Prepared, now_s: float) -> list[HolderInstruction]:
        result = event.result
        self.counters.checksum_bytes += result.num_bytes
        self.counters.checksum_s += result.checksum_s
        lease_id = event.lease_id
        if lease_id in self._lingering:
            self._lingering.discard(lease_id)
            self._ledger.unpin(lease_id)
            return []
        lease = self._leases.get(lease_id)
        if lease is None:
            return self._ignore(event, "unknown lease")
        if lease.preparing is None:
            return self._ignore(event, "nothing prepared")
        stop, lease.preparing = lease.preparing, None
        if result.error is not None:
            return self._withdraw(lease, f"its blocks could not be prepared: {result.error.message}", now_s)
        if lease.terms.checksums and len(result.checksums) != stop - lease.num_ready:
            raise InvariantBroken(f"{len(result.checksums)} checksums up to block {stop}: {lease}; {self!r}")
        lease.num_ready = stop
        lease.checksums += result.checksums
        return self._drive(lease, now_s)

    def _progress_answered(self, lease: HolderLease, reply: ProgressReply, now_s: float) -> list[HolderInstruction]:
        if not reply.known:
            return self._lose(lease, "the reader does not hold it any more")
        advanced = reply.expected > lease.expected or (lease.sent_seal and reply.expected >= lease.num_final)
        if advanced:
            lease.failures = 0
        else:
            lease.failures += 1
            lease.retry_at_s = now_s + retry_delay_s(lease.failures)
        return self._known_up_to(lease, reply.expected, max(lease.had, lease.num_ready), now_s)

    def _known_up_to(self, lease: HolderLease, expected: int, most: int, now_s: float) -> list[HolderInstruction]:
        """The call in flight was answered: the reader knows the blocks before `expected`, which can be `most`."""
        lease.calling = False
        if lease.confirmed:
            # The reader has everything; this answer was overtaken.
            return self._drive(lease, now_s)
        if not lease.num_skipped <= expected <= most:
            reason = f"the reader expects block {expected}, not one of [{lease.num_skipped}, {most}]"
            return self._end(lease, LeaseOutcome.REFUSED, reason)
        lease.seal_known = lease.sent_seal and expected >= lease.num_final
        lease.expected = expected
        return self._drive(lease, now_s)

    def _progress_failed(self, lease: HolderLease, error: TandemError, now_s: float) -> list[HolderInstruction]:
        self.counters.failed_calls[f"progress: {error.code}"] += 1
        self._call_failed(lease, error, now_s)
        return self._drive(lease, now_s)

    def _call_failed(self, lease: HolderLease, error: TandemError, now_s: float) -> None:
        lease.calling = False
        lease.failures += 1
        delay_s = max(retry_delay_s(lease.failures), error.retry_after_s or 0.0)
        lease.retry_at_s = now_s + delay_s
        lease.last_error = error.message

    # --- questions of the reader ------------------------------------------------------------------------

    def _other_life(self, incarnation: Incarnation) -> Refuse | None:
        if incarnation == self._incarnation:
            return None
        _OTHER_LIFE_ASKED.reached()
        return Refuse(StaleIncarnation(f"this is life {self._incarnation} of the holder, not {incarnation}"))

    def _confirm(self, body: ConfirmRequest, now_s: float) -> Answer | Refuse:
        if refusal := self._other_life(body.holder_incarnation):
            return refusal
        lease = self._leases.get(body.lease_id)
        if lease is None:
            _CONFIRM_REFUSED.reached()
            return Answer(ConfirmReply(stands=False, reason="the holder let the lease go"))
        if lease.seal is None:
            return Answer(ConfirmReply(stands=False, reason="the lease is not sealed"))
        for ref in lease.blocks[: lease.num_final]:
            if self._ledger.generation(ref.block_id) != ref.generation:
                raise InvariantBroken(f"pinned {ref} of lease {body.lease_id} was freed; {self._ledger!r}")
        # Who asks has all blocks and the seal, whatever became of the answers to our announcements.
        lease.confirmed = True
        lease.expected = max(lease.expected, lease.num_final)
        lease.seal_known = True
        self._grant(lease, now_s)
        return Answer(ConfirmReply(stands=True))

    def _renew(self, body: RenewRequest, now_s: float) -> Answer | Refuse:
        if refusal := self._other_life(body.holder_incarnation):
            return refusal
        alive: list[LeaseId] = []
        ttl_s = self._common_ttl_s(body.lease_ids)
        for lease_id in body.lease_ids:
            lease = self._leases.get(lease_id)
            if lease is not None and now_s + ttl_s <= lease.last_s:
                self._grant(lease, now_s)
                alive.append(lease_id)
        return Answer(RenewReply(alive=tuple(alive), ttl_s=ttl_s))

    def _common_ttl_s(self, lease_ids: tuple[LeaseId, ...]) -> float:
        """The shortest term among the leases that stand: the reply carries one for all."""
        terms = [self._leases[lease_id].terms.ttl_s for lease_id in lease_ids if lease_id in self._leases]
        return min(terms, default=0.0)

    def _grant(self, lease: HolderLease, now_s: float) -> None:
        lease.expires_s = max(lease.expires_s, now_s + lease.terms.ttl_s)
        self._deadlines.set(lease.terms.lease_id, lease.next_due_s())

    def _ack(self, body: AckRequest) -> list[HolderInstruction]:
        if refusal := self._other_life(body.holder_incarnation):
            return [refusal]
        instructions: list[HolderInstruction] = []
        for lease_id in body.lease_ids:
            lease = self._leases.get(lease_id)
            if lease is None:
                _ACK_UNKNOWN.reached()
                self.counters.ignored["AckArrived: unknown lease"] += 1
            elif lease.confirmed:
                instructions += self._end(lease, LeaseOutcome.RELEASED, "acknowledged")
            else:
                _READER_GAVE_UP.reached()
                instructions += self._end(lease, LeaseOutcome.REFUSED, "the reader let the lease go")
        return [*instructions, Answer(Empty())]

    # --- ends -------------------------------------------------------------------------------------------

    def _pass_time(self, now_s: float) -> list[HolderInstruction]:
        instructions: list[HolderInstruction] = []
        for lease_id in self._deadlines.pop_due(now_s):
            lease = self._leases.get(lease_id)
            if lease is None:
                instructions += self._drive_farewell(lease_id, now_s)
            elif now_s >= lease.expires_s:
                instructions += self._expire(lease)
            else:
                instructions += self._drive(lease, now_s)
        return instructions

    def _expire(self, lease: HolderLease) -> list[HolderInstruction]:
        _HOLDER_TERM_OVER.reached()
        if not lease.accepted:
            return self._lose(lease, f"not taken in time: {lease.last_error}")
        return self._lose(lease, "the reader did not renew it")

    def _lose(self, lease: HolderLease, reason: str) -> list[HolderInstruction]:
        """Ends a lease whose reader fell silent. Once it confirmed, that is its own affair."""
        if lease.confirmed:
            return self._end(lease, LeaseOutcome.RELEASED, f"confirmed, not acknowledged: {reason}")
        return self._end(lease, LeaseOutcome.EXPIRED, reason)

    def _reader_gone(self, event: ReaderGone) -> list[HolderInstruction]:
        instructions: list[HolderInstruction] = []
        for lease in list(self._leases.values()):
            if (lease.reader.worker_id, lease.reader.incarnation) == (event.worker_id, event.incarnation):
                _READER_LOST.reached()
                instructions += self._lose(lease, f"life {event.incarnation} of {event.worker_id} is over")
        return instructions

    def _withdraw(self, lease: HolderLease, reason: str, now_s: float) -> list[HolderInstruction]:
        lease_id = lease.terms.lease_id
        ended = self._end(lease, LeaseOutcome.WITHDRAWN, reason)
        body = ProgressRequest(lease_id=lease_id, holder_incarnation=self._incarnation, withdrawn=reason)
        farewell = Farewell(reader=lease.reader, body=body, until_s=lease.expires_s)
        self._farewells[lease_id] = farewell
        return [*ended, *self._drive_farewell(lease_id, now_s)]

    def _farewell_ended(self, event: FarewellEnded, now_s: float) -> list[HolderInstruction]:
        farewell = self._farewells.get(event.lease_id)
        if farewell is None:
            return self._ignore(event, "unknown lease")
        if event.error is None:
            self._forget_farewell(event.lease_id)
            return []
        self.counters.failed_calls[f"farewell: {event.error.code}"] += 1
        farewell.calling = False
        farewell.failures += 1
        farewell.retry_at_s = now_s + retry_delay_s(farewell.failures)
        return self._drive_farewell(event.lease_id, now_s)

    def _forget_farewell(self, lease_id: LeaseId) -> None:
        del self._farewells[lease_id]
        self._deadlines.discard(lease_id)

    def _end(self, lease: HolderLease, outcome: LeaseOutcome, reason: str) -> list[HolderInstruction]:
        lease_id = lease.terms.lease_id
        if lease.preparing is None:
            self._ledger.unpin(lease_id)
        else:
            self._lingering.add(lease_id)
        del self._leases[lease_id]
        self._deadlines.discard(lease_id)
        self.counters.outcomes[outcome] += 1
        return [LeaseEnded(lease_id=lease_id, outcome=outcome, reason=reason)]

    # --- what to send -----------------------------------------------------------------------------------

    def _drive(self, lease: HolderLease, now_s: float) -> list[HolderInstruction]:
        """Looks at the whole lease, starts what is due of work and calls, and sets the next deadline."""
        instructions: list[HolderInstruction] = []
        if lease.preparing is None and not lease.confirmed:
            lease.skip()
            if lease.num_ready < lease.num_final:
                instructions.append(self._prepare(lease))
        if lease.has_news and not lease.calling and now_s >= lease.retry_at_s:
            lease.calling = True
            instructions.append(self._progress(lease) if lease.accepted else self._offer(lease, now_s))
        self._deadlines.set(lease.terms.lease_id, lease.next_due_s())
        return instructions

    def _prepare(self, lease: HolderLease) -> PrepareBlocks:
        most = max(1, MAX_PREPARED_BYTES // lease.terms.identity.layout.block_bytes)
        stop = min(lease.num_final, lease.num_ready + most)
        lease.preparing = stop
        blocks = tuple(ref.block_id for ref in lease.blocks[lease.num_ready : stop])
        return PrepareBlocks(lease_id=lease.terms.lease_id, blocks=blocks)

    def _offer(self, lease: HolderLease, now_s: float) -> SendOffer:
        """Offers what is left of the term: a late offer must not outlive the holder's side.

        Half of it may pass on the way; the reader counts on the other half (see `Reader`).
        """
        remaining_s = lease.expires_s - now_s
        news = self._news(lease)
        known = news if news.blocks else None
        lease.sent_seal = lease.sent_seal and known is not None
        terms = msgspec.structs.replace(lease.terms, ttl_s=remaining_s, progress=known)
        return SendOffer(terms=terms, timeout_s=min(lease.terms.ttl_s / 4, remaining_s / 2))

    def _progress(self, lease: HolderLease) -> SendProgress:
        return SendProgress(reader=lease.reader, body=self._news(lease), timeout_s=lease.terms.ttl_s / 4)

    def _news(self, lease: HolderLease) -> ProgressRequest:
        """What may be announced and the reader does not know; notes whether the seal is part of it."""
        stop = min(lease.num_ready, lease.expected + MAX_BLOCKS_PER_PROGRESS)
        # A lease may be sealed before the end of what its reader has.
        start = min(lease.expected, stop)
        lease.sent_seal = lease.seal is not None and stop == lease.num_final
        return ProgressRequest(
            lease_id=lease.terms.lease_id,
            holder_incarnation=self._incarnation,
            start=start,
            blocks=lease.blocks[start:stop],
            checksums=tuple(lease.checksums[start:stop]),
            seal=lease.seal if lease.sent_seal else None,
        )

    def _drive_farewell(self, lease_id: LeaseId, now_s: float) -> list[HolderInstruction]:
        farewell = self._farewells[lease_id]
        if now_s >= farewell.until_s:
            # The reader's own term is over by now.
            self._forget_farewell(lease_id)
            return []
        instructions: list[HolderInstruction] = []
        if not farewell.calling and now_s >= farewell.retry_at_s:
            farewell.calling = True
            timeout_s = min(1.0, farewell.until_s - now_s)
            instructions.append(SendFarewell(reader=farewell.reader, body=farewell.body, timeout_s=timeout_s))
        due_s = farewell.until_s if farewell.calling else min(farewell.until_s, farewell.retry_at_s)
        self._deadlines.set(lease_id, due_s)
        return instructions
