"""A run of like bytes, smaller by zstd where that is worth the time to read it again."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from contracts.errors import CorruptCheckpoint

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

#: What a run must at least become smaller by.
_LEAST_GAIN = 1 / 12
#: Of a longer run samples are tried first, from three places.
_SAMPLE_BYTES = 8192
#: Weights repeat nothing but zeros: with a table of 64 places and matches from seven bytes on nearly all of a run is
#: told byte by byte. That is quicker than zstd's usual search, there and back, and smaller: measured on exponents of
#: Gaussian weights 3.07 instead of 2.78 times at three times the speed.
_EXPONENTS = zstandard.ZstdCompressionParameters(compression_level=1, min_match=7, hash_log=6)


class _Contexts(threading.local):
    """zstd's contexts: dear to make, and not for two threads at once."""

    def __init__(self) -> None:
        self.of_exponents = zstandard.ZstdCompressor(compression_params=_EXPONENTS)
        self.plain = zstandard.ZstdCompressor(level=1)
        self.decompressor = zstandard.ZstdDecompressor()


_contexts = _Contexts()


def shrink_plain(run: Bytes) -> bytes:
    """zstd's level 1 as it is, whatever comes of it."""
    return _contexts.plain.compress(run.data)


def shrink(run: Bytes) -> bytes | None:
    """None where too little is gained."""
    if len(run) >= 4 * _SAMPLE_BYTES:
        middle = (len(run) - _SAMPLE_BYTES) // 2
        places = (run[:_SAMPLE_BYTES], run[middle : middle + _SAMPLE_BYTES], run[-_SAMPLE_BYTES:])
        if not _is_worth_it(np.concatenate(places)):
            return None
    return _is_worth_it(run)


def _is_worth_it(run: Bytes) -> bytes | None:
    small = _contexts.of_exponents.compress(run.data)
    return small if len(small) <= len(run) * (1 - _LEAST_GAIN) else None


def grow_into(small: Bytes, into: Bytes) -> None:
    """Writes what was shrunk, which must be as long as `into` is. Raises CorruptCheckpoint; what lies in `into` is not
    worth anything then."""
    try:
        told = zstandard.frame_content_size(small.data)
        if told != len(into):
            raise CorruptCheckpoint(f"a compressed run of weights holds {told} bytes, not {len(into)}")
        with _contexts.decompressor.stream_reader(small.data) as reader:
            count = reader.readinto(into.data) if len(into) else 0  # pyright: ignore[reportUnknownMemberType]
    except zstandard.ZstdError as error:
        raise CorruptCheckpoint(f"a compressed run of weights cannot be read: {error}") from error
    if count != len(into):
        raise CorruptCheckpoint(f"a compressed run of weights ends after {count} of {len(into)} bytes")
