"""`kvstore.ssd.files.BlockFiles` in memory: fails or loses power where told to, and forgets what was not synced."""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from contracts.disk import check_path
from kvstore.ssd.files import FileEntry
from kvstore.ssd.format import LOCK, PAGE_BYTES

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Sequence

T = TypeVar("T")

SECTOR_BYTES = 512


@dataclass(eq=False, slots=True)
class _File:
    content: bytearray
    #: What a crash cannot take.
    synced: bytearray
    changed_s: float = 0.0


@dataclass(eq=False, slots=True)
class MemoryDisk:
    """What outlasts a process. One of `MemoryFiles` at a time uses it."""

    rng: random.Random
    files: dict[str, _File] = field(default_factory=dict[str, _File])
    #: Removed since the last crash: may come back with one.
    removed: dict[str, _File] = field(default_factory=dict[str, _File])
    capacity_bytes: int | None = None
    #: Who has the lock.
    user: MemoryFiles | None = None
    num_changes: int = 0

    @property
    def used_bytes(self) -> int:
        return sum(len(file.content) for file in self.files.values())

    def lose_power(self) -> None:
        """Each sector written since the last sync is there, or not; each file removed is gone, or not."""
        self.user = None
        for path, file in self.removed.items():
            if path not in self.files and self.rng.random() < 0.5:
                self.files[path] = file
        self.removed = {}
        for file in self.files.values():
            for start in range(0, len(file.content), SECTOR_BYTES):
                part = slice(start, start + SECTOR_BYTES)
                if file.content[part] != file.synced[part] and self.rng.random() < 0.5:
                    file.content[part] = file.synced[part]
            file.synced[:] = file.content

    def kill_user(self) -> None:
        """The process ends, the machine does not: what it wrote is there."""
        self.user = None

    def segments(self) -> list[str]:
        """Those that something was written to."""
        return sorted(path for path, file in self.files.items() if path.endswith(".kv") and any(file.content))


class MemoryFiles:
    """One process's hold on the disk. Attributes may be changed at any time."""

    def __init__(self, disk: MemoryDisk) -> None:
        self.disk = disk
        #: Operations so far.
        self.num_operations = 0
        #: By number of the operation, from 0: what it raises.
        self.failures: dict[int, OSError] = {}
        #: What each operation of a kind raises: "claim", "list", "load", "replace", "make", "write", "read", "sync",
        #: "remove".
        self.failing: dict[str, OSError] = {}
        #: Kinds of operations that never end, until this is emptied and `wake` called.
        self.hanging: set[str] = set()
        self._wakes: list[asyncio.Future[None]] = []
        #: The operation at which power is lost, in the middle of it; nothing works afterwards.
        self.crash_at: int | None = None
        self.is_dead = False

    def wake(self) -> None:
        self.hanging.clear()
        for each in self._wakes:
            if not each.done():
                each.set_result(None)
        self._wakes = []

    def buffer(self, num_bytes: int) -> memoryview:
        return memoryview(bytearray(num_bytes))

    async def claim(self) -> None:
        await self._operation("claim")
        if self.disk.user not in (None, self):
            raise BlockingIOError(errno.EWOULDBLOCK, "process 1 uses the disk")
        self.disk.user = self

    async def list(self) -> Sequence[FileEntry]:
        await self._operation("list")
        return [
            FileEntry(path=path, num_bytes=len(file.content), changed_s=file.changed_s)
            for path, file in sorted(self.disk.files.items())
            if path != LOCK
        ]

    async def load(self, path: str, limit_bytes: int) -> bytes:
        await self._operation("load")
        return bytes(self._find(path).content[:limit_bytes])

    async def replace(self, path: str, data: bytes) -> None:
        if await self._operation("replace"):
            raise self._dead()
        self._take_room(len(data))
        self.disk.files[path] = self._new(bytearray(data))

    async def make(self, path: str, num_bytes: int) -> None:
        check_path(path)
        if await self._operation("make") and self.disk.rng.random() < 0.5:
            raise self._dead()
        if path in self.disk.files:
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), path)
        self._take_room(num_bytes)
        self.disk.files[path] = self._new(bytearray(num_bytes))
        if self.is_dead:
            raise self._dead()

    async def write(self, path: str, offset: int, data: memoryview) -> None:
        assert offset % PAGE_BYTES == 0, "not at a page"
        assert len(data) % PAGE_BYTES == 0, "not whole pages"
        is_crash = await self._operation("write")
        file = self._find(path)
        assert offset + len(data) <= len(file.content), "files do not grow"
        for start in range(0, len(data), SECTOR_BYTES):
            if not is_crash or self.disk.rng.random() < 0.5:
                file.content[offset + start : offset + start + SECTOR_BYTES] = data[start : start + SECTOR_BYTES]
        if is_crash:
            raise self._dead()

    async def read(self, path: str, offset: int, num_bytes: int, use: Callable[[memoryview], T]) -> T:
        assert offset % PAGE_BYTES == 0, "not at a page"
        assert num_bytes % PAGE_BYTES == 0, "not whole pages"
        if await self._operation("read"):
            raise self._dead()
        return use(memoryview(bytes(self._find(path).content[offset : offset + num_bytes])))

    async def sync(self, path: str) -> None:
        if await self._operation("sync") and self.disk.rng.random() < 0.5:
            raise self._dead()
        file = self._find(path)
        file.synced[:] = file.content
        if self.is_dead:
            raise self._dead()

    async def remove(self, path: str) -> None:
        if await self._operation("remove") and self.disk.rng.random() < 0.5:
            raise self._dead()
        self._find(path)
        self.disk.removed[path] = self.disk.files.pop(path)
        if self.is_dead:
            raise self._dead()

    async def work(self, job: Callable[[], T]) -> T:
        await asyncio.sleep(0)
        return job()

    async def close(self, wait_s: float) -> None:
        if self.disk.user is self:
            self.disk.user = None

    async def _operation(self, kind: str) -> bool:
        """Whether power is lost in the middle of it."""
        await asyncio.sleep(0)
        while kind in self.hanging:
            self._wakes.append(asyncio.get_running_loop().create_future())
            await self._wakes[-1]
        if self.is_dead:
            raise self._dead()
        number, self.num_operations = self.num_operations, self.num_operations + 1
        if number == self.crash_at:
            self.is_dead = True
        elif error := self.failures.get(number) or self.failing.get(kind):
            raise OSError(error.errno, os.strerror(error.errno or 0), kind)
        return self.is_dead

    def _dead(self) -> OSError:
        return OSError(errno.EIO, "no power")

    def _find(self, path: str) -> _File:
        if path not in self.disk.files:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
        return self.disk.files[path]

    def _new(self, content: bytearray) -> _File:
        self.disk.num_changes += 1
        return _File(content, bytearray(content), self.disk.num_changes)

    def _take_room(self, num_bytes: int) -> None:
        capacity = self.disk.capacity_bytes
        if capacity is not None and self.disk.used_bytes + num_bytes > capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
