"""Bytes of a remote checkpoint go to memory and to the disk at once, and memory never waits for the disk."""

from __future__ import annotations

import errno
import os
import threading
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coldstart.chunk_fetch import FetchSettings
from coldstart.durable import DurableFiles
from coldstart.local_tier import LocalTier
from coldstart.through import Through, ThroughSettings, open_through
from coldstart.tier_handles import Entry, Loading
from coldstart.tier_records import CheckpointKey
from contracts.errors import ConfigError, CorruptCheckpoint
from tests.support.converted_folders import CHUNK_BYTES, MemoryRemote, converted_folder
from tests.support.tier_faults import FakeClock, Life, MortalDurableFiles, QuickTierFiles

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

NUM_CHUNKS = 6
SETTINGS = ThroughSettings(fetch=FetchSettings(num_connections=2, span_bytes=2 * CHUNK_BYTES))


def open_tier(root: Path, *, capacity_bytes: int = 1 << 30) -> LocalTier:
    return LocalTier(root, capacity_bytes=capacity_bytes, files=QuickTierFiles(), clock=FakeClock())


def weights(rank: int) -> str:
    return f"weights-0000{rank + 1}-of-00002.tandem"


def begin(
    remote: MemoryRemote, tier: LocalTier, *, how: ThroughSettings = SETTINGS, files: DurableFiles | None = None
) -> Through:
    through = open_through(remote, tier, settings=how, files=files or DurableFiles())
    assert isinstance(through, Through)
    return through


def load(through: Through, rank: int) -> bytearray:
    """Chunk by chunk, as a loader does."""
    source = through.sources[rank]
    memory = bytearray(source.num_bytes)
    for start in range(0, len(memory), CHUNK_BYTES):
        source.read_into(start, memoryview(memory)[start : start + CHUNK_BYTES])
    return memory


def held(entry: Entry) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in entry.path.iterdir()}


@pytest.fixture
def contents() -> dict[str, bytes]:
    return converted_folder(1, num_chunks=NUM_CHUNKS, tensor_parallel=2)


def test_what_was_read_is_not_fetched_again(contents: dict[str, bytes], tmp_path: Path) -> None:
    remote, tier = MemoryRemote(contents), open_tier(tmp_path)
    through = begin(remote, tier)
    memory = load(through, 1)
    assert memory == contents[weights(1)]
    assert through.problem == ""
    entry = through.finish()
    assert entry is not None
    assert held(entry) == contents
    entry.close()
    assert [remote.read_bytes(weights(rank)) for rank in (0, 1)] == [len(contents[weights(0)]), len(memory)]
    assert isinstance(open_through(remote, tier), Entry)


def test_memory_does_not_wait_for_a_disk_that_hangs(contents: dict[str, bytes], tmp_path: Path) -> None:
    goes_on = threading.Event()

    class SlowFiles(DurableFiles):
        def write(self, descriptor: int, data: Buffer, offset: int) -> None:
            if memoryview(data).nbytes >= CHUNK_BYTES:
                assert goes_on.wait(30)
            super().write(descriptor, data, offset)

    remote = MemoryRemote(contents)
    # Room for two chunks: the others are left out.
    how = ThroughSettings(fetch=SETTINGS.fetch, write_behind_bytes=2 * CHUNK_BYTES)
    through = begin(remote, open_tier(tmp_path), how=how, files=SlowFiles())
    memory = load(through, 0)
    assert memory == contents[weights(0)]
    goes_on.set()
    entry = through.finish({0: memory})
    assert entry is not None
    assert held(entry) == contents
    entry.close()
    # What was left out came from memory.
    assert remote.read_bytes(weights(0)) == len(memory)


def test_what_was_left_out_and_is_not_held_comes_from_the_store(contents: dict[str, bytes], tmp_path: Path) -> None:
    remote = MemoryRemote(contents)
    through = begin(remote, open_tier(tmp_path), how=ThroughSettings(fetch=SETTINGS.fetch, write_behind_bytes=0))
    assert load(through, 0) == contents[weights(0)]
    entry = through.finish()
    assert entry is not None
    assert held(entry) == contents
    entry.close()
    assert remote.read_bytes(weights(0)) == 2 * len(contents[weights(0)])


