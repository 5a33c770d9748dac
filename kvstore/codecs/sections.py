"""Runs of like bytes, each with an entropy code of its own where that makes it smaller."""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import zstandard

from contracts.errors import CorruptKv

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

#: Higher levels look for longer repetitions, of which KV has none: they gain 0.2 % for two to three times the time.
ZSTD_LEVEL = 1

#: What a section must at least become smaller by; less is not worth the time to read it: 0.05 ms for 24 KB.
_LEAST_GAIN = 1 / 12

#: Of longer sections a part of this size is tried first.
_TRIED_BYTES = 8192

_LENGTH = struct.Struct("<I")
_COMPRESSED = 1 << 31


class _Contexts(threading.local):
    """zstd's contexts: dear to make, and not for two threads at once."""

    def __init__(self) -> None:
        self.compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def write(sections: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """Each section's length (with a flag: compressed), then its bytes."""
    for section in sections:
        compressed = _compressed(memoryview(section))
        if compressed is not None:
            yield _LENGTH.pack(len(compressed) | _COMPRESSED)
            yield compressed
        else:
            yield _LENGTH.pack(len(section))
            yield bytes(section)


def _compressed(section: memoryview) -> bytes | None:
    """None where too little is gained."""
    if len(section) >= 2 * _TRIED_BYTES and _compressed(section[:_TRIED_BYTES]) is None:
        return None
    compressed = _contexts.compressor.compress(section)
    return compressed if len(compressed) <= len(section) * (1 - _LEAST_GAIN) else None


def read(body: memoryview, sizes: Sequence[int]) -> list[bytes | memoryview]:
    """The sections, which must have these sizes in bytes and fill `body`. Raises CorruptKv."""
    found: list[bytes | memoryview] = []
    start = 0
    for size in sizes:
        if start + _LENGTH.size > len(body):
            raise CorruptKv(f"an encoded block ends before section {len(found)} of {len(sizes)}")
        (told,) = _LENGTH.unpack_from(body, start)
        start += _LENGTH.size
        end = start + (told & ~_COMPRESSED)
        if end > len(body):
            raise CorruptKv(f"section {len(found)} of an encoded block ends at {end} of {len(body)} bytes")
        stored = body[start:end]
        section = _decompress(stored, size) if told & _COMPRESSED else stored
        if len(section) != size:
            raise CorruptKv(f"section {len(found)} of an encoded block has {len(section)} bytes, not {size}")
        found.append(section)
        start = end
    if start != len(body):
        raise CorruptKv(f"an encoded block has {len(body) - start} bytes after its last section")
    return found


def _decompress(section: memoryview, size: int) -> bytes:
    try:
        # Looked at first: memory is taken for as much as the frame names.
        told = zstandard.frame_content_size(section)
        if told != size:
            raise CorruptKv(f"a compressed section of an encoded block holds {told} bytes, not {size}")
        return _contexts.decompressor.decompress(section)
    except zstandard.ZstdError as error:
        raise CorruptKv(f"a compressed section of an encoded block cannot be read: {error}") from error
