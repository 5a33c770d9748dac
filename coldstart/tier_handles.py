"""What a process holds of the disk tier of checkpoints: one that it uses, or one that it loads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from coldstart.local_tier import LocalTier
    from coldstart.tier_records import CheckpointKey

#: In an entry's folder: the model folder.
CHECKPOINT = "checkpoint"


class Entry:
    """A whole checkpoint, pinned until `close` or `discard`."""

    def __init__(self, tier: LocalTier, key: CheckpointKey, path: Path, descriptor: int) -> None:
        self._tier = tier
        self.key = key
        #: A model folder.
        self.path = path
        self.descriptor = descriptor
        self._is_open = True

    def __enter__(self) -> Entry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Drops the pin. Idempotent."""
        if self._is_open:
            self._is_open = False
            self._tier.close_descriptor(self.descriptor)

    def discard(self, reason: str) -> None:
        """Drops the checkpoint, whoever else uses it: its bytes turned out to be wrong. Files that are open stay
        readable."""
        if self._is_open:
            self._is_open = False
            try:
                self._tier.discard(self, reason)
            finally:
                self._tier.close_descriptor(self.descriptor)


class Loading:
    """The right to load one checkpoint. Ends with `commit` or `abandon`."""

    def __init__(self, tier: LocalTier, key: CheckpointKey, folder: Path, descriptor: int, num_bytes: int) -> None:
        self._tier = tier
        self.key = key
        #: For the loader's own files, too; what an earlier one left is in it.
        self.folder = folder
        self.descriptor = descriptor
        self.num_bytes = num_bytes
        self._is_open = True

    @property
    def path(self) -> Path:
        """Where the model folder is to be made."""
        return self.folder / CHECKPOINT

    def reserve(self, num_bytes: int) -> None:
        """It takes this much instead. Raises NoCapacity."""
        self._tier.reserve(self, num_bytes)
        self.num_bytes = num_bytes

    def commit(self, *, origin: str) -> Entry:
        """All is written: from now on it is found. Raises as the tier; it can then be abandoned."""
        self._tier.prepare(self, origin)
        return self.enter()

    def abandon(self, *, keep: bool) -> None:
        """`keep`: the next loader goes on from what is there. Idempotent."""
        if not self._is_open:
            return
        self._is_open = False
        try:
            if not keep:
                self._tier.remove_loading(self)
        finally:
            self._tier.close_descriptor(self.descriptor)

    def is_finished(self) -> bool:
        """An earlier loader was killed between its last byte and the end."""
        return self._tier.is_finished(self)

    def enter(self) -> Entry:
        """For one that `is_finished`."""
        self._is_open = False
        return self._tier.enter(self)
