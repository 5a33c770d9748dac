"""The operator seam of the engine: what a device back end must provide for one decoder step.

A back end is one object with these methods. The model code (`engine.model`) calls nothing else on the
hot path, so that a new device, or CUDA graphs, or tensor parallel shards, replace this object and leave
the model alone. Nothing here knows of requests or networks.

Shape legend: T new tokens of the step (all sequences, flattened, no padding), S sequences, M blocks in the
longest block table, D hidden size, H query heads, K key/value heads, E head size, I and O the input and
output width of a linear layer, P positions of the rotary table, N blocks of the pool, L layers, B tokens
in a block.

The KV pool is one tensor `pool_NKL2BE`: `[block, kv_head, layer, k/v, token, head_dim]`, contiguous, so
that one block (all layers) is one piece of memory. Kernels read and write it in place through strides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Where each token of the step stands, and where its context lies. All tensors on the pool's device.

    Sequence `s` owns rows `[query_starts[s], query_starts[s + 1])` of the step; its last new token is
    token `context_lens[s] - 1` of the sequence; its tokens `[j * B, (j + 1) * B)` lie in block
    `block_tables[s, j]`. Entries of a table beyond the context are unspecified and never read.
    """

    #: int64, position of every new token in its sequence.
    positions_T: Tensor
    #: int64, `block id * B + offset in block` of every new token; unique.
    slots_T: Tensor
    #: int32, exclusive prefix sums of new tokens per sequence; `[S + 1]`, first 0, last T.
    query_starts: Tensor
    #: int32, tokens of each sequence that attention sees, new ones included; `[S]`.
    context_lens: Tensor
    #: int32, `[S, M]`.
    block_tables_SM: Tensor
    #: largest number of new tokens of one sequence, and largest context: host integers for launch sizes.
    max_query_len: int
    max_context_len: int


class PackedLinear(Protocol):
    """A linear layer's weights in whatever form the back end multiplies fastest."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    @property
    def num_bytes(self) -> int:
        """Bytes of weights read by one multiplication (for bandwidth figures)."""
        ...


class Ops(Protocol):
    """One device's kernels. Activations have the dtype the weights were loaded in, unless stated."""

    @property
    def name(self) -> str:
        """Shown at start and in benchmarks, e.g. `cpu-avx2`, `cpu-torch`, `cuda-flash-attn`."""
        ...

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        """Takes over a weight; the caller drops its own reference, so that it is in memory once."""
        ...

    def linear(self, x_TI: Tensor, packed: PackedLinear, *, out_fp32: bool = False) -> Tensor:
        """`x @ weight.T + bias`, accumulated in fp32. `out_fp32` keeps the accumulator (logits)."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """Root-mean-square norm over the last axis, computed in fp32, rounded like Hugging Face's:
        the normalised value is rounded to x's dtype before the weight multiplies it."""
        ...

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        """`residual += x` in place, then `rms_norm(residual)`."""
        ...

    def rope_and_write_kv(
        self,
        qkv_TX: Tensor,
        cos_sin_PE: Tensor,
        pool_NKL2BE: Tensor,
        layer: int,
        batch: AttentionBatch,
        *,
        num_heads: int,
        q_norm_E: Tensor | None,
        k_norm_E: Tensor | None,
        eps: float,
    ) -> Tensor:
        """Splits fused qkv rows, norms q and k per head where weights are given (Qwen3), rotates both by
        position (rotate-half form), writes k and v into the pool at `batch.slots_T`; returns q `[T, H, E]`.

        qkv_TX: X = (H + 2K) * E, q heads first, then k, then v; may be overwritten.
        cos_sin_PE: fp32; row p holds E/2 cosines, then E/2 sines, scaling included.
        """
        ...

    def paged_attention(
        self,
        q_THE: Tensor,
        pool_NKL2BE: Tensor,
        layer: int,
        batch: AttentionBatch,
        *,
        scale: float,
        window: int | None,
    ) -> Tensor:
        """Causal attention of the step's queries over their contexts, in place in the pool; fp32 softmax.

        A token at position p sees positions `(p - window, p]`, or all up to p when window is None.
        Mixed batches (decodes of one token beside chunks of many) are the normal case. Returns `[T, H, E]`.
        """
        ...

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        """`silu(gate) * up` for rows that hold I gate values, then I up values."""
        ...
