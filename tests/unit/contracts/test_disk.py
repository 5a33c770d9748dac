"""What a disk promises, asked of the live and of the simulated one; and atomic writes over crashes at every step."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING

import pytest

from cluster.disk import LiveDisk
from contracts.disk import check_path, is_full, write_atomically
from simulator import run
from simulator.faults.disk import SimulatedDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from contracts.disk import Disk
    from simulator import Program

    Scenario = Callable[[Disk], Coroutine[None, None, None]]
    OnDisk = Callable[[Scenario], None]


@pytest.fixture(params=["live", "simulated"])
def on_disk(request: pytest.FixtureRequest, tmp_path: Path) -> OnDisk:
    """Runs a scenario on an empty disk."""

    async def main(program: Program, scenario: Scenario) -> None:
        await scenario(SimulatedDisk(program.rng("disk")))

    def play(scenario: Scenario) -> None:
        if request.param == "live":
            asyncio.run(scenario(LiveDisk(tmp_path / "disk")))
        else:
            run(lambda program: main(program, scenario), seed=1)

    return play


def test_what_is_written_is_read_until_it_is_replaced(on_disk: OnDisk) -> None:
    async def scenario(disk: Disk) -> None:
        await disk.write("a/b/c", b"long content")
        await disk.write("d", b"")
        assert (await disk.read("a/b/c"), await disk.read("d")) == (b"long content", b"")
        await disk.write("a/b/c", b"short")
        await disk.sync("a/b/c")
        await disk.sync_folder("a/b")
        await disk.sync_folder("")
        assert await disk.read("a/b/c") == b"short"

    on_disk(scenario)


def test_renamed_files_are_under_their_new_names_only(on_disk: OnDisk) -> None:
    async def scenario(disk: Disk) -> None:
        for path in ("a/x", "a/y", "b/z"):
            await disk.write(path, path.encode())
        await disk.rename("a/x", "b/z")
        await disk.rename("a/y", "a/y")
        assert (await disk.list("a"), await disk.list("b")) == (["y"], ["z"])
        assert await disk.read("b/z") == b"a/x"
        await disk.remove("b/z")
        assert await disk.list("b") == []

    on_disk(scenario)


def test_a_folder_s_list_is_of_its_files_in_order(on_disk: OnDisk) -> None:
    async def scenario(disk: Disk) -> None:
        assert await disk.list("") == []
        for path in ("b", "a", "folder/x", "folder/deeper/y"):
            await disk.write(path, b"")
        assert await disk.list("") == ["a", "b"]
        assert await disk.list("folder") == ["x"]
        assert await disk.list("folder/deeper") == ["y"]

    on_disk(scenario)


async def _number(awaited: Coroutine[None, None, object]) -> int | None:
    with pytest.raises(OSError, match=r".") as caught:
        await awaited
    assert not is_full(caught.value)
    return caught.value.errno


def test_errors_say_why(on_disk: OnDisk) -> None:
    async def scenario(disk: Disk) -> None:
        await disk.write("folder/file", b"")
        missing: list[Coroutine[None, None, object]] = [
            disk.read("x"),
            disk.sync("x"),
            disk.remove("x"),
            disk.rename("x", "y"),
            disk.list("x"),
            disk.sync_folder("x"),
            disk.rename("folder/file", "elsewhere/file"),
        ]
        assert [await _number(each) for each in missing] == [errno.ENOENT] * len(missing)
        assert await _number(disk.read("folder")) == errno.EISDIR
        assert await _number(disk.write("folder", b"")) == errno.EISDIR
        # File systems differ in the reason, not in the refusal.
        assert await _number(disk.rename("folder/file", "folder")) in (errno.EISDIR, errno.ENOTEMPTY)
        assert await _number(disk.write("folder/file/deeper", b"")) in (errno.ENOTDIR, errno.EEXIST)
        assert await disk.list("folder") == ["file"]

    on_disk(scenario)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", "./a", "a\0b"])
def test_no_path_leads_out_of_the_disk(on_disk: OnDisk, path: str) -> None:
    async def scenario(disk: Disk) -> None:
        await disk.write("a/b", b"")
        asks: list[Coroutine[None, None, object]] = [
            disk.read(path),
            disk.write(path, b""),
            disk.sync(path),
            disk.rename("a/b", path),
            disk.rename(path, "a/b"),
            disk.remove(path),
        ]
        if path:
            asks += [disk.list(path), disk.sync_folder(path)]
        for ask in asks:
            with pytest.raises(ValueError, match="not a path"):
                await ask

    on_disk(scenario)
    with pytest.raises(ValueError, match="not a path"):
        check_path(path)


def test_an_atomic_write_makes_and_replaces_and_leaves_nothing_else(on_disk: OnDisk) -> None:
    async def scenario(disk: Disk) -> None:
        for content in (b"first", b"second"):
            await write_atomically(disk, "folder/profile", content)
            assert await disk.read("folder/profile") == content
            assert await disk.list("folder") == ["profile"]

    on_disk(scenario)


def test_a_cancelled_write_has_ended_when_its_cancellation_has(on_disk: OnDisk) -> None:
    """Else its bytes could appear in what is written next."""

    async def scenario(disk: Disk) -> None:
        writing = asyncio.ensure_future(disk.write("a", b"x" * 5_000_000))
        await asyncio.sleep(0)
        writing.cancel()
        await asyncio.wait([writing])
        await disk.write("a", b"next")
        await asyncio.sleep(0.05)
        assert await disk.read("a") == b"next"

    on_disk(scenario)


OLD, NEW = b"old" * 5000, b"new!" * 6000


class _PowerLoss(Exception):
    """The machine went down."""


class _Fuse:
    """A disk that lets so many operations be begun; the machine goes down in the midst of the next, or after it."""

    def __init__(self, disk: SimulatedDisk, num_operations: int) -> None:
        self._disk = disk
        self._left = num_operations

    async def _do(self, operation: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(operation)
        if self._left == 0:
            await asyncio.sleep(0.00005)
            self._disk.crash()
            await asyncio.wait([task])
            assert isinstance(task.exception(), OSError)
            raise _PowerLoss
        self._left -= 1
        await task

    async def read(self, path: str) -> bytes:
        return await self._disk.read(path)

    async def write(self, path: str, data: bytes) -> None:
        await self._do(self._disk.write(path, data))

    async def sync(self, path: str) -> None:
        await self._do(self._disk.sync(path))

    async def sync_folder(self, folder: str) -> None:
        await self._do(self._disk.sync_folder(folder))

    async def rename(self, old: str, new: str) -> None:
        await self._do(self._disk.rename(old, new))

    async def remove(self, path: str) -> None:
        await self._do(self._disk.remove(path))

    async def list(self, folder: str) -> Sequence[str]:
        return await self._disk.list(folder)


async def _after_crashes(
    program: Program, num_operations: int, write: Callable[[Disk, str, bytes], Coroutine[None, None, None]]
) -> bytes | None:
    """What stands after a crash in the midst of one step of replacing a file, or behind the last; None: nothing."""
    disk = SimulatedDisk(program.rng("disk"))
    await write_atomically(disk, "folder/profile", OLD)
    try:
        await write(_Fuse(disk, num_operations), "folder/profile", NEW)
    except _PowerLoss:
        pass
    else:
        disk.crash()
    return await disk.read("folder/profile") if "profile" in await disk.list("folder") else None


STEPS_OF_AN_ATOMIC_WRITE = 4


@pytest.mark.parametrize("num_operations", range(STEPS_OF_AN_ATOMIC_WRITE + 1))
def test_an_atomic_write_survives_a_crash_at_every_step(num_operations: int) -> None:
    found = [
        run(lambda program: _after_crashes(program, num_operations, write_atomically), seed=seed) for seed in range(60)
    ]
    assert set(found) <= {OLD, NEW}
    if num_operations == STEPS_OF_AN_ATOMIC_WRITE:
        assert set(found) == {NEW}
    elif num_operations == STEPS_OF_AN_ATOMIC_WRITE - 1:
        assert set(found) == {OLD, NEW}, "renamed, and not yet synced: both can be"


async def _without_sync(disk: Disk, path: str, data: bytes) -> None:
    await disk.write(f"{path}.new", data)
    await disk.rename(f"{path}.new", path)
    await disk.sync_folder("folder")


async def _without_sync_folder(disk: Disk, path: str, data: bytes) -> None:
    await disk.write(f"{path}.new", data)
    await disk.sync(f"{path}.new")
    await disk.rename(f"{path}.new", path)


async def _in_place(disk: Disk, path: str, data: bytes) -> None:
    await disk.write(path, data)
    await disk.sync(path)


@pytest.mark.parametrize("careless", [_without_sync, _without_sync_folder, _in_place])
def test_the_crashes_find_each_careless_way_to_write(
    careless: Callable[[Disk, str, bytes], Coroutine[None, None, None]],
) -> None:
    def is_wrong(num_operations: int, seed: int) -> bool:
        found = run(lambda program: _after_crashes(program, num_operations, careless), seed=seed)
        return found not in (OLD, NEW) or (num_operations == 3 and found != NEW)

    assert any(is_wrong(num_operations, seed) for num_operations in range(4) for seed in range(60))


def test_an_atomic_write_without_room_leaves_the_old_file_and_no_other() -> None:
    async def main(program: Program) -> None:
        disk = SimulatedDisk(program.rng("disk"))
        await write_atomically(disk, "profile", OLD)
        disk.capacity_bytes = len(OLD) + 100
        with pytest.raises(OSError, match="profile") as caught:
            await write_atomically(disk, "profile", NEW)
        assert is_full(caught.value)
        assert await disk.list("") == ["profile"]
        assert await disk.read("profile") == OLD

    run(main, seed=1)
