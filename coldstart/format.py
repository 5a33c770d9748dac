"""Tandem's checkpoint format: a folder whose weight files can be read straight into place.

    tandem-index.json                  what lies where, and a checksum of every chunk; written last
    weights-00001-of-0000N.tandem      one flat file per tensor-parallel rank
    config.json, tokenizer.json, ...   copies of the original's, so that the folder is a whole model folder

A weight file holds the fused tensors of `engine.fused.fused_tensors` in forward order, each at a multiple of
`ALIGNMENT_BYTES`, with zeros between, its length a multiple too. Its chunks, all of `chunk_bytes` but the last, have
XXH3-64 checksums of their own, so that several threads can check them in any order. (ServerlessLLM, OSDI'24,
section 4.1: flat partition files and an index; theirs has no checksums.)

The index is one JSON object: format and version in the clear, then a checksum over the exact bytes of the rest.
"""

from __future__ import annotations

import re
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import xxhash

from coldstart.source import ALIGNMENT_BYTES
from contracts.errors import CorruptCheckpoint, LoadError
from engine.canary import Canary
from engine.safetensors_files import ITEM_BYTES, StoredDtype

if TYPE_CHECKING:
    from typing_extensions import Buffer

FORMAT = "tandem-checkpoint"
FORMAT_VERSION = 1
INDEX_NAME = "tandem-index.json"
#: What a conversion writes: large enough for a disk's full speed in one read, small enough to be read again when wrong.
CHUNK_BYTES = 4 << 20

#: An index longer than this is not one: 1,000 partitions of 64 GiB have one of 300 MB.
_MAX_INDEX_BYTES = 512 << 20
_HASH = re.compile(r"[0-9a-f]{16}")

