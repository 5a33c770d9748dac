"""Compressed copies in memory: loaded as what they were made from, or an error; bounded, and measured before."""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.codec_trial import try_codec
from coldstart.codecs.registry import BEST
from coldstart.compressed import CompressedCopy, Compression, RawCopy, overhead_bytes
from coldstart.compressing import bound_bytes
from coldstart.format import Index, Partition, TensorEntry, checksum, encode_index, partition_name
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError
from engine.safetensors_files import ITEM_BYTES
from tests.unit.coldstart.codecs.test_chunk_codecs import gaussian

if TYPE_CHECKING:
    from engine.safetensors_files import StoredDtype

CHUNK = 16 * 4096
#: The last chunk is a quarter of one.
NUM_BYTES = 11 * CHUNK + 4 * 4096


@dataclass
class Stored:
    weights: bytes
    index: bytes

    @property
    def raw(self) -> RawCopy:
        return RawCopy(self.weights + self.index, len(self.weights), len(self.index), rank=0, name="a model")

    def compressed(self, room: int = 2 * NUM_BYTES, codec: str = BEST) -> bytes:
        memory = bytearray(room)
        return bytes(memory[: Compression(self.raw, memory, codec, num_threads=3).run()])


def stored(dtype: StoredDtype = "bfloat16", num_bytes: int = NUM_BYTES, seed: int = 0) -> Stored:
    if dtype.startswith("float8"):
        weights = np.random.default_rng(seed).integers(0, 9, num_bytes, np.uint8).tobytes()
    else:
        weights = gaussian(num_bytes, dtype, seed)
    sums = tuple(checksum(weights[start : start + CHUNK]) for start in range(0, num_bytes, CHUNK))
    tensor = TensorEntry(name="embedding", offset=0, shape=(num_bytes // ITEM_BYTES[dtype],), dtype=dtype)
    partition = Partition(file=partition_name(0, 1), num_bytes=num_bytes, tensors=(tensor,), checksums=sums)
    index = Index(
        model_fingerprint="model", dtype=dtype, tensor_parallel=1, chunk_bytes=CHUNK, partitions=(partition,), files=()
    )
    return Stored(weights, encode_index(index))


def loaded(copy: bytes, num_bytes: int = NUM_BYTES) -> bytes:
    memory = mmap.mmap(-1, num_bytes)
    CompressedCopy(copy, rank=0, name="compressed").load(memoryview(memory), num_threads=3)
    return memory[:]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float8_e4m3fn"])
@pytest.mark.parametrize("codec", ["raw", "zstd", BEST])
def test_what_was_compressed_is_loaded_bit_by_bit(dtype: StoredDtype, codec: str) -> None:
    original = stored(dtype)
    copy = original.compressed(codec=codec)
    assert loaded(copy) == original.weights
    opened = CompressedCopy(copy, rank=0, name="compressed")
    assert (opened.index_data, opened.num_bytes) == (original.index, NUM_BYTES)
    assert (len(copy) < NUM_BYTES) == (codec != "raw")


def test_how_far_it_is_is_told() -> None:
    seen = list[tuple[int, int]]()

    def note(done_bytes: int, total_bytes: int) -> None:
        seen.append((done_bytes, total_bytes))

    original = stored()
    memory = bytearray(2 * NUM_BYTES)
    Compression(original.raw, memory, BEST, num_threads=2, progress=note).run()
    assert len(seen) == 12
    assert seen == sorted(seen)
    assert seen[-1] == (NUM_BYTES, NUM_BYTES)


def test_more_room_than_was_given_is_never_taken() -> None:
    original = stored()
    size = len(original.compressed())
    for room in (0, 100, overhead_bytes(12, len(original.index)), size // 2, size - 64):
        guard = bytearray(b"\xa5" * (room + 4096))
        with pytest.raises(LoadError, match=f"larger than {room} bytes"):
            Compression(original.raw, memoryview(guard)[:room], BEST, num_threads=2).run()
        assert guard[room:] == b"\xa5" * 4096
    assert loaded(original.compressed(size)) == original.weights


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damage_is_an_error_and_never_other_weights(data: st.DataObject) -> None:
    original = stored(num_bytes=3 * CHUNK)
    copy = bytearray(original.compressed())
    place = data.draw(st.integers(0, 200) | st.integers(0, len(copy) - 1))
    copy[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert loaded(bytes(copy), 3 * CHUNK) == original.weights
    except CorruptCheckpoint:
        return


def test_an_exponent_that_changed_is_an_error_that_names_the_tensor() -> None:
    original = stored()
    copy = bytearray(original.compressed())
    copy[-CHUNK // 4] ^= 64
    with pytest.raises(CorruptCheckpoint, match=r"compressed: chunk .*embedding"):
        loaded(bytes(copy))


def test_what_is_no_compressed_copy_is_an_error() -> None:
    copy = stored().compressed()
    wrong = [b"", copy[:20], copy[:56], copy[: len(copy) // 2], bytes(len(copy)), copy[8:] + bytes(8)]
    wrong.append(copy[:8] + struct.pack("<Q", 1 << 62) + copy[16:])
    for data in wrong:
        with pytest.raises(CorruptCheckpoint, match="compressed: damaged"):
            CompressedCopy(data, rank=0, name="compressed")
    with pytest.raises(ConfigError, match="no rank 1 of 1"):
        CompressedCopy(copy, rank=1, name="compressed")


def test_a_raw_copy_that_contradicts_itself_is_an_error() -> None:
    original = stored()
    whole = original.weights + original.index
    with pytest.raises(CorruptCheckpoint, match="bytes of memory, not"):
        RawCopy(whole[:-1], NUM_BYTES, len(original.index), rank=0, name="a model")
    with pytest.raises(CorruptCheckpoint, match="not of"):
        RawCopy(bytes(4096) + whole, NUM_BYTES + 4096, len(original.index), rank=0, name="a model")
    with pytest.raises(CorruptCheckpoint, match="not an index"):
        RawCopy(whole, NUM_BYTES, 17, rank=0, name="a model")


@pytest.mark.parametrize("num_threads", [1, 3])
def test_a_trial_tells_size_and_rates(num_threads: int) -> None:
    ticks = count()
    raw = stored().raw
    rates = try_codec(raw, BEST, num_threads=num_threads, now_s=lambda: float(next(ticks)))
    # The clock is looked at before and after each way.
    sampled = sum(len(raw.chunk(place * 12 // (4 * num_threads))) for place in range(4 * num_threads))
    assert rates.sampled_bytes == sampled
    assert rates.compress_bytes_per_s == rates.decode_bytes_per_s == sampled
    assert 1.45 < rates.ratio < 1.55
    assert rates.num_threads == num_threads


@pytest.mark.parametrize("num_chunks", [1, 4, 12, 100])
def test_a_bound_by_a_trial_holds_what_is_like_it(num_chunks: int) -> None:
    original = stored()
    raw = original.raw
    rates = try_codec(raw, BEST, num_threads=2, now_s=lambda: 0.0, num_chunks=num_chunks)
    beside = overhead_bytes(raw.num_chunks, len(raw.index_data))
    bound = bound_bytes(NUM_BYTES, beside, CHUNK, rates)
    assert bound < NUM_BYTES
    assert loaded(original.compressed(bound)) == original.weights
