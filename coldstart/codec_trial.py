"""What a codec does with a copy's own chunks on this machine: how small, and how fast by so many threads."""

from __future__ import annotations

import mmap
import threading
from itertools import count
from typing import TYPE_CHECKING

from coldstart.codecs.planes import plane_kernels
from coldstart.codecs.registry import ChunkCodec, decode_chunk
from coldstart.compressing import CodecRates
from coldstart.memory import as_array

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from coldstart.compressed import RawCopy

#: Chunks for each thread: enough that none is idle for long while the last ones are done.
_CHUNKS_PER_THREAD = 4
#: It takes memory for them twice, which nobody has promised.
_MOST_CHUNKS = 32
#: The best of so many counts: others are at work on the machine too.
_TIMES = 3


def try_codec(
    source: RawCopy, codec: str, *, num_threads: int, now_s: Callable[[], float], num_chunks: int | None = None
) -> CodecRates:
    """Compresses some chunks from all over the copy and decodes them again; blocks, some 100 ms.

    `num_chunks`: other than the usual few. A copy of no bytes has no rates: raises ValueError.
    """
    wanted = min(source.num_chunks, num_chunks or min(_MOST_CHUNKS, max(1, num_threads) * _CHUNKS_PER_THREAD))
    if not wanted:
        raise ValueError(f"{source.name}: has no weights")
    chunks = [source.chunk(place * source.num_chunks // wanted) for place in range(wanted)]
    coder = ChunkCodec(codec, source.item_bytes)
    # Nobody is to wait for a compiler while it is timed.
    plane_kernels()
    records = [b""] * wanted

    def encode(place: int) -> None:
        records[place] = b"".join(bytes(part) for part in coder.encode(chunks[place].data))

    compress_s = min(_seconds(encode, wanted, num_threads, now_s) for _ in range(_TIMES))
    decode_s = min(_decode_s(records, chunks, source.chunk_bytes, num_threads, now_s) for _ in range(_TIMES))
    sampled_bytes = sum(map(len, chunks))
    return CodecRates(
        sampled_bytes=sampled_bytes,
        compressed_bytes=sum(map(len, records)),
        compress_bytes_per_s=sampled_bytes / compress_s,
        decode_bytes_per_s=sampled_bytes / decode_s,
        num_threads=num_threads,
    )


def _decode_s(
    records: Sequence[bytes],
    chunks: Sequence[NDArray[np.uint8]],
    chunk_bytes: int,
    num_threads: int,
    now_s: Callable[[], float],
) -> float:
    """Into memory that has no pages yet."""
    fresh = as_array(mmap.mmap(-1, len(chunks) * chunk_bytes))

    def decode(place: int) -> None:
        start = place * chunk_bytes
        decode_chunk(records[place], fresh[start : start + len(chunks[place])].data)

    return _seconds(decode, len(chunks), num_threads, now_s)


def _seconds(work: Callable[[int], None], num_items: int, num_threads: int, now_s: Callable[[], float]) -> float:
    """Until all items are done, by that many threads."""
    numbers, guard = count(), threading.Lock()
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while True:
                with guard:
                    place = next(numbers)
                if place >= num_items or errors:
                    return
                work(place)
        except BaseException as error:
            errors.append(error)

    threads: Sequence[threading.Thread] = [
        threading.Thread(target=run, name=f"codec-trial-{i}", daemon=True) for i in range(max(1, num_threads))
    ]
    begin_s = now_s()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return max(now_s() - begin_s, 1e-9)
