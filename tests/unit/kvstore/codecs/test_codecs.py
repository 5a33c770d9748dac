"""Blocks go through the codecs and come back: equal, or as near as their class allows; nothing else comes back."""

from __future__ import annotations

import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import BadRequest, ConfigError, CorruptKv
from contracts.layout import BlockLayout, KvDtype
from kvstore.codecs import CODECS, RAW, decode_block, encode_block, frame, make_codec
from kvstore.codecs.choice import sample_blocks
from kvstore.codecs.quantise import group_channels
from kvstore.codecs.values import narrow_into, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

DTYPES: tuple[KvDtype, ...] = ("float32", "bfloat16", "float16")
NAMES = ("raw", "int8", "int4", "zstd")
LEVELS = {"int8": 255, "int4": 15}


def layout(dtype: KvDtype = "bfloat16", **sizes: int) -> BlockLayout:
    given_ = {"num_layers": 3, "num_kv_heads": 2, "head_dim": 32, "block_tokens": 16, **sizes}
    return BlockLayout(dtype=dtype, **given_)


LAYOUTS = st.builds(
    layout,
    st.sampled_from(DTYPES),
    num_layers=st.integers(1, 3),
    num_kv_heads=st.integers(1, 2),
    head_dim=st.sampled_from([2, 6, 16, 80]),
    block_tokens=st.sampled_from([1, 2, 16]),
)


def encoded_and_back(block: memoryview, kind: BlockLayout, name: str) -> tuple[bytes, memoryview]:
    data = encode_block(block, kind, name)
    into = memoryview(bytearray(kind.block_bytes))
    decode_block(data, kind, into)
    return data, into


def as_block(values: NDArray[np.float32], kind: BlockLayout) -> memoryview:
    block = memoryview(bytearray(kind.block_bytes))
    narrow_into(values.copy(), block, kind)
    return block


def test_ids_stand_in_files_and_stay() -> None:
    assert {codec_id: (kind.name, kind.lossy) for codec_id, kind in CODECS.items()} == {
        0: ("raw", False),
        1: ("int8", True),
        2: ("int4", True),
        3: ("zstd", False),
    }
    for codec_id, kind in CODECS.items():
        codec = make_codec(kind.name, layout())
        assert (codec.codec_id, codec.name, codec.lossy) == (codec_id, kind.name, kind.lossy)


@given(LAYOUTS, st.integers(0, 2**32), st.sampled_from(["raw", "zstd"]))
def test_lossless_codecs_keep_every_bit(kind: BlockLayout, seed: int, name: str) -> None:
    """Of any bytes: also of those that are no numbers."""
    block = memoryview(random.Random(seed).randbytes(kind.block_bytes))
    assert encoded_and_back(block, kind, name)[1] == block


@given(LAYOUTS, st.integers(0, 2**32), st.sampled_from(["int8", "int4"]), st.sampled_from([1e-30, 1e-3, 1.0, 300.0]))
def test_lossy_codecs_err_by_half_a_step_of_the_groups_range(
    kind: BlockLayout, seed: int, name: str, width: float
) -> None:
    if kind.dtype == "float16" and width < 1e-6:
        width = 1e-3
    draw = np.random.default_rng(seed)
    values = draw.standard_normal(kind.shape, np.float32) * np.float32(width)
    # Channels of keys with a mean far from zero, as real ones have.
    values[:, :, 0, :, 0] += np.float32(50 * width)
    block = as_block(values, kind)
    _, back = encoded_and_back(block, kind, name)
    exact, near = widened(block, kind), widened(back, kind)
    heads, layers, _, tokens, head_dim = kind.shape
    channels = group_channels(head_dim)
    by_token = (heads, layers, tokens, head_dim // channels, channels)
    for side, shape, axis in ((0, (heads, layers, tokens, head_dim), -2), (1, by_token, -1)):
        given_, got = exact[:, :, side].reshape(shape), near[:, :, side].reshape(shape)
        span = np.ptp(given_, axis=axis, keepdims=True)
        largest = np.abs(given_).max(axis=axis, keepdims=True)
        # A scale is rounded up to six bits, and wide enough for a zero far from the range.
        step = np.maximum(span / (LEVELS[name] - 0.25), largest / 8000) * (1 + 1 / 32)
        rounding = {"float32": 1e-6, "bfloat16": 1 / 256, "float16": 1 / 2048}[kind.dtype]
        assert (np.abs(given_ - got) <= 0.501 * step + rounding * largest + 1e-30).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.25, 1e4])
