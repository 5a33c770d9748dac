"""A disk of a simulated machine: with a speed, a size, failures, and a memory that a crash tears.

What a crash leaves follows from what POSIX promises and no more (Pillai et al., "All File Systems Are Not Created
Equal", OSDI'14, section 3): unsynced pages of a file reach the disk or do not, each for itself, and so do its new
length and unsynced changes of names.
"""

from __future__ import annotations

import asyncio
import errno
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from contracts.disk import check_path

if TYPE_CHECKING:
    import random
    from collections.abc import Sequence

_PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskSpeed:
    """Of the order of an SSD on its own machine."""

    #: Of every operation.
    latency_s: float = 0.0001
    bytes_per_s: float = 1e9
    #: Of each `sync` and `sync_folder`, on top.
    sync_s: float = 0.002


@dataclass(eq=False, slots=True)
class _File:
    #: What was last written, or is being written.
    content: bytes = b""
    #: How much of it readers see.
    num_seen: int = 0
    #: What a crash cannot take.
    synced: bytes = b""

    def hold(self, content: bytes) -> None:
        self.content = content
        self.num_seen = len(content)


@dataclass(frozen=True, slots=True)
class _NameChange:
    """An unsynced change of names: a file made (`old` None), renamed, or removed (`new` None)."""

    file: _File
    old: str | None
    new: str | None

    def concerns(self, folder: str) -> bool:
        return any(name is not None and _folder_of(name) == folder for name in (self.old, self.new))

    def apply(self, names: dict[str, _File]) -> None:
        """To a disk which earlier changes may not have reached."""
        for name in [name for name, file in names.items() if file is self.file]:
            del names[name]
        if self.new is not None:
            names[self.new] = self.file


