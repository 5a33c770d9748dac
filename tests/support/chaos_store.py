"""A store whose disk can be meddled with from outside: `python -m tests.support.chaos_store`.

All of it is the real store. Its threads look for orders of the test before they read and write block files, in the
folder that `DISK_FOLDER` names: see `DiskBrake`.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from unittest import mock

if TYPE_CHECKING:
    from collections.abc import Callable

    from kvstore.ssd.live_files import LiveFiles

T = TypeVar("T")

FOLDER = "DISK_FOLDER"
_LOOK_INTERVAL_S = 0.01
#: Of a write that is held, the rest of which may never come.
_PAGE_BYTES = 4096

What = Literal["read", "write"]


class DiskBrake:
    """The test's hand on the disk of the store; `folder` is what `DISK_FOLDER` names."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def hold(self, what: What, *, after: int = 0) -> None:
        """Reads (or writes) do not end any more, but for the next so many; a write stops half-way."""
        self._order(what, f"hold {after}")

    def slow(self, what: What, seconds: float) -> None:
        """Each takes so much longer."""
        self._order(what, f"slow {seconds}")

    def is_held(self, what: What) -> bool:
        """One waits."""
        return (self._folder / f"{what}-held").exists()

    def release(self) -> None:
        """All run free again, those that wait, too."""
        for path in self._folder.iterdir():
            path.unlink()

    def _order(self, what: What, text: str) -> None:
        (self._folder / f"{what}-held").unlink(missing_ok=True)
        new = self._folder / f"{what}.new"
        new.write_text(text)
        new.replace(self._folder / what)


class _Orders:
    """One direction, in the store's process."""

    def __init__(self, folder: Path, what: What) -> None:
        self._path = folder / what
        self._held = folder / f"{what}-held"
        #: Of the order that stands, and how many it has let pass.
        self._inode = 0
        self._num_passed = 0

    def standing(self) -> tuple[str, float]:
        """What is to be done with this one, and how much of it."""
        try:
            inode, order = self._path.stat().st_ino, self._path.read_text()
        except FileNotFoundError:
            return "pass", 0.0
        if inode != self._inode:
            self._inode, self._num_passed = inode, 0
        word, amount = order.split()
        if word == "hold" and self._num_passed < int(amount):
            self._num_passed += 1
            return "pass", 0.0
        return word, float(amount)

    def wait(self) -> None:
        self._held.touch()
        while self._path.exists():
            time.sleep(_LOOK_INTERVAL_S)


def main() -> int:
    from cluster.store_main import main as store
    from kvstore.ssd.live_files import LiveFiles as Files

    folder = Path(os.environ[FOLDER])
    reads, writes = _Orders(folder, "read"), _Orders(folder, "write")
    read, write = vars(Files)["_read"], vars(Files)["_write"]

    def meddled_read(files: LiveFiles, path: str, offset: int, num_bytes: int, use: Callable[[memoryview], T]) -> T:
        word, amount = reads.standing()
        if word == "hold":
            reads.wait()
        elif word == "slow":
            time.sleep(amount)
        found: T = read(files, path, offset, num_bytes, use)
        return found

    def meddled_write(files: LiveFiles, path: str, offset: int, data: memoryview) -> None:
        word, amount = writes.standing()
        if word == "hold":
            write(files, path, offset, data[: len(data) // 2 // _PAGE_BYTES * _PAGE_BYTES])
            writes.wait()
        elif word == "slow":
            time.sleep(amount)
        write(files, path, offset, data)

    with mock.patch.object(Files, "_read", meddled_read), mock.patch.object(Files, "_write", meddled_write):
        return store()


if __name__ == "__main__":
    sys.exit(main())
