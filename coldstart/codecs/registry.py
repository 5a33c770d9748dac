"""The codecs by name and by the number that stands in records; how a chunk is written and read with them.

A record is a header (codec, bytes of a number, bytes of the chunk) and what the codec makes of the chunk. It says by
itself how to read it, not whether it is right: that says the chunk's checksum, which stands in the checkpoint's index.
"""

from __future__ import annotations

import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from coldstart.codecs.entropy import grow_into, shrink, shrink_plain
from coldstart.codecs.planes import ITEM_BYTES, plane_kernels
from coldstart.memory import as_array
from contracts.errors import ConfigError, CorruptCheckpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    Bytes = NDArray[np.uint8]

#: Codec, bytes of a number, nothing, bytes of the chunk.
_HEADER = struct.Struct("<BBHI")
_LENGTH = struct.Struct("<I")
_IS_SHRUNK = 1 << 31
#: Of a chunk: what the length of a run leaves room for.
MAX_CHUNK_BYTES = _IS_SHRUNK - 1


class ChunkForm(Protocol):
    """How the bytes of a chunk stand in a record. Safe for several threads at once; mostly without the GIL."""

    def encode(self, chunk: Bytes, item_bytes: int) -> list[Bytes | bytes]:
        """In parts. The chunk's length is a multiple of `item_bytes`."""
        ...

    def decode(self, body: Bytes, item_bytes: int, into: Bytes) -> None:
        """Raises CorruptCheckpoint."""
        ...


class RawForm:
    def encode(self, chunk: Bytes, item_bytes: int) -> list[Bytes | bytes]:
        return [chunk]

    def decode(self, body: Bytes, item_bytes: int, into: Bytes) -> None:
        if len(body) != len(into):
            raise CorruptCheckpoint(f"a record holds {len(body)} bytes of weights, not {len(into)}")
        np.copyto(into, body)


class ZstdForm:
    """All bytes in the order in which they come."""

    def encode(self, chunk: Bytes, item_bytes: int) -> list[Bytes | bytes]:
        return [shrink_plain(chunk)]

    def decode(self, body: Bytes, item_bytes: int, into: Bytes) -> None:
        grow_into(body, into)


class _Scratch(threading.local):
    """Memory that a thread's planes grow into: pages that exist already cost nothing."""

    def __init__(self) -> None:
        self.memory = np.empty(0, np.uint8)

    def take(self, num_bytes: int) -> Bytes:
        if len(self.memory) < num_bytes:
            self.memory = np.empty(num_bytes, np.uint8)
        return self.memory[:num_bytes]


_scratch = _Scratch()


class ExponentSplitForm:
    """Exponents apart from signs and digits, each plane shrunk where that makes it smaller: of bfloat16 the exponents
    alone; of float32 that was made from a narrower type its empty digits too. Numbers of one byte are one plane."""

    def encode(self, chunk: Bytes, item_bytes: int) -> list[Bytes | bytes]:
        planes = plane_kernels().split(chunk, item_bytes) if item_bytes in ITEM_BYTES else [chunk]
        lengths = b""
        parts: list[Bytes | bytes] = []
        for plane in planes:
            small = shrink(plane)
            parts.append(plane if small is None else small)
            lengths += _LENGTH.pack(len(plane) if small is None else len(small) | _IS_SHRUNK)
        return [lengths, *parts]

    def decode(self, body: Bytes, item_bytes: int, into: Bytes) -> None:
        num_planes = item_bytes if item_bytes in ITEM_BYTES else 1
        plane_bytes = len(into) // num_planes
        start = num_planes * _LENGTH.size
        if len(body) < start:
            raise CorruptCheckpoint(f"a record of {num_planes} planes ends after {len(body)} bytes")
        scratch = _scratch.take(len(into)) if num_planes > 1 else into
        planes: list[Bytes] = []
        for place in range(num_planes):
            (told,) = _LENGTH.unpack_from(body.data, place * _LENGTH.size)
            stored = body[start : start + (told & ~_IS_SHRUNK)]
            start += told & ~_IS_SHRUNK
            if start > len(body):
                raise CorruptCheckpoint(f"plane {place} of a record ends at {start} of {len(body)} bytes")
            if told & _IS_SHRUNK:
                plane = scratch[place * plane_bytes : (place + 1) * plane_bytes]
                grow_into(stored, plane)
            else:
                plane = stored
            if len(plane) != plane_bytes:
                raise CorruptCheckpoint(f"plane {place} of a record has {len(plane)} bytes, not {plane_bytes}")
            planes.append(plane)
        if start != len(body):
            raise CorruptCheckpoint(f"a record has {len(body) - start} bytes after its last plane")
        if num_planes > 1:
            plane_kernels().merge(planes, into)
        elif planes[0] is not into:
            # A shrunk one grew into its place.
            np.copyto(into, planes[0])


