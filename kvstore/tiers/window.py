"""Which of the prompts that wait at the workers are worth bringing from disk now: the look-ahead window.

CachedAttention (ATC'24, section 3.3): as many of the next sessions as fit into memory, `L_pw = C_mem / S_kv`.
"""

from __future__ import annotations

from itertools import zip_longest
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def blocks_ahead(windows: Sequence[Sequence[tuple[bytes, ...]]], most_blocks: int) -> list[tuple[bytes, ...]]:
    """Of the prompts that wait, by worker with the next one first, those whose blocks fit into so many; the first of
    each worker before the second of any. Blocks that several share count once. The last may be cut. Pure."""
    chosen: list[tuple[bytes, ...]] = []
    seen: set[bytes] = set()
    for rank in zip_longest(*windows):
        for keys in rank:
            if keys is None:
                continue
            new = [key for key in keys if key not in seen]
            room = most_blocks - len(seen)
            if len(new) > room:
                # Blocks of a prefix are worth nothing without those before them.
                num_shared = len(keys) - len(new)
                keys = keys[: num_shared + room]
            if keys:
                chosen.append(keys)
                seen.update(keys)
            if len(seen) >= most_blocks:
                return chosen
    return chosen
