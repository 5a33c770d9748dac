"""Prompts on their way to this worker: offered, pulled, and adopted with their first token.

An offer that gets its blocks at once shares what stands here of its prompt, so that only the rest moves. One that waits
for blocks holds none, also no shared ones: it takes all of its blocks when its turn comes.

Not thread-safe: everything runs on the worker's loop. Nothing here waits or does I/O.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.errors import BadRequest, Cancelled, NoCapacity
from contracts.failpoints import Failpoint, RarePath
from decode.admission import OfferVerdict, admit, retry_after_s
from decode.incoming import Incoming, IncomingOffers
from engine.sequence import owner_name, request_key

if TYPE_CHECKING:
    from collections.abc import Callable

    from contracts.clock import Clock
    from contracts.errors import TandemError
    from contracts.ids import BlockId, LeaseId
    from contracts.messages import HandoffReply, HandoffRequest, RequestKey, Seal
    from contracts.requests import GenerateRequest
    from decode.moves.coming import MovesIn
    from decode.prefixes import AnswerPrefixes
    from engine.plan import Engine
    from engine.recent import RecentTries
    from engine.room import Room
    from kvtransfer import Ledger, ReaderService

_HOLDS_BACK = Failpoint("decode.holds_back", "an offer waits although there is room for it")

_OFFERED_TOO_LATE = RarePath("decode.offered_too_late", "an offer came for a try that was cancelled or has ended")
_CANCELLED_COMING = RarePath("decode.cancelled_coming", "a try was cancelled while its KV was on its way")
_DEADLINE_PASSED = RarePath("decode.deadline_passed_coming", "a deadline passed while the KV came")


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoff:
    """A prompt that was adopted; its blocks are owned in the request's name."""

    #: Its tokens include the answer's first one.
    offer: Incoming
    block_ids: list[BlockId]
    #: So many leading ones stood here.
    num_shared: int
    #: Tokens whose KV is in `block_ids`.
    num_computed: int
    adopted_s: float