def test_groups_without_a_range_come_back_as_they_are(dtype: KvDtype, name: str, value: float) -> None:
    kind = layout(dtype)
    block = as_block(np.full(kind.shape, value, np.float32), kind)
    _, back = encoded_and_back(block, kind, name)
    np.testing.assert_allclose(widened(back, kind), widened(block, kind), rtol=1 / 8000)


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_block_with_numbers_that_are_none_is_kept_as_it_is(name: str, wrong: float) -> None:
    kind = layout("float32")
    values = np.ones(kind.shape, np.float32)
    values[1, 2, 1, 3, 4] = wrong
    data, back = encoded_and_back(as_block(values, kind), kind, name)
    assert back == as_block(values, kind)
    assert decode_block(data, kind, back) == RAW.codec_id


def test_a_range_beyond_all_numbers_is_kept_as_it_is() -> None:
    kind = layout("bfloat16")
    values = np.zeros(kind.shape, np.float32)
    values[..., 0], values[..., 1, :] = 3e38, -3e38
    data, back = encoded_and_back(as_block(values, kind), kind, "int4")
    assert (decode_block(data, kind, back), back) == (RAW.codec_id, as_block(values, kind))


@pytest.mark.parametrize(("name", "least"), [("int4", 3.0), ("int8", 1.7)])
@pytest.mark.parametrize(("head_dim", "num_layers"), [(32, 4), (64, 12), (128, 4)])
def test_they_are_that_much_smaller_than_bfloat16(name: str, least: float, head_dim: int, num_layers: int) -> None:
    """Scales, zeros and headers counted."""
    kind = layout(head_dim=head_dim, num_layers=num_layers)
    for block in sample_blocks(kind, 3, random.Random(1)):
        assert kind.block_bytes / len(encode_block(block, kind, name)) >= least


def test_what_a_codec_does_not_make_smaller_is_kept_as_it_is() -> None:
    """One token has as many scales as numbers."""
    kind = layout(block_tokens=1, head_dim=2)
    block = as_block(np.random.default_rng(0).standard_normal(kind.shape, np.float32), kind)
    data, back = encoded_and_back(block, kind, "int8")
    assert (len(data), back) == (kind.block_bytes + frame.HEADER_BYTES, block)


def test_encoding_is_the_same_in_every_process_and_thread() -> None:
    program = (
        "import random; from hashlib import sha256; from contracts.layout import BlockLayout;"
        "from kvstore.codecs import encode_block; from kvstore.codecs.choice import sample_blocks;"
        "kind = BlockLayout(num_layers=3, num_kv_heads=2, head_dim=32, block_tokens=16, dtype='bfloat16');"
        "block = sample_blocks(kind, 1, random.Random(7))[0];"
        "print(*(sha256(encode_block(block, kind, name)).hexdigest() for name in ('int8', 'int4', 'zstd')))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", program],
            capture_output=True,
            text=True,
            check=True,
            env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": seed},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
    kind = layout()
    blocks = sample_blocks(kind, 40, random.Random(7))
    codec = make_codec("int4", kind)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(codec.encode, blocks)) == [codec.encode(block) for block in blocks]


def test_a_file_of_version_one_stays_readable() -> None:
    kind = layout("float32", num_layers=1, num_kv_heads=1, head_dim=2, block_tokens=8)
    values = np.arange(32, dtype=np.float32).reshape(kind.shape)
    into = memoryview(bytearray(kind.block_bytes))
    assert decode_block(bytes.fromhex(VERSION_ONE_INT4), kind, into) == 2
    got = np.frombuffer(into, np.float32).reshape(kind.shape)
    # Keys run over 14 in 14.75 steps, rounded up to 61/64; values over 1.
    assert np.abs(got[0, 0, 0] - values[0, 0, 0]).max() <= 61 / 128
    assert np.abs(got[0, 0, 1] - values[0, 0, 1]).max() <= 0.04


