"""A partition's weights in memory, compressed: records of its chunks, to be loaded as from any other source.

    header       what follows, and a checksum over header and table
    table        where each chunk's record begins, and how long it is
    index        the partition's, as it stood behind the weights
    records      in whatever order they were made

Nobody but the process that wrote one and those of the same node agent read it. It is checked all the same, before any
of its lengths is believed; of the weights every chunk is checked against the index's checksum once it is decoded.
"""

from __future__ import annotations

import struct
import threading
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from coldstart.codecs.registry import ChunkCodec, decode_chunk
from coldstart.cold_copies import COMPRESSED_TIER
from coldstart.format import decode_index, num_chunks
from coldstart.loader import Loaded
from coldstart.memory import as_array
from coldstart.pipeline import MemoryDestination, PartitionLoad
from coldstart.reading import partition_of
from contracts.errors import CorruptCheckpoint, LoadError
from engine.safetensors_files import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from typing_extensions import Buffer

    from coldstart.format import Index
    from coldstart.pipeline import LoadProgress
    from coldstart.residence import WeightsKey

_MAGIC = b"tdmcold1"
#: Magic, chunks, bytes of a chunk, of weights, of the index, and of all; behind it the checksum of it and the table.
_HEADER = struct.Struct("<8sQQQQQ")
_CHECKSUM = struct.Struct("<Q")
#: By chunk: its record's start and length.
_TABLE_ITEM = np.dtype("<u8")
#: Records begin at multiples of it.
_RECORD_ALIGNMENT = 64


def overhead_bytes(count: int, index_bytes: int) -> int:
    """What a compressed copy of so many chunks takes beside its records, at most."""
    return _records_start(count, index_bytes) + count * _RECORD_ALIGNMENT


