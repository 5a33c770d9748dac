"""The reader's side of the leased pull, live: takes offers, pulls, confirms and adopts.

All decisions are `kvtransfer.reader.Reader`'s; here its instructions become calls and pulls, and what comes
of them becomes events.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import DeadlineExceeded, Internal, NoCapacity, TandemError, WorkerUnavailable
from contracts.failpoints import Failpoint
from contracts.ids import BlockId, LeaseId
from contracts.messages import (
    ACK,
    CONFIRM,
    PROGRESS,
    RENEW,
    HandoffReply,
    ProgressReply,
    ProgressRequest,
    Seal,
)
from kvtransfer.block_work import BlockWork
from kvtransfer.lease_service import LeaseService
from kvtransfer.reader import Reader
from kvtransfer.reader_events import (
    AckEnded,
    AskConfirm,
    AskRenew,
    BlocksFreed,
    CancelRequested,
    CaughtUp,
    ConfirmAnswered,
    ConfirmFailed,
    HolderGone,
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
    SendAck,
    StartPull,
    StopPull,
    Verdict,
)

if TYPE_CHECKING:
    from contracts.clock import Clock
    from contracts.ids import Incarnation, WorkerId
    from contracts.layout import KvIdentity
    from contracts.messages import LeaseTerms
    from kvtransfer.block_work import Offload
    from kvtransfer.ledger import Ledger
    from kvtransfer.reader_events import HolderKey
    from kvtransfer.reader_lease import ReaderCounters
    from kvtransfer.staging import Staging
    from kvtransfer.transport import Pool, Pull
    from kvtransfer.transport_set import TransportSet
    from rpc import CallContext, Network, Server

AdoptedCallback = Callable[[LeaseId, list[BlockId], Seal], None]
AbortedCallback = Callable[[LeaseId, TandemError], None]
CaughtUpCallback = Callable[[LeaseId, int], None]

#: How long a stopping reader waits for its pulls to become terminal and for its acknowledgements to arrive.
CLOSE_GRACE_S = 3.0

_OFFER_REFUSED = Failpoint("kvtransfer.offer_refused", "a reader refuses a new offer as if too many waited")
_PULL_HEARD_LATE = Failpoint("kvtransfer.pull_heard_late", "that a pull has ended is heard late")
_CONFIRM_TWICE = Failpoint("kvtransfer.confirm_twice", "the answer to a confirmation is lost, it is asked again")
_RENEWAL_LOST = Failpoint("kvtransfer.renewal_lost", "a renewal is not sent and counts as failed")
_ACK_LOST = Failpoint("kvtransfer.ack_lost", "an acknowledgement is not sent and counts as failed")
_ACK_TWICE = Failpoint("kvtransfer.ack_twice", "an acknowledgement is sent twice")
#: Past it a stopping reader would wait for what is over.
_LONGEST_DEAFNESS_S = 0.5


@dataclass(frozen=True, slots=True)
class _Caller:
    on_adopted: AdoptedCallback
    on_aborted: AbortedCallback


class ReaderService(LeaseService[ReaderEvent, ReaderInstruction]):
    """Takes leases. An async context manager; leaving it cancels every lease that was not adopted.

    One per worker life. `transports` have this worker's pool registered, the one that `ledger` keeps.
    """

    def __init__(
        self,
        *,
        ledger: Ledger,
        network: Network,
        clock: Clock,
        transports: TransportSet,
        identity: KvIdentity,
        max_waiting: int = 256,
        may_reserve: Callable[[], bool] = lambda: True,
        on_settled: Callable[[], None] = lambda: None,
        pool: Pool | None = None,
        checksum: bool = False,
        staging: Staging | None = None,
        offload: Offload | None = None,
        log: Callable[[str], None],
    ) -> None:
        """`may_reserve`: whether offers may take blocks now (not while something admitted starves).
        `on_settled` is called when a pull became terminal: blocks may have left the quarantine.

        `checksum`: only offers with checksums are taken, and every pulled block is compared with its own, in
        `pool`. `staging`: pulled blocks are copied on from the pool before they are confirmed. Both happen on a
        thread of this service, or where `offload` puts them. Raises ConfigError for checksums without a pool.
        """
        self._transports = transports
        self._on_settled = on_settled
        #: One per lease that has not ended.
        self._callers: dict[LeaseId, _Caller] = {}
        #: Of these, those who want to hear how far it has come.
        self._followers: dict[LeaseId, CaughtUpCallback] = {}
        #: Pulls that are not terminal.
        self._pulls: dict[LeaseId, Pull] = {}
        work = BlockWork(pool=pool, checksum=checksum, staging=staging, clock=clock, offload=offload)
        self._machine = Reader(
            ledger,
            identity,
            transports.names,
            max_waiting=max_waiting,
            may_reserve=may_reserve,
            lands=work.wanted,
            checksum=checksum,
        )
        super().__init__(
            self._machine,
            network=network,
            clock=clock,
            tick=ReaderTick(),
            work=work,
            close_grace_s=CLOSE_GRACE_S,
            log=log,
        )

    def __repr__(self) -> str:
        return f"<ReaderService {self._machine!r}>"

    def register(self, server: Server) -> None:
        """Answers Progress there; it is idempotent, and fenced by the holder's incarnation."""
        server.register(PROGRESS, self._progress)

    # --- for the decode side ----------------------------------------------------------------------------

    def offer(
        self,
        terms: LeaseTerms,
        *,
        owner: str,
        on_adopted: AdoptedCallback,
        on_aborted: AbortedCallback,
        waits: bool = True,
        have: int = 0,
        on_caught_up: CaughtUpCallback | None = None,
    ) -> HandoffReply:
        """The verdict on an offer, at once: blocks are set aside, or it waits for some without holding any (not
        `waits`: then it is refused, and where there are some goes before those that wait).

        `have`: the caller holds the lease's first `have` blocks already, and keeps them until the lease has ended.
        Nothing is set aside for these, nothing of them is pulled or compared; the reply's `expected` begins there.
        With all of them here the seal is still awaited, and the lease confirmed and acknowledged; it waits its turn.

        Exactly one of `on_adopted(lease_id, block_ids, seal)` and `on_aborted(lease_id, error)` is called later,
        exactly once. Adopted are the lease's blocks from position `have` up to its seal: the ledger's `owner` holds
        these now, in the order of the tokens, and every one was pulled; what was set aside beyond the seal is free
        again. None are adopted where the seal is not past `have`: `seal.num_tokens` says how far the lease goes.

        `on_caught_up(lease_id, num_blocks)` is called, before either, whenever all that was announced of the lease so
        far is here and the holder has still to seal it.

        A repeated offer gets the verdict as it stands, with the `have` of the first, and its callbacks are dropped:
        see `holds`.

        Raises IncompatiblePeer, NoCapacity, StaleIncarnation (an older life of the holder), BadRequest (can
        never fit, or `have` is not in [0, `terms.num_blocks`]) or TransferAborted (this lease has ended here); then
        nothing was started.
        """
        if not self._shell.running:
            raise WorkerUnavailable(f"lease {terms.lease_id}: this reader is stopping")
        if not self.holds(terms.lease_id) and _OFFER_REFUSED.fires():
            raise NoCapacity(f"lease {terms.lease_id} is refused on purpose")
        follows = on_caught_up is not None
        if on_caught_up is not None:
            # Nothing has to be pulled where all of it stands here: it may be caught up at once.
            self._followers.setdefault(terms.lease_id, on_caught_up)
        offered = Offered(terms=terms, owner=owner, waits=waits, have=have, follows=follows)
        for instruction in self._shell.feed(offered):
            if isinstance(instruction, RefuseOffer):
                if not self.holds(terms.lease_id):
                    self._followers.pop(terms.lease_id, None)
                raise instruction.error
            if isinstance(instruction, Verdict):
                self._callers.setdefault(terms.lease_id, _Caller(on_adopted, on_aborted))
                return instruction.reply
        raise Internal(f"offer of lease {terms.lease_id} was not answered by {self!r}")

    def holds(self, lease_id: LeaseId) -> bool:
        """An earlier `offer` of this lease was accepted and has not ended."""
        return lease_id in self._callers

    def is_sealed(self, lease_id: LeaseId) -> bool:
        """Whether its prompt has been read whole; False where the lease is not here."""
        return self._machine.is_sealed(lease_id)

    def cancel(self, lease_id: LeaseId, reason: str) -> None:
        """Ends the lease; `on_aborted` gets Cancelled. Of an ended lease: ignored."""
        self._shell.feed(CancelRequested(lease_id, reason))

    def blocks_freed(self) -> None:
        """Blocks may have become available in the ledger: waiting offers may reserve, in order of arrival."""
        if self._machine.num_waiting:
            self._shell.feed(BlocksFreed())

    def holder_gone(self, worker_id: WorkerId, incarnation: Incarnation) -> None:
        """That life of that worker is known to be over: its leases are aborted."""
        self._shell.feed(HolderGone(worker_id, incarnation))
        self._transports.forget(worker_id, incarnation)

    # --- for metrics and audits -------------------------------------------------------------------------

    @property
    def num_leases(self) -> int:
        """Leases that have not ended, and those in quarantine."""
        return self._machine.num_leases

    @property
    def counters(self) -> ReaderCounters:
        return self._machine.counters

    def leases_by_state(self) -> dict[str, int]:
        return self._machine.leases_by_state()

    def check(self) -> None:
        """Audits the leases against the ledger; raises InvariantBroken."""
        self._machine.check()

    # --- answers ----------------------------------------------------------------------------------------

    async def _progress(self, body: ProgressRequest, context: CallContext) -> ProgressReply:
        for instruction in self._shell.feed(ProgressArrived(body)):
            if isinstance(instruction, RefuseProgress):
                raise instruction.error
            if isinstance(instruction, ReplyProgress):
                return instruction.reply
        raise Internal(f"progress of lease {body.lease_id} was not answered by {self!r}")

    # --- instructions -----------------------------------------------------------------------------------

    def _perform(self, instruction: ReaderInstruction) -> None:
        match instruction:
            case StartPull():
                self._start_pull(instruction)
            case LandBlocks(lease_id=lease_id):
                self._shell.spawn(self._land(instruction), f"land {lease_id}")
            case StopPull(lease_id):
                # The machine looks at its deadlines before it hears that a pull has ended.
                if (pull := self._pulls.get(lease_id)) is not None:
                    pull.request_stop()
            case AskConfirm(lease_id=lease_id):
                self._shell.spawn(self._ask_confirm(instruction), f"confirm {lease_id}")
            case AskRenew(holder=holder):
                self._shell.spawn(self._ask_renew(instruction), f"renew at {holder.worker_id}")
            case SendAck(holder=holder):
                self._shell.spawn(self._send_ack(instruction), f"ack to {holder.worker_id}")
            case CaughtUp():
                self._caught_up(instruction)
            case LeaseAdopted() | LeaseAborted():
                self._lease_ended(instruction)
            case Verdict() | RefuseOffer() | ReplyProgress() | RefuseProgress():
                pass  # the question's asker takes it

    def _start_pull(self, order: StartPull) -> None:
        pull = self._transports.pull(order.holder, order.endpoints, order.pairs)
        self._pulls[order.lease_id] = pull
        self._shell.spawn(self._await_pull(order.lease_id, pull), f"pull {order.lease_id}")

    async def _await_pull(self, lease_id: LeaseId, pull: Pull) -> None:
        result = await pull.wait()
        await _PULL_HEARD_LATE.delay(_LONGEST_DEAFNESS_S)
        del self._pulls[lease_id]
        self._shell.feed(PullEnded(lease_id, result))
        self._on_settled()

    async def _land(self, order: LandBlocks) -> None:
        result = await self._work.land(order.blocks, order.checksums)
        self._shell.feed(Landed(order.lease_id, result))
        self._on_settled()

    async def _ask_confirm(self, order: AskConfirm) -> None:
        if _CONFIRM_TWICE.fires():
            await self._call(order.holder, CONFIRM, order.body, order.timeout_s)
        reply = await self._call(order.holder, CONFIRM, order.body, order.timeout_s)
        if isinstance(reply, TandemError):
            self._shell.feed(ConfirmFailed(order.lease_id, reply))
        else:
            self._shell.feed(ConfirmAnswered(order.lease_id, reply))

    async def _ask_renew(self, order: AskRenew) -> None:
        key: HolderKey = (order.holder.worker_id, order.holder.incarnation)
        if _RENEWAL_LOST.fires():
            self._shell.feed(RenewFailed(key, DeadlineExceeded("the renewal is lost on purpose")))
            return
        reply = await self._call(order.holder, RENEW, order.body, order.timeout_s)
        self._shell.feed(RenewFailed(key, reply) if isinstance(reply, TandemError) else RenewAnswered(key, reply))

    async def _send_ack(self, order: SendAck) -> None:
        key: HolderKey = (order.holder.worker_id, order.holder.incarnation)
        if _ACK_LOST.fires():
            self._shell.feed(AckEnded(key, DeadlineExceeded("the acknowledgement is lost on purpose")))
            return
        if _ACK_TWICE.fires():
            await self._call(order.holder, ACK, order.body, order.timeout_s)
        reply = await self._call(order.holder, ACK, order.body, order.timeout_s)
        self._shell.feed(AckEnded(key, reply if isinstance(reply, TandemError) else None))

    def _caught_up(self, news: CaughtUp) -> None:
        follower = self._followers[news.lease_id]
        self._shell.notify(lambda: follower(news.lease_id, news.num_blocks))

    def _lease_ended(self, ended: LeaseAdopted | LeaseAborted) -> None:
        caller = self._callers.pop(ended.lease_id)
        self._followers.pop(ended.lease_id, None)
        if isinstance(ended, LeaseAdopted):
            self._shell.notify(lambda: caller.on_adopted(ended.lease_id, ended.blocks, ended.seal))
            return
        self._log(f"lease {ended.lease_id} aborted, {ended.reason}: {ended.error.message}")
        self._shell.notify(lambda: caller.on_aborted(ended.lease_id, ended.error))

    def _end_all(self) -> None:
        for lease_id in self._machine.lease_ids():
            self.cancel(lease_id, "the reader is stopping")
