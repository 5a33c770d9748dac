"""Power fails, processes die, bits turn over: no wrong bytes are ever served, and what was safe is still there."""

from __future__ import annotations

import asyncio
import errno
import random
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator.program import run
from tests.support.long_tests import LONG
from tests.support.memory_files import MemoryDisk, MemoryFiles
from tests.support.ssd_tiers import SETTINGS, blocks, held, key, open_tier
from tests.support.ssd_tiers import settings as tier_settings

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvstore.ssd.tier import SsdTier

#: A tier of six segments is overwritten soon.
SMALL = tier_settings(size_bytes=6 * SETTINGS.segment_bytes)
SMALL_FILES_BYTES = 4096
NUMBERS = range(400)


@dataclass(slots=True)
class Owed:
    """What must be there after a crash: what was safe, and not given up since."""

    safe: set[int] = field(default_factory=set[int])

    def stored(self, tier: SsdTier) -> None:
        """All that stands there now is safe."""
        standing = tier.has([key(number) for number in NUMBERS]).tolist()
        self.safe = {number for number, is_here in zip(NUMBERS, standing, strict=True) if is_here}

    def removed(self, keys: Sequence[bytes], _reason: str) -> None:
        gone = set(keys)
        self.safe = {number for number in self.safe if key(number) not in gone}

    def given_up(self, keys: Sequence[bytes], reason: str) -> None:
        """Files that had been removed may be back, so that there is no room for all."""
        if reason == "capacity":
            self.removed(keys, reason)


async def scenario(tier: SsdTier, owed: Owed) -> None:
    """Stores, evicts, moves, pins and clears; each kind of operation at least once."""
    for start in range(0, 96, 12):
        await tier.write(blocks(range(start, start + 12)))
        tier.touch([key(number) for number in range(3)])
        if start == 36:
            tier.pin([key(31), key(7)])
        if start % 24 == 0 and await tier.sync():
            owed.stored(tier)
        await held(tier, range(start, start + 15))
    if await tier.sync():
        owed.stored(tier)
    tier.clear(with_pinned=False)
    await asyncio.sleep(2.0)
    await tier.write(blocks(range(200, 206)))


async def check_after(disk: MemoryDisk, safe: Iterable[int]) -> None:
    """What a new process finds; it can go on from there."""
    owed = Owed(set(safe))
    async with open_tier(MemoryFiles(disk), settings=SMALL, on_removed=owed.given_up) as tier:
        missing = owed.safe - set(await held(tier, NUMBERS))
        assert not missing, f"{sorted(missing)} were safe"
        for start in (300, 320):
            assert all(await tier.write(blocks(range(start, start + 20))))
            assert disk.used_bytes <= SMALL.size_bytes + SMALL_FILES_BYTES
        assert set(range(320, 340)) <= set(await held(tier, NUMBERS))


def num_operations() -> int:
    async def main(_program: object) -> int:
        files = MemoryFiles(MemoryDisk(random.Random(0)))
        async with open_tier(files, settings=SMALL) as tier:
            await scenario(tier, Owed())
            assert {"capacity", "cleared"} <= set(tier.figures().evicted)
        return files.num_operations

    return run(main, seed=0)


@pytest.mark.parametrize("part", range(3))
def test_power_fails_at_every_operation(part: int) -> None:
    async def main(_program: object) -> None:
        disk, owed = MemoryDisk(random.Random(crash_at)), Owed()
        files = MemoryFiles(disk)
        files.crash_at = crash_at
        async with open_tier(files, settings=SMALL, on_removed=owed.removed) as tier:
            await scenario(tier, owed)
        assert files.is_dead
        disk.lose_power()
        await check_after(disk, owed.safe)

    total = num_operations()
    assert total > 100
    for crash_at in range(part, total, 3 if LONG else 12):
        run(main, seed=crash_at)


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_one_operation_fails_whichever_it_is(number: int) -> None:
    async def main(_program: object) -> None:
        disk = MemoryDisk(random.Random(0))
        files = MemoryFiles(disk)
        files.failures[failing] = OSError(number, "")
        async with open_tier(files, settings=SMALL) as tier:
            await scenario(tier, Owed())
            await asyncio.sleep(10.0)
            assert await tier.write(blocks([399])) == [True]
            assert not tier.problem
            standing = await held(tier, NUMBERS)
        disk.lose_power()
        await check_after(disk, standing)

    for failing in range(1, num_operations(), 1 if LONG else 17):
        run(main, seed=failing)


