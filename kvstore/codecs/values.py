"""A block's numbers as fp32, and back: numpy knows no bfloat16."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from contracts.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from contracts.layout import BlockLayout, KvDtype

#: As they lie in memory; a bfloat16 is the upper half of the float32 of the same value.
_STORED: dict[KvDtype, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}

_MAX_FLOAT16 = float(np.finfo(np.float16).max)


def check_size(block: memoryview, layout: BlockLayout) -> None:
    """Raises BadRequest where `block` is not one block of this layout."""
    if block.nbytes != layout.block_bytes:
        raise BadRequest(f"a block has {layout.block_bytes} bytes, not {block.nbytes}")


def widened(block: memoryview, layout: BlockLayout) -> NDArray[np.float32]:
    """fp32 `[kv_head, layer, k/v, token, head_dim]`, exactly the numbers of the block; may share its memory."""
    stored: NDArray[Any] = np.frombuffer(block, _STORED[layout.dtype]).reshape(layout.shape)
    if layout.dtype != "bfloat16":
        return np.asarray(stored, np.float32)
    wide = np.asarray(stored, np.uint32)
    wide <<= np.uint32(16)
    return wide.view(np.float32)


def narrow_into(values: NDArray[np.float32], into: memoryview, layout: BlockLayout) -> None:
    """Writes finite `values` to `into`, each rounded to the nearest number of the layout's dtype; ties, for bfloat16,
    away from zero. What is beyond a float16 becomes its largest number. Overwrites `values`.
    """
    target: NDArray[Any] = np.frombuffer(into, _STORED[layout.dtype]).reshape(layout.shape)
    if layout.dtype == "bfloat16":
        bits = values.view(np.uint32)
        bits += np.uint32(0x8000)
        np.copyto(target, values.view("<u2")[..., 1::2])
        return
    if layout.dtype == "float16":
        np.clip(values, -_MAX_FLOAT16, _MAX_FLOAT16, out=values)
    np.copyto(target, values, casting="same_kind")
