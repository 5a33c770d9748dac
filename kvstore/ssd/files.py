"""Files as an argument: what the disk tier needs of a folder, live or in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class FileEntry:
    #: Relative to the root, "/" between names.
    path: str
    num_bytes: int
    #: Unix time of the last change.
    changed_s: float


class BlockFiles(Protocol):
    """One folder, its root, and large files in folders below it.

    Paths are as `contracts.disk.check_path` wants them. Every method but `buffer` raises OSError with the errno that
    says why: FileNotFoundError for a file that is gone, also where it is still open here. A cancelled call may go on
    in its thread until that is done; nothing of it happens to memory that the caller gave or gets, other than to a
    `buffer`.

    After a crash of the machine a file holds what it held at its last `sync`; pages written since, in pieces of a
    sector, are there or not. What `make` and `replace` made is there; what was removed may be there again.
    """

    def buffer(self, num_bytes: int) -> memoryview:
        """New memory from which `write` can take whole pages; zeros."""
        ...

    async def claim(self) -> None:
        """Makes the root where missing, readable for this user alone, and takes it for this process. BlockingIOError:
        another one has it, and who. Idempotent."""
        ...

    async def list(self) -> Sequence[FileEntry]:
        """The files in the root and in the folders there, sorted by path."""
        ...

    async def load(self, path: str, limit_bytes: int) -> bytes:
        """A small file: its first `limit_bytes` bytes."""
        ...

    async def replace(self, path: str, data: bytes) -> None:
        """A small file, by old or new content, never a part; the new one for good."""
        ...

    async def make(self, path: str, num_bytes: int) -> None:
        """A new file of zeros whose room is taken on the disk, and its folder. FileExistsError."""
        ...

    async def write(self, path: str, offset: int, data: memoryview) -> None:
        """Whole pages at a page boundary. Where it raises, any part of them may be written."""
        ...

    async def read(self, path: str, offset: int, num_bytes: int, use: Callable[[memoryview], T]) -> T:
        """What `use` returns for whole pages from a page boundary; it gets fewer bytes where the file ends before, and
        may run in another thread. What it gets is gone when it has returned."""
        ...

    async def sync(self, path: str) -> None: ...

    async def remove(self, path: str) -> None:
        """The file, and its folder where it was the last one there. What is being read of it can still be read."""
        ...

    async def work(self, job: Callable[[], T]) -> T:
        """Calls `job`, in another thread where there are any; never behind reading and writing."""
        ...

    async def close(self, wait_s: float) -> None:
        """Gives the folder back when what is under way has ended, or after `wait_s`. Idempotent."""
        ...
