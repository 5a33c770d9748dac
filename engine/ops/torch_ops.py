"""The operators in plain torch: the reference for every other back end, and the fall-back where none fits.

Runs on any device and in any floating dtype. Correct and simple first: attention gathers one sequence's
blocks after the other and reads batch sizes back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch.nn import functional

if TYPE_CHECKING:
    from torch import Tensor

    from engine.ops.api import AttentionBatch, PackedLinear

#: rows of a weight upcast at a time where a product is wanted in fp32; bounds the transient copy.
_UPCAST_ROWS = 4096


@dataclass(frozen=True, slots=True)
class PlainLinear:
    """A weight as the checkpoint stores it."""

    weight_OI: Tensor
    bias_O: Tensor | None

    @property
    def in_features(self) -> int:
        return self.weight_OI.shape[1]

    @property
    def out_features(self) -> int:
        return self.weight_OI.shape[0]

    @property
    def num_bytes(self) -> int:
        return self.weight_OI.nbytes


class TorchOps:
    """See `engine.ops.api.Ops`."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = torch.device(device)

    @property
    def name(self) -> str:
        return f"{self._device.type}-torch"

    def pack_linear(self, weight_OI: Tensor, bias_O: Tensor | None) -> PackedLinear:
        return PlainLinear(weight_OI.contiguous(), bias_O)

    def linear(self, x_TI: Tensor, packed: PackedLinear, *, out_fp32: bool = False) -> Tensor:
        plain = cast("PlainLinear", packed)
        if not out_fp32 or x_TI.dtype == torch.float32:
            return functional.linear(x_TI, plain.weight_OI, plain.bias_O)
        return linear_fp32(x_TI, plain)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        x32_TD = x_TD.float()
        x32_TD = x32_TD * torch.rsqrt(x32_TD.pow(2).mean(-1, keepdim=True) + eps)
        return weight_D * x32_TD.to(x_TD.dtype)

    def add_rms_norm(self, x_TD: Tensor, residual_TD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        residual_TD += x_TD
        return self.rms_norm(residual_TD, weight_D, eps)

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
        _, num_kv_heads, _, _, block_tokens, head_dim = pool_NKL2BE.shape
        qkv_THE = qkv_TX.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        q_THE = qkv_THE[:, :num_heads]
        k_TKE = qkv_THE[:, num_heads : num_heads + num_kv_heads]
        v_TKE = qkv_THE[:, num_heads + num_kv_heads :]
        if q_norm_E is not None:
            q_THE = self.rms_norm(q_THE, q_norm_E, eps)
        if k_norm_E is not None:
            k_TKE = self.rms_norm(k_TKE, k_norm_E, eps)
        cos_sin_T1E = cos_sin_PE[batch.positions_T].unsqueeze(1)
        block_T, offset_T = batch.slots_T // block_tokens, batch.slots_T % block_tokens
        pool_dtype = pool_NKL2BE.dtype
        pool_NKL2BE[block_T, :, layer, 0, offset_T] = _rotate(k_TKE, cos_sin_T1E).to(pool_dtype)
        pool_NKL2BE[block_T, :, layer, 1, offset_T] = v_TKE.to(pool_dtype)
        return _rotate(q_THE, cos_sin_T1E)

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
        _, num_kv_heads, _, _, block_tokens, head_dim = pool_NKL2BE.shape
        num_heads = q_THE.shape[1]
        out_THE = torch.empty_like(q_THE)
        starts = [int(start) for start in batch.query_starts]
        for s, context_len in enumerate(int(length) for length in batch.context_lens):
            num_blocks = -(-context_len // block_tokens)
            kv_NK2BE = pool_NKL2BE[batch.block_tables_SM[s, :num_blocks].long(), :, layer]
            kv_2KCE = kv_NK2BE.permute(2, 1, 0, 3, 4).reshape(2, num_kv_heads, -1, head_dim)
            kv_2HCE = kv_2KCE[:, :, :context_len].float().repeat_interleave(num_heads // num_kv_heads, dim=1)
            q_HTE = q_THE[starts[s] : starts[s + 1]].transpose(0, 1).float()
            scores_HTC = q_HTE @ kv_2HCE[0].transpose(1, 2) * scale
            key_C = torch.arange(context_len, device=q_THE.device)
            distance_TC = batch.positions_T[starts[s] : starts[s + 1], None] - key_C
            hidden_TC = distance_TC < 0
            if window is not None:
                hidden_TC |= distance_TC >= window
            scores_HTC.masked_fill_(hidden_TC, float("-inf"))
            out_HTE = scores_HTC.softmax(-1) @ kv_2HCE[1]
            out_THE[starts[s] : starts[s + 1]] = out_HTE.transpose(0, 1)
        return out_THE

    def silu_mul(self, gate_up_T2I: Tensor) -> Tensor:
        gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
        return functional.silu(gate_TI) * up_TI


def linear_fp32(x_TI: Tensor, plain: PlainLinear) -> Tensor:
    """`linear` with an fp32 result, for weights of fewer bits."""
    x32_TI = x_TI.float()
    parts = [
        x32_TI @ plain.weight_OI[row : row + _UPCAST_ROWS].float().t()
        for row in range(0, plain.out_features, _UPCAST_ROWS)
    ]
    out_TO = torch.cat(parts, dim=1)
    return out_TO if plain.bias_O is None else out_TO + plain.bias_O.float()


def _rotate(x_THE: Tensor, cos_sin_T1E: Tensor) -> Tensor:
    """Rotate-half, computed in fp32 and rounded once to x's dtype."""
    cos, sin = cos_sin_T1E.chunk(2, dim=-1)
    a, b = x_THE.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x_THE.dtype)
