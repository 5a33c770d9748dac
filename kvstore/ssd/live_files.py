"""Live files: a folder of this machine, read and written in threads past the page cache."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import mmap
import os
import stat
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from contracts.disk import check_path
from kvstore.ssd.files import FileEntry
from kvstore.ssd.format import LOCK

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence
    from pathlib import Path

T = TypeVar("T")

#: Files kept open for the next use.
MAX_OPEN_FILES = 128
#: Threads that read; two keep a disk of one machine busy, more help a deep queue.
NUM_READERS = 4

_FILE_MODE = 0o600
_FOLDER_MODE = 0o700


@dataclass(slots=True, eq=False)
class _OpenFile:
    descriptor: int
    num_users: int = 0
    #: Nobody finds it any more: closed by the last user.
    is_dropped: bool = False


class LiveFiles:
    """`kvstore.ssd.files.BlockFiles` over a folder.

    Reads have threads of their own, so have writes, what is done to whole files, and `work`: none holds up another.
    Where the file system refuses to go past the page cache (EINVAL), `is_direct` turns false and it goes through.
    """

    def __init__(self, root: Path, *, direct: bool = True, num_readers: int = NUM_READERS) -> None:
        self._root = root
        self.is_direct = direct
        self._readers = ThreadPoolExecutor(num_readers, thread_name_prefix="kv-ssd-read")
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="kv-ssd-write")
        self._keeper = ThreadPoolExecutor(1, thread_name_prefix="kv-ssd-keep")
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="kv-ssd-work")
        self._executors = (self._readers, self._writer, self._keeper, self._worker)
        #: One for each reading thread.
        self._staging = threading.local()
        #: Guards what follows.
        self._guard = threading.Lock()
        self._open: OrderedDict[str, _OpenFile] = OrderedDict()
        self._lock_file: int | None = None

    def __repr__(self) -> str:
        return f"<LiveFiles {self._root}, {'direct' if self.is_direct else 'through the page cache'}>"

    def buffer(self, num_bytes: int) -> memoryview:
        return memoryview(mmap.mmap(-1, num_bytes))

    async def claim(self) -> None:
        await self._run(self._keeper, self._claim)

    async def list(self) -> Sequence[FileEntry]:
        return await self._run(self._keeper, self._list)

    async def load(self, path: str, limit_bytes: int) -> bytes:
        return await self._run(self._keeper, lambda: self._load(path, limit_bytes))

    async def replace(self, path: str, data: bytes) -> None:
        await self._run(self._keeper, lambda: self._replace(path, data))

    async def make(self, path: str, num_bytes: int) -> None:
        await self._run(self._keeper, lambda: self._make(path, num_bytes))

    async def write(self, path: str, offset: int, data: memoryview) -> None:
        await self._run(self._writer, lambda: self._write(path, offset, data))

    async def read(self, path: str, offset: int, num_bytes: int, use: Callable[[memoryview], T]) -> T:
        return await self._run(self._readers, lambda: self._read(path, offset, num_bytes, use))

    async def sync(self, path: str) -> None:
        await self._run(self._keeper, lambda: self._sync(path))

    async def remove(self, path: str) -> None:
        await self._run(self._keeper, lambda: self._remove(path))

    async def work(self, job: Callable[[], T]) -> T:
        return await self._run(self._worker, job)

    async def close(self, wait_s: float) -> None:
        for executor in self._executors:
            executor.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.get_running_loop().run_in_executor(None, self._join, wait_s)
        await asyncio.shield(ended)
        with self._guard:
            for path in list(self._open):
                self._drop(path)
            if self._lock_file is not None:
                os.close(self._lock_file)
                self._lock_file = None

    def _join(self, wait_s: float) -> None:
        """Waits for the threads, in all no longer than `wait_s`."""

        def join() -> None:
            for executor in self._executors:
                executor.shutdown(wait=True)

        joining = threading.Thread(target=join, daemon=True, name="kv-ssd-close")
        joining.start()
        joining.join(wait_s)

    async def _run(self, executor: ThreadPoolExecutor, work: Callable[[], T]) -> T:
        try:
            return await asyncio.get_running_loop().run_in_executor(executor, work)
        except RuntimeError as error:
            if "shutdown" in str(error):
                raise OSError(errno.EBADF, f"{self._root} is closed") from None
            raise

    # --- in threads -------------------------------------------------------------------------------

    def _claim(self) -> None:
        self._make_folder(self._root)
        lock = self._root / LOCK
        with self._guard:
            if self._lock_file is not None and _is_at(self._lock_file, lock):
                return
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, _FILE_MODE)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip()
            os.close(descriptor)
            raise BlockingIOError(errno.EWOULDBLOCK, f"process {holder or '?'} uses {self._root}") from None
        except OSError:
            os.close(descriptor)
            raise
        with self._guard:
            before, self._lock_file = self._lock_file, descriptor
        if before is not None:
            os.close(before)

    def _list(self) -> Sequence[FileEntry]:
        found: list[FileEntry] = []
        for entry in os.scandir(self._root):
            if entry.is_dir(follow_symlinks=False):
                with suppress(FileNotFoundError, PermissionError), os.scandir(entry) as inner:
                    found.extend(_entry(f"{entry.name}/{each.name}", each) for each in inner if _is_file(each))
            elif _is_file(entry):
                found.append(_entry(entry.name, entry))
        return sorted(found, key=lambda each: each.path)

    def _load(self, path: str, limit_bytes: int) -> bytes:
        with self._file(path).open("rb") as file:
            return file.read(limit_bytes)

    def _replace(self, path: str, data: bytes) -> None:
        file = self._file(path)
        temporary = file.with_name(f"{file.name}.new")
        try:
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, _FILE_MODE)
            with os.fdopen(descriptor, "wb") as out:
                out.write(data)
                out.flush()
                os.fsync(descriptor)
            temporary.replace(file)
        except OSError:
            with suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(file.parent)

    def _make(self, path: str, num_bytes: int) -> None:
        # The root may have been deleted, the lock with it.
        self._claim()
        file = self._file(path)
        self._make_folder(file.parent)
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, _FILE_MODE)
        try:
            os.posix_fallocate(descriptor, 0, num_bytes)
            os.fsync(descriptor)
            _sync_folder(file.parent)
        except OSError:
            with suppress(OSError):
                file.unlink()
            raise
        finally:
            os.close(descriptor)

    def _write(self, path: str, offset: int, data: memoryview) -> None:
        def write(descriptor: int) -> None:
            done = 0
            while done < len(data):
                num_bytes = os.pwrite(descriptor, data[done:], offset + done)
                if num_bytes == 0:
                    raise OSError(errno.EIO, "the disk took nothing", path)
                done += num_bytes

        self._transfer(path, write)

    def _read(self, path: str, offset: int, num_bytes: int, use: Callable[[memoryview], T]) -> T:
        buffer = self._read_buffer(num_bytes)

        def read(descriptor: int) -> int:
            done = 0
            while done < num_bytes:
                got = os.preadv(descriptor, [buffer[done:num_bytes]], offset + done)
                done += got
                # Past the page cache the next read may begin only at a page.
                if got == 0 or got % mmap.PAGESIZE:
                    break
            return done

        return use(buffer[: self._transfer(path, read)])

    def _sync(self, path: str) -> None:
        with self._using(path) as descriptor:
            os.fdatasync(descriptor)

    def _remove(self, path: str) -> None:
        file = self._file(path)
        with self._guard:
            self._drop(path)
        file.unlink()
        if file.parent != self._root:
            with suppress(OSError):
                file.parent.rmdir()

    def _transfer(self, path: str, transfer: Callable[[int], T]) -> T:
        """Once more through the page cache where the file system refuses to go past it."""
        was_direct = self.is_direct
        try:
            with self._using(path) as descriptor:
                return transfer(descriptor)
        except OSError as error:
            if error.errno != errno.EINVAL or not was_direct:
                raise
        self.is_direct = False
        with self._guard:
            for each in list(self._open):
                self._drop(each)
        with self._using(path) as descriptor:
            return transfer(descriptor)

    @contextmanager
    def _using(self, path: str) -> Generator[int]:
        """A descriptor of the file, which stays open meanwhile whatever others do."""
        file = self._acquire(path)
        try:
            if os.fstat(file.descriptor).st_nlink == 0:
                with self._guard:
                    if self._open.get(path) is file:
                        self._drop(path)
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self._root / path))
            yield file.descriptor
        finally:
            with self._guard:
                file.num_users -= 1
                if file.is_dropped and file.num_users == 0:
                    os.close(file.descriptor)

    def _acquire(self, path: str) -> _OpenFile:
        with self._guard:
            file = self._open.get(path)
            if file is not None:
                self._open.move_to_end(path)
                file.num_users += 1
                return file
        descriptor = self._open_file(path)
        with self._guard:
            file = self._open.get(path)
            if file is None:
                file = self._open[path] = _OpenFile(descriptor)
            else:
                os.close(descriptor)
            file.num_users += 1
            while len(self._open) > MAX_OPEN_FILES:
                self._drop(next(iter(self._open)))
            return file

    def _open_file(self, path: str) -> int:
        file = self._file(path)
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
        if not self.is_direct:
            return os.open(file, flags)
        try:
            return os.open(file, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        self.is_direct = False
        return os.open(file, flags)

    def _drop(self, path: str) -> None:
        """Forgets an open file. The guard is held."""
        file = self._open.pop(path, None)
        if file is None:
            return
        file.is_dropped = True
        if file.num_users == 0:
            os.close(file.descriptor)

    def _read_buffer(self, num_bytes: int) -> memoryview:
        buffer: memoryview | None = getattr(self._staging, "buffer", None)
        if buffer is None or len(buffer) < num_bytes:
            buffer = self._staging.buffer = self.buffer(num_bytes)
        return buffer

    def _file(self, path: str) -> Path:
        check_path(path)
        return self._root / path

    def _make_folder(self, folder: Path) -> None:
        """With all on the way, so that they outlast a crash."""
        if folder.is_dir():
            return
        if folder.parent != folder:
            self._make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(_FOLDER_MODE)
        if not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
        _sync_folder(folder.parent)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there, here = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (there.st_dev, there.st_ino) == (here.st_dev, here.st_ino)


def _is_file(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):
        return stat.S_ISREG(entry.stat(follow_symlinks=False).st_mode)
    return False


def _entry(path: str, entry: os.DirEntry[str]) -> FileEntry:
    status = entry.stat(follow_symlinks=False)
    return FileEntry(path=path, num_bytes=status.st_size, changed_s=status.st_mtime)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
