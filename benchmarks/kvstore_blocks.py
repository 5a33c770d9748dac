"""What the parts of `benchmarks.kvstore` measure with: blocks of the 88 M parameter shape, and prefixes of them."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.kvtransfer_handoff import IDENTITY
from kvstore.block_keys import block_keys, root_key

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "BLOCK_TOKENS", "IDENTITY", "PREFIX_BLOCKS", "PREFIX_TOKENS", "kv_like", "prefix_keys"]

BLOCK_BYTES = IDENTITY.layout.block_bytes
BLOCK_TOKENS = IDENTITY.layout.block_tokens
#: Nine tenths of a prompt of 2,000 tokens, and its full blocks.
PREFIX_TOKENS = 1800
PREFIX_BLOCKS = PREFIX_TOKENS // BLOCK_TOKENS


def prefix_keys(number: int) -> tuple[bytes, ...]:
    """Of the blocks of one prefix; other numbers, other keys."""
    rng = random.Random(number)
    tokens = [rng.randrange(8192) for _ in range(PREFIX_TOKENS)]
    return tuple(block_keys(root_key(IDENTITY, "benchmark"), tokens, BLOCK_TOKENS))


def kv_like(num_blocks: int, seed: int) -> NDArray[np.uint8]:
    """Bytes by block that no disk and no page cache can make smaller: bfloat16 of a normal distribution."""
    rng = np.random.default_rng(seed)
    # The upper halves of float32 are bfloat16.
    values = rng.standard_normal((num_blocks, BLOCK_BYTES // 2), np.float32)
    return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
