"""From an object store to this machine's disk tier: checkpoints in Tandem's format, or originals that are converted.

What came before a kill is not fetched again (a journal of the chunks that are there, each read back before it is
believed); every byte is checked against the index while it comes, or, of an original, which has no checksums, pinned to
one content of each file and checked by the converter. Until all is there and right nobody finds it.
"""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from coldstart.chunk_fetch import ChunkFetch, FetchSettings
from coldstart.chunk_store import ChunkStore
from coldstart.download_plan import (
    DownloadPlan,
    bytes_to_convert,
    converted_key,
    names_of,
    original_key,
    plan_converted,
    plan_original,
    shards_named,
)
from coldstart.durable import DurableFiles, writing_failed
from coldstart.format import INDEX_NAME, Index, decode_index
from coldstart.remote import RemoteFile, read_small
from coldstart.tier_handles import Entry, Loading
from contracts.disk import is_full
from contracts.errors import ConfigError, CorruptCheckpoint, LoadError, NoCapacity, TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterable
    from pathlib import Path

    from coldstart.local_tier import LocalTier
    from coldstart.remote import RemoteFolder
    from coldstart.tier_records import CheckpointKey
    from engine.compute_dtype import DtypeChoice

#: In the folder of a load, beside what is loaded.
JOURNAL_NAME = "download.journal"
SOURCE_NAME = "source"

#: The next try does not go on from these: what is there is of no use, or the disk needs the room.
_HOPELESS = ("changed", "gone", "disk_full")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which form of a model is wanted. A folder in Tandem's format has one form; "auto" and None take it as it is."""

    dtype: DtypeChoice = "auto"
    tensor_parallel: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadSettings:
    fetch: FetchSettings = field(default_factory=FetchSettings)
    #: While another process loads the same model.
    wait_s: float = 3600.0


class Converter(Protocol):
    def __call__(self, source: Path, target: Path, *, dtype: DtypeChoice, tensor_parallel: int) -> None:
        """Makes `target` of `source`, whole or not at all; goes on with what an earlier call left beside `target`."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What lies in a remote folder."""

    plan: DownloadPlan
    #: None: an original, to be converted.
    index: Index | None
    index_data: bytes


def inspect(remote: RemoteFolder) -> Found:
    """Raises ConfigError (no model there), CorruptCheckpoint, LoadError."""
    index_file = remote.look(INDEX_NAME)
    there = {file.name: file for file in remote.files()}
    if index_file is None:
        shard_index = there.get("model.safetensors.index.json")
        if shard_index is not None:
            _add(remote, there, shards_named(read_small(remote, shard_index), where=remote.name))
        return Found(plan=plan_original(there.values(), where=remote.name), index=None, index_data=b"")
    data = read_small(remote, index_file)
    index = decode_index(data, where=f"{remote.name}/{INDEX_NAME}")
    _add(remote, there, names_of(index))
    return Found(plan=plan_converted(index, there, where=remote.name), index=index, index_data=data)


def key_of(remote: RemoteFolder, found: Found, wanted: Wanted) -> CheckpointKey:
    """Raises ConfigError where a converted checkpoint is of another form than is wanted."""
    index = found.index
    if index is None:
        ranks = wanted.tensor_parallel or 1
        return original_key(remote.name, found.plan, dtype=wanted.dtype, tensor_parallel=ranks)
    if wanted.dtype not in ("auto", index.dtype):
        raise ConfigError(f"{remote.name}: holds {index.dtype}, wanted is {wanted.dtype}; convert the original again")
    if wanted.tensor_parallel not in (None, index.tensor_parallel):
        raise ConfigError(
            f"{remote.name}: made for {index.tensor_parallel} ranks, wanted are {wanted.tensor_parallel}; "
            "convert the original again"
        )
    return converted_key(index)


def room_for(found: Found, wanted: Wanted) -> int:
    """Bytes of disk that the load needs while it goes on."""
    if found.index is None:
        return bytes_to_convert(found.plan, dtype=wanted.dtype)
    return found.plan.total_bytes + len(found.index_data)


