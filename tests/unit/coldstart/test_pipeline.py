"""Loading one partition: right bytes, or an error with every thread ended; never wrong bytes that count as ready."""

from __future__ import annotations

import errno
import mmap
import threading
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.format import Partition, TensorEntry, checksum, num_chunks
from coldstart.pipeline import LoadProgress, MemoryDestination, PartitionLoad
from contracts.errors import Cancelled, CorruptCheckpoint, LoadError
from tests.support.byte_sources import BytesSource

if TYPE_CHECKING:
    from collections.abc import Callable

PAGE = 4096
CHUNK = 2 * PAGE
#: The last chunk is half a one.
DATA = np.random.default_rng(3).bytes(9 * CHUNK + PAGE)


def _partition(data: bytes = DATA) -> Partition:
    return Partition(
        file="weights",
        num_bytes=len(data),
        tensors=(
            TensorEntry(name="first", offset=0, shape=(CHUNK + 10,), dtype="float8_e5m2"),
            TensorEntry(name="second", offset=CHUNK + PAGE, shape=(8 * CHUNK,), dtype="float8_e5m2"),
        ),
        checksums=tuple(checksum(data[start : start + CHUNK]) for start in range(0, len(data), CHUNK)),
    )


def _memory(num_bytes: int = len(DATA)) -> mmap.mmap:
    return mmap.mmap(-1, num_bytes)


def _threads() -> set[str]:
    return {thread.name for thread in threading.enumerate() if thread.name.startswith("weights-")}


@pytest.mark.parametrize("num_threads", [1, 4, 30])
def test_all_chunks_are_read_once_into_their_place(num_threads: int) -> None:
    source, memory = BytesSource(DATA), _memory()
    report = PartitionLoad(source, _partition(), CHUNK, MemoryDestination(memory, CHUNK), num_threads=num_threads).run()
    assert memory[:] == DATA
    assert sorted(source.offsets) == list(range(0, len(DATA), CHUNK))
    assert (report.num_bytes, report.num_repaired) == (len(DATA), 0)
    assert not _threads()


def test_what_is_ready_is_a_verified_beginning() -> None:
    """Chunk 2 comes last: until then no more than the first two are ready, whatever else is verified."""
    memory, told = _memory(), list[LoadProgress]()
    others_came = threading.Event()

    def before(offset: int) -> None:
        if offset == 2 * CHUNK:
            assert others_came.wait(60)

    def progress(state: LoadProgress) -> None:
        told.append(state)
        assert memory[: state.ready_bytes] == DATA[: state.ready_bytes]
        if state.verified_bytes == len(DATA) - CHUNK:
            others_came.set()

    source = BytesSource(DATA, before=before)
    PartitionLoad(source, _partition(), CHUNK, MemoryDestination(memory, CHUNK), progress=progress).run()
    assert len(told) == num_chunks(len(DATA), CHUNK)
    assert [state.verified_bytes for state in told] == sorted(state.verified_bytes for state in told)
    assert [state.ready_bytes for state in told] == sorted(state.ready_bytes for state in told)
    assert told[-2].ready_bytes == 2 * CHUNK
    assert told[-1].ready_bytes == told[-1].verified_bytes == told[-1].total_bytes == len(DATA)


@given(st.integers(0, len(DATA) - 1), st.integers(0, 7))
def test_a_flipped_bit_anywhere_is_found(place: int, bit: int) -> None:
    damaged = bytearray(DATA)
    damaged[place] ^= 1 << bit
    memory, ready = _memory(), [0]
    load = PartitionLoad(
        BytesSource(bytes(damaged)),
        _partition(),
        CHUNK,
        MemoryDestination(memory, CHUNK),
        progress=lambda state: ready.append(state.ready_bytes),
    )
    with pytest.raises(CorruptCheckpoint, match=rf"bytes: chunk {place // CHUNK} \(bytes .* it holds (first|second)"):
        load.run()
    assert max(ready) <= place // CHUNK * CHUNK
    assert not _threads()


def test_the_tensors_of_a_wrong_chunk_are_named() -> None:
    damaged = bytearray(DATA)
    damaged[CHUNK + 5] ^= 1
    load = PartitionLoad(BytesSource(bytes(damaged)), _partition(), CHUNK, MemoryDestination(_memory(), CHUNK))
    with pytest.raises(CorruptCheckpoint, match=r"it holds first, second$"):
        load.run()


