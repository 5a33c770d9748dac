"""When an offer gets blocks, and when a preempted answer gets them back: pure decisions with their reasons."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from engine.room import Fit, fit

if TYPE_CHECKING:
    from engine.room import Demand, RoomView

#: What a holder is told whose offer may not even wait: at least, and at most, where its term allows. Its blocks are
#: idle meanwhile.
SHORTEST_RETRY_S = 0.1
LONGEST_RETRY_S = 2.0


class OfferVerdict(Enum):
    """Whether the offer that has waited longest gets blocks; the values are metric labels."""

    RESERVE = "reserve"
    #: A preempted answer comes first.
    STARVING = "starving"
    #: A prompt that came earlier waits for blocks, and gets them by this worker's own work.
    OLDER_PROMPT = "older_prompt"
    NO_BLOCKS = "no_blocks"
    NO_HEADROOM = "no_headroom"


def admit(demand: Demand, view: RoomView) -> OfferVerdict:
    """Decides about the oldest waiting offer. Pure.

    An offer may wait only for what ends by itself: for the answers written here. While this worker's own prompts
    wait for other workers (`lent_blocks`), the holders of its offers may be the ones they wait for; so it takes
    offers then although an answer starves, and before a prompt that those blocks stand in the way of.
    """
    if view.starving and not view.lent_blocks:
        return OfferVerdict.STARVING
    rival = view.prompt
    if (
        rival is not None
        and not view.starving
        and rival.arrival_s < demand.arrival_s
        and rival.num_blocks <= view.own_blocks
    ):
        return OfferVerdict.OLDER_PROMPT
    match fit(demand, view):
        case Fit.FITS | Fit.ALONE:
            return OfferVerdict.RESERVE
        case Fit.NO_BLOCKS:
            return OfferVerdict.NO_BLOCKS
        case Fit.NO_HEADROOM:
            return OfferVerdict.NO_HEADROOM


def may_resume(demand: Demand, view: RoomView) -> bool:
    """Whether a preempted answer is read again now. Pure.

    Alone it needs no headroom, unless blocks are lent: more will come, and without them it would be preempted for
    every block that it grows.
    """
    match fit(demand, view):
        case Fit.FITS:
            return True
        case Fit.ALONE:
            left = view.available_blocks - demand.num_blocks
            return not view.lent_blocks or left >= demand.growth_blocks
        case Fit.NO_BLOCKS | Fit.NO_HEADROOM:
            return False


def retry_after_s(head_waited_s: float, ttl_s: float) -> float:
    """When a holder should offer again what may not even wait: as late as the offer that waits longest has waited,
    and well within the term of its own."""
    return min(max(SHORTEST_RETRY_S, head_waited_s), LONGEST_RETRY_S, ttl_s / 4)
