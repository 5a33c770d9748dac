"""Which segment is given up where there is no room, and which of its blocks are written anew.

A block is worth the number of times that it was stored or asked for, each counting half as much for every half-life
that has passed since (the "combined recency and frequency" of LRFU, Lee et al., IEEE ToC 2001, section 2: between LRU
and LFU). A half-life is not a time but a share of the tier that was written since: so it suits a tier that is
overwritten within a minute as well as one that lasts for weeks. All worths shrink alike, so that their order does not
change: the logarithm at a fixed instant is kept, and no block needs to be looked at for growing old.

Segments are cleaned as in the log-structured file system (Rosenblum and Ousterhout, SOSP'91, section 3.6): what counts
is what is lost for each byte that becomes free.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentColumns:
    """Parallel arrays, one place for each segment that may be given up."""

    num_bytes: NDArray[np.int64]
    live_bytes: NDArray[np.int64]
    #: What its pinned blocks would take elsewhere.
    pinned_bytes: NDArray[np.int64]
    #: Sum over its blocks that are not pinned, in whatever unit.
    worth: NDArray[np.float64]
    #: Grows with each new segment.
    sequence: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Victim:
    #: Place in the columns.
    index: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockColumns:
    """Parallel arrays, one place for each block of a segment."""

    length: NDArray[np.int64]
    pinned: NDArray[np.bool_]
    hits: NDArray[np.int64]
    #: Binary logarithm of the worth.
    log_worth: NDArray[np.float64]


def choose_segment(segments: SegmentColumns, *, least_gain: float) -> Victim | None:
    """The segment that costs least for what it frees; the oldest one of equals. None: pinned blocks leave less than the
    share `least_gain` of each."""
    gain_bytes = segments.num_bytes - segments.pinned_bytes
    possible = np.flatnonzero(gain_bytes >= least_gain * segments.num_bytes)
    if possible.size == 0:
        return None
    cost = segments.worth[possible] / gain_bytes[possible]
    index = int(possible[np.lexsort((segments.sequence[possible], cost))[0]])
    live_share = segments.live_bytes[index] / segments.num_bytes[index]
    return Victim(index, f"least worth of {len(segments.sequence)} segments, {live_share:.0%} of it in use")


def choose_kept(blocks: BlockColumns, *, mean_log_worth: float, budget_bytes: int) -> NDArray[np.int64]:
    """Which blocks of a segment that is given up are written anew, in the order they stand: the pinned ones, and of
    those that somebody asked for and that are worth more than blocks are on average, the best that fit into the
    budget."""
    pinned = np.flatnonzero(blocks.pinned)
    good = np.flatnonzero(~blocks.pinned & (blocks.hits > 0) & (blocks.log_worth > mean_log_worth))
    by_worth = good[np.argsort(-blocks.log_worth[good], kind="stable")]
    fitting = by_worth[np.cumsum(blocks.length[by_worth]) <= budget_bytes]
    return np.sort(np.concatenate([pinned, fitting]))