@dataclass(frozen=True, slots=True)
class CodecKind:
    #: Stands in records: never given to another codec.
    codec_id: int
    name: str
    form: ChunkForm


RAW = CodecKind(0, "raw", RawForm())

CODECS: dict[int, CodecKind] = {
    kind.codec_id: kind
    for kind in (RAW, CodecKind(1, "zstd", ZstdForm()), CodecKind(2, "exponent_split_zstd", ExponentSplitForm()))
}
_BY_NAME = {kind.name: kind for kind in CODECS.values()}
#: What copies in memory are compressed with.
BEST = "exponent_split_zstd"


class ChunkCodec:
    """One codec for numbers of one size. Safe for several threads at once."""

    def __init__(self, name: str, item_bytes: int) -> None:
        """Raises ConfigError for a name that there is not. `item_bytes`: of the numbers that the chunks hold."""
        kind = _BY_NAME.get(name)
        if kind is None:
            raise ConfigError(f"there is no codec of weights {name!r}; known are: {', '.join(_BY_NAME)}")
        self.name = name
        self._kind = kind
        self._item_bytes = item_bytes

    def encode(self, chunk: Buffer) -> list[Bytes | bytes]:
        """A record, in parts that may be views of the chunk. A chunk that would not become smaller is kept as it is.

        Raises ValueError for a chunk of more than `MAX_CHUNK_BYTES`.
        """
        data = as_array(chunk)
        if len(data) > MAX_CHUNK_BYTES:
            raise ValueError(f"a chunk of {len(data)} bytes; {MAX_CHUNK_BYTES} are the most")
        item_bytes = 1 if len(data) % self._item_bytes else self._item_bytes
        kind, parts = self._kind, self._kind.form.encode(data, item_bytes)
        if sum(map(len, parts)) >= len(data):
            kind, parts = RAW, [data]
        return [_HEADER.pack(kind.codec_id, item_bytes, 0, len(data)), *parts]


def decode_chunk(record: Buffer, into: Buffer) -> None:
    """Writes the chunk that a record holds, whichever codec made it.

    Raises CorruptCheckpoint for whatever is not a record of a chunk of that length: then what lies in `into` is not
    worth anything. One that is damaged may be read without an error: the chunk's checksum finds that.
    """
    data, target = as_array(record), as_array(into)
    if len(data) < _HEADER.size:
        raise CorruptCheckpoint(f"a record of weights has {len(data)} bytes")
    codec_id, item_bytes, nothing, num_bytes = _HEADER.unpack_from(data.data)
    if codec_id not in CODECS or nothing or not item_bytes or num_bytes % item_bytes:
        raise CorruptCheckpoint(f"a record of weights names codec {codec_id}; known are {sorted(CODECS)}")
    if num_bytes != len(target):
        raise CorruptCheckpoint(f"a record holds {num_bytes} bytes of weights, not {len(target)}")
    CODECS[codec_id].form.decode(data[_HEADER.size :], item_bytes, target)
