from __future__ import annotations

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from engine.ops.cuda_ops import CudaOps
from tests.unit.engine.ops.cases import LAYER, Case, assert_close, dense_attention

MIXED = Case(
    sequences=((1, 611), (70, 200), (3, 3)),
    block_tokens=256,
    num_kv_heads=2,
    group=4,
    head_dim=64,
    dtype=torch.bfloat16,
)
DECODES = Case(
    sequences=((1, 611), (1, 1)), block_tokens=256, num_kv_heads=2, group=4, head_dim=64, dtype=torch.bfloat16
)


class RecordingFlash(SimpleNamespace):
    """Stands for flash-attn where it cannot run: records the arguments, returns the queries."""

    __version__ = "2.recorded"

    def flash_attn_with_kvcache(self, q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.called, self.args, self.options = "kvcache", args, options
        return q

    def flash_attn_varlen_func(self, q: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        self.called, self.args, self.options = "varlen", args, options
        return q


def recorded(case: Case, *, window: int | None) -> RecordingFlash:
    flash = RecordingFlash()
    ops = CudaOps("cpu", flash_attn=flash)
    batch, num_blocks = case.batch()
    pool_NKL2BE, _ = case.written_pool(batch, num_blocks)
    out_THE = ops.paged_attention(case.queries(), pool_NKL2BE, LAYER, batch, scale=0.5, window=window)
    assert out_THE.shape == (case.num_tokens, case.num_heads, case.head_dim)
    keys_NBKE, values_NBKE = flash.args
    assert keys_NBKE.shape == (num_blocks, case.block_tokens, case.num_kv_heads, case.head_dim)
    assert torch.equal(keys_NBKE[1, 2, 1].isnan(), pool_NKL2BE[1, 1, LAYER, 0, 2].isnan())
    assert keys_NBKE.stride() == values_NBKE.stride()
    assert keys_NBKE.stride(-1) == 1
    assert keys_NBKE.data_ptr() == pool_NKL2BE[0, 0, LAYER, 0].data_ptr(), "in place"
    assert flash.options["causal"]
    assert flash.options["softmax_scale"] == 0.5
    return flash


def test_decodes_go_to_the_decode_kernel() -> None:
    flash = recorded(DECODES, window=None)
    assert flash.called == "kvcache"
    assert flash.options["window_size"] == (-1, -1)
    assert flash.options["cache_seqlens"].tolist() == [611, 1]


def test_chunks_go_to_the_varlen_kernel() -> None:
    flash = recorded(MIXED, window=128)
    assert flash.called == "varlen"
    assert flash.options["window_size"] == (127, 0)
    assert flash.options["cu_seqlens_q"].tolist() == [0, 1, 71, 74]
    assert flash.options["cu_seqlens_k"].tolist() == [0, 611, 811, 814]
    assert (flash.options["max_seqlen_q"], flash.options["max_seqlen_k"]) == (70, 611)


def test_small_blocks_are_refused_with_both_sizes() -> None:
    ops = CudaOps("cpu", flash_attn=RecordingFlash())
    case = Case(sequences=((1, 5),), block_tokens=16, num_kv_heads=1, group=1, head_dim=64, dtype=torch.bfloat16)
    batch, num_blocks = case.batch()
    pool_NKL2BE, _ = case.written_pool(batch, num_blocks)
    with pytest.raises(ValueError, match=r"multiple of 256 tokens.*hold 16"):
        ops.paged_attention(case.queries(), pool_NKL2BE, LAYER, batch, scale=1.0, window=None)


def test_without_flash_attn_the_reason_is_stated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    ops = CudaOps("cpu")
    assert ops.name == "cuda-torch"
    assert "flash-attn cannot be imported" in ops.reason


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", [MIXED, DECODES], ids=["mixed", "decodes"])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_on_the_device(case: Case, window: int | None) -> None:
    case = replace(case, window=window)
    ops = CudaOps()
    batch, num_blocks = case.batch()
    pool_NKL2BE, contexts = case.written_pool(batch, num_blocks)
    on_device = replace(
        batch,
        positions_T=batch.positions_T.cuda(),
        slots_T=batch.slots_T.cuda(),
        query_starts=batch.query_starts.cuda(),
        context_lens=batch.context_lens.cuda(),
        block_tables_SM=batch.block_tables_SM.cuda(),
    )
    q_THE = case.queries()
    out_THE = ops.paged_attention(q_THE.cuda(), pool_NKL2BE.cuda(), LAYER, on_device, scale=case.scale, window=window)
    assert_close(out_THE.cpu(), dense_attention(case, q_THE, contexts), scale=2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_logits_on_the_device_are_fp32() -> None:
    ops = CudaOps()
    x_TI, weight_OI = torch.randn(4, 64).bfloat16(), torch.randn(96, 64).bfloat16()
    out_TO = ops.linear(x_TI.cuda(), ops.pack_linear(weight_OI.cuda(), None), out_fp32=True)
    assert out_TO.dtype == torch.float32
    torch.testing.assert_close(out_TO.cpu().double(), x_TI.double() @ weight_OI.double().t(), rtol=1e-4, atol=1e-4)
