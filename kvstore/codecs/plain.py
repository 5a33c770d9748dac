"""The codecs that lose nothing: a block as it is, and its bytes compressed by place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from contracts.errors import CorruptKv
from contracts.layout import DTYPE_BYTES
from kvstore.codecs import sections

if TYPE_CHECKING:
    from contracts.layout import BlockLayout


class RawForm:
    def __init__(self, layout: BlockLayout) -> None:
        self._layout = layout

    def encode(self, block: memoryview) -> list[bytes]:
        return [bytes(block)]

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Raises CorruptKv."""
        if len(body) != self._layout.block_bytes:
            raise CorruptKv(f"an encoded block holds {len(body)} bytes, not {self._layout.block_bytes}")
        into[:] = body


class PlanesForm:
    """The first bytes of all numbers, then their second ones, ...: signs and exponents repeat, digits do not."""

    def __init__(self, layout: BlockLayout) -> None:
        self._number_bytes = DTYPE_BYTES[layout.dtype]
        self._num_numbers = layout.block_bytes // self._number_bytes

    def encode(self, block: memoryview) -> list[bytes]:
        planes = np.frombuffer(block, np.uint8).reshape(-1, self._number_bytes).T
        return list(sections.write(np.ascontiguousarray(plane).data for plane in planes))

    def decode(self, body: memoryview, into: memoryview) -> None:
        """Raises CorruptKv, before it writes anything."""
        planes = sections.read(body, (self._num_numbers,) * self._number_bytes)
        target = np.frombuffer(into, np.uint8).reshape(-1, self._number_bytes)
        for place, plane in enumerate(planes):
            target[:, place] = np.frombuffer(plane, np.uint8)
