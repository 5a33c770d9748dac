"""What each entry is worth: pure functions over columns. The lowest goes first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvstore.eviction.columns import NOT_NEEDED
from kvstore.eviction.reuse import ages, classes

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from kvstore.eviction.columns import Columns, Rows

    Scores = NDArray[np.float64]
    Score = Callable[[Columns, Rows, float, "Learned"], Scores]


@dataclass(frozen=True, slots=True)
class Learned:
    """What a tier has seen so far."""

    #: Age after which a use counts half.
    half_life_s: float
    #: Hits per second of a block kept, by class and age: see `kvstore.eviction.reuse`.
    densities: Scores


def lru(columns: Columns, rows: Rows, now_s: float, learned: Learned) -> Scores:
    """When it was used last."""
    return columns.last_used_s[rows]


def lfu_aged(columns: Columns, rows: Rows, now_s: float, learned: Learned) -> Scores:
    """How often it was used, each use counting half after `half_life_s`; as a logarithm, which old ones do not
    underflow in."""
    idle_s = now_s - columns.last_used_s[rows]
    scores: Scores = np.log2(columns.aged_uses[rows]) - idle_s / learned.half_life_s
    return scores


def cost_aware(columns: Columns, rows: Rows, now_s: float, learned: Learned) -> Scores:
    """Seconds of computing that a byte is expected to save each second that it is kept: the probability of reuse
    per second (`reuse.densities`) times what it costs to compute the block again, by its size."""
    age = ages(now_s - columns.last_used_s[rows])
    scores: Scores = learned.densities[classes(columns.hits[rows], columns.is_inner[rows]), age]
    scores *= columns.recompute_s[rows]
    scores /= columns.size_bytes[rows]
    return scores


def scheduler_aware(columns: Columns, rows: Rows, now_s: float, learned: Learned) -> Scores:
    """What no waiting request needs goes first, in the order of `cost_aware`; then what is needed latest
    (CachedAttention, ATC'24, section 3.3)."""
    values = cost_aware(columns, rows, now_s, learned)
    needs = columns.need[rows]
    # Both orders are kept: the first in [0, 1), the second above 1.
    return np.where(needs == NOT_NEEDED, values / (1.0 + values), 1.0 + 1.0 / (2.0 + needs))
