"""The part of the reader's machine that renews leases and acknowledges their ends: calls batched by holder.

Pure like the machine it belongs to (`kvtransfer.reader.Reader`), which alone ends leases.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from contracts.errors import StaleIncarnation
from contracts.failpoints import RarePath
from contracts.ids import LeaseId
from contracts.messages import AckRequest, RenewRequest
from kvtransfer.reader_events import AskRenew, SendAck
from kvtransfer.reader_lease import ReaderLease
from kvtransfer.timers import retry_delay_s

if TYPE_CHECKING:
    from collections import Counter

    from contracts.errors import TandemError
    from contracts.messages import Peer, RenewReply
    from kvtransfer.reader_events import HolderKey
    from kvtransfer.timers import Deadlines

#: Lease ids in one Renew or Ack at most; the rest follow in the next.
MAX_LEASES_PER_CALL = 1024

#: How long one Renew or Ack may take at most.
LONGEST_CALL_S = 1.0

#: An offer is renewed after a quarter of its term (half of which it grants), a renewal after a third of its own:
#: with calls no longer than a quarter a lost one leaves time for more.
OFFER_RENEW_SHARE = 1 / 4
RENEW_SHARE = 1 / 3
CALL_SHARE = 1 / 4

_RENEWAL_FAILED = RarePath("kvtransfer.renewal_failed", "a renewal was not answered and is asked again")
_ACK_FAILED = RarePath("kvtransfer.ack_failed", "an acknowledgement was not answered and is sent again")


@dataclass(slots=True)
class _Holder:
    """Calls to one life of one holder."""

    peer: Peer
    #: Leases that are renewed: all of this holder that have not ended.
    leases: dict[LeaseId, ReaderLease] = field(default_factory=dict[LeaseId, ReaderLease])
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


class HolderCalls:
    """All lives of holders that have leases here or are owed an Ack."""

    def __init__(self, deadlines: Deadlines[LeaseId | HolderKey], failed_calls: Counter[str]) -> None:
        """Keeps the entries of `deadlines` that are holders' up to date, and those of leases it renews."""
        self._deadlines = deadlines
        self._failed_calls = failed_calls
        self._holders: dict[HolderKey, _Holder] = {}

    def __len__(self) -> int:
        return len(self._holders)

    def __contains__(self, key: HolderKey) -> bool:
        return key in self._holders

    def lives(self) -> list[HolderKey]:
        return list(self._holders)

    def leases_of(self, key: HolderKey) -> list[ReaderLease]:
        """The holder's leases that have not ended."""
        holder = self._holders.get(key)
        return [] if holder is None else list(holder.leases.values())

    def problems(self) -> list[str]:
        """What cannot be; empty without bugs."""
        return [f"holder {key} without business is kept" for key, each in self._holders.items() if each.done_with]

    def add(self, lease: ReaderLease) -> None:
        holder = self._holders.setdefault(lease.holder_key, _Holder(lease.terms.holder))
        holder.leases[lease.lease_id] = lease

    def leave(self, lease: ReaderLease, ack_until_s: float | None) -> None:
        """The lease has ended; its holder is told until then, or not at all."""
        holder = self._holders[lease.holder_key]
        del holder.leases[lease.lease_id]
        if ack_until_s is not None:
            holder.acks_owed[lease.lease_id] = ack_until_s

    def tell_nothing(self, key: HolderKey) -> None:
        """That life is over: it needs no acknowledgement."""
        self._holders[key].acks_owed.clear()

    def renewing(self, key: HolderKey) -> bool:
        holder = self._holders.get(key)
        return holder is not None and holder.renewing is not None

    def acking(self, key: HolderKey) -> bool:
        holder = self._holders.get(key)
        return holder is not None and holder.acking is not None

    def renewed(self, key: HolderKey, reply: RenewReply, now_s: float) -> list[ReaderLease]:
        """Grants what the reply grants, counted from the asking; returns the leases that the holder let go."""
        holder = self._holders[key]
        asked, holder.renewing, holder.renew_failures = holder.renewing or (), None, 0
        holder.renew_retry_at_s = now_s
        alive = frozenset(reply.alive)
        lost: list[ReaderLease] = []
        for lease in [holder.leases[each] for each in asked if each in holder.leases]:
            if lease.lease_id not in alive:
                lease.renew_at_s = math.inf
                lost.append(lease)
                continue
            lease.renew_at_s = holder.renew_asked_s + reply.ttl_s * RENEW_SHARE
            lease.expires_s = max(lease.expires_s, holder.renew_asked_s + reply.ttl_s)
            due_s = lease.next_due_s()
            if due_s is not None:
                self._deadlines.set(lease.lease_id, due_s)
        return lost

    def renew_failed(self, key: HolderKey, error: TandemError, now_s: float) -> None:
        _RENEWAL_FAILED.reached()
        self._failed_calls[f"renew: {error.code}"] += 1
        holder = self._holders[key]
        holder.renewing = None
        holder.renew_failures += 1
        holder.renew_retry_at_s = now_s + retry_delay_s(holder.renew_failures)

    def ack_ended(self, key: HolderKey, error: TandemError | None, now_s: float) -> None:
        holder = self._holders[key]
        sent, holder.acking = holder.acking or (), None
        if error is None or isinstance(error, StaleIncarnation):
            holder.ack_failures = 0
            holder.ack_retry_at_s = now_s
            for lease_id in sent:
                holder.acks_owed.pop(lease_id, None)
            return
        _ACK_FAILED.reached()
        self._failed_calls[f"ack: {error.code}"] += 1
        holder.ack_failures += 1
        holder.ack_retry_at_s = now_s + retry_delay_s(holder.ack_failures)
        for lease_id in [each for each, until_s in holder.acks_owed.items() if now_s >= until_s]:
            del holder.acks_owed[lease_id]

    def drive(self, key: HolderKey, now_s: float) -> list[AskRenew | SendAck]:
        """Starts the calls to one holder that are due, sets its next deadline, and forgets it when done."""
        holder = self._holders.get(key)
        if holder is None:
            return []
        calls: list[AskRenew | SendAck] = []
        renew_due_s = holder.renew_due_s()
        if renew_due_s is not None and now_s >= renew_due_s:
            calls.append(self._ask_renew(holder, now_s))
        if holder.acks_owed and holder.acking is None and now_s >= holder.ack_retry_at_s:
            holder.acking = tuple(holder.acks_owed)[:MAX_LEASES_PER_CALL]
            body = AckRequest(holder_incarnation=key[1], lease_ids=holder.acking)
            calls.append(SendAck(holder=holder.peer, body=body, timeout_s=LONGEST_CALL_S))
        due_s = holder.next_due_s()
        if due_s is None:
            self._deadlines.discard(key)
        else:
            self._deadlines.set(key, due_s)
        if holder.done_with:
            del self._holders[key]
        return calls

    def _ask_renew(self, holder: _Holder, now_s: float) -> AskRenew:
        """Renews every lease of the holder, those due soonest first where not all fit in one call.

        How long it may take follows from the longest term of them, not from what is left of the shortest: one
        lease near its end must not cut the call short for all the others.
        """
        leases = sorted(holder.leases.values(), key=lambda lease: lease.renew_at_s)[:MAX_LEASES_PER_CALL]
        holder.renewing = tuple(lease.lease_id for lease in leases)
        holder.renew_asked_s = now_s
        longest_s = max(lease.terms.ttl_s for lease in leases)
        body = RenewRequest(holder_incarnation=holder.peer.incarnation, lease_ids=holder.renewing)
        return AskRenew(holder=holder.peer, body=body, timeout_s=min(LONGEST_CALL_S, longest_s * CALL_SHARE))
