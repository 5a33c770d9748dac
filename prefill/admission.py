"""Which prompts wait, which are computed, and which are refused: pure decisions with their reasons.

A prompt read for another worker holds its blocks until that worker took them. These handoffs have a budget, so
that a slow reader stops the computing before it has stopped everything else: what waits then waits as token ids.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from engine.room import Demand, Fit, RoomView, fit
from prefill.ordering import QueueRules

if TYPE_CHECKING:
    from contracts.layout import BlockLayout
    from contracts.messages import PrefixPlan

#: What a refused client is told: at least, and at most.
SHORTEST_RETRY_S = 1.0
LONGEST_RETRY_S = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefillLimits:
    #: Prompts accepted and not yet admitted; the next one is refused.
    max_waiting: int = 512
    #: Tokens of these, as a multiple of what the whole pool holds. One prompt may always wait.
    max_waiting_pools: float = 16.0
    #: Part of the pool that may hold KV which was read and not taken: beyond it no prompt is admitted for
    #: another worker. In (0, 0.5]: two workers that read for each other can then always take.
    handoff_share: float = 0.5
    #: Prompts in that KV.
    max_handoffs: int = 256
    #: In which order prompts are admitted.
    queue: QueueRules = field(default_factory=QueueRules)

    def __post_init__(self) -> None:
        if not 0 < self.handoff_share <= 0.5:
            raise ValueError(f"handoff_share must be in (0, 0.5]: {self.handoff_share}")

    def handoff_blocks(self, num_blocks: int) -> int:
        """Blocks of that part, of a pool of so many."""
        return max(1, int(self.handoff_share * num_blocks))


class PromptVerdict(Enum):
    """Whether the prompt at the head of the queue is admitted; the values are metric labels."""

    ADMIT = "admit"
    #: A preempted answer comes first.
    STARVING = "starving"
    #: An offer that came earlier waits for blocks.
    OLDER_OFFER = "older_offer"
    #: Too much KV waits for its readers.
    HANDOFFS_FULL = "handoffs_full"
    NO_BLOCKS = "no_blocks"
    NO_HEADROOM = "no_headroom"


@dataclass(frozen=True, slots=True, kw_only=True)
class Handoffs:
    """KV read for other workers, and what of it is allowed."""

    #: Read whole and not taken.
    untaken_blocks: int
    untaken_count: int
    #: Blocks of the budget.
    budget_blocks: int
    max_count: int
    #: This worker writes answers too. Then prompts being read count as well, so that what waits for others
    #: never takes more than the budget from what waits for nobody.
    is_shared: bool
    #: Blocks that the prompt would add to those lent; None: all that it takes.
    more_blocks: int | None = None


def reads_enough(unread_tokens: int, ahead_tokens: int | None) -> bool:
    """Whether what is admitted and not yet part of a step fills the next step: then nobody else is admitted, so that
    whoever comes meanwhile can still go first. Both in tokens; `ahead_tokens` None: never. Pure."""
    return ahead_tokens is not None and unread_tokens >= ahead_tokens


def handoffs_full(demand: Demand, handoffs: Handoffs, lent_blocks: int) -> bool:
    """Whether a prompt for another worker has to wait until some are taken. Pure."""
    if handoffs.untaken_count >= handoffs.max_count or handoffs.untaken_blocks >= handoffs.budget_blocks:
        return True
    more_blocks = demand.num_blocks if handoffs.more_blocks is None else handoffs.more_blocks
    return handoffs.is_shared and lent_blocks + more_blocks > handoffs.budget_blocks


def admit(demand: Demand, view: RoomView, handoffs: Handoffs | None) -> PromptVerdict:
    """Decides about the prompt at the head; `handoffs` is None where this worker writes the answer itself. Pure.

    An older offer goes first: its KV holds blocks elsewhere. It waits for nothing that this prompt could give.
    """
    if view.starving:
        return PromptVerdict.STARVING
    if view.offer is not None and view.offer.arrival_s < demand.arrival_s:
        return PromptVerdict.OLDER_OFFER
    if handoffs is not None and handoffs_full(demand, handoffs, view.lent_blocks):
        return PromptVerdict.HANDOFFS_FULL
    match fit(demand, view):
        case Fit.FITS | Fit.ALONE:
            return PromptVerdict.ADMIT
        case Fit.NO_BLOCKS:
            return PromptVerdict.NO_BLOCKS
        case Fit.NO_HEADROOM:
            return PromptVerdict.NO_HEADROOM


def queue_full(
    limits: PrefillLimits, layout: BlockLayout, *, num_blocks: int, waiting: int, waiting_tokens: int, num_tokens: int
) -> str | None:
    """Why a prompt of `num_tokens` may not even wait, with numbers; None when it may. Pure."""
    if waiting >= limits.max_waiting:
        return f"{waiting} prompts waiting, the limit"
    most_tokens = int(limits.max_waiting_pools * num_blocks * layout.block_tokens)
    if waiting and waiting_tokens + num_tokens > most_tokens:
        return f"{waiting_tokens} prompt tokens waiting, {num_tokens} more would pass the limit of {most_tokens}"
    return None


def retry_after_s(head_waited_s: float) -> float:
    """When a refused client should ask again: a queue is as long as its head has waited (Little's law)."""
    return min(LONGEST_RETRY_S, max(SHORTEST_RETRY_S, head_waited_s))


def blocks_to_fetch(plan: PrefixPlan, *, num_local: int, most_blocks: int) -> int:
    """Up to which block a prompt's beginning is fetched from `plan.source`; 0: it is not. Pure.

    `num_local` leading blocks stand here by now, maybe more than when the coordinator decided: what is left of the
    gain then must be at least half of what it decided for. Of the prompt at most `most_blocks` can be used.
    """
    stop = min(plan.source_blocks, most_blocks)
    gain, planned_gain = stop - num_local, stop - min(plan.local_blocks, stop)
    if plan.source is None or gain <= 0 or 2 * gain < planned_gain:
        return 0
    return stop


def may_fetch(num_blocks: int, view: RoomView) -> bool:
    """Whether a fetch may take so many of the available blocks until it ends. Pure.

    What is admitted keeps its room to grow, and nothing that waits for blocks is made to wait for those of a fetch: a
    large prompt at the head of the queue would else see one fetch after the other take what comes free.
    """
    if view.starving or view.offer is not None:
        return False
    kept_blocks = view.promised_blocks
    if view.prompt is not None:
        kept_blocks += view.prompt.num_blocks + view.prompt.growth_blocks
    return num_blocks + kept_blocks <= view.available_blocks
