"""The holder's side of the leased pull, live: grants leases over this worker's blocks, answers their readers.

All decisions are `kvtransfer.holder.Holder`'s; here its instructions become calls, and calls become events.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from contracts.errors import DeadlineExceeded, Internal, TandemError, WorkerUnavailable
from contracts.failpoints import Failpoint
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
from kvtransfer.block_work import BlockWork
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
from kvtransfer.lease_service import LeaseService

if TYPE_CHECKING:
    from collections.abc import Sequence

    from contracts.clock import Clock
    from contracts.ids import BlockId, Incarnation, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import Peer, Seal
    from kvtransfer.block_work import Offload
    from kvtransfer.holder_lease import HolderCounters
    from kvtransfer.ledger import Ledger
    from kvtransfer.staging import Staging
    from kvtransfer.transport import Pool
    from kvtransfer.transport_set import TransportSet
    from rpc import CallContext, Network, Server

#: Puts the terms into a Handoff and calls the reader, within so many seconds.
SendOfferCall = Callable[[LeaseTerms, float], Awaitable[HandoffReply]]
EndedCallback = Callable[[LeaseId, LeaseOutcome, str], None]
ReplyBody = TypeVar("ReplyBody", ConfirmReply, RenewReply, Empty)

DEFAULT_TTL_S = 10.0

#: How long a stopping holder tries to tell readers that it withdraws.
CLOSE_GRACE_S = 1.0

_SHORT_TERM = Failpoint("kvtransfer.short_term", "a lease is granted for half of its usual term at a time")
_OFFER_ANSWER_LATE = Failpoint("kvtransfer.offer_answer_late", "the answer to an offer comes late, or too late")
_PROGRESS_LOST = Failpoint("kvtransfer.progress_lost", "an announcement is not sent, a later one contains it")


@dataclass(frozen=True, slots=True)
class _Caller:
    send_offer: SendOfferCall
    on_ended: EndedCallback


class HolderService(LeaseService[HolderEvent, HolderInstruction]):
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
        pool: Pool | None = None,
        checksum: bool = False,
        staging: Staging | None = None,
        offload: Offload | None = None,
        on_settled: Callable[[], None] = lambda: None,
        log: Callable[[str], None],
    ) -> None:
        """`checksum`: blocks are announced with their checksums, read from `pool`. `staging`: they are copied to
        the pool first. Both happen on a thread of this service, or where `offload` puts them. `on_settled` is
        called when blocks are no longer read for that: pins of an ended lease may have gone.

        Raises ConfigError for checksums without a pool.
        """
        self._worker = worker
        self._identity = identity
        self._transports = transports
        self._ttl_s = ttl_s
        self._on_settled = on_settled
        self._numbers = itertools.count(1)
        #: One per lease that has not ended.
        self._callers: dict[LeaseId, _Caller] = {}
        work = BlockWork(pool=pool, checksum=checksum, staging=staging, clock=clock, offload=offload)
        self._machine = Holder(ledger, worker.incarnation, max_age_s=max_age_s, prepares=work.wanted)
        super().__init__(
            self._machine,
            network=network,
            clock=clock,
            tick=HolderTick(),
            work=work,
            close_grace_s=CLOSE_GRACE_S,
            log=log,
        )

    def __repr__(self) -> str:
        return f"<HolderService {self._worker.worker_id} {self._machine!r}>"

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
        num_final_blocks: int = 0,
        seal: Seal | None = None,
        max_age_s: float | None = None,
        whole: bool = False,
    ) -> LeaseId:
        """Grants a lease over `blocks` (not empty, held by the caller, in the order of the tokens), pins
        them, and begins to offer it. `num_final_blocks`: so many are final already, as if `advance` had been called;
        `seal`: all of them are, as if `seal` had been. The offer then carries them, which spares a call. `whole`:
        with `seal`, and at most `MAX_BLOCKS_PER_PROGRESS` blocks; it is offered once the offer can carry all of them.

        `send_offer` is called again after a failure that a repeat may mend, until the term is over; it raises
        what the reader answered. To a reader without room (NoCapacity) the offer is repeated until the lease is
        `max_age_s` old (None: as old as any lease may get); nor is it renewed past that.

        `on_ended(lease_id, outcome, reason)` is called exactly once, when the pins are gone (or go as soon as
        blocks are no longer read for a checksum, see `on_settled`): until then the caller may drop its own
        references but the bytes stand. Neither may raise anything but a TandemError (`send_offer`). Raises
        WorkerUnavailable when the service is stopping.
        """
        if not self._shell.running:
            raise WorkerUnavailable(f"{self._worker.worker_id} is stopping: no lease is granted")
        worker = self._worker
        ttl_s = self._ttl_s / 2 if _SHORT_TERM.fires() else self._ttl_s
        lease_id = LeaseId(f"{worker.worker_id}/{worker.incarnation}/{next(self._numbers)}")
        terms = LeaseTerms(
            lease_id=lease_id,
            holder=worker,
            identity=self._identity,
            endpoints=self._transports.endpoints(),
            num_blocks=len(blocks),
            ttl_s=ttl_s,
            checksums=self._work.checksum,
        )
        self._callers[lease_id] = _Caller(send_offer, on_ended)
        self._shell.feed(
            Opened(
                terms=terms,
                reader=reader,
                blocks=tuple(blocks),
                num_final_blocks=num_final_blocks,
                seal=seal,
                max_age_s=max_age_s,
                whole=whole,
            )
        )
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
            case PrepareBlocks(lease_id=lease_id):
                self._shell.spawn(self._prepare(instruction), f"prepare {lease_id}")
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
                reply = await caller.send_offer(order.terms, order.timeout_s)
                await _OFFER_ANSWER_LATE.delay(1.5 * order.timeout_s)
        except TandemError as error:
            self._shell.feed(OfferFailed(lease_id, error))
        except TimeoutError:
            late = DeadlineExceeded(f"offer of lease {lease_id}: no answer within {order.timeout_s:g} s")
            self._shell.feed(OfferFailed(lease_id, late))
        else:
            self._shell.feed(OfferAnswered(lease_id, reply.expected))

    async def _send_progress(self, order: SendProgress) -> None:
        lease_id = order.body.lease_id
        if _PROGRESS_LOST.fires():
            self._shell.feed(ProgressFailed(lease_id, DeadlineExceeded("the announcement is lost on purpose")))
            return
        reply = await self._call(order.reader, PROGRESS, order.body, order.timeout_s)
        if isinstance(reply, TandemError):
            self._shell.feed(ProgressFailed(lease_id, reply))
        else:
            self._shell.feed(ProgressAnswered(lease_id, reply))

    async def _send_farewell(self, order: SendFarewell) -> None:
        reply = await self._call(order.reader, PROGRESS, order.body, order.timeout_s)
        failure = reply if isinstance(reply, TandemError) else None
        self._shell.feed(FarewellEnded(order.body.lease_id, failure))

    async def _prepare(self, order: PrepareBlocks) -> None:
        result = await self._work.prepare(order.blocks)
        self._shell.feed(Prepared(order.lease_id, result))
        self._on_settled()

    def _end_all(self) -> None:
        for lease_id in self._machine.lease_ids():
            self.withdraw(lease_id, f"{self._worker.worker_id} is stopping")
