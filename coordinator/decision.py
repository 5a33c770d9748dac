"""What is decided about one request, as rows of the fleet: made for every request, so made of plain tuples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from contracts.messages import Predicted

RefusedWhy = Literal["too_long", "no_prefill", "no_decode", "full", "ttft", "tpot"]


class Plan(NamedTuple):
    """What a placement is predicted to do to its workers; times are the coordinator's."""

    #: Of urgency: it delays what has this rank or a later one.
    rank: int
    #: Seconds that it adds to its prefill worker's work.
    prefill_s: float
    #: When its prompt will have been read: from then on its decode worker counts it.
    begin_s: float
    #: Where a prefix is fetched from, and until when; -1: from nowhere.
    source_row: int = -1
    fetched_s: float = 0.0
    #: By how much that moves on the prefill worker's clock of copies.
    replica_s: float = 0.0


class Chosen(NamedTuple):
    """Rows of the view that was decided on."""

    prefill_row: int
    #: The prefill row: a mixed worker keeps its prompt.
    decode_row: int
    #: Leading blocks that the prefill worker is believed to hold.
    local_blocks: int = 0
    #: Where it is to fetch more from, and how many leading blocks that one holds; -1: from nowhere.
    source_row: int = -1
    source_blocks: int = 0
    #: None where nothing is known of what steps cost.
    predicted: Predicted | None = None
    #: None as well where it is not known what reading a prompt costs.
    plan: Plan | None = None
    #: Leading blocks that the decode worker is believed to hold: they need not be handed over.
    decode_blocks: int = 0
    #: It would fetch a prefix, but for the prefill worker's budget of copies.
    is_withheld: bool = False


class Refused(NamedTuple):
    #: The prompt fits into no worker; no worker that reads prompts can hold it; those that can have full queues;
    #: no decode worker that can hold it understands the KV of those with room in their queues; the best place would
    #: miss the class's target.
    why: RefusedWhy
    #: Of the `contracts.errors` class that says so to a client.
    code: str
    retry_after_s: float
    #: Of the best place there was, where targets are the reason.
    best: Chosen | None = None
