"""Copies the blocks of a pull between two mappings, without the GIL.

Done by a C function of a few lines where there is a compiler: one call for all of a pull. The loop in Python is
about as fast on an idle process for large blocks, but it lets the GIL go and takes it again for every run of blocks,
and next to a busy thread each taking can last 5 ms: 16 KiB blocks then move at a hundredth of the speed.
"""

from __future__ import annotations

import ctypes
import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from engine.native_build import NativeBuild
from kvtransfer.transport import check_pairs, runs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from kvtransfer.transport import BlockPair

#: Bytes copied between two looks at the stop flag.
PIECE_BYTES = 4 << 20

#: Pairs turned into an array in one go, which holds the GIL: 0.05 us each.
_PAIRS_AT_ONCE = 8192

_SOURCE = Path(__file__).with_name("block_copy.c")
_FLAGS = ("-O2", "-shared", "-fPIC")


class StopFlag:
    """Set by one thread, seen by another that copies."""

    def __init__(self) -> None:
        self._word = ctypes.c_int32(0)
        self.address = ctypes.addressof(self._word)

    def set(self) -> None:
        self._word.value = 1

    def __bool__(self) -> bool:
        return self._word.value != 0


class Blocks(Protocol):
    """Blocks that lie one after the other from `address` on."""

    @property
    def address(self) -> int: ...

    @property
    def num_blocks(self) -> int: ...


class BlockCopy(Protocol):
    """Copies blocks; returns the bytes copied, all of them unless `stop` was seen set."""

    def __call__(
        self, source: Blocks, target: Blocks, block_bytes: int, pairs: Sequence[BlockPair], stop: StopFlag
    ) -> int:
        """Raises BadRequest, before a byte is copied, for a pair of a block that is not there."""
        ...


def copy_in_python(source: Blocks, target: Blocks, block_bytes: int, pairs: Sequence[BlockPair], stop: StopFlag) -> int:
    """`BlockCopy` without a compiler."""
    check_pairs(pairs, source.num_blocks, target.num_blocks)
    copied = 0
    for first_source, first_target, num_blocks in runs(pairs):
        reading = source.address + first_source * block_bytes
        writing = target.address + first_target * block_bytes
        end = writing + num_blocks * block_bytes
        while writing < end:
            if stop:
                return copied
            size = min(PIECE_BYTES, end - writing)
            ctypes.memmove(writing, reading, size)
            copied += size
            reading += size
            writing += size
    return copied


class NativeCopy:
    """`BlockCopy` by the compiled function."""

    def __init__(self, library: Path) -> None:
        """Raises OSError where the library cannot be loaded."""
        self._copy = ctypes.CDLL(str(library)).tandem_copy_blocks
        self._copy.argtypes = (ctypes.c_void_p,) * 3 + (ctypes.c_int64,) * 2 + (ctypes.c_void_p,)
        self._copy.restype = ctypes.c_int64

    def __call__(
        self, source: Blocks, target: Blocks, block_bytes: int, pairs: Sequence[BlockPair], stop: StopFlag
    ) -> int:
        table = _as_array(pairs)
        if not _all_below(table[0::2], source.num_blocks) or not _all_below(table[1::2], target.num_blocks):
            check_pairs(pairs, source.num_blocks, target.num_blocks)
        return int(self._copy(target.address, source.address, table.ctypes.data, len(pairs), block_bytes, stop.address))


def _as_array(pairs: Sequence[BlockPair]) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    table = np.empty(2 * len(pairs), np.int64)
    numbers = itertools.chain.from_iterable(pairs)
    for start in range(0, len(table), 2 * _PAIRS_AT_ONCE):
        part = table[start : start + 2 * _PAIRS_AT_ONCE]
        part[:] = np.fromiter(numbers, np.int64, len(part))
    return table


def _all_below(numbers: np.ndarray[tuple[int], np.dtype[np.int64]], limit: int) -> bool:
    # Negative numbers are large as unsigned ones.
    return not len(numbers) or int(numbers.view(np.uint64).max()) < limit


class CopyBuild(NativeBuild):
    """Has the C function compiled by another process, once per machine and user; nobody waits for it."""

    def __init__(self, *, compiler: str | None = None, cache_dir: Path | None = None) -> None:
        """As `NativeBuild`; the library lies in `copy`."""
        super().__init__(_SOURCE, name="copy", flags=_FLAGS, compiler=compiler, cache_dir=cache_dir)

    def take(self) -> BlockCopy:
        """The compiled function, or the loop in Python where that cannot be had."""
        try:
            return NativeCopy(self.library)
        except OSError:
            return copy_in_python
