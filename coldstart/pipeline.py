"""Loads one weight file: several threads read its chunks, check them where they landed, and hand them on.

A chunk is the unit of everything: a read, a checksum, a step of progress, a copy to a device. While one chunk is
checked others are being read, and others copied, so that a load takes as long as its slowest tier alone (ServerlessLLM,
OSDI'24, section 4.2). Where chunks go is a `Destination`: memory that is to keep them is read into directly, without
staging.
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from coldstart.format import checksum, tensors_in
from coldstart.memory import address_of, ask_for_huge_pages, populate_write
from coldstart.source import ALIGNMENT_BYTES
from contracts.errors import Cancelled, CorruptCheckpoint, LoadError

if TYPE_CHECKING:
    from collections.abc import Callable

    from typing_extensions import Buffer

    from coldstart.format import Partition
    from coldstart.source import ByteSource

#: Reads under way at once. A disk of its own is busy with four; beside others a deeper queue gets the larger share.
NUM_THREADS = 16

#: Bytes given pages in one call, which keeps the process's other threads from mapping memory: some 3 ms.
_POPULATED_AT_ONCE = 4 << 20


class Destination(Protocol):
    """Where a load's chunks go. Called by several threads at once."""

    def buffer(self, chunk: int, num_bytes: int) -> memoryview:
        """Writable memory for a chunk, aligned to `ALIGNMENT_BYTES`. May block until some is free; then raises
        Cancelled once `stop` was called."""
        ...

    def arrived(self, chunk: int, num_bytes: int) -> None:
        """The chunk is in its buffer, verified. May raise LoadError, which ends the load."""
        ...

    def stop(self) -> None:
        """The load ends early: nobody is to wait in `buffer` any more. Idempotent."""
        ...

    def finish(self) -> None:
        """All chunks arrived; returns when they are where they belong, or raises LoadError."""
        ...


class MemoryDestination:
    """Memory that keeps the weights: a mapping of the partition's length."""

    def __init__(self, into: Buffer, chunk_bytes: int, *, populate: bool = True) -> None:
        """`populate`: have pages made ahead of the reads, in a thread. Raises ValueError for unaligned memory."""
        self._view = memoryview(into).cast("B")
        self._chunk_bytes = chunk_bytes
        self._address = address_of(self._view)
        if self._address % ALIGNMENT_BYTES:
            raise ValueError(f"memory for weights begins at {self._address:#x}, not at a page")
        ask_for_huge_pages(self._address, len(self._view))
        self._stopping = threading.Event()
        self._populating: threading.Thread | None = None
        if populate and len(self._view) > chunk_bytes:
            # A direct read that has to make its pages takes a third longer; the disk waits meanwhile.
            self._populating = threading.Thread(target=self._populate, name="weights-populate", daemon=True)
            self._populating.start()

    @property
    def num_bytes(self) -> int:
        return len(self._view)

    def buffer(self, chunk: int, num_bytes: int) -> memoryview:
        start = chunk * self._chunk_bytes
        return self._view[start : start + num_bytes]

    def arrived(self, chunk: int, num_bytes: int) -> None:
        """It is where it belongs."""

    def stop(self) -> None:
        self._stopping.set()
        if self._populating is not None:
            self._populating.join()

    def finish(self) -> None:
        self.stop()

    def _populate(self) -> None:
        for start in range(0, len(self._view), _POPULATED_AT_ONCE):
            size = min(_POPULATED_AT_ONCE, len(self._view) - start)
            # Where the kernel cannot do that, reads make the pages.
            if self._stopping.is_set() or not populate_write(self._address + start, size):
                return


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadProgress:
    #: Bytes verified, wherever in the file.
    verified_bytes: int
    #: The file's first so many bytes are all verified: what a forward pass meets first can be used.
    ready_bytes: int
    total_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    num_bytes: int
    #: Chunks that were wrong at first and right when read again.
    num_repaired: int
    #: Whether it was read past the page cache: then its speed was the disk's.
    is_direct: bool = False


