"""The frame around every encoded block: what it holds, for which layout, and whether it is still what was written.

    "KV", version u8, codec id u8, length of the body u32, digest of the layout 8 bytes, checksum 8 bytes, body

All numbers are little-endian. The checksum covers the fields before it and the body, so that a frame is either what
was written or refused.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from hashlib import sha256
from typing import TYPE_CHECKING

import msgspec
import xxhash

from contracts.errors import CorruptKv

if TYPE_CHECKING:
    from collections.abc import Iterable

    from contracts.layout import BlockLayout

VERSION = 1
_MAGIC = b"KV"
_FIELDS = struct.Struct("<2sBBI8s")
_CHECKSUM_BYTES = 8
HEADER_BYTES = _FIELDS.size + _CHECKSUM_BYTES


@lru_cache(maxsize=64)
def layout_digest(layout: BlockLayout) -> bytes:
    """Eight bytes, equal for equal layouts in every process."""
    return sha256(msgspec.msgpack.encode(layout)).digest()[:8]


def pack(codec_id: int, layout: BlockLayout, parts: Iterable[bytes]) -> bytes:
    """A frame whose body is `parts`, one after another."""
    body = b"".join(parts)
    fields = _FIELDS.pack(_MAGIC, VERSION, codec_id, len(body), layout_digest(layout))
    return b"".join((fields, _checksum(fields, body), body))


def unpack(data: bytes | memoryview, layout: BlockLayout) -> tuple[int, memoryview]:
    """(codec id, body, which shares memory with `data`). Raises CorruptKv for anything but a frame of this layout."""
    view = memoryview(data).cast("B")
    if len(view) < HEADER_BYTES:
        raise CorruptKv(f"an encoded block of {len(view)} bytes is shorter than its header of {HEADER_BYTES}")
    fields, body = view[: _FIELDS.size], view[HEADER_BYTES:]
    magic, version, codec_id, num_bytes, digest = _FIELDS.unpack(fields)
    if magic != _MAGIC or version != VERSION:
        raise CorruptKv(f"an encoded block begins with {bytes(view[:3]).hex()}: not a block of version {VERSION}")
    if num_bytes != len(body):
        raise CorruptKv(f"an encoded block has {len(body)} bytes after its header, which names {num_bytes}")
    if bytes(view[_FIELDS.size : HEADER_BYTES]) != _checksum(fields, body):
        raise CorruptKv(f"the checksum of an encoded block of {len(view)} bytes is wrong")
    if digest != layout_digest(layout):
        raise CorruptKv(f"an encoded block is of another layout: {digest.hex()}, not {layout_digest(layout).hex()}")
    return codec_id, body


def _checksum(fields: bytes | memoryview, body: bytes | memoryview) -> bytes:
    digest = xxhash.xxh3_64(fields)
    digest.update(body)
    return digest.digest()
