"""A cold start straight from an object store: bytes go to memory and to the disk tier at the same time.

Memory never waits for the disk. What the disk did not keep up with is filled in afterwards, from memory where it is
still held, else from the store.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldstart.chunk_fetch import ChunkFetch, FetchSettings
from coldstart.chunk_store import ChunkStore
from coldstart.download import (
    JOURNAL_NAME,
    Wanted,
    abandoned_on_error,
    inspect,
    is_of_disk,
    is_worth_keeping,
    key_of,
    room_for,
    write_index,
)
from coldstart.durable import DurableFiles
from coldstart.tier_handles import Entry
from coldstart.write_behind import TeeSource, WriteBehind
from contracts.errors import ConfigError, TandemError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import Buffer

    from coldstart.download import Found
    from coldstart.format import Index
    from coldstart.local_tier import LocalTier
    from coldstart.remote import RemoteFile, RemoteFolder
    from coldstart.source import ByteSource
    from coldstart.tier_handles import Loading


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughSettings:
    #: For what is filled in at the end.
    fetch: FetchSettings = field(default_factory=FetchSettings)
    #: Copies of chunks on their way to the disk.
    write_behind_bytes: int = 256 << 20


class Through:
    """A remote checkpoint in Tandem's format that is read while the tier fills. `finish` or `close` ends it."""

    def __init__(
        self,
        remote: RemoteFolder,
        found: Found,
        loading: Loading | None,
        problem: str,
        settings: ThroughSettings,
        files: DurableFiles,
    ) -> None:
        assert found.index is not None, remote.name
        self.index: Index = found.index
        self._index_data = found.index_data
        self._plan = found.plan
        self._remote = remote
        self._settings = settings
        self._files = files
        self._loading = loading
        self._problem = problem
        self._store: ChunkStore | None = None
        self._behind: WriteBehind | None = None
        if loading is not None:
            self._begin(loading)
        #: One for each rank's partition.
        self.sources: tuple[ByteSource, ...] = tuple(
            TeeSource(remote.open(found.plan.files[rank].file), rank, self._behind)
            for rank in range(len(self.index.partitions))
        )

    @property
    def problem(self) -> str:
        """Why nothing will be kept on the disk; empty while it can be."""
        return self._problem or (self._behind.problem if self._behind is not None else "")

    def finish(
        self, held: Mapping[int, Buffer] | None = None, *, is_cancelled: Callable[[], bool] = lambda: False
    ) -> Entry | None:
        """Fills in what is missing and commits: the checkpoint in the tier, pinned; None where the disk kept nothing
        (`problem` says why). `held` is memory, by rank, that holds a whole partition: it is not fetched again.

        Raises LoadError, CorruptCheckpoint and Cancelled for what the store does. No read may be under way.
        """
        loading, store, behind = self._loading, self._store, self._behind
        if loading is None or store is None or behind is None:
            self.close()
            return None
        self.drain()
        behind.close()
        if behind.problem:
            self._problem = behind.problem
            self._give_up(keep=False)
            return None
        self._loading = None
        try:
            with abandoned_on_error(loading):
                opener = _Held(self._remote, {self._plan.files[rank].file: data for rank, data in (held or {}).items()})
                fetch = ChunkFetch(
                    opener,
                    self._plan,
                    store,
                    index=self.index,
                    settings=self._settings.fetch,
                    is_cancelled=is_cancelled,
                )
                fetch.run()
                store.finish()
                write_index(loading.path, self._index_data, self._files)
                return loading.commit(origin=self._remote.name)
        except TandemError as error:
            if not is_of_disk(error):
                raise
            self._problem = error.message
            return None
        finally:
            self.close()

    def drain(self) -> None:
        """Returns when all that was read is on the disk, as far as it will be."""
        if self._behind is not None:
            self._behind.drain()

    def close(self) -> None:
        """Gives up; what is on the disk already is gone on with by the next load. Idempotent."""
        if self._behind is not None:
            self._behind.close()
        self._give_up(keep=True)
        for source in self.sources:
            source.close()

    def _begin(self, loading: Loading) -> None:
        try:
            self._store = ChunkStore(loading.path, loading.folder / JOURNAL_NAME, self._plan, self._files)
            self._behind = WriteBehind(self._plan, self._store, max_queued_bytes=self._settings.write_behind_bytes)
        except TandemError as error:
            # A disk that cannot take it is no reason not to start.
            self._problem = error.message
            self._give_up(keep=is_worth_keeping(error))

    def _give_up(self, *, keep: bool) -> None:
        if self._store is not None:
            self._store.close()
        loading, self._loading = self._loading, None
        if loading is not None:
            loading.abandon(keep=keep)


def open_through(
    remote: RemoteFolder,
    tier: LocalTier,
    wanted: Wanted | None = None,
    *,
    wait_s: float = 0.0,
    settings: ThroughSettings | None = None,
    files: DurableFiles | None = None,
) -> Entry | Through:
    """The checkpoint where the tier has it, else its sources. Blocks, while another process loads it up to `wait_s`.

    A tier that is full, busy or broken is no error: then nothing is kept. Raises ConfigError (no checkpoint in Tandem's
    format there, or of another form than `wanted`), CorruptCheckpoint, LoadError of the store.
    """
    wanted = wanted or Wanted()
    found = inspect(remote)
    if found.index is None:
        raise ConfigError(f"{remote.name}: an original; only a converted checkpoint can be loaded as it comes")
    key = key_of(remote, found, wanted)
    loading, problem = None, ""
    try:
        got = tier.acquire(key, room_for(found, wanted), wait_s=wait_s)
        if isinstance(got, Entry):
            return got
        loading = got
    except TandemError as error:
        problem = error.message
    return Through(remote, found, loading, problem, settings or ThroughSettings(), files or DurableFiles())


class _Held:
    """Files that lie in memory, and the others from the store."""

    def __init__(self, remote: RemoteFolder, held: Mapping[RemoteFile, Buffer]) -> None:
        self._remote = remote
        self._held = held

    @property
    def name(self) -> str:
        return self._remote.name

    def open(self, file: RemoteFile) -> ByteSource:
        source = self._remote.open(file)
        if file not in self._held:
            return source
        return _MemoryFirst(self._held[file], source)


class _MemoryFirst:
    """A file that lies in memory; a piece that is asked for again (it was wrong) comes from the store."""

    def __init__(self, data: Buffer, source: ByteSource) -> None:
        self._view = memoryview(data).cast("B")
        self._source = source
        self._given: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def num_bytes(self) -> int:
        return self._source.num_bytes

    def read_into(self, offset: int, into: Buffer) -> None:
        target = memoryview(into).cast("B")
        piece = self._view[offset : offset + len(target)]
        with self._lock:
            is_again = any(start <= offset < stop for start, stop in self._given)
            self._given.append((offset, offset + len(target)))
        if is_again or len(piece) != len(target):
            self._source.read_into(offset, target)
        else:
            target[:] = piece

    def close(self) -> None:
        self._source.close()
