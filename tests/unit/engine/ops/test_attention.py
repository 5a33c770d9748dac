from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.ops.cuda_ops import attend_gathered
from tests.unit.engine.ops.cases import LAYER, Case, assert_close, cases, dense_attention

if TYPE_CHECKING:
    from torch import Tensor

    from engine.ops import Ops
    from engine.ops.cpu_ops import CpuOps

DECODES = Case(sequences=((1, 1), (1, 700), (1, 530), (1, 64)), block_tokens=16, num_kv_heads=2, group=4, head_dim=64)
MIXED = Case(sequences=((1, 611), (70, 200), (3, 3)), block_tokens=32, num_kv_heads=2, group=3, head_dim=32)


def attend(ops: Ops, case: Case) -> Tensor:
    batch, num_blocks = case.batch()
    pool_NKL2BE, _ = case.written_pool(batch, num_blocks)
    return ops.paged_attention(case.queries(), pool_NKL2BE, LAYER, batch, scale=case.scale, window=case.window)


@given(case=cases(), num_threads=st.sampled_from([1, 2]))
@settings(deadline=None, max_examples=25)
def test_cpu_kernels_agree_with_dense_attention(cpu_ops: CpuOps, case: Case, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    batch, num_blocks = case.batch()
    pool_NKL2BE, contexts = case.written_pool(batch, num_blocks)
    before = pool_NKL2BE.clone()
    q_THE = case.queries()
    out_THE = cpu_ops.paged_attention(q_THE, pool_NKL2BE, LAYER, batch, scale=case.scale, window=case.window)
    assert out_THE.dtype == case.dtype
    assert_close(out_THE, dense_attention(case, q_THE, contexts))
    torch.testing.assert_close(pool_NKL2BE, before, rtol=0, atol=0, equal_nan=True)


@given(case=cases())
@settings(deadline=None, max_examples=15)
def test_torch_agrees_with_dense_attention(torch_ops: Ops, case: Case) -> None:
    batch, num_blocks = case.batch()
    pool_NKL2BE, contexts = case.written_pool(batch, num_blocks)
    q_THE = case.queries()
    expected_THE = dense_attention(case, q_THE, contexts)
    out_THE = torch_ops.paged_attention(q_THE, pool_NKL2BE, LAYER, batch, scale=case.scale, window=case.window)
    assert_close(out_THE, expected_THE)
    out_THE = attend_gathered(q_THE, pool_NKL2BE, LAYER, batch, scale=case.scale, window=case.window)
    assert_close(out_THE, expected_THE, scale=2)


@pytest.mark.parametrize("case", [DECODES, MIXED], ids=["decodes", "mixed"])
@pytest.mark.parametrize("window", [None, 100])
def test_many_stretches_of_context_are_merged(cpu_ops: CpuOps, case: Case, window: int | None) -> None:
    """Contexts beyond what one unit of work takes, in numbers that are no multiple of anything."""
    case = replace(case, sequences=tuple((new, context + 1501) for new, context in case.sequences), window=window)
    batch, num_blocks = case.batch()
    pool_NKL2BE, contexts = case.written_pool(batch, num_blocks)
    q_THE = case.queries()
    out_THE = cpu_ops.paged_attention(q_THE, pool_NKL2BE, LAYER, batch, scale=case.scale, window=case.window)
    assert_close(out_THE, dense_attention(case, q_THE, contexts))


def test_a_chunk_of_many_query_tiles(cpu_ops: CpuOps) -> None:
    case = Case(sequences=((300, 365),), block_tokens=16, num_kv_heads=1, group=4, head_dim=64)
    batch, num_blocks = case.batch()
    pool_NKL2BE, contexts = case.written_pool(batch, num_blocks)
    q_THE = case.queries()
    out_THE = cpu_ops.paged_attention(q_THE, pool_NKL2BE, LAYER, batch, scale=case.scale, window=None)
    assert_close(out_THE, dense_attention(case, q_THE, contexts))


def test_large_scores_do_not_overflow(cpu_ops: CpuOps) -> None:
    batch, num_blocks = DECODES.batch()
    pool_NKL2BE, contexts = DECODES.written_pool(batch, num_blocks)
    q_THE = DECODES.queries() * 300
    out_THE = cpu_ops.paged_attention(q_THE, pool_NKL2BE, LAYER, batch, scale=DECODES.scale, window=None)
    torch.testing.assert_close(out_THE.double(), dense_attention(DECODES, q_THE, contexts), rtol=1e-3, atol=1e-3)


def test_the_result_of_a_sequence_does_not_depend_on_the_batch_or_the_threads(native_ops: CpuOps) -> None:
    batch, num_blocks = DECODES.batch()
    pool_NKL2BE, _ = DECODES.written_pool(batch, num_blocks)
    q_THE = DECODES.queries()

    def run(rows: slice, num_threads: int) -> Tensor:
        torch.set_num_threads(num_threads)
        first, last = rows.start, rows.stop
        part = replace(
            batch,
            positions_T=batch.positions_T[rows],
            slots_T=batch.slots_T[rows],
            query_starts=torch.arange(last - first + 1, dtype=torch.int32),
            context_lens=batch.context_lens[rows],
            block_tables_SM=batch.block_tables_SM[rows],
        )
        return native_ops.paged_attention(q_THE[rows], pool_NKL2BE, LAYER, part, scale=DECODES.scale, window=None)

    together = run(slice(0, 4), 2)
    for row in range(4):
        alone = run(slice(row, row + 1), 1)
        assert torch.equal(alone[0], together[row])


def test_strided_queries_and_no_queries(native_ops: CpuOps) -> None:
    batch, num_blocks = DECODES.batch()
    pool_NKL2BE, contexts = DECODES.written_pool(batch, num_blocks)
    wide_THE = torch.cat((DECODES.queries(), DECODES.queries()), dim=1)
    q_THE = wide_THE[:, : DECODES.num_heads]
    assert not q_THE.is_contiguous()
    out_THE = native_ops.paged_attention(q_THE, pool_NKL2BE, LAYER, batch, scale=DECODES.scale, window=None)
    assert_close(out_THE, dense_attention(DECODES, q_THE, contexts))

    nothing = replace(
        batch,
        query_starts=torch.zeros(1, dtype=torch.int32),
        context_lens=torch.zeros(0, dtype=torch.int32),
        block_tables_SM=torch.zeros((0, 0), dtype=torch.int32),
    )
    out_THE = native_ops.paged_attention(q_THE[:0], pool_NKL2BE, LAYER, nothing, scale=1.0, window=None)
    assert out_THE.shape == (0, DECODES.num_heads, DECODES.head_dim)


def test_a_block_that_does_not_exist_is_refused(native_ops: CpuOps) -> None:
    batch, num_blocks = DECODES.batch()
    pool_NKL2BE, _ = DECODES.written_pool(batch, num_blocks)
    for bad in (-1, num_blocks):
        tables_SM = batch.block_tables_SM.clone()
        tables_SM[1, 3] = bad
        with pytest.raises(AssertionError, match="block beyond the pool"):
            native_ops.paged_attention(
                DECODES.queries(),
                pool_NKL2BE,
                LAYER,
                replace(batch, block_tables_SM=tables_SM),
                scale=DECODES.scale,
                window=None,
            )
