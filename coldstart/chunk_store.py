"""The disk's side of a download: files that fill up chunk by chunk, and a journal of the chunks that are there."""

from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

from coldstart.durable import writing_failed
from coldstart.format import checksum
from coldstart.journal import Journal
from contracts.disk import is_full
from contracts.errors import LoadError

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer

    from coldstart.download_plan import DownloadPlan
    from coldstart.durable import DurableFiles


class ChunkStore:
    """Files of one `DownloadPlan` in a folder. Thread-safe. What was put before a kill is found again when the same
    plan is opened; another plan begins anew."""

    def __init__(self, folder: Path, journal: Path, plan: DownloadPlan, files: DurableFiles) -> None:
        """Takes the room for all files at once. Raises LoadError (`reason` "disk_full" where it is), ConfigError."""
        self._plan = plan
        self._folder = folder
        self._files = files
        self._lock = threading.Lock()
        self._descriptors: list[int] = []
        self._journal: Journal | None = None
        #: Checksums that an earlier run told, by file and chunk; none of them is believed unread.
        self._told: dict[tuple[int, int], int] = {}
        self._here: set[tuple[int, int]] = set()
        try:
            self._open(journal)
        except OSError as error:
            self.close()
            raise self._failed(error) from error
        except BaseException:
            self.close()
            raise

    @property
    def num_told(self) -> int:
        """Chunks that an earlier run left."""
        return len(self._told)

    def has(self, file: int, chunk: int) -> bool:
        """Whether it is here, reading it where an earlier run told so: a crash of the machine may have lost it."""
        with self._lock:
            if (file, chunk) in self._here:
                return True
            told = self._told.pop((file, chunk), None)
        plan = self._plan.files[file]
        if told is None or (plan.checksums is not None and plan.checksums[chunk] != told):
            return False
        start, stop = plan.bounds(chunk)
        try:
            is_here = checksum(os.pread(self._descriptors[file], stop - start, start)) == told
        except OSError:
            return False
        if is_here:
            with self._lock:
                self._here.add((file, chunk))
        return is_here

    def put(self, file: int, chunk: int, data: Buffer, found: int) -> None:
        """`data` is right, and `found` its checksum. Raises LoadError."""
        start, _ = self._plan.files[file].bounds(chunk)
        try:
            self._files.write(self._descriptors[file], data, start)
            with self._lock:
                assert self._journal is not None
                self._journal.tell(file, chunk, found)
                self._here.add((file, chunk))
        except OSError as error:
            raise self._failed(error) from error

    def finish(self) -> None:
        """All chunks are here; from now on for good. Raises LoadError."""
        try:
            for number, descriptor in enumerate(self._descriptors):
                missing = self._plan.files[number].num_chunks - sum(file == number for file, _ in self._here)
                assert missing == 0, (self._plan.files[number].file.name, missing)
                self._files.sync(descriptor)
            self._files.sync_folder(self._folder)
        except OSError as error:
            raise self._failed(error) from error
        self.close()

    def close(self) -> None:
        """Idempotent."""
        descriptors, self._descriptors = self._descriptors, []
        for descriptor in descriptors:
            os.close(descriptor)
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()

    def _open(self, journal: Path) -> None:
        self._files.make_folder(self._folder)
        self._journal = Journal(journal, self._files)
        told = self._journal.resume(self._plan.identity)
        if told is None:
            # Whatever is there is of something else.
            self._files.remove(self._folder)
            self._files.make_folder(self._folder)
            self._journal.begin(self._plan.identity)
        self._told = {
            (file, chunk): found
            for (file, chunk), found in (told or {}).items()
            if file < len(self._plan.files) and chunk < self._plan.files[file].num_chunks
        }
        for each in self._plan.files:
            self._descriptors.append(self._files.open(self._folder / each.file.name))
            self._files.allocate(self._descriptors[-1], each.file.num_bytes)

    def _failed(self, error: OSError) -> Exception:
        failed = writing_failed(self._folder, error, needed_bytes=self._plan.total_bytes)
        if is_full(error):
            return LoadError(failed.message, reason="disk_full")
        return failed
