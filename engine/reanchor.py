"""Re-anchoring: cached keys moved to other positions without computing them again.

Keys are cached after rotation. A rotation by position p followed by one by delta is the rotation by p + delta
(RoFormer, Su et al. 2021, section 3.2.2), so the key of a token at p becomes its key at p + delta by one more rotation,
whatever p is: the same for every token of a block. Values do not depend on positions. Every supported scaling
(`engine.rope`) turns each pair of channels by an angle proportional to the position; YaRN's factor on cosines and sines
is in the cached key already and stays as it is.

Turned keys equal those that would be computed at the new positions as far as the hidden states behind them do: they
hold what their tokens saw when they were computed. Whoever takes tokens away from before them (truncation of the
oldest, CachedAttention, Gao et al. 2024, section 4.3) or puts others there (reuse of what is no prefix) keeps an
approximation, which must not be named by the key of a prefix.

Angles, sines and products are those of fp32 or finer; a result is rounded once to the keys' own dtype.

Shape legend: N blocks, K kv heads, L layers, B tokens of a block, E head size, F pairs of channels (E / 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from contracts.errors import BadRequest
from engine.kv_pool import TORCH_DTYPES

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from contracts.ids import BlockId
    from contracts.layout import BlockLayout

_KEYS = 0


# A pool made in inference mode may be written in it only.
@torch.inference_mode()
def reanchor_keys(keys: Tensor, delta: int, frequencies_F: Tensor) -> None:
    """Turns rotated keys `[..., E]`, in place, into those of the same tokens `delta` positions later.

    A negative delta moves them to the front; that no position becomes negative is the caller's to see to.
    `frequencies_F` is what `engine.rope.inverse_frequencies` gives: radians per position. Raises BadRequest where it
    does not fit the head size.
    """
    num_pairs = frequencies_F.shape[-1]
    if frequencies_F.dim() != 1 or keys.dim() < 1 or keys.shape[-1] != 2 * num_pairs:
        raise BadRequest(
            f"keys of shape {tuple(keys.shape)} cannot be turned by frequencies of shape {tuple(frequencies_F.shape)}: "
            "a head has two channels for each frequency"
        )
    if delta == 0:
        return
    # At 100,000 positions an angle of fp32 is off by 0.004; this one may come on top of a table's.
    angles_F = frequencies_F.double() * delta
    cos_F, sin_F = angles_F.cos().float(), angles_F.sin().float()
    # Rotate-half, as the operators do: channel i is turned with channel i + E / 2.
    first, second = keys[..., :num_pairs].float(), keys[..., num_pairs:].float()
    turned_first = first * cos_F - second * sin_F
    turned_second = second * cos_F + first * sin_F
    keys[..., :num_pairs] = turned_first
    keys[..., num_pairs:] = turned_second


def reanchor_blocks(pool_NKL2BE: Tensor, block_ids: Iterable[BlockId], delta: int, frequencies_F: Tensor) -> None:
    """Turns the keys of these blocks of a pool, in place, as `reanchor_keys`; a block named twice is turned twice.

    For blocks that nobody else reads: shared ones are copied first.
    """
    for block_id in block_ids:
        reanchor_keys(pool_NKL2BE[block_id, :, :, _KEYS], delta, frequencies_F)


def reanchor_bytes(block: memoryview, layout: BlockLayout, delta: int, frequencies_F: Tensor) -> None:
    """The same for one block as bytes in writable memory. Raises BadRequest where it is not one block of the layout."""
    if block.nbytes != layout.block_bytes or block.readonly:
        kind = "read-only" if block.readonly else "writable"
        raise BadRequest(
            f"a block to re-anchor has {layout.block_bytes} writable bytes, not {block.nbytes} {kind} ones"
        )
    blocks_KL2BE = torch.frombuffer(block, dtype=TORCH_DTYPES[layout.dtype]).view(layout.shape)
    reanchor_keys(blocks_KL2BE[:, :, _KEYS], delta, frequencies_F)
