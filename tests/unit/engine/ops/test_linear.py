from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from torch import Tensor

    from engine.ops import Ops
    from engine.ops.cpu_ops import CpuOps

DTYPES = [torch.float32, torch.bfloat16]


def random_layer(
    rows: int, width: int, outputs: int, dtype: torch.dtype, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x_TI = torch.randn(rows, width, generator=generator).to(dtype)
    weight_OI = torch.randn(outputs, width, generator=generator).to(dtype)
    bias_O = torch.randn(outputs, generator=generator).to(dtype)
    return x_TI, weight_OI, bias_O


def assert_product(actual_TO: Tensor, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> None:
    """Relative to the sum of the terms' sizes, about `width`; bf16 adds the rounding of the result."""
    bias64_O = 0 if bias_O is None else bias_O.double()
    expected_TO = x_TI.double() @ weight_OI.double().t() + bias64_O
    atol = 2e-7 * (x_TI.shape[1] + 1)
    rtol = 1e-5 if actual_TO.dtype == torch.float32 else 2**-7
    torch.testing.assert_close(actual_TO.double(), expected_TO, rtol=rtol, atol=atol)


@given(
    rows=st.one_of(st.integers(1, 20), st.sampled_from([79, 80, 81, 100, 400])),
    width=st.one_of(st.integers(1, 70), st.sampled_from([256, 1023, 1024, 2065])),
    outputs=st.one_of(st.integers(1, 100), st.sampled_from([128, 190])),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    out_fp32=st.booleans(),
    num_threads=st.sampled_from([1, 2]),
)
@settings(deadline=None, max_examples=80)
def test_cpu_kernels_agree_with_fp64(
    cpu_ops: CpuOps,
    rows: int,
    width: int,
    outputs: int,
    dtype: torch.dtype,
    has_bias: bool,
    out_fp32: bool,
    num_threads: int,
) -> None:
    torch.set_num_threads(num_threads)
    x_TI, weight_OI, bias_O = random_layer(rows, width, outputs, dtype)
    packed = cpu_ops.pack_linear(weight_OI, bias_O if has_bias else None)
    out_TO = cpu_ops.linear(x_TI, packed, out_fp32=out_fp32)
    assert out_TO.dtype == (torch.float32 if out_fp32 else dtype)
    assert_product(out_TO, x_TI, weight_OI, bias_O if has_bias else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_fp32", [False, True])
def test_torch_agrees_with_fp64(torch_ops: Ops, dtype: torch.dtype, out_fp32: bool) -> None:
    x_TI, weight_OI, bias_O = random_layer(5, 96, 5000, dtype)
    out_TO = torch_ops.linear(x_TI, torch_ops.pack_linear(weight_OI, bias_O), out_fp32=out_fp32)
    assert out_TO.dtype == (torch.float32 if out_fp32 else dtype)
    # torch may round the product to bf16 before it adds the bias.
    rtol = 1e-5 if out_TO.dtype == torch.float32 else 2**-6
    expected_TO = x_TI.double() @ weight_OI.double().t() + bias_O.double()
    torch.testing.assert_close(out_TO.double(), expected_TO, rtol=rtol, atol=rtol * 10)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_its_neighbours_or_the_threads(cpu_ops: CpuOps, dtype: torch.dtype) -> None:
    x_TI, weight_OI, bias_O = random_layer(40, 2100, 90, dtype)
    packed = cpu_ops.pack_linear(weight_OI, bias_O)
    torch.set_num_threads(2)
    together_TO = cpu_ops.linear(x_TI, packed)
    torch.set_num_threads(1)
    for row in range(0, 40, 13):
        assert torch.equal(cpu_ops.linear(x_TI[row : row + 1], packed)[0], together_TO[row])


def test_fp32_activations_meet_bf16_weights(cpu_ops: CpuOps) -> None:
    for rows in (3, 90):
        x_TI, weight_OI, bias_O = random_layer(rows, 300, 70, torch.float32)
        weight_OI, bias_O = weight_OI.bfloat16(), bias_O.bfloat16()
        out_TO = cpu_ops.linear(x_TI, cpu_ops.pack_linear(weight_OI, bias_O))
        assert out_TO.dtype == torch.float32
        assert_product(out_TO, x_TI, weight_OI, bias_O)


def test_rows_that_torch_takes_over(native_ops: CpuOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native_ops, "_torch_from_rows", {torch.float32: 48})
    x_TI, weight_OI, bias_O = random_layer(50, 64, 32, torch.float32)
    packed = native_ops.pack_linear(weight_OI, bias_O)
    assert_product(native_ops.linear(x_TI, packed), x_TI, weight_OI, bias_O)


def test_no_rows_and_strided_inputs(native_ops: CpuOps) -> None:
    x_TI, weight_OI, bias_O = random_layer(8, 64, 32, torch.float32)
    packed = native_ops.pack_linear(weight_OI.t().contiguous().t(), bias_O)
    assert native_ops.linear(x_TI[:0], packed).shape == (0, 32)
    assert_product(native_ops.linear(x_TI[::2], packed), x_TI[::2], weight_OI, bias_O)


def test_the_weight_is_in_memory_once(native_ops: CpuOps) -> None:
    _, weight_OI, _ = random_layer(1, 64, 32, torch.bfloat16)
    packed = native_ops.pack_linear(weight_OI, None)
    assert packed.num_bytes == weight_OI.nbytes == 64 * 32 * 2
    assert (packed.in_features, packed.out_features) == (64, 32)
    weight_OI.fill_(1)
    out_TO = native_ops.linear(torch.ones(1, 64, dtype=torch.bfloat16), packed)
    assert torch.equal(out_TO, torch.full((1, 32), 64, dtype=torch.bfloat16))


def test_other_dtypes_are_refused_by_name(native_ops: CpuOps) -> None:
    with pytest.raises(ValueError, match=r"not torch\.float16"):
        native_ops.pack_linear(torch.ones(2, 2, dtype=torch.float16), None)
