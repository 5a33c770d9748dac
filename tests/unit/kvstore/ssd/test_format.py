"""Records and superblocks: what was written is read, anything else is not taken for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvstore.ssd.codec import RAW
from kvstore.ssd.format import (
    PAGE_BYTES,
    block_checksum,
    header_bytes_of,
    parse_segment_path,
    read_header,
    segment_path,
)
from kvstore.ssd.records import blocks_per_record, buffer_bytes_for, encode_blocks, make_record
from kvstore.ssd.superblock import read_superblock, superblock
from tests.support.ssd_tiers import BLOCK_BYTES, block, key, payload

if TYPE_CHECKING:
    from kvstore.ssd.codec import BlockCodec

IDENTITY_DIGEST = b"i" * 16
PLACE = {"sequence": 7, "offset": 3 * PAGE_BYTES, "identity": IDENTITY_DIGEST}


def _never(codec: BlockCodec, error: Exception) -> None:
    raise AssertionError(f"{codec.name} failed: {error}")


def record(num_blocks: int) -> bytearray:
    payload_bytes = num_blocks * 2 * BLOCK_BYTES
    assert blocks_per_record(BLOCK_BYTES, payload_bytes) >= num_blocks
    buffer = memoryview(bytearray(b"\xff" * buffer_bytes_for(BLOCK_BYTES, payload_bytes)))
    blocks = [block(number) for number in range(num_blocks)]
    made = make_record(buffer, encode_blocks(blocks, RAW, RAW, _never), num_blocks)
    return bytearray(made.seal(**PLACE, wall_s=12.5))  # type: ignore[arg-type]


@pytest.mark.parametrize("num_blocks", [1, 2, 70, 200])
def test_a_record_says_where_its_blocks_are(num_blocks: int) -> None:
    data = record(num_blocks)
    assert len(data) % PAGE_BYTES == 0
    header = read_header(memoryview(data), **PLACE, room_bytes=len(data))  # type: ignore[arg-type]
    assert header is not None
    assert (header.record_bytes, header.wall_s) == (len(data), 12.5)
    assert header.keys == [key(number) for number in range(num_blocks)]
    end = header.header_bytes
    for number, row in enumerate(header.rows):
        start, length = int(row["start"]), int(row["length"])
        assert start >= end
        end = start + length
        assert data[start:end] == payload(number)
        assert int(row["position"]) == number
        assert int(row["checksum"]) == block_checksum(key(number), memoryview(data)[start:end])
    assert not any(data[end:]), "what the buffer held before is not written"


@given(st.integers(0, 2 * PAGE_BYTES * 8 - 1))
def test_a_header_with_a_turned_bit_is_none(bit: int) -> None:
    data = record(70)
    header_bytes = header_bytes_of(memoryview(data))
    assert header_bytes == PAGE_BYTES
    bit %= header_bytes * 8
    data[bit // 8] ^= 1 << bit % 8
    assert read_header(memoryview(data), **PLACE, room_bytes=len(data)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("other", [{"sequence": 8}, {"offset": 0}, {"identity": b"j" * 16}, {"room_bytes": PAGE_BYTES}])
def test_a_record_is_none_of_another_place(other: dict[str, object]) -> None:
    data = record(2)
    assert read_header(memoryview(data), **{**PLACE, "room_bytes": len(data), **other}) is None  # type: ignore[arg-type]


@given(st.binary(max_size=2 * PAGE_BYTES))
def test_anything_else_is_no_header(data: bytes) -> None:
    assert read_header(memoryview(data), **PLACE, room_bytes=2**30) is None  # type: ignore[arg-type]
    assert read_header(memoryview(b"TANDEMKV" + data), **PLACE, room_bytes=2**30) is None  # type: ignore[arg-type]


def test_right_bytes_under_a_wrong_key_do_not_pass() -> None:
    data = memoryview(payload(1))
    assert block_checksum(key(1), data) != block_checksum(key(2), data)


def test_segments_have_names() -> None:
    assert parse_segment_path(segment_path(IDENTITY_DIGEST, 12)) == (IDENTITY_DIGEST, 12)
    for other in ("lock", "seg-000000000012.kv", "x/seg-000000000012.kv", f"{'00' * 16}/seg-1.kv", "../a/b"):
        assert parse_segment_path(other) is None


def test_a_superblock_is_ours_of_another_version_or_damaged() -> None:
    ours = superblock()
    assert read_superblock(ours) == ("ours", 1)
    for index in range(0, len(ours), 7):
        damaged = bytearray(ours)
        damaged[index] ^= 0x04
        assert read_superblock(bytes(damaged))[0] != "other"
    assert read_superblock(b"") == ("damaged", 0)
    assert read_superblock(ours[:-20]) == ("damaged", 0)
