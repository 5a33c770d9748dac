"""A model folder in Hugging Face layout becomes one in Tandem's format.

Every chunk of every weight file is made by itself, from the rows of the original that it needs, so that no more than a
few chunks are in memory, and a run that was killed goes on with the next chunk. All happens in a folder beside the
target, and takes the target's place in one step when every chunk has been read back from the disk and the index stands.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from coldstart.canary_run import canary_of
from coldstart.durable import DurableFiles, writing_failed
from coldstart.file_source import FileSource
from coldstart.format import (
    CHUNK_BYTES,
    FORMAT_VERSION,
    INDEX_NAME,
    CopiedFile,
    Index,
    Partition,
    check_folder,
    checksum,
    encode_index,
    is_converted,
    num_chunks,
    partition_name,
    read_index,
)
from coldstart.journal import Journal
from coldstart.original import Original
from coldstart.partition import PartitionPlan, check_shares
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

    from engine.compute_dtype import DtypeChoice
    from engine.safetensors_files import StoredDtype

#: In the folder of an unfinished conversion.
JOURNAL_NAME = "conversion.journal"

_KEPT = "; what is done is kept, and the same command goes on with it"


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertOptions:
    #: auto: what the tensors are stored in, bit for bit.
    dtype: DtypeChoice = "auto"
    tensor_parallel: int = 1
    chunk_bytes: int = CHUNK_BYTES
    #: Compute from the original what follows a few tokens, which every worker must answer alike before it serves. Reads
    #: the original once more.
    canary: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class ConvertProgress:
    #: written, checked (read back), or canary (the original's bytes read for it).
    what: str
    done_bytes: int
    total_bytes: int


def partial_folder(target: Path) -> Path:
    """Where an unfinished conversion to `target` stands."""
    return target.parent / f".{target.name}.partial"


def convert(
    model_dir: Path,
    target: Path,
    options: ConvertOptions | None = None,
    *,
    progress: Callable[[ConvertProgress], None] = lambda _: None,
    files: DurableFiles | None = None,
) -> Index:
    """Makes `target`; blocks. A target that is there already and is what would be made is left alone.

    After an end of any kind `target` is whole or not there. What a run that was interrupted or met a full disk has done
    is kept beside it and used by the next one with the same original and options. Raises ConfigError (original,
    options, place), LoadError (disks), CorruptCheckpoint (the disk does not give back what was written).
    """
    options = options or ConvertOptions()
    with closing(Original(model_dir)) as original:
        check_shares(original.config, options.tensor_parallel)
        made = _Conversion(original, target, options, progress, files or DurableFiles())
        return made.existing() or made.run()


class _Conversion:
    def __init__(
        self,
        original: Original,
        target: Path,
        options: ConvertOptions,
        progress: Callable[[ConvertProgress], None],
        files: DurableFiles,
    ) -> None:
        self._original = original
        self._target = target
        self._files = files
        self._report = progress
        self._chunk_bytes = options.chunk_bytes
        self._has_canary = options.canary
        self._dtype: StoredDtype = original.dtype(options.dtype)
        ranks = options.tensor_parallel
        self._plans = [
            PartitionPlan(original.config, self._dtype, rank=rank, tensor_parallel=ranks) for rank in range(ranks)
        ]
        self._total_bytes = sum(plan.num_bytes for plan in self._plans)
        self._folder = partial_folder(target)
        self._journal: Journal | None = None
        self._checksums: dict[tuple[int, int], int] = {}
        # Pages, as direct reads want them.
        self._buffer = memoryview(mmap.mmap(-1, self._chunk_bytes))

    def existing(self) -> Index | None:
        """The index of a target that is what would be made. Raises ConfigError for one that is something else."""
        target = self._target
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            return None
        if not target.is_dir() or not is_converted(target):
            raise ConfigError(f"{target}: is there already, and is not a converted checkpoint; name another folder")
        try:
            index = read_index(target)
            check_folder(target, index)
        except CorruptCheckpoint as error:
            raise ConfigError(f"{error.message}; remove the folder to convert again") from error
        if (
            index.model_fingerprint != self._original.fingerprint
            or [partition.tensors for partition in index.partitions] != [plan.entries for plan in self._plans]
            or index.chunk_bytes != self._chunk_bytes
        ):
            raise ConfigError(
                f"{target}: is there already, of another model or with other options ({index.dtype}, tensor_parallel "
                f"{index.tensor_parallel}, model {index.model_fingerprint[:12]}); name another folder"
            )
        return index

    def run(self) -> Index:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._work_folder())
                self._resume(stack)
                descriptors = self._open_partitions(stack)
                self._write_all(descriptors)
                self._check_all(descriptors)
                self._original.check_unchanged()
                index = self._write_index(stack)
                self._finish(stack)
                return index
            except OSError as error:
                raise writing_failed(
                    self._target, error, needed_bytes=self._total_bytes, advice=_KEPT if self._folder.exists() else ""
                ) from error

    # --- the folder -----------------------------------------------------------------------------------

    @contextmanager
    def _work_folder(self) -> Generator[None, None, None]:
        """The folder beside the target, ours alone: its own lock goes with it when it is renamed."""
        self._files.make_folder(self._folder)
        descriptor = os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ConfigError(f"{self._target}: another process is converting to it") from None
            if not self._folder.exists() or not os.path.samestat(os.fstat(descriptor), self._folder.stat()):
                raise ConfigError(f"{self._target}: another process has just converted to it")
            yield
        finally:
            os.close(descriptor)

    def _resume(self, stack: ExitStack) -> None:
        """Takes up what an earlier run with the same aim has done, and removes everything else."""
        identity = msgspec.json.encode(
            {
                "format": FORMAT_VERSION,
                "original": self._original.identity(),
                "dtype": self._dtype,
                "tensor_parallel": len(self._plans),
                "chunk_bytes": self._chunk_bytes,
            }
        )
        path = self._folder / JOURNAL_NAME
        journal = Journal(path, self._files)
        stack.callback(journal.close)
        told = journal.resume(identity)
        if told is None:
            for other in self._folder.iterdir():
                if other != path:
                    self._files.remove(other)
            journal.begin(identity)
        self._journal, self._checksums = journal, told or {}

    def _open_partitions(self, stack: ExitStack) -> list[int]:
        descriptors: list[int] = []
        try:
            for rank, plan in enumerate(self._plans):
                descriptor = self._files.open(self._path(rank))
                stack.callback(os.close, descriptor)
                self._files.allocate(descriptor, plan.num_bytes)
                descriptors.append(descriptor)
        except OSError:
            if not self._checksums:
                # It was full before anything was written: nothing is worth its room.
                self._files.remove(self._folder)
            raise
        return descriptors

    def _path(self, rank: int) -> Path:
        return self._folder / partition_name(rank, len(self._plans))

    # --- chunks ---------------------------------------------------------------------------------------

    def _chunks(self) -> list[tuple[int, int]]:
        """(chunk, rank), so that ranks read the same part of the original one after the other."""
        return sorted(
            (chunk, rank)
            for rank, plan in enumerate(self._plans)
            for chunk in range(num_chunks(plan.num_bytes, self._chunk_bytes))
        )

    def _bounds(self, rank: int, chunk: int) -> tuple[int, int]:
        start = chunk * self._chunk_bytes
        return start, min(start + self._chunk_bytes, self._plans[rank].num_bytes)

    def _write_all(self, descriptors: list[int]) -> None:
        done_bytes = 0
        for chunk, rank in self._chunks():
            start, stop = self._bounds(rank, chunk)
            if (rank, chunk) not in self._checksums:
                self._write(descriptors[rank], rank, chunk)
            done_bytes += stop - start
            self._report(ConvertProgress(what="written", done_bytes=done_bytes, total_bytes=self._total_bytes))
        for descriptor in descriptors:
            self._files.sync(descriptor)

    def _write(self, descriptor: int, rank: int, chunk: int) -> None:
        assert self._journal is not None
        start, stop = self._bounds(rank, chunk)
        plan, view = self._plans[rank], self._buffer[: stop - start]
        view[:] = bytes(len(view))
        found = self._original.read_chunk(plan, start, self._dtype, view)
        self._files.write(descriptor, view, start)
        self._checksums[rank, chunk] = found
        self._journal.tell(rank, chunk, found)

    def _check_all(self, descriptors: list[int]) -> None:
        """Reads everything back; what is not as it was told is written once more."""
        sources = [FileSource(self._path(rank)) for rank in range(len(self._plans))]
        try:
            done_bytes = 0
            for rank, plan in enumerate(self._plans):
                for chunk in range(num_chunks(plan.num_bytes, self._chunk_bytes)):
                    if not self._stands(sources[rank], rank, chunk):
                        # A crash of the machine kept the journal's line and lost the bytes.
                        self._write(descriptors[rank], rank, chunk)
                        self._files.sync(descriptors[rank])
                        if not self._stands(sources[rank], rank, chunk):
                            raise CorruptCheckpoint(f"{sources[rank].name}: chunk {chunk} reads otherwise than written")
                    start, stop = self._bounds(rank, chunk)
                    done_bytes += stop - start
                    self._report(ConvertProgress(what="checked", done_bytes=done_bytes, total_bytes=self._total_bytes))
        finally:
            for source in sources:
                source.close()

    def _stands(self, source: FileSource, rank: int, chunk: int) -> bool:
        start, stop = self._bounds(rank, chunk)
        view = self._buffer[: stop - start]
        source.read_into(start, view)
        return checksum(view) == self._checksums[rank, chunk]

    # --- the end --------------------------------------------------------------------------------------

    def _write_index(self, stack: ExitStack) -> Index:
        copied: list[CopiedFile] = []
        for path in self._original.files_to_copy():
            try:
                data = path.read_bytes()
            except OSError as error:
                raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
            self._write_file(stack, self._folder / path.name, data)
            copied.append(CopiedFile(name=path.name, num_bytes=len(data), checksum=checksum(data)))
        index = Index(
            model_fingerprint=self._original.fingerprint,
            dtype=self._dtype,
            tensor_parallel=len(self._plans),
            chunk_bytes=self._chunk_bytes,
            partitions=tuple(
                Partition(
                    file=partition_name(rank, len(self._plans)),
                    num_bytes=plan.num_bytes,
                    tensors=plan.entries,
                    checksums=tuple(
                        self._checksums[rank, chunk] for chunk in range(num_chunks(plan.num_bytes, self._chunk_bytes))
                    ),
                )
                for rank, plan in enumerate(self._plans)
            ),
            files=tuple(copied),
        )
        if self._has_canary:
            canary = canary_of(
                self._original.folder,
                progress=lambda done, total: self._report(
                    ConvertProgress(what="canary", done_bytes=done, total_bytes=total)
                ),
            )
            # It read the files anew: they must still be those that were converted.
            self._original.check_unchanged()
            index = msgspec.structs.replace(index, canary=canary)
        self._files.sync_folder(self._folder)
        unfinished = self._folder / f"{INDEX_NAME}.new"
        self._write_file(stack, unfinished, encode_index(index))
        self._files.rename(unfinished, self._folder / INDEX_NAME)
        return index

    def _write_file(self, stack: ExitStack, path: Path, data: bytes) -> None:
        descriptor = self._files.open(path)
        stack.callback(os.close, descriptor)
        self._files.truncate(descriptor, 0)
        self._files.write(descriptor, data, 0)
        self._files.sync(descriptor)

    def _finish(self, stack: ExitStack) -> None:
        self._files.remove(self._folder / JOURNAL_NAME)
        self._files.sync_folder(self._folder)
        self._files.rename(self._folder, self._target)
        self._files.sync_folder(self._target.parent)
