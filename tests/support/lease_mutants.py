"""Machines and ledgers with one bug each: what the model checker must find."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from contracts.messages import ConfirmReply
from kvtransfer.block_work import Landing
from kvtransfer.holder import Holder
from kvtransfer.holder_events import Answer
from kvtransfer.ledger import Ledger
from kvtransfer.reader import Reader
from kvtransfer.reader_calls import HolderCalls
from kvtransfer.reader_events import Landed
from kvtransfer.reader_lease import ReaderLease, ReaderState

if TYPE_CHECKING:
    from contracts.errors import TandemError
    from contracts.ids import BlockId, LeaseId
    from contracts.messages import ConfirmRequest, Peer, ProgressRequest, RenewReply
    from kvtransfer.holder_events import HolderInstruction, LeaseOutcome, Refuse
    from kvtransfer.holder_lease import HolderLease
    from kvtransfer.reader_events import HolderKey, Offered, ReaderEvent, ReaderInstruction


# --- readers --------------------------------------------------------------------------------------------


class AdoptsWithoutAsking(Reader):
    """Adopts once every byte is here."""

    def _drive(self, lease: ReaderLease, now_s: float) -> list[ReaderInstruction]:
        if lease.state is ReaderState.PULLING and lease.complete and not lease.pull_in_flight:
            return self._confirm_answered(lease, ConfirmReply(stands=True), now_s)
        return super()._drive(lease, now_s)


class AdoptsCorruptBlocks(Reader):
    """Does not look at what the checksums say."""

    def handle(self, event: ReaderEvent, now_s: float) -> list[ReaderInstruction]:
        if isinstance(event, Landed):
            event = Landed(event.lease_id, Landing(error=event.result.error))
        return super().handle(event, now_s)


class CountsTheWholeOffer(Reader):
    """Takes the whole term of an offer for granted, however long it travelled."""

    def _offer(self, event: Offered, now_s: float) -> list[ReaderInstruction]:
        instructions = super()._offer(event, now_s)
        lease = self._leases.get(event.terms.lease_id)
        if lease is not None and lease.expires_s == now_s + event.terms.ttl_s / 2:
            lease.expires_s = now_s + event.terms.ttl_s
            self._drive(lease, now_s)
        return instructions


class _CountsFromTheAnswer(HolderCalls):
    def renewed(self, key: HolderKey, reply: RenewReply, now_s: float) -> list[ReaderLease]:
        self._holders[key].renew_asked_s = now_s
        return super().renewed(key, reply, now_s)


class CountsFromTheAnswer(Reader):
    """Counts a renewed term from when it was answered, not from when it was asked for."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._calls = _CountsFromTheAnswer(self._deadlines, self.counters.failed_calls)


class TakesOldLives(Reader):
    """Forgets which life of a holder is the newest."""

    def _fence(self, holder: Peer, now_s: float) -> list[ReaderInstruction]:
        self._newest[holder.worker_id] = holder.incarnation
        return []


class TakesRepeatsForNews(Reader):
    """Appends whatever is announced."""

    def _progress(self, body: ProgressRequest, now_s: float) -> list[ReaderInstruction]:
        lease = self._leases.get(body.lease_id)
        if lease is not None and body.blocks and len(lease.announced) + len(body.blocks) <= lease.terms.num_blocks:
            lease.announced += body.blocks
            lease.num_final += len(body.blocks)
        return super()._progress(body, now_s)


class SkipsNothing(Reader):
    """Takes the first blocks that an offer announces for the first that it lacks."""

    def _offer(self, event: Offered, now_s: float) -> list[ReaderInstruction]:
        terms, body = event.terms, event.terms.progress
        if body is not None:
            lacking = body.blocks[: terms.num_blocks - event.have]
            body = msgspec.structs.replace(body, start=event.have, blocks=lacking)
            event = replace(event, terms=msgspec.structs.replace(terms, progress=body))
        return super()._offer(event, now_s)


class AdoptsWhatItNeverPulled(Reader):
    """Counts the blocks that it had as pulled ones."""

    def _drive(self, lease: ReaderLease, now_s: float) -> list[ReaderInstruction]:
        if lease.state is ReaderState.RESERVED:
            lease.num_pulled = lease.num_pulling = min(lease.have, len(lease.announced))
        return super()._drive(lease, now_s)


class AdoptsPastTheSeal(Reader):
    """Takes all that was set aside for pulled."""

    def _confirm_answered(self, lease: ReaderLease, reply: ConfirmReply, now_s: float) -> list[ReaderInstruction]:
        lease.num_pulled = lease.num_wanted
        return super()._confirm_answered(lease, reply, now_s)


# --- ledgers --------------------------------------------------------------------------------------------


class FreesWhilePulling(Ledger):
    """Gives an aborted lease's blocks away although its pull may still write them."""

    def abort(self, lease_id: LeaseId) -> bool:
        self._reservation(lease_id).pulling = False
        return super().abort(lease_id)


class ForgetsToUnpin(Ledger):
    """Keeps the pins of leases of more than one block."""

    def unpin(self, lease_id: LeaseId) -> None:
        blocks = self._pinned[lease_id]
        if len(blocks) == 1:
            super().unpin(lease_id)


class HandsOutReserved(Ledger):
    """Loses count: a reserved block is on the free list too."""

    def reserve(self, lease_id: LeaseId, num_blocks: int) -> list[BlockId] | None:
        blocks = super().reserve(lease_id, num_blocks)
        if blocks and not self._free:
            self._free.append(blocks[0])
        return blocks


# --- holders --------------------------------------------------------------------------------------------


class ConfirmsEverything(Holder):
    """Says yes to leases that have ended."""

    def _confirm(self, body: ConfirmRequest, now_s: float) -> Answer | Refuse:
        answer = super()._confirm(body, now_s)
        return Answer(ConfirmReply(stands=True)) if isinstance(answer, Answer) else answer


class UnpinsWhenSealed(Holder):
    """Lets the blocks go once they are announced."""

    def _drive(self, lease: HolderLease, now_s: float) -> list[HolderInstruction]:
        if lease.seal is not None and lease.seal_known and lease.terms.lease_id in self._ledger.pinned_leases():
            self._ledger.unpin(lease.terms.lease_id)
        return super()._drive(lease, now_s)


class AnswersForOtherLives(Holder):
    """Does not look at which life of it was asked."""

    def _other_life(self, incarnation: object) -> None:
        return None


class UnpinsWhilePreparing(Holder):
    """Lets blocks of an ended lease go though they are still being read for it."""

    def _end(self, lease: HolderLease, outcome: LeaseOutcome, reason: str) -> list[HolderInstruction]:
        lease.preparing = None
        return super()._end(lease, outcome, reason)


class EndsTwice(Holder):
    """Reports a withdrawn lease again when its reader is known to have failed."""

    def _offer_failed(self, lease: HolderLease, error: TandemError, now_s: float) -> list[HolderInstruction]:
        instructions = super()._offer_failed(lease, error, now_s)
        return [*instructions, *instructions]


class WaitsForever(Holder):
    """Never gives a silent reader up."""

    def next_due_s(self) -> float | None:
        return None
