"""The operators on CUDA: paged attention by flash-attn 2 where it applies, the rest in torch.

**Not yet run on a GPU.** The tests marked `gpu` compare it with `TorchOps`; the attention over gathered blocks
is also tested on the CPU.

flash-attn reads the paged pool in place through strides. It takes fp16 and bf16 only, and in version 2 blocks
of a multiple of 256 tokens. Everything else (fp32, or flash-attn not installed) gathers the blocks of the batch
into padded tensors for torch's attention: memory and time grow with sequences x longest context.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch.nn import functional

from engine.ops.torch_ops import PlainLinear, TorchOps

if TYPE_CHECKING:
    from torch import Tensor

    from engine.ops.api import AttentionBatch, PackedLinear

_PAGE_MULTIPLE = 256
_FLASH_DTYPES = (torch.float16, torch.bfloat16)


class CudaOps(TorchOps):
    """See `engine.ops.api.Ops`. `reason` says how attention is computed, and why."""

    def __init__(self, device: torch.device | str = "cuda", *, flash_attn: Any = None) -> None:
        """flash_attn: the module; imported when None, and not used when that fails."""
        super().__init__(device)
        self._flash = flash_attn
        if self._flash is None:
            try:
                self._flash = importlib.import_module("flash_attn")
            except ImportError as error:
                self.reason = f"attention over gathered blocks, since flash-attn cannot be imported: {error}"
                return
        self.reason = f"flash-attn {self._flash.__version__}"

    @property
    def name(self) -> str:
        return "cuda-torch" if self._flash is None else "cuda-flash-attn"

    def linear(self, x_TI: Tensor, packed: PackedLinear, *, out_fp32: bool = False) -> Tensor:
        if not out_fp32 or x_TI.dtype == torch.float32 or not x_TI.is_cuda:
            return super().linear(x_TI, packed, out_fp32=out_fp32)
        plain = cast("PlainLinear", packed)
        # The accumulator itself, without an upcast copy of the weight.
        out_TO = torch.mm(x_TI, plain.weight_OI.t(), out_dtype=torch.float32)
        return out_TO if plain.bias_O is None else out_TO + plain.bias_O

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
        if q_THE.shape[0] == 0:
            return torch.empty_like(q_THE)
        if self._flash is None or q_THE.dtype not in _FLASH_DTYPES or pool_NKL2BE.dtype != q_THE.dtype:
            return attend_gathered(q_THE, pool_NKL2BE, layer, batch, scale=scale, window=window)
        block_tokens = pool_NKL2BE.shape[4]
        if block_tokens % _PAGE_MULTIPLE != 0:
            raise ValueError(
                f"flash-attn 2 needs blocks of a multiple of {_PAGE_MULTIPLE} tokens; "
                f"this pool's blocks hold {block_tokens}"
            )
        assert pool_NKL2BE.stride(-1) == 1, "flash-attn needs contiguous heads"
        # [block, token, kv head, head size]: a view; only the last axis need be contiguous.
        keys_NBKE = pool_NKL2BE[:, :, layer, 0].transpose(1, 2)
        values_NBKE = pool_NKL2BE[:, :, layer, 1].transpose(1, 2)
        window_size = (-1, -1) if window is None else (window - 1, 0)
        if batch.max_query_len == 1:
            out_S1HE = self._flash.flash_attn_with_kvcache(
                q_THE.unsqueeze(1),
                keys_NBKE,
                values_NBKE,
                cache_seqlens=batch.context_lens,
                block_table=batch.block_tables_SM,
                softmax_scale=scale,
                causal=True,
                window_size=window_size,
            )
            return cast("Tensor", out_S1HE).squeeze(1)
        context_starts = functional.pad(batch.context_lens.cumsum(0, dtype=torch.int32), (1, 0))
        out_THE = self._flash.flash_attn_varlen_func(
            q_THE,
            keys_NBKE,
            values_NBKE,
            cu_seqlens_q=batch.query_starts,
            cu_seqlens_k=context_starts,
            max_seqlen_q=batch.max_query_len,
            max_seqlen_k=batch.max_context_len,
            softmax_scale=scale,
            causal=True,
            window_size=window_size,
            block_table=batch.block_tables_SM,
        )
        return cast("Tensor", out_THE)


def attend_gathered(
    q_THE: Tensor,
    pool_NKL2BE: Tensor,
    layer: int,
    batch: AttentionBatch,
    *,
    scale: float,
    window: int | None,
) -> Tensor:
    """`Ops.paged_attention` by gathering and padding; launches no synchronisation with the host.

    Q queries of the longest sequence, C tokens of the longest context, rounded up to whole blocks.
    """
    _, num_kv_heads, _, _, block_tokens, head_dim = pool_NKL2BE.shape
    num_tokens, num_heads, _ = q_THE.shape
    num_sequences = batch.block_tables_SM.shape[0]
    num_blocks = -(-batch.max_context_len // block_tokens)
    context_len = num_blocks * block_tokens

    # Table entries beyond a context are unspecified: read block 0 there, which the mask hides.
    first_token_M = torch.arange(num_blocks, device=q_THE.device) * block_tokens
    used_SM = first_token_M < batch.context_lens[:, None]
    table_SM = batch.block_tables_SM[:, :num_blocks].long().where(used_SM, 0)
    kv_SMK2BE = pool_NKL2BE[table_SM, :, layer]
    kv_2SKCE = kv_SMK2BE.permute(3, 0, 2, 1, 4, 5).reshape(2, num_sequences, num_kv_heads, context_len, head_dim)

    # Whatever lies in a block beyond the context may be a NaN, which a zero weight would not hide.
    key_C = torch.arange(context_len, device=q_THE.device)
    written_SC = key_C < batch.context_lens[:, None]
    kv_2SKCE = kv_2SKCE.where(written_SC[:, None, :, None], 0).to(q_THE.dtype)

    lens_S = batch.query_starts.diff().long()
    sequence_T = torch.repeat_interleave(
        torch.arange(num_sequences, device=q_THE.device), lens_S, output_size=num_tokens
    )
    row_T = torch.arange(num_tokens, device=q_THE.device) - batch.query_starts[sequence_T]
    q_SQHE = q_THE.new_zeros(num_sequences, batch.max_query_len, num_heads, head_dim)
    q_SQHE[sequence_T, row_T] = q_THE

    # Padding queries stand at position 0, so that they see something: an empty softmax is NaN.
    position_SQ = batch.positions_T.new_zeros(num_sequences, batch.max_query_len)
    position_SQ[sequence_T, row_T] = batch.positions_T
    distance_SQC = position_SQ[:, :, None] - key_C
    visible_SQC = distance_SQC >= 0
    if window is not None:
        visible_SQC &= distance_SQC < window
    out_SHQE = functional.scaled_dot_product_attention(
        q_SQHE.transpose(1, 2),
        kv_2SKCE[0],
        kv_2SKCE[1],
        attn_mask=visible_SQC[:, None],
        scale=scale,
        enable_gqa=num_heads != num_kv_heads,
    )
    return out_SHQE.transpose(1, 2)[sequence_T, row_T]
