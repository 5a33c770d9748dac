"""Fetches the chunks of a download that are not here yet, over several connections, and checks them as they come."""

from __future__ import annotations

import mmap
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from coldstart.download_plan import Span, where_in
from coldstart.format import checksum
from contracts.errors import Cancelled, CorruptCheckpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from coldstart.chunk_store import ChunkStore
    from coldstart.download_plan import DownloadPlan
    from coldstart.format import Index
    from coldstart.remote import RemoteFile
    from coldstart.source import ByteSource


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchSettings:
    #: Reads at a time, a thread and a buffer of `span_bytes` each.
    num_connections: int = 4
    #: Neighbouring chunks are fetched by one read of up to this.
    span_bytes: int = 16 << 20


class FileOpener(Protocol):
    """The part of a `RemoteFolder` that is needed here; or memory that holds the files already."""

    @property
    def name(self) -> str: ...

    def open(self, file: RemoteFile) -> ByteSource: ...


class ChunkFetch:
    """One run over a plan. `run` blocks; progress is told as (bytes that are here, of), one call at a time."""

    def __init__(
        self,
        remote: FileOpener,
        plan: DownloadPlan,
        store: ChunkStore,
        *,
        index: Index | None,
        settings: FetchSettings | None = None,
        progress: Callable[[int, int], None] = lambda _, __: None,
        is_cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self._remote = remote
        self._plan = plan
        self._store = store
        self._index = index
        self._settings = settings or FetchSettings()
        self._progress = progress
        self._is_cancelled = is_cancelled
        self._spans = deque(plan.spans(self._settings.span_bytes))
        self._lock = threading.Lock()
        self._done_bytes = 0
        self._errors: list[BaseException] = []
        self._stopping = threading.Event()
        self._sources: list[ByteSource] = []

    def run(self) -> None:
        """Returns when every chunk is in the store. However it ends, its threads have ended.

        Raises CorruptCheckpoint for a chunk whose checksum is wrong twice, Cancelled (asked between reads; closing the
        remote folder ends reads), and LoadError of either side.
        """
        self._sources = [self._remote.open(plan.file) for plan in self._plan.files]
        num_threads = min(self._settings.num_connections, max(1, len(self._spans)))
        threads = [
            threading.Thread(target=self._work, name=f"download-{number}", daemon=True) for number in range(num_threads)
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            self._stopping.set()
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            for source in self._sources:
                source.close()
        if self._errors:
            raise self._errors[0]

    def _work(self) -> None:
        try:
            with memoryview(mmap.mmap(-1, self._buffer_bytes())) as buffer:
                while not self._stopping.is_set() and (span := self._next()) is not None:
                    if self._is_cancelled():
                        raise Cancelled(f"{self._remote.name}: the download was cancelled")
                    for run in self._missing(span):
                        self._fetch(run, buffer)
        except BaseException as error:
            # Raised by `run`, in its thread.
            with self._lock:
                self._errors.append(error)
            self._stopping.set()

    def _next(self) -> Span | None:
        with self._lock:
            return self._spans.popleft() if self._spans else None

    def _buffer_bytes(self) -> int:
        longest_chunk = max((min(plan.chunk_bytes, plan.file.num_bytes) for plan in self._plan.files), default=0)
        return max(1, longest_chunk, self._settings.span_bytes)

    def _missing(self, span: Span) -> Iterator[Span]:
        """What of a span is not here."""
        start: int | None = None
        for chunk in range(span.first, span.stop):
            if not self._store.has(span.file, chunk):
                start = chunk if start is None else start
                continue
            self._tell(span.file, chunk)
            if start is not None:
                yield Span(file=span.file, first=start, stop=chunk)
                start = None
        if start is not None:
            yield Span(file=span.file, first=start, stop=span.stop)

    def _fetch(self, run: Span, buffer: memoryview) -> None:
        plan, source = self._plan.files[run.file], self._sources[run.file]
        start = plan.bounds(run.first)[0]
        view = buffer[: plan.bounds(run.stop - 1)[1] - start]
        source.read_into(start, view)
        for chunk in range(run.first, run.stop):
            low, high = plan.bounds(chunk)
            data = view[low - start : high - start]
            found = checksum(data)
            wanted = found if plan.checksums is None else plan.checksums[chunk]
            if found != wanted:
                source.read_into(low, data)
                found = checksum(data)
            if found != wanted:
                raise CorruptCheckpoint(
                    f"{source.name}: chunk {chunk} (bytes {low} to {high}) has a wrong checksum, twice"
                    f"{where_in(plan, self._index, chunk)}"
                )
            self._store.put(run.file, chunk, data, found)
            self._tell(run.file, chunk)

    def _tell(self, file: int, chunk: int) -> None:
        low, high = self._plan.files[file].bounds(chunk)
        with self._lock:
            self._done_bytes += high - low
            self._progress(self._done_bytes, self._plan.total_bytes)
