"""The simulated disk's times, failures and crashes. What it shares with the live one stands with the protocol."""

from __future__ import annotations

import asyncio
import errno
from typing import TYPE_CHECKING, TypeVar

import pytest

from contracts.disk import is_full
from simulator import run
from simulator.faults.disk import DiskSpeed, SimulatedDisk

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from simulator import Program

T = TypeVar("T")

SPEED = DiskSpeed(latency_s=0.1, bytes_per_s=1000.0, sync_s=0.5)

PAGE = 4096


def on_disk(scenario: Callable[[SimulatedDisk], Coroutine[None, None, T]], seed: int = 1) -> T:
    async def main(program: Program) -> T:
        return await scenario(SimulatedDisk(program.rng("disk"), speed=SPEED))

    return run(main, seed=seed)


def now_s() -> float:
    return round(asyncio.get_running_loop().time(), 6)


def test_everything_takes_its_time_one_after_another() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        await asyncio.gather(disk.write("a", b"x" * 400), disk.write("b", b"x" * 200))
        assert now_s() == 0.5 + 0.3
        await disk.read("a")
        assert now_s() == 0.8 + 0.5
        await disk.sync("a")
        assert now_s() == 1.3 + 0.6
        await disk.rename("a", "c")
        await disk.list("")
        await disk.remove("c")
        assert now_s() == 2.2

    on_disk(scenario)


def test_a_slow_or_stalled_disk_takes_longer_for_as_long_as_it_is() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        disk.slowdown = 10.0
        await disk.write("a", b"x" * 100)
        assert now_s() == 2.0
        disk.slowdown = 1.0
        disk.stall(30.0)
        await disk.write("a", b"x" * 100)
        assert now_s() == 32.2
        await disk.write("a", b"x" * 100)
        assert now_s() == 32.4

    on_disk(scenario)


def test_a_full_disk_keeps_what_fitted_and_has_room_again_after_removals() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        disk.capacity_bytes = 100
        await disk.write("a", b"a" * 60)
        with pytest.raises(OSError, match="'b'") as caught:
            await disk.write("b", b"b" * 60)
        assert is_full(caught.value)
        assert await disk.read("b") == b"b" * 40
        await disk.write("a", b"A" * 50)
        await disk.remove("a")
        await disk.write("b", b"b" * 100)
        disk.capacity_bytes = 10
        with pytest.raises(OSError, match="'c'"):
            await disk.write("c", b"c")

    on_disk(scenario)


def test_read_errors_and_rotten_bits_come_as_often_as_asked_and_only_then() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        await disk.write("a", b"\0" * 50)
        assert {await disk.read("a") for _ in range(50)} == {b"\0" * 50}
        disk.read_error_chance = 0.25
        ends = await asyncio.gather(*(disk.read("a") for _ in range(400)), return_exceptions=True)
        errors = [end for end in ends if isinstance(end, OSError)]
        assert {(error.errno, is_full(error)) for error in errors} == {(errno.EIO, False)}
        assert len(errors) == pytest.approx(100, abs=35)
        disk.read_error_chance, disk.bit_rot_chance = 0.0, 1.0
        await disk.sync("a")
        await disk.sync_folder("")
        rotten = await disk.read("a")
        assert sum(byte.bit_count() for byte in rotten) == 1
        disk.bit_rot_chance = 0.0
        disk.crash()
        assert await disk.read("a") == rotten, "the file is rotten, not the reading"

    on_disk(scenario)


def test_a_cancelled_write_leaves_the_part_that_was_written() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        writing = asyncio.ensure_future(disk.write("a", b"x" * 900))
        await asyncio.sleep(0.5)
        writing.cancel()
        await asyncio.wait([writing])
        assert await disk.read("a") == b"x" * 450

    on_disk(scenario)


def test_who_reads_during_a_write_sees_a_part() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        await disk.write("a", b"old")
        writing = asyncio.ensure_future(disk.write("a", b"new"))
        await asyncio.sleep(0)
        reading = asyncio.ensure_future(disk.read("a"))
        await writing
        assert await reading in (b"", b"new")

    on_disk(scenario)


async def _crashed(disk: SimulatedDisk, path: str = "a") -> bytes | None:
    disk.crash()
    return await disk.read(path) if path in await disk.list("") else None


