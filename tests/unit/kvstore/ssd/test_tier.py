"""The disk tier over files in memory: what it stores it gives back, and whatever the disk does is a miss at worst."""

from __future__ import annotations

import asyncio
import errno
import json
import random
from typing import TYPE_CHECKING, Any

import pytest
from xxhash import xxh3_64_hexdigest

from contracts.errors import ConfigError
from kvstore.ssd.format import SUPERBLOCK
from kvstore.ssd.health import MAX_READ_FAILURES
from kvstore.ssd.superblock import superblock
from simulator.program import run
from tests.support.memory_files import MemoryDisk, MemoryFiles
from tests.support.ssd_tiers import (
    BLOCK_BYTES,
    OTHER_IDENTITY,
    SEGMENT_BYTES,
    SETTINGS,
    blocks,
    held,
    key,
    open_tier,
    settings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

#: Superblock and lock.
SMALL_FILES_BYTES = 4096


def virtual(main: Callable[[MemoryDisk], Coroutine[Any, Any, None]]) -> Callable[[], None]:
    """A test on virtual time."""

    def test() -> None:
        run(lambda _program: main(MemoryDisk(random.Random(1))), seed=1)

    test.__name__, test.__doc__ = main.__name__, main.__doc__
    return test


def error(number: int) -> OSError:
    return OSError(number, "")


class HalvingCodec:
    """Not a codec for KV: keeps the first half. Lossy."""

    codec_id = 7
    name = "halving"

    def encode(self, block: memoryview, /) -> bytes:
        return bytes(block[: len(block) // 2])

    def decode(self, data: memoryview, into: memoryview, /) -> None:
        into[: len(data)] = data
        into[len(data) :] = bytes(len(into) - len(data))


class FailingCodec(HalvingCodec):
    codec_id = 8

    def encode(self, block: memoryview, /) -> bytes:
        raise ValueError("no")


@virtual
async def test_what_is_stored_is_there_also_after_a_restart(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        assert await tier.write(blocks(range(9))) == [True] * 9
        assert await held(tier, [8, 3, 99, 0]) == [8, 3, 0]
    async with open_tier(MemoryFiles(disk)) as tier:
        assert sorted(tier.all_keys()) == sorted(key(number) for number in range(9))
        assert tier.has([key(0), key(9)]).tolist() == [True, False]
        assert await held(tier, range(12)) == list(range(9))
        assert await tier.write(blocks(range(7, 12))) == [True] * 5
        assert await held(tier, range(12)) == list(range(12))


@virtual
async def test_a_block_that_stands_here_is_not_written_again(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    async with open_tier(files) as tier:
        await tier.write(blocks([1, 2]))
        before = files.num_operations
        assert await tier.write(blocks([2, 1, 2])) == [True] * 3
        assert files.num_operations == before
        assert await tier.write([*blocks([3]), *blocks([3])]) == [True, True]
        assert tier.figures().num_blocks == 3


@virtual
async def test_neighbours_are_read_at_once(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    async with open_tier(files) as tier:
        await tier.write(blocks(range(16)))
        before = files.num_operations
        assert len(await held(tier, range(16))) == 16
        assert files.num_operations == before + 1


@virtual
async def test_the_tier_stays_within_its_size_and_keeps_what_is_asked_for(disk: MemoryDisk) -> None:
    gone: list[bytes] = []

    def removed(keys: Sequence[bytes], _reason: str) -> None:
        gone.extend(keys)

    async with open_tier(MemoryFiles(disk), on_removed=removed) as tier:
        for start in range(0, 1000, 10):
            assert all(await tier.write(blocks(range(start, start + 10))))
            assert disk.used_bytes <= SETTINGS.size_bytes + SMALL_FILES_BYTES
            tier.touch([key(number) for number in range(8)])
            await asyncio.sleep(60.0)
        standing = await held(tier, range(1000))
        assert standing[:8] == list(range(8)), "asked for all the time"
        assert standing[-100:] == list(range(900, 1000)), "new"
        assert len(standing) > 150, "most of the room is used"
        assert sorted(gone) == sorted(key(number) for number in range(1000) if number not in standing)
        figures = tier.figures()
        assert figures.evicted == {"capacity": len(gone)}
        assert figures.evicted_age_s is not None
        assert figures.used_bytes <= figures.capacity_bytes


@virtual
async def test_pinned_blocks_are_never_given_up_for_room(disk: MemoryDisk) -> None:
    pinned = range(0, 300, 10)
    async with open_tier(MemoryFiles(disk)) as tier:
        for start in range(0, 1000, 10):
            await tier.write(blocks(range(start, start + 10)))
            if start in pinned:
                tier.pin([key(start), key(5000)])
            assert disk.used_bytes <= SETTINGS.size_bytes + SMALL_FILES_BYTES
        assert set(pinned) <= set(await held(tier, range(1000)))
        assert tier.figures().pinned_blocks == len(pinned)
        tier.unpin([key(number) for number in pinned])
        for start in range(1000, 2000, 10):
            await tier.write(blocks(range(start, start + 10)))
        assert not await held(tier, pinned)


@virtual
async def test_a_tier_full_of_pinned_blocks_takes_nothing_more(disk: MemoryDisk) -> None:
    stored = [True]
    async with open_tier(MemoryFiles(disk)) as tier:
        for start in range(0, 1000, 10):
            stored = await tier.write(blocks(range(start, start + 10)))
            tier.pin([key(number) for number in range(start, start + 10)])
        assert not any(stored)
        assert tier.holdings.refused["no room"] > 0
        assert disk.used_bytes <= SETTINGS.size_bytes + SMALL_FILES_BYTES
        assert not tier.figures().evicted
        assert len(await held(tier, range(1000))) == tier.figures().num_blocks > 150


@virtual
async def test_what_was_cleared_does_not_come_back(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(100)))
        tier.pin([key(3), key(50)])
        assert tier.clear(with_pinned=False) == 98
        assert await held(tier, range(100)) == [3, 50]
        await asyncio.sleep(5.0)
        assert len(disk.segments()) == 1, "what was pinned has moved together"
        assert await held(tier, range(100)) == [3, 50]
    async with open_tier(MemoryFiles(disk)) as tier:
        assert await held(tier, range(100)) == [3, 50]
        assert tier.clear(with_pinned=True) == 2
        await asyncio.sleep(5.0)
        assert not disk.segments()
        assert await tier.write(blocks([1])) == [True]


@virtual
async def test_what_is_being_written_is_cleared_too(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    async with open_tier(files) as tier:
        files.hanging.add("write")
        writing = asyncio.ensure_future(tier.write(blocks(range(20))))
        await asyncio.sleep(0.1)
        tier.clear(with_pinned=True)
        files.wake()
        assert not any(await writing)
        assert not tier.figures().num_blocks
        assert not tier.problem
        assert await tier.write(blocks([1])) == [True]


@virtual
async def test_a_full_disk_is_no_store_and_is_tried_again(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        assert all(await tier.write(blocks(range(10))))
        disk.capacity_bytes = disk.used_bytes
        stored = [all(await tier.write(blocks(range(start, start + 10)))) for start in range(10, 100, 10)]
        assert not stored[-1]
        assert tier.problem.startswith("disk full")
        assert tier.figures().problem == tier.problem
        assert await held(tier, range(10)) == list(range(10)), "reading goes on"
        disk.capacity_bytes = None
        assert not any(await tier.write(blocks([500]))), "not before its time"
        await asyncio.sleep(2.0)
        assert await tier.write(blocks([500])) == [True]
        assert not tier.problem


@pytest.mark.parametrize("kind", ["make", "write"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_whatever_a_write_fails_with_costs_only_what_was_to_be_stored(kind: str, number: int) -> None:
    async def main(_program: object) -> None:
        files = MemoryFiles(disk)
        async with open_tier(files) as tier:
            assert all(await tier.write(blocks(range(4))))
            files.failing[kind] = error(number)
            assert not all([all(await tier.write(blocks(range(start, start + 4)))) for start in range(4, 40, 4)])
            assert tier.problem
            files.failing.clear()
            await asyncio.sleep(100.0)
            assert all(await tier.write(blocks(range(100, 104))))
            assert {0, 1, 2, 3, 100, 101, 102, 103} <= set(await held(tier, range(104)))
        async with open_tier(MemoryFiles(disk)) as tier:
            assert {0, 1, 2, 3, 100, 101, 102, 103} <= set(await held(tier, range(104)))

    disk = MemoryDisk(random.Random(1))
    run(main, seed=1)


@virtual
async def test_a_disk_that_cannot_be_read_is_left_alone_for_a_while(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    async with open_tier(files) as tier:
        await tier.write(blocks(range(40)))
        files.failing["read"] = error(errno.EIO)
        for number in range(MAX_READ_FAILURES):
            assert not await held(tier, [number])
        assert tier.problem.startswith("cannot read")
        before = files.num_operations
        assert not await held(tier, [9])
        assert files.num_operations == before, "not even asked"
        assert tier.has([key(number) for number in range(40)]).all(), "what cannot be read now may be there later"
        files.failing.clear()
        await asyncio.sleep(2.0)
        assert await held(tier, range(40)) == list(range(40))
        assert not tier.problem


@virtual
async def test_damage_is_dropped_and_never_served(disk: MemoryDisk) -> None:
    gone: list[tuple[Sequence[bytes], str]] = []

    def removed(keys: Sequence[bytes], reason: str) -> None:
        gone.append((keys, reason))

    async with open_tier(MemoryFiles(disk), on_removed=removed) as tier:
        await tier.write(blocks(range(4)))
        (location,) = tier.holdings.catalogue.locate([key(2)])
        assert location is not None
        disk.files[location.segment.path].content[location.offset + 100] ^= 1
        assert await held(tier, range(4)) == [0, 1, 3]
        assert gone == [([key(2)], "corrupt")]
        assert tier.holdings.missed == {"corrupt": 1}
        assert await tier.write(blocks([2])) == [True]
        assert await held(tier, range(4)) == [0, 1, 2, 3]


@virtual
async def test_the_newest_blocks_are_looked_at_before_they_are_promised(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(4)))
        (location,) = tier.holdings.catalogue.locate([key(2)])
        assert location is not None
    disk.files[location.segment.path].content[location.offset] ^= 0x80
    async with open_tier(MemoryFiles(disk)) as tier:
        assert tier.has([key(number) for number in range(4)]).tolist() == [True, True, False, True]


@virtual
async def test_old_damage_is_found_in_time(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(100)))
        (location,) = tier.holdings.catalogue.locate([key(2)])
        assert location is not None
    disk.files[location.segment.path].content[location.offset] ^= 0x80
    rate = settings(scrub_bytes_per_s=BLOCK_BYTES)
    async with open_tier(MemoryFiles(disk), settings=rate) as tier:
        assert tier.has([key(2)]).all()
        await asyncio.sleep(200.0)
        assert not tier.has([key(2)]).any()
        assert tier.figures().num_blocks == 99


@virtual
async def test_a_damaged_header_costs_its_record_alone(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(8)))
    (path,) = disk.segments()
    content = disk.files[path].content
    second = content.index(b"TANDEMKV", 8)
    content[second + 200] ^= 1
    async with open_tier(MemoryFiles(disk)) as tier:
        assert await held(tier, range(8)) == [0, 1, 4, 5, 6, 7]


@virtual
async def test_a_file_that_was_cut_off_loses_its_end(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(16)))
        (path,) = disk.segments()
        for content in (disk.files[path].content, disk.files[path].synced):
            del content[SEGMENT_BYTES // 2 :]
        standing = await held(tier, range(16))
        assert 4 <= len(standing) < 16
    async with open_tier(MemoryFiles(disk)) as tier:
        assert await held(tier, range(16)) == standing


@virtual
async def test_files_deleted_while_running_are_misses_and_are_made_again(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(40)))
        disk.files.clear()
        assert await tier.write(blocks(range(40, 44))) == [True] * 4
        assert await held(tier, range(44)) == [40, 41, 42, 43]
        assert not tier.problem
        assert tier.figures().evicted == {"lost": 40}


@virtual
async def test_a_folder_of_another_build_is_left_alone(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(4)))
    of_a_later_build = {"what": "x", "format": 99, "new": [1], "check": xxh3_64_hexdigest(b"x 99")}
    disk.files[SUPERBLOCK].content[:] = json.dumps(of_a_later_build).encode()
    before = {path: bytes(file.content) for path, file in disk.files.items()}
    async with open_tier(MemoryFiles(disk), name="/a/folder") as tier:
        for part in ("/a/folder", "format 99", "format 1", "delete"):
            assert part in tier.problem
        assert await tier.write(blocks(range(4))) == [False] * 4
        assert not await held(tier, range(4))
        await asyncio.sleep(100.0)
    assert {path: bytes(file.content) for path, file in disk.files.items()} == before


@virtual
async def test_a_damaged_superblock_is_made_anew(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(4)))
    disk.files[SUPERBLOCK].content[:] = b"\0" * 40
    async with open_tier(MemoryFiles(disk)) as tier:
        assert await held(tier, range(4)) == [0, 1, 2, 3]
    assert disk.files[SUPERBLOCK].content == superblock()


@virtual
async def test_a_folder_in_use_says_so_and_is_taken_when_it_is_free(disk: MemoryDisk) -> None:
    found: list[bytes] = []
    async with open_tier(MemoryFiles(disk)) as first:
        await first.write(blocks(range(4)))
        second = open_tier(MemoryFiles(disk), on_found=found.extend)
        tier = await second.__aenter__()
        assert tier.problem.startswith("in use: ")
        assert await tier.write(blocks([9])) == [False]
    await asyncio.sleep(70.0)
    assert not tier.problem
    assert sorted(found) == sorted(key(number) for number in range(4))
    assert await held(tier, range(4)) == [0, 1, 2, 3]
    await second.__aexit__(None, None, None)


@pytest.mark.parametrize("kind", ["claim", "load", "replace", "list"])
def test_a_folder_that_cannot_be_used_stores_nothing_until_it_can(kind: str) -> None:
    async def main(_program: object) -> None:
        files = MemoryFiles(MemoryDisk(random.Random(1)))
        files.failing[kind] = error(errno.EACCES)
        async with open_tier(files) as tier:
            assert tier.problem.startswith("not allowed")
            assert await tier.write(blocks([1])) == [False]
            assert not await held(tier, [1])
            files.failing.clear()
            await asyncio.sleep(70.0)
            assert not tier.problem
            assert await tier.write(blocks([1])) == [True]

    run(main, seed=1)


@virtual
async def test_blocks_of_other_models_count_and_go_first(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk), identity=OTHER_IDENTITY) as tier:
        for start in range(0, 200, 10):
            assert all(await tier.write(blocks(range(start, start + 10))))
    num_others = len(disk.segments())
    async with open_tier(MemoryFiles(disk)) as tier:
        assert not await held(tier, range(200)), "they are another model's"
        for start in range(0, 100, 10):
            assert all(await tier.write(blocks(range(start, start + 10))))
            assert disk.used_bytes <= SETTINGS.size_bytes + SMALL_FILES_BYTES
        assert await held(tier, range(100)) == list(range(100))
    left = [path for path in disk.segments() if disk.files[path].changed_s <= num_others + 1]
    assert 0 < len(left) < num_others
    async with open_tier(MemoryFiles(disk), identity=OTHER_IDENTITY) as tier:
        standing = await held(tier, range(200))
        assert standing
        assert standing == list(range(standing[0], 200)), "the oldest went first"


@virtual
async def test_a_smaller_size_is_kept_from_the_start(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        await tier.write(blocks(range(150)))
    small = settings(size_bytes=5 * SEGMENT_BYTES)
    async with open_tier(MemoryFiles(disk), settings=small) as tier:
        assert disk.used_bytes <= small.size_bytes + SMALL_FILES_BYTES
        assert await held(tier, range(150))


def test_a_tier_too_small_for_its_blocks_says_what_it_needs() -> None:
    with pytest.raises(ConfigError, match="it needs at least"):
        settings(size_bytes=SEGMENT_BYTES).segment_bytes_for(BLOCK_BYTES)


@virtual
async def test_a_disk_that_hangs_is_a_miss_in_time_and_writes_to_nobody_later(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    limits = settings(read_timeout_s=1.0)
    loop = asyncio.get_running_loop()
    async with open_tier(files, settings=limits) as tier:
        await tier.write(blocks(range(4)))
        files.hanging.add("read")
        target, begun_s = bytearray(BLOCK_BYTES), loop.time()
        assert await tier.read([key(1)], [memoryview(target)]) == [False]
        assert loop.time() - begun_s <= 1.01
        files.wake()
        await asyncio.sleep(1.0)
        assert not any(target), "the caller may have given it to somebody else"
        assert await held(tier, range(4)) == [0, 1, 2, 3]


@virtual
async def test_reads_that_hang_do_not_hold_up_others_for_long(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    limits = settings(read_timeout_s=1.0, num_reads=2, read_bytes=4096)
    async with open_tier(files, settings=limits) as tier:
        await tier.write(blocks(range(10)))
        files.hanging.add("read")
        loop = asyncio.get_running_loop()
        begun_s = loop.time()
        found = await asyncio.gather(*(held(tier, [number]) for number in range(10)))
        assert not any(found)
        assert loop.time() - begun_s <= 1.01


@virtual
async def test_a_write_that_hangs_is_not_stored_in_time(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    limits = settings(write_timeout_s=1.0)
    loop = asyncio.get_running_loop()
    async with open_tier(files, settings=limits) as tier:
        assert all(await tier.write(blocks(range(4))))
        files.hanging.add("write")
        begun_s = loop.time()
        assert not any(await tier.write(blocks(range(4, 30))))
        assert loop.time() - begun_s <= 1.01
        await asyncio.sleep(0.1)
        assert "does not answer" in tier.problem
        files.wake()
        await asyncio.sleep(10.0)
        assert all(await tier.write(blocks(range(4, 30))))
        assert await held(tier, range(30)) == list(range(30))


@virtual
async def test_more_than_the_queue_holds_is_refused(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    limits = settings(max_write_queue_bytes=10 * BLOCK_BYTES, max_read_queue_bytes=10 * BLOCK_BYTES)
    async with open_tier(files, settings=limits) as tier:
        stored = await tier.write(blocks(range(15)))
        assert stored == [True] * 10 + [False] * 5
        await tier.write(blocks(range(10, 15)))
        files.hanging.add("read")
        first = asyncio.ensure_future(held(tier, range(15)))
        await asyncio.sleep(0.1)
        assert not await held(tier, [3])
        assert tier.holdings.missed["too many reads wait"] == 1
        files.wake()
        assert len(await first) == 15


@virtual
async def test_a_cancelled_read_writes_to_nobody_later(disk: MemoryDisk) -> None:
    files = MemoryFiles(disk)
    async with open_tier(files) as tier:
        await tier.write(blocks(range(4)))
        files.hanging.add("read")
        target = bytearray(BLOCK_BYTES)
        reading = asyncio.ensure_future(tier.read([key(1)], [memoryview(target)]))
        await asyncio.sleep(0.1)
        reading.cancel()
        await asyncio.wait([reading])
        assert reading.cancelled()
        files.wake()
        await asyncio.sleep(1.0)
        assert not any(target)


@virtual
async def test_lossy_blocks_go_through_their_codec_and_exact_ones_do_not(disk: MemoryDisk) -> None:
    codec = HalvingCodec()
    async with open_tier(MemoryFiles(disk), lossy=codec) as tier:
        lossy = [type(each)(key=each.key, position=0, payload=each.payload, lossy=True) for each in blocks([1])]
        assert await tier.write([*lossy, *blocks([2])]) == [True, True]
        described = tier.describe([key(1), key(2), key(3)])
        assert [each and (each.codec, each.num_bytes) for each in described] == [
            (7, BLOCK_BYTES // 2),
            (0, BLOCK_BYTES),
            None,
        ]
        target = bytearray(b"\1" * BLOCK_BYTES)
        assert await tier.read([key(1)], [memoryview(target)]) == [True]
        assert target[: BLOCK_BYTES // 2] == lossy[0].payload[: BLOCK_BYTES // 2]
        assert not any(target[BLOCK_BYTES // 2 :])
        assert await held(tier, [2]) == [2]
    async with open_tier(MemoryFiles(disk)) as tier:
        assert not await held(tier, [1]), "nobody here knows the codec"
        assert tier.holdings.missed == {"unknown codec": 1}


@virtual
async def test_a_block_that_its_codec_fails_on_stays_as_it_is(disk: MemoryDisk) -> None:
    said = list[str]()
    async with open_tier(MemoryFiles(disk), exact=FailingCodec(), log=said.append) as tier:
        assert tier.figures().unencoded_blocks == 0
        assert await tier.write(blocks([1])) == [True]
        assert await held(tier, [1]) == [1]
        # Told at once, then once a minute; counted always.
        assert await tier.write(blocks([2, 3])) == [True, True]
        (line,) = said
        assert line.startswith("codec halving failed, a block is kept on disk without it: ")
        await asyncio.sleep(60.0)
        assert await tier.write(blocks([4])) == [True]
        assert said[1].startswith("codec halving failed, 3 blocks are kept on disk without it: ")
        assert tier.figures().unencoded_blocks == 4


@virtual
async def test_a_payload_that_is_no_block_is_the_callers_mistake(disk: MemoryDisk) -> None:
    async with open_tier(MemoryFiles(disk)) as tier:
        block = blocks([1])[0]
        with pytest.raises(ValueError, match="a block has"):
            await tier.write([type(block)(key=block.key, position=0, payload=block.payload[:-1])])
