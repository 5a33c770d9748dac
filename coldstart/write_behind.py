"""Chunks that came from a store go on to memory at once, and to the disk when the disk gets to it."""

from __future__ import annotations

import threading
from collections import deque
from typing import TYPE_CHECKING

from coldstart.format import checksum

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from coldstart.chunk_store import ChunkStore
    from coldstart.download_plan import DownloadPlan
    from coldstart.source import ByteSource


class WriteBehind:
    """A queue of chunks for a `ChunkStore`, bounded in bytes, and the thread that writes them.

    Nobody waits for it: a chunk that does not fit is left out, to be filled in later, and when the disk fails nothing
    more is written. Only chunks whose checksum is right are written.
    """

    def __init__(self, plan: DownloadPlan, store: ChunkStore, *, max_queued_bytes: int) -> None:
        self._plan = plan
        self._store = store
        self._max_queued_bytes = max_queued_bytes
        self._queue: deque[tuple[int, int, bytes]] = deque()
        self._queued_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        #: Why nothing is written any more.
        self.problem = ""
        #: Chunks left out because the queue was full.
        self.num_left_out = 0
        self._thread = threading.Thread(target=self._run, name="write-behind", daemon=True)
        self._thread.start()

    def offer(self, file: int, offset: int, view: memoryview) -> None:
        """The chunks that lie wholly in these bytes; copied before this returns."""
        plan = self._plan.files[file]
        first = -(-offset // plan.chunk_bytes)
        for chunk in range(first, plan.num_chunks):
            start, stop = plan.bounds(chunk)
            if stop > offset + len(view):
                break
            self._enqueue(file, chunk, view[start - offset : stop - offset])

    def drain(self) -> None:
        """Returns when all that was taken is written or the disk failed."""
        with self._changed:
            self._changed.wait_for(lambda: not self._queued_bytes)

    def close(self) -> None:
        """What is still queued is not written. Idempotent."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def _enqueue(self, file: int, chunk: int, data: memoryview) -> None:
        with self._changed:
            if self._is_closed or self.problem:
                return
            if self._queued_bytes + len(data) > self._max_queued_bytes:
                self.num_left_out += 1
                return
            self._queued_bytes += len(data)
        copied = bytes(data)
        with self._changed:
            self._queue.append((file, chunk, copied))
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._is_closed)
                if self._is_closed:
                    self._queue.clear()
                    self._queued_bytes = 0
                    self._changed.notify_all()
                    return
                file, chunk, data = self._queue.popleft()
            try:
                self._write(file, chunk, data)
            except Exception as error:
                # Whatever it is: who drains the queue is not to wait for ever, and loading goes on.
                self.problem = str(error) or type(error).__name__
            with self._changed:
                self._queued_bytes -= len(data)
                self._changed.notify_all()

    def _write(self, file: int, chunk: int, data: bytes) -> None:
        plan = self._plan.files[file]
        found = checksum(data)
        # A wrong chunk is the reader's to find and to ask for again.
        if self.problem or (plan.checksums is not None and plan.checksums[chunk] != found):
            return
        if not self._store.has(file, chunk):
            self._store.put(file, chunk, data, found)


class TeeSource:
    """`ByteSource` that hands on what another one reads, and writes it behind to the disk tier."""

    def __init__(self, source: ByteSource, file: int, behind: WriteBehind | None) -> None:
        """`file` is its number in the plan; without `behind` nothing is written."""
        self._source = source
        self._file = file
        self._behind = behind

    @property
    def name(self) -> str:
        return self._source.name

    @property
    def num_bytes(self) -> int:
        return self._source.num_bytes

    def read_into(self, offset: int, into: Buffer) -> None:
        self._source.read_into(offset, into)
        if self._behind is not None:
            self._behind.offer(self._file, offset, memoryview(into).cast("B"))

    def close(self) -> None:
        self._source.close()
