"""The lossy codecs: blocks as integers of eight or four bits, scales and codes then compressed apart."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import ConfigError, CorruptKv
from kvstore.codecs import sections
from kvstore.codecs.kernels import Codes, CodesShape, Kernels, make_kernels
from kvstore.codecs.quantise import in_range

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from contracts.layout import BlockLayout

#: Of a scale as stored: the upper half of its float32, whose lower half is zero.
_SCALE_SHIFT = np.uint32(16)


class IntegerForm:
    """Keys by channel over the block's tokens, values by token over groups of channels (`quantise`).

    A body has six sections: the upper bytes of all scales, their lower ones, the same of all zeros, the keys' codes,
    the values' codes. Bytes of one kind compress, numbers as a whole hardly.
    """

    def __init__(self, layout: BlockLayout, bits: int, kernels: Kernels | None = None) -> None:
        """kernels: None for the fastest. Raises ConfigError for a head size that is odd: four bits come in pairs."""
        if bits == 4 and layout.head_dim % 2:
            raise ConfigError(f"int4: a head of {layout.head_dim} channels has no pairs")
        self._kernels = kernels or make_kernels(layout, bits)
        shape = CodesShape.of(layout, bits)
        num_scales = shape.num_key_scales + shape.num_value_scales
        self._sizes = (*(num_scales,) * 4, shape.code_bytes, shape.code_bytes)

    def encode(self, block: memoryview) -> list[bytes] | None:
        """The body's parts; None for numbers that have no finite ranges."""
        codes = self._kernels.quantise(block)
        return None if codes is None else list(sections.write(_sections(codes)))

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Writes the block's numbers. Raises CorruptKv, before it writes any."""
        found = [np.frombuffer(section, np.uint8) for section in sections.read(body, self._sizes)]
        bits = _joined(found[0], found[1]).astype(np.uint32)
        bits <<= _SCALE_SHIFT
        scales = bits.view(np.float32)
        if not in_range(scales):
            raise CorruptKv("an encoded block holds a scale that no codec writes")
        self._kernels.dequantise(Codes(scales, _joined(found[2], found[3]).view(np.int16), found[4], found[5]), into)


def _sections(codes: Codes) -> Iterator[memoryview]:
    scales = (codes.scales.view(np.uint32) >> _SCALE_SHIFT).astype(np.uint16)
    for numbers in (scales, codes.zeros.view(np.uint16)):
        yield (numbers >> np.uint16(8)).astype(np.uint8).data
        yield numbers.astype(np.uint8).data
    yield codes.keys.data
    yield codes.values.data


def _joined(upper: NDArray[np.uint8], lower: NDArray[np.uint8]) -> NDArray[np.uint16]:
    return upper.astype(np.uint16) << np.uint16(8) | lower
