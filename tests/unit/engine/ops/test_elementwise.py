from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from tests.unit.engine.ops.cases import LAYER, Case, assert_close, cases

if TYPE_CHECKING:
    from torch import Tensor

    from engine.ops import Ops
    from engine.ops.cpu_ops import CpuOps

shapes = st.tuples(st.sampled_from([1, 2, 5, 300]), st.one_of(st.integers(1, 100), st.sampled_from([512, 1000])))
dtypes = st.sampled_from([torch.float32, torch.bfloat16])
EPS = 1e-5


def hugging_face_norm(x: Tensor, weight: Tensor) -> Tensor:
    x32 = x.to(torch.float32)
    x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + EPS)
    return weight * x32.to(x.dtype)


def hugging_face_rope(x_THE: Tensor, cos_TE: Tensor, sin_TE: Tensor) -> Tensor:
    half = x_THE.shape[-1] // 2
    rotated = torch.cat((-x_THE[..., half:], x_THE[..., :half]), dim=-1)
    return x_THE * cos_TE[:, None] + rotated * sin_TE[:, None]


@given(shape=shapes, dtype=dtypes, num_threads=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_norms(cpu_ops: CpuOps, torch_ops: Ops, shape: tuple[int, int], dtype: torch.dtype, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    x_TD, residual_TD = torch.randn(2, *shape).to(dtype)
    weight_D = torch.randn(shape[1]).to(dtype)
    for ops in (cpu_ops, torch_ops):
        assert_close(ops.rms_norm(x_TD, weight_D, EPS), hugging_face_norm(x_TD, weight_D))
        sums_TD = residual_TD.clone()
        out_TD = ops.add_rms_norm(x_TD, sums_TD, weight_D, EPS)
        assert torch.equal(sums_TD, residual_TD + x_TD)
        assert_close(out_TD, hugging_face_norm(residual_TD + x_TD, weight_D))


@given(shape=shapes, dtype=dtypes, num_threads=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=30)
def test_silu_mul(
    cpu_ops: CpuOps, torch_ops: Ops, shape: tuple[int, int], dtype: torch.dtype, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    gate_up_T2I = (torch.randn(shape[0], 2 * shape[1]) * 20).to(dtype)
    gate_TI, up_TI = gate_up_T2I.chunk(2, dim=-1)
    for ops in (cpu_ops, torch_ops):
        assert_close(ops.silu_mul(gate_up_T2I), functional.silu(gate_TI) * up_TI)


@given(case=cases(), has_norms=st.booleans(), num_threads=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=25)
def test_rope_and_write_kv(cpu_ops: CpuOps, torch_ops: Ops, case: Case, has_norms: bool, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    batch, num_blocks = case.batch()
    generator = case.generator()
    width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    qkv_TX = torch.randn(case.num_tokens, width, generator=generator).to(case.dtype)
    angles_PE2 = torch.rand(batch.max_context_len, case.head_dim // 2, generator=generator) * 7
    cos_sin_PE = torch.cat((angles_PE2.cos(), angles_PE2.sin()), dim=-1)
    weights = torch.randn(2, case.head_dim, generator=generator).to(case.dtype)
    q_norm_E, k_norm_E = weights if has_norms else (None, None)

    # The long way, in fp32 after the norms.
    heads_THE = qkv_TX.view(case.num_tokens, -1, case.head_dim)
    first_v = case.num_heads + case.num_kv_heads
    q_THE, k_TKE, v_TKE = heads_THE[:, : case.num_heads], heads_THE[:, case.num_heads : first_v], heads_THE[:, first_v:]
    if q_norm_E is not None and k_norm_E is not None:
        q_THE, k_TKE = hugging_face_norm(q_THE, q_norm_E), hugging_face_norm(k_TKE, k_norm_E)
    cos_TE, sin_TE = (part[batch.positions_T].repeat(1, 2) for part in (angles_PE2.cos(), angles_PE2.sin()))
    expected_q_THE = hugging_face_rope(q_THE.float(), cos_TE, sin_TE)
    expected_k_TKE = hugging_face_rope(k_TKE.float(), cos_TE, sin_TE)

    for ops in (cpu_ops, torch_ops):
        pool_NKL2BE = case.empty_pool(num_blocks)
        out_THE = ops.rope_and_write_kv(
            qkv_TX.clone(),
            cos_sin_PE,
            pool_NKL2BE,
            LAYER,
            batch,
            num_heads=case.num_heads,
            q_norm_E=q_norm_E,
            k_norm_E=k_norm_E,
            eps=EPS,
        )
        assert out_THE.dtype == case.dtype
        assert_close(out_THE, expected_q_THE)
        blocks_T, offsets_T = batch.slots_T // case.block_tokens, batch.slots_T % case.block_tokens
        assert_close(pool_NKL2BE[blocks_T, :, LAYER, 0, offsets_T], expected_k_TKE)
        assert torch.equal(pool_NKL2BE[blocks_T, :, LAYER, 1, offsets_T], v_TKE)
        pool_NKL2BE[blocks_T, :, LAYER, :, offsets_T] = float("nan")
        assert pool_NKL2BE.isnan().all(), "wrote where no new token belongs"


def test_a_slot_or_position_that_does_not_exist_is_refused(native_ops: CpuOps) -> None:
    case = Case(sequences=((3, 3),), block_tokens=8, num_kv_heads=1, group=1, head_dim=8)
    batch, num_blocks = case.batch()
    pool_NKL2BE = case.empty_pool(num_blocks)
    bad_slots_T, bad_positions_T = batch.slots_T.clone(), batch.positions_T.clone()
    bad_slots_T[1] = num_blocks * 8
    bad_positions_T[2] = 3
    for bad in (replace(batch, slots_T=bad_slots_T), replace(batch, positions_T=bad_positions_T)):
        with pytest.raises(AssertionError, match="beyond"):
            native_ops.rope_and_write_kv(
                torch.ones(3, 24),
                torch.ones(3, 8),
                pool_NKL2BE,
                LAYER,
                bad,
                num_heads=1,
                q_norm_E=None,
                k_norm_E=None,
                eps=EPS,
            )
    assert pool_NKL2BE.isnan().all()


def test_no_rows_and_strided_inputs(native_ops: CpuOps, torch_ops: Ops) -> None:
    x_TD, residual_TD, weight_D = torch.randn(6, 32), torch.randn(6, 32), torch.randn(32)
    assert native_ops.rms_norm(x_TD[:0], weight_D, EPS).shape == (0, 32)
    assert native_ops.silu_mul(x_TD[:0]).shape == (0, 16)
    strided_TD = torch.randn(6, 64)[:, ::2]
    assert_close(native_ops.rms_norm(strided_TD, weight_D, EPS), torch_ops.rms_norm(strided_TD, weight_D, EPS))
    assert_close(native_ops.silu_mul(strided_TD), torch_ops.silu_mul(strided_TD))
    with pytest.raises(AssertionError, match="in place"):
        native_ops.add_rms_norm(x_TD, strided_TD, weight_D, EPS)
    before_TD = x_TD.clone()
    native_ops.add_rms_norm(x_TD, residual_TD, weight_D, EPS)
    assert torch.equal(x_TD, before_TD)


def test_silu_of_extremes_is_finite(cpu_ops: CpuOps) -> None:
    gate_I = torch.tensor([-1e4, -100.0, -88.0, 0.0, 88.0, 1e4] * 10)
    out_TI = cpu_ops.silu_mul(torch.cat((gate_I, torch.ones(60)))[None])
    torch.testing.assert_close(out_TI[0], functional.silu(gate_I), rtol=1e-6, atol=1e-30)


def test_bf16_rounding_and_nan_are_those_of_torch(cpu_ops: CpuOps) -> None:
    """Sums of bf16 values hit every way to round; a NaN stays a NaN."""
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(64, 67, generator=generator).bfloat16()
    residual_TD = (torch.randn(64, 67, generator=generator) * 0.01).bfloat16()
    x_TD[3, 5] = float("nan")
    x_TD[4, 66] = float("inf")
    expected_TD = residual_TD + x_TD
    cpu_ops.add_rms_norm(x_TD, residual_TD, torch.ones(67, dtype=torch.bfloat16), EPS)
    torch.testing.assert_close(residual_TD, expected_TD, rtol=0, atol=0, equal_nan=True)
