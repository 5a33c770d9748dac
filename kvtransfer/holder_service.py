"""The holder's side of the leased pull, live: grants leases over this worker's blocks, answers their readers.

All decisions are `kvtransfer.holder.Holder`'s; here its instructions become calls, and calls become events.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

from contracts.errors import DeadlineExceeded, Internal, TandemError, WorkerUnavailable
from contracts.ids import LeaseId
from contracts.messages import (
    ACK,
    CONFIRM,
    PROGRESS,
    RENEW,
    AckRequest,
    ConfirmReply,
    ConfirmRequest,
    Empty,
    HandoffReply,
    LeaseTerms,
    RenewReply,
    RenewRequest,
)
from kvtransfer.holder import Holder
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
from kvtransfer.shell import MachineShell

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from contracts.clock import Clock
    from contracts.ids import BlockId, Incarnation, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import Peer, Seal
    from kvtransfer.holder import HolderCounters
    from kvtransfer.ledger import Ledger
    from kvtransfer.transport_set import TransportSet
    from rpc import CallContext, Network, Server

#: Puts the terms into a Handoff and calls the reader, within so many seconds.
SendOfferCall = Callable[[LeaseTerms, float], Awaitable[HandoffReply]]
EndedCallback = Callable[[LeaseId, LeaseOutcome, str], None]
ReplyBody = TypeVar("ReplyBody", ConfirmReply, RenewReply, Empty)

DEFAULT_TTL_S = 10.0

#: How long a stopping holder tries to tell readers that it withdraws.
CLOSE_GRACE_S = 1.0


@dataclass(frozen=True, slots=True)
class _Caller:
    send_offer: SendOfferCall
    on_ended: EndedCallback


class HolderService:
    """Grants leases. An async context manager; leaving it withdraws every open lease.

    One per worker life. `worker` is this worker as its readers address it.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        network: Network,
        clock: Clock,
        worker: Peer,
        identity: KvIdentity,
        transports: TransportSet,
        ttl_s: float = DEFAULT_TTL_S,
        max_age_s: float = 600.0,
        log: Callable[[str], None],
    ) -> None:
        self._network = network
        self._worker = worker
        self._identity = identity
        self._transports = transports
        self._ttl_s = ttl_s
        self._log = log
        self._numbers = itertools.count(1)
        self._machine = Holder(ledger, worker.incarnation, max_age_s=max_age_s)
        #: One per lease that has not ended.
        self._callers: dict[LeaseId, _Caller] = {}
        self._shell = MachineShell[HolderEvent, HolderInstruction](
            self._machine,
            clock=clock,
            perform=self._perform,
            tick=HolderTick(),
            stop=self._withdraw_all,
            close_grace_s=CLOSE_GRACE_S,
        )

    def __repr__(self) -> str:
        return f"<HolderService {self._worker.worker_id} {self._machine!r}>"

    async def __aenter__(self) -> Self:
        await self._shell.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._shell.__aexit__(kind, error, trace)

    def register(self, server: Server) -> None:
        """Answers Confirm, Renew and Ack there. All three are idempotent, and fenced by incarnation."""
        server.register(CONFIRM, self._confirm)
        server.register(RENEW, self._renew)
        server.register(ACK, self._ack)

    # --- for the prefill side ---------------------------------------------------------------------------

    def open(
        self,
        blocks: Sequence[BlockId],
        reader: Peer,
        *,
        send_offer: SendOfferCall,
        on_ended: EndedCallback,
    ) -> LeaseId:
        """Grants a lease over `blocks` (not empty, held by the caller, in the order of the tokens), pins
        them, and begins to offer it.

        `send_offer` is called again after a failure that a repeat may mend, until the term is over; it raises
        what the reader answered. `on_ended(lease_id, outcome, reason)` is called exactly once, when the pins
        are gone: until then the caller may drop its own references but the bytes stand. Neither may raise
        anything but a TandemError (`send_offer`). Raises WorkerUnavailable when the service is stopping.
        """
        if not self._shell.running:
            raise WorkerUnavailable(f"{self._worker.worker_id} is stopping: no lease is granted")
        worker = self._worker
        lease_id = LeaseId(f"{worker.worker_id}/{worker.incarnation}/{next(self._numbers)}")
        terms = LeaseTerms(
            lease_id=lease_id,
            holder=worker,
            identity=self._identity,
            endpoints=self._transports.endpoints(),
            num_blocks=len(blocks),
            ttl_s=self._ttl_s,
        )
        self._callers[lease_id] = _Caller(send_offer, on_ended)
        self._shell.feed(Opened(terms=terms, reader=reader, blocks=tuple(blocks)))
        return lease_id

    def advance(self, lease_id: LeaseId, num_final_blocks: int) -> None:
        """The lease's first `num_final_blocks` blocks will never be written again; may only grow.

        Of a lease that has ended this is ignored, as is `seal`: the end may cross it.
        """
        self._shell.feed(Advanced(lease_id, num_final_blocks))

    def seal(self, lease_id: LeaseId, num_final_blocks: int, seal: Seal) -> None:
        """The lease grows no more: it is its first `num_final_blocks` blocks (at least one)."""
        self._shell.feed(Sealed(lease_id, num_final_blocks, seal))

    def withdraw(self, lease_id: LeaseId, reason: str) -> None:
        """Takes the lease back at once, and tells the reader. Of an ended lease: ignored."""
        self._shell.feed(Withdrawn(lease_id, reason))

    def reader_gone(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """That life of that worker is known to be over: its leases end EXPIRED."""
        self._shell.feed(ReaderGone(worker_id, incarnation))

    # --- for metrics and audits -------------------------------------------------------------------------

    @property
    def num_leases(self) -> int:
        return self._machine.num_leases

    @property
    def counters(self) -> HolderCounters:
        return self._machine.counters

    def leases_by_state(self) -> dict[str, int]:
        return self._machine.leases_by_state()

    def check(self) -> None:
        """Audits the leases against the ledger; raises InvariantBroken."""
        self._machine.check()

    # --- answers ----------------------------------------------------------------------------------------

    async def _confirm(self, body: ConfirmRequest, context: CallContext) -> ConfirmReply:
        return self._answer(ConfirmAsked(body), ConfirmReply)

    async def _renew(self, body: RenewRequest, context: CallContext) -> RenewReply:
        return self._answer(RenewAsked(body), RenewReply)

    async def _ack(self, body: AckRequest, context: CallContext) -> Empty:
        return self._answer(AckArrived(body), Empty)

    def _answer(self, question: HolderEvent, body_type: type[ReplyBody]) -> ReplyBody:
        for instruction in self._shell.feed(question):
            if isinstance(instruction, Refuse):
                raise instruction.error
            if isinstance(instruction, Answer) and isinstance(instruction.body, body_type):
                return instruction.body
        raise Internal(f"{question} was not answered by {self!r}")

    # --- instructions -----------------------------------------------------------------------------------

    def _perform(self, instruction: HolderInstruction) -> None:
        match instruction:
            case SendOffer(terms=terms):
                self._shell.spawn(self._send_offer(instruction), f"offer {terms.lease_id}")
            case SendProgress(body=body):
                self._shell.spawn(self._send_progress(instruction), f"progress {body.lease_id}")
            case SendFarewell(body=body):
                self._shell.spawn(self._send_farewell(instruction), f"farewell {body.lease_id}")
            case LeaseEnded():
                self._lease_ended(instruction)
            case Answer() | Refuse():
                pass  # `_answer` returns or raises it

    def _lease_ended(self, ended: LeaseEnded) -> None:
        caller = self._callers.pop(ended.lease_id)
        if ended.outcome is not LeaseOutcome.RELEASED:
            self._log(f"lease {ended.lease_id} ended {ended.outcome}: {ended.reason}")
        self._shell.notify(lambda: caller.on_ended(ended.lease_id, ended.outcome, ended.reason))

    async def _send_offer(self, order: SendOffer) -> None:
        lease_id = order.terms.lease_id
        caller = self._callers.get(lease_id)
        if caller is None:
            return  # ended between the instruction and the task's first step
        try:
            async with asyncio.timeout(order.timeout_s):
                await caller.send_offer(order.terms, order.timeout_s)
        except TandemError as error:
            self._shell.feed(OfferFailed(lease_id, error))
        except TimeoutError:
            late = DeadlineExceeded(f"offer of lease {lease_id}: no answer within {order.timeout_s:g} s")
            self._shell.feed(OfferFailed(lease_id, late))
        else:
            self._shell.feed(OfferAnswered(lease_id))

    async def _send_progress(self, order: SendProgress) -> None:
        lease_id = order.body.lease_id
        try:
            channel = self._network.channel(order.reader.address)
            reply = await channel.call(PROGRESS, order.body, timeout_s=order.timeout_s)
        except TandemError as error:
            self._shell.feed(ProgressFailed(lease_id, error))
        else:
            self._shell.feed(ProgressAnswered(lease_id, reply))

    async def _send_farewell(self, order: SendFarewell) -> None:
        lease_id = order.body.lease_id
        failure: TandemError | None = None
        try:
            channel = self._network.channel(order.reader.address)
            await channel.call(PROGRESS, order.body, timeout_s=order.timeout_s)
        except TandemError as error:
            failure = error
        self._shell.feed(FarewellEnded(lease_id, failure))

    def _withdraw_all(self) -> None:
        for lease_id in self._machine.lease_ids():
            self.withdraw(lease_id, f"{self._worker.worker_id} is stopping")
