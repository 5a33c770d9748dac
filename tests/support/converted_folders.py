"""Small folders in Tandem's format, made of random bytes, and a remote folder in memory that serves them."""

from __future__ import annotations

import random
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldstart.format import (
    INDEX_NAME,
    CopiedFile,
    Index,
    Partition,
    TensorEntry,
    checksum,
    encode_index,
    partition_name,
)
from coldstart.remote import RemoteFile
from contracts.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from typing_extensions import Buffer

    from coldstart.source import ByteSource

CHUNK_BYTES = 4096


def converted_folder(
    seed: int, *, num_chunks: int = 5, tensor_parallel: int = 1, chunk_bytes: int = CHUNK_BYTES
) -> dict[str, bytes]:
    """By name, the bytes of every file. Another seed is another model."""
    rng = random.Random(seed)
    files: dict[str, bytes] = {"config.json": b'{"seed": %d}' % seed, "tokenizer.json": rng.randbytes(700)}
    partitions: list[Partition] = []
    for rank in range(tensor_parallel):
        data = rng.randbytes(num_chunks * chunk_bytes)
        name = partition_name(rank, tensor_parallel)
        files[name] = data
        checksums = [checksum(data[start : start + chunk_bytes]) for start in range(0, len(data), chunk_bytes)]
        tensor = TensorEntry(name="embedding", offset=0, shape=(len(data) // 2,), dtype="bfloat16")
        partitions.append(Partition(file=name, num_bytes=len(data), tensors=(tensor,), checksums=tuple(checksums)))
    index = Index(
        model_fingerprint=f"model-{seed}",
        dtype="bfloat16",
        tensor_parallel=tensor_parallel,
        chunk_bytes=chunk_bytes,
        partitions=tuple(partitions),
        files=tuple(
            CopiedFile(name=name, num_bytes=len(files[name]), checksum=checksum(files[name]))
            for name in ("config.json", "tokenizer.json")
        ),
    )
    return {**files, INDEX_NAME: encode_index(index)}


@dataclass(slots=True)
class MemoryRemote:
    """`RemoteFolder` over bytes. `before_read(name, offset, num_bytes)` may raise, change `contents`, or block."""

    contents: dict[str, bytes]
    name: str = "memory://m"
    before_read: Callable[[str, int, int], None] = lambda _, __, ___: None
    #: Every read, as (name, offset, length).
    reads: list[tuple[str, int, int]] = field(default_factory=list[tuple[str, int, int]])
    #: Flips a bit of each of the next reads that begin there.
    flips: list[tuple[str, int]] = field(default_factory=list[tuple[str, int]])
    lock: threading.Lock = field(default_factory=threading.Lock)

    def files(self) -> Sequence[RemoteFile]:
        return [self._file(name) for name in sorted(self.contents)]

    def look(self, name: str) -> RemoteFile | None:
        return self._file(name) if name in self.contents else None

    def open(self, file: RemoteFile) -> ByteSource:
        return _MemorySource(self, file)

    def close(self) -> None:
        """Nothing is open."""

    def _file(self, name: str) -> RemoteFile:
        data = self.contents[name]
        return RemoteFile(name=name, num_bytes=len(data), e_tag=f'"{checksum(data):016x}"')

    def read_bytes(self, name: str | None = None) -> int:
        return sum(num_bytes for read, _, num_bytes in self.reads if name in (None, read))


@dataclass(slots=True)
class _MemorySource:
    remote: MemoryRemote
    file: RemoteFile

    @property
    def name(self) -> str:
        return f"{self.remote.name}/{self.file.name}"

    @property
    def num_bytes(self) -> int:
        return self.file.num_bytes

    def read_into(self, offset: int, into: Buffer) -> None:
        view = memoryview(into).cast("B")
        name = self.file.name
        self.remote.before_read(name, offset, len(view))
        with self.remote.lock:
            if self.remote.look(name) != self.file:
                raise LoadError(f"{self.name}: it was changed since it was opened", reason="changed")
            view[:] = self.remote.contents[name][offset : offset + len(view)]
            self.remote.reads.append((name, offset, len(view)))
            if (name, offset) in self.remote.flips:
                self.remote.flips.remove((name, offset))
                view[0] ^= 1

    def close(self) -> None:
        """Nothing is open."""
