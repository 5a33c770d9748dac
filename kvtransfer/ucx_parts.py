"""How a pull's pairs become what NIXL is told: pieces of memory on both sides, in parts. Pure."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from kvtransfer.transport import check_pairs, runs

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from kvtransfer.transport import BlockPair

    #: One row per piece of memory: address, bytes, device.
    Pieces = NDArray[np.uint64]

#: So few pairs are joined faster one by one than all at once.
FEW_PAIRS = 32


@dataclass(frozen=True, slots=True)
class Region:
    """Where a pool lies."""

    #: Of block 0.
    address: int
    num_blocks: int
    #: Number of the CUDA device that holds it; None: host memory.
    device: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """To be posted at once. A row of one side is copied to the same row of the other."""

    sources: Pieces
    targets: Pieces
    num_bytes: int


def parts(pairs: Sequence[BlockPair], source: Region, own: Region, block_bytes: int, part_bytes: int) -> list[Part]:
    """Whole blocks of at most `part_bytes` together, or a single one, in the order of `pairs`; neighbours are joined.

    Costs a block next to nothing beside the copying of it. Raises BadRequest where a pair names a block that one of
    the two pools does not have.
    """
    blocks_per_part = max(1, part_bytes // block_bytes)
    if len(pairs) <= min(FEW_PAIRS, blocks_per_part):
        return _one_part(pairs, source, own, block_bytes)
    table = np.fromiter(itertools.chain.from_iterable(pairs), np.int64, 2 * len(pairs)).reshape(-1, 2)
    # A negative number is a very large one without its sign.
    last_source, last_target = np.maximum.reduce(table.view(np.uint64)).tolist()
    if last_source >= source.num_blocks or last_target >= own.num_blocks:
        check_pairs(pairs, source.num_blocks, own.num_blocks)
    steps = table[1:] - table[:-1]
    begins = np.empty(len(pairs), np.bool_)
    begins[1:] = (steps[:, 0] != 1) | (steps[:, 1] != 1)
    begins[::blocks_per_part] = True
    (firsts,) = begins.nonzero()
    lengths = np.empty_like(firsts)
    lengths[:-1] = firsts[1:] - firsts[:-1]
    lengths[-1] = len(pairs) - firsts[-1]
    joined = table[firsts]
    from_pieces = _pieces(source, joined[:, 0], lengths, block_bytes)
    to_pieces = _pieces(own, joined[:, 1], lengths, block_bytes)
    if len(pairs) <= blocks_per_part:
        return [Part(from_pieces, to_pieces, len(pairs) * block_bytes)]
    starts = range(0, len(pairs), blocks_per_part)
    cuts = itertools.pairwise([*firsts.searchsorted(starts).tolist(), len(firsts)])
    return [
        Part(from_pieces[begin:end], to_pieces[begin:end], min(blocks_per_part, len(pairs) - start) * block_bytes)
        for start, (begin, end) in zip(starts, cuts, strict=True)
    ]


def _one_part(pairs: Sequence[BlockPair], source: Region, own: Region, block_bytes: int) -> list[Part]:
    check_pairs(pairs, source.num_blocks, own.num_blocks)
    joined = list(runs(pairs))
    if not joined:
        return []
    sides = (
        _rows(source, ((first, length) for first, _, length in joined), block_bytes),
        _rows(own, ((first, length) for _, first, length in joined), block_bytes),
    )
    return [Part(*sides, len(pairs) * block_bytes)]


def _rows(region: Region, blocks: Iterable[tuple[int, int]], block_bytes: int) -> Pieces:
    device = region.device or 0
    return np.array(
        [(region.address + first * block_bytes, length * block_bytes, device) for first, length in blocks], np.uint64
    )


def _pieces(region: Region, firsts: NDArray[np.int64], lengths: NDArray[np.int64], block_bytes: int) -> Pieces:
    table = np.empty((len(firsts), 3), np.uint64)
    table[:, 0] = firsts * block_bytes + region.address
    table[:, 1] = lengths * block_bytes
    table[:, 2] = region.device or 0
    return table