def test_a_chunk_that_came_wrong_is_read_again_elsewhere() -> None:
    def spoil(offset: int, view: memoryview) -> None:
        if offset == 3 * CHUNK:
            view[17] ^= 4

    memory, second = _memory(), BytesSource(DATA)
    load = PartitionLoad(
        BytesSource(DATA, spoil=spoil), _partition(), CHUNK, MemoryDestination(memory, CHUNK), second=second
    )
    assert load.run().num_repaired == 1
    assert memory[:] == DATA
    assert second.offsets == [3 * CHUNK]


@pytest.mark.parametrize(
    ("size", "state"), [(len(DATA) - PAGE, "truncated"), (len(DATA) + PAGE, "too long"), (0, "tr")]
)
def test_a_source_of_another_length_is_not_read(size: int, state: str) -> None:
    source = BytesSource((DATA + DATA)[:size])
    load = PartitionLoad(source, _partition(), CHUNK, MemoryDestination(_memory(), CHUNK))
    with pytest.raises(CorruptCheckpoint, match=f"bytes: {state}.* the index says {len(DATA)}"):
        load.run()
    assert source.offsets == []


@pytest.mark.parametrize(
    "error", [LoadError("disk: cannot read"), OSError(errno.EIO, "broken"), MemoryError(), ZeroDivisionError()]
)
@pytest.mark.parametrize("chunk", [0, 5, 9])
def test_an_error_in_any_thread_ends_all_and_comes_out(error: Exception, chunk: int) -> None:
    def before(offset: int) -> None:
        if offset == chunk * CHUNK:
            raise error

    source = BytesSource(DATA, before=before)
    with pytest.raises(type(error)) as told:
        PartitionLoad(source, _partition(), CHUNK, MemoryDestination(_memory(), CHUNK)).run()
    assert told.value is error
    assert source.num_reading == 0
    assert not _threads()


def test_an_error_of_who_is_told_ends_the_load() -> None:
    def progress(state: LoadProgress) -> None:
        if state.verified_bytes >= 3 * CHUNK:
            raise RuntimeError("enough")

    load = PartitionLoad(BytesSource(DATA), _partition(), CHUNK, MemoryDestination(_memory(), CHUNK), progress=progress)
    with pytest.raises(RuntimeError, match="enough"):
        load.run()
    assert not _threads()


def test_a_cancelled_load_ends_after_the_reads_under_way() -> None:
    reading, go_on = threading.Semaphore(0), threading.Event()

    def before(_: int) -> None:
        reading.release()
        assert go_on.wait(60)

    source = BytesSource(DATA, before=before)
    load = PartitionLoad(source, _partition(), CHUNK, MemoryDestination(_memory(), CHUNK), num_threads=3)
    ends: list[BaseException] = []

    def run() -> None:
        try:
            load.run()
        except BaseException as error:
            ends.append(error)

    runner = threading.Thread(target=run)
    runner.start()
    for _ in range(3):
        assert reading.acquire(timeout=60)
    load.cancel()
    go_on.set()
    runner.join(60)
    assert [type(end) for end in ends] == [Cancelled]
    assert len(source.offsets) == 3
    assert source.num_reading == 0
    assert not _threads()


def test_a_load_cancelled_before_it_begins_reads_nothing() -> None:
    source = BytesSource(DATA)
    load = PartitionLoad(source, _partition(), CHUNK, MemoryDestination(_memory(), CHUNK))
    load.cancel()
    with pytest.raises(Cancelled):
        load.run()
    assert source.offsets == []


def test_memory_must_begin_at_a_page() -> None:
    with pytest.raises(ValueError, match="not at a page"):
        MemoryDestination(memoryview(_memory())[8:], CHUNK)


@pytest.mark.parametrize("populate", [True, False])
def test_populated_memory_gets_the_same_bytes(populate: bool) -> None:
    memory = _memory()
    destination = MemoryDestination(memory, CHUNK, populate=populate)
    PartitionLoad(BytesSource(DATA), _partition(), CHUNK, destination).run()
    assert memory[:] == DATA


def _failing(start: Callable[[int], bool]) -> Callable[[int], None]:
    def before(offset: int) -> None:
        if start(offset // CHUNK):
            raise LoadError(f"chunk {offset // CHUNK}")

    return before


@given(st.sets(st.integers(0, 9), min_size=1), st.integers(1, 6))
def test_of_several_errors_one_comes_out(failing: set[int], num_threads: int) -> None:
    source = BytesSource(DATA, before=_failing(lambda chunk: chunk in failing))
    load = PartitionLoad(source, _partition(), CHUNK, MemoryDestination(_memory(), CHUNK), num_threads=num_threads)
    with pytest.raises(LoadError, match="chunk") as told:
        load.run()
    assert told.value.message in {f"chunk {chunk}" for chunk in failing}
    assert not _threads()
