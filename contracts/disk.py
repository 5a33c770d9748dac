"""Files as an argument: what whoever keeps some needs of a disk, live or simulated."""

from __future__ import annotations

import errno
from contextlib import suppress
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

#: What a disk says that has no room: that may pass, other failures of a disk mean that it is broken.
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Disk(Protocol):
    """One folder and what is in it.

    Paths are as `check_path` wants them. Every method raises OSError with the errno that says why: `is_full` tells a
    full disk from a broken one, FileNotFoundError says what is not there. A cancelled write, and one for which there
    is no room, may have written a part.

    After a crash of the machine a file holds what it held at its last `sync`; had it been written to since, any mix
    of old and new. It stands under the name it had at the last `sync_folder` of its folder; what was made, renamed or
    removed since may have been or not. Folders themselves stay.
    """

    async def read(self, path: str) -> bytes: ...

    async def write(self, path: str, data: bytes) -> None:
        """Replaces what the file holds; makes it, and folders on the way, where missing. Not at once: readers and
        crashes may see a part."""
        ...

    async def sync(self, path: str) -> None:
        """What the file holds now outlasts a crash. Its name may not: see `sync_folder`."""
        ...

    async def sync_folder(self, folder: str) -> None:
        """Which files stand in the folder ("" is the disk's own) under which names outlasts a crash."""
        ...

    async def rename(self, old: str, new: str) -> None:
        """At once, and in place of a file that stands under the new name, whose folder must be there."""
        ...

    async def remove(self, path: str) -> None: ...

    async def list(self, folder: str) -> Sequence[str]:
        """Names of the files in a folder, sorted; folders in it are left out."""
        ...


def is_full(error: OSError) -> bool:
    """Whether the disk has no room (left for us)."""
    return error.errno in _FULL


def check_path(path: str) -> None:
    """Raises ValueError unless it is relative, with "/" between names, and leads nowhere out of its folder."""
    if not path or any(name in ("", ".", "..") for name in path.split("/")) or "\0" in path:
        raise ValueError(f"not a path on this disk: {path!r}")


async def write_atomically(disk: Disk, path: str, data: bytes) -> None:
    """Replaces a file so that whenever it is looked at, after whatever crash, it is the old or the new one, whole.

    Once this returned it is the new one for good. One writer at a time for each path: the new content first stands
    under the path with ".new" behind it. Raises OSError: then the file is still one of the two, as a rule the old.
    """
    temporary = f"{path}.new"
    try:
        await disk.write(temporary, data)
        await disk.sync(temporary)
        await disk.rename(temporary, path)
        await disk.sync_folder(path.rpartition("/")[0])
    except OSError:
        # A part of it would take room on a disk that may be full.
        with suppress(OSError):
            await disk.remove(temporary)
        raise