def fetch_checkpoint(
    remote: RemoteFolder,
    tier: LocalTier,
    wanted: Wanted | None = None,
    *,
    convert: Converter | None = None,
    settings: DownloadSettings | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
    is_cancelled: Callable[[], bool] = lambda: False,
    files: DurableFiles | None = None,
) -> Entry:
    """The checkpoint in `tier`, pinned; fetched, and converted, unless it is there. Blocks.

    Raises ConfigError (nothing there that can be served), CorruptCheckpoint (wrong bytes, twice), LoadError (store or
    disk; the next try goes on where this one stopped), NoCapacity (does not fit into the tier), DeadlineExceeded
    (another process loads it too long), Cancelled.
    """
    wanted, settings, files = wanted or Wanted(), settings or DownloadSettings(), files or DurableFiles()
    found = inspect(remote)
    got = tier.acquire(
        key_of(remote, found, wanted), room_for(found, wanted), wait_s=settings.wait_s, is_cancelled=is_cancelled
    )
    if isinstance(got, Entry):
        return got
    with abandoned_on_error(got):
        target = got.path if found.index is not None else got.folder / SOURCE_NAME
        store = ChunkStore(target, got.folder / JOURNAL_NAME, found.plan, files)
        try:
            fetch = ChunkFetch(
                remote,
                found.plan,
                store,
                index=found.index,
                settings=settings.fetch,
                progress=progress,
                is_cancelled=is_cancelled,
            )
            fetch.run()
            store.finish()
        finally:
            store.close()
        if found.index is None:
            convert = convert or convert_original
            convert(target, got.path, dtype=wanted.dtype, tensor_parallel=wanted.tensor_parallel or 1)
        else:
            write_index(target, found.index_data, files)
        return got.commit(origin=remote.name)


def convert_original(source: Path, target: Path, *, dtype: DtypeChoice, tensor_parallel: int) -> None:
    """`Converter` as `tandem convert` does it."""
    # Only originals need all that it brings.
    from coldstart.convert import ConvertOptions, convert

    convert(source, target, ConvertOptions(dtype=dtype, tensor_parallel=tensor_parallel))


def write_index(folder: Path, data: bytes, files: DurableFiles) -> None:
    """Last: with it the folder is one in Tandem's format."""
    path = folder / INDEX_NAME
    try:
        descriptor = files.open(path)
        try:
            files.truncate(descriptor, len(data))
            files.write(descriptor, data, 0)
            files.sync(descriptor)
        finally:
            os.close(descriptor)
        files.sync_folder(folder)
    except OSError as error:
        raise writing_failed(path, error, needed_bytes=len(data)) from error


@contextmanager
def abandoned_on_error(loading: Loading) -> Generator[None]:
    """What was loaded stays for the next try unless it is of no use."""
    try:
        yield
    except BaseException as error:
        loading.abandon(keep=is_worth_keeping(error))
        raise


def is_worth_keeping(error: BaseException) -> bool:
    """Whether the next try of a load that ended so goes on with what is there."""
    if not isinstance(error, TandemError):
        return True
    is_disk_full = isinstance(error.__cause__, OSError) and is_full(error.__cause__)
    is_wrong = isinstance(error, CorruptCheckpoint | ConfigError)
    return not (is_disk_full or is_wrong or (isinstance(error, LoadError) and error.reason in _HOPELESS))


def is_of_disk(error: TandemError) -> bool:
    """Whether this machine's disk or tier is at fault, and not the store. (Errors of stores have no cause.)"""
    return isinstance(error, NoCapacity) or isinstance(error.__cause__, OSError)


def _add(remote: RemoteFolder, there: dict[str, RemoteFile], names: Iterable[str]) -> None:
    """Looks at files that were not listed."""
    for name in names:
        if name not in there and (file := remote.look(name)) is not None:
            there[name] = file
