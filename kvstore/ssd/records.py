"""Makes records of blocks, in memory from which they can be written as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from kvstore.ssd.codec import RAW, copy
from kvstore.ssd.format import (
    MAX_RECORD_BLOCKS,
    aligned,
    block_checksum,
    header_bytes_for,
    new_rows,
    set_keys,
    whole_pages,
    write_header,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import numpy as np
    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from kvstore.ssd.codec import BlockCodec


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredBlock:
    """A block that is to be stored."""

    key: bytes
    #: In its sequence, counted from 0.
    position: int
    #: The block's bytes; must not change until the call that got it has ended.
    payload: memoryview
    #: It may go through a lossy codec.
    lossy: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedBlock:
    """A block as it lies on disk."""

    key: bytes
    position: int
    codec: int
    data: Buffer


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """All but its header is in the buffer, for that needs to know where the record will stand."""

    buffer: memoryview
    num_bytes: int
    rows: NDArray[np.void]

    def seal(self, *, sequence: int, offset: int, identity: bytes, wall_s: float) -> memoryview:
        """The bytes to write at that place."""
        write_header(
            self.buffer,
            self.rows,
            record_bytes=self.num_bytes,
            sequence=sequence,
            offset=offset,
            identity=identity,
            wall_s=wall_s,
        )
        return self.buffer[: self.num_bytes]


def blocks_per_record(block_bytes: int, payload_bytes: int) -> int:
    """Blocks of any codec that surely fit: at least one where a block fits at all."""
    return min(payload_bytes // aligned(block_bytes), MAX_RECORD_BLOCKS)


def buffer_bytes_for(block_bytes: int, payload_bytes: int) -> int:
    num_blocks = blocks_per_record(block_bytes, payload_bytes)
    return header_bytes_for(num_blocks) + whole_pages(num_blocks * aligned(block_bytes))


def encode_blocks(
    blocks: Sequence[StoredBlock],
    exact: BlockCodec,
    lossy: BlockCodec,
    on_failure: Callable[[BlockCodec, Exception], None],
) -> Iterator[EncodedBlock]:
    """One after another, each while it is needed. A block that a codec does not make smaller, or fails on, stays as it
    is; of the latter `on_failure` hears."""
    for block in blocks:
        codec = lossy if block.lossy else exact
        data: Buffer = block.payload
        if codec is not RAW:
            try:
                data = codec.encode(block.payload)
            except Exception as error:
                on_failure(codec, error)
                codec = RAW
            if memoryview(data).nbytes >= block.payload.nbytes:
                codec, data = RAW, block.payload
        yield EncodedBlock(key=block.key, position=block.position, codec=codec.codec_id, data=data)


def make_record(buffer: memoryview, blocks: Iterator[EncodedBlock], num_blocks: int) -> Record:
    """A record of `num_blocks` blocks; they must fit."""
    rows = new_rows(num_blocks)
    end = header_bytes_for(num_blocks)
    keys: list[bytes] = []
    for row, block in zip(rows, blocks, strict=True):
        data = memoryview(block.data).cast("B")
        start = aligned(end)
        end = start + len(data)
        copy(buffer[start:end], data)
        row["checksum"] = block_checksum(block.key, buffer[start:end])
        row["start"], row["length"] = start, len(data)
        row["position"], row["codec"] = block.position, block.codec
        keys.append(block.key)
    set_keys(rows, keys)
    num_bytes = whole_pages(end)
    # What an earlier record left in the buffer is nobody's business.
    buffer[end:num_bytes] = bytes(num_bytes - end)
    return Record(buffer=buffer, num_bytes=num_bytes, rows=rows)
