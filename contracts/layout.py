"""What one KV block is in memory, and which blocks may be exchanged between workers."""

from __future__ import annotations

from typing import Literal

import msgspec

KvDtype = Literal["float32", "bfloat16", "float16"]

DTYPE_BYTES: dict[KvDtype, int] = {"float32": 4, "bfloat16": 2, "float16": 2}


class BlockLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Shape of one block: `[kv_head, layer, k/v, token, head_dim]`, contiguous, heads outermost.

    Heads come first so that one tensor-parallel rank's share of a block is one piece of memory too.
    """

    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_tokens: int
    dtype: KvDtype

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        return (self.num_kv_heads, self.num_layers, 2, self.block_tokens, self.head_dim)

    @property
    def token_bytes(self) -> int:
        """KV bytes of one token over all layers: `2 L n_kv d s`."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def block_bytes(self) -> int:
        return self.token_bytes * self.block_tokens

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens (ceiling division)."""
        return -(-num_tokens // self.block_tokens)


class KvIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What must be equal on both sides of a transfer for the bytes to mean the same KV."""

    #: SHA-256 over the model's config and weight files' names, sizes and headers.
    model_fingerprint: str
    layout: BlockLayout
    rope_base: float
    protocol_version: int

    def mismatch(self, other: KvIdentity) -> str | None:
        """The first field that differs, with both values; None when the two are compatible."""
        for field in self.__struct_fields__:
            ours, theirs = getattr(self, field), getattr(other, field)
            if ours != theirs:
                return f"{field}: {ours!r} here, {theirs!r} there"
        return None


#: Grows whenever a message or the block layout changes meaning.
PROTOCOL_VERSION = 2
