"""Claims on one try of a request: those that wait, and the last one that was granted. No I/O, no clock.

A worker that is ready to go on with a request claims the next owner epoch (`contracts.requests.Claim`). Here stands
what may be claimed; `gateway.ownership` grants it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from contracts.failpoints import RarePath
from contracts.messages import ClaimVerdict, RequestKey
from gateway import events as ev

if TYPE_CHECKING:
    from contracts.ids import Attempt, OwnerEpoch
    from contracts.messages import Peer, Placement
    from contracts.requests import Claim

_REFUSED = RarePath("gateway.claim_refused", "a claim was refused")


class Outcome(Enum):
    """What became of a claim: its label in metrics, and for a refusal why, in words."""

    #: The request moved.
    GRANTED = "granted", ""
    #: To the worker that had it: a move that came to nothing.
    CLAIMED_BACK = "claimed_back", ""
    #: It had been granted before.
    REPEATED = "repeated", ""
    FORGOTTEN = "forgotten", "the request is not known here any more"
    OVER = "over", "the request is over"
    ATTEMPT = "attempt", "the attempt is over"
    OWNER_EPOCH = "owner_epoch", "the owner epoch is another worker's, or not the next one"
    NOBODY = "nobody", "no worker has the request"
    READ = "read", "the prompt has been read"
    BEHIND = "behind", "the present owner has written more"

    def __init__(self, label: str, text: str) -> None:
        self.label = label
        self.text = text

    @property
    def is_grant(self) -> bool:
        return not self.text


def verdict(peer: Peer, claim: Claim, outcome: Outcome, next_index: int = 0) -> ev.SendVerdict:
    """`next_index`: output tokens that the client has, for a grant."""
    if not outcome.is_grant:
        _REFUSED.reached()
    key = RequestKey(claim.request_id, claim.attempt, claim.owner_epoch)
    told = ClaimVerdict(key=key, granted=outcome.is_grant, next_index=next_index, reason=outcome.text)
    return ev.SendVerdict(peer, told, outcome.label)


def is_life(peer: Peer, owner: Peer) -> bool:
    """Whether both are the same life of the same worker."""
    return peer.worker_id == owner.worker_id and peer.incarnation == owner.incarnation


class Standing(NamedTuple):
    """What is claimed."""

    is_over: bool
    #: None: nobody has it.
    placement: Placement | None
    #: The present ones.
    attempt: Attempt
    owner_epoch: OwnerEpoch
    #: Its prompt was, in this attempt.
    is_read: bool
    #: Output tokens.
    num_delivered: int


def why_refused(peer: Peer, claim: Claim, standing: Standing) -> Outcome | None:
    """None: `peer` may have it, once all tokens that it knows of are delivered."""
    if standing.is_over:
        return Outcome.OVER
    if claim.attempt != standing.attempt:
        return Outcome.ATTEMPT
    if standing.placement is None:
        return Outcome.NOBODY
    if claim.owner_epoch != standing.owner_epoch + 1:
        return Outcome.OWNER_EPOCH
    if claim.reads and standing.is_read:
        return Outcome.READ
    # Made without tokens that were written: its move was given up, and the owner went on. The owner itself knows what
    # it wrote; whoever refused it would leave the request to nobody.
    is_owner = is_life(peer, owner_of(standing.placement, claim))
    return Outcome.BEHIND if claim.num_outputs < standing.num_delivered and not is_owner else None


def owner_of(placement: Placement, claim: Claim) -> Peer:
    """Who has what is claimed."""
    return placement.prefill if claim.reads else placement.decode


def moved(placement: Placement, peer: Peer, claim: Claim) -> Placement:
    """With the claimer in the place of the owner. A prompt that was to be decoded where it was read still is."""
    if not claim.reads:
        return msgspec.structs.replace(placement, decode=peer)
    decode = peer if is_life(placement.prefill, placement.decode) else placement.decode
    return msgspec.structs.replace(placement, prefill=peer, decode=decode)


@dataclass(frozen=True, slots=True)
class _Grant:
    peer: Peer
    claim: Claim
    next_index: int


class Claims:
    def __init__(self) -> None:
        #: One for each claimer, in the order in which they came.
        self._waiting: dict[Peer, Claim] = {}
        self._grant: _Grant | None = None

    def __repr__(self) -> str:
        return f"<Claims [{len(self._waiting)} waiting] granted {self._grant!r}>"

    @property
    def any_wait(self) -> bool:
        return bool(self._waiting)

    @property
    def any_granted(self) -> bool:
        return self._grant is not None

    @property
    def first(self) -> tuple[Peer, Claim] | None:
        return next(iter(self._waiting.items()), None)

    def repeated(self, peer: Peer, claim: Claim) -> ev.SendVerdict | None:
        """The verdict once more, where this is the claim that was granted last."""
        grant = self._grant
        if grant is None or not is_life(peer, grant.peer):
            return None
        if (claim.attempt, claim.owner_epoch) != (grant.claim.attempt, grant.claim.owner_epoch):
            return None
        return verdict(peer, claim, Outcome.REPEATED, grant.next_index)

    def wait(self, peer: Peer, claim: Claim) -> None:
        self._waiting[peer] = claim

    def covered(self, num_delivered: int) -> list[tuple[Peer, Claim]]:
        """Those that wait for none of the tokens that were not delivered."""
        return [(peer, claim) for peer, claim in self._waiting.items() if claim.num_outputs <= num_delivered]

    def withdraw(self, peer: Peer) -> None:
        """Forgets what this life of a worker waits for, if it does."""
        for claimer in [claimer for claimer in self._waiting if is_life(peer, claimer)]:
            del self._waiting[claimer]

    def grant(self, peer: Peer, outcome: Outcome, next_index: int) -> list[ev.Instruction]:
        """To one that waits; all others are refused."""
        claim = self._waiting.pop(peer)
        self._grant = _Grant(peer, claim, next_index)
        return [verdict(peer, claim, outcome, next_index), *self.refuse_all(Outcome.OWNER_EPOCH)]

    def refuse_all(self, outcome: Outcome) -> list[ev.Instruction]:
        refused = [verdict(peer, claim, outcome) for peer, claim in self._waiting.items()]
        self._waiting.clear()
        return list(refused)
