"""Argument checks that the room shares."""

from __future__ import annotations

import math


def require_positive(**values: float) -> None:
    """Raises ValueError naming the first value that is not finite and > 0."""
    for name, value in values.items():
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and > 0, got {value}")


def require_not_negative(**values: float) -> None:
    """Raises ValueError naming the first value that is not finite and >= 0."""
    for name, value in values.items():
        if not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be finite and >= 0, got {value}")