def after_crashes(
    prepare: Callable[[SimulatedDisk], Coroutine[None, None, None]], path: str = "a"
) -> set[bytes | None]:
    async def scenario(disk: SimulatedDisk) -> bytes | None:
        await prepare(disk)
        return await _crashed(disk, path)

    return {on_disk(scenario, seed) for seed in range(100)}


def test_what_was_synced_with_its_folder_outlasts_crashes() -> None:
    async def prepare(disk: SimulatedDisk) -> None:
        await disk.write("a", b"synced")
        await disk.sync("a")
        await disk.sync_folder("")
        disk.crash()

    assert after_crashes(prepare) == {b"synced"}


def test_a_file_whose_folder_was_not_synced_is_there_or_not() -> None:
    async def prepare(disk: SimulatedDisk) -> None:
        await disk.write("a", b"synced")
        await disk.sync("a")

    assert after_crashes(prepare) == {b"synced", None}


def test_unsynced_content_is_torn_at_pages_and_at_its_length() -> None:
    old, new = b"o" * (3 * PAGE), b"n" * (4 * PAGE)

    async def prepare(disk: SimulatedDisk) -> None:
        await disk.write("a", old)
        await disk.sync("a")
        await disk.sync_folder("")
        await disk.write("a", new)

    found = after_crashes(prepare)
    assert {old, new} < found
    num_mixed = 0
    for content in found:
        assert content is not None
        assert len(old) <= len(content) <= len(new)
        for at in range(0, len(content), PAGE):
            page = content[at : at + PAGE]
            assert page.strip(page[:1]) == b"", "a page is all of one"
            assert page[:1] in ((b"o", b"n") if at < len(old) else (b"\0", b"n"))
        kinds = {content[at : at + 1] for at in range(0, len(old), PAGE)}
        num_mixed += len(kinds) == 2
    assert num_mixed > 0


def test_unsynced_renames_and_removals_have_happened_or_not_and_a_file_has_one_name() -> None:
    async def main(disk: SimulatedDisk) -> tuple[tuple[str, bytes], ...]:
        for path in ("a", "b", "c"):
            await disk.write(path, path.encode())
            await disk.sync(path)
        await disk.sync_folder("")
        await disk.rename("a", "b")
        await disk.rename("b", "d")
        await disk.remove("c")
        disk.crash()
        return tuple([(path, await disk.read(path)) for path in await disk.list("")])

    a, b, c, d = ("a", b"a"), ("b", b"b"), ("c", b"c"), ("d", b"a")
    untouched, first, second, both = (a, b), (("b", b"a"),), (b, d), (d,)
    found = {on_disk(main, seed) for seed in range(200)}
    without_c = {tuple(entry for entry in each if entry != c) for each in found}
    assert without_c == {untouched, first, second, both}
    assert {c in each for each in found} == {True, False}


def test_a_crash_ends_what_is_under_way() -> None:
    async def scenario(disk: SimulatedDisk) -> None:
        writing, listing = asyncio.ensure_future(disk.write("a", b"x" * 100)), asyncio.ensure_future(disk.list(""))
        await asyncio.sleep(0.05)
        disk.crash()
        await asyncio.wait([writing, listing])
        for error in (writing.exception(), listing.exception()):
            assert isinstance(error, OSError)
            assert error.errno == errno.EIO
        assert await disk.list("") in ([], ["a"])

    on_disk(scenario)


def test_what_changes_during_a_sync_is_not_synced_by_it() -> None:
    async def prepare(disk: SimulatedDisk) -> None:
        await disk.write("a", b"old")
        await disk.sync_folder("")
        syncing = asyncio.ensure_future(disk.sync("a"))
        await asyncio.sleep(0)
        writing = asyncio.ensure_future(disk.write("a", b"new"))
        await asyncio.wait([syncing, writing])

    found = after_crashes(prepare)
    assert {b"old", b"new"} <= found


def test_one_seed_one_story() -> None:
    async def scenario(disk: SimulatedDisk) -> list[object]:
        disk.read_error_chance, disk.bit_rot_chance = 0.2, 0.2
        story: list[object] = []
        for number in range(30):
            path = f"{number % 5}"
            await disk.write(path, bytes([number]) * 5000)
            if number % 3 == 0:
                await disk.sync_folder("")
            if number % 7 == 0:
                disk.crash()
            try:
                story.append(await disk.read(path))
            except OSError as error:
                story.append(error.errno)
        return story

    assert on_disk(scenario, 1) == on_disk(scenario, 1)
    assert on_disk(scenario, 1) != on_disk(scenario, 2)
