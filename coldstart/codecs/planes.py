"""Numbers taken apart into planes, their first bytes, their second ones, ..., so that the exponents lie together.

Of a weight the sign and the digits are as good as random; the exponent is not: weights of a model lie within few
powers of two. In memory an exponent of eight bits lies across two bytes, below the sign. So the upper two bytes of each
number are first turned left by one bit: then the highest byte is the exponent (bfloat16, float32; of float16 five bits
of exponent and three of digits), and the sign is the lowest bit of the byte below, whose others are digits. The lower
two bytes of float32 stay as they are: of numbers that were bfloat16 they are zeros.

By a C function where there is a compiler, else by numpy, to the same bytes. Both leave the GIL to others.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from engine.native_build import NativeBuild

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]

#: Numbers of other sizes are one plane.
ITEM_BYTES = (2, 4)

_SOURCE = Path(__file__).with_name("planes.c")
_FLAGS = ("-O3", "-shared", "-fPIC")
_BUILD_TIMEOUT_S = 60.0
_HALF = np.dtype("<u2")


class PlaneKernels(Protocol):
    """Safe for several threads at once. Items have one of the sizes of `ITEM_BYTES`."""

    def split(self, items: Bytes, item_bytes: int) -> list[Bytes]:
        """The planes, lowest bytes first. The length of `items` is a multiple of `item_bytes`."""
        ...

    def merge(self, planes: Sequence[Bytes], into: Bytes) -> None:
        """What was split into these planes, all of one length."""
        ...


@lru_cache(maxsize=1)
def plane_kernels() -> PlaneKernels:
    """The fastest that there are here; the first call on a machine may wait for a compiler, some seconds."""
    build = NativeBuild(_SOURCE, name="weight-codecs", flags=_FLAGS)
    build.start()
    build.wait(_BUILD_TIMEOUT_S)
    return load_kernels(build.library) or NumpyPlanes()


def load_kernels(path: Path) -> NativePlanes | None:
    """None where there is no library that can be loaded."""
    try:
        return NativePlanes(ctypes.CDLL(str(path)))
    except OSError:
        return None


class NativePlanes:
    def __init__(self, library: ctypes.CDLL) -> None:
        self._split = library.tandem_split_planes
        self._split.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        self._merge = library.tandem_merge_planes
        self._merge.argtypes = (ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
        self._split.restype = self._merge.restype = ctypes.c_int32

    def split(self, items: Bytes, item_bytes: int) -> list[Bytes]:
        count = len(items) // item_bytes
        planes = np.empty((item_bytes, count), np.uint8)
        if not self._split(items.ctypes.data, count, item_bytes, planes.ctypes.data):
            raise ValueError(f"numbers of {item_bytes} bytes have no planes")
        return list(planes)

    def merge(self, planes: Sequence[Bytes], into: Bytes) -> None:
        starts = np.array([plane.ctypes.data for plane in planes], np.uintp)
        if not self._merge(starts.ctypes.data, len(planes[0]), len(planes), into.ctypes.data):
            raise ValueError(f"numbers of {len(planes)} bytes have no planes")


class NumpyPlanes:
    """The reference."""

    def split(self, items: Bytes, item_bytes: int) -> list[Bytes]:
        halves = items.view(_HALF).reshape(-1, item_bytes // 2).copy()
        upper = halves[:, -1]
        halves[:, -1] = (upper << 1) | (upper >> 15)
        return [np.ascontiguousarray(plane) for plane in halves.view(np.uint8).reshape(-1, item_bytes).T]

    def merge(self, planes: Sequence[Bytes], into: Bytes) -> None:
        item_bytes = len(planes)
        apart = into.reshape(-1, item_bytes)
        for place, plane in enumerate(planes):
            apart[:, place] = plane
        upper = into.view(_HALF).reshape(-1, item_bytes // 2)[:, -1]
        upper[:] = (upper >> 1) | (upper << 15)
