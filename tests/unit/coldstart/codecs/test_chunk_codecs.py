"""Chunks of weights made smaller: bit for bit back, whatever they hold; what is damaged is found."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.codecs.planes import ITEM_BYTES, NativePlanes, NumpyPlanes, load_kernels, plane_kernels
from coldstart.codecs.registry import BEST, CODECS, ChunkCodec, decode_chunk
from coldstart.format import checksum
from contracts.errors import ConfigError, CorruptCheckpoint

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

NAMES = [kind.name for kind in CODECS.values()]
MIB = 1 << 20


def encoded(name: str, item_bytes: int, chunk: bytes) -> bytes:
    return b"".join(bytes(part) for part in ChunkCodec(name, item_bytes).encode(chunk))


def decoded(record: bytes, num_bytes: int) -> bytes:
    # What lies there before must not show through.
    into = bytearray(b"\xa5" * num_bytes)
    decode_chunk(record, into)
    return bytes(into)


def gaussian(num_bytes: int, dtype: str, seed: int = 0) -> bytes:
    """Weights of standard deviation 0.02; bfloat16 by cutting off digits."""
    numbers = np.random.default_rng(seed).standard_normal(num_bytes // 2) * 0.02
    if dtype == "bfloat16":
        return (numbers.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return numbers.astype(dtype).tobytes()[:num_bytes]


def special(item_bytes: int) -> NDArray[np.uint8]:
    """Zeros, infinities, not-a-numbers and denormals of both signs, of all widths."""
    words = {
        1: [0, 0x80, 0x7F, 0xFF, 0x78, 1],
        2: [0, 0x8000, 0x7F80, 0xFF80, 0x7FC0, 0x7F81, 0xFFFF, 0x7C00, 0xFC00, 1, 0x8001, 0x3F80],
        4: [0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF, 1, 0x80000001, 0x3F800000],
    }[item_bytes]
    return np.array(words * 100, f"<u{item_bytes}").view(np.uint8)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([1, 2, 4]), st.binary(max_size=4000), st.integers(1, 40))
def test_any_bytes_come_back(name: str, item_bytes: int, chunk: bytes, times: int) -> None:
    assert decoded(encoded(name, item_bytes, chunk * times), len(chunk) * times) == chunk * times


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_numbers_that_are_none_come_back(name: str, item_bytes: int) -> None:
    chunk = special(item_bytes).tobytes()
    assert decoded(encoded(name, item_bytes, chunk), len(chunk)) == chunk


@pytest.mark.parametrize("item_bytes", ITEM_BYTES)
def test_every_number_of_two_bytes_and_many_of_four_are_taken_apart_alike(item_bytes: int) -> None:
    native = plane_kernels()
    assert isinstance(native, NativePlanes), "there is a compiler where tests run"
    if item_bytes == 2:
        items = np.arange(1 << 16, dtype=np.uint16).view(np.uint8)
    else:
        items = np.random.default_rng(1).integers(0, 256, 4 * 12345, dtype=np.uint8)
    planes, expected = native.split(items, item_bytes), NumpyPlanes().split(items, item_bytes)
    assert [plane.tobytes() for plane in planes] == [plane.tobytes() for plane in expected]
    for kernels in (native, NumpyPlanes()):
        back = np.zeros_like(items)
        kernels.merge(planes, back)
        assert np.array_equal(back, items)


def test_the_highest_plane_is_the_exponent() -> None:
    numbers = np.array([1.0, -1.0, 2.0, -0.5, 1.75], np.float32)
    exponents = [127, 127, 128, 126, 127]
    assert NumpyPlanes().split(numbers.view(np.uint8), 4)[3].tolist() == exponents
    halves = (numbers.view(np.uint32) >> 16).astype(np.uint16)
    assert NumpyPlanes().split(halves.view(np.uint8), 2)[1].tolist() == exponents


def test_without_a_compiler_numpy_does_it(tmp_path: Path) -> None:
    assert load_kernels(tmp_path / "none.so") is None


def test_exponents_of_weights_are_told_in_less_than_three_bits() -> None:
    chunk = gaussian(4 * MIB, "bfloat16")
    ratio = len(chunk) / len(encoded(BEST, 2, chunk))
    assert 1.49 < ratio < 1.53, "16 bits, of which 8 of exponents have an entropy of 2.55"
    assert ratio > len(chunk) / len(encoded("zstd", 2, chunk)) > 1.2
    # float16 has fewer bits of exponent to gain by; float32 more digits that are random.
    for dtype, item_bytes, least in (("float16", 2, 1.12), ("float32", 4, 1.18)):
        chunk = gaussian(4 * MIB, dtype)
        assert len(chunk) / len(encoded(BEST, item_bytes, chunk)) > least, dtype


def test_digits_that_are_not_there_cost_nothing() -> None:
    narrow = np.frombuffer(gaussian(MIB, "bfloat16"), np.uint16)
    wide = (narrow.astype(np.uint32) << 16).tobytes()
    assert len(wide) / len(encoded(BEST, 4, wide)) > 2.95
    assert decoded(encoded(BEST, 4, wide), len(wide)) == wide


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_what_does_not_become_smaller_is_kept_as_it_is(name: str, item_bytes: int) -> None:
    chunk = np.random.default_rng(2).integers(0, 256, MIB, dtype=np.uint8).tobytes()
    record = encoded(name, item_bytes, chunk)
    assert len(record) == len(chunk) + 8
    assert decoded(record, len(chunk)) == chunk


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(NAMES), st.sampled_from([1, 2, 4]), st.data())
def test_damage_is_an_error_or_found_by_the_checksum(name: str, item_bytes: int, data: st.DataObject) -> None:
    chunk = gaussian(1 << 14, "bfloat16" if item_bytes == 2 else "float32")
    record = bytearray(encoded(name, item_bytes, chunk))
    place = data.draw(st.integers(0, min(40, len(record) - 1)) | st.integers(0, len(record) - 1))
    record[place] ^= 1 << data.draw(st.integers(0, 7))
    into = bytearray(len(chunk))
    try:
        decode_chunk(record, into)
    except CorruptCheckpoint:
        return
    # A bit that nobody reads (of the size of a number, of zstd's window) changes nothing.
    assert bytes(into) == chunk or checksum(into) != checksum(chunk)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("item_bytes", [1, 2, 4])
def test_a_record_that_ends_early_or_late_is_an_error(name: str, item_bytes: int) -> None:
    chunk = gaussian(1 << 14, "bfloat16" if item_bytes == 2 else "float32")
    record = encoded(name, item_bytes, chunk)
    for length in (0, 3, 7, 8, 9, 15, 17, 20, 25, len(record) // 2, len(record) - 1):
        with pytest.raises(CorruptCheckpoint):
            decoded(record[:length], len(chunk))
    for num_bytes in (0, len(chunk) - 4, len(chunk) + 4):
        with pytest.raises(CorruptCheckpoint):
            decoded(record, num_bytes)
    if name == "zstd":
        return
    with pytest.raises(CorruptCheckpoint):
        decoded(record + b"x", len(chunk))


def test_a_record_of_another_codec_is_an_error() -> None:
    with pytest.raises(CorruptCheckpoint, match="names codec 9"):
        decoded(struct.pack("<BBHI", 9, 2, 0, 4) + b"abcd", 4)
    with pytest.raises(ConfigError, match="no codec of weights 'lz5'; known are: raw, zstd, exponent_split_zstd"):
        ChunkCodec("lz5", 2)
