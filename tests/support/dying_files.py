"""`coldstart.durable.DurableFiles` that ends, or fails, at one chosen step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from coldstart.durable import DurableFiles

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from typing_extensions import Buffer

#: Whether the step has not begun, is half done (a write; others: done), or is done.
Moment = Literal["before", "half", "after"]


class Killed(BaseException):
    """The process is gone: nobody catches it."""


class DyingFiles(DurableFiles):
    """Raises `error` at step number `at`; without, counts `steps` only."""

    def __init__(self, at: int = -1, moment: Moment = "before", error: Callable[[], BaseException] = Killed) -> None:
        self._at = at
        self._moment = moment
        self._error = error
        #: What was done, in order.
        self.steps: list[str] = []

    def _step(self, name: str, do: Callable[[], object], half: Callable[[], object] | None = None) -> None:
        is_it = len(self.steps) == self._at
        self.steps.append(name)
        if is_it and self._moment == "before":
            raise self._error()
        if is_it and self._moment == "half" and half is not None:
            half()
            raise self._error()
        do()
        if is_it:
            raise self._error()

    def make_folder(self, folder: Path) -> None:
        self._step("make_folder", lambda: DurableFiles.make_folder(self, folder))

    def open(self, path: Path) -> int:
        self._step("open", lambda: path.touch())
        return DurableFiles.open(self, path)

    def allocate(self, descriptor: int, num_bytes: int) -> None:
        self._step("allocate", lambda: DurableFiles.allocate(self, descriptor, num_bytes))

    def write(self, descriptor: int, data: Buffer, offset: int) -> None:
        view = memoryview(data).cast("B")
        self._step(
            "write",
            lambda: DurableFiles.write(self, descriptor, view, offset),
            lambda: DurableFiles.write(self, descriptor, view[: len(view) // 2], offset),
        )

    def truncate(self, descriptor: int, num_bytes: int) -> None:
        self._step("truncate", lambda: DurableFiles.truncate(self, descriptor, num_bytes))

    def sync(self, descriptor: int) -> None:
        # Nothing outlasts a crash of this machine in a test: only the place in the order counts.
        self._step("sync", lambda: None)

    def sync_folder(self, folder: Path) -> None:
        self._step("sync_folder", lambda: None)

    def rename(self, old: Path, new: Path) -> None:
        self._step("rename", lambda: DurableFiles.rename(self, old, new))

    def remove(self, path: Path) -> None:
        self._step("remove", lambda: DurableFiles.remove(self, path))