class Handoffs:
    def __init__(
        self,
        *,
        engine: Engine,
        ledger: Ledger,
        prefixes: AnswerPrefixes,
        reader: ReaderService,
        room: Room,
        over: RecentTries,
        own_worker_id: str,
        clock: Clock,
        workload: Callable[[], str],
        moves: MovesIn,
        on_adopted: Callable[[Handoff], None],
        on_failed: Callable[[Incoming, str, str], None],
        on_change: Callable[[], None],
    ) -> None:
        """`over`: tries that ended on this side, which this adds to. `workload`: what runs here, in words.

        Of each offer that was taken either `on_adopted` or `on_failed` (with code and message for the client) is called
        once, or neither where somebody else answers for the request; `on_change` after the reader has ended one."""
        self._engine = engine
        self._layout = engine.identity.layout
        self._ledger = ledger
        self._prefixes = prefixes
        self._reader = reader
        self._room = room
        self._over = over
        self._own_worker_id = own_worker_id
        self._clock = clock
        self._workload = workload
        self._moves = moves
        self._on_adopted = on_adopted
        self._on_failed = on_failed
        self._on_change = on_change
        self._incoming = IncomingOffers(room, ledger.is_reserved)

    def __len__(self) -> int:
        return len(self._incoming)

    @property
    def num_sealed(self) -> int:
        """Those whose prompt has been read."""
        return sum(self._reader.is_sealed(each.lease_id) for each in self._incoming)

    @property
    def num_waiting(self) -> int:
        """Those that have no blocks yet."""
        return self._incoming.num_waiting

    @property
    def waiting_blocks(self) -> int:
        """Blocks that these would take."""
        return self._incoming.waiting_blocks

    @property
    def num_tokens(self) -> int:
        """Prompt tokens of all."""
        return self._incoming.num_tokens

    @property
    def unread_tokens(self) -> int:
        """Of these, of prompts that are still being read elsewhere."""
        return sum(len(each.request.token_ids) for each in self._incoming if not self._reader.is_sealed(each.lease_id))

    def requests(self) -> list[GenerateRequest]:
        return [each.request for each in self._incoming]

    # --- offers -----------------------------------------------------------------------------------

    def offer(self, ask: HandoffRequest, now_s: float) -> HandoffReply:
        """Answers a handoff at once.

        Raises BadRequest, IncompatiblePeer, StaleIncarnation; Cancelled for a try that is over; NoCapacity,
        with numbers and when to ask again, for an offer that may not even wait.
        """
        key = request_key(ask.request)
        if key in self._over:
            _OFFERED_TOO_LATE.reached()
            raise Cancelled(f"request {key.request_id} attempt {key.attempt} is over at {self._own_worker_id}")
        self._check_fits(ask)
        lease_id = ask.terms.lease_id
        if lease_id in self._incoming:
            return self._ask_reader(ask, now_s)
        token_ids, num_blocks = list(ask.request.token_ids), ask.terms.num_blocks
        offer = Incoming(
            lease_id=lease_id,
            request=ask.request,
            received_s=now_s,
            token_ids=token_ids,
            chain=self._prefixes.chain(ask.request, token_ids),
            num_blocks=num_blocks,
            num_new_blocks=num_blocks,
            growth_blocks=self._room.growth(
                ask.request, num_blocks, max_context_tokens=self._engine.max_context_tokens
            ),
            is_move=ask.move is not None,
        )
        if ask.move is not None:
            self._moves.expect(ask.request, ask.move)
        # Known before the reader decides: it asks `may_reserve` about the offer that has waited longest.
        self._incoming.add(offer)
        try:
            if self._hold_beginning(offer):
                return self._ask_reader(ask, now_s, have=len(offer.shared), waits=False)
            if offer.is_move:
                raise NoCapacity(f"{self._own_worker_id} has no room for what moves; {self._workload()}")
            return self._ask_reader(ask, now_s)
        except BaseException:
            self._forget(lease_id)
            raise

    def may_reserve(self) -> bool:
        """Whether the offer that has waited longest may have its blocks now: what the reader asks before each."""
        first = self._incoming.note_blocks()
        if _HOLDS_BACK.fires():
            return False
        return first is None or admit(first.demand, self._room.view()) is OfferVerdict.RESERVE

    def blocks_freed(self) -> None:
        """Blocks may have become available for those that wait; what they got is noted at once."""
        self.ask_for_blocks()
        self._incoming.note_blocks()

    def ask_for_blocks(self) -> None:
        """As `blocks_freed`; what they got is noted later."""
        self._reader.blocks_freed()

    def forget_move(self, key: RequestKey, reason: str) -> None:
        """What moves here does not come, for now; its source answers for it."""
        self._stop(key, reason)

    def cancel(self, key: RequestKey, reason: str) -> None:
        """Forgets a try. Unknown tries are no error."""
        if self._stop(key, reason):
            _CANCELLED_COMING.reached()
            self._over.add(key)

    def _stop(self, key: RequestKey, reason: str) -> bool:
        lease_id = self._incoming.lease_of(key)
        if lease_id is None:
            return False
        self._forget(lease_id)
        self._reader.cancel(lease_id, reason)
        return True

    def expire(self, now_s: float, message: str) -> None:
        """Ends the tries whose deadline has passed."""
        for offer in self._incoming:
            if now_s > offer.deadline_s:
                _DEADLINE_PASSED.reached()
                self._end(offer, "deadline_exceeded", message)

    def fail_all(self, code: str, message: str) -> None:
        """Ends every try that is on its way."""
        for offer in self._incoming:
            self._end(offer, code, message)

    # --- inside -----------------------------------------------------------------------------------

    def _check_fits(self, ask: HandoffRequest) -> None:
        # One token more than the prompt must fit, else not even the second token could be computed.
        needed = self._layout.blocks_for(len(ask.request.token_ids) + 1)
        if max(needed, ask.terms.num_blocks) > self._engine.num_blocks:
            raise BadRequest(
                f"the request needs {needed} KV blocks, {self._own_worker_id} has {self._engine.num_blocks} in all"
            )

    def _hold_beginning(self, offer: Incoming) -> bool:
        """Shares what stands here of a new offer's prompt, if the rest gets its blocks at once."""
        found = self._prefixes.find(offer)
        if (found or offer.is_move) and self._incoming.note_blocks() is offer and self.may_reserve():
            self._prefixes.hold(offer, found)
            return True
        self._prefixes.let_go(offer)
        return False

    def _ask_reader(self, ask: HandoffRequest, now_s: float, *, have: int = 0, waits: bool = True) -> HandoffReply:
        try:
            return self._reader.offer(
                ask.terms,
                owner=owner_name(request_key(ask.request)),
                on_adopted=self._adopted,
                on_aborted=self._aborted,
                have=have,
                waits=waits,
                on_caught_up=None if ask.move is None else self._caught_up,
            )
        except NoCapacity as error:
            first = self._incoming.note_blocks()
            waited_s = now_s - first.received_s if first is not None else 0.0
            raise NoCapacity(
                f"{self._own_worker_id} takes no more offers: {error.message}; {self._workload()}",
                retry_after_s=retry_after_s(waited_s, ask.terms.ttl_s),
            ) from error

    def _caught_up(self, lease_id: LeaseId, num_blocks: int) -> None:
        if lease_id in self._incoming:
            self._moves.caught_up(self._incoming[lease_id].key)

    def _adopted(self, lease_id: LeaseId, block_ids: list[BlockId], seal: Seal) -> None:
        """The reader's report that a pull was confirmed; the blocks are owned in the request's name."""
        offer = self._incoming.take(lease_id)
        owner = owner_name(offer.key)
        if seal.first_delta is None:
            self._prefixes.let_go(offer)
            self._ledger.release_all(owner)
            self._fail(offer, BadRequest.code, f"lease {lease_id} was sealed without a first token")
            self._on_change()
            return
        shared = self._prefixes.hand_on(offer, owner)
        offer.token_ids.extend(seal.first_delta.token_ids)
        handoff = Handoff(
            offer=offer,
            block_ids=[*shared, *block_ids],
            num_shared=len(shared),
            # However far its reader came: shared blocks are not written.
            num_computed=max(seal.num_tokens, len(shared) * self._layout.block_tokens),
            adopted_s=self._clock.now_s(),
        )
        self._on_adopted(handoff)
        self._on_change()

    def _aborted(self, lease_id: LeaseId, error: TandemError) -> None:
        """The reader's report that a pull ended without adoption. Cancelled says that somebody ended it who answers
        for the request himself: this worker, or its holder; anything else is told to the client as what it is."""
        if lease_id in self._incoming:
            offer = self._forget(lease_id)
            if isinstance(error, Cancelled):
                if not offer.is_move:
                    self._over.add(offer.key)
            else:
                self._fail(offer, error.code, error.message)
        self._on_change()

    def _forget(self, lease_id: LeaseId) -> Incoming:
        """An offer that is not adopted, and what was held for it."""
        offer = self._incoming.take(lease_id)
        self._prefixes.let_go(offer)
        if offer.is_move:
            self._moves.gone(offer.key, f"lease {lease_id} was not adopted")
        return offer

    def _end(self, offer: Incoming, code: str, message: str) -> None:
        self.cancel(offer.key, message)
        self._fail(offer, code, message)

    def _fail(self, offer: Incoming, code: str, message: str) -> None:
        if offer.is_move:
            self._moves.gone(offer.key, message)
        else:
            self._over.add(offer.key)
            self._on_failed(offer, code, message)
