"""What a download consists of: files of a remote folder, in chunks, with the checksums that are known. Pure."""

from __future__ import annotations

import fnmatch
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from coldstart.format import INDEX_NAME, Index, num_chunks, tensors_in
from coldstart.remote import MAX_SMALL_BYTES, RemoteFile, check_name
from coldstart.tier_records import CheckpointKey
from contracts.errors import ConfigError, CorruptCheckpoint
from engine.safetensors_files import ITEM_BYTES

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

#: Of a file that came without checksums: small enough that little is fetched again after a kill.
CHUNK_BYTES = 8 << 20
#: What a model folder in Hugging Face layout is read for; never code or pickles.
ORIGINAL_FILES = ("*.safetensors", "*.json", "tokenizer.model", "*.jinja", "merges.txt", "vocab.txt")
ORIGINAL_NOT_FILES = ("consolidated*.safetensors",)

_SHARD_INDEX, _SINGLE_SHARD = "model.safetensors.index.json", "model.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    file: RemoteFile
    chunk_bytes: int
    #: XXH3-64 of every chunk; None where nobody knows them.
    checksums: tuple[int, ...] | None

    @property
    def num_chunks(self) -> int:
        return num_chunks(self.file.num_bytes, self.chunk_bytes)

    def bounds(self, chunk: int) -> tuple[int, int]:
        start = chunk * self.chunk_bytes
        return start, min(self.file.num_bytes, start + self.chunk_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Span:
    """Neighbouring chunks of one file, fetched by one read."""

    file: int
    first: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadPlan:
    files: tuple[FilePlan, ...]

    @property
    def total_bytes(self) -> int:
        return sum(plan.file.num_bytes for plan in self.files)

    @property
    def identity(self) -> bytes:
        """Of another content, or cut otherwise, it is another; one line."""
        told = [
            (each.file.name, each.file.num_bytes, each.file.e_tag, each.file.modified_s, each.chunk_bytes)
            for each in self.files
        ]
        checksums = [each.checksums for each in self.files]
        return hashlib.sha256(msgspec.json.encode((told, checksums))).hexdigest().encode()

    def spans(self, span_bytes: int) -> Iterator[Span]:
        """All chunks, in reads of at most `span_bytes` (or one chunk), file by file."""
        for number, plan in enumerate(self.files):
            step = max(1, span_bytes // plan.chunk_bytes)
            for first in range(0, plan.num_chunks, step):
                yield Span(file=number, first=first, stop=min(plan.num_chunks, first + step))


def plan_converted(index: Index, there: Mapping[str, RemoteFile], *, where: str) -> DownloadPlan:
    """All files that the index names. Raises CorruptCheckpoint: a file is missing or of another size."""
    wanted = [(each.file, each.num_bytes, index.chunk_bytes, each.checksums) for each in index.partitions]
    wanted += [
        (each.name, each.num_bytes, max(1, each.num_bytes), _only(each.checksum, each.num_bytes))
        for each in index.files
    ]
    files: list[FilePlan] = []
    for name, num_bytes, chunk_bytes, checksums in wanted:
        file = there.get(check_name(name, where))
        if file is None:
            raise CorruptCheckpoint(f"{where}/{name}: is missing")
        if file.num_bytes != num_bytes:
            raise CorruptCheckpoint(f"{where}/{name}: {file.num_bytes} bytes, the index says {num_bytes}")
        if chunk_bytes > max(MAX_SMALL_BYTES, index.chunk_bytes):
            raise CorruptCheckpoint(f"{where}/{name}: {num_bytes} bytes are too many for a file beside the weights")
        files.append(FilePlan(file=file, chunk_bytes=chunk_bytes, checksums=checksums))
    return DownloadPlan(files=tuple(files))


def names_of(index: Index) -> list[str]:
    return [each.file for each in index.partitions] + [each.name for each in index.files]


def plan_original(files: Iterable[RemoteFile], *, where: str) -> DownloadPlan:
    """What a converter reads. Raises ConfigError: no model."""
    by_name = {file.name: file for file in files}
    if "config.json" not in by_name:
        raise ConfigError(f"{where}: no model: it has neither {INDEX_NAME} nor config.json")
    kept = [name for name in by_name if _matches(name, ORIGINAL_FILES) and not _matches(name, ORIGINAL_NOT_FILES)]
    if not any(name.endswith(".safetensors") for name in kept):
        raise ConfigError(f"{where}: no model: it has no safetensors")
    plans = [FilePlan(file=by_name[name], chunk_bytes=CHUNK_BYTES, checksums=None) for name in sorted(kept)]
    return DownloadPlan(files=tuple(plans))


def shards_named(data: bytes, *, where: str) -> list[str]:
    """Files named by `model.safetensors.index.json`, for stores that cannot list. Raises CorruptCheckpoint."""
    try:
        weight_map = msgspec.json.decode(data, type=_ShardIndex).weight_map
    except msgspec.DecodeError as error:
        raise CorruptCheckpoint(f"{where}/{_SHARD_INDEX}: damaged: {error}") from error
    return sorted({check_name(name, where) for name in weight_map.values()})


def converted_key(index: Index) -> CheckpointKey:
    return CheckpointKey(identity=index.model_fingerprint, dtype=index.dtype, tensor_parallel=index.tensor_parallel)


def original_key(where: str, plan: DownloadPlan, *, dtype: str, tensor_parallel: int) -> CheckpointKey:
    """The model's fingerprint is known only when all is here; until then its address and contents stand for it."""
    digest = hashlib.sha256(where.encode() + b"\0" + plan.identity).hexdigest()
    return CheckpointKey(identity=f"remote:{digest}", dtype=dtype, tensor_parallel=tensor_parallel)


def bytes_to_convert(plan: DownloadPlan, *, dtype: str) -> int:
    """Room for an original and what is made of it; an estimate from above, but where eight-bit floats grow."""
    growth = 1 if dtype == "auto" or ITEM_BYTES.get(dtype, 2) <= 2 else 2  # type: ignore[call-overload]
    made = plan.total_bytes * growth
    return plan.total_bytes + made + made // 16


def where_in(plan: FilePlan, index: Index | None, chunk: int) -> str:
    """Which tensors a chunk belongs to, for people."""
    if index is None:
        return ""
    start, stop = plan.bounds(chunk)
    for partition in index.partitions:
        if partition.file == plan.file.name:
            names = tensors_in(partition, start, stop)
            return f" (of {', '.join(names[:3])}{' and others' if len(names) > 3 else ''})"
    return ""


class _ShardIndex(msgspec.Struct):
    weight_map: dict[str, str]


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _only(checksum: int, num_bytes: int) -> tuple[int, ...]:
    """An empty file has no chunk."""
    return (checksum,) if num_bytes else ()
