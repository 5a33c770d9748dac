"""Who may take KV blocks of a worker next: the one rule, and the one book, that both sides of it share.

Blocks that a sequence takes when it is admitted are seen at once; those it will take while it grows are not.
Admitting until nothing is free therefore ends in preemption: everybody needs one block more, and the newest
loses all of its work. So what is admitted must leave the blocks that everything admitted takes within its next
`growth_tokens` tokens (vLLM keeps a watermark for the same reason). What follows: between two admissions nobody
is preempted before somebody has written that many tokens.

Nothing here does I/O, reads a clock or touches a block: the ledger says what is free.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from contracts.errors import InvariantBroken

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from contracts.layout import BlockLayout
    from contracts.requests import GenerateRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """What something that waits would take."""

    #: When it came to this worker, on the worker's clock: the smaller goes first.
    arrival_s: float
    #: Taken at once; > 0.
    num_blocks: int
    #: Taken within its next `growth_tokens` tokens, on this worker.
    growth_blocks: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoomView:
    """A worker's blocks as an admission sees them."""

    num_blocks: int
    #: Free, or cached and nobody's.
    available_blocks: int
    #: Sequences that were admitted to be written here and have not ended, and what they take within their next
    #: `growth_tokens` tokens.
    num_admitted: int = 0
    promised_blocks: int = 0
    #: Held by prompts read here whose reader is another worker: only that one can set them free.
    lent_blocks: int = 0
    #: A preempted answer waits for blocks.
    starving: bool = False
    #: The oldest offer that waits for blocks.
    offer: Demand | None = None
    #: The prompt at the head of the queue, where nothing but blocks holds it up.
    prompt: Demand | None = None

    @property
    def own_blocks(self) -> int:
        """Blocks that come free by this worker's own work, whatever others do."""
        return self.num_blocks - self.lent_blocks


class Fit(Enum):
    """Whether a demand can be met now; the values are metric labels."""

    #: With room to grow for it and for everything admitted.
    FITS = "fits"
    #: Nothing else is admitted here: it may take what there is.
    ALONE = "alone"
    NO_BLOCKS = "no_blocks"
    #: The blocks are there, but what runs will need them.
    NO_HEADROOM = "no_headroom"

    @property
    def fits(self) -> bool:
        return self in (Fit.FITS, Fit.ALONE)


def fit(demand: Demand, view: RoomView) -> Fit:
    """Pure. Alone, a demand is met whenever its blocks are there: else one that leaves no headroom in the whole
    pool could never run."""
    if demand.num_blocks > view.available_blocks:
        return Fit.NO_BLOCKS
    if not view.num_admitted:
        return Fit.ALONE
    left = view.available_blocks - demand.num_blocks
    return Fit.FITS if left >= view.promised_blocks + demand.growth_blocks else Fit.NO_HEADROOM


class Room:
    """The book behind `RoomView`: what is promised and lent, and who waits first on each side.

    Not thread-safe; both sides of a worker write it, each its own part.
    """

    def __init__(
        self, *, layout: BlockLayout, num_blocks: int, growth_tokens: int, available_blocks: Callable[[], int]
    ) -> None:
        """`growth_tokens`: how far ahead growth is provided for; > 0."""
        self._layout = layout
        self._num_blocks = num_blocks
        self._growth_blocks = layout.blocks_for(growth_tokens)
        self._available_blocks = available_blocks
        #: owner -> growth, of everything admitted to be written here.
        self._promised: dict[Hashable, int] = {}
        #: Sum of `_promised`.
        self._promised_blocks = 0
        self._lent_blocks = 0
        #: The parts of the view that one side sets and the other reads.
        self.starving = False
        self.offer: Demand | None = None
        self.prompt: Demand | None = None

    def __repr__(self) -> str:
        return (
            f"<Room [{self._available_blocks()} available, {self._promised_blocks} promised to "
            f"{len(self._promised)}, {self._lent_blocks} lent | {self._num_blocks} blocks]>"
        )

    def view(self) -> RoomView:
        """O(1)."""
        return RoomView(
            num_blocks=self._num_blocks,
            available_blocks=self._available_blocks(),
            num_admitted=len(self._promised),
            promised_blocks=self._promised_blocks,
            lent_blocks=self._lent_blocks,
            starving=self.starving,
            offer=self.offer,
            prompt=self.prompt,
        )

    def growth(self, request: GenerateRequest, num_held: int, *, max_context_tokens: int) -> int:
        """Blocks that a request's sequence takes within its next tokens, holding `num_held` now: none past the end
        of its answer, whose last token needs no place."""
        last = min(request.num_prompt_tokens + request.sampling.max_tokens, max_context_tokens) - 1
        return self.growth_until(last, num_held)

    def growth_until(self, num_tokens: int, num_held: int) -> int:
        """The same for a sequence that keeps `num_tokens` tokens when it ends."""
        return max(0, min(self._growth_blocks, self._layout.blocks_for(num_tokens) - num_held))

    def promise(self, owner: Hashable, growth_blocks: int) -> None:
        """`owner` is admitted and takes so many more soon; replaces what it was promised."""
        self._promised_blocks += growth_blocks - self._promised.get(owner, 0)
        self._promised[owner] = growth_blocks

    def forget(self, owner: Hashable) -> None:
        """`owner` has ended here, or was preempted. Of an unknown one: ignored."""
        self._promised_blocks -= self._promised.pop(owner, 0)

    @property
    def lent_blocks(self) -> int:
        return self._lent_blocks

    def lend(self, num_blocks: int) -> None:
        self._lent_blocks += num_blocks

    def take_back(self, num_blocks: int) -> None:
        self._lent_blocks -= num_blocks
        if self._lent_blocks < 0:
            raise InvariantBroken(f"{num_blocks} blocks taken back that were not lent; {self!r}")