def _records_start(count: int, index_bytes: int) -> int:
    size = _HEADER.size + _CHECKSUM.size + 2 * count * _TABLE_ITEM.itemsize + index_bytes
    return -(-size // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT


class RawCopy:
    """A partition as it lies in shared memory: its bytes, and its index behind them."""

    def __init__(self, memory: Buffer, weight_bytes: int, index_bytes: int, *, rank: int, name: str) -> None:
        """`memory`: sealed, and verified when it was filled. Raises CorruptCheckpoint, ConfigError."""
        view = as_array(memory)
        if len(view) < weight_bytes + index_bytes:
            raise CorruptCheckpoint(f"{name}: {len(view)} bytes of memory, not {weight_bytes + index_bytes}")
        self.name = name
        self.weights = view[:weight_bytes]
        self.index_data = view[weight_bytes : weight_bytes + index_bytes].tobytes()
        self.index = decode_index(self.index_data, where=name)
        if partition_of(self.index, rank).num_bytes != weight_bytes:
            raise CorruptCheckpoint(f"{name}: its index is not of {weight_bytes} bytes of weights")
        self.chunk_bytes = self.index.chunk_bytes

    @property
    def item_bytes(self) -> int:
        return ITEM_BYTES[self.index.dtype]

    @property
    def num_chunks(self) -> int:
        return num_chunks(len(self.weights), self.chunk_bytes)

    def chunk(self, number: int) -> NDArray[np.uint8]:
        return self.weights[number * self.chunk_bytes : (number + 1) * self.chunk_bytes]


class Compression:
    """One raw copy on its way into a compressed one. `run` blocks; its threads leave the GIL to each other."""

    def __init__(
        self,
        source: RawCopy,
        into: Buffer,
        codec: str,
        *,
        num_threads: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """`into`: writable memory; `progress(bytes done, bytes in all)` is called by one thread at a time."""
        self._source = source
        self._into = as_array(into)
        self._codec = ChunkCodec(codec, source.item_bytes)
        self._num_threads = num_threads
        self._progress = progress
        self._table = np.zeros((source.num_chunks, 2), _TABLE_ITEM)
        self._guard = threading.Lock()
        self._next_chunk = 0
        self._end = _records_start(source.num_chunks, len(source.index_data))
        self._done_bytes = 0
        self._error: BaseException | None = None

    def run(self) -> int:
        """Bytes of memory that it took. Raises LoadError where there is not enough."""
        if self._end > len(self._into):
            raise self._too_large()
        count = max(1, min(self._num_threads, self._source.num_chunks))
        threads = [threading.Thread(target=self._work, name=f"compress-{i}", daemon=True) for i in range(count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self._error is not None:
            raise self._error
        self._write_head()
        return self._end

    def _work(self) -> None:
        try:
            while (number := self._take()) is not None:
                self._compress(number)
        except BaseException as error:
            with self._guard:
                self._error = self._error or error

    def _take(self) -> int | None:
        with self._guard:
            if self._error is not None or self._next_chunk == self._source.num_chunks:
                return None
            self._next_chunk += 1
            return self._next_chunk - 1

    def _compress(self, number: int) -> None:
        chunk = self._source.chunk(number)
        parts = self._codec.encode(chunk.data)
        length = sum(map(len, parts))
        with self._guard:
            start = self._end
            if start + length > len(self._into):
                raise self._too_large()
            self._end = min(-(-(start + length) // _RECORD_ALIGNMENT) * _RECORD_ALIGNMENT, len(self._into))
            self._table[number] = (start, length)
        for part in parts:
            np.copyto(self._into[start : start + len(part)], np.frombuffer(part, np.uint8))
            start += len(part)
        with self._guard:
            self._done_bytes += len(chunk)
            if self._progress is not None:
                self._progress(self._done_bytes, len(self._source.weights))

    def _write_head(self) -> None:
        source = self._source
        head = _HEADER.pack(
            _MAGIC,
            source.num_chunks,
            source.chunk_bytes,
            len(source.weights),
            len(source.index_data),
            self._end,
        )
        table = self._table.tobytes()
        whole = head + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(head + table)) + table + source.index_data
        self._into[: len(whole)] = np.frombuffer(whole, np.uint8)

    def _too_large(self) -> LoadError:
        return LoadError(f"{self._source.name}: compressed it is larger than {len(self._into)} bytes")


class CompressedCopy:
    """`coldstart.source.ByteSource` over a compressed copy, for reads of whole chunks; and what else there is to load
    it. Its memory is held until it goes."""

    def __init__(self, memory: Buffer, *, rank: int, name: str) -> None:
        """Raises CorruptCheckpoint for what is no compressed copy of a partition of that rank, and ConfigError."""
        self.name = name
        self._memory = as_array(memory)
        data = self._memory.data
        if len(data) < _HEADER.size + _CHECKSUM.size:
            raise self._damaged("too short")
        magic, count, chunk_bytes, num_bytes, index_bytes, end = _HEADER.unpack_from(data)
        self.num_bytes = int(num_bytes)
        table_start = _HEADER.size + _CHECKSUM.size
        table_end = table_start + 2 * count * _TABLE_ITEM.itemsize
        if magic != _MAGIC or end > len(data) or table_end + index_bytes > end:
            raise self._damaged("no header")
        table = data[table_start:table_end]
        (told,) = _CHECKSUM.unpack_from(data, _HEADER.size)
        if xxhash.xxh3_64_intdigest(bytes(data[: _HEADER.size]) + bytes(table)) != told:
            raise self._damaged("its checksum is wrong")
        self._records: list[list[int]] = np.frombuffer(table, _TABLE_ITEM).reshape(-1, 2).tolist()
        if any(start + length > end for start, length in self._records):
            raise self._damaged("a record ends behind its end")
        self.index_data = bytes(data[table_end : table_end + index_bytes])
        self.index: Index = decode_index(self.index_data, where=name)
        partition = partition_of(self.index, rank)
        if (partition.num_bytes, self.index.chunk_bytes, len(partition.checksums)) != (
            self.num_bytes,
            chunk_bytes,
            count,
        ):
            raise self._damaged("its index is of something else")
        self._partition = partition

    def read_into(self, offset: int, into: Buffer) -> None:
        """As `ByteSource.read_into`; `offset` is the start of a chunk, and `into` as long as the chunk. Raises
        CorruptCheckpoint."""
        number, rest = divmod(offset, self.index.chunk_bytes)
        if rest or not 0 <= number < len(self._records):
            raise ValueError(f"{self.name}: chunks are read whole, not from byte {offset} on")
        start, length = self._records[number]
        try:
            decode_chunk(self._memory[start : start + length].data, into)
        except CorruptCheckpoint as error:
            raise CorruptCheckpoint(f"{self.name}: chunk {number}: {error.message}") from error

    def close(self) -> None:
        """Nothing is held open."""

    def load(
        self, memory: memoryview, *, num_threads: int, progress: Callable[[LoadProgress], None] | None = None
    ) -> None:
        """Fills `memory`, of the partition's length and page-aligned, with verified weights. Blocks.

        Raises CorruptCheckpoint, Cancelled: then what lies there is not to be used.
        """
        destination = MemoryDestination(memory, self.index.chunk_bytes)
        try:
            PartitionLoad(
                self,
                self._partition,
                self.index.chunk_bytes,
                destination,
                num_threads=num_threads,
                progress=progress,
            ).run()
        finally:
            destination.stop()

    def _damaged(self, how: str) -> CorruptCheckpoint:
        return CorruptCheckpoint(f"{self.name}: damaged: {how}")


class CompressedLoader:
    """As `coldstart.loader.WeightLoader`, of a copy that is in memory compressed. Use as a context manager."""

    def __init__(
        self,
        key: WeightsKey,
        memory: Buffer,
        *,
        num_threads: int,
        progress: Callable[[str, int, int], None],
    ) -> None:
        """`progress(what, bytes done, bytes in all)` is called often. Raises CorruptCheckpoint, ConfigError."""
        self._copy = CompressedCopy(memory, rank=key.rank, name=f"{key.folder}, compressed")
        self._num_threads = num_threads
        self._progress = progress

    def __enter__(self) -> CompressedLoader:
        return self

    def __exit__(self, *_: object) -> None:
        self._copy.close()

    def prepare(self) -> int:
        """Bytes of memory that `fill` needs."""
        return self._copy.num_bytes + len(self._copy.index_data)

    def fill(self, memory: memoryview) -> Loaded:
        """As `WeightLoader.fill`."""
        copy = self._copy
        copy.load(
            memory[: copy.num_bytes],
            num_threads=self._num_threads,
            progress=lambda at: self._progress("weights", at.verified_bytes, at.total_bytes),
        )
        memory[copy.num_bytes : copy.num_bytes + len(copy.index_data)] = copy.index_data
        return Loaded(weight_bytes=copy.num_bytes, index_bytes=len(copy.index_data), tier=COMPRESSED_TIER)
