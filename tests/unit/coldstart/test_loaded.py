"""Loaded weights: right, alive as long as they are used, and never wrong ones from a damaged folder."""

from __future__ import annotations

import gc
import mmap
import os
import random
import shutil
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coldstart.convert import ConvertOptions, convert
from coldstart.format import INDEX_NAME, read_index
from coldstart.loaded import LoadedWeights, load_checkpoint
from coldstart.memory import WeightMemory
from coldstart.pipeline import MemoryDestination
from coldstart.reading import load_partition
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError
from tests.support.checkpoints import fused_original, same_bits
from tests.support.tiny_models import make_tiny_model

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

WEIGHTS = "weights-00001-of-00001.tandem"
CHUNK = 1 << 15


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def wanted(original: Path) -> dict[str, Tensor]:
    return fused_original(original)


@pytest.fixture(scope="module")
def folder(original: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "model"
    convert(original, folder, ConvertOptions(chunk_bytes=CHUNK))
    return folder


def _tensors(weights: LoadedWeights) -> dict[str, Tensor]:
    return {name: weights.tensor(name) for name in weights.names()}


@given(st.data())
def test_a_flipped_bit_anywhere_is_told_or_without_effect(
    folder: Path, wanted: dict[str, Tensor], data: st.DataObject
) -> None:
    """Any byte of any file of the folder; it is put back afterwards."""
    path = folder / data.draw(st.sampled_from([WEIGHTS, INDEX_NAME, "config.json"]))
    place = data.draw(st.integers(0, path.stat().st_size - 1))
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ (1 << data.draw(st.integers(0, 7)))]))
    try:
        loaded = None
        with suppress(CorruptCheckpoint):
            loaded = load_checkpoint(folder)
        if loaded is not None:
            same_bits(_tensors(loaded), wanted)
    finally:
        with path.open("r+b") as file:
            file.seek(place)
            file.write(bytes([byte]))


def test_the_damage_is_told_by_file_chunk_and_tensors(folder: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    entry = next(each for each in read_index(damaged).partitions[0].tensors if each.name == "layers.1.down.weight")
    with (damaged / WEIGHTS).open("r+b") as file:
        file.seek(entry.offset + 8)
        file.write(b"\xff\xff\xff\xff")
    chunk = (entry.offset + 8) // CHUNK
    with pytest.raises(CorruptCheckpoint, match=rf"{WEIGHTS}: chunk {chunk} .*layers\.1\.down\.weight") as told:
        load_checkpoint(damaged)
    assert not told.value.retryable


@pytest.mark.parametrize("left", [0, 4096, -1])
def test_truncated_weights_are_told(folder: Path, tmp_path: Path, left: int) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    size = (damaged / WEIGHTS).stat().st_size
    os.truncate(damaged / WEIGHTS, left % size)
    with pytest.raises(CorruptCheckpoint, match=f"{WEIGHTS}: truncated: {left % size} bytes, the index says {size}"):
        load_checkpoint(damaged)


@pytest.mark.parametrize("name", [WEIGHTS, INDEX_NAME, "config.json"])
def test_a_missing_file_is_told(folder: Path, tmp_path: Path, name: str) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / name).unlink()
    with pytest.raises(CorruptCheckpoint, match=name):
        load_checkpoint(damaged)


def test_a_foreign_weight_file_is_told(folder: Path, tmp_path: Path) -> None:
    """Of the right length, but of another model."""
    damaged = tmp_path / "damaged"
    shutil.copytree(folder, damaged)
    (damaged / WEIGHTS).write_bytes(random.Random(1).randbytes((folder / WEIGHTS).stat().st_size))
    with pytest.raises(CorruptCheckpoint, match="does not have its checksum"):
        load_checkpoint(damaged)


def test_a_folder_in_another_layout_is_told(original: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match="not a converted checkpoint"):
        load_checkpoint(original)


def test_names_and_ranks_that_are_not_there(folder: Path) -> None:
    weights = load_checkpoint(folder)
    with pytest.raises(ConfigError, match=r"holds no tensor lm_head\.bias"):
        weights.tensor("lm_head.bias")
    for rank in (-1, 1):
        with pytest.raises(ConfigError, match=f"there is no rank {rank} of 1"):
            load_checkpoint(folder, rank)


def test_tensors_keep_their_memory(folder: Path, wanted: dict[str, Tensor]) -> None:
    weights = load_checkpoint(folder)
    tensors = _tensors(weights)
    addresses = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    del weights
    gc.collect()
    assert len(addresses) == 1, "one memory, no copies"
    same_bits(tensors, wanted)


def test_another_process_mapping_it_read_only_has_the_same_weights(folder: Path, wanted: dict[str, Tensor]) -> None:
    index = read_index(folder)
    memory = WeightMemory(index.partitions[0].num_bytes)
    load_partition(folder, index, 0, MemoryDestination(memory.mapping, index.chunk_bytes))
    with pytest.raises(PermissionError):
        mmap.mmap(memory.read_only, memory.num_bytes)
    mapping = mmap.mmap(memory.read_only, memory.num_bytes, prot=mmap.PROT_READ)
    memory.close()
    memory.close()
    same_bits(_tensors(LoadedWeights(mapping, index)), wanted)


def test_memory_that_is_too_short_is_refused(folder: Path) -> None:
    index = read_index(folder)
    with pytest.raises(ConfigError, match="do not hold a partition"):
        LoadedWeights(bytes(index.partitions[0].num_bytes - 1), index)


def test_memory_that_cannot_be_had_is_told() -> None:
    with pytest.raises(LoadError, match="cannot map 4611686018427387904 bytes of memory for weights"):
        WeightMemory(1 << 62)


def test_weights_on_a_tensor_are_the_same(folder: Path, wanted: dict[str, Tensor]) -> None:
    """As a device has them."""
    index = read_index(folder)
    flat = torch.frombuffer(bytearray((folder / WEIGHTS).read_bytes()), dtype=torch.uint8)
    same_bits(_tensors(LoadedWeights(flat, index)), wanted)
