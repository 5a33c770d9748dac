"""Chunks on their way to a device: in order, from memory that is not reused before it was copied."""

from __future__ import annotations

import mmap
import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coldstart.convert import ConvertOptions, convert
from coldstart.device_copy import CudaCopier, DeviceFromMemory, DeviceThroughRing, load_to_device
from coldstart.format import Partition, checksum
from coldstart.loaded import load_checkpoint
from coldstart.pipeline import MemoryDestination, PartitionLoad
from contracts.errors import CorruptCheckpoint, LoadError
from tests.support.byte_sources import BytesSource
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.pipeline import Destination

PAGE = 4096
CHUNK = PAGE
DATA = np.random.default_rng(4).bytes(23 * CHUNK)
PARTITION = Partition(
    file="weights",
    num_bytes=len(DATA),
    tensors=(),
    checksums=tuple(checksum(DATA[start : start + CHUNK]) for start in range(0, len(DATA), CHUNK)),
)


@dataclass
class FakeCopier:
    """A device that copies as late as it may: when somebody waits for a copy, that one and all before it."""

    fails_at: int | None = None
    memory: bytearray = field(default_factory=lambda: bytearray(len(DATA)))
    waiting: list[tuple[memoryview, int]] = field(default_factory=list[tuple[memoryview, int]])
    num_begun: int = 0
    num_done: int = 0
    most_waiting: int = 0
    is_pinned: bool = False
    is_closed: bool = False
    guard: threading.Lock = field(default_factory=threading.Lock)

    def pin(self, memory: memoryview) -> None:
        self.is_pinned = True

    def start(self, source: memoryview, offset: int) -> FakeTicket:
        assert self.is_pinned
        assert not self.is_closed
        with self.guard:
            self.num_begun += 1
            self.waiting.append((source, offset))
            self.most_waiting = max(self.most_waiting, len(self.waiting))
            return FakeTicket(self, self.num_begun)

    def copy_until(self, number: int) -> None:
        with self.guard:
            while self.num_done < number:
                if self.num_done == self.fails_at:
                    raise LoadError("the device is gone")
                source, offset = self.waiting.pop(0)
                self.memory[offset : offset + len(source)] = source
                self.num_done += 1

    def close(self) -> None:
        self.is_closed = True


@dataclass
class FakeTicket:
    copier: FakeCopier
    number: int

    def wait(self) -> None:
        self.copier.copy_until(self.number)


def _load(source: BytesSource, destination: Destination, num_threads: int) -> None:
    PartitionLoad(source, PARTITION, CHUNK, destination, num_threads=num_threads).run()


@given(st.integers(2, 9), st.data())
def test_a_ring_never_reuses_a_buffer_before_it_was_copied(num_buffers: int, data: st.DataObject) -> None:
    copier = FakeCopier()
    ring = DeviceThroughRing(CHUNK, copier, num_buffers=num_buffers)
    _load(BytesSource(DATA), ring, data.draw(st.integers(1, num_buffers - 1)))
    ring.close()
    assert copier.memory == DATA
    assert copier.most_waiting <= num_buffers
    assert copier.is_closed


def test_a_ring_may_be_full_of_chunks_that_are_being_read() -> None:
    """As many buffers as threads: one must wait for another's copy, and nobody forever."""
    copier = FakeCopier()
    ring = DeviceThroughRing(CHUNK, copier, num_buffers=1)
    _load(BytesSource(DATA), ring, 4)
    ring.close()
    assert copier.memory == DATA


def test_the_kept_host_copy_and_the_devices_are_the_same() -> None:
    copier, memory = FakeCopier(), mmap.mmap(-1, len(DATA))
    destination = DeviceFromMemory(MemoryDestination(memory, CHUNK), memoryview(memory), CHUNK, copier)
    _load(BytesSource(DATA), destination, 4)
    assert copier.memory == DATA
    assert memory[:] == DATA
    destination.close()
    assert copier.is_closed


@pytest.mark.parametrize("way", ["ring", "memory"])
@pytest.mark.parametrize("fails_at", [0, 4, 22])
def test_a_device_that_fails_ends_the_load(way: str, fails_at: int) -> None:
    copier, memory = FakeCopier(fails_at=fails_at), mmap.mmap(-1, len(DATA))
    destination: DeviceThroughRing | DeviceFromMemory
    if way == "ring":
        destination = DeviceThroughRing(CHUNK, copier, num_buffers=5)
    else:
        destination = DeviceFromMemory(MemoryDestination(memory, CHUNK), memoryview(memory), CHUNK, copier)
    with pytest.raises(LoadError, match="the device is gone"):
        _load(BytesSource(DATA), destination, 3)
    destination.close()
    assert copier.is_closed


@pytest.mark.parametrize("way", ["ring", "memory"])
def test_no_wrong_chunk_goes_to_the_device(way: str) -> None:
    copier, memory = FakeCopier(), mmap.mmap(-1, len(DATA))
    wrong = bytearray(DATA)
    place = 11 * CHUNK + random.Random(1).randrange(CHUNK)
    wrong[place] ^= 1
    destination: DeviceThroughRing | DeviceFromMemory
    if way == "ring":
        destination = DeviceThroughRing(CHUNK, copier, num_buffers=5)
    else:
        destination = DeviceFromMemory(MemoryDestination(memory, CHUNK), memoryview(memory), CHUNK, copier)
    with pytest.raises(CorruptCheckpoint, match="chunk 11"):
        _load(BytesSource(bytes(wrong)), destination, 3)
    destination.close()
    assert copier.memory[11 * CHUNK : 12 * CHUNK] == bytes(CHUNK)
    assert copier.is_closed


@pytest.mark.gpu
def test_a_cuda_device_gets_the_same_bytes() -> None:
    into = torch.zeros(len(DATA), dtype=torch.uint8, device="cuda")
    memory = mmap.mmap(-1, len(DATA))
    kept = DeviceFromMemory(MemoryDestination(memory, CHUNK), memoryview(memory), CHUNK, CudaCopier(into))
    _load(BytesSource(DATA), kept, 4)
    kept.close()
    assert bytes(into.cpu().numpy()) == DATA
    into.zero_()
    ring = DeviceThroughRing(CHUNK, CudaCopier(into), num_buffers=6)
    _load(BytesSource(DATA), ring, 4)
    ring.close()
    assert bytes(into.cpu().numpy()) == DATA


@pytest.mark.gpu
def test_a_checkpoint_on_a_cuda_device_has_the_hosts_tensors(tmp_path: Path) -> None:
    folder = tmp_path / "converted"
    convert(make_tiny_model("qwen3", tmp_path), folder, ConvertOptions(chunk_bytes=3 * PAGE))
    host, device = load_checkpoint(folder), load_to_device(folder, torch.device("cuda"))
    for name in host.names():
        assert device.tensor(name).is_cuda
        assert torch.equal(device.tensor(name).cpu(), host.tensor(name))