PICKED = st.lists(st.integers(0, 60), min_size=1, max_size=12, unique=True)
ACTIONS = st.one_of(
    st.tuples(st.just("write"), PICKED),
    st.tuples(st.just("read"), PICKED),
    st.tuples(st.just("touch"), PICKED),
    st.tuples(st.just("pin"), PICKED),
    st.tuples(st.just("unpin"), PICKED),
    st.tuples(st.just("drop"), PICKED),
    st.tuples(
        st.sampled_from(
            ["sync", "sleep", "clear", "kill", "power", "turn a bit", "cut off", "delete", "full", "not full", "many"]
        ),
        PICKED,
    ),
)


@settings(max_examples=300 if LONG else 25, deadline=None)
@given(st.lists(ACTIONS, max_size=25), st.integers(0, 2**32 - 1))
def test_whatever_happens_bytes_are_right_and_what_was_safe_stays(
    actions: list[tuple[str, list[int]]], seed: int
) -> None:
    async def main(_program: object) -> None:
        rng = random.Random(seed)
        disk, owed = MemoryDisk(rng), Owed()
        remaining = list(actions)
        while remaining:
            async with open_tier(MemoryFiles(disk), settings=SMALL, on_removed=owed.removed) as tier:
                what = await until_end(tier, disk, owed, remaining, rng)
                # Its process is gone before it can make anything safe.
                if what is not None:
                    tier_files = disk.user
                    assert tier_files is not None
                    tier_files.is_dead = True
            if what == "power":
                disk.lose_power()
            disk.capacity_bytes = None
            async with open_tier(MemoryFiles(disk), settings=SMALL, on_removed=owed.given_up) as tier:
                missing = owed.safe - set(await held(tier, NUMBERS))
                assert not missing, f"{sorted(missing)} were safe before: {what}"
                owed.stored(tier)

    run(main, seed=seed)


async def until_end(
    tier: SsdTier, disk: MemoryDisk, owed: Owed, actions: list[tuple[str, list[int]]], rng: random.Random
) -> str | None:
    """Takes actions from the list until one ends the process; None: the list is at its end."""
    while actions:
        what, numbers = actions.pop(0)
        keys = [key(number) for number in numbers]
        if what == "write":
            await tier.write(blocks(numbers))
        elif what == "many":
            await tier.write(blocks(range(100 + numbers[0], 160 + numbers[0])))
        elif what == "read":
            await held(tier, numbers)
        elif what == "touch":
            tier.touch(keys)
        elif what in ("pin", "unpin"):
            (tier.pin if what == "pin" else tier.unpin)(keys)
        elif what == "drop":
            tier.drop(keys, "dropped")
        elif what == "sync":
            if await tier.sync():
                owed.stored(tier)
        elif what == "sleep":
            await asyncio.sleep(3.0)
        elif what == "clear":
            tier.clear(with_pinned=len(numbers) % 2 == 0)
        elif what in ("full", "not full"):
            disk.capacity_bytes = disk.used_bytes if what == "full" else None
        elif what in ("turn a bit", "cut off", "delete"):
            damage(tier, disk, owed, what, rng)
        else:
            return what
        assert disk.used_bytes <= SMALL.size_bytes + SMALL_FILES_BYTES
    return None


def damage(tier: SsdTier, disk: MemoryDisk, owed: Owed, what: str, rng: random.Random) -> None:
    if not disk.segments():
        return
    path = rng.choice(disk.segments())
    file = disk.files[path]
    hit = [segment for segment in tier.holdings.catalogue.segments if segment.path == path]
    lost = {each.key for segment in hit for each in tier.holdings.catalogue.blocks_of(segment)}
    owed.safe = {number for number in owed.safe if key(number) not in lost}
    if what == "delete":
        del disk.files[path]
    elif what == "cut off":
        at = rng.randrange(len(file.content))
        del file.content[at:], file.synced[at:]
    else:
        at = rng.randrange(max(len(file.content), 1))
        for content in (file.content, file.synced):
            if content:
                content[at] ^= 1 << rng.randrange(8)
