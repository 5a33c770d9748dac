"""The file of a decision log: written by a thread of its own, of bounded size, and never waited for.

What a full disk, a slow one or a folder that went away costs is lines: they are counted, that is said once, and the log
itself tells of the gap where it goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, NamedTuple, Self

from contracts.disk import is_full
from contracts.errors import ConfigError
from coordinator.decision_records import FIRST_BYTES, Lost, line_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import TracebackType

#: What waits for the disk at most.
MAX_WAITING_BYTES = 16 << 20
#: What leaving waits for the disk.
CLOSE_TIMEOUT_S = 2.0

#: Written at once at most.
_BATCH_BYTES = 1 << 20
#: While the disk takes nothing, it is tried again after so many decisions at the latest.
_MAX_SKIPPED = 1024


class _Chunk(NamedTuple):
    data: bytes
    num_decisions: int
    #: What stands in the file so far becomes `.1`.
    rotates: bool


class DecisionFile:
    """A context. Its other methods are for one thread, that of the loop."""

    def __init__(self, path: Path, *, max_bytes: int, log: Callable[[str], None]) -> None:
        """Appends to what is there. Raises ConfigError where that is no decision log, and for a path that cannot be
        written; a disk that is full now may have room later."""
        self._path = path = path.expanduser()
        self._max_bytes = max_bytes
        self._log = log
        #: Of the file when all that waits is written.
        self._size_bytes, ends_whole = _look_at(path)
        self._opening_bytes = 0
        #: A header is due; behind a line end where a process died in the midst of a line.
        self._is_first = True
        self._prefix = b"" if ends_whole else b"\n"
        #: Decisions that are not, or will not be, in the file, and of which nothing in it tells.
        self._num_lost = 0
        #: While the disk takes nothing: decisions until it is tried again, and how many it will be after that.
        self._skip = 0
        self._next_skip = 1
        self._queue: SimpleQueue[_Chunk | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._write_all, name="decision-log", daemon=True)
        # Shared with the thread.
        self._lock = threading.Lock()
        self._waiting_bytes = 0
        self._num_failed = 0
        self._trouble = ""
        self._told_trouble = False

    async def __aenter__(self) -> Self:
        self._thread.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._queue.put(None)
        await asyncio.to_thread(self._thread.join, CLOSE_TIMEOUT_S)
        self._hear_of_failures()
        if self._thread.is_alive():
            self._log(f"decision log {self._path}: the disk is too slow; its end is missing")
        elif self._num_lost:
            self._log(f"decision log {self._path}: the last {self._num_lost:,} decisions are not in it")

    def write(self, lines: bytes, opening: Callable[[], bytes]) -> None:
        """One decision's lines, and what makes the header of a file. Costs the same whatever the disk does."""
        failed = self._hear_of_failures()
        if self._waiting_bytes >= MAX_WAITING_BYTES or (failed and self._is_skipped()):
            self._num_lost += 1
            return
        rotates = self._size_bytes + len(lines) > max(self._max_bytes, 2 * self._opening_bytes)
        data = lines
        if rotates or self._is_first or self._num_lost:
            begin = opening()
            gap = line_of(Lost(decisions=self._num_lost)) if self._num_lost else b""
            data = b"".join((self._prefix, begin, gap, lines))
            self._opening_bytes = len(begin)
            self._is_first, self._prefix = False, b""
        chunk = _Chunk(data, self._num_lost + 1, rotates)
        self._num_lost = 0
        self._size_bytes = len(data) if rotates else self._size_bytes + len(data)
        with self._lock:
            self._waiting_bytes += len(data)
        self._queue.put(chunk)

    def _hear_of_failures(self) -> bool:
        """Whether the disk took nothing when it was tried last."""
        with self._lock:
            trouble, num_failed, self._num_failed = self._trouble, self._num_failed, 0
        self._num_lost += num_failed
        if not trouble:
            if self._told_trouble:
                self._told_trouble = False
                self._log(f"decision log {self._path}: goes on")
            self._skip, self._next_skip = 0, 1
        elif not self._told_trouble:
            self._told_trouble = True
            self._log(f"decision log {self._path}: cannot be written: {trouble}; decisions are not logged until it can")
        return bool(trouble)

    def _is_skipped(self) -> bool:
        if self._skip:
            self._skip -= 1
            return True
        if self._waiting_bytes:
            return True
        self._skip, self._next_skip = self._next_skip, min(2 * self._next_skip, _MAX_SKIPPED)
        return False

    # --- the thread -------------------------------------------------------------------------------

    def _write_all(self) -> None:
        waiting = self._queue.get()
        while waiting is not None:
            batch, waiting = self._batch(waiting)
            trouble, is_written = "", False
            try:
                is_written = self._put(batch)
            except OSError as error:
                trouble = error.strerror or str(error)
            with self._lock:
                self._trouble = trouble
                self._num_failed += 0 if is_written else sum(chunk.num_decisions for chunk in batch)
                self._waiting_bytes -= sum(len(chunk.data) for chunk in batch)
            if waiting is _NOTHING:
                waiting = self._queue.get()

    def _batch(self, first: _Chunk) -> tuple[list[_Chunk], _Chunk | None]:
        """What can be written at once, and what comes behind it: `_NOTHING` where nothing waits."""
        batch, size_bytes = [first], len(first.data)
        while True:
            try:
                chunk = self._queue.get_nowait()
            except Empty:
                return batch, _NOTHING
            if chunk is None or chunk.rotates or size_bytes >= _BATCH_BYTES:
                return batch, chunk
            batch.append(chunk)
            size_bytes += len(chunk.data)

    def _put(self, batch: list[_Chunk]) -> bool:
        """Opens each time: that survives a folder that is emptied or rotated from outside. All or nothing stands in
        the file, so that a line is never cut. False: nothing, for the file is a new one and needs a header first."""
        if batch[0].rotates:
            with contextlib.suppress(FileNotFoundError):
                self._path.replace(self._path.with_name(self._path.name + ".1"))
        data = memoryview(b"".join(chunk.data for chunk in batch))
        with self._path.open("ab", buffering=0) as file:
            size_bytes = os.fstat(file.fileno()).st_size
            if not size_bytes and bytes(data[: len(FIRST_BYTES)]) != FIRST_BYTES:
                return False
            try:
                while data:
                    data = data[file.write(data) :]
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(size_bytes)
                raise
        return True


_NOTHING = _Chunk(b"", 0, rotates=False)


def _look_at(path: Path) -> tuple[int, bool]:
    """Size of a log that is there, and whether its last line is whole. Raises ConfigError."""
    where = f"coordinator.decision_log {path}"
    try:
        with path.open("ab+") as file:
            size_bytes = file.seek(0, os.SEEK_END)
            if not size_bytes:
                return 0, True
            file.seek(0)
            if file.read(len(FIRST_BYTES)) != FIRST_BYTES:
                raise ConfigError(f"{where}: there is a file that is no decision log; it is left as it is")
            file.seek(size_bytes - 1)
            return size_bytes, file.read() == b"\n"
    except OSError as error:
        if is_full(error):
            return 0, True
        raise ConfigError(f"{where}: cannot be written: {error.strerror}") from error