class SimulatedDisk:
    """`contracts.disk.Disk` on the running loop's time. It does one thing at a time, in the order asked.

    Everything random comes from `rng`. The attributes may be changed at any time.
    """

    def __init__(self, rng: random.Random, *, speed: DiskSpeed | None = None) -> None:
        self._rng = rng
        self._speed = speed or DiskSpeed()
        #: None: endless.
        self.capacity_bytes: int | None = None
        #: Everything takes so many times as long.
        self.slowdown = 1.0
        #: Chance that a read fails with EIO.
        self.read_error_chance = 0.0
        #: Chance that a bit of a file turned over, for good, when it is read.
        self.bit_rot_chance = 0.0
        self._names: dict[str, _File] = {}
        self._folders = {""}
        #: What stands under which name after a crash, and what may.
        self._synced_names: dict[str, _File] = {}
        self._name_changes: list[_NameChange] = []
        #: Loop time when all asked so far is done.
        self._free_s = 0.0
        self._num_crashes = 0

    def __repr__(self) -> str:
        return f"<SimulatedDisk {len(self._names)} files, {self._used_bytes()} bytes>"

    def stall(self, for_s: float) -> None:
        """What is asked for from now on begins so much later."""
        self._free_s = max(self._free_s, asyncio.get_running_loop().time()) + for_s

    def crash(self) -> None:
        """The machine loses power and is back: what was not synced is there, or not, or torn. Operations under way
        fail with EIO; their program is dead as well."""
        self._num_crashes += 1
        self._free_s = 0.0
        for change in self._name_changes:
            if self._rng.random() < 0.5:
                change.apply(self._synced_names)
        self._name_changes = []
        self._names = dict(self._synced_names)
        for file in self._names.values():
            if file.content != file.synced:
                file.synced = self._torn(file.synced, file.content)
            file.hold(file.synced)

    async def read(self, path: str) -> bytes:
        file = self._find(path)
        await self._work(file.num_seen)
        if self._rng.random() < self.read_error_chance:
            raise _error(errno.EIO, path)
        if file.num_seen and self._rng.random() < self.bit_rot_chance:
            self._rot(file)
        return file.content[: file.num_seen]

    async def write(self, path: str, data: bytes) -> None:
        file = self._find_or_make(path)
        file.content, file.num_seen = data, 0
        loop = asyncio.get_running_loop()
        begun_s = max(self._free_s, loop.time())
        try:
            await self._work(len(data))
        except asyncio.CancelledError:
            share = (loop.time() - begun_s) / max(self._free_s - begun_s, 1e-9)
            file.hold(data[: int(len(data) * min(max(share, 0.0), 1.0))])
            raise
        room_bytes = self._room_bytes(file)
        file.hold(data if room_bytes is None else data[:room_bytes])
        if file.num_seen < len(data):
            raise _error(errno.ENOSPC, path)

    async def sync(self, path: str) -> None:
        file = self._find(path)
        content = file.content[: file.num_seen]
        await self._work(0, self._speed.sync_s)
        file.synced = content

    async def sync_folder(self, folder: str) -> None:
        self._check_folder(folder)
        covered = [change for change in self._name_changes if change.concerns(folder)]
        await self._work(0, self._speed.sync_s)
        for change in covered:
            # Another call may have been faster.
            if change in self._name_changes:
                change.apply(self._synced_names)
                self._name_changes.remove(change)

    async def rename(self, old: str, new: str) -> None:
        await self._work(0)
        file = self._find(old)
        check_path(new)
        self._check_folder(_folder_of(new))
        if new in self._folders:
            raise _error(errno.EISDIR, new)
        if old != new:
            self._change_name(_NameChange(file, old, new))

    async def remove(self, path: str) -> None:
        await self._work(0)
        self._change_name(_NameChange(self._find(path), path, None))

    async def list(self, folder: str) -> Sequence[str]:
        self._check_folder(folder)
        await self._work(0)
        return sorted(name.rpartition("/")[2] for name in self._names if _folder_of(name) == folder)

    # --- inside -----------------------------------------------------------------------------------

    async def _work(self, num_bytes: int, more_s: float = 0.0) -> None:
        """Waits for what was asked before, and for this."""
        num_crashes = self._num_crashes
        speed = self._speed
        now_s = asyncio.get_running_loop().time()
        takes_s = (speed.latency_s + num_bytes / speed.bytes_per_s + more_s) * self.slowdown
        self._free_s = max(self._free_s, now_s) + takes_s
        await asyncio.sleep(self._free_s - now_s)
        if self._num_crashes != num_crashes:
            raise OSError(errno.EIO, "the machine lost power meanwhile")

    def _find(self, path: str) -> _File:
        check_path(path)
        if path in self._folders:
            raise _error(errno.EISDIR, path)
        if path not in self._names:
            raise _error(errno.ENOENT, path)
        return self._names[path]

    def _find_or_make(self, path: str) -> _File:
        check_path(path)
        if path in self._names:
            return self._names[path]
        if path in self._folders:
            raise _error(errno.EISDIR, path)
        self._make_folder(_folder_of(path))
        file = _File()
        self._change_name(_NameChange(file, None, path))
        return file

    def _make_folder(self, folder: str) -> None:
        if folder in self._folders:
            return
        if folder in self._names:
            raise _error(errno.ENOTDIR, folder)
        self._make_folder(_folder_of(folder))
        self._folders.add(folder)

    def _check_folder(self, folder: str) -> None:
        if folder:
            check_path(folder)
        if folder not in self._folders:
            raise _error(errno.ENOENT, folder)

    def _change_name(self, change: _NameChange) -> None:
        change.apply(self._names)
        self._name_changes.append(change)

    def _room_bytes(self, file: _File) -> int | None:
        """For this file; None: any."""
        if self.capacity_bytes is None:
            return None
        return max(0, self.capacity_bytes - self._used_bytes() + len(file.content))

    def _used_bytes(self) -> int:
        return sum(len(file.content) for file in self._names.values())

    def _rot(self, file: _File) -> None:
        bit = self._rng.randrange(file.num_seen * 8)
        rotten = bytearray(file.content)
        rotten[bit // 8] ^= 1 << bit % 8
        if file.synced == file.content:
            file.synced = bytes(rotten)
        file.content = bytes(rotten)

    def _torn(self, old: bytes, new: bytes) -> bytes:
        """Between two contents: some length, and pages of either; pages that were never written are zeros."""
        shorter, longer = sorted((len(old), len(new)))
        num_bytes = self._rng.choice((len(old), len(new), self._rng.randint(shorter, longer)))
        pages = [
            self._rng.choice((old, new))[at : at + _PAGE_BYTES].ljust(_PAGE_BYTES, b"\0")
            for at in range(0, num_bytes, _PAGE_BYTES)
        ]
        return b"".join(pages)[:num_bytes]


def _folder_of(path: str) -> str:
    return path.rpartition("/")[0]


def _error(number: int, path: str) -> OSError:
    """Of the class that goes with the number."""
    return OSError(number, os.strerror(number), path)
