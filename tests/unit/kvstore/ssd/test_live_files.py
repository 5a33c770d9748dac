"""Live files on the file systems of this machine: a disk, where the page cache is gone past, and one in memory."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from kvstore.ssd.format import LOCK, PAGE_BYTES, SUPERBLOCK
from kvstore.ssd.live_files import LiveFiles
from rpc.clock import LiveClock
from tests.support.ssd_tiers import OTHER_IDENTITY, blocks, held, open_tier

if TYPE_CHECKING:
    from collections.abc import Iterator

IN_MEMORY = Path("/dev/shm")


@pytest.fixture(params=["disk", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    if request.param == "disk":
        yield tmp_path / "a" / "store"
        return
    if not IN_MEMORY.is_dir():
        pytest.skip("no file system in memory here")
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        yield Path(folder) / "a" / "store"


def segments(root: Path) -> list[Path]:
    """Those that something was written to."""
    return sorted(path for path in root.glob("*/*.kv") if any(path.read_bytes()))


def file_bytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.glob("*/*.kv"))


def wrong_modes(root: Path) -> list[Path]:
    """What is not this user's alone."""
    everything = [root, *root.rglob("*")]
    return [path for path in everything if path.stat().st_mode & 0o777 != (0o700 if path.is_dir() else 0o600)]


def put_other_things(root: Path) -> None:
    (root / "folder").mkdir(parents=True)
    (root / "notes.txt").write_text("mine")
    (root / "folder" / "seg-000000000001.kv").write_text("mine too")


@pytest.mark.parametrize("direct", [True, False])
async def test_what_is_stored_outlasts_the_process(root: Path, direct: bool) -> None:
    async with open_tier(LiveFiles(root, direct=direct), clock=LiveClock()) as tier:
        assert not tier.problem
        assert all(await tier.write(blocks(range(40))))
        assert await held(tier, range(50)) == list(range(40))
    async with open_tier(LiveFiles(root, direct=not direct), clock=LiveClock()) as tier:
        assert await held(tier, range(50)) == list(range(40))
        assert all(await tier.write(blocks(range(40, 140))))
        assert file_bytes(root) <= tier.figures().capacity_bytes
        assert not tier.problem


async def test_nobody_else_can_read_it(root: Path) -> None:
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        await tier.write(blocks([1]))
        assert wrong_modes(root) == []


async def test_a_second_one_learns_who_uses_the_folder(root: Path) -> None:
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        assert all(await tier.write(blocks([1])))
        async with open_tier(LiveFiles(root), clock=LiveClock()) as second:
            assert second.problem == f"in use: [Errno {errno.EWOULDBLOCK}] process {os.getpid()} uses {root}"
        assert await held(tier, [1]) == [1]
    async with open_tier(LiveFiles(root), clock=LiveClock(), identity=OTHER_IDENTITY) as third:
        assert not third.problem


async def test_a_folder_that_is_a_file_is_a_problem_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    for root in (file, file / "below"):
        async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
            assert str(file) in tier.problem
            assert await tier.write(blocks([1])) == [False]
    assert file.read_text() == "mine"


async def test_a_folder_deleted_while_running_is_made_again(root: Path) -> None:
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        assert all(await tier.write(blocks(range(4))))
        shutil.rmtree(root)
        assert not await held(tier, range(4))
        assert all(await tier.write(blocks(range(4))))
        assert await held(tier, range(4)) == [0, 1, 2, 3]
        assert (root / LOCK).exists()
        async with open_tier(LiveFiles(root), clock=LiveClock()) as second:
            assert second.problem.startswith("in use")
    assert len(segments(root)) == 1


async def test_a_folder_deleted_while_it_is_written_is_made_again(root: Path) -> None:
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        assert all(await tier.write(blocks(range(4))))
        shutil.rmtree(root)
        assert all(await tier.write(blocks(range(4, 8))))
        assert await held(tier, range(8)) == [4, 5, 6, 7]
        assert len(segments(root)) == 1


async def test_links_are_not_followed(root: Path, tmp_path: Path) -> None:
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        assert all(await tier.write(blocks([1])))
    (path,) = segments(root)
    elsewhere = tmp_path / "elsewhere.kv"
    shutil.move(path, elsewhere)
    path.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        assert not await held(tier, [1])
        assert all(await tier.write(blocks(range(100))))
    assert elsewhere.read_bytes() == before


async def test_what_stands_there_besides_stays(root: Path) -> None:
    put_other_things(root)
    async with open_tier(LiveFiles(root), clock=LiveClock()) as tier:
        assert all(await tier.write(blocks(range(100))))
        tier.clear(with_pinned=True)
    assert (root / "notes.txt").read_text() == "mine"
    assert (root / "folder" / "seg-000000000001.kv").read_text() == "mine too"
    assert (root / SUPERBLOCK).exists()


async def test_a_removed_file_can_still_be_read_by_who_reads_it(root: Path) -> None:
    files = LiveFiles(root)
    await files.claim()
    await files.make("f/a.kv", 4 * PAGE_BYTES)
    data = files.buffer(PAGE_BYTES)
    data[:] = b"x" * PAGE_BYTES
    await files.write("f/a.kv", PAGE_BYTES, data)
    reading, removed = threading.Event(), threading.Event()

    def slow(view: memoryview) -> bytes:
        reading.set()
        assert removed.wait(30)
        return bytes(view)

    task = asyncio.ensure_future(files.read("f/a.kv", PAGE_BYTES, PAGE_BYTES, slow))
    await asyncio.to_thread(reading.wait, 30)
    await files.remove("f/a.kv")
    removed.set()
    assert await task == bytes(data)
    for call in (
        files.read("f/a.kv", 0, PAGE_BYTES, bytes),
        files.write("f/a.kv", 0, data),
        files.sync("f/a.kv"),
        files.remove("f/a.kv"),
    ):
        with pytest.raises(FileNotFoundError):
            await call
    await files.close(5.0)


async def test_a_read_past_the_end_gets_less(root: Path) -> None:
    files = LiveFiles(root)
    await files.claim()
    await files.make("f/a.kv", 2 * PAGE_BYTES)
    assert await files.read("f/a.kv", PAGE_BYTES, 4 * PAGE_BYTES, len) == PAGE_BYTES
    assert await files.read("f/a.kv", 8 * PAGE_BYTES, PAGE_BYTES, len) == 0
    await files.close(5.0)
    with pytest.raises(OSError, match="is closed"):
        await files.read("f/a.kv", 0, PAGE_BYTES, len)


async def test_no_room_is_an_error_with_its_number_and_leaves_no_file(root: Path) -> None:
    files = LiveFiles(root)
    await files.claim()
    with pytest.raises(OSError) as caught:  # noqa: PT011
        await files.make("f/a.kv", 2**60)
    assert caught.value.errno in (errno.ENOSPC, errno.EFBIG)
    assert not segments(root)
    await files.close(5.0)