VERSION_ONE_INT4 = (
    "4b56010250000000cd54a3a1ba585cec4e2053837b1ae0680a0000003f3f3d3d3d3d3d3d3d3d0a00000074748c8c8c8c8c8c"
    "8c8c0a000000000003040405050506060a0000000004a81d92077cf166db080000000022446688baddff08000000f0f0f0f0"
    "f0f0f0f0"
)


# --- malformed ----------------------------------------------------------------------------------------


@given(LAYOUTS, st.binary(max_size=200))
def test_bytes_of_chance_are_refused(kind: BlockLayout, data: bytes) -> None:
    with pytest.raises(CorruptKv):
        decode_block(data, kind, memoryview(bytearray(kind.block_bytes)))


@given(st.data(), st.sampled_from(NAMES))
def test_a_frame_with_anything_changed_is_refused(data: st.DataObject, name: str) -> None:
    kind = layout(block_tokens=2)
    good = encode_block(sample_blocks(kind, 1, random.Random(3))[0], kind, name)
    at = data.draw(st.integers(0, len(good) - 1))
    flip = data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(good) - 1))
    flipped = good[:at] + bytes([good[at] ^ flip]) + good[at + 1 :]
    into = memoryview(bytearray(kind.block_bytes))
    for bad in (flipped, good[:cut], good + b"\0", good + good):
        with pytest.raises(CorruptKv):
            decode_block(bad, kind, into)
    assert not any(into), "a part of a bad frame was written"


@given(st.data(), st.sampled_from(NAMES))
def test_a_frame_with_a_right_checksum_around_nonsense_is_read_or_refused(data: st.DataObject, name: str) -> None:
    """As no disk makes it: nothing but CorruptKv comes of it, whatever lengths it names."""
    kind = layout(block_tokens=2)
    codec_id = make_codec(name, kind).codec_id
    _, body = frame.unpack(encode_block(sample_blocks(kind, 1, random.Random(3))[0], kind, name), kind)
    changed = bytearray(body)
    for at, byte in data.draw(st.lists(st.tuples(st.integers(0, len(body) - 1), st.integers(0, 255)), max_size=4)):
        changed[at] = byte
    cut = data.draw(st.sampled_from([0, 1, 3, len(body) - 1, len(body)]))
    into = memoryview(bytearray(kind.block_bytes))
    try:
        decode_block(frame.pack(codec_id, kind, [bytes(changed[:cut])]), kind, into)
    except CorruptKv:
        assert not any(into), "a part of a bad frame was written"


def test_frames_of_others_are_refused_by_name() -> None:
    kind = layout()
    into = memoryview(bytearray(kind.block_bytes))
    good = encode_block(sample_blocks(kind, 1, random.Random(3))[0], kind, "int4")
    with pytest.raises(CorruptKv, match="another layout"):
        decode_block(good, layout("float16"), into)
    with pytest.raises(CorruptKv, match="codec 77; known are \\[0, 1, 2, 3\\]"):
        decode_block(frame.pack(77, kind, [b"x"]), kind, into)
    with pytest.raises(CorruptKv, match="not a block of version 1"):
        decode_block(good[:2] + b"\2" + good[3:], kind, into)


def test_mistakes_of_the_caller_are_told() -> None:
    kind = layout()
    with pytest.raises(ConfigError, match="no codec 'int2'; known are: raw, int8, int4, zstd"):
        make_codec("int2", kind)
    with pytest.raises(ConfigError, match="head of 3 channels has no pairs"):
        make_codec("int4", layout(head_dim=3))
    for name in NAMES:
        with pytest.raises(BadRequest, match=f"{kind.block_bytes} bytes, not 8"):
            make_codec(name, kind).encode(memoryview(bytes(8)))
    with pytest.raises(BadRequest, match=f"{kind.block_bytes} bytes, not 8"):
        decode_block(b"", kind, memoryview(bytearray(8)))
