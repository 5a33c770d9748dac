"""Reads a snapshot: its sections in their order, ahead of who takes them."""

from __future__ import annotations

import os
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from coldstart.snapshot.format import HEADER_BYTES, checksum, decode_head, decode_table
from contracts.errors import LoadError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Buffer

    from coldstart.snapshot.codecs import CodecRegistry
    from coldstart.snapshot.format import Owner, Section


class SnapshotFile:
    """Open until `close`; one thread at a time."""

    def __init__(self, path: Path, codecs: CodecRegistry) -> None:
        """Reads the table. Raises LoadError naming the file and what is wrong with it."""
        self._path = path
        self._codecs = codecs
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        except OSError as error:
            raise LoadError(f"{path}: cannot be read: {error.strerror}") from error
        try:
            self._table = self._read_table()
        except BaseException:
            os.close(self._descriptor)
            raise

    def _read_table(self) -> _Contents:
        where = str(self._path)
        try:
            status = os.fstat(self._descriptor)
            if status.st_uid != os.geteuid():
                # Checksums say nothing of who wrote it, and KV decides what models answer.
                raise LoadError(f"{where}: belongs to another user")
            head = decode_head(os.pread(self._descriptor, HEADER_BYTES, 0), status.st_size, where=where)
            data = os.pread(self._descriptor, head.table_bytes, head.table_offset)
        except OSError as error:
            raise LoadError(f"{where}: cannot be read: {error.strerror}") from error
        table = decode_table(data, head, where=where)
        return _Contents(table.owner, table.sections, status.st_size)

    @property
    def path(self) -> Path:
        return self._path

    @property
    def owner(self) -> Owner:
        return self._table.owner

    @property
    def sections(self) -> tuple[Section, ...]:
        return self._table.sections

    @property
    def num_bytes(self) -> int:
        return self._table.num_bytes

    def read(self, section: Section) -> memoryview:
        """As it was written. Raises LoadError."""
        where = f"{self._path}: section {section.name}"
        try:
            stored = os.pread(self._descriptor, section.stored_bytes, section.offset)
        except OSError as error:
            raise LoadError(f"{where}: cannot be read: {error.strerror}") from error
        if len(stored) != section.stored_bytes or checksum(stored) != section.checksum:
            raise LoadError(f"{where}: damaged: its checksum is wrong")
        try:
            found: Buffer = self._codecs.decode(section.codec, memoryview(stored), section.num_bytes)
        except LoadError as error:
            raise LoadError(f"{where}: {error.message}") from error
        return memoryview(found)

    def close(self) -> None:
        os.close(self._descriptor)


@dataclass(frozen=True, slots=True)
class _Contents:
    owner: Owner
    sections: tuple[Section, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    section: Section
    #: None: it is lost, and `problem` says why.
    data: memoryview | None
    problem: str = ""


class Prefetch:
    """A thread that reads a snapshot's sections in order, at most `ahead_bytes` of them at a time (one in any case).

    `take` and `close` may be called from one other thread.
    """

    def __init__(
        self,
        locate: Callable[[], Path | None],
        codecs: CodecRegistry,
        *,
        ahead_bytes: int,
        on_news: Callable[[], None] = lambda: None,
    ) -> None:
        """`locate` says which file, None: there is none; it and `on_news`, which is called whenever `take` has more to
        say and at the end, are called in the thread."""
        self._locate = locate
        self._codecs = codecs
        self._ahead_bytes = ahead_bytes
        self._on_news = on_news
        self._changed = threading.Condition()
        self._loaded: deque[Loaded] = deque()
        self._held_bytes = 0
        self._path: Path | None = None
        self._owner: Owner | None = None
        self._num_blocks = 0
        self._problem: str | None = None
        self._done = self._closed = False
        # Not waited for where it hangs in a disk.
        self._thread = threading.Thread(target=self._run, name="snapshot-prefetch", daemon=True)
        self._thread.start()

    @property
    def path(self) -> Path | None:
        """None until it was found."""
        with self._changed:
            return self._path

    @property
    def owner(self) -> Owner | None:
        """None until the table was read, and where it could not be."""
        with self._changed:
            return self._owner

    @property
    def num_blocks(self) -> int:
        """That the table names."""
        with self._changed:
            return self._num_blocks

    @property
    def problem(self) -> str | None:
        """Why there is nothing to read."""
        with self._changed:
            return self._problem

    @property
    def is_over(self) -> bool:
        """All has been taken, or it was closed, or nothing can be read."""
        with self._changed:
            return self._closed or (self._done and not self._loaded)

    def take(self) -> Loaded | None:
        """The next section, if it is there; never waits."""
        with self._changed:
            if not self._loaded:
                return None
            found = self._loaded.popleft()
            self._held_bytes -= found.section.num_bytes
            self._changed.notify_all()
            return found

    def close(self) -> None:
        """Reads no more, and forgets what was read. Idempotent; does not wait."""
        with self._changed:
            self._closed = True
            self._loaded.clear()
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            path = self._locate()
            file = None if path is None else SnapshotFile(path, self._codecs)
        except (LoadError, OSError) as error:
            self._end(error.message if isinstance(error, LoadError) else str(error))
            return
        if file is None:
            self._end(None)
            return
        try:
            with self._changed:
                self._path, self._owner = file.path, file.owner
                self._num_blocks = sum(len(section.blocks) for section in file.sections)
            self._on_news()
            for section in file.sections:
                if not self._has_room(section.num_bytes):
                    return
                self._put(self._read(file, section))
        finally:
            file.close()
            self._end(None)

    @staticmethod
    def _read(file: SnapshotFile, section: Section) -> Loaded:
        try:
            return Loaded(section, file.read(section))
        except LoadError as error:
            return Loaded(section, None, error.message)

    def _has_room(self, num_bytes: int) -> bool:
        """Waits for it; whether anybody still wants more."""
        with self._changed:
            while self._loaded and self._held_bytes + num_bytes > self._ahead_bytes and not self._closed:
                # Ended by `take` or `close`, one of which comes; a daemon's wait keeps nobody.
                self._changed.wait()
            return not self._closed

    def _put(self, loaded: Loaded) -> None:
        with self._changed:
            if not self._closed:
                self._loaded.append(loaded)
                self._held_bytes += loaded.section.num_bytes
        self._on_news()

    def _end(self, problem: str | None) -> None:
        with self._changed:
            self._done = True
            self._problem = problem
        self._on_news()
