"""Bisection, for parameters that have no closed form."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


def growing_root(function: Callable[[float], float], low: float, high: float) -> float:
    """Where a growing function crosses 0 between `low` and `high`."""
    for _ in range(60):
        middle = (low + high) / 2
        if function(middle) < 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2
