"""What fetches from each holder take, learned from those that have come: seconds over blocks, a line for each holder.

Least squares over the latest fetches, older ones fading. Where nothing tells the constant of the line from its slope
(all fetches were of one size) the smaller of the two readings counts: whoever plans by it rather expects a fetch too
soon than too late.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from contracts.ids import WorkerId

#: So much of its weight keeps a fetch with each later one from the same holder.
FADE = 0.85
#: Fetches before anything is said.
LEAST_FETCHES = 2
#: Holders that are remembered, those last fetched from.
MAX_HOLDERS = 64
#: Spread of sizes, as a share of their mean squared, below which they count as one size.
_ONE_SIZE = 0.01


@dataclass(slots=True)
class _Sums:
    """Faded, over fetches: 1, blocks, seconds, blocks squared, blocks times seconds."""

    count: int = 0
    weight: float = 0.0
    blocks: float = 0.0
    seconds: float = 0.0
    squares: float = 0.0
    products: float = 0.0

    def add(self, num_blocks: int, seconds: float) -> None:
        self.count += 1
        self.weight = FADE * self.weight + 1.0
        self.blocks = FADE * self.blocks + num_blocks
        self.seconds = FADE * self.seconds + seconds
        self.squares = FADE * self.squares + num_blocks * num_blocks
        self.products = FADE * self.products + num_blocks * seconds

    def line_s(self, num_blocks: int) -> float:
        mean_blocks, mean_s = self.blocks / self.weight, self.seconds / self.weight
        spread = self.squares / self.weight - mean_blocks**2
        if spread <= _ONE_SIZE * mean_blocks**2:
            return mean_s * min(1.0, num_blocks / mean_blocks)
        slope_s = (self.products / self.weight - mean_blocks * mean_s) / spread
        # Neither the slope nor the constant is negative.
        slope_s = min(max(slope_s, 0.0), mean_s / mean_blocks)
        return mean_s + slope_s * (num_blocks - mean_blocks)


class FetchRates:
    """Reads no clock. O(1)."""

    def __init__(self) -> None:
        self._sums: OrderedDict[WorkerId, _Sums] = OrderedDict()

    def observe(self, holder: WorkerId, num_blocks: int, seconds: float) -> None:
        """A fetch of `num_blocks` > 0 blocks took so long, from the question to the last block."""
        self._sums.setdefault(holder, _Sums()).add(num_blocks, seconds)
        self._sums.move_to_end(holder)
        if len(self._sums) > MAX_HOLDERS:
            self._sums.popitem(last=False)

    def expected_s(self, holder: WorkerId, num_blocks: int) -> float | None:
        """What a fetch of so many blocks takes, never less for more of them; None: not known."""
        sums = self._sums.get(holder)
        if sums is None or sums.count < LEAST_FETCHES:
            return None
        return sums.line_s(num_blocks)
