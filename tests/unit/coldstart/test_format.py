"""The index: what is written is read, and anything else is refused by name."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coldstart.format import (
    FORMAT,
    FORMAT_VERSION,
    INDEX_NAME,
    CopiedFile,
    Index,
    Partition,
    TensorEntry,
    check_folder,
    checksum,
    decode_index,
    encode_index,
    read_index,
    tensors_in,
)
from contracts.errors import CorruptCheckpoint, LoadError

if TYPE_CHECKING:
    from pathlib import Path


def _index(**changes: Any) -> Index:
    tensors = (
        TensorEntry(name="a", offset=0, shape=(3, 5), dtype="bfloat16"),
        TensorEntry(name="b", offset=4096, shape=(2100,), dtype="bfloat16"),
    )
    partition = Partition(
        file="weights-00001-of-00001.tandem", num_bytes=12288, tensors=tensors, checksums=(2**64 - 1, 0)
    )
    values: dict[str, Any] = {
        "model_fingerprint": "f" * 64,
        "dtype": "bfloat16",
        "tensor_parallel": 1,
        "chunk_bytes": 8192,
        "partitions": (partition,),
        "files": (CopiedFile(name="config.json", num_bytes=2, checksum=checksum(b"{}")),),
    }
    return Index(**{**values, **changes})


def _partition(**changes: Any) -> Index:
    index = _index()
    return _index(partitions=(msgspec.structs.replace(index.partitions[0], **changes),))


def _second_tensor(**changes: Any) -> Index:
    first, second = _index().partitions[0].tensors
    return _partition(tensors=(first, msgspec.structs.replace(second, **changes)))


def test_an_index_is_read_as_it_was_written() -> None:
    assert decode_index(encode_index(_index()), where="x") == _index()


@given(st.data())
def test_no_flipped_bit_is_believed(data: st.DataObject) -> None:
    encoded = bytearray(encode_index(_index()))
    place = data.draw(st.integers(0, len(encoded) - 1))
    encoded[place] ^= 1 << data.draw(st.integers(0, 7))
    found = None
    with suppress(CorruptCheckpoint):
        found = decode_index(bytes(encoded), where="x")
    assert found in (None, _index())


@given(st.data())
def test_no_part_of_an_index_is_one(data: st.DataObject) -> None:
    encoded = encode_index(_index())
    with pytest.raises(CorruptCheckpoint):
        decode_index(encoded[: data.draw(st.integers(0, len(encoded) - 1))], where="x")


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_other_bytes_are_no_index(data: bytes) -> None:
    with pytest.raises(CorruptCheckpoint):
        decode_index(data, where="x")


def test_another_version_is_told_by_its_number() -> None:
    data = msgspec.json.encode({"format": FORMAT, "version": FORMAT_VERSION + 1, "tensors": {"what": "ever"}})
    with pytest.raises(CorruptCheckpoint, match=f"version {FORMAT_VERSION + 1} of the format"):
        decode_index(data, where="x")


def test_a_foreign_index_is_told() -> None:
    with pytest.raises(CorruptCheckpoint, match="format 'other'"):
        decode_index(b'{"format": "other", "version": 1}', where="x")


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (_index(tensor_parallel=2), "1 partitions for 2 ranks"),
        (_index(dtype="float32"), "tensor a is bfloat16, the checkpoint float32"),
        (_index(chunk_bytes=4096), "2 checksums for 3 chunks"),
        (_index(chunk_bytes=5000), "chunk_bytes"),
        (_index(files=(CopiedFile(name="../evil", num_bytes=0, checksum=0),)), "names the file '../evil'"),
        (_index(files=(CopiedFile(name=INDEX_NAME, num_bytes=0, checksum=0),)), "names the file"),
        (_partition(file="../weights-00001-of-00001.tandem"), "is named"),
        (_partition(num_bytes=12289), "no multiple of 4096"),
        (_partition(num_bytes=16384), "for tensors that end at 8296"),
        (_second_tensor(offset=0), "tensor b begins at 0, not at 4096"),
        (_second_tensor(offset=8192), "tensor b begins at 8192"),
        (_second_tensor(name="a"), "two tensors are named a"),
        (_second_tensor(shape=(0, 3)), "shape"),
        (_second_tensor(shape=(-1,)), "shape"),
        (_second_tensor(shape=()), "shape"),
        (_second_tensor(shape=(1 << 40, 1 << 40)), "12288 bytes for tensors"),
        (_second_tensor(dtype="int4"), "dtype"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(index: Index, message: str) -> None:
    with pytest.raises(CorruptCheckpoint, match=re.escape(message)):
        decode_index(encode_index(index), where="x")


def test_tensors_of_a_range() -> None:
    partition = _index().partitions[0]
    assert tensors_in(partition, 0, 8192) == ["a", "b"]
    assert tensors_in(partition, 30, 4096) == []
    assert tensors_in(partition, 8192, 12288) == ["b"]


def _folder(folder: Path) -> Path:
    (folder / INDEX_NAME).write_bytes(encode_index(_index()))
    (folder / "config.json").write_bytes(b"{}")
    (folder / "weights-00001-of-00001.tandem").write_bytes(bytes(12288))
    return folder


def test_a_folder_is_checked_file_by_file(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    index = read_index(folder)
    check_folder(folder, index)
    weights = folder / index.partitions[0].file
    weights.write_bytes(bytes(12287))
    with pytest.raises(CorruptCheckpoint, match=r"tandem: truncated: 12287 bytes, the index says 12288"):
        check_folder(folder, index)
    weights.write_bytes(bytes(12289))
    with pytest.raises(CorruptCheckpoint, match="too long"):
        check_folder(folder, index)
    weights.unlink()
    with pytest.raises(CorruptCheckpoint, match="is missing"):
        check_folder(folder, index)


def test_a_copied_file_that_changed_is_told(tmp_path: Path) -> None:
    folder = _folder(tmp_path)
    (folder / "config.json").write_bytes(b"[]")
    with pytest.raises(CorruptCheckpoint, match=r"config.json: changed"):
        check_folder(folder, read_index(folder))


def test_a_folder_without_an_index_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CorruptCheckpoint, match=r"it has no tandem-index\.json"):
        read_index(tmp_path)
    (tmp_path / INDEX_NAME).mkdir()
    with pytest.raises(LoadError, match="cannot be read"):
        read_index(tmp_path)
