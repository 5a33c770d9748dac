"""Hints as they travel, and as arrays."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import BadRequest
from kvstore.block_keys import HINT_BYTES

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Hints = NDArray[np.uint64]


def as_hints(keys: bytes, field: str) -> Hints:
    """Eight bytes for each hint, as a read-only array over the same memory. Raises BadRequest naming the field."""
    if len(keys) % HINT_BYTES:
        raise BadRequest(f"{field} has {len(keys)} bytes; each hint has {HINT_BYTES}", param=field)
    return np.frombuffer(keys, "<u8").astype(np.uint64, copy=False)