_Size = Annotated[int, msgspec.Meta(ge=0, lt=1 << 62)]
_Positive = Annotated[int, msgspec.Meta(ge=1, lt=1 << 62)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class TensorEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One fused tensor, or a rank's share of it: row-major from `offset` bytes on."""

    name: _Name
    offset: _Size
    shape: Annotated[tuple[_Positive, ...], msgspec.Meta(min_length=1, max_length=8)]
    dtype: StoredDtype

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * ITEM_BYTES[self.dtype]


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One weight file."""

    file: _Name
    num_bytes: _Size
    tensors: tuple[TensorEntry, ...]
    #: XXH3-64 of each chunk, in order.
    checksums: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]


class CopiedFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A file that was copied from the original."""

    name: _Name
    num_bytes: _Size
    #: XXH3-64 of all of it.
    checksum: Annotated[int, msgspec.Meta(ge=0)]


class Index(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What `tandem-index.json` says. One that `read_index` returned is consistent in itself."""

    #: `engine.safetensors_files.model_fingerprint` of the original: the same for every form of one model.
    model_fingerprint: _Name
    dtype: StoredDtype
    tensor_parallel: Annotated[int, msgspec.Meta(ge=1, le=1024)]
    chunk_bytes: Annotated[int, msgspec.Meta(ge=ALIGNMENT_BYTES, le=1 << 30, multiple_of=ALIGNMENT_BYTES)]
    #: By rank.
    partitions: tuple[Partition, ...]
    #: Everything else that belongs to the folder.
    files: tuple[CopiedFile, ...]
    #: What an engine with these weights must answer; None where it was not asked.
    canary: Canary | None = None


class _Header(msgspec.Struct):
    """Read first, so that a later version is told by its number and not by what it has more."""

    format: str
    version: int


class _Envelope(msgspec.Struct, forbid_unknown_fields=True):
    format: str
    version: int
    #: XXH3-64 of the bytes of `index`, in hexadecimal.
    checksum: str
    index: msgspec.Raw


def aligned(num_bytes: int) -> int:
    """The next multiple of `ALIGNMENT_BYTES`."""
    return -(-num_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


def num_chunks(num_bytes: int, chunk_bytes: int) -> int:
    return -(-num_bytes // chunk_bytes)


def checksum(data: Buffer) -> int:
    """XXH3-64. Releases the GIL but for small ones. Finds damage; is no defence against forgery."""
    return xxhash.xxh3_64_intdigest(data)


def partition_name(rank: int, tensor_parallel: int) -> str:
    return f"weights-{rank + 1:05}-of-{tensor_parallel:05}.tandem"


def encode_index(index: Index) -> bytes:
    body = msgspec.json.encode(index)
    return msgspec.json.encode(
        _Envelope(format=FORMAT, version=FORMAT_VERSION, checksum=f"{checksum(body):016x}", index=msgspec.Raw(body))
    )


def decode_index(data: bytes, *, where: str) -> Index:
    """Raises CorruptCheckpoint beginning with `where`: not an index, of another version, damaged, or contradicting
    itself."""
    try:
        header = msgspec.json.decode(data, type=_Header)
        if header.format != FORMAT:
            raise CorruptCheckpoint(f"{where}: not the index of a converted checkpoint (format {header.format!r})")
        if header.version != FORMAT_VERSION:
            raise CorruptCheckpoint(
                f"{where}: written in version {header.version} of the format, read here is version {FORMAT_VERSION}; "
                "convert the original again"
            )
        envelope = msgspec.json.decode(data, type=_Envelope)
        body = bytes(envelope.index)
        if _HASH.fullmatch(envelope.checksum) is None or int(envelope.checksum, 16) != checksum(body):
            raise CorruptCheckpoint(f"{where}: damaged: its checksum is wrong")
        index = msgspec.json.decode(body, type=Index)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise CorruptCheckpoint(f"{where}: damaged, or not an index: {error}") from error
    problem = _contradiction(index)
    if problem is not None:
        raise CorruptCheckpoint(f"{where}: {problem}")
    return index


def is_converted(folder: Path) -> bool:
    """Whether the folder claims to be in this format. Nothing is checked."""
    return (folder / INDEX_NAME).is_file()


def read_index(folder: Path) -> Index:
    """Reads and checks the index alone. Raises CorruptCheckpoint, and LoadError when it cannot be read."""
    path = folder / INDEX_NAME
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CorruptCheckpoint(f"{path}: {path.stat().st_size} bytes are too many for an index")
        return decode_index(path.read_bytes(), where=str(path))
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{folder}: not a converted checkpoint: it has no {INDEX_NAME}") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from error


def check_folder(folder: Path, index: Index) -> None:
    """All files there, of the right size, and the copied ones unchanged. Weights themselves are not read.

    Raises CorruptCheckpoint naming the file, and LoadError when one cannot be read.
    """
    for partition in index.partitions:
        _check_size(folder / partition.file, partition.num_bytes)
    for copied in index.files:
        path = folder / copied.name
        _check_size(path, copied.num_bytes)
        try:
            found = checksum(path.read_bytes())
        except OSError as error:
            raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
        if found != copied.checksum:
            raise CorruptCheckpoint(f"{path}: changed since the checkpoint was converted")


def tensors_in(partition: Partition, start: int, stop: int) -> list[str]:
    """Names of the tensors that have bytes in `[start, stop)`."""
    return [each.name for each in partition.tensors if each.offset < stop and each.offset + each.num_bytes > start]


def _check_size(path: Path, num_bytes: int) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise CorruptCheckpoint(f"{path}: is missing") from error
    except OSError as error:
        raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
    if size != num_bytes:
        state = "truncated" if size < num_bytes else "too long"
        raise CorruptCheckpoint(f"{path}: {state}: {size} bytes, the index says {num_bytes}")


def _contradiction(index: Index) -> str | None:
    if len(index.partitions) != index.tensor_parallel:
        return f"{len(index.partitions)} partitions for {index.tensor_parallel} ranks"
    for rank, partition in enumerate(index.partitions):
        wanted = partition_name(rank, index.tensor_parallel)
        if partition.file != wanted:
            return f"partition {rank} is named {partition.file!r}, not {wanted!r}"
        problem = _partition_contradiction(partition, index)
        if problem is not None:
            return f"partition {partition.file}: {problem}"
    for copied in index.files:
        # Names become paths: none may lead elsewhere.
        if Path(copied.name).name != copied.name or copied.name in (INDEX_NAME, ".."):
            return f"names the file {copied.name!r}"
    return None


def _partition_contradiction(partition: Partition, index: Index) -> str | None:
    if partition.num_bytes % ALIGNMENT_BYTES:
        return f"{partition.num_bytes} bytes are no multiple of {ALIGNMENT_BYTES}"
    wanted = num_chunks(partition.num_bytes, index.chunk_bytes)
    if len(partition.checksums) != wanted:
        return f"{len(partition.checksums)} checksums for {wanted} chunks"
    end = 0
    names: set[str] = set()
    for tensor in partition.tensors:
        if tensor.offset != aligned(end):
            return f"tensor {tensor.name} begins at {tensor.offset}, not at {aligned(end)}"
        if tensor.dtype != index.dtype:
            return f"tensor {tensor.name} is {tensor.dtype}, the checkpoint {index.dtype}"
        if tensor.name in names:
            return f"two tensors are named {tensor.name}"
        names.add(tensor.name)
        end = tensor.offset + tensor.num_bytes
    return None if aligned(end) == partition.num_bytes else f"{partition.num_bytes} bytes for tensors that end at {end}"
