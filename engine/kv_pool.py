"""The paged KV pool: one tensor of blocks over memory that somebody else may also read.

Layout `[block, kv_head, layer, k/v, token, head_dim]`, contiguous: one block, over all layers, is one piece
of memory. Who owns which block is not known here; that is the ledger's.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from contracts.errors import ConfigError
from contracts.layout import BlockLayout, KvDtype

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from typing_extensions import Buffer

    from engine.model_config import ModelConfig

TORCH_DTYPES: dict[KvDtype, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


@dataclass(frozen=True, slots=True)
class KvPool:
    layout: BlockLayout
    #: `[block, kv_head, layer, k/v, token, head_dim]`.
    tensor_NKL2BE: Tensor

    @property
    def num_blocks(self) -> int:
        return self.tensor_NKL2BE.shape[0]


def block_layout(config: ModelConfig, *, block_tokens: int, dtype: KvDtype) -> BlockLayout:
    return BlockLayout(
        num_layers=config.num_layers,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        block_tokens=block_tokens,
        dtype=dtype,
    )


def blocks_in(kv_memory_bytes: int, layout: BlockLayout) -> int:
    """How many blocks fit. Raises ConfigError when not one does."""
    num_blocks = kv_memory_bytes // layout.block_bytes
    if num_blocks < 1:
        raise ConfigError(
            f"KV memory of {kv_memory_bytes} bytes holds no block of {layout.block_tokens} tokens "
            f"({layout.block_bytes} bytes)"
        )
    return num_blocks


def make_pool(
    layout: BlockLayout,
    num_blocks: int,
    *,
    device: torch.device,
    buffer_factory: Callable[[int, int], Buffer] | None = None,
) -> KvPool:
    """A pool of `num_blocks`, zeroed or as the buffer is.

    `buffer_factory(num_blocks, block_bytes)` gives writable memory of at least that size (shared memory that
    a transport reads); it stays referenced by the tensor. None: own memory on `device`.
    """
    shape = (num_blocks, *layout.shape)
    dtype = TORCH_DTYPES[layout.dtype]
    if buffer_factory is None:
        # Zeroed: a kernel may multiply values beyond a context by a weight of zero, and 0 * NaN is NaN.
        return KvPool(layout, _zeros(shape, dtype, device))
    if device.type != "cpu":
        raise ConfigError(f"a KV pool in host memory cannot serve the device {device}")
    raw = torch.frombuffer(buffer_factory(num_blocks, layout.block_bytes), dtype=torch.uint8)
    num_bytes = num_blocks * layout.block_bytes
    if raw.numel() < num_bytes:
        raise ConfigError(f"KV memory of {raw.numel()} bytes is less than the {num_bytes} of {num_blocks} blocks")
    return KvPool(layout, raw[:num_bytes].view(dtype).view(shape))


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    try:
        return torch.zeros(shape, dtype=dtype, device=device)
    except RuntimeError as error:
        num_bytes = math.prod(shape) * dtype.itemsize
        raise ConfigError(f"a KV pool of {num_bytes} bytes cannot be allocated: {error}") from error
