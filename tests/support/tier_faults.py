"""A process that uses a disk tier of checkpoints and is killed at a step of its own, or meets a disk that is full."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from coldstart.durable import DurableFiles
from coldstart.tier_files import LiveTierFiles

if TYPE_CHECKING:
    from pathlib import Path

    from typing_extensions import Buffer


class Killed(BaseException):
    """The process is no more; nothing of it runs on."""


@dataclass(slots=True)
class FakeClock:
    """Whoever sleeps is back at once."""

    monotonic_s: float = 100.0
    unix_s: float = 1.7e9

    def now_s(self) -> float:
        return self.monotonic_s

    def wall_s(self) -> float:
        # Each look is later, so that no two uses are at the same time.
        self.unix_s += 1.0
        return self.unix_s

    def sleep(self, delay_s: float) -> None:
        self.monotonic_s += delay_s
        self.unix_s += delay_s


@dataclass(slots=True)
class Life:
    """Of one process: counts what it does to the disk, and ends it at step `dies_at`, in the middle of that step."""

    dies_at: int | None = None
    #: From this step on the disk is full.
    full_at: int | None = None
    num_steps: int = 0
    is_dead: bool = False
    descriptors: set[int] = field(default_factory=set[int])

    def step(self) -> bool:
        """True: do half of it, then call `die`."""
        self.check()
        self.num_steps += 1
        if self.full_at is not None and self.num_steps >= self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.num_steps == self.dies_at

    def check(self) -> None:
        if self.is_dead:
            raise Killed

    def die(self) -> None:
        """What a kernel does: all that was open is closed, and with it go the locks."""
        self.is_dead = True
        for descriptor in self.descriptors:
            os.close(descriptor)
        self.descriptors.clear()
        raise Killed


class QuickTierFiles(LiveTierFiles):
    """For tests in which no power fails."""

    def sync(self, path: Path) -> None:
        """The kernel outlives every process here."""


class MortalTierFiles(QuickTierFiles):
    """`TierFiles` of one life."""

    def __init__(self, life: Life) -> None:
        self.life = life

    def make_folder(self, path: Path) -> None:
        if self.life.step():
            self.life.die()
        super().make_folder(path)

    def open_folder(self, path: Path) -> int:
        self.life.check()
        descriptor = super().open_folder(path)
        self.life.descriptors.add(descriptor)
        return descriptor

    def lock(self, descriptor: int, *, shared: bool) -> bool:
        self.life.check()
        return super().lock(descriptor, shared=shared)

    def close(self, descriptor: int) -> None:
        if descriptor in self.life.descriptors:
            self.life.descriptors.discard(descriptor)
            super().close(descriptor)
        else:
            assert self.life.is_dead, f"descriptor {descriptor} is closed twice"

    def replace(self, path: Path, data: bytes) -> None:
        if self.life.step():
            path.with_name(f"{path.name}.part").write_bytes(data[: len(data) // 2])
            self.life.die()
        # Its renaming is a step of its own.
        super().replace(path, data)

    def rename(self, old: Path, new: Path) -> None:
        if self.life.step():
            self.life.die()
        super().rename(old, new)

    def remove(self, path: Path) -> None:
        # A full disk lets go of things.
        full_at, self.life.full_at = self.life.full_at, None
        is_last = self.life.step()
        self.life.full_at = full_at
        if is_last:
            for first in [each for each in sorted(path.rglob("*")) if each.is_file()][:1]:
                first.unlink()
            self.life.die()
        super().remove(path)

    def set_used(self, path: Path, wall_s: float) -> None:
        if self.life.step():
            self.life.die()
        super().set_used(path, wall_s)


class MortalDurableFiles(DurableFiles):
    """`DurableFiles` of one life. `bytes_left` is what its disk still takes."""

    def __init__(self, life: Life, *, bytes_left: int | None = None) -> None:
        self.life = life
        self.bytes_left = bytes_left

    def allocate(self, descriptor: int, num_bytes: int) -> None:
        if self.life.step():
            self.life.die()
        # Room is not taken at once on every file system; then it is missed later, which is the harder case.
        os.ftruncate(descriptor, num_bytes)

    def write(self, descriptor: int, data: Buffer, offset: int) -> None:
        view = memoryview(data).cast("B")
        if self.life.step():
            super().write(descriptor, view[: len(view) // 2], offset)
            self.life.die()
        if self.bytes_left is not None:
            taken = min(self.bytes_left, len(view))
            super().write(descriptor, view[:taken], offset)
            self.bytes_left -= taken
            if taken < len(view):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        super().write(descriptor, view, offset)

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        if self.life.step():
            self.life.die()
        super().truncate(descriptor, num_bytes)

    def remove(self, path: Path) -> None:
        if self.life.step():
            self.life.die()
        super().remove(path)
