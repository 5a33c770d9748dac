"""The live disk: a folder of this machine, read and written in threads."""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from contracts.disk import check_path

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

P = ParamSpec("P")
T = TypeVar("T")


class LiveDisk:
    """`contracts.disk.Disk` over `root`, which is made where missing (OSError).

    A cancelled call ends only when its thread has: nothing of it happens later.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        root.mkdir(parents=True, exist_ok=True)

    async def read(self, path: str) -> bytes:
        return await _in_thread(self._file(path).read_bytes)

    async def write(self, path: str, data: bytes) -> None:
        await _in_thread(self._write, self._file(path), data)

    async def sync(self, path: str) -> None:
        await _in_thread(_sync, self._file(path))

    async def sync_folder(self, folder: str) -> None:
        await _in_thread(_sync, self._folder(folder))

    async def rename(self, old: str, new: str) -> None:
        await _in_thread(self._file(old).replace, self._file(new))

    async def remove(self, path: str) -> None:
        await _in_thread(self._file(path).unlink)

    async def list(self, folder: str) -> Sequence[str]:
        return await _in_thread(_file_names, self._folder(folder))

    def _file(self, path: str) -> Path:
        check_path(path)
        return self._root / path

    def _folder(self, folder: str) -> Path:
        return self._file(folder) if folder else self._root

    def _write(self, file: Path, data: bytes) -> None:
        self._make_folder(file.parent)
        file.write_bytes(data)

    def _make_folder(self, folder: Path) -> None:
        """With all on the way, so that they outlast a crash."""
        if folder.is_dir():
            return
        self._make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        _sync(folder.parent)


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    working = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(working)
    except asyncio.CancelledError:
        await asyncio.wait([working])
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _file_names(folder: Path) -> Sequence[str]:
    return sorted(entry.name for entry in os.scandir(folder) if not entry.is_dir())