def test_memory_that_was_spoiled_is_not_written(contents: dict[str, bytes], tmp_path: Path) -> None:
    remote = MemoryRemote(contents)
    through = begin(remote, open_tier(tmp_path), how=ThroughSettings(fetch=SETTINGS.fetch, write_behind_bytes=0))
    memory = load(through, 0)
    # The second chunk of a read of two.
    memory[3 * CHUNK_BYTES + 5] ^= 1
    entry = through.finish({0: memory})
    assert entry is not None
    assert held(entry) == contents
    entry.close()


@settings(max_examples=15)
@given(bytes_left=st.integers(0, 2 * NUM_CHUNKS * CHUNK_BYTES))
def test_a_disk_that_fails_does_not_end_the_load(tmp_path_factory: pytest.TempPathFactory, bytes_left: int) -> None:
    contents = converted_folder(2, num_chunks=NUM_CHUNKS, tensor_parallel=2)
    tier = open_tier(tmp_path_factory.mktemp("tier"))
    through = begin(MemoryRemote(contents), tier, files=MortalDurableFiles(Life(), bytes_left=bytes_left))
    memory = [load(through, 0), load(through, 1)]
    assert memory == [contents[weights(0)], contents[weights(1)]]
    assert through.finish(dict(enumerate(memory))) is None
    assert "no room" in through.problem
    assert tier.manifests() == []
    assert tier.used_bytes() == 0
    through.close()


def test_a_disk_that_is_broken_from_the_start_does_not_either(contents: dict[str, bytes], tmp_path: Path) -> None:
    class BrokenFiles(DurableFiles):
        def allocate(self, descriptor: int, num_bytes: int) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    through = begin(MemoryRemote(contents), open_tier(tmp_path), files=BrokenFiles())
    assert "cannot be written" in through.problem
    assert load(through, 0) == contents[weights(0)]
    assert through.finish() is None


def test_a_tier_that_is_full_or_busy_does_not_either(contents: dict[str, bytes], tmp_path: Path) -> None:
    through = begin(MemoryRemote(contents), open_tier(tmp_path / "small", capacity_bytes=CHUNK_BYTES))
    assert "do not fit" in through.problem
    assert load(through, 0) == contents[weights(0)]
    assert through.finish() is None

    busy = open_tier(tmp_path / "busy")
    key = CheckpointKey(identity="model-1", dtype="bfloat16", tensor_parallel=2)
    loading = busy.acquire(key, 1000, wait_s=0.0)
    assert isinstance(loading, Loading)
    through = begin(MemoryRemote(contents), busy)
    assert "still loading" in through.problem
    assert load(through, 0) == contents[weights(0)]
    assert through.finish() is None
    loading.abandon(keep=False)


def test_a_wrong_chunk_is_not_written(contents: dict[str, bytes], tmp_path: Path) -> None:
    remote = MemoryRemote(contents, flips=[(weights(0), 2 * CHUNK_BYTES)])
    through = begin(remote, open_tier(tmp_path))
    # Finding that is its reader's part.
    assert load(through, 0) != contents[weights(0)]
    entry = through.finish()
    assert entry is not None
    assert held(entry) == contents
    entry.close()


def test_a_store_that_stays_wrong_ends_it(contents: dict[str, bytes], tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    through = begin(MemoryRemote(contents, flips=[(weights(1), 0)] * 2), tier)
    load(through, 0)
    with pytest.raises(CorruptCheckpoint):
        through.finish()
    assert tier.used_bytes() == 0


def test_what_came_before_it_was_given_up_is_gone_on_with(contents: dict[str, bytes], tmp_path: Path) -> None:
    tier = open_tier(tmp_path)
    through = begin(MemoryRemote(contents), tier)
    load(through, 0)
    through.drain()
    through.close()
    through.close()
    assert tier.manifests() == []
    remote = MemoryRemote(contents)
    entry = begin(remote, tier).finish()
    assert entry is not None
    assert held(entry) == contents
    entry.close()
    assert remote.read_bytes(weights(0)) == 0


def test_an_original_cannot_be_read_as_it_comes(tmp_path: Path) -> None:
    remote = MemoryRemote({"config.json": b"{}", "model.safetensors": b"weights"})
    with pytest.raises(ConfigError, match="only a converted checkpoint"):
        open_through(remote, open_tier(tmp_path))
