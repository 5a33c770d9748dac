"""The arithmetic of a block's integer codes: by a C function where there is a compiler, else by numpy, to the same bit.

The C function reads a block once, numpy a dozen times; both work without the GIL for most of it.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from engine.native_build import NativeBuild
from kvstore.codecs.quantise import Quantised, dequantise, group_channels, quantise
from kvstore.codecs.values import narrow_into, widened

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from contracts.layout import BlockLayout

_KEYS, _VALUES = 0, 1

_SOURCE = Path(__file__).with_name("quantise.c")
_FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd", "-shared", "-fPIC")
_BUILD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Codes:
    """One block. Scales and zeros (in quarters of the scale) are those of all keys, then of all values.

    Of four bits a head's first half of channels fills the lower halves of the bytes, its second the upper.
    """

    scales: NDArray[np.float32]
    zeros: NDArray[np.int16]
    keys: NDArray[np.uint8]
    values: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class CodesShape:
    """How many there are of each in a block."""

    num_key_scales: int
    num_value_scales: int
    #: Of the keys, and of the values.
    code_bytes: int

    @classmethod
    def of(cls, layout: BlockLayout, bits: int) -> CodesShape:
        heads, layers, _, tokens, head_dim = layout.shape
        num_groups = head_dim // group_channels(head_dim)
        rows = heads * layers
        return cls(rows * head_dim, rows * tokens * num_groups, rows * tokens * head_dim * bits // 8)


class Kernels(Protocol):
    """For blocks of one layout and codes of one width. Safe for several threads at once."""

    def quantise(self, block: memoryview) -> Codes | None:
        """None for numbers that have no finite ranges."""
        ...

    def dequantise(self, codes: Codes, into: memoryview) -> None:
        """Writes the block that the codes stand for; their scales are in range."""
        ...


def make_kernels(layout: BlockLayout, bits: int) -> Kernels:
    """The fastest that there are here; the first call on a machine may wait for a compiler, some seconds."""
    library = None if layout.dtype == "float16" else _library()
    return NumpyKernels(layout, bits) if library is None else NativeKernels(library, layout, bits)


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    build = NativeBuild(_SOURCE, name="codecs", flags=_FLAGS, libraries=("-lm",))
    build.start()
    build.wait(_BUILD_TIMEOUT_S)
    return load_library(build.library)


def load_library(path: Path) -> ctypes.CDLL | None:
    """None where there is none that can be loaded."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError:
        return None
    library.tandem_quantise.argtypes = (ctypes.c_void_p,) * 8
    library.tandem_quantise.restype = ctypes.c_int32
    library.tandem_dequantise.argtypes = (ctypes.c_void_p,) * 7
    library.tandem_dequantise.restype = None
    return library


class NativeKernels:
    def __init__(self, library: ctypes.CDLL, layout: BlockLayout, bits: int) -> None:
        """Not for float16, which the C file does not read."""
        self._library = library
        self._layout = layout
        self._shape = CodesShape.of(layout, bits)
        heads, layers, _, tokens, head_dim = layout.shape
        is_bfloat16 = layout.dtype == "bfloat16"
        self._sizes = np.array(
            [heads * layers, tokens, head_dim, group_channels(head_dim), bits, is_bfloat16], np.int64
        )

    def quantise(self, block: memoryview) -> Codes | None:
        shape, layout = self._shape, self._layout
        num_scales = shape.num_key_scales + shape.num_value_scales
        codes = Codes(
            np.empty(num_scales, np.float32),
            np.empty(num_scales, np.int16),
            np.empty(shape.code_bytes, np.uint8),
            np.empty(shape.code_bytes, np.uint8),
        )
        numbers = np.empty(layout.block_tokens * layout.head_dim, np.float32)
        arrays = (codes.keys, codes.values, codes.scales, codes.zeros, numbers, self._line())
        found = self._library.tandem_quantise(
            self._sizes.ctypes.data, _address(block), *[_address_of(array) for array in arrays]
        )
        return codes if found else None

    def dequantise(self, codes: Codes, into: memoryview) -> None:
        arrays = (codes.keys, codes.values, codes.scales, codes.zeros, self._line())
        self._library.tandem_dequantise(
            self._sizes.ctypes.data, _address(into), *[_address_of(array) for array in arrays]
        )

    def _line(self) -> NDArray[np.float32]:
        row_groups = self._layout.block_tokens * self._layout.head_dim // group_channels(self._layout.head_dim)
        return np.empty(3 * self._layout.head_dim + 2 * row_groups, np.float32)


class NumpyKernels:
    def __init__(self, layout: BlockLayout, bits: int) -> None:
        self._layout = layout
        self._bits = bits
        heads, layers, _, tokens, head_dim = layout.shape
        channels = group_channels(head_dim)
        self._codes_shape = (heads, layers, tokens, head_dim)
        self._grouped_shape = (heads, layers, tokens, head_dim // channels, channels)
        self._key_shape = (heads, layers, 1, head_dim)
        self._value_shape = (heads, layers, tokens, head_dim // channels, 1)
        self._num_keys = heads * layers * head_dim

    def quantise(self, block: memoryview) -> Codes | None:
        numbers = widened(block, self._layout)
        levels = (1 << self._bits) - 1
        keys = quantise(numbers[:, :, _KEYS], -2, levels)
        values = quantise(numbers[:, :, _VALUES].reshape(self._grouped_shape), -1, levels)
        if keys is None or values is None:
            return None
        return Codes(
            np.concatenate((keys.scales.ravel(), values.scales.ravel())),
            np.concatenate((keys.zeros.ravel(), values.zeros.ravel())),
            self._packed(keys.codes),
            self._packed(values.codes.reshape(self._codes_shape)),
        )

    def dequantise(self, codes: Codes, into: memoryview) -> None:
        out = np.empty(self._layout.shape, np.float32)
        split = self._num_keys
        keys = Quantised(
            self._unpacked(codes.keys),
            codes.scales[:split].reshape(self._key_shape),
            codes.zeros[:split].reshape(self._key_shape),
        )
        values = Quantised(
            self._unpacked(codes.values).reshape(self._grouped_shape),
            codes.scales[split:].reshape(self._value_shape),
            codes.zeros[split:].reshape(self._value_shape),
        )
        dequantise(keys, out[:, :, _KEYS])
        dequantise(values, out[:, :, _VALUES].reshape(self._grouped_shape))
        narrow_into(out, into, self._layout)

    def _packed(self, codes: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._bits == 8:
            return codes.ravel()
        half = self._layout.head_dim // 2
        return (codes[..., :half] | codes[..., half:] << np.uint8(4)).ravel()

    def _unpacked(self, packed: NDArray[np.uint8]) -> NDArray[np.uint8]:
        if self._bits == 8:
            return packed.reshape(self._codes_shape)
        half = self._layout.head_dim // 2
        pairs = packed.reshape(*self._codes_shape[:-1], half)
        codes = np.empty(self._codes_shape, np.uint8)
        np.bitwise_and(pairs, np.uint8(15), out=codes[..., :half])
        np.right_shift(pairs, np.uint8(4), out=codes[..., half:])
        return codes


def _address(block: memoryview) -> int:
    """Of the block's first byte; whoever calls keeps the block."""
    return _address_of(np.frombuffer(block, np.uint8))


def _address_of(array: NDArray[Any]) -> int:
    return int(array.ctypes.data)
