"""The C function and numpy are equal to the bit, for whatever stands in a block."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.layout import BlockLayout, KvDtype
from kvstore.codecs.choice import sample_blocks
from kvstore.codecs.integer import IntegerForm
from kvstore.codecs.kernels import NativeKernels, NumpyKernels, load_library, make_kernels

if TYPE_CHECKING:
    from pathlib import Path

DTYPES: tuple[KvDtype, ...] = ("float32", "bfloat16")


def both(layout: BlockLayout, bits: int) -> tuple[NativeKernels, NumpyKernels]:
    native = make_kernels(layout, bits)
    if not isinstance(native, NativeKernels):
        pytest.skip("no C compiler here")
    return native, NumpyKernels(layout, bits)


def check_equal(layout: BlockLayout, bits: int, block: memoryview) -> None:
    native, plain = both(layout, bits)
    ours, theirs = native.quantise(block), plain.quantise(block)
    assert (ours is None) == (theirs is None)
    if ours is None or theirs is None:
        return
    for name in ("scales", "zeros", "keys", "values"):
        assert np.array_equal(getattr(ours, name), getattr(theirs, name)), name
    into, other = memoryview(bytearray(layout.block_bytes)), memoryview(bytearray(layout.block_bytes))
    native.dequantise(ours, into)
    plain.dequantise(theirs, other)
    assert into == other


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 16), (32, 16), (80, 16), (6, 3), (2, 1), (130, 5)])
def test_blocks_that_look_like_kv(dtype: KvDtype, bits: int, head_dim: int, tokens: int) -> None:
    layout = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=head_dim, block_tokens=tokens, dtype=dtype)
    for block in sample_blocks(layout, 4, random.Random(head_dim)):
        check_equal(layout, bits, block)


@given(st.sampled_from(DTYPES), st.sampled_from([4, 8]), st.integers(0, 2**32), st.integers(-45, 38), st.integers(0, 4))
def test_numbers_of_any_size(dtype: KvDtype, bits: int, seed: int, exponent: int, spread: int) -> None:
    """From subnormal ones to the largest, with neighbours of quite another size, and zeros of either sign."""
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=18, block_tokens=4, dtype=dtype)
    draw = np.random.default_rng(seed)
    sizes = np.clip(exponent + draw.integers(-spread, spread + 1, layout.shape), -45, 38)
    values = np.clip(draw.standard_normal(layout.shape) * 10.0**sizes, -3.3e38, 3.3e38).astype(np.float32)
    values[draw.random(layout.shape) < 0.1] = -0.0
    raw = values.view(np.uint32)
    block = raw.tobytes() if dtype == "float32" else (raw >> np.uint32(16)).astype(np.uint16).tobytes()
    check_equal(layout, bits, memoryview(block))


@given(st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_bytes_of_chance(dtype: KvDtype, seed: int) -> None:
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_tokens=2, dtype=dtype)
    check_equal(layout, 4, memoryview(random.Random(seed).randbytes(layout.block_bytes)))


@pytest.mark.parametrize("bits", [8, 4])
def test_frames_are_the_same_with_either(bits: int) -> None:
    layout = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=64, block_tokens=16, dtype="bfloat16")
    native, plain = both(layout, bits)
    for block in sample_blocks(layout, 3, random.Random(1)):
        parts = IntegerForm(layout, bits, native).encode(block)
        assert parts == IntegerForm(layout, bits, plain).encode(block)


def test_without_a_library_numpy_computes(tmp_path: Path) -> None:
    assert load_library(tmp_path / "missing.so") is None
    (tmp_path / "empty.so").write_bytes(b"")
    assert load_library(tmp_path / "empty.so") is None
    layout = BlockLayout(num_layers=1, num_kv_heads=1, head_dim=4, block_tokens=2, dtype="float16")
    assert isinstance(make_kernels(layout, 4), NumpyKernels)