class PartitionLoad:
    """One load; `run` blocks, `cancel` may come from any thread."""

    def __init__(
        self,
        source: ByteSource,
        partition: Partition,
        chunk_bytes: int,
        destination: Destination,
        *,
        second: ByteSource | None = None,
        num_threads: int = NUM_THREADS,
        progress: Callable[[LoadProgress], None] | None = None,
        verify: bool = True,
    ) -> None:
        """`second` is where a chunk with a wrong checksum is read once more, by default the same source. `progress` is
        called after every chunk, in any of the threads, one call at a time. `verify` False is for measuring alone."""
        self._source = source
        self._second = second or source
        self._partition = partition
        self._chunk_bytes = chunk_bytes
        self._destination = destination
        self._num_threads = num_threads
        self._progress = progress
        self._verify = verify
        self._guard = threading.Lock()
        self._next = 0
        self._is_ready = bytearray(len(partition.checksums))
        self._ready_chunks = 0
        self._verified_bytes = 0
        self._num_repaired = 0
        self._stopping = threading.Event()
        self._error: BaseException | None = None

    def run(self) -> LoadReport:
        """Returns when every chunk is verified and where it belongs. All threads have ended when this does.

        Raises CorruptCheckpoint (naming file, chunk and tensors), LoadError, Cancelled, or what `progress` raised:
        then what lies in the destination is not to be used.
        """
        size = self._source.num_bytes
        if size != self._partition.num_bytes:
            state = "truncated" if size < self._partition.num_bytes else "too long"
            raise CorruptCheckpoint(
                f"{self._source.name}: {state}: {size} bytes, the index says {self._partition.num_bytes}"
            )
        count = max(1, min(self._num_threads, len(self._is_ready)))
        threads = [threading.Thread(target=self._work, name=f"weights-read-{i}", daemon=True) for i in range(count)]
        started: list[threading.Thread] = []
        try:
            for thread in threads:
                thread.start()
                started.append(thread)
            for thread in started:
                thread.join()
        except BaseException:
            self._stop()
            raise
        finally:
            # After Ctrl-C too: nothing is written to the destination any more.
            for thread in started:
                thread.join()
        if self._error is not None:
            raise self._error
        if self._stopping.is_set():
            raise Cancelled(f"{self._source.name}: its load was cancelled")
        self._destination.finish()
        return LoadReport(num_bytes=self._partition.num_bytes, num_repaired=self._num_repaired)

    def cancel(self) -> None:
        """`run` soon raises Cancelled, unless it has ended."""
        self._stop()

    # --- in each thread -------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            while (chunk := self._take()) is not None:
                self._load(chunk)
        except BaseException as error:
            with self._guard:
                # What followed from stopping is not why it stopped.
                if self._error is None and not (isinstance(error, Cancelled) and self._stopping.is_set()):
                    self._error = error
            self._stop()

    def _take(self) -> int | None:
        with self._guard:
            if self._stopping.is_set() or self._next == len(self._is_ready):
                return None
            self._next += 1
            return self._next - 1

    def _load(self, chunk: int) -> None:
        start = chunk * self._chunk_bytes
        num_bytes = min(self._chunk_bytes, self._partition.num_bytes - start)
        view = self._destination.buffer(chunk, num_bytes)
        repaired = False
        self._source.read_into(start, view)
        if self._verify and checksum(view) != self._partition.checksums[chunk]:
            self._second.read_into(start, view)
            if checksum(view) != self._partition.checksums[chunk]:
                raise self._corrupt(chunk, start, num_bytes)
            repaired = True
        self._destination.arrived(chunk, num_bytes)
        with self._guard:
            self._num_repaired += repaired
            self._verified_bytes += num_bytes
            self._is_ready[chunk] = 1
            while self._ready_chunks < len(self._is_ready) and self._is_ready[self._ready_chunks]:
                self._ready_chunks += 1
            if self._progress is not None:
                self._progress(
                    LoadProgress(
                        verified_bytes=self._verified_bytes,
                        ready_bytes=min(self._ready_chunks * self._chunk_bytes, self._partition.num_bytes),
                        total_bytes=self._partition.num_bytes,
                    )
                )

    def _stop(self) -> None:
        self._stopping.set()
        with contextlib.suppress(LoadError):
            self._destination.stop()

    def _corrupt(self, chunk: int, start: int, num_bytes: int) -> CorruptCheckpoint:
        names = tensors_in(self._partition, start, start + num_bytes)
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        return CorruptCheckpoint(
            f"{self._source.name}: chunk {chunk} (bytes {start} to {start + num_bytes}) does not have its checksum, "
            f"read twice; it holds {', '.join(names[:4]) or 'padding'}{more}"
        )
