"""Offers on their way to this worker: which wait for blocks, and what those that have some are promised."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from engine.room import Demand
from engine.sequence import owner_name, request_key

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from contracts.ids import BlockId, LeaseId
    from contracts.messages import RequestKey
    from contracts.requests import GenerateRequest
    from engine.room import Room
    from kvstore.prefix_cache import KeyChain


@dataclass(slots=True, kw_only=True, eq=False)
class Incoming:
    """An offer whose KV is on its way."""

    lease_id: LeaseId
    request: GenerateRequest
    received_s: float
    #: The prompt; the answer's first token is added when it has come.
    token_ids: list[int]
    #: Keys of the full blocks of `token_ids`.
    chain: KeyChain
    #: Of its lease.
    num_blocks: int
    growth_blocks: int
    #: What it takes of the available blocks when it gets its own.
    num_new_blocks: int
    #: Another worker writes the answer until this one's claim is granted.
    is_move: bool = False
    #: Its leading blocks that stand here and are held for it; none while it waits.
    shared: list[BlockId] = field(default_factory=list["BlockId"])

    @property
    def key(self) -> RequestKey:
        return request_key(self.request)

    @property
    def holder(self) -> str:
        """Who holds `shared`. No request's name: those contain a "#"."""
        return f"offer/{self.lease_id}"

    @property
    def first_index(self) -> int:
        """Output index of the token that the prefill side samples."""
        return len(self.request.token_ids) - self.request.num_prompt_tokens

    @property
    def deadline_s(self) -> float:
        return self.received_s + self.request.deadline_s

    @property
    def demand(self) -> Demand:
        return Demand(arrival_s=self.received_s, num_blocks=self.num_new_blocks, growth_blocks=self.growth_blocks)


class IncomingOffers:
    """All and only offers neither adopted nor ended. The lease machine reserves in the order of arrival; which of
    them it has reserved is seen in the ledger, each offer once."""

    def __init__(self, room: Room, has_blocks: Callable[[LeaseId], bool]) -> None:
        """`has_blocks`: whether blocks are set aside for a lease."""
        self._room = room
        self._has_blocks = has_blocks
        self._offers: dict[LeaseId, Incoming] = {}
        #: Lease of each try in `_offers`.
        self._lease_of: dict[RequestKey, LeaseId] = {}
        #: Those not seen with blocks yet, in the order of arrival: all that wait, and maybe some that just got theirs.
        self._waiting: OrderedDict[LeaseId, Incoming] = OrderedDict()
        #: Prompt tokens of all.
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._offers)

    @property
    def num_waiting(self) -> int:
        """Those without blocks."""
        self.note_blocks()
        return len(self._waiting)

    @property
    def waiting_blocks(self) -> int:
        """Blocks that those without any would take."""
        self.note_blocks()
        return sum(offer.num_new_blocks for offer in self._waiting.values())

    def __contains__(self, lease_id: LeaseId) -> bool:
        return lease_id in self._offers

    def __getitem__(self, lease_id: LeaseId) -> Incoming:
        return self._offers[lease_id]

    def __iter__(self) -> Iterator[Incoming]:
        """In the order of arrival; over a copy."""
        return iter(list(self._offers.values()))

    def lease_of(self, key: RequestKey) -> LeaseId | None:
        return self._lease_of.get(key)

    def add(self, offer: Incoming) -> None:
        self._offers[offer.lease_id] = offer
        self._lease_of[offer.key] = offer.lease_id
        self._waiting[offer.lease_id] = offer
        self.num_tokens += len(offer.request.token_ids)

    def take(self, lease_id: LeaseId) -> Incoming:
        """Removes an offer, and what it was promised."""
        offer = self._offers.pop(lease_id)
        if self._lease_of.get(offer.key) == lease_id:
            del self._lease_of[offer.key]
        self._waiting.pop(lease_id, None)
        self._room.forget(owner_name(offer.key))
        self.num_tokens -= len(offer.request.token_ids)
        self.note_blocks()
        return offer

    def note_blocks(self) -> Incoming | None:
        """Promises growth to the offers that got blocks since; the one that waits longest, if any."""
        while self._waiting:
            offer = next(iter(self._waiting.values()))
            if not self._has_blocks(offer.lease_id):
                self._room.offer = offer.demand
                return offer
            del self._waiting[offer.lease_id]
            self._room.promise(owner_name(offer.key), offer.growth_blocks)
        self._room.offer = None
        return None
