"""What stands in the files of the disk tier: segments of records, and the superblock of their folder.

    <root>/tandem-kv.json                  superblock: format version, with a checksum
    <root>/lock                            held by the process that uses the folder
    <root>/<identity>/seg-<sequence>.kv    records, one after another, each on a page boundary; then zeros

A record is what one batch of blocks became: a header of whole pages that says which block lies where, and their bytes.
Everything in it is checked before it is believed. The header's checksum covers the header; it names format, identity,
segment and place, so that a page that landed elsewhere, or a file under another's name, is not taken for one. The
checksum of a block's bytes is seeded with its key, so that right bytes under a wrong key do not pass either.
"""

from __future__ import annotations

import re
import struct
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec
import numpy as np
from xxhash import xxh3_64_intdigest

from kvstore.block_keys import KEY_BYTES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from contracts.layout import KvIdentity

#: Grows whenever files of one build mean something else to another.
FORMAT_VERSION = 1
#: Of headers, of records, and of every read and write past the page cache.
PAGE_BYTES = 4096
#: Blocks begin on such boundaries in their record.
BLOCK_ALIGN = 64
IDENTITY_BYTES = 16
SUPERBLOCK = "tandem-kv.json"
LOCK = "lock"

_MAGIC = b"TANDEMKV"
#: magic, format version, blocks, bytes of the header, bytes of the record, sequence number of the segment, place in it,
#: identity, Unix time.
_FIXED = struct.Struct("<8sIIIIQQ16sd")
#: Of everything else in the header.
_CHECKSUM = struct.Struct("<Q")
_PREFIX_BYTES = _FIXED.size + _CHECKSUM.size

#: One block of a record. `start` counts from the record's first byte.
ROW = np.dtype(
    [
        ("key", np.uint8, KEY_BYTES),
        ("checksum", "<u8"),
        ("start", "<u4"),
        ("length", "<u4"),
        ("position", "<u4"),
        ("codec", "<u4"),
    ]
)

MAX_RECORD_BLOCKS = 1024
MAX_CODEC = 255

_SEGMENT_PATH = re.compile(r"([0-9a-f]{32})/seg-(\d{12})\.kv")


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordHeader:
    """A header whose checksum holds."""

    header_bytes: int
    record_bytes: int
    wall_s: float
    #: Structured array of dtype `ROW`.
    rows: NDArray[np.void]

    @property
    def keys(self) -> list[bytes]:
        return split_keys(self.rows)


def identity_digest(identity: KvIdentity, block_bytes: int) -> bytes:
    """Names what bytes mean: blocks of another digest are somebody else's."""
    return sha256(msgspec.msgpack.encode((b"tandem-kv-ssd", identity, block_bytes))).digest()[:IDENTITY_BYTES]


def segment_path(identity: bytes, sequence: int) -> str:
    return f"{identity.hex()}/seg-{sequence:012d}.kv"


def parse_segment_path(path: str) -> tuple[bytes, int] | None:
    """Identity and sequence number; None: not a segment's name."""
    match = _SEGMENT_PATH.fullmatch(path)
    return None if match is None else (bytes.fromhex(match[1]), int(match[2]))


def block_checksum(key: bytes, data: memoryview) -> int:
    return xxh3_64_intdigest(data, int.from_bytes(key[:8], "little"))


def whole_pages(num_bytes: int) -> int:
    """`num_bytes`, rounded up."""
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


def aligned(num_bytes: int) -> int:
    """Where the next block may begin."""
    return -(-num_bytes // BLOCK_ALIGN) * BLOCK_ALIGN


def header_bytes_for(num_blocks: int) -> int:
    return whole_pages(_PREFIX_BYTES + num_blocks * ROW.itemsize)


def split_keys(rows: NDArray[np.void]) -> list[bytes]:
    joined = np.ascontiguousarray(rows["key"]).tobytes()
    return [joined[start : start + KEY_BYTES] for start in range(0, len(joined), KEY_BYTES)]


def write_header(
    into: memoryview,
    rows: NDArray[np.void],
    *,
    record_bytes: int,
    sequence: int,
    offset: int,
    identity: bytes,
    wall_s: float,
) -> None:
    """Fills the first `header_bytes_for(len(rows))` bytes of a record that will stand at `offset` of a segment."""
    header_bytes = header_bytes_for(len(rows))
    header = bytearray(header_bytes)
    _FIXED.pack_into(
        header, 0, _MAGIC, FORMAT_VERSION, len(rows), header_bytes, record_bytes, sequence, offset, identity, wall_s
    )
    header[_PREFIX_BYTES : _PREFIX_BYTES + rows.nbytes] = rows.tobytes()
    _CHECKSUM.pack_into(header, _FIXED.size, _header_checksum(header))
    into[:header_bytes] = header


def header_bytes_of(page: memoryview) -> int:
    """How long the header is that seems to begin with this page; 0: none does."""
    if len(page) < _PREFIX_BYTES or bytes(page[: len(_MAGIC)]) != _MAGIC:
        return 0
    _, version, num_blocks, header_bytes, *_ = _FIXED.unpack_from(page)
    if version != FORMAT_VERSION or not 0 < num_blocks <= MAX_RECORD_BLOCKS:
        return 0
    return header_bytes if header_bytes == header_bytes_for(num_blocks) else 0


def read_header(
    data: memoryview, *, sequence: int, offset: int, identity: bytes, room_bytes: int
) -> RecordHeader | None:
    """The header of the record at `offset` of that segment, which has `room_bytes` from there on; None: what stands
    there is none, or is damaged. `data` is at least as long as `header_bytes_of` says."""
    header_bytes = header_bytes_of(data)
    if not 0 < header_bytes <= len(data):
        return None
    header = bytes(data[:header_bytes])
    _, _, num_blocks, _, record_bytes, its_sequence, its_offset, its_identity, wall_s = _FIXED.unpack_from(header)
    if _CHECKSUM.unpack_from(header, _FIXED.size)[0] != _header_checksum(header):
        return None
    if (its_sequence, its_offset, its_identity) != (sequence, offset, identity) or record_bytes > room_bytes:
        return None
    rows = np.frombuffer(header, ROW, num_blocks, _PREFIX_BYTES)
    if len(set(split_keys(rows))) < num_blocks or rows["codec"].max() > MAX_CODEC:
        return None
    ends = rows["start"].astype(np.int64) + rows["length"]
    if record_bytes < header_bytes or rows["start"].min() < header_bytes or int(ends.max()) > record_bytes:
        return None
    return RecordHeader(header_bytes=header_bytes, record_bytes=record_bytes, wall_s=wall_s, rows=rows)


def new_rows(num_blocks: int) -> NDArray[np.void]:
    return np.zeros(num_blocks, ROW)


def set_keys(rows: NDArray[np.void], keys: Sequence[bytes]) -> None:
    rows["key"] = np.frombuffer(b"".join(keys), np.uint8).reshape(len(keys), KEY_BYTES)


def _header_checksum(header: bytes | bytearray) -> int:
    """Over all but the place where it stands."""
    view = memoryview(header)
    return xxh3_64_intdigest(view[_PREFIX_BYTES:], xxh3_64_intdigest(view[: _FIXED.size]))
